"""HetLoRA: smaller adapters padded with zeros, weighed by how much they say, and pruned (arXiv 2401.06432, EMNLP 2024).

    A_k = A[:r_k],  B_k = B[:, :r_k]                             (1)    what client k begins with
    loss_k + λ ‖B_k[:, tail]‖_F ‖A_k[tail]‖_F                    (2)    tail: directions from ⌊γ r_k⌋ on
    r_k ← ⌊γ r_k⌋ where ‖B_k[:, tail]‖ ‖A_k[tail]‖ has shrunk    (3)    after training
    w_k ∝ n_k ‖B_k A_k‖_F                                        (4)
    A = Σ_k w_k pad(A_k),  B = Σ_k w_k pad(B_k)                  (5)    zeros up to the largest rank

The paper's (4) has no n_k, as we know it; ours has, so that a client with twice the rows counts as two. `weights = "rows"`
takes w_k = p_k, the zero-padded FedIT that other papers compare with. Ours: a direction that nobody sent in a round stays as it
was held, since zeros on both sides would have no gradient ever after; and where all products are zero, w_k = p_k.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from umbel import algebra
from umbel.method import Download, Each, Factors, Method, MethodError


@dataclass(frozen=True)
class HetLoRA(Method):
    """Averages zero-padded factors, the larger update with more weight. Takes mixed ranks, which clients lower themselves.

    Args:
        weights: "sparsity" is (4), "rows" is w_k = p_k.
        gamma: γ, 0 < γ ≤ 1; 1 has no tail, so neither (2) nor (3). At least one direction is kept.
        regularization: λ ≥ 0 of (2), for B in units of ΔW.
    """

    collect, mixed_ranks, by_rows = Each, True, False

    weights: Literal["sparsity", "rows"] = "sparsity"
    gamma: float = 0.99
    regularization: float = 1e-5

    def __post_init__(self) -> None:
        if self.weights not in ("sparsity", "rows"):
            raise MethodError(f"hetlora: weights: got {self.weights!r}, allowed: 'sparsity', 'rows'")
        if not 0 < self.gamma <= 1 or not 0 <= self.regularization < math.inf:
            raise MethodError(
                f"hetlora: got gamma {self.gamma}, regularization {self.regularization}, allowed: 0 < gamma ≤ 1 and ≥ 0"
            )

    def combine(self, got: list[tuple[Factors, float]], held: Factors) -> Download:
        norms = [float(algebra.norm(own["B"], own["A"])) if self.weights == "sparsity" else 1.0 for own, _ in got]
        raw = [p * size for (_, p), size in zip(got, norms)] if any(norms) else [p for _, p in got]  # (4)
        widest = max(own["A"].shape[0] for (own, _), w in zip(got, raw) if w > 0)
        dtype = got[0][0]["A"].dtype
        A = torch.zeros(widest, held["A"].shape[1], dtype=torch.float64)
        B = torch.zeros(held["B"].shape[0], widest, dtype=torch.float64)
        for (own, _), w in zip(got, raw):
            r = min(own["A"].shape[0], widest)
            A[:r] += w / sum(raw) * own["A"][:r]  # (5)
            B[:, :r] += w / sum(raw) * own["B"][:, :r]
        return Download(factors={"A": A.to(dtype), "B": B.to(dtype)})  # (1) happens on the way

    def penalty(self, factors: Factors) -> Tensor | None:
        kept = self._kept(factors)
        if not self.regularization or kept == factors["A"].shape[0]:
            return None
        return self.regularization * _size(factors, kept)  # (2)

    def trained(self, before: Factors, after: Factors) -> Factors:
        kept = self._kept(after)
        if not float(_size(after, kept)) < float(_size(before, kept)):
            return after
        return {**after, "A": after["A"][:kept].contiguous(), "B": after["B"][:, :kept].contiguous()}  # (3)

    def _kept(self, factors: Factors) -> int:
        # γ r is often a hair below the whole number that is meant.
        return max(1, math.floor(self.gamma * factors["A"].shape[0] + 1e-9))


def _size(factors: Factors, kept: int) -> Tensor:
    return algebra.frobenius(factors["B"][:, kept:]) * algebra.frobenius(factors["A"][kept:])
