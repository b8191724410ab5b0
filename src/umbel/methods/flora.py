"""FLoRA: the clients' factors side by side, merged into the frozen weight (arXiv 2409.05976, NeurIPS 2024).

    B = [B_1 … B_K],  A = [p_1 A_1; …; p_K A_K]    (1)    B A = Σ_k p_k B_k A_k
    W ← W + B A                                    (2)    at every client, those that sat out too
    A_k random, B_k = 0                            (3)    every client starts a fresh adapter of its own rank

Those fresh A_k come from one seed a round; clients of different rank share their first rows.
"""

from dataclasses import dataclass

from umbel.method import Download, Factors, Method, Stack


@dataclass(frozen=True)
class FLoRA(Method):
    """Merges the stack and starts afresh. Exact, takes mixed ranks; everybody downloads what everybody sent."""

    collect, mixed_ranks = Stack, True

    @property
    def exact(self) -> bool:
        return True

    def combine(self, got: Factors, held: Factors) -> Download:
        return Download(merge=(got["B"], got["A"]), reset=0)  # (1) is `Stack`; (2), (3)
