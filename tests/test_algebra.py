"""algebra: against dense float64, with d_in ≠ d_out ≠ R."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel import algebra

SIZES = st.integers(1, 9)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(deadline=None, max_examples=60)
@given(d_out=SIZES, d_in=SIZES, R=st.integers(1, 25), seed=st.integers(0, 99))
def test_product_svd_is_the_dense_svd_also_where_the_stack_is_wider_than_the_matrix(d_out, d_in, R, seed):
    B, A = draw(d_out, R, seed=seed), draw(R, d_in, seed=seed + 1000)
    U, s, Vh = algebra.product_svd(B, A)
    p = min(d_out, d_in, R)
    assert U.shape == (d_out, p)
    assert s.shape == (p,)
    assert Vh.shape == (p, d_in)
    dense = torch.linalg.svdvals(B @ A)[:p]
    assert torch.allclose(s, dense, atol=1e-12 * float(dense[0]))
    assert torch.allclose((U * s) @ Vh, B @ A, atol=1e-12 * float(dense[0]))
    assert torch.allclose(U.mT @ U, torch.eye(p).double(), atol=1e-12)
    assert torch.allclose(Vh @ Vh.mT, torch.eye(p).double(), atol=1e-12)


@pytest.mark.parametrize("R", [4, 12])
def test_product_svd_of_deficient_and_zero_stacks_stays_orthonormal(R):
    b, a = draw(7, 1), draw(1, 11, seed=1)
    for B, A, rank in [(b.expand(7, R), a.expand(R, 11), 1), (torch.zeros(7, R).double(), draw(R, 11), 0)]:
        U, s, Vh = algebra.product_svd(B, A)
        assert torch.isfinite(U).all()
        assert int((s > 1e-10).sum()) == rank
        assert torch.allclose((U * s) @ Vh, B @ A, atol=1e-12)
        assert torch.allclose(U.mT @ U, torch.eye(U.shape[1]).double(), atol=1e-12)
        assert torch.allclose(Vh @ Vh.mT, torch.eye(Vh.shape[0]).double(), atol=1e-12)


def test_product_svd_in_float32_is_right_to_two_parts_in_a_million_at_full_rank():
    B, A = draw(90, 160, dtype=torch.float32), draw(160, 70, seed=1, dtype=torch.float32)
    U, s, Vh = algebra.product_svd(B, A)
    assert U.dtype == s.dtype == Vh.dtype == torch.float32
    dense = B.double() @ A.double()
    assert (((U.double() * s.double()) @ Vh.double()) - dense).norm() <= 2e-6 * dense.norm()


def test_product_svd_takes_batches_and_a_rank():
    B, A = draw(2, 3, 7, 4), draw(2, 3, 4, 11, seed=1)
    U, s, Vh = algebra.product_svd(B, A, rank=2)
    assert (U.shape, s.shape, Vh.shape) == ((2, 3, 7, 2), (2, 3, 2), (2, 3, 2, 11))
    assert torch.allclose(s, torch.linalg.svdvals(B @ A)[..., :2])


@settings(deadline=None, max_examples=80)
@given(st.lists(st.floats(1e-3, 10), min_size=1, max_size=8), st.floats(0.01, 0.999))
def test_energy_rank_is_the_smallest_that_keeps_enough(values, energy):
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    p = algebra.energy_rank(s, energy)
    share = s.square().cumsum(0) / s.square().sum()
    assert share[p - 1] >= energy - 1e-12
    assert p == 1 or share[p - 2] < energy + 1e-12


def test_energy_rank_meets_its_share_exactly_at_the_boundary():
    assert algebra.energy_rank(torch.tensor([3.0, 1.0]), 0.9) == 1
    assert algebra.energy_rank(torch.tensor([3.0, 1.0]), 0.9 + 1e-9) == 2


def test_energy_one_keeps_values_that_a_sum_of_squares_would_lose_but_not_rounding_noise():
    assert algebra.energy_rank(torch.tensor([1.0, 1e-10, 1e-17, 0.0], dtype=torch.float64), 1.0) == 2
    B, A = draw(20, 3, dtype=torch.float32), draw(3, 15, seed=1, dtype=torch.float32)
    _, s, _ = algebra.product_svd(torch.cat([B, B, B], 1), torch.cat([A / 3, A / 3, A / 3], 0))
    assert algebra.energy_rank(s, 1.0) == 3


def test_energy_rank_of_zero_is_one():
    assert algebra.energy_rank(torch.zeros(4), 0.9) == algebra.energy_rank(torch.zeros(4), 1.0) == 1


def test_inner_and_norm_are_the_dense_ones_in_batches():
    B_1, A_1, B_2, A_2 = draw(2, 7, 3), draw(2, 3, 11, seed=1), draw(2, 7, 4, seed=2), draw(2, 4, 11, seed=3)
    assert torch.allclose(algebra.inner(B_1, A_1, B_2, A_2), ((B_1 @ A_1) * (B_2 @ A_2)).sum((-2, -1)))
    assert torch.allclose(algebra.norm(B_1, A_1), (B_1 @ A_1).flatten(1).norm(dim=1))


def test_relative_error_sees_a_difference_of_one_part_in_ten_to_the_twelve():
    B, A = draw(7, 3), draw(3, 11, seed=1)
    assert algebra.relative_error((B, A * (1 + 1e-12)), (B, A)) == pytest.approx(1e-12, rel=1e-2)
    # The square root of ‖X‖² − 2⟨X, Y⟩ + ‖Y‖² cannot tell it from 1e-8.
    X = torch.stack([algebra.inner(B, A, B, A)] * 3)
    assert X[0] - 2 * X[1] + X[2] == 0


def test_relative_error_does_not_depend_on_the_factorisation():
    B, A, G = draw(7, 3), draw(3, 11, seed=1), draw(3, 3, seed=2) + 3 * torch.eye(3).double()
    assert algebra.relative_error((B @ G, torch.linalg.solve(G, A)), (B, A)) < 1e-14
    other = draw(7, 2, seed=3), draw(2, 11, seed=4)
    dense = (other[0] @ other[1] - B @ A).norm() / (B @ A).norm()
    assert algebra.relative_error(other, (B, A)) == pytest.approx(dense.item(), rel=1e-12)


def test_relative_error_where_the_ideal_is_zero():
    zero, one = (torch.zeros(7, 3), draw(3, 11)), (draw(7, 3), draw(3, 11))
    assert algebra.relative_error(zero, zero) == 0
    assert algebra.relative_error(one, zero) == float("inf")
    assert algebra.relative_error(zero, one) == pytest.approx(1)


def test_gram_blocks_hold_all_inner_products_of_products():
    Bs, As = draw(4, 7, 3), draw(4, 3, 11, seed=1)
    C_B, C_A = algebra.gram_blocks(Bs, As)
    dense = torch.einsum("umr,vrn->uvmn", Bs, As)
    G = torch.einsum("uvmn,wzmn->uvwz", dense, dense)
    assert torch.allclose(torch.einsum("uwrs,vzrs->uvwz", C_B, C_A), G)
    x = draw(4, seed=2)
    assert torch.allclose(algebra.gram_form(C_B, C_A, x), torch.einsum("uvwz,v,z->uw", G, x, x))
    assert torch.allclose(algebra.gram_form(C_A, C_B, x), torch.einsum("uvwz,u,w->vz", G, x, x))


def test_gram_blocks_take_batches():
    Bs, As = draw(2, 4, 7, 3), draw(2, 4, 3, 11, seed=1)
    C_B, C_A = algebra.gram_blocks(Bs, As)
    for i in range(2):
        one_B, one_A = algebra.gram_blocks(Bs[i], As[i])
        assert torch.allclose(C_B[i], one_B)
        assert torch.allclose(C_A[i], one_A)


@pytest.mark.parametrize("limit", [1000, 10])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_dense_svd_finds_the_largest_triples_in_full_and_by_projection(monkeypatch, limit, shape):
    monkeypatch.setattr(algebra, "DENSE_SVD_LIMIT", limit)
    M = draw(*shape) + 0.0
    state = torch.random.get_rng_state()
    U, s, Vh = algebra.dense_svd(M, 3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.allclose(s, torch.linalg.svdvals(M)[:3], rtol=1e-3)
    assert torch.allclose(U.mT @ U, torch.eye(3).double(), atol=1e-12)
    assert torch.allclose(torch.diagonal(U.mT @ M @ Vh.mT), s, rtol=1e-6)
    assert torch.equal(U, algebra.dense_svd(M, 3)[0])


def test_add_products_adds_and_never_grows_beyond_the_matrix():
    total, dense = None, torch.zeros(7, 5).double()
    assert algebra.add_products(None, None) is None
    for seed in range(6):
        B, A = draw(7, 2, seed=seed), draw(2, 5, seed=100 + seed)
        total, dense = algebra.add_products(total, (B, A)), dense + B @ A
        assert total is not None
        assert total[0].shape[1] <= 5
        assert torch.allclose(total[0] @ total[1], dense, atol=1e-12)
    assert algebra.add_products(total, None) is total


def test_seed_of_is_the_same_everywhere_and_tells_its_parts_apart():
    assert algebra.seed_of(0, "q") == 145512980111464076
    assert (
        len(
            {
                algebra.seed_of("ab", "c"),
                algebra.seed_of("a", "bc"),
                algebra.seed_of("abc"),
                algebra.seed_of(1),
                algebra.seed_of("1"),
            }
        )
        == 5
    )
    assert all(0 <= algebra.seed_of(i) < 2**63 for i in range(100))


def test_fresh_a_is_kaiming_uniform_and_shares_rows_between_ranks():
    A = algebra.fresh_A(50, 400, seed=3)
    assert A.dtype == torch.float32
    assert A.abs().max() <= 0.05
    assert A.abs().max() > 0.0499
    assert A.std() == pytest.approx(0.05 / 3**0.5, rel=0.01)
    assert torch.equal(algebra.fresh_A(2, 400, seed=3), A[:2])
    assert not torch.equal(algebra.fresh_A(2, 400, seed=4), A[:2])
    weight = torch.empty(50, 400)
    torch.nn.init.kaiming_uniform_(weight, a=5**0.5, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(weight, A, atol=1e-7)  # what PEFT draws from the same generator


def test_the_global_random_state_is_left_alone():
    state = torch.random.get_rng_state()
    algebra.fresh_A(3, 5, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("K", [1, 2, 10])
@pytest.mark.parametrize("apart", [0.0, 1e-6, 0.3, 5.0])
def test_the_error_to_the_sum_is_that_of_the_dense_matrices(K, apart):
    generator = torch.Generator().manual_seed(K)
    B, A = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((9, 3), (3, 13)))
    sent = (torch.cat([B, apart * torch.randn(9, 2, generator=generator, dtype=torch.float64)], 1), torch.cat([A, A[:2]], 0))
    error = algebra.relative_error(sent, (B, A))
    dense = ((sent[0] @ sent[1] - K * B @ A).norm() / (K * B @ A).norm()).item()
    assert algebra.error_to_sum(error, sent, (B, A), K) == pytest.approx(dense, abs=1e-12)


KINDS = ("unrelated", "alike", "proportional", "one client zero", "all zero", "wide", "A common", "opposite", "steep", "heavy")


def stacks(kind, dtype, d_out=70, d_in=90, K=6, r=4, seed=0):
    """Invented stacks B, A of K clients, of a kind that a decomposition may find hard."""
    B = [draw(d_out, r, seed=seed + k) for k in range(K)]
    A = [draw(r, d_in, seed=seed + 100 + k) for k in range(K)]
    if kind == "alike":
        B, A = [B[0] + 0.05 * b for b in B], [A[0] + 0.05 * a for a in A]
    if kind == "proportional":
        B, A = [(k + 1) * B[0] for k in range(K)], [A[0] for _ in range(K)]
    if kind in ("one client zero", "all zero"):
        B = [b * (k > 0 and kind == "one client zero") for k, b in enumerate(B)]
    if kind == "wide":
        B, A = B * 6, [a + 0.1 * draw(r, d_in, seed=900 + k) for k, a in enumerate(A * 6)]
    if kind == "A common":
        A = [A[0] for _ in A]
    if kind == "opposite":
        B = [*B[:-1], -(1 + 1e-3) * B[0]]
        A = [*A[:-1], A[0]]
    if kind == "steep":  # condition number 1e6 in both stacks
        slope = torch.logspace(0, -6, K).double()
        B, A = [b * s for b, s in zip(B, slope)], [a * s for a, s in zip(A, slope.flip(0))]
    if kind == "heavy":
        A = [a * 1e6 ** (k == 0) for k, a in enumerate(A)]
    return torch.cat(B, 1).to(dtype), torch.cat(A, 0).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "asked", [{"energy": 0.5}, {"energy": 0.9}, {"energy": 0.999}, {"energy": 1.0}, {"rank": 3}, {"rank": 24}]
)
def test_truncated_product_is_as_good_as_the_dense_one(kind, dtype, asked):
    B, A = stacks(kind, dtype)
    U_s, Vh, s = algebra.truncated_product(B, A, **asked)
    dense = B.double() @ A.double()
    values = torch.linalg.svdvals(dense)
    largest = max(float(values[0]), 1e-300)
    p = s.shape[0]
    assert (U_s.shape, Vh.shape) == ((70, p), (p, 90))
    assert {U_s.dtype, s.dtype, Vh.dtype} == {dtype}
    exact = 2e-6 if dtype == torch.float32 else 1e-9
    if "rank" in asked:
        assert p == min(asked["rank"], B.shape[1], 70)
    else:
        wanted = algebra.energy_rank(values.to(dtype), asked["energy"])
        # Where the sum stands on the boundary to a few roundings, the next rank is as right.
        assert p == wanted or asked["energy"] == 1
    assert float((s.double() - values[:p]).abs().max()) <= 2e-5 * largest
    left = float(torch.linalg.matrix_norm(U_s.double() @ Vh.double() - dense))
    best = float(values[p:].square().sum().sqrt())
    assert left <= best + exact * float(torch.linalg.matrix_norm(dense))
    eye = torch.eye(p).double()
    # Where s is noise, as in all-zero stacks, U has no direction to be right about.
    if float(s[-1]) > 1e-6 * largest:
        U = U_s.double() / s.double()
        assert torch.allclose(U.mT @ U, eye, atol=1e-3)
    assert torch.allclose(Vh.double() @ Vh.double().mT, eye, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_loss_keeps_the_product_and_no_direction_that_is_not_there(kind, dtype):
    B, A = stacks(kind, dtype)
    B_kept, A_kept = algebra.without_loss(B, A)
    dense = B.double() @ A.double()
    apart = torch.linalg.matrix_norm(B_kept.double() @ A_kept.double() - dense)
    assert float(apart) <= (2e-6 if dtype == torch.float32 else 1e-9) * float(torch.linalg.matrix_norm(dense))
    values = torch.linalg.svdvals(dense)
    eps = torch.finfo(dtype).eps
    assert B_kept.shape[1] <= max(1, int((values > 0.1 * eps * values[0]).sum()))


@settings(deadline=None, max_examples=60)
@given(
    d_out=st.integers(1, 40), d_in=st.integers(1, 40), R=st.integers(1, 60), energy=st.floats(0.01, 1), seed=st.integers(0, 99)
)
def test_truncated_product_keeps_the_energy_of_any_product(d_out, d_in, R, energy, seed):
    B, A = draw(d_out, R, seed=seed), draw(R, d_in, seed=seed + 1000)
    U_s, Vh, s = algebra.truncated_product(B, A, energy)
    dense = B @ A
    left = float(torch.linalg.matrix_norm(U_s @ Vh - dense).square() / torch.linalg.matrix_norm(dense).square())
    assert left <= 1 - energy + 1e-9
    assert s.shape[0] <= min(d_out, d_in, R)


def test_a_large_stack_of_few_directions_is_decomposed_by_its_leading_ones():
    K, r = 80, 8
    common_B, common_A = draw(700, r, seed=1), draw(r, 800, seed=2)
    B = torch.cat([common_B + 0.3 * draw(700, r, seed=10 + k) for k in range(K)], 1).float()
    A = torch.cat([common_A + 0.3 * draw(r, 800, seed=200 + k) for k in range(K)], 0).float()
    assert B.shape[1] > algebra.MANY
    values = torch.linalg.svdvals(B.double() @ A.double())
    for energy in (0.5, 0.9):
        _, _, s = algebra.truncated_product(B, A, energy)
        assert s.shape[0] == algebra.energy_rank(values, energy) <= r
        assert torch.allclose(s.double(), values[: s.shape[0]], rtol=1e-5)
    assert algebra.truncated_product(B, A, rank=5)[2].shape == (5,)
    # Nothing of this needs many: a flat spectrum comes out right, too.
    flat = draw(700, 640, seed=3).float(), draw(640, 800, seed=4).float()
    values = torch.linalg.svdvals(flat[0].double() @ flat[1].double())
    assert algebra.truncated_product(*flat, 0.9)[2].shape[0] == algebra.energy_rank(values, 0.9)


@pytest.mark.parametrize("shape", [(5, 3), (90, 64), (300, 130)])
def test_gram_is_the_product_with_the_transpose(shape):
    M = draw(*shape)
    assert torch.allclose(algebra.gram(M), M.mT @ M, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_error_and_energy_are_those_of_the_dense_matrices(kind):
    B, A = stacks(kind, torch.float32)
    ideal = B.double() @ A.double()
    whole = float(torch.linalg.matrix_norm(ideal))
    for sent in [(B, A), (0.5 * B, A), (B[:, :3], A[:3]), (B + 1e-4 * draw(*B.shape, seed=5).float(), A)]:
        error, energy = algebra.error_and_energy(sent, (B, A))
        dense = sent[0].double() @ sent[1].double()
        if whole == 0:
            assert error == (0.0 if float(dense.abs().max()) == 0 else float("inf"))
            continue
        assert error == pytest.approx(float(torch.linalg.matrix_norm(dense - ideal)) / whole, rel=1e-4, abs=2e-7)
        assert energy == pytest.approx(float(torch.linalg.matrix_norm(dense)) ** 2 / whole**2, rel=1e-5, abs=1e-9)


def test_compact_drops_what_carries_nothing_and_nothing_else():
    B, A = draw(6, 4), draw(4, 9, seed=1)
    B[:, 1], A[2] = 0, 0
    B_kept, A_kept = algebra.compact(B, A)
    assert (B_kept.shape, A_kept.shape) == ((6, 2), (2, 9))
    assert torch.allclose(B_kept @ A_kept, B @ A)
    assert algebra.compact(0 * B, A)[0].shape == (6, 1)
    assert algebra.compact(draw(3, 8), draw(8, 9, seed=1))[0].shape == (3, 3)


def test_vectors_that_lean_on_each_other_only_together_are_seen():
    # Each row is far from those before it, and the whole is singular to 1e-4 all the same.
    n = 12
    T = torch.eye(n).double() - torch.ones(n, n).double().tril(-1)
    Q = algebra.product_svd(draw(n, n), draw(n, 40, seed=1))[2]
    W = draw(50, n, seed=2)
    B, A = (W @ torch.linalg.inv(T)).float(), (T @ Q).float()
    values = torch.linalg.svdvals(B.double() @ A.double())
    for energy in (0.9, 0.99):
        _, Vh, s = algebra.truncated_product(B, A, energy)
        assert torch.allclose(s.double(), values[: len(s)], rtol=1e-4)
        assert torch.allclose(Vh @ Vh.mT, torch.eye(len(s)), atol=1e-4)


@pytest.mark.parametrize("size", [1e-20, 1e-12, 1e12, 1e15])
@pytest.mark.parametrize("asked", [{"energy": 0.9}, {"energy": 1.0}, {"rank": 2}])
def test_truncated_product_of_very_small_and_very_large_factors_is_that_of_ordinary_ones(size, asked):
    B, A = stacks("unrelated", torch.float32)
    B_large, A_large = B.clone(), A.clone()
    B_large[:, :4] *= size
    U_s, Vh, s = algebra.truncated_product(B_large * min(size, 1), A_large, **asked)
    assert all(torch.isfinite(x).all() for x in (U_s, Vh, s))
    values = torch.linalg.svdvals((B_large.double() * min(size, 1)) @ A_large.double())
    assert float((s.double() - values[: len(s)]).abs().max()) <= 1e-4 * float(values[0])
