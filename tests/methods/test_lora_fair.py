"""LoRA-FAIR with the squared distance, against the ridge regression done densely."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invented import D_IN, R, clients, draw, fold, mean_of_products
from umbel.method import Each, MethodError, load


def aggregate(pairs, rows, regularization):
    factors = load("lora_fair", regularization=regularization).combine(fold(Each(), pairs, rows), {}).factors
    return factors["B"], factors["A"]


def means(pairs, rows):
    return tuple(sum(n / sum(rows) * own[i] for own, n in zip(pairs, rows)) for i in (0, 1))


@settings(deadline=None, max_examples=40)
@given(K=st.integers(1, 6), seed=st.integers(0, 1000), ridge=st.sampled_from([0.0, 1e-6, 0.01, 1.0, 1e3]))
def test_b_is_moved_by_the_ridge_regression_and_a_is_fedits(K, seed, ridge):
    pairs, rows = clients((R,) * K, seed), [float(k + 1) for k in range(K)]
    (B_mean, A_mean), M = means(pairs, rows), mean_of_products(pairs, rows)
    step = (M - B_mean @ A_mean) @ A_mean.mT @ torch.linalg.inv(A_mean @ A_mean.mT + ridge * torch.eye(R).double())
    B, A = aggregate(pairs, rows, ridge)
    assert torch.allclose(A, A_mean, atol=1e-12)
    assert torch.allclose(B, B_mean + step, atol=1e-8)


@settings(deadline=None, max_examples=60)
@given(K=st.integers(1, 6), seed=st.integers(0, 1000), ridge=st.floats(0, 1e6))
def test_the_error_is_never_above_fedits(K, seed, ridge):
    # The ridge objective at ΔB = 0 is the square of FedIT's error, and its minimum can only be lower.
    pairs, rows = clients((R,) * K, seed), [float(k + 1) for k in range(K)]
    (B_mean, A_mean), M = means(pairs, rows), mean_of_products(pairs, rows)
    B, A = aggregate(pairs, rows, ridge)
    assert (M - B @ A).norm() <= (M - B_mean @ A_mean).norm() + 1e-12


def test_without_a_ridge_no_b_is_better_for_this_a():
    pairs, rows = clients((R,) * 4), [1.0, 2.0, 3.0, 4.0]
    M = mean_of_products(pairs, rows)
    B, A = aggregate(pairs, rows, 0.0)
    assert ((M - B @ A) @ A.mT).norm() < 1e-10  # what is left is orthogonal to all that A can say
    B, A = aggregate(pairs, rows, 0.5)
    B_mean, _ = means(pairs, rows)
    assert torch.allclose((M - B @ A) @ A.mT, 0.5 * (B - B_mean), atol=1e-10)  # the gradient of the ridge objective is zero


def test_a_large_ridge_is_fedit():
    pairs, rows = clients((R,) * 4), [1.0, 2.0, 3.0, 4.0]
    B, _ = aggregate(pairs, rows, 1e12)
    assert torch.allclose(B, means(pairs, rows)[0], atol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 1e-9, 0.01])
def test_an_a_with_directions_that_repeat_or_vanish_does_no_harm(ridge):
    pairs, rows = clients((R,) * 3), [1.0, 2.0, 3.0]
    for A, noise in ((torch.cat([pairs[0][1][:1]] * R), 1e-16), (torch.zeros(R, D_IN).double(), 0.0)):
        alike = [(B, A + noise * draw(R, D_IN, seed=k)) for k, (B, _) in enumerate(pairs)]
        B, _ = aggregate(alike, rows, ridge)
        assert torch.allclose(B, means(alike, rows)[0], atol=1e-6)


def test_clients_that_cancel_in_the_mean_of_a_are_left_at_fedit():
    (B, A), (C, _) = clients((R, R))
    got_B, got_A = aggregate([(B, A), (C, -A)], [1.0, 1.0], 0.0)
    assert torch.equal(got_A, torch.zeros(R, D_IN).double())
    assert torch.allclose(got_B, (B + C) / 2)


def test_one_client_is_given_back():
    ((B, A),) = clients((R,))
    got_B, got_A = aggregate([(B, A)], [3.0], 0.01)
    assert torch.allclose(got_B, B, atol=1e-12)
    assert torch.equal(got_A, A)


def test_mixed_ranks_are_refused_with_the_methods_that_take_them():
    with pytest.raises(MethodError, match=r"needs one rank; mixed ranks are for .*florist"):
        aggregate(clients((2, 3)), [1.0, 1.0], 0.01)


@pytest.mark.parametrize("ridge", [-1.0, float("nan"), float("inf")])
def test_a_ridge_out_of_range_is_refused_with_what_is_allowed(ridge):
    with pytest.raises(MethodError, match=r"lora_fair: regularization: got .*, allowed: 0 or more"):
        load("lora_fair", regularization=ridge)
