"""RoLoRA: rounds alternate between B and A, each averaged while the other is frozen (arXiv 2502.01755).

    B = Σ_k p_k B_k,  A as it was    (1)    first, third, … round
    A = Σ_k p_k A_k,  B as it was    (2)    second, fourth, … round

Both are exact, since ΔW is linear in the factor that moves. B begins: as B = 0 at first, A would have no gradient.
"""

from dataclasses import dataclass

from umbel.method import Download, Factors, Method


@dataclass(frozen=True)
class RoLoRA(Method):
    """Averages one factor a round, in turn. Exact, at half of FedIT's traffic."""

    @property
    def exact(self) -> bool:
        return True

    def plan(self, rounds: int) -> list[Method]:
        return [TrainA() if index % 2 else TrainB() for index in range(rounds)]

    def combine(self, got: Factors, held: Factors) -> Download:
        return Download(factors=dict(got))  # (1) or (2): `Mean` has done the work


class TrainB(RoLoRA):
    """(1)."""

    trains = sends = ("B",)


class TrainA(RoLoRA):
    """(2)."""

    trains = sends = ("A",)
