"""FLoRA against the mean of products formed densely."""

import pytest
import torch

from invented import D_IN, D_OUT, clients, fold, mean_of_products
from umbel.method import Stack, load


def aggregate(pairs, rows):
    return load("flora").combine(fold(Stack(), pairs, rows), {})


@pytest.mark.parametrize("ranks", [(2,), (3, 3, 3), (1, 4, 2), (6, 6, 6)])
def test_what_is_merged_is_the_mean_of_products_and_as_wide_as_all_clients_or_the_matrix(ranks):
    pairs, rows = clients(ranks), [float(k + 1) for k in range(len(ranks))]
    B, A = aggregate(pairs, rows).merge
    width = min(sum(ranks), D_OUT, D_IN)
    assert B.shape == (D_OUT, width)
    assert A.shape == (width, D_IN)
    assert torch.allclose(B @ A, mean_of_products(pairs, rows), atol=1e-12)


def test_the_order_of_clients_changes_nothing():
    pairs, rows = clients((1, 4, 2)), [1.0, 2.0, 5.0]
    (B, A), (B_2, A_2) = aggregate(pairs, rows).merge, aggregate(pairs[::-1], rows[::-1]).merge
    assert torch.allclose(B @ A, B_2 @ A_2, atol=1e-12)


def test_the_adapter_starts_afresh():
    download = aggregate(clients((2, 2)), [1.0, 1.0])
    assert download.reset is not None
    assert download.factors == {}


def test_it_claims_to_be_exact_and_to_take_mixed_ranks():
    assert load("flora").exact
    assert load("flora").mixed_ranks
