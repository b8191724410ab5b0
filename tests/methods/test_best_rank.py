"""The oracle of rank r against a dense singular value decomposition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invented import D_IN, D_OUT, R, clients, fold, mean_of_products
from umbel.method import Each, MethodError, load


def aggregate(pairs, rows):
    factors = load("best_rank").combine(fold(Each(), pairs, rows), {}).factors
    return factors["B"], factors["A"]


@settings(deadline=None, max_examples=40)
@given(K=st.integers(1, 6), seed=st.integers(0, 1000))
def test_it_is_the_truncated_svd_of_the_mean_of_products(K, seed):
    pairs, rows = clients((R,) * K, seed), [float(k + 1) for k in range(K)]
    U, s, Vh = torch.linalg.svd(mean_of_products(pairs, rows), full_matrices=False)
    B, A = aggregate(pairs, rows)
    assert A.shape == (R, D_IN)
    assert torch.allclose(B @ A, (U[:, :R] * s[:R]) @ Vh[:R], atol=1e-8)


def test_the_gauge_is_fedits_ratio_of_norms():
    pairs, rows = clients((R,) * 3), [1.0, 2.0, 5.0]
    B_mean, A_mean = (sum(n / 8 * own[i] for own, n in zip(pairs, rows)) for i in (0, 1))
    B, A = aggregate(pairs, rows)
    assert float(B.norm() / A.norm()) == pytest.approx(float(B_mean.norm() / A_mean.norm()), rel=1e-12)


def test_zero_uploads_give_the_fedit_pair():
    pairs = [(torch.zeros(D_OUT, R).double(), A) for _, A in clients((R, R))]
    B, A = aggregate(pairs, [1.0, 3.0])
    assert torch.equal(B, torch.zeros(D_OUT, R).double())
    assert torch.allclose(A, 0.25 * pairs[0][1] + 0.75 * pairs[1][1])


def test_means_that_cancel_do_no_harm():
    ((B, A),) = clients((R,))
    got_B, got_A = aggregate([(B, A), (-B, -A)], [1.0, 1.0])
    assert torch.allclose(got_B @ got_A, B @ A, atol=1e-10)


def test_it_does_not_claim_to_be_exact_and_refuses_mixed_ranks():
    assert not load("best_rank").exact
    with pytest.raises(MethodError, match=r"needs one rank; mixed ranks are for .*florist"):
        aggregate(clients((2, 3)), [1.0, 1.0])
