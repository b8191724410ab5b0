"""RAVAN: several small heads between frozen orthogonal factors (arXiv 2506.05568, NeurIPS 2025).

    ΔW = Σ_i s_i B_i H_i A_i,  i = 1 … h                  (1)    B_i is d_out × b, H_i is b × b, A_i is b × d_in
    B = [B_1 … B_h],  A = [A_1; …; A_h]                   (2)    BᵀB = I, A Aᵀ = I; random, frozen
    H_i = 0,  s_i = 1                                     (3)    at first; clients train both
    s_i H_i ← Σ_k p_k s_ik H_ik,  s_i ← 1                 (4)    each round

(4) is exact, ΔW being linear in s_i H_i. Here ΔW = B R A with R block-diagonal; its h blocks s_i H_i travel one below the
other, r × b with r = h b. The client's adapter has the scalars s_i, 1 when a round begins. How (2) is drawn is ours.
"""

from dataclasses import dataclass

from umbel import algebra
from umbel.method import Download, Factors, Method, MethodError


@dataclass(frozen=True)
class RAVAN(Method):
    """Averages the blocks s_i H_i. Exact, at r²/h numbers up and down whatever the layer's size.

    Args:
        heads: h ≥ 1; where it does not divide the rank, the nearest smaller number that does.
    """

    trains = sends = ("R",)

    heads: int = 4

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise MethodError(f"ravan: heads: got {self.heads}, allowed: 1 or more")

    @property
    def exact(self) -> bool:
        return True

    def plan(self, rounds: int) -> list[Method]:
        return [Start(self.heads), *[self] * rounds]

    def combine(self, got: Factors, held: Factors) -> Download:
        return Download(factors={"R": got["R"]})  # (4): `Mean` has done the work


@dataclass(frozen=True)
class Start(Method):
    """The phase before the first round: the server's alone. Follows the run's seed, from which the held A was drawn."""

    trains = sends = ()

    heads: int

    def combine(self, got: Factors, held: Factors) -> Download:
        r, d_in, d_out = *held["A"].shape, held["B"].shape[0]
        if r > min(d_out, d_in):
            most = min(d_out, d_in)
            raise MethodError(f"ravan: got rank {r} on a weight of {d_out} × {d_in}, allowed: {most}; lower lora.r")
        h = next(h for h in range(min(self.heads, r), 0, -1) if r % h == 0)
        seed = algebra.seed_of("ravan", held["A"][0].double().numpy().tobytes().hex())
        left = algebra.fresh_A(r, d_out, algebra.seed_of(seed, "B")).mT
        U, _, Vh = algebra.product_svd(left, algebra.fresh_A(r, d_in, algebra.seed_of(seed, "A")))  # (2)
        return Download(factors={"B": U.to(held["A"]), "A": Vh.to(held["A"]), "R": held["A"].new_zeros(r, r // h)})  # (3)
