"""FlexLoRA: the mean of the products, and of its SVD to each client as much as its rank holds (arXiv 2402.11505, NeurIPS 2024).

    M = Σ_k p_k B_k A_k                                         (1)
    M = U diag(s_1, s_2, …) Vᵀ                                  (2)
    B_k = U[:, :r_k] diag(s_1 … s_{r_k}),  A_k = V[:, :r_k]ᵀ    (3)    client k goes on from here

The paper forms M densely; we take (2) from the factors, which gives the same. We send the largest rank's pair and each client
keeps its first r_k directions (3). Where a round's clients together span fewer directions than that, we add the last rows of
the A that was held and zero columns of B: the product stays and no direction is lost for the rounds to come.
"""

from dataclasses import dataclass

import torch

from umbel import algebra
from umbel.method import Download, Factors, Method, Stack


@dataclass(frozen=True)
class FlexLoRA(Method):
    """SVD of the mean of products, cut to every client's rank. Takes mixed ranks."""

    collect, mixed_ranks = Stack, True

    def combine(self, got: Factors, held: Factors) -> Download:
        r = held["A"].shape[-2]
        U_s, Vh, s = algebra.truncated_product(got["B"], got["A"], rank=r)  # (1) is `Stack`; (2)
        missing = U_s.new_zeros(U_s.shape[-2], r - s.shape[-1])
        B, A = torch.cat([U_s, missing], -1), torch.cat([Vh, held["A"][s.shape[-1] :].to(Vh)], -2)
        return Download(factors={"B": B, "A": A})  # (3), cut on the way
