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


# What a client does with a pair of lower rank than its own. The release pads both factors with zeros.


def trained(A, B, steps=30):
    """Trains copies by AdamW on a target that no pair of low rank meets; returns them and their first gradients."""
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    target, optimizer = draw(D_OUT, D_IN, seed=3), torch.optim.AdamW([A, B], lr=0.05)
    first = None
    for _ in range(steps):
        optimizer.zero_grad()
        (B @ A - target).square().sum().backward()
        first = first or (A.grad.clone(), B.grad.clone())
        optimizer.step()
    return A.detach(), B.detach(), *first


def test_zeros_on_both_sides_are_dead_directions_that_never_learn():
    factors = aggregate(clients((5, 5)), [1.0, 1.0], rank=2).factors
    A = torch.cat([factors["A"], torch.zeros(3, D_IN).double()])
    B = torch.cat([factors["B"], torch.zeros(D_OUT, 3).double()], 1)
    A_after, B_after, A_grad, B_grad = trained(A, B)
    assert torch.equal(A_grad[2:], torch.zeros(3, D_IN).double())
    assert torch.equal(B_grad[:, 2:], torch.zeros(D_OUT, 3).double())
    assert torch.equal(A_after[2:], torch.zeros(3, D_IN).double())
    assert torch.equal(B_after[:, 2:], torch.zeros(D_OUT, 3).double())
    assert torch.linalg.matrix_rank(B_after @ A_after) == 2  # a client of rank 5 has the capacity of rank 2


def test_umbels_padding_leaves_the_product_and_keeps_every_direction_alive(tmp_path):
    from transformers import AutoModel

    import tiny
    from umbel.client.adapter import Adapter
    from umbel.config import Lora
    from umbel.method import Download

    base = AutoModel.from_pretrained(str(tiny.bert(tmp_path)))
    adapter = Adapter(base, Lora(target_modules=["query"], r=5, lora_alpha=5), [], seed=1)
    layer, shape = next(iter(adapter.layers.items()))
    stack = Stack()
    for k in range(2):
        stack.add({"B": draw(shape.d_out, 5, seed=k).float(), "A": draw(5, shape.d_in, seed=9 + k).float()}, 1.0)
    sent = load("florist", rank=2).combine(stack.done(), {})
    adapter.apply({layer: Download(factors=sent.factors)}, {})
    own = {name: x.double() for name, x in adapter.read()[layer].items()}
    assert own["A"].shape[0] == 5
    torch.testing.assert_close((own["B"] @ own["A"]).float(), sent.factors["B"] @ sent.factors["A"])

    A, B = own["A"].clone().requires_grad_(), own["B"].clone().requires_grad_()
    (B @ A - draw(shape.d_out, shape.d_in, seed=3)).square().sum().backward()
    assert (B.grad[:, 2:].norm(dim=0) > 0).all()
