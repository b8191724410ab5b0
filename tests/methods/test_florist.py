"""FLoRIST against the dense singular value decomposition of Σ p_k B_k A_k."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.method import MethodError, Stack, load

D_OUT, D_IN = 9, 13


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def clients(ranks, seed=0):
    return [(draw(D_OUT, r, seed=seed + 10 * k), draw(r, D_IN, seed=seed + 10 * k + 5)) for k, r in enumerate(ranks)]


def aggregate(pairs, rows, **options):
    stack = Stack()
    for (B, A), n in zip(pairs, rows):
        stack.add({"B": B, "A": A}, n)
    return load("florist", **options).combine(stack.done(), {})


def mean_of_products(pairs, rows):
    return sum(n / sum(rows) * B @ A for (B, A), n in zip(pairs, rows))


@settings(deadline=None, max_examples=60)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    energy=st.floats(0.05, 0.999),
    seed=st.integers(0, 50),
)
def test_it_is_the_best_copy_of_the_mean_of_products_at_the_smallest_rank_with_the_energy(ranks, energy, seed):
    pairs, rows = clients(ranks, seed), [float(k + 1) for k in range(len(ranks))]
    M = mean_of_products(pairs, rows)
    B, A = (aggregate(pairs, rows, energy=energy).factors[name] for name in "BA")
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    p = B.shape[1]
    share = s.square().cumsum(0) / s.square().sum()
    assert share[p - 1] >= energy - 1e-9
    assert p == 1 or share[p - 2] < energy + 1e-9
    assert torch.allclose(B.norm(dim=0), s[:p], rtol=1e-9)  # the singular values ride on B, largest first
    assert torch.allclose(A @ A.mT, torch.eye(p).double(), atol=1e-10)
    assert torch.allclose(B @ A, (U[:, :p] * s[:p]) @ Vh[:p], atol=1e-8 * float(s[0]))


@pytest.mark.parametrize("ranks", [(2, 2), (1, 4, 2), (6, 6, 6, 6)])
@pytest.mark.parametrize("adopt", ["load", "merge"])
def test_energy_one_is_the_mean_of_products_also_where_the_stack_is_wider_than_the_matrix(ranks, adopt):
    pairs, rows = clients(ranks), [float(k + 1) for k in range(len(ranks))]
    download = aggregate(pairs, rows, energy=1.0, adopt=adopt)
    B, A = download.merge or (download.factors["B"], download.factors["A"])
    assert B.shape[1] == min(sum(ranks), D_OUT)
    assert torch.allclose(B @ A, mean_of_products(pairs, rows), atol=1e-12)


def test_the_first_client_counts_once():
    # A published implementation stacks it twice, which makes M + p_0² B_0 A_0.
    pairs = clients((2,) * 10)
    B, A = (aggregate(pairs, [1.0] * 10, energy=1.0).factors[name] for name in "BA")
    assert torch.allclose(B @ A, mean_of_products(pairs, [1.0] * 10), atol=1e-12)


def test_another_gauge_changes_nothing():
    pairs = clients((3, 3))
    G = draw(3, 3, seed=1) + 3 * torch.eye(3).double()
    turned = [(B @ G, torch.linalg.solve(G, A)) for B, A in pairs]
    one, two = (aggregate(p, [1.0, 2.0]).factors for p in (pairs, turned))
    assert torch.allclose(one["B"] @ one["A"], two["B"] @ two["A"], atol=1e-10)


def test_a_fixed_rank_is_the_truncated_svd_and_no_more_than_there_is():
    pairs = clients((3, 3))
    U, s, Vh = torch.linalg.svd(mean_of_products(pairs, [1.0, 1.0]))
    factors = aggregate(pairs, [1.0, 1.0], rank=2).factors
    assert torch.allclose(factors["B"] @ factors["A"], (U[:, :2] * s[:2]) @ Vh[:2], atol=1e-10)
    assert aggregate(pairs, [1.0, 1.0], rank=50).factors["A"].shape[0] == 6


def test_a_client_may_cut_to_its_rank_and_has_the_best_copy_of_that_rank():
    pairs = clients((4, 4))
    factors = aggregate(pairs, [1.0, 1.0], energy=1.0).factors
    U, s, Vh = torch.linalg.svd(mean_of_products(pairs, [1.0, 1.0]))
    assert torch.allclose(factors["B"][:, :3] @ factors["A"][:3], (U[:, :3] * s[:3]) @ Vh[:3], atol=1e-10)


def test_zero_uploads_give_a_zero_of_rank_one():
    pairs = [(torch.zeros(D_OUT, 3), draw(3, D_IN, dtype=torch.float32))] * 2
    factors = aggregate(pairs, [1.0, 1.0]).factors
    assert factors["B"].shape == (D_OUT, 1)
    assert torch.equal(factors["B"] @ factors["A"], torch.zeros(D_OUT, D_IN))


def test_merge_starts_the_adapter_afresh_and_load_overwrites_it():
    pairs = clients((2, 2))
    merged, loaded = aggregate(pairs, [1.0, 1.0], adopt="merge"), aggregate(pairs, [1.0, 1.0])
    assert merged.reset is not None
    assert merged.factors == {}
    assert loaded.reset is loaded.merge is None


def test_it_claims_to_be_exact_only_where_nothing_is_cut():
    assert load("florist", energy=1.0, adopt="merge").exact
    assert not load("florist", energy=1.0).exact  # clients cut to their rank
    assert not load("florist", adopt="merge").exact
    assert not load("florist", energy=1.0, rank=4, adopt="merge").exact


@pytest.mark.parametrize(
    "options", [{"energy": 0.0}, {"energy": 1.5}, {"energy": None}, {"rank": 0}, {"adopt": "zero"}, {"energy": float("nan")}]
)
def test_options_out_of_range_are_refused_with_what_is_allowed(options):
    with pytest.raises(MethodError, match="allowed"):
        load("florist", **options)
