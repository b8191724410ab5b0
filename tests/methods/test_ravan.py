"""RAVAN: its start, its heads, and its rounds against the mean of products."""

import pytest
import torch

from invented import draw
from umbel.method import Mean, MethodError, load, product

D_OUT, D_IN, R = 17, 13, 12
HELD = {"A": torch.randn(R, D_IN, generator=torch.Generator().manual_seed(1)), "B": torch.zeros(D_OUT, R)}


def start(held=HELD, **options):
    phase = next(iter(load("ravan", **options).plan(2)))
    assert phase.trains == phase.sends == ()
    return phase.combine({}, held).factors


@pytest.mark.parametrize(("heads", "taken"), [(1, 1), (2, 2), (4, 4), (5, 4), (11, 6), (50, 12)])
def test_the_heads_start_at_zero_between_orthonormal_factors_and_their_number_divides_the_rank(heads, taken):
    factors = start(heads=heads)
    assert torch.allclose(factors["B"].mT @ factors["B"], torch.eye(R), atol=1e-5)
    assert torch.allclose(factors["A"] @ factors["A"].mT, torch.eye(R), atol=1e-5)
    assert torch.equal(factors["R"], torch.zeros(R, R // taken))
    assert factors["B"].shape == (D_OUT, R)
    assert factors["A"].shape == (R, D_IN)


def test_the_start_follows_the_seed_from_which_a_was_drawn():
    again, other = start(), start({**HELD, "A": HELD["A"] + 1})
    assert torch.equal(start()["B"], again["B"])
    assert torch.equal(start()["A"], again["A"])
    assert (start()["A"] - other["A"]).norm() > 1


def test_the_product_is_the_sum_over_heads():
    factors = {name: x.double() for name, x in start().items()} | {"R": draw(R, 3)}
    wanted = sum(
        factors["B"][:, 3 * i : 3 * i + 3] @ factors["R"][3 * i : 3 * i + 3] @ factors["A"][3 * i : 3 * i + 3] for i in range(4)
    )
    B, A = product(factors)
    assert torch.allclose(B @ A, wanted, atol=1e-12)


def test_the_mean_of_the_heads_is_the_mean_of_products():
    ravan, rows = load("ravan"), [1.0, 2.0, 5.0]
    common = {name: x.double() for name, x in start().items()}
    uploads, mean = [draw(R, 3, seed=k) for k in range(3)], Mean()
    for H, n in zip(uploads, rows):
        mean.add({"R": H}, n)
    download = ravan.combine(mean.done(), common)
    assert download.factors.keys() == {"R"}

    def dense(H):
        B, A = product({**common, "R": H})
        return B @ A

    assert torch.allclose(dense(download.factors["R"]), sum(n / 8 * dense(H) for n, H in zip(rows, uploads)), atol=1e-12)


def test_every_head_has_a_gradient_from_the_first_step_on():
    common = {name: x.double() for name, x in start().items()}
    H = common["R"].requires_grad_()
    B, A = product({**common, "R": H})
    (B @ A - draw(D_OUT, D_IN)).square().sum().backward()
    assert H.grad is not None
    assert (H.grad.unflatten(0, (4, 3)).norm(dim=(1, 2)) > 0).all()


def test_only_r_is_trained_and_sent_after_a_start_of_the_servers_own():
    ravan = load("ravan")
    first, *rounds = ravan.plan(3)
    assert rounds == [ravan] * 3
    assert ravan.trains == ravan.sends == ("R",)
    assert ravan.exact
    assert first.sends == ()


def test_a_rank_that_has_no_orthonormal_factors_is_refused():
    held = {"A": torch.ones(14, D_IN), "B": torch.zeros(D_OUT, 14)}
    with pytest.raises(MethodError, match=r"rank 14 on a weight of 17 × 13, allowed: 13; lower lora\.r"):
        start(held)


def test_no_heads_are_refused_with_what_is_allowed():
    with pytest.raises(MethodError, match=r"ravan: heads: got 0, allowed: 1 or more"):
        load("ravan", heads=0)
