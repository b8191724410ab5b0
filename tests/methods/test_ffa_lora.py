"""FFA-LoRA against its formula."""

import torch

from invented import draw
from umbel.method import Mean, load

D_OUT, D_IN, R = 9, 13, 3


def mean_of_products(pairs, rows):
    return sum(n / sum(rows) * B @ A for (B, A), n in zip(pairs, rows))


def test_the_mean_of_b_on_the_common_a_is_the_mean_of_products():
    A, Bs, rows = draw(R, D_IN, seed=7), [draw(D_OUT, R, seed=k) for k in range(3)], [1.0, 2.0, 5.0]
    mean = Mean()
    for B, n in zip(Bs, rows):
        mean.add({"B": B}, n)
    download = load("ffa_lora").combine(mean.done(), {"A": A, "B": Bs[0]})
    assert download.factors.keys() == {"B"}  # A is nobody's to change
    assert download.merge is download.reset is None
    assert torch.allclose(download.factors["B"] @ A, mean_of_products([(B, A) for B in Bs], rows), atol=1e-12)


def test_only_b_is_trained_and_sent_and_it_claims_to_be_exact():
    ffa = load("ffa_lora")
    assert ffa.trains == ffa.sends == ("B",)
    assert ffa.keeps == ()
    assert ffa.exact
    assert list(ffa.plan(3)) == [ffa] * 3
