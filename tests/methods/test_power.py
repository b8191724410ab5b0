"""The pair from two sums against the rule written densely, and against the best pair that there is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invented import D_IN, D_OUT, R, clients, draw, mean_of_products
from umbel import algebra
from umbel.method import Download, Mean, MethodError, load


def exchanged(method, pairs, rows, held):
    """Runs a round by the contract alone; returns the last download, and what was sent of each message."""
    held, sent = dict(held), []
    for phase in method.plan(1):
        mean = phase.collect()
        for (B, A), n in zip(pairs, rows):
            mean.add(phase.message({"A": A, "B": B}, held), n)
        sent.append(mean.done())
        download = phase.combine(sent[-1], held)
        held = {**Download(held).lasting().factors, **download.factors}
    return held, sent


def product(pairs, rows, held, **options):
    got, _ = exchanged(load("power", **options), pairs, rows, held)
    return got["B"] @ got["A"]


def start(rank=R, seed=77):
    return {"A": draw(rank, D_IN, seed=seed), "B": draw(D_OUT, rank, seed=seed + 1)}


def iterated(M, omega, iterations=1):
    """Subspace iteration on M from the rows of Ω, as textbooks have it."""
    Q = torch.linalg.qr(M @ omega.T)[0]
    for _ in range(iterations - 1):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.T @ Q)[0])[0]
    return Q @ (Q.T @ M)


def best(M, rank):
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


def error(sent, M):
    return float((sent - M).norm() / M.norm())


@settings(deadline=None, max_examples=40)
@given(K=st.integers(1, 6), seed=st.integers(0, 1000), iterations=st.integers(1, 3))
def test_it_is_subspace_iteration_on_the_mean_of_products_from_the_common_start(K, seed, iterations):
    pairs, rows, held = clients((R,) * K, seed), [float(k + 1) for k in range(K)], start(seed=seed + 500)
    wanted = iterated(mean_of_products(pairs, rows), held["A"], iterations)
    assert torch.allclose(product(pairs, rows, held, iterations=iterations), wanted, atol=1e-7)


def test_the_messages_are_those_of_the_rule_and_linear_in_a_clients_update():
    pairs, rows, held = clients((R,) * 3), [1.0, 2.0, 5.0], start()
    M = mean_of_products(pairs, rows)
    _, (first, second) = exchanged(load("power"), pairs, rows, held)
    assert first["Y"].shape == (D_OUT, R)
    assert torch.allclose(first["Y"], M @ held["A"].T)
    assert second["Z"].shape == (R, D_IN)
    Q = algebra.orthonormal(first["Y"])
    assert torch.allclose(second["Z"], Q.T @ M)
    # Another pair of the same product says the same: nothing but B A is told.
    G = draw(R, R, seed=3) + 3 * torch.eye(R).double()
    turned = [(B @ G, torch.linalg.solve(G, A)) for B, A in pairs]
    _, again = exchanged(load("power"), turned, rows, held)
    assert torch.allclose(again[0]["Y"], first["Y"])
    assert torch.allclose((again[1]["Z"]).abs(), second["Z"].abs(), atol=1e-9)


def test_its_two_messages_are_as_large_as_fedits():
    phases = load("power").plan(1)
    held = {**start(), "Q": draw(D_OUT, R)}
    sizes = [sum(x.numel() for x in phase.message(start(), held).values()) for phase in phases]
    assert sizes == [R * D_OUT, R * D_IN]


def test_clients_of_any_rank_are_asked_about_the_same_directions():
    pairs, rows, held = clients((1, 2, R)), [3.0, 2.0, 1.0], start()
    assert torch.allclose(product(pairs, rows, held), iterated(mean_of_products(pairs, rows), held["A"]), atol=1e-9)


def test_directions_come_by_importance_and_a_keeps_its_norm():
    pairs, rows, held = clients((R,) * 4), [1.0] * 4, start()
    got, _ = exchanged(load("power"), pairs, rows, held)
    sizes = got["B"].norm(dim=0) * got["A"].norm(dim=1)
    assert (sizes.diff() <= 1e-12).all()
    assert float(got["A"].norm()) == pytest.approx(float(held["A"].norm()))
    assert torch.allclose(got["A"] @ got["A"].T, got["A"].norm() ** 2 / R * torch.eye(R).double(), atol=1e-9)


def test_one_client_alone_gets_back_its_own_product():
    pairs = clients((R,))
    assert torch.allclose(product(pairs, [2.0], start()), pairs[0][0] @ pairs[0][1], atol=1e-9)


def test_means_that_cancel_leave_the_start_and_no_update():
    ((B, A),) = clients((R,))
    held = start()
    got, _ = exchanged(load("power"), [(torch.zeros_like(B), A), (torch.zeros_like(B), 2 * A)], [1.0, 1.0], held)
    assert torch.equal(got["A"], held["A"])
    assert torch.equal(got["B"], torch.zeros(D_OUT, R).double())


def test_where_clients_together_have_fewer_directions_nothing_is_lost_and_none_is_dead():
    ((B, A),) = clients((1,))
    held = start()
    pairs = [(torch.cat([B, torch.zeros(D_OUT, R - 1).double()], 1), torch.cat([A, held["A"][1:]]))] * 2
    got, _ = exchanged(load("power"), pairs, [1.0, 2.0], held)
    assert torch.allclose(got["B"] @ got["A"], B @ A, atol=1e-9)
    assert (got["A"].norm(dim=1) > 0.1).all()


def test_a_layer_thinner_than_the_rank_keeps_the_rank():
    held = {"A": draw(5, 4, seed=1), "B": draw(3, 5, seed=2)}
    pairs = [(draw(3, 5, seed=k), draw(5, 4, seed=50 + k)) for k in range(3)]
    got, _ = exchanged(load("power"), pairs, [1.0, 2.0, 3.0], held)
    assert (got["B"].shape, got["A"].shape) == ((3, 5), (5, 4))
    assert torch.allclose(got["B"] @ got["A"], mean_of_products(pairs, [1.0, 2.0, 3.0]), atol=1e-9)


def test_a_basis_that_the_wire_has_bent_is_not_taken_for_an_orthonormal_one():
    pairs, rows, held = clients((R,) * 3), [1.0, 2.0, 5.0], start()
    first, last = load("power").plan(1)
    M = mean_of_products(pairs, rows)
    Q = (torch.linalg.qr(M @ held["A"].T)[0] + 0.05 * draw(D_OUT, R, seed=9)).double()
    got = last.combine({"Z": Q.T @ M}, {**held, "Q": Q}).factors
    P = torch.linalg.qr(Q)[0]
    assert torch.allclose(got["B"] @ got["A"], P @ P.T @ M, atol=1e-9)
    assert first.sends == ("Y",)


@pytest.mark.parametrize("iterations", [0, -1])
def test_a_number_of_iterations_that_is_none_is_refused(iterations):
    with pytest.raises(MethodError, match=r"power: iterations: got -?\d, allowed: 1 or more"):
        load("power", iterations=iterations)


# The experiment of the method's first description: clients with a common direction and a drift of their own.

M_OUT, N_IN, RANK, MANY = 384, 256, 8, 10
ROWS = [float(k + 1) for k in range(MANY)]
REGIMES = {"small": (0.3, 0.03), "first round": (1.0, 0.1), "middle": (1.0, 0.3), "A drifts": (0.3, 1.0), "large": (2.0, 1.0)}


def drifted(drift_B, drift_A, seed=0):
    """A_0, and clients (B + drift_B E_k, A_0 + drift_A F_k), all four matrices of the same size per direction."""
    A_0, B = draw(RANK, N_IN, seed=seed) / N_IN**0.5, draw(M_OUT, RANK, seed=seed + 1) / M_OUT**0.5
    Es = [draw(M_OUT, RANK, seed=seed + 100 + k) / M_OUT**0.5 for k in range(MANY)]
    Fs = [draw(RANK, N_IN, seed=seed + 200 + k) / N_IN**0.5 for k in range(MANY)]
    return {"A": A_0, "B": B}, [(B + drift_B * E, A_0 + drift_A * F) for E, F in zip(Es, Fs)]


def fedit(pairs):
    mean = Mean()
    for (B, A), n in zip(pairs, ROWS):
        mean.add({"A": A, "B": B}, n)
    done = mean.done()
    return done["B"] @ done["A"]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("seed", [0, 1000])
def test_warm_it_is_next_to_the_best_pair_and_better_than_fedit(regime, seed):
    held, pairs = drifted(*REGIMES[regime], seed=seed)
    M = mean_of_products(pairs, ROWS)
    one, two, least = error(product(pairs, ROWS, held), M), 0.0, error(best(M, RANK), M)
    two = error(product(pairs, ROWS, held, iterations=2), M)
    assert least - 1e-12 <= two <= one + 1e-12
    assert one <= 1.01 * least
    assert two <= 1.0005 * least
    assert one < error(fedit(pairs), M)


@pytest.mark.parametrize("regime", REGIMES)
def test_from_a_random_start_it_is_far_worse(regime):
    held, pairs = drifted(*REGIMES[regime])
    M = mean_of_products(pairs, ROWS)
    cold = {**held, "A": draw(RANK, N_IN, seed=7)}
    assert error(product(pairs, ROWS, cold), M) > 1.4 * error(product(pairs, ROWS, held), M)


def test_where_the_start_has_been_left_far_behind_one_iteration_is_no_better_than_fedit_and_two_are():
    held, pairs = drifted(1.0, 4.0)
    M = mean_of_products(pairs, ROWS)
    one, two = (error(product(pairs, ROWS, held, iterations=i), M) for i in (1, 2))
    assert one > 1.03 * error(best(M, RANK), M)
    assert two < 1.003 * error(best(M, RANK), M)
    assert two < error(fedit(pairs), M)
