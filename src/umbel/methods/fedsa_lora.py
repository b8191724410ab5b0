"""FedSA-LoRA: A is shared, B and the head stay at home (arXiv 2410.01463, ICLR 2025).

    A = Σ_k p_k A_k                 (1)    each round; client k goes on from (A, B_k)
    ΔW_k = B_k A                    (2)    client k's own model, with its own head
    ΔW = (Σ_k p_k B_k) A            (3)    the "global" model that others compare it with

(1) and (2) are the paper's. It has no common model; (3) is what the FLoRA-NA comparison evaluates. For it clients send B, and
what else they kept, once, after the last round.
"""

from dataclasses import dataclass

from umbel.method import Download, Factors, Method


@dataclass(frozen=True)
class FedSALoRA(Method):
    """Averages A and leaves every client its own B and head: personal models, at r d_in numbers up and down."""

    trains, sends = ("A", "B"), ("A",)

    def plan(self, rounds: int) -> list[Method]:
        return [*[self] * rounds, Gather()]

    def combine(self, got: Factors, held: Factors) -> Download:
        return Download(factors={"A": got["A"]})  # (1): `Mean` has done the work


class Gather(Method):
    """The phase after the last round: everybody sends its B as it is, and the mean becomes the common one."""

    trains, sends, measures = (), ("B",), "factors"

    def combine(self, got: Factors, held: Factors) -> Download:
        return Download(factors={"B": got["B"]})  # (3)
