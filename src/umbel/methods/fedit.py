"""FedIT: the weighted mean of each factor (Zhang et al. 2023, arXiv 2305.05644).

    A = Σ_k p_k A_k    (1)
    B = Σ_k p_k B_k    (2)    with p_k = n_k / Σ_j n_j

Clients load both and go on. B A is not Σ p_k B_k A_k: the difference is Σ_k p_k (B_k − B)(A_k − A), which is what the
aggregation error measures. The paper pads smaller ranks with zeros; we refuse mixed ranks, since a padded mean weighs a
direction by how many clients happen to have it.
"""

from dataclasses import dataclass

from umbel.method import Download, Factors, Method


@dataclass(frozen=True)
class FedIT(Method):
    """Averages A and B; the baseline of all others."""

    def combine(self, got: Factors, held: Factors) -> Download:
        return Download(factors={"A": got["A"], "B": got["B"]})  # (1), (2): `Mean` has done the work
