"""FedEx-LoRA: FedIT, with what the averages miss added to the frozen weight (arXiv 2410.09432, ACL 2025).

    B = Σ_k p_k B_k,  A = Σ_k p_k A_k                     (1)    as FedIT
    ΔW_res = Σ_k p_k B_k A_k − B A                        (2)
    W ← W + ΔW_res                                        (3)    at every client, each round
    ΔW_res = Σ_{k<K} p_k (B_k − B)(A_k − A_K)             (4)    rank at most (K − 1) r

(1) to (3) are the paper's. (4) is ours and the same matrix: as Σ_k p_k (B_k − B) = 0, any one matrix may be taken from all A_k,
and A_K takes the last block with it. The paper counts a rank of K r and finds the factors by Gram–Schmidt; (4) needs no
decomposition. With `residual_rank`, its "best inexact" version, the r′ largest singular directions of (4) are sent.
"""

# pyright: reportConstantRedefinition=false
from dataclasses import dataclass

import torch

from umbel import algebra
from umbel.method import Download, Each, Factors, Method, MethodError, mean_of


@dataclass(frozen=True)
class FedExLoRA(Method):
    """Averages A and B and merges the residual. Exact, at up to K times FedIT's download.

    Args:
        residual_rank: r′ ≥ 1, send only the best copy of this rank of the residual; None sends all of it.
    """

    collect = Each

    residual_rank: int | None = None

    def __post_init__(self) -> None:
        if self.residual_rank is not None and self.residual_rank < 1:
            raise MethodError(f"fedex_lora: residual_rank: got {self.residual_rank}, allowed: 1 or more, or none for all")

    @property
    def exact(self) -> bool:
        return self.residual_rank is None

    def combine(self, got: list[tuple[Factors, float]], held: Factors) -> Download:
        mean, last = mean_of(got), got[-1][0]  # (1)
        if len(got) == 1:
            return Download(factors=mean)
        B = torch.cat([p * (own["B"] - mean["B"]) for own, p in got[:-1]], -1)  # (4)
        A = torch.cat([own["A"] - last["A"] for own, _ in got[:-1]], -2)
        if self.residual_rank is not None and B.shape[-1] > self.residual_rank:
            B, A, _ = algebra.truncated_product(B, A, rank=self.residual_rank)
        return Download(factors=mean, merge=algebra.compact(B, A))  # (3)
