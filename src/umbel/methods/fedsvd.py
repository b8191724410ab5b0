"""FedSVD: only B is trained and averaged, then the product is factored anew (arXiv 2505.12805, NeurIPS 2025).

    B̄ = Σ_k p_k B_k                                (1)    on the common A, frozen within the round
    B̄ A = U diag(s_1 … s_r) Vᵀ                     (2)    thin, from the factors
    B = U diag(s_1 … s_r),  A = Vᵀ                 (3)    the same product; rows of A orthonormal

Exact: (1) as in FFA-LoRA, and (2), (3) leave ΔW as it is. (2) sees only what was sent, so under noise for privacy it is free.
"""

from dataclasses import dataclass

from umbel import algebra
from umbel.method import Download, Factors, Method, MethodError


@dataclass(frozen=True)
class FedSVD(Method):
    """Averages B, then lets A follow it by an SVD. Exact, at r d_out numbers up and r (d_in + d_out) down."""

    trains = sends = ("B",)

    @property
    def exact(self) -> bool:
        return True

    def combine(self, got: Factors, held: Factors) -> Download:
        r, d_in, d_out = *held["A"].shape, got["B"].shape[0]
        if r > min(d_out, d_in):
            most = min(d_out, d_in)
            raise MethodError(f"fedsvd: got rank {r} on a weight of {d_out} × {d_in}, allowed: {most}; lower lora.r")
        U, s, Vh = algebra.product_svd(got["B"], held["A"])  # (1) is `Mean`; (2)
        return Download(factors={"B": U * s, "A": Vh})  # (3)
