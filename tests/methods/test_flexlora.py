"""FlexLoRA against the dense singular value decomposition of Σ p_k B_k A_k."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invented import D_IN, D_OUT, R, clients, draw, mean_of_products
from umbel.method import Stack, load


def fold(pairs, rows):
    stack = Stack()
    for (B, A), n in zip(pairs, rows):
        stack.add({"B": B, "A": A}, n)
    return stack.done()


def aggregate(pairs, rows, largest):
    return load("flexlora").combine(fold(pairs, rows), {"A": draw(largest, D_IN, seed=99), "B": draw(D_OUT, largest, seed=98)})


def best(M, rank):
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


@settings(deadline=None, max_examples=40)
@given(ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 50))
def test_every_client_gets_the_best_copy_of_its_rank(ranks, seed):
    pairs, rows = clients(ranks, seed), [float(k + 1) for k in range(len(ranks))]
    M, download = mean_of_products(pairs, rows), aggregate(pairs, rows, max(ranks))
    assert download.factors["A"].shape == (max(ranks), D_IN)
    for rank in ranks:
        own = download.cut(rank).factors
        assert own["A"].shape == (rank, D_IN)
        assert torch.allclose(own["B"] @ own["A"], best(M, rank), atol=1e-8)
        assert torch.allclose(own["A"] @ own["A"].mT, torch.eye(rank).double(), atol=1e-10)


def test_the_singular_values_ride_on_b_largest_first():
    pairs, rows = clients((3, 2)), [1.0, 2.0]
    s = torch.linalg.svdvals(mean_of_products(pairs, rows))
    assert torch.allclose(aggregate(pairs, rows, 3).factors["B"].norm(dim=0), s[:3])


def test_at_one_rank_it_is_florist_with_that_rank():
    pairs, rows = clients((R,) * 4), [1.0, 2.0, 3.0, 4.0]
    ours = aggregate(pairs, rows, R).factors
    theirs = load("florist", rank=R).combine(fold(pairs, rows), {}).factors
    assert torch.allclose(ours["B"] @ ours["A"], theirs["B"] @ theirs["A"], atol=1e-12)


def test_a_round_of_small_clients_alone_loses_no_direction_for_the_large_ones():
    pairs, rows = clients((1, 2)), [1.0, 2.0]
    factors = aggregate(pairs, rows, 6).factors
    assert factors["A"].shape == (6, D_IN)
    assert factors["B"].shape == (D_OUT, 6)
    assert torch.allclose(factors["B"] @ factors["A"], mean_of_products(pairs, rows), atol=1e-12)
    assert (factors["A"].norm(dim=1) > 0.5).all()  # their rows of A are not zero, so that the columns of B can learn
    assert torch.equal(factors["B"][:, 3:], torch.zeros(D_OUT, 3).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_uploads_give_a_zero_product_of_the_held_rank(dtype):
    pairs = [(torch.zeros(D_OUT, R, dtype=dtype), draw(R, D_IN).to(dtype))] * 2
    held = {"A": draw(R, D_IN, seed=2).to(dtype), "B": torch.zeros(D_OUT, R, dtype=dtype)}
    factors = load("flexlora").combine(fold(pairs, [1.0, 1.0]), held).factors
    assert torch.equal(factors["B"], torch.zeros(D_OUT, R, dtype=dtype))
    assert factors["A"].dtype == dtype
    assert (factors["A"].float().norm(dim=1) > 0.9).all()


def test_it_takes_mixed_ranks_and_does_not_claim_to_be_exact():
    assert load("flexlora").mixed_ranks
    assert not load("flexlora").exact
