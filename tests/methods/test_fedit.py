"""FedIT against its formula."""

import torch

from invented import draw
from umbel import algebra
from umbel.method import Mean, load


def test_each_factor_is_the_weighted_mean_and_the_error_is_what_the_identity_says():
    rows = torch.tensor([1.0, 2.0, 5.0])
    p = (rows / rows.sum()).tolist()
    Bs, As = [draw(7, 3, seed=k) for k in range(3)], [draw(3, 11, seed=9 + k) for k in range(3)]
    mean = Mean()
    for n, B, A in zip(rows.tolist(), Bs, As):
        mean.add({"A": A, "B": B}, n)
    got = load("fedit").combine(mean.done(), {}).factors
    B_mean, A_mean = sum(w * B for w, B in zip(p, Bs)), sum(w * A for w, A in zip(p, As))
    assert torch.allclose(got["B"], B_mean)
    assert torch.allclose(got["A"], A_mean)
    # M − B̄ Ā = Σ p_k (B_k − B̄)(A_k − Ā)
    M = sum(w * B @ A for w, B, A in zip(p, Bs, As))
    residual = sum(w * (B - B_mean) @ (A - A_mean) for w, B, A in zip(p, Bs, As))
    assert torch.allclose(M - B_mean @ A_mean, residual)
    ideal = torch.cat(Bs, 1), torch.cat([w * A for w, A in zip(p, As)], 0)
    error = algebra.relative_error((got["B"], got["A"]), ideal)
    assert abs(error - float(residual.norm() / M.norm())) < 1e-12


def test_it_does_not_claim_to_be_exact_and_sends_what_it_trains():
    fedit = load("fedit")
    assert not fedit.exact
    assert fedit.trains == fedit.sends == ("A", "B")
    assert list(fedit.plan(3)) == [fedit] * 3
