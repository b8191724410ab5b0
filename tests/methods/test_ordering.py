"""The aggregation errors of all methods on the same uploads, in the order that theory asks for."""

from itertools import pairwise

import pytest
import torch

from invented import draw
from umbel import algebra
from umbel.method import Each, Mean, Stack, load, product

D_OUT, D_IN, R, K = 24, 20, 4, 5
ROWS = [1.0, 2.0, 3.0, 10.0, 40.0]
NOISE = 1e-7  # FLoRA-NA stops where float64 Gram blocks cannot tell better


def scaled(seed):
    """Clients that went the same way, some farther."""
    B, A = draw(D_OUT, R, seed=seed), draw(R, D_IN, seed=seed + 1)
    return [((0.3 + k) * B, (2.0 - 0.3 * k) * A) for k in range(K)]


def drifted(seed):
    """A common part and a drift of each client's own."""
    B, A = draw(D_OUT, R, seed=seed), draw(R, D_IN, seed=seed + 1)
    return [(B + 0.4 * draw(D_OUT, R, seed=seed + 10 + k), A + 0.4 * draw(R, D_IN, seed=seed + 50 + k)) for k in range(K)]


def unrelated(seed):
    return [(draw(D_OUT, R, seed=seed + 10 + k), draw(R, D_IN, seed=seed + 50 + k)) for k in range(K)]


def small_steps(seed):
    """A first round: B was zero, A has hardly moved."""
    A = draw(R, D_IN, seed=seed)
    return [(1e-3 * draw(D_OUT, R, seed=seed + 10 + k), A + 1e-3 * draw(R, D_IN, seed=seed + 50 + k)) for k in range(K)]


def alike(seed):
    return [(draw(D_OUT, R, seed=seed), draw(R, D_IN, seed=seed + 1))] * K


def fold(collector, pairs, rows=ROWS):
    for (B, A), n in zip(pairs, rows):
        collector.add({"B": B, "A": A}, n)
    return collector.done()


def error(name, pairs, **options):
    method = load(name, **options)
    held = {"A": pairs[0][1], "B": pairs[0][0]}
    download = method.combine(fold(method.collect(), pairs), held)
    own = {} if download.reset is not None else download.factors
    sent = algebra.add_products(download.merge, product(own) if own else None)
    ideal = fold(Stack(), pairs)
    return algebra.relative_error(sent, (ideal["B"], ideal["A"]))


@pytest.mark.parametrize("regime", [scaled, drifted, unrelated, small_steps, alike])
@pytest.mark.parametrize("seed", [0, 100, 200])
def test_exact_is_below_best_rank_below_flora_na_and_lora_fair_below_fedit(regime, seed):
    pairs = regime(seed)
    errors = {
        name: error(name, pairs) for name in ("exact", "fedex_lora", "flora", "best_rank", "flora_na", "lora_fair", "fedit")
    }
    assert max(errors["exact"], errors["fedex_lora"], errors["flora"]) < 1e-12
    assert errors["exact"] <= errors["best_rank"] + NOISE
    assert errors["best_rank"] <= errors["flora_na"] + NOISE
    assert errors["best_rank"] <= errors["lora_fair"] + NOISE
    assert errors["flora_na"] <= errors["fedit"] + NOISE
    assert errors["lora_fair"] <= errors["fedit"] + NOISE


@pytest.mark.parametrize("seed", [0, 100, 200])
def test_where_clients_are_unrelated_every_step_of_the_order_is_a_real_one(seed):
    errors = [error(name, unrelated(seed)) for name in ("exact", "best_rank", "flora_na", "fedit")]
    assert all(better < 0.995 * worse for better, worse in pairwise(errors))
    assert error("lora_fair", unrelated(seed)) < 0.995 * errors[-1]


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0, 100.0])
def test_lora_fair_is_the_better_the_smaller_its_ridge_and_never_worse_than_fedit(ridge):
    pairs = drifted(0)
    best, own, fedit = (
        error("lora_fair", pairs, regularization=0.0),
        error("lora_fair", pairs, regularization=ridge),
        error("fedit", pairs),
    )
    assert best - 1e-12 <= own <= fedit + 1e-12


def test_all_that_cut_at_rank_r_are_equally_good():
    pairs = drifted(0)
    wanted = error("best_rank", pairs)
    assert error("flexlora", pairs) == pytest.approx(wanted, rel=1e-9)
    assert error("florist", pairs, rank=R) == pytest.approx(wanted, rel=1e-9)


# The gauge: (B_k G_k, G_k⁻¹ A_k) is the same update, and a method that looks at products alone cannot tell.


def turned(pairs):
    gauges = [draw(R, R, seed=77 + k) + 3 * torch.eye(R).double() for k in range(K)]
    return [(B @ G, torch.linalg.solve(G, A)) for (B, A), G in zip(pairs, gauges)]


def effect(name, pairs, **options):
    method = load(name, **options)
    download = method.combine(fold(method.collect(), pairs), {"A": pairs[0][1], "B": pairs[0][0]})
    dense = torch.zeros(D_OUT, D_IN).double()
    if download.factors:
        dense = dense + download.factors["B"] @ download.factors["A"]
    return dense if download.merge is None else dense + download.merge[0] @ download.merge[1]


@pytest.mark.parametrize("name", ["fedex_lora", "exact", "flora", "flexlora", "florist", "best_rank"])
def test_methods_that_aggregate_products_do_not_see_the_gauge(name):
    pairs = drifted(0)
    assert torch.allclose(effect(name, turned(pairs)), effect(name, pairs), atol=1e-9)


@pytest.mark.parametrize("name", ["fedit", "hetlora", "flora_na", "lora_fair"])
def test_methods_that_average_factors_do(name):
    pairs = drifted(0)
    before, after = effect(name, pairs), effect(name, turned(pairs))
    assert (after - before).norm() > 0.01 * before.norm()


def test_one_client_is_given_back_by_all_that_train_both_factors():
    pairs = unrelated(0)[:1]
    for name in ("fedit", "fedex_lora", "exact", "flora", "flexlora", "hetlora", "lora_fair", "flora_na", "best_rank"):
        assert error(name, pairs) < 1e-6, name


def test_fedits_error_is_that_of_the_plain_means():
    pairs = drifted(0)
    each, mean = fold(Each(), pairs), fold(Mean(), pairs)
    M = sum(p * own["B"] @ own["A"] for own, p in each)
    assert error("fedit", pairs) == pytest.approx(float((M - mean["B"] @ mean["A"]).norm() / M.norm()), rel=1e-9)
