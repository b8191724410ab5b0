"""RoLoRA: whose turn it is, and that each turn is exact."""

import torch

from invented import draw
from umbel.method import Mean, load

D_OUT, D_IN, R = 9, 13, 3


def test_b_and_a_take_turns_beginning_with_b():
    phases = list(load("rolora").plan(5))
    assert [phase.trains for phase in phases] == [("B",), ("A",), ("B",), ("A",), ("B",)]
    assert all(phase.sends == phase.trains and phase.keeps == () and phase.exact for phase in phases)
    assert list(load("rolora").plan(1)) == phases[:1]


def test_each_round_gives_the_mean_of_products_and_leaves_the_other_factor_alone():
    held, rows = {"A": draw(R, D_IN, seed=1), "B": torch.zeros(D_OUT, R).double()}, [1.0, 2.0, 5.0]
    for index, phase in enumerate(load("rolora").plan(4)):
        (name,) = phase.trains
        uploads = [held[name] + draw(*held[name].shape, seed=10 * index + k) for k in range(3)]
        mean = Mean()
        for x, n in zip(uploads, rows):
            mean.add({name: x}, n)
        download = phase.combine(mean.done(), held)
        assert download.factors.keys() == {name}
        clients = [{**held, name: x} for x in uploads]
        M = sum(n / 8 * own["B"] @ own["A"] for own, n in zip(clients, rows))
        held = {**held, **download.factors}
        assert torch.allclose(held["B"] @ held["A"], M, atol=1e-12)


def test_a_would_have_no_gradient_in_the_first_round():
    A, B = draw(R, D_IN).requires_grad_(), torch.zeros(D_OUT, R).double().requires_grad_()
    (B @ A - draw(D_OUT, D_IN, seed=3)).square().sum().backward()
    assert A.grad is not None
    assert B.grad is not None
    assert A.grad.norm() == 0
    assert B.grad.norm() > 0
