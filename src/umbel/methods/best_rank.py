"""The best that one pair of rank r can do: an oracle, published by nobody as a method of its own.

    M = Σ_k p_k B_k A_k                                     (1)
    M ≈ U_r diag(s_1 … s_r) V_rᵀ                            (2)    its r largest singular triples
    B = c U_r diag(s_1 … s_r),  A = V_rᵀ / c                (3)    c such that ‖B‖_F / ‖A‖_F is FedIT's ratio

No (B, A) of rank r is closer to M (Eckart and Young), so no method that sends such a pair alone, as FedIT, FLoRA-NA and
LoRA-FAIR do, has a smaller aggregation error. c keeps a client's relative steps on A and B comparable to FedIT's.
"""

from dataclasses import dataclass

import torch

from umbel import algebra
from umbel.method import Download, Each, Factors, Method, mean_of


@dataclass(frozen=True)
class BestRank(Method):
    """Sends the truncated SVD of the mean of products at the clients' rank, to tell how much a better pair could win."""

    collect = Each

    def combine(self, got: list[tuple[Factors, float]], held: Factors) -> Download:
        mean = mean_of(got)
        stack = torch.cat([own["B"] for own, _ in got], -1), torch.cat([p * own["A"] for own, p in got], -2)  # (1)
        U_s, Vh, s = (x.double() for x in algebra.truncated_product(*stack, rank=mean["A"].shape[0]))  # (2)
        B, A, B_mean, A_mean = (float(x.double().square().sum()) for x in (s, Vh, mean["B"], mean["A"]))
        if B == 0:
            return Download(factors=mean)  # A stays as random as it was
        c = (B_mean / A_mean * A / B) ** 0.25 if B_mean > 0 and A_mean > 0 else 1.0
        return Download(factors={"B": (c * U_s).to(stack[0]), "A": (Vh / c).to(stack[1])})  # (3)
