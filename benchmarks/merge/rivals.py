"""What one would take instead: the papers' routes as they are written down, and PEFT. Same threads, same float32 factors.

Each takes the uploads of one layer, [(factors, p_k), …], and returns the pair (B, A) whose product stands for the sum.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from umbel import algebra
from umbel.algebra import Product
from umbel.method import Factors

Uploads = Sequence[tuple[Factors, float]]


def florist(uploads: Uploads, energy: float) -> Product:
    """FLoRIST as published (arXiv 2506.09199): thin SVDs of both stacks, then of the core between them.

    The rank is chosen by `algebra.energy_rank` here too: at τ = 1 a cumulated sum in float32 would choose by its rounding.
    """
    B = torch.cat([own["B"] for own, _ in uploads], dim=1)
    A = torch.cat([p * own["A"] for own, p in uploads], dim=0)
    U_B, S_B, V_B = torch.linalg.svd(B, full_matrices=False)
    U_A, S_A, V_A = torch.linalg.svd(A, full_matrices=False)
    core = S_B[:, None] * (V_B @ U_A) * S_A
    U, s, V = torch.linalg.svd(core, full_matrices=False)
    p = algebra.energy_rank(s, energy)
    return U_B @ U[:, :p] * s[:p], V[:p] @ V_A


def flexlora(uploads: Uploads, rank: int) -> Product:
    """FlexLoRA as published (arXiv 2402.11505): the sum formed densely, its SVD, the first `rank` directions."""
    U, s, V = torch.linalg.svd(_dense(uploads), full_matrices=False)
    return U[:, :rank] * s[:rank], V[:rank]


def _dense(uploads: Uploads) -> Tensor:
    first = uploads[0][0]
    M = torch.zeros(first["B"].shape[0], first["A"].shape[1])
    for own, p in uploads:
        M += p * (own["B"] @ own["A"])
    return M


class FLoRANA:
    """FLoRA-NA (arXiv 2509.26399) by Adam on ‖(Σ P_u B_u)(Σ Q_v A_v) − M‖_F² with M dense, as a reader of the paper would.

    From P = Q = p. Whenever `PATIENCE` steps have not lowered the best loss by `TOLERANCE` of itself, it goes on from the best
    with a quarter of the learning rate, up to `CUTS` times; then it stops, at most after `STEPS`.
    """

    STEPS, PATIENCE, TOLERANCE, CUTS = 1000, 10, 1e-4, 3

    def __init__(self, learning_rate: float = 0.1) -> None:
        """Takes Adam's first learning rate as a share of the mean coefficient 1 / K."""
        self.learning_rate = learning_rate
        self.steps = 0

    def __call__(self, uploads: Uploads) -> Product:
        M = _dense(uploads)
        Bs, As = (torch.stack([own[name] for own, _ in uploads]) for name in ("B", "A"))
        p = torch.tensor([p for _, p in uploads])
        P, Q = (p.clone().requires_grad_() for _ in range(2))
        optimizer = torch.optim.Adam([P, Q], lr=self.learning_rate / len(uploads))
        best, before, kept, cuts = float("inf"), float("inf"), (p, p), 0
        for step in range(1, self.STEPS + 1):
            self.steps = step
            optimizer.zero_grad()
            loss = (torch.einsum("u,umr->mr", P, Bs) @ torch.einsum("v,vrn->rn", Q, As) - M).square().sum()
            loss.backward()
            if (value := loss.item()) < best:
                best, kept = value, (P.detach().clone(), Q.detach().clone())
            optimizer.step()
            if step % self.PATIENCE:
                continue
            if before - best < self.TOLERANCE * best:
                if cuts == self.CUTS:
                    break
                cuts += 1
                P, Q = (x.clone().requires_grad_() for x in kept)
                optimizer = torch.optim.Adam([P, Q], lr=self.learning_rate / len(uploads) / 4**cuts)
            before = best
        return torch.einsum("u,umr->mr", kept[0], Bs), torch.einsum("v,vrn->rn", kept[1], As)


class Peft:
    """PEFT's `add_weighted_adapter` on a model that is nothing but a few linear layers of one shape, all with the same factors.

    PEFT needs the base model in memory; a few layers of it are enough to time one. Building the model and loading the
    adapters is not part of what is timed.
    """

    def __init__(self, uploads: Uploads, layers: int) -> None:
        import peft

        first = uploads[0][0]
        rank, d_in = first["A"].shape
        base = nn.ModuleDict({f"layer{i}": nn.Linear(d_in, first["B"].shape[0], bias=False) for i in range(layers)})
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(base))
        self.layers, self._weights = layers, [p for _, p in uploads]
        self._names = [f"client{k}" for k in range(len(uploads))]
        self.model: Any = peft.PeftModel(base, config, adapter_name=self._names[0])  # type: ignore[arg-type]
        for name in self._names[1:]:
            self.model.add_adapter(name, config)
        with torch.no_grad():
            for module in self._modules():
                for name, (own, _) in zip(self._names, uploads):
                    module.lora_A[name].weight.copy_(own["A"])
                    module.lora_B[name].weight.copy_(own["B"])

    def _modules(self) -> list[Any]:
        return [module for module in self.model.modules() if isinstance(getattr(module, "lora_A", None), nn.ModuleDict)]

    @staticmethod
    def dense_bytes(uploads: Uploads) -> int:
        """Returns about what "svd" holds at its peak: every client's dense product, their stack, and the weighted stack."""
        first = uploads[0][0]
        return 3 * 4 * len(uploads) * first["B"].shape[0] * first["A"].shape[1]

    def merge(self, combination: str) -> None:
        """Adds the weighted adapter to every layer: "svd", "cat" or "linear"."""
        self.model.add_weighted_adapter(self._names, self._weights, combination, combination_type=combination)

    def take(self, combination: str) -> Product:
        """Returns the first layer's merged pair and removes the adapter from all."""
        module = self._modules()[0]
        B, A = module.lora_B[combination].weight.detach().clone(), module.lora_A[combination].weight.detach().clone()
        scale = module.scaling[combination]
        self.model.delete_adapter(combination)
        return B * scale, A
