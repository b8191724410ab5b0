"""Fed-SB: its start against a dense decomposition, its rounds against the mean of products."""

import pytest
import torch

from invented import draw
from umbel import algebra
from umbel.method import Mean, MethodError, Stack, load

D_OUT, D_IN, R = 9, 13, 4


HELD = {"A": draw(R, D_IN, seed=1), "B": torch.zeros(D_OUT, R).double()}


def start(method, uploads=(), rows=(), held=HELD):
    phase = next(iter(method.plan(2)))
    collector = phase.collect()
    for factors, n in zip(uploads, rows):
        collector.add(factors, n)
    return phase.combine(collector.done() if phase.sends else {}, held).factors


def check_orthonormal(factors):
    assert factors["B"].shape == (D_OUT, R)
    assert factors["R"].shape == (R, R)
    assert factors["A"].shape == (R, D_IN)
    assert torch.allclose(factors["B"].mT @ factors["B"], torch.eye(R).double(), atol=1e-6)
    assert torch.allclose(factors["A"] @ factors["A"].mT, torch.eye(R).double(), atol=1e-6)


def test_the_sign_start_is_the_best_copy_of_a_first_optimizer_step():
    gradients, rows, eta = [draw(D_OUT, D_IN, seed=k) for k in range(3)], [1.0, 2.0, 5.0], 1e-3
    factors = start(load("fed_sb", eta=eta), [{"G": G} for G in gradients], rows)
    check_orthonormal(factors)
    step = -eta * torch.sign(sum(n * G for n, G in zip(rows, gradients)))
    U, s, Vh = torch.linalg.svd(step)
    started = factors["B"] @ factors["R"] @ factors["A"]
    assert torch.allclose(torch.diagonal(factors["R"]), s[:R])
    assert torch.allclose(started, (U[:, :R] * s[:R]) @ Vh[:R], atol=1e-12)
    # What is left out is the discarded spectrum, no more.
    assert float((step - started).square().sum()) == pytest.approx(float(s[R:].square().sum()), rel=1e-10)
    # It goes downhill.
    assert sum(n * (G * started).sum() for n, G in zip(rows, gradients)) < 0


def test_the_gradient_start_is_the_best_copy_of_the_mean_as_long_as_a_sign_step():
    pairs = [(draw(D_OUT, R, seed=k), draw(R, D_IN, seed=9 + k)) for k in range(3)]
    rows, eta = [1.0, 2.0, 5.0], 1e-3
    factors = start(load("fed_sb", init="gradient", eta=eta), [{"B": B, "A": A} for B, A in pairs], rows)
    check_orthonormal(factors)
    mean = sum(n / 8 * B @ A for n, (B, A) in zip(rows, pairs))
    step = -mean * (eta * (D_OUT * D_IN) ** 0.5 / mean.norm())
    assert float(step.norm()) == pytest.approx(float((eta * torch.sign(mean)).norm()))
    U, s, Vh = torch.linalg.svd(step)
    assert torch.allclose(factors["B"] @ factors["R"] @ factors["A"], (U[:, :R] * s[:R]) @ Vh[:R], atol=1e-12)


def test_the_random_start_asks_nobody_and_leaves_the_model_as_it_is():
    method = load("fed_sb", init="random")
    phase = next(iter(method.plan(1)))
    assert phase.trains == phase.sends == ()
    factors = start(method)
    check_orthonormal(factors)
    assert torch.equal(factors["R"], torch.zeros(R, R).double())
    assert torch.equal(start(method)["B"], factors["B"])
    other = start(method, held={**HELD, "A": draw(R, D_IN, seed=2)})  # another layer, or another seed of the run
    assert not torch.allclose(other["B"], factors["B"])
    square = start(method, held={"A": draw(R, D_IN), "B": torch.zeros(D_IN, R).double()})
    assert not torch.allclose(square["B"].mT, square["A"])


@pytest.mark.parametrize("init", ["sign", "gradient"])
def test_a_zero_gradient_still_gives_orthonormal_factors(init):
    zero = {"G": torch.zeros(D_OUT, D_IN).double(), "B": torch.zeros(D_OUT, R).double(), "A": draw(R, D_IN)}
    method = load("fed_sb", init=init)
    factors = start(method, [{name: zero[name] for name in next(iter(method.plan(1))).sends}], [1.0])
    check_orthonormal(factors)
    assert torch.equal(factors["R"], torch.zeros(R, R).double())


def test_rounds_average_r_and_that_is_the_mean_of_products():
    method, started = load("fed_sb"), start(load("fed_sb"), [{"G": draw(D_OUT, D_IN)}], [1.0])
    mean, stack = Mean(), Stack()
    for k, n in enumerate([1.0, 2.0, 5.0]):
        R_k = draw(R, R, seed=k)
        mean.add({"R": R_k}, n)
        stack.add({"B": started["B"] @ R_k, "A": started["A"]}, n)
    download = method.combine(mean.done(), started)
    assert list(download.factors) == ["R"]  # B and A never travel again
    sent = started["B"] @ download.factors["R"], started["A"]
    assert algebra.relative_error(sent, (stack.done()["B"], stack.done()["A"])) < 1e-14


def test_the_plan_measures_once_and_only_r_trains():
    for init, sends, collect in [("sign", ("G",), Mean), ("gradient", ("A", "B"), Stack), ("random", (), Mean)]:
        method = load("fed_sb", init=init, samples=50)
        first, *rest = method.plan(3)
        assert (first.trains, first.sends, first.collect, first.samples) == ((), sends, collect, 50)
        assert rest == [method] * 3
        assert method.trains == method.sends == ("R",)
        assert method.exact
        assert not first.exact


@pytest.mark.parametrize("init", ["sign", "gradient", "random"])
def test_a_rank_that_has_no_orthonormal_factors_is_refused(init):
    held = {"A": draw(11, D_IN), "B": torch.zeros(D_OUT, 11).double()}
    upload = {"G": draw(D_OUT, D_IN), "B": draw(D_OUT, 11), "A": draw(11, D_IN)}
    method = load("fed_sb", init=init)
    sends = next(iter(method.plan(1))).sends
    with pytest.raises(MethodError, match=r"rank 11 on a weight of 9 × 13, allowed: 9; lower lora\.r"):
        start(method, [{name: upload[name] for name in sends}], [1.0], held)


@pytest.mark.parametrize("options", [{"init": "svd"}, {"eta": 0.0}, {"eta": float("nan")}, {"samples": 0}])
def test_options_out_of_range_are_refused_with_what_is_allowed(options):
    with pytest.raises(MethodError, match="allowed"):
        load("fed_sb", **options)
