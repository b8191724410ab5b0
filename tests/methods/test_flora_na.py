"""FLoRA-NA against L formed densely."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invented import draw, fold
from umbel import algebra
from umbel.method import Each, Mean, MethodError, Stack, load

D_OUT, D_IN, R = 9, 13, 3


def clients(U, drift, seed=0, shape=(D_OUT, D_IN)):
    """Common factors with so much independent drift."""
    B, A = draw(shape[0], R, seed=seed), draw(R, shape[1], seed=seed + 1)
    return [
        (B + drift * draw(shape[0], R, seed=seed + 10 + k), A + drift * draw(R, shape[1], seed=seed + 50 + k)) for k in range(U)
    ]


def aggregate(pairs, rows, **options):
    factors = load("flora_na", **options).combine(fold(Each(), pairs, rows), {}).factors
    return factors["B"], factors["A"]


def mean_of_products(pairs, rows):
    return sum(n / sum(rows) * B @ A for (B, A), n in zip(pairs, rows))


def error(pair, pairs, rows):
    stack = fold(Stack(), pairs, rows)
    return algebra.relative_error(pair, (stack["B"], stack["A"]))


@settings(deadline=None, max_examples=40)
@given(U=st.integers(1, 6), drift=st.floats(0.01, 10), seed=st.integers(0, 1000))
def test_it_lies_between_the_best_rank_r_copy_and_fedit(U, drift, seed):
    pairs, rows = clients(U, drift, seed), [float(k + 1) for k in range(U)]
    stack, mean = fold(Stack(), pairs, rows), fold(Mean(), pairs, rows)
    U_r, s, Vh = algebra.product_svd(stack["B"], stack["A"], R)
    best = error((U_r * s, Vh), pairs, rows)
    assert best - 1e-9 <= error(aggregate(pairs, rows), pairs, rows) <= error((mean["B"], mean["A"]), pairs, rows) + 1e-9


@settings(deadline=None, max_examples=40)
@given(U=st.integers(1, 6), drift=st.floats(0.01, 10), seed=st.integers(0, 1000))
def test_the_loss_never_rises_and_is_the_dense_one(U, drift, seed):
    pairs = clients(U, drift, seed)
    p = torch.arange(1, U + 1).double() / (U * (U + 1) / 2)
    Bs, As = torch.stack([B for B, _ in pairs]), torch.stack([A for _, A in pairs])
    P, Q, losses = load("flora_na").coefficients([algebra.gram_blocks(Bs, As)], p)
    M = torch.einsum("u,umr,urn->mn", p, Bs, As)
    noise = 1e-12 * float(M.square().sum())
    assert all(later <= earlier + noise for earlier, later in pairwise(losses))
    dense = (torch.einsum("u,umr->mr", P, Bs) @ torch.einsum("u,urn->rn", Q, As) - M).square().sum()
    assert float(dense) == pytest.approx(losses[-1], rel=1e-6, abs=noise)


def test_at_the_end_no_coefficient_can_be_moved_to_advantage():
    pairs, p = clients(4, 1.0), torch.full((4,), 0.25).double()
    Bs, As = torch.stack([B for B, _ in pairs]), torch.stack([A for _, A in pairs])
    P, Q, _ = load("flora_na", sweeps=2000, tolerance=0.0).coefficients([algebra.gram_blocks(Bs, As)], p)
    P, Q = P.clone().requires_grad_(), Q.clone().requires_grad_()
    M = torch.einsum("u,umr,urn->mn", p, Bs, As)
    (torch.einsum("u,umr->mr", P, Bs) @ torch.einsum("u,urn->rn", Q, As) - M).square().sum().backward()
    assert P.grad is not None
    assert Q.grad is not None
    assert P.grad.norm() < 1e-5 * M.square().sum()
    assert Q.grad.norm() < 1e-5 * M.square().sum()


def test_one_client_and_identical_clients_are_given_back():
    pairs = clients(1, 0.0)
    for U in (1, 4):
        B, A = aggregate(pairs * U, [float(k + 1) for k in range(U)])
        assert torch.allclose(B, pairs[0][0], atol=1e-12)
        assert torch.allclose(A, pairs[0][1], atol=1e-12)


def test_clients_that_differ_by_length_alone_are_combined_without_error():
    (B, A), rows = clients(1, 0.0)[0], [1.0, 2.0, 3.0, 4.0]
    pairs = [(b * B, a * A) for b, a in [(1.0, 2.0), (0.3, 0.5), (3.0, 1.0), (2.0, 4.0)]]
    mean = fold(Mean(), pairs, rows)
    assert error((mean["B"], mean["A"]), pairs, rows) > 0.05
    assert error(aggregate(pairs, rows), pairs, rows) < 1e-6


def test_what_the_loss_cannot_see_stays_as_it_was():
    # Two clients sent the same: only the sum of their coefficients matters, and damping keeps the difference.
    pairs, p = clients(3, 1.0), torch.tensor([0.1, 0.4, 0.2, 0.3]).double()
    Bs, As = (torch.stack(x) for x in zip(*[pairs[0], *pairs]))
    P, Q, losses = load("flora_na").coefficients([algebra.gram_blocks(Bs, As)], p)
    assert len(losses) > 1
    assert float(P[1] - P[0]) == pytest.approx(0.3, abs=1e-6)
    assert float(Q[1] - Q[0]) == pytest.approx(0.3, abs=1e-6)


def test_the_gauge_is_fedits_ratio_of_norms():
    pairs, rows = clients(4, 2.0), [1.0, 2.0, 3.0, 4.0]
    B, A = aggregate(pairs, rows)
    mean = fold(Mean(), pairs, rows)
    assert float(B.norm() / A.norm()) == pytest.approx(float(mean["B"].norm() / mean["A"].norm()), rel=1e-12)


def test_zero_uploads_give_the_fedit_pair():
    pairs = [(torch.zeros(D_OUT, R).double(), A) for _, A in clients(3, 1.0)]
    B, A = aggregate(pairs, [1.0, 1.0, 2.0])
    mean = fold(Mean(), pairs, [1.0, 1.0, 2.0])
    assert torch.equal(B, torch.zeros(D_OUT, R).double())
    assert torch.allclose(A, mean["A"])


def test_factors_that_cancel_in_the_mean_are_left_at_fedit():
    B, A = clients(1, 0.0)[0]
    got_B, got_A = aggregate([(B, A), (-B, -A)], [1.0, 1.0])
    assert torch.isfinite(got_B).all()
    assert torch.isfinite(got_A).all()
    assert torch.allclose(got_B @ got_A, torch.zeros(D_OUT, D_IN).double())


def test_scope_shared_uses_one_pair_of_coefficients_for_all_layers_and_lowers_the_sum():
    rows = [1.0, 2.0, 3.0]
    layers = {"q": clients(3, 1.0, 0), "v": clients(3, 1.0, 300, shape=(6, 8))}
    got = {layer: fold(Each(), pairs, rows) for layer, pairs in layers.items()}
    shared = load("flora_na", scope="shared")
    downloads = shared.combine_layers(got, {layer: {} for layer in got})
    p = torch.tensor(rows).double() / 6
    stacks = {layer: [torch.stack(x) for x in zip(*pairs)] for layer, pairs in layers.items()}
    P, Q, losses = shared.coefficients([algebra.gram_blocks(*stacks[layer]) for layer in layers], p)
    total = 0.0
    for layer, (Bs, As) in stacks.items():
        product = torch.einsum("u,umr->mr", P, Bs) @ torch.einsum("u,urn->rn", Q, As)
        factors = downloads[layer].factors
        assert torch.allclose(factors["B"] @ factors["A"], product, atol=1e-10)
        total += float((product - mean_of_products(layers[layer], rows)).square().sum())
    assert total == pytest.approx(losses[-1], rel=1e-9)
    assert losses[-1] < losses[0]
    own = load("flora_na").combine_layers(got, {layer: {} for layer in got})
    assert not torch.allclose(own["q"].factors["B"], downloads["q"].factors["B"])


def test_mixed_ranks_are_refused_and_the_message_names_methods_that_take_them():
    got = fold(Each(), [(draw(D_OUT, 2), draw(2, D_IN)), (draw(D_OUT, 3), draw(3, D_IN))], [1.0, 1.0])
    with pytest.raises(
        MethodError, match=r"layer 'q': clients sent B of shapes .*one rank is needed, mixed ranks are for .*florist"
    ):
        load("flora_na").combine_layers({"q": got}, {"q": {}})


@pytest.mark.parametrize("options", [{"scope": "model"}, {"sweeps": 0}, {"tolerance": -1.0}])
def test_options_out_of_range_are_refused_with_what_is_allowed(options):
    with pytest.raises(MethodError, match="allowed"):
        load("flora_na", **options)
