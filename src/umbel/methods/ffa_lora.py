"""FFA-LoRA: A is frozen at its random start, only B is trained and averaged (arXiv 2403.12313).

    A_k = A_0           (1)    random, the same at every client, never trained
    B = Σ_k p_k B_k     (2)

Exact, since Σ p_k B_k A_0 = (Σ p_k B_k) A_0. Under noise for privacy there is no product of two noisy factors.
"""

from dataclasses import dataclass

from umbel.method import Download, Factors, Method


@dataclass(frozen=True)
class FFALoRA(Method):
    """Averages B on a common, frozen A. Exact, at r d_out numbers up and down."""

    trains = sends = ("B",)

    @property
    def exact(self) -> bool:
        return True

    def combine(self, got: Factors, held: Factors) -> Download:
        return Download(factors={"B": got["B"]})  # (2): `Mean` has done the work
