"""FedSVD: the product stays, its factors become those of a singular value decomposition."""

import pytest
import torch

from invented import draw
from umbel.method import Mean, MethodError, load

D_OUT, D_IN, R = 9, 13, 3
ROWS = [1.0, 2.0, 5.0]


def aggregate(Bs, A):
    mean = Mean()
    for B, n in zip(Bs, ROWS):
        mean.add({"B": B}, n)
    factors = load("fedsvd").combine(mean.done(), {"A": A, "B": Bs[0]}).factors
    return factors["B"], factors["A"]


def test_the_product_is_the_mean_of_products_and_the_factors_are_its_thin_svd():
    Bs, held = [draw(D_OUT, R, seed=k) for k in range(3)], draw(R, D_IN, seed=7)
    B, A = aggregate(Bs, held)
    M = sum(n / 8 * b @ held for n, b in zip(ROWS, Bs))
    assert torch.allclose(B @ A, M, atol=1e-12)
    assert torch.allclose(A @ A.mT, torch.eye(R).double(), atol=1e-12)
    s = torch.linalg.svdvals(M)[:R]
    assert torch.allclose(B.mT @ B, torch.diag(s.square()), atol=1e-10)  # columns orthogonal, largest first


def test_nothing_learned_leaves_a_zero_product_and_an_orthonormal_a():
    B, A = aggregate([torch.zeros(D_OUT, R).double()] * 3, draw(R, D_IN, seed=7))
    assert torch.equal(B, torch.zeros(D_OUT, R).double())
    assert torch.allclose(A @ A.mT, torch.eye(R).double(), atol=1e-12)


def test_a_second_round_goes_on_from_the_new_a():
    held = draw(R, D_IN, seed=7)
    B, A = aggregate([draw(D_OUT, R, seed=k) for k in range(3)], held)
    moved = [B + 0.1 * draw(D_OUT, R, seed=20 + k) for k in range(3)]
    B_2, A_2 = aggregate(moved, A)
    assert torch.allclose(B_2 @ A_2, sum(n / 8 * b @ A for n, b in zip(ROWS, moved)), atol=1e-12)


def test_only_b_goes_up_and_it_claims_to_be_exact():
    fedsvd = load("fedsvd")
    assert fedsvd.trains == fedsvd.sends == ("B",)
    assert fedsvd.exact


def test_a_rank_that_has_no_orthonormal_factors_is_refused():
    with pytest.raises(MethodError, match=r"rank 11 on a weight of 9 × 13, allowed: 9; lower lora\.r"):
        aggregate([draw(D_OUT, 11)] * 3, draw(11, D_IN))
