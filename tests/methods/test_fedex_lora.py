"""FedEx-LoRA against the residual formed densely."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invented import D_IN, D_OUT, R, clients, fold, mean_of_products
from umbel.method import Each, Mean, MethodError, load


def aggregate(pairs, rows, **options):
    return load("fedex_lora", **options).combine(fold(Each(), pairs, rows), {})


def effect(download):
    pair = download.factors["B"] @ download.factors["A"]
    return pair if download.merge is None else pair + download.merge[0] @ download.merge[1]


@settings(deadline=None, max_examples=40)
@given(K=st.integers(1, 6), seed=st.integers(0, 1000))
def test_means_and_residual_are_together_the_mean_of_products(K, seed):
    pairs, rows = clients((R,) * K, seed), [float(k + 1) for k in range(K)]
    assert torch.allclose(effect(aggregate(pairs, rows)), mean_of_products(pairs, rows), atol=1e-12)


def test_the_residual_is_the_sum_of_what_the_clients_differ_by_and_has_a_block_less_than_clients():
    pairs, rows = clients((2, 2, 2)), [1.0, 2.0, 5.0]
    B, A = aggregate(pairs, rows).merge
    assert B.shape == (D_OUT, 4)
    assert A.shape == (4, D_IN)
    B_mean, A_mean = (sum(n / 8 * pair[i] for n, pair in zip(rows, pairs)) for i in (0, 1))
    assert torch.allclose(B @ A, sum(n / 8 * (b - B_mean) @ (a - A_mean) for n, (b, a) in zip(rows, pairs)), atol=1e-12)
    assert torch.linalg.matrix_rank(B @ A) == 4


def test_a_residual_wider_than_the_matrix_is_sent_no_wider_than_it():
    pairs, rows = clients((R,) * 6), [float(k + 1) for k in range(6)]
    download = aggregate(pairs, rows)
    assert download.merge[0].shape == (D_OUT, D_OUT)
    assert torch.allclose(effect(download), mean_of_products(pairs, rows), atol=1e-12)


def test_the_means_are_fedits_to_the_last_bit():
    pairs = [(B.float(), A.float()) for B, A in clients((R,) * 4)]
    rows = [17.0, 401.0, 33.0, 96.0]
    fedit = load("fedit").combine(fold(Mean(), pairs, rows), {}).factors
    factors = aggregate(pairs, rows).factors
    assert torch.equal(factors["A"], fedit["A"])
    assert torch.equal(factors["B"], fedit["B"])


def test_one_client_has_no_residual_and_clients_that_agree_a_zero_one():
    pairs = clients((R,))
    assert aggregate(pairs, [3.0]).merge is None
    B, A = aggregate(pairs * 3, [1.0, 2.0, 3.0]).merge
    assert (B @ A).norm() < 1e-12


@pytest.mark.parametrize("rank", [1, 3, 50])
def test_the_inexact_version_sends_the_best_copy_of_the_residual(rank):
    pairs, rows = clients((R,) * 3), [1.0, 2.0, 5.0]
    whole, cut = aggregate(pairs, rows), aggregate(pairs, rows, residual_rank=rank)
    U, s, Vh = torch.linalg.svd(whole.merge[0] @ whole.merge[1], full_matrices=False)
    assert cut.merge[0].shape[1] == min(rank, 2 * R)
    assert torch.allclose(cut.merge[0] @ cut.merge[1], (U[:, :rank] * s[:rank]) @ Vh[:rank], atol=1e-10)
    assert torch.equal(cut.factors["B"], whole.factors["B"])


def test_it_claims_to_be_exact_only_where_all_of_the_residual_is_sent():
    assert load("fedex_lora").exact
    assert not load("fedex_lora", residual_rank=8).exact
    assert load("fedex_lora").trains == load("fedex_lora").sends == ("A", "B")


def test_mixed_ranks_are_refused_with_the_methods_that_take_them():
    with pytest.raises(MethodError, match=r"needs one rank; mixed ranks are for .*florist"):
        aggregate(clients((2, 3)), [1.0, 1.0])


def test_a_residual_rank_of_zero_is_refused_with_what_is_allowed():
    with pytest.raises(MethodError, match=r"fedex_lora: residual_rank: got 0, allowed: 1 or more"):
        load("fedex_lora", residual_rank=0)
