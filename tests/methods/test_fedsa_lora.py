"""FedSA-LoRA: what is shared, what stays, and the common model that is made of it in the end."""

import torch

from invented import draw
from umbel.method import Mean, load

D_OUT, D_IN, R = 9, 13, 3
ROWS = [1.0, 2.0, 5.0]


Bs, As = [draw(D_OUT, R, seed=k) for k in range(3)], [draw(R, D_IN, seed=9 + k) for k in range(3)]


def combined(phase, name, factors):
    mean = Mean()
    for x, n in zip(factors, ROWS):
        mean.add({name: x}, n)
    return phase.combine(mean.done(), {"A": As[0], "B": Bs[0]})


def test_a_is_averaged_and_b_stays_at_the_client():
    fedsa = load("fedsa_lora")
    assert fedsa.trains == ("A", "B")
    assert fedsa.sends == ("A",)
    assert fedsa.keeps == ("B",)
    assert not fedsa.exact
    download = combined(fedsa, "A", As)
    assert download.factors.keys() == {"A"}
    assert download.merge is download.reset is None
    assert torch.allclose(download.factors["A"], sum(n / 8 * A for n, A in zip(ROWS, As)))


def test_after_the_last_round_and_only_then_the_bs_are_gathered_without_training():
    fedsa = load("fedsa_lora")
    *rounds, gather = fedsa.plan(4)
    assert rounds == [fedsa] * 4
    assert gather.trains == ()
    assert gather.sends == ("B",)
    assert gather.measures == "factors"
    B = combined(gather, "B", Bs).factors["B"]
    assert torch.allclose(B, sum(n / 8 * B for n, B in zip(ROWS, Bs)))


def test_the_gathered_model_is_not_the_mean_of_the_clients_own_models_unless_they_share_a():
    *_, gather = load("fedsa_lora").plan(1)
    B = combined(gather, "B", Bs).factors["B"]
    A = combined(load("fedsa_lora"), "A", As).factors["A"]
    own = sum(n / 8 * b @ A for n, b in zip(ROWS, Bs))  # client k's model after the round is B_k A
    before = sum(n / 8 * b @ a for n, b, a in zip(ROWS, Bs, As))
    assert torch.allclose(B @ A, own)
    assert (B @ A - before).norm() > 0.1 * before.norm()
