"""LoRA-FAIR: FedIT, with B corrected towards the mean of the products (arXiv 2411.14961, ICCV 2025).

    A = Σ_k p_k A_k,  B = Σ_k p_k B_k,  M = Σ_k p_k B_k A_k                 (1)
    ΔB = argmin ‖M − (B + ΔB) A‖_F² + λ ‖ΔB‖_F²                            (2)
    ΔB = (M − B A) Aᵀ (A Aᵀ + λ I)⁻¹                                       (3)
    A = U diag(s) Vᵀ:  ΔB = (Σ_k p_k B_k A_k V − B A V) diag(s / (s² + λ)) Uᵀ    (4)    (3) without M, also for a deficient A
    clients take (A, B + ΔB)                                               (5)

(1) and (5) are the paper's. In place of (2) it minimizes a similarity-based discrepancy (cosine) and λ ‖ΔB‖ by SGD; the squared
distance and its closed form are ours. As ΔB = 0 is allowed in (2), the aggregation error is never above FedIT's.
"""

import math
from dataclasses import dataclass

import torch

from umbel import algebra
from umbel.method import Download, Each, Factors, Method, MethodError, mean_of


@dataclass(frozen=True)
class LoRAFAIR(Method):
    """Averages A and B and corrects B by a ridge regression; never worse than FedIT, at FedIT's traffic.

    Args:
        regularization: λ ≥ 0 of (2). 0 gives the best B there is for the mean A.
    """

    collect = Each

    regularization: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.regularization < math.inf:
            raise MethodError(f"lora_fair: regularization: got {self.regularization}, allowed: 0 or more")

    def combine(self, got: list[tuple[Factors, float]], held: Factors) -> Download:
        mean = mean_of(got)  # (1)
        B, A = mean["B"].double(), mean["A"].double()
        U, s, Vh = algebra.product_svd(torch.eye(A.shape[0], dtype=A.dtype), A)
        missed = torch.stack([p * own["B"].double() @ (own["A"].double() @ Vh.mT) for own, p in got]).sum(0) - B @ (A @ Vh.mT)
        # What A does not span, but for rounding, no B can correct.
        present = s > torch.finfo(mean["A"].dtype).eps * A.shape[1] * s[0]
        gain = torch.where(present, s / (s.square() + self.regularization).clamp_min(1e-300), torch.zeros_like(s))
        return Download(factors={"A": mean["A"], "B": (B + missed * gain @ U.mT).to(mean["B"].dtype)})  # (4), (5)
