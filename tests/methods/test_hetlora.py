"""HetLoRA against its formulas, written naively."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invented import D_IN, D_OUT, R, clients, draw
from umbel.method import Each, Mean, MethodError, load


def pair(B, A):
    return {"B": B, "A": A}


def aggregate(pairs, rows, largest, **options):
    each = Each()
    for (B, A), n in zip(pairs, rows):
        each.add(pair(B, A), n)
    held = pair(draw(D_OUT, largest, seed=98), draw(largest, D_IN, seed=99))
    return load("hetlora", **options).combine(each.done(), held).factors, held


def padded(pairs, weights, largest):
    A, B = torch.zeros(largest, D_IN).double(), torch.zeros(D_OUT, largest).double()
    for (b, a), w in zip(pairs, weights):
        for i in range(a.shape[0]):
            A[i] += w / sum(weights) * a[i]
            B[:, i] += w / sum(weights) * b[:, i]
    return B, A


@settings(deadline=None, max_examples=40)
@given(ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 50))
@pytest.mark.parametrize("weights", ["sparsity", "rows"])
def test_it_is_the_weighted_mean_of_factors_padded_with_zeros(weights, ranks, seed):
    pairs, rows = clients(ranks, seed), [float(k + 1) for k in range(len(ranks))]
    sizes = [n * float((B @ A).norm()) if weights == "sparsity" else n for (B, A), n in zip(pairs, rows)]
    B, A = padded(pairs, sizes, max(ranks))
    factors, _ = aggregate(pairs, rows, max(ranks), weights=weights)
    assert torch.allclose(factors["B"], B, atol=1e-12)
    assert torch.allclose(factors["A"], A, atol=1e-12)


def test_by_rows_and_at_one_rank_it_is_fedit():
    pairs, rows, mean = clients((R,) * 3), [1.0, 2.0, 5.0], Mean()
    for (B, A), n in zip(pairs, rows):
        mean.add(pair(B, A), n)
    factors, _ = aggregate(pairs, rows, R, weights="rows")
    assert torch.allclose(factors["B"], mean.done()["B"])
    assert torch.allclose(factors["A"], mean.done()["A"])


def test_a_client_that_says_three_times_as_much_weighs_three_times_as_much():
    (B, A), (C, D) = clients((R, R))
    C = C * float((B @ A).norm() / (C @ D).norm())
    factors, _ = aggregate([(3 * B, A), (C, D)], [1.0, 1.0], R)
    assert torch.allclose(factors["A"], 0.75 * A + 0.25 * D)


def test_where_nothing_was_learned_rows_decide():
    pairs, rows = [(torch.zeros(D_OUT, R).double(), A) for _, A in clients((R, R))], [1.0, 3.0]
    factors, _ = aggregate(pairs, rows, R)
    assert torch.allclose(factors["A"], 0.25 * pairs[0][1] + 0.75 * pairs[1][1])


def test_directions_that_nobody_sent_are_not_sent_back_so_that_clients_begin_them_anew():
    factors, _ = aggregate(clients((2, 3)), [1.0, 1.0], 5)
    assert factors["A"].shape == (3, D_IN)
    assert factors["B"].shape == (D_OUT, 3)


def test_a_client_without_any_weight_adds_no_direction():
    """Its directions would be zero on both sides, and so have no gradient."""
    (first, (B, A)) = clients((2, 4))
    factors, _ = aggregate([first, (0 * B, A)], [1.0, 1.0], 4)
    assert factors["A"].shape == (2, D_IN)


def test_the_penalty_is_the_size_of_the_last_directions():
    B, A = draw(D_OUT, 8), draw(8, D_IN, seed=1)
    het = load("hetlora", gamma=0.75, regularization=0.1)
    assert torch.allclose(het.penalty(pair(B, A)), 0.1 * B[:, 6:].norm() * A[6:].norm())


def test_the_penalty_has_a_gradient_also_at_the_start_where_b_is_zero():
    B, A = torch.zeros(D_OUT, 4).double().requires_grad_(), draw(4, D_IN).requires_grad_()
    load("hetlora", gamma=0.5, regularization=1.0).penalty(pair(B, A)).backward()
    assert torch.equal(B.grad, torch.zeros(D_OUT, 4).double())
    assert torch.equal(A.grad, torch.zeros(4, D_IN).double())
    with torch.no_grad():
        B += draw(D_OUT, 4)
    load("hetlora", gamma=0.5, regularization=1.0).penalty(pair(B, A)).backward()
    assert torch.equal(B.grad[:, :2], torch.zeros(D_OUT, 2).double())
    assert (B.grad[:, 2:] * B[:, 2:]).sum() > 0  # downhill is towards a shorter tail


@pytest.mark.parametrize("options", [{"gamma": 1.0}, {"regularization": 0.0}])
def test_there_is_no_penalty_without_a_tail_or_without_weight(options):
    assert load("hetlora", **options).penalty(pair(draw(D_OUT, 4), draw(4, D_IN))) is None


@pytest.mark.parametrize(("rank", "gamma", "kept"), [(8, 0.99, 7), (8, 0.5, 4), (3, 0.1, 1), (100, 0.29, 29)])
def test_a_client_whose_tail_has_shrunk_drops_it_and_keeps_the_rest_as_it_is(rank, gamma, kept):
    before, after = (pair(draw(D_OUT, rank, seed=s), draw(rank, D_IN, seed=s + 1)) for s in (0, 5))
    after["B"][:, kept:] *= 0.1
    cut = load("hetlora", gamma=gamma).trained(before, after)
    assert torch.equal(cut["A"], after["A"][:kept])
    assert torch.equal(cut["B"], after["B"][:, :kept])
    assert kept == max(1, math.floor(round(gamma * rank, 6)))


def test_nothing_is_dropped_where_the_tail_grew_or_was_zero_or_is_all_there_is():
    A = draw(4, D_IN)
    zero, grown = pair(torch.zeros(D_OUT, 4).double(), A), pair(draw(D_OUT, 4), A)
    het = load("hetlora", gamma=0.5)
    assert het.trained(zero, grown) is grown
    assert het.trained(zero, zero) is zero
    larger = pair(2 * grown["B"], A)
    assert het.trained(grown, larger) is larger
    assert het.trained(larger, grown)["A"].shape[0] == 2
    single = pair(draw(D_OUT, 1), draw(1, D_IN))
    assert het.trained(pair(2 * single["B"], single["A"]), single) is single


def test_it_takes_mixed_ranks_and_claims_no_mean_by_rows():
    het = load("hetlora")
    assert het.mixed_ranks
    assert not het.exact
    assert not het.by_rows


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "norm"},
        {"gamma": 0.0},
        {"gamma": 1.5},
        {"gamma": float("nan")},
        {"regularization": -1.0},
        {"regularization": float("nan")},
    ],
)
def test_options_out_of_range_are_refused_with_what_is_allowed(options):
    with pytest.raises(MethodError, match="allowed"):
        load("hetlora", **options)
