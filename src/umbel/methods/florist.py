"""FLoRIST: the mean of the products, cut by its energy (arXiv 2506.09199, MLSys 2026).

    B_stack = [B_1 … B_K],  A_stack = [p_1 A_1; …; p_K A_K]            (1)    product M = Σ p_k B_k A_k
    B_stack = U_B S_B V_Bᵀ,  A_stack = U_A S_A V_Aᵀ                    (2)
    P = S_B (V_Bᵀ U_A) S_A                                             (3)    the core, at most R_tot × R_tot
    P = U_P S_P V_Pᵀ                                                   (4)    S_P are M's singular values
    p = min { p : Σ_{i≤p} s_i² / Σ_i s_i² ≥ τ }                        (5)    per matrix
    B_g = (U_B U_P)[:, :p] diag(s_1 … s_p),  A_g = (V_Pᵀ V_Aᵀ)[:p, :]  (6)
    all clients take (B_g, A_g)                                        (7)

For (2)–(4) we decompose the stacks' Gram matrices (`algebra.truncated_product`): the same S_P, cheaper. (7) has two published
forms. "load", our default, is the MLSys release's, for which τ = 0.9 is the recommended value: the pair becomes the
adapter, cut or padded to the client's rank. "merge" is the first preprint's: the pair goes into the frozen weight and a
fresh adapter begins.
"""

from dataclasses import dataclass
from typing import Literal

from umbel import algebra
from umbel.method import Download, Factors, Method, MethodError, Stack


@dataclass(frozen=True)
class FloRIST(Method):
    """Truncated SVD of the mean of products, never formed densely. Takes mixed ranks.

    Args:
        energy: τ, share of the squared singular values to keep, 0 < τ ≤ 1.
        rank: Keep so many values in every matrix instead; `energy` is then not looked at.
        adopt: "load" as the trainable adapter, or "merge" into the frozen weight and start the adapter afresh.
    """

    collect, mixed_ranks = Stack, True

    energy: float | None = 0.9
    rank: int | None = None
    adopt: Literal["load", "merge"] = "load"

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise MethodError(f"florist: rank: got {self.rank}, allowed: 1 or more")
        if self.rank is None and (self.energy is None or not 0 < self.energy <= 1):
            raise MethodError(f"florist: energy: got {self.energy}, allowed: 0 < energy ≤ 1 (or give rank)")
        if self.adopt not in ("load", "merge"):
            raise MethodError(f"florist: adopt: got {self.adopt!r}, allowed: 'load', 'merge'")

    @property
    def exact(self) -> bool:
        # A loaded pair is cut to the client's rank, so only a merge keeps everything that was sent.
        return self.adopt == "merge" and self.rank is None and self.energy == 1

    def combine(self, got: Factors, held: Factors) -> Download:
        if self.exact:  # with τ = 1 nothing goes and nobody cuts, so (2) to (6) are needed only where directions depend
            return Download(merge=algebra.without_loss(got["B"], got["A"]), reset=0)
        # (1) is `Stack`; (2) to (6), the most important direction first, so that clients may cut
        B, A, _ = algebra.truncated_product(got["B"], got["A"], self.energy or 1.0, self.rank)
        if self.adopt == "merge":
            return Download(merge=(B, A), reset=0)  # (7), preprint
        return Download(factors={"B": B, "A": A})  # (7), release
