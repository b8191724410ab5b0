"""Power: the best pair of rank r for the mean of products, from sums that nobody needs to open. A method of ours.

    Y_k = B_k (A_k A_0ᵀ),    Y = Σ_k p_k Y_k = M A_0ᵀ           (1)    first message, after training; M = Σ_k p_k B_k A_k
    Q = orth(Y)                                                 (2)    the server's; clients of the round get it
    Z_k = (Qᵀ B_k) A_k,      Z = Σ_k p_k Z_k = Qᵀ M             (3)    second message, nothing trained in between
    M ≈ Q Z = U diag(s_1 … s_r) Vᵀ                              (4)    from factors
    B = c U diag(s_1 … s_r),  A = Vᵀ / c                        (5)    c such that ‖A‖_F = ‖A_0‖_F

A_0 is what all clients held when the round began. (1) to (4) are one step of subspace iteration that starts there: the idea of
PowerSGD for gradients (arXiv 1905.13727), and of two-pass sketches (FedASK, arXiv 2507.09990), whose start is random. Every
message is linear in the client's update B_k A_k, so that the server needs sums only. A further iteration is, after a first Z,
P = orth(Zᵀ)ᵀ and Y_k = B_k (A_k Pᵀ) in the place of (1).
"""

from dataclasses import dataclass

import torch

from umbel import algebra
from umbel.method import Download, Factors, Method, MethodError


@dataclass(frozen=True)
class Power(Method):
    """The first message of a round, and the method. Takes mixed ranks: A_0 is everybody's, whatever a client trains of it.

    Args:
        iterations: Pairs of messages (Y, Z) in a round, 1 or more. Each further one costs as much as the first.
    """

    sends, mixed_ranks, whole = ("Y",), True, True

    iterations: int = 1

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise MethodError(f"power: iterations: got {self.iterations}, allowed: 1 or more")

    def plan(self, rounds: int) -> list[Method]:
        return [self, *[Rows(), Columns()] * (self.iterations - 1), Pair()] * rounds

    def message(self, own: Factors, common: Factors) -> Factors:
        return {"Y": own["B"] @ (own["A"] @ common["A"].mT)}  # (1)

    def combine(self, got: Factors, held: Factors) -> Download:
        return Download(factors={"Q": algebra.orthonormal(got["Y"])})  # (2); the sum is `Mean`'s


class Rows(Method):
    """The second message where a further iteration follows: the space of M's rows."""

    trains, sends, measures = (), ("Z",), "update"

    def message(self, own: Factors, common: Factors) -> Factors:
        return {"Z": (common["Q"].mT @ own["B"]) @ own["A"]}  # (3)

    def combine(self, got: Factors, held: Factors) -> Download:
        return Download(factors={"P": algebra.orthonormal(got["Z"].mT).mT.contiguous()})


class Columns(Method):
    """The first message of a further iteration, from P in place of A_0."""

    trains, sends, measures = (), ("Y",), "update"

    def message(self, own: Factors, common: Factors) -> Factors:
        return {"Y": own["B"] @ (own["A"] @ common["P"].mT)}

    def combine(self, got: Factors, held: Factors) -> Download:
        return Download(factors={"Q": algebra.orthonormal(got["Y"])})


class Pair(Rows):
    """The last message of a round, and the pair that comes of it, its most important direction first."""

    def combine(self, got: Factors, held: Factors) -> Download:
        A_0, Z = held["A"], got["Z"]
        U, s, Vh = (x.to(Z) for x in algebra.product_svd(*algebra.within(held["Q"], Z)))  # (4)
        if not s.any():
            return Download(factors={"A": A_0, "B": torch.zeros_like(held["B"])})
        c = float(algebra.frobenius(Vh) / algebra.frobenius(A_0)) if A_0.any() else 1.0
        # A layer thinner than the rank: the further directions of A_0 stay, with nothing on them.
        missing = U.new_zeros(U.shape[-2], A_0.shape[-2] - s.shape[-1])
        B, A = torch.cat([c * U * s, missing], -1), torch.cat([Vh / c, A_0[s.shape[-1] :].to(Z)], -2)
        return Download(factors={"A": A, "B": B})  # (5)
