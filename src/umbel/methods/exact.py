"""The exact mean of the updates, with A and B kept: an oracle, written as its definition says.

    B = Σ_k p_k B_k,  A = Σ_k p_k A_k                                      (1)    trained on, as FedIT
    W ← W + Σ_k p_k B_k A_k − B A                                          (2)
    Σ_k p_k B_k A_k − B A = [B_1 … B_K, −B] [p_1 A_1; …; p_K A_K; A]       (3)    so that no dense matrix is formed

FedEx-LoRA sends the same matrix in fewer numbers; this one has no idea of its own that could be wrong.
"""

from dataclasses import dataclass

import torch

from umbel.method import Download, Each, Factors, Method, mean_of


@dataclass(frozen=True)
class Exact(Method):
    """Loads the means and merges all that they miss, to tell what an aggregation without error would win."""

    collect = Each

    @property
    def exact(self) -> bool:
        return True

    def combine(self, got: list[tuple[Factors, float]], held: Factors) -> Download:
        mean = mean_of(got)  # (1)
        B = torch.cat([*(own["B"] for own, _ in got), -mean["B"]], -1)
        A = torch.cat([*(p * own["A"] for own, p in got), mean["A"]], -2)
        return Download(factors=mean, merge=(B, A))  # (2), (3)
