"""Fed-SB: a small square R trained between frozen orthonormal B and A (arXiv 2502.15436, on LoRA-SB, 2411.19557).

    G = Σ_k p_k G_k                             (1)    first gradient of the frozen weights, over all clients
    Δ = −η sign(G)                              (2)    AdamW's first step
    Δ ≈ U_r diag(s_1 … s_r) V_rᵀ                (3)    its r largest singular triples
    B = U_r,  R = diag(s_1 … s_r),  A = V_rᵀ    (4)    ΔW = B R A; the frozen weight is left as it is
    R = Σ_k p_k R_k                             (5)    each round; B and A never change

(5) is exact, since Σ p_k B R_k A = B (Σ p_k R_k) A. The papers sum (1) over the pooled rows; here each client sends the mean
over its own, once and whole, weighed by how many rows that were, which makes it the pooled mean. Two starts are ours:
"gradient", where each client sends its best product of rank r and −Σ p_k G_k, as long as (2), takes the place of Δ; "random".
"""

from dataclasses import dataclass
from typing import Literal

import torch

from umbel import algebra
from umbel.method import Download, Factors, Method, MethodError, Stack


@dataclass(frozen=True)
class FedSB(Method):
    """Averages R. Exact, at r² numbers up and down whatever the layer's size.

    Args:
        init: "sign" (the papers'), "gradient", or "random" orthonormal B and A with R = 0, which asks no client.
        eta: η > 0 of (2). The papers take learning_rate / (warmup_ratio × steps); the default is theirs, 1e-4 / (0.02 × 625).
        samples: Rows for (1), all clients together. The papers take 0.1 % of the rows; our default suits up to 32 000.
    """

    trains = sends = ("R",)

    init: Literal["sign", "gradient", "random"] = "sign"
    eta: float = 8e-6
    samples: int = 32

    def __post_init__(self) -> None:
        if self.init not in STARTS or not self.eta > 0 or self.samples < 1:
            raise MethodError(f"got {self}; allowed: init {', '.join(map(repr, STARTS))}, eta > 0, samples ≥ 1")

    @property
    def exact(self) -> bool:
        return True

    def plan(self, rounds: int) -> list[Method]:
        return [STARTS[self.init](self.eta, self.samples), *[self] * rounds]

    def combine(self, got: Factors, held: Factors) -> Download:
        return Download(factors={"R": got["R"]})  # (5): `Mean` has done the work


@dataclass(frozen=True)
class Sign(Method):
    """The measuring phase of init = "sign"."""

    trains, sends = (), ("G",)

    eta: float
    samples: int

    def combine(self, got: Factors, held: Factors) -> Download:
        U, s, Vh = algebra.dense_svd(-got["G"].sign(), _rank(held))  # (2), (3); (1) is `Mean`
        return Download(factors={"B": U, "A": Vh, "R": torch.diag(self.eta * s)})  # (4)


class Gradient(Sign):
    """The measuring phase of init = "gradient": no dense matrix travels."""

    sends, collect = ("A", "B"), Stack

    def combine(self, got: Factors, held: Factors) -> Download:
        U, s, Vh = algebra.product_svd(got["B"], got["A"])
        r, norm = _rank(held), float(s.square().sum().sqrt())
        scale = self.eta * (U.shape[-2] * Vh.shape[-1]) ** 0.5 / norm if norm > 0 else 0.0  # ‖η sign(G)‖_F = η √(d_out d_in)
        return Download(factors={"B": -U[:, :r], "A": Vh[:r], "R": torch.diag(scale * s[:r])})


class Random(Sign):
    """The phase of init = "random": the server's alone. Follows the run's seed, from which the held A was drawn."""

    sends = ()

    def combine(self, got: Factors, held: Factors) -> Download:
        r, A = _rank(held), held["A"]
        seed = algebra.seed_of("fed_sb", A[0].double().numpy().tobytes().hex())
        U, _, Vh = algebra.dense_svd(algebra.fresh_A(held["B"].shape[-2], A.shape[-1], seed).to(A), r)
        return Download(factors={"B": U, "A": Vh, "R": A.new_zeros(r, r)})


def _rank(held: Factors) -> int:
    r, d_in, d_out = *held["A"].shape, held["B"].shape[-2]
    if r > min(d_out, d_in):
        raise MethodError(f"fed_sb: got rank {r} on a weight of {d_out} × {d_in}, allowed: {min(d_out, d_in)}; lower lora.r")
    return r


STARTS: dict[str, type[Sign]] = {"sign": Sign, "gradient": Gradient, "random": Random}
