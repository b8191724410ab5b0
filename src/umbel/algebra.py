"""Linear algebra on factors: nothing here ever forms a d_out × d_in product of low-rank matrices.

A product B A is a pair: B is d_out × R, A is R × d_in. Leading batch dimensions are allowed wherever a tensor is returned,
so that layers of one shape go through together. Sums and decompositions run in float64, which costs little on factors and
spares every caller the question of cancellation; what comes back has the dtype that came in.
"""

# pyright: reportConstantRedefinition=false

import hashlib
import itertools
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

Product = tuple[Tensor, Tensor]
"""(B, A): d_out × R and R × d_in, standing for the matrix B A."""

DENSE_SVD_LIMIT = 1024
"""Smaller side, in rows, up to which `dense_svd` decomposes a dense matrix in full."""


def add_products(first: Product | None, later: Product | None) -> Product | None:
    """Returns the product that is the sum of two: [B_1 B_2] [A_1; A_2] = B_1 A_1 + B_2 A_2.

    A stack that is wider than the matrix is multiplied out, so that a sum of many stays no larger than d_out × d_in. None
    stands for zero.

    >>> one = (torch.ones(3, 1), torch.ones(1, 2))
    >>> B, A = add_products(one, one)
    >>> B.shape, A.shape, (B @ A)[0, 0].item()
    (torch.Size([3, 2]), torch.Size([2, 2]), 2.0)
    """
    if first is None or later is None:
        return later if first is None else first
    return _no_wider(torch.cat([first[0], later[0]], dim=-1), torch.cat([first[1], later[1]], dim=-2))


def _no_wider(B: Tensor, A: Tensor) -> Product:
    """B A as a product that is no wider than the matrix."""
    if B.shape[-1] <= min(B.shape[-2], A.shape[-1]):
        return B, A
    return dense_product((B.double() @ A.double()).to(torch.promote_types(B.dtype, A.dtype)))


def compact(B: Tensor, A: Tensor) -> Product:
    """Returns B A without directions that carry nothing, and no wider than the matrix; zero keeps one direction.

    >>> B, A = compact(torch.eye(3), torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 2.0]]))
    >>> B.shape, A.shape
    (torch.Size([3, 2]), torch.Size([2, 2]))
    """
    alive = (B != 0).any(dim=0) & (A != 0).any(dim=1)
    if not alive.all():
        if not alive.any():
            alive[:1] = True
        B, A = B[:, alive], A[alive]
    return _no_wider(B, A)


# torch.linalg carries no types; these say them once.


def _qr(M: Tensor) -> tuple[Tensor, Tensor]:
    return cast(tuple[Tensor, Tensor], torch.linalg.qr(M))  # pyright: ignore[reportUnknownMemberType]


def _svd(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return cast(
        tuple[Tensor, Tensor, Tensor],
        torch.linalg.svd(M, full_matrices=False),  # pyright: ignore[reportUnknownMemberType]
    )


def orthonormal(M: Tensor) -> Tensor:
    """Returns a Q with orthonormal columns that span M's, … × d × min(d, p) for M of … × d × p, in M's dtype.

    Where M's columns depend on each other Q has further directions, so that it always has as many.

    >>> orthonormal(torch.tensor([[2.0], [0.0]])).abs()
    tensor([[1.],
            [0.]])
    """
    return _qr(M.double())[0].to(M.dtype)


def within(Q: Tensor, Z: Tensor) -> Product:
    """Returns (Q, (QᵀQ)⁻¹ Z) in float64: of an M with Z = QᵀM all that lies in the columns of Q, which must be independent.

    For an orthonormal Q this is (Q, Z); one that was rounded on the wire is no longer quite that.

    >>> within(2 * torch.eye(2), torch.ones(2, 1))[1]
    tensor([[0.2500],
            [0.2500]], dtype=torch.float64)
    """
    Q, Z = Q.double(), Z.double()
    return Q, cast(Tensor, torch.linalg.solve(Q.mT @ Q, Z))  # pyright: ignore[reportUnknownMemberType]


def solve(H: Tensor, g: Tensor) -> Tensor:
    """Returns x with H x = g, for one right-hand side g of shape … × n.

    >>> solve(2 * torch.eye(2), torch.tensor([2.0, 4.0]))
    tensor([1., 2.])
    """
    return cast(Tensor, torch.linalg.solve(H, g.unsqueeze(-1))).squeeze(-1)  # pyright: ignore[reportUnknownMemberType]


def frobenius(M: Tensor) -> Tensor:
    """Returns ‖M‖_F, a scalar whose gradient at M = 0 is 0 (that of √Σ m² would not be a number).

    >>> frobenius(torch.tensor([[3.0, 4.0]]))
    tensor(5.)
    """
    return cast(Tensor, torch.linalg.vector_norm(M))  # pyright: ignore[reportUnknownMemberType]


def _core(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (Q_B, R_B R_Aᵀ, Q_A) in float64, with B A = Q_B (R_B R_Aᵀ) Q_Aᵀ and orthonormal Q's."""
    Q_B, R_B = _qr(B.double())
    Q_A, R_A = _qr(A.double().mT)
    return Q_B, R_B @ R_A.mT, Q_A


def product_svd(B: Tensor, A: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the thin SVD of B A, from QR of B and of Aᵀ and the SVD of the small core between them.

    B = Q_B R_B and Aᵀ = Q_A R_A, so B A = Q_B (R_B R_Aᵀ) Q_Aᵀ. Costs O(R² (d_out + d_in + R)). R may exceed d_out or d_in,
    and B or A may be deficient or zero: U and Vh are orthonormal all the same.

    Args:
        B: … × d_out × R.
        A: … × R × d_in.
        rank: Keep at most so many values, the largest.

    Returns:
        (U, s, Vh): … × d_out × p, … × p descending, … × p × d_in with p = min(d_out, d_in, R), or `rank` where smaller.

    >>> U, s, Vh = product_svd(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), torch.eye(2))
    >>> s
    tensor([3., 1.])
    """
    dtype = torch.promote_types(B.dtype, A.dtype)
    Q_B, core, Q_A = _core(B, A)
    U, s, Vh = _svd(core)
    p = s.shape[-1] if rank is None else min(rank, s.shape[-1])
    return (Q_B @ U[..., :p]).to(dtype), s[..., :p].to(dtype), (Vh[..., :p, :] @ Q_A.mT).to(dtype)


def energy_rank(s: Tensor, energy: float) -> int:
    """Returns the smallest p with Σ_{i≤p} s_i² / Σ_i s_i² ≥ energy.

    At energy = 1 every value counts that is numerically present: above ε s_1, with ε of float32 or finer as `s` is; what lies
    below is what one rounding of s_1 would hide. (A cumulated sum of squares could not tell: it is full at √ε.) A zero
    spectrum gives 1, so that a product of rank 1, zero, can be sent.

    Args:
        s: Singular values, descending, shape (k,) with k ≥ 1.
        energy: Share τ of the squared norm to keep, 0 < τ ≤ 1.

    >>> energy_rank(torch.tensor([3.0, 1.0, 0.0]), 0.9), energy_rank(torch.tensor([3.0, 1.0, 0.0]), 1.0)
    (1, 2)

    Source: FLoRIST (arXiv 2506.09199), step 5; the treatment of rounding is ours.
    """
    if energy >= 1:
        noise = torch.finfo(torch.promote_types(s.dtype, torch.float32)).eps * s[0]
        return max(1, int((s > noise).sum()))
    kept = s.double().square().cumsum(0)
    return min(int((kept < energy * kept[-1]).sum()) + 1, s.shape[0])


def gram(M: Tensor) -> Tensor:
    """Returns MᵀM, R × R for M of d × R, in M's dtype. Blocks above the diagonal are copied, not multiplied.

    >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    tensor([[1., 2.],
            [2., 5.]])
    """
    G = M.new_empty(M.shape[1], M.shape[1])
    for start, end in _blocks(M.shape[1]):
        rows = M[:, start:end].mT @ M[:, :end]
        G[start:end, :end] = rows
        G[:start, start:end] = rows[:, :start].mT
    return G


def _blocks(R: int) -> list[tuple[int, int]]:
    """Blocks of columns, few enough to be large: with four of them a triangle costs 5/8 of the square, with eight 9/16."""
    n = 8 if R >= 512 else 4 if R >= 64 else 1
    edges = [R * i // n for i in range(n + 1)]
    return list(itertools.pairwise(edges))


CLEAR = {torch.float32: 1e-2, torch.float64: 1e-9}
"""By dtype, the smallest share of a vector's square that must lie outside the span of all others, if their Gram matrix is to be
trusted: what is computed from it is then right to about ε over this share, 1e-5 and 2e-7."""

VISIBLE = {torch.float32: 1e-5, torch.float64: 1e-14}
"""By dtype, the smallest s_p² / s_1² that an eigenvalue of a Gram matrix still tells from nothing."""

MANY = 512
"""Rank of a stack from which leading directions are sought before all are computed."""


def truncated_product(B: Tensor, A: Tensor, energy: float = 1.0, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the leading part of the SVD of B A as (U diag(s), Vh, s), in the cheapest way that the factors' condition allows.

    With A Aᵀ = L Lᵀ (Cholesky) L⁻¹ A has orthonormal rows, and with BᵀB = H

        Lᵀ H L = V diag(s²) Vᵀ,    U diag(s) = B (L V),    Vh = (L⁻ᵀ V)ᵀ A,                    (1)

    where only the columns of V that are kept are multiplied back. A Gram matrix squares the condition number, so (1) is done
    in float32 where the rows of A (or else the columns of B) are far from dependent, in float64 where they are not, and by
    `product_svd` where that does not do either (`CLEAR`, `VISIBLE`). In a large stack the leading directions are sought by
    block power iteration first, which is soon done where few of them carry the energy.

    Args:
        B: d_out × R.
        A: R × d_in.
        energy: Keep the fewest values that have this share of the squares' sum, as `energy_rank`; 0 < energy ≤ 1.
        rank: Keep the largest so many instead, or all there are; `energy` is then not looked at.

    Returns:
        (U diag(s), Vh, s): d_out × p, p × d_in, and p values, descending; in the dtype that came in.

    >>> truncated_product(torch.diag(torch.tensor([3.0, 1.0])), torch.eye(2), energy=0.85)[2]
    tensor([3.])
    """
    dtype = torch.promote_types(B.dtype, A.dtype)
    small = min(B.shape[0], A.shape[1])
    if B.shape[1] > small:
        B, A = dense_product(B @ A)
    # Squares in float32 cannot tell small values from noise, so where all are wanted they are not asked.
    wanted = _Wanted(energy, rank, dtype)
    all_wanted = energy >= 1 if rank is None else rank >= B.shape[1]
    rough = torch.finfo(dtype).bits <= 32 and not all_wanted
    for work in (torch.float32, torch.float64) if rough else (torch.float64,):
        found = _svd_by_gram(B.to(work), A.to(work), wanted)
        if found is not None:
            return found[0].to(dtype), found[1].to(dtype), found[2].to(dtype)
    U, s, Vh = product_svd(B, A, rank)
    p = wanted.kept(s)
    return U[:, :p] * s[:p], Vh[:p], s[:p]


def without_loss(B: Tensor, A: Tensor) -> Product:
    """Returns the product B A with as many directions as it has, to float32's precision where that came in, or to float64's.

    Where the columns of B and the rows of A are clear of each other (`CLEAR`) no direction can go and the factors come back as
    they are; where they are not, U diag(s) and Vh of the SVD.

    >>> one = torch.ones(3, 2), torch.ones(2, 3)
    >>> [tuple(x.shape) for x in without_loss(*one)]
    [(3, 1), (1, 3)]
    """
    work = torch.promote_types(torch.promote_types(B.dtype, A.dtype), torch.float32)
    if B.shape[1] <= min(B.shape[0], A.shape[1]) and all(_cholesky(gram(M.to(work))) is not None for M in (A.mT, B)):
        return B, A
    return truncated_product(B, A)[:2]


def dense_product(M: Tensor) -> Product:
    """Returns M as a product of rank min(d_out, d_in): (M, I) or (I, M).

    >>> [tuple(x.shape) for x in dense_product(torch.ones(2, 5))]
    [(2, 2), (2, 5)]
    """
    d_out, d_in = M.shape
    return (M, torch.eye(d_in, dtype=M.dtype, device=M.device)) if d_in <= d_out else (torch.eye(d_out).to(M), M)


@dataclass(frozen=True)
class _Wanted:
    """What `truncated_product` was asked for; noise is what the dtype that came in cannot tell from zero."""

    energy: float
    rank: int | None
    dtype: torch.dtype

    def kept(self, s: Tensor) -> int:
        return energy_rank(s.to(self.dtype), self.energy) if self.rank is None else min(self.rank, s.shape[0])


def _svd_by_gram(B: Tensor, A: Tensor, wanted: _Wanted) -> tuple[Tensor, Tensor, Tensor] | None:
    """(1) of `truncated_product` in the dtype that the factors have; None where that does not do."""
    G, H = gram(A.mT), gram(B)
    total = float((G * H).sum(-1, dtype=torch.float64).sum())  # trace of Lᵀ H L, the squares' sum
    if not 0 < total < math.inf:
        return None
    found = _cholesky(G)
    if found is not None:
        return _svd_by_cholesky(B, A, *found, H, total, wanted)
    found = _cholesky(H)
    mirrored = None if found is None else _svd_by_cholesky(A.mT, B.mT, *found, G, total, wanted)
    if mirrored is None:
        return None
    V_s, U_t, s = mirrored
    return U_t.mT * s, V_s.mT / s.unsqueeze(-1), s


def _cholesky(G: Tensor) -> tuple[Tensor, Tensor] | None:
    """(L, L⁻¹) of a Gram matrix G = L Lᵀ whose vectors are clear of each other; else None.

    What of vector j lies outside the span of all others has the square 1 / (G⁻¹)_jj, and G⁻¹ = L⁻ᵀ L⁻¹.
    """
    L, failed = cast(tuple[Tensor, Tensor], torch.linalg.cholesky_ex(G))  # pyright: ignore[reportUnknownMemberType]
    if failed:
        return None
    inverse = _inverse(L)
    clear = inverse.square().sum(0) * G.diagonal() * CLEAR[G.dtype] <= 1  # NaN is not
    return (L, inverse) if bool(clear.all()) else None


def _inverse(L: Tensor) -> Tensor:
    """L⁻¹ of a lower triangular L by halves, so that most of it are products."""
    n = L.shape[0]
    if n <= 128:
        eye = torch.eye(n, dtype=L.dtype, device=L.device)
        return cast(Tensor, torch.linalg.solve_triangular(L, eye, upper=False))  # pyright: ignore[reportUnknownMemberType]
    half = n // 2
    first, last = _inverse(L[:half, :half]), _inverse(L[half:, half:])
    result = torch.zeros_like(L)
    result[:half, :half], result[half:, half:] = first, last
    result[half:, :half] = -(last @ (L[half:, :half] @ first))
    return result


def _svd_by_cholesky(
    B: Tensor, A: Tensor, L: Tensor, inverse: Tensor, H: Tensor, total: float, wanted: _Wanted
) -> tuple[Tensor, Tensor, Tensor] | None:
    R = L.shape[0]
    found = _leading(L, H, total, wanted.energy, wanted.rank) if R >= MANY else None
    squares, V = found or _descending(_congruence(L, H))
    s = squares.clamp_min(0).sqrt()
    p = s.shape[0] if found else wanted.kept(s)
    if not squares[p - 1] > VISIBLE[L.dtype] * squares[0]:
        return None
    s, V = s[:p], V[:, :p].contiguous()
    X, Y = torch.empty_like(V), V.new_empty(p, R)
    for start, end in _blocks(R):  # L V and Vᵀ L⁻¹, without the half of L that is zero
        X[start:end] = L[start:end, :end] @ V[:end]
        Y[:, start:end] = V[start:].mT @ inverse[start:, start:end]
    return B @ X, Y @ A, s


def _congruence(L: Tensor, H: Tensor) -> Tensor:
    """Lᵀ H L on and below the diagonal, for a lower triangular L."""
    C = torch.zeros_like(H)
    for start, end in _blocks(H.shape[0]):
        C[start:, start:end] = L[start:, start:].mT @ (H[start:, start:] @ L[start:, start:end])
    return C


def _descending(C: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the largest first, and eigenvectors of the symmetric matrix whose lower triangle is C's."""
    values, V = cast(tuple[Tensor, Tensor], torch.linalg.eigh(C))  # pyright: ignore[reportUnknownMemberType]
    return values.flip(-1), V.flip(-1)


def _leading(L: Tensor, H: Tensor, total: float, energy: float, rank: int | None) -> tuple[Tensor, Tensor] | None:
    """The kept eigenpairs of Lᵀ H L by block power iteration; None where too many are wanted or they stand too close.

    Its trace is known before any eigenvalue, so that the share that was caught is known in every step.
    """
    R = L.shape[0]
    draw = torch.Generator().manual_seed(0)
    for width in (32, 128) if rank is None else (rank + 16,):
        if width > R // 8:
            return None
        Y, last, caught = torch.randn(R, width, generator=draw).to(L), 0.0, 0.0
        for step in range(8):
            Q = _qr(L.mT @ (H @ (L @ Y)))[0]
            Y = L.mT @ (H @ (L @ Q))
            squares, W = _descending(Q.mT @ Y)
            shares = squares.double().cumsum(0) / total
            caught = float(shares[-1])
            p = rank if rank is not None else int((shares < energy).sum()) + 1
            if p <= width and float(shares[p - 1]) - last <= 1e-7:
                return squares[:p], Q @ W[:, :p]
            if step and p > width:
                break
            last = float(shares[min(p, width) - 1])
        if caught < energy / 2:
            return None
    return None


def inner(B_1: Tensor, A_1: Tensor, B_2: Tensor, A_2: Tensor) -> Tensor:
    """Returns ⟨B_1 A_1, B_2 A_2⟩_F = Σ (B_1ᵀ B_2) ∘ (A_1 A_2ᵀ), in float64, from R_1 × R_2 blocks.

    >>> B, A = torch.ones(3, 1), torch.ones(1, 2)
    >>> inner(B, A, B, 2 * A).item()
    12.0
    """
    return ((B_1.double().mT @ B_2.double()) * (A_1.double() @ A_2.double().mT)).sum((-2, -1))


def norm(B: Tensor, A: Tensor) -> Tensor:
    """Returns ‖B A‖_F in float64, through QR: right also where large factors nearly cancel in the product.

    >>> round(norm(torch.ones(3, 2), torch.tensor([[1.0, 1.0], [-1.0, -1.0]])).item(), 12)
    0.0
    """
    return _core(B, A)[1].square().sum((-2, -1)).sqrt()


def relative_error(sent: Product, ideal: Product) -> float:
    """Returns ‖B A − B* A*‖_F / ‖B* A*‖_F, the aggregation error where B* A* = Σ p_k ΔW_k.

    The difference is the product [B, B*] [A; −A*], whose norm is taken through QR: no difference of two large numbers.
    It is 0.0 where both are zero and infinite where only the ideal is.

    Args:
        sent: (B, A), d_out × R and R × d_in, without batch dimensions.
        ideal: (B*, A*), d_out × R* and R* × d_in.

    >>> one = (torch.ones(3, 1), torch.ones(1, 2))
    >>> round(relative_error((one[0], 1.5 * one[1]), one), 12)
    0.5
    >>> relative_error(one, (one[0], 0 * one[1]))
    inf
    """
    (B, A), (B_ideal, A_ideal) = sent, ideal
    difference = norm(torch.cat([B.double(), B_ideal.double()], -1), torch.cat([A.double(), -A_ideal.double()], -2)).item()
    whole = norm(B_ideal, A_ideal).item()
    if whole == 0:
        return 0.0 if norm(B, A).item() == 0 else float("inf")
    return difference / whole


def error_and_energy(sent: Product, ideal: Product) -> tuple[float, float]:
    """Returns (‖B A − B* A*‖_F / ‖B* A*‖_F, ‖B A‖²_F / ‖B* A*‖²_F) from r × r blocks: `relative_error`, cheaper.

    The blocks are those of the Gram matrices of [B, B*] and of [A; A*] in float64, in which a difference of equal matrices
    leaves about 1e-8. Where the factors cancel in the ideal itself, so that it would leave more than 1e-6, QR takes over.

    Args:
        sent: (B, A), d_out × R and R × d_in.
        ideal: (B*, A*), d_out × R* and R* × d_in.

    >>> one = (torch.ones(3, 1), torch.ones(1, 2))
    >>> error_and_energy((one[0], 0.5 * one[1]), one)
    (0.5, 0.25)
    """
    (B, A), (B_ideal, A_ideal) = sent, ideal
    R = B.shape[-1]
    blocks = gram(torch.cat([B.double(), B_ideal.double()], -1)) * gram(torch.cat([A.double(), A_ideal.double()], -2).mT)
    size, both, whole = (float(x.sum()) for x in (blocks[:R, :R], blocks[:R, R:], blocks[R:, R:]))
    noise = 1e-15 * float(blocks.abs().sum())
    if whole <= 0 or noise > 1e-12 * whole:
        whole, size = norm(B_ideal, A_ideal).item() ** 2, norm(B, A).item() ** 2
        # What is left of parts this much larger is the rounding of float64.
        nothing = 1e-26 * float(blocks[R:, R:].abs().sum())
        if whole <= nothing:
            return (0.0, 1.0) if size <= nothing else (math.inf, math.inf)
        return relative_error(sent, ideal), size / whole
    return math.sqrt(max(0.0, size - 2 * both + whole) / whole), size / whole


def error_to_sum(error: float, sent: Product, ideal: Product, K: int) -> float:
    """Returns ‖B A − K B* A*‖_F / ‖K B* A*‖_F, from the `relative_error` of the same products and two inner products.

    With e that error and c = ⟨B A, B* A*⟩ / ‖B* A*‖² − 1, it is √(e² − 2 (K − 1) c + (K − 1)²) / K; no second decomposition.

    >>> one = (torch.ones(3, 1), torch.ones(1, 2))
    >>> error_to_sum(0.0, one, one, K=4)
    0.75
    """
    whole = inner(*ideal, *ideal).item()
    if K == 1 or whole == 0:
        return error
    c = inner(*sent, *ideal).item() / whole - 1
    return math.sqrt(max(0.0, error**2 - 2 * (K - 1) * c + (K - 1) ** 2)) / K


def gram_blocks(Bs: Tensor, As: Tensor) -> tuple[Tensor, Tensor]:
    """Returns C^B[u, w] = B_uᵀ B_w and C^A[v, z] = A_v A_zᵀ, all r × r blocks of U clients, in float64.

    They hold every inner product of the products of any two clients' factors,

        G[u, v, w, z] = ⟨B_u A_v, B_w A_z⟩_F = Σ C^B[u, w] ∘ C^A[v, z],

    in U² r² numbers; G itself would be U⁴.

    Args:
        Bs: … × U × d_out × r.
        As: … × U × r × d_in.

    >>> C_B, C_A = gram_blocks(torch.ones(2, 3, 1), torch.ones(2, 1, 5))
    >>> C_B.shape, (C_B[0, 1] * C_A[0, 1]).sum().item()
    (torch.Size([2, 2, 1, 1]), 15.0)
    """
    return _pairs(Bs.movedim(-3, -2).flatten(-2), Bs.shape), _pairs(As.flatten(-3, -2).mT, Bs.shape)


def _pairs(stack: Tensor, shape: torch.Size) -> Tensor:
    """M_uᵀ M_w for all u, w, … × U × U × r × r in float64, from [M_1 … M_U], … × d × U r; `shape` is … × U × d_out × r."""
    (*batch, U, _, r) = shape
    G = torch.stack([gram(M) for M in stack.double().reshape(-1, *stack.shape[-2:])])
    return G.view(*batch, U, r, U, r).transpose(-3, -2).contiguous()


def gram_form(C: Tensor, D: Tensor, x: Tensor) -> Tensor:
    """Returns H[u, w] = Σ_vz x_v x_z Σ C[u, w] ∘ D[v, z]: how ‖(Σ_u y_u B_u)(Σ_v x_v A_v)‖² = yᵀ H y depends on y.

    Args:
        C: Blocks of the free coefficients y, U × U × r × r, from `gram_blocks`.
        D: Blocks of the fixed coefficients x, likewise.

    >>> C_B, C_A = gram_blocks(torch.ones(2, 3, 1), torch.ones(2, 1, 5))
    >>> gram_form(C_B, C_A, torch.tensor([1.0, 0.0], dtype=torch.float64))[0, 0].item()
    15.0
    """
    fixed = torch.outer(x, x).flatten() @ D.flatten(2).flatten(0, 1)
    return (C.flatten(2).flatten(0, 1) @ fixed).view(C.shape[:2])


def dense_svd(M: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the `rank` largest singular triples (U, s, Vh) of a dense d_out × d_in matrix.

    In full where the smaller side is at most `DENSE_SVD_LIMIT`. Above that by random projection (8 directions more than
    asked for, 10 power iterations), which is exact only as far as the spectrum falls off behind `rank`; the generator is
    a private one of fixed seed. Computed in float32 or finer, returned in M's dtype.

    >>> dense_svd(torch.diag(torch.tensor([2.0, 5.0])), 1)[1]
    tensor([5.])
    """
    wide = M.to(torch.promote_types(M.dtype, torch.float32))
    small = min(M.shape) <= DENSE_SVD_LIMIT
    U, s, Vh = _svd(wide) if small else _projected_svd(wide, min(rank + 8, *M.shape), iterations=10)
    return U[:, :rank].to(M.dtype), s[:rank].to(M.dtype), Vh[:rank].to(M.dtype)


def _projected_svd(M: Tensor, width: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Randomised SVD: a basis of (M Mᵀ)ⁱ M Ω for a Gaussian Ω of `width` columns; then the SVD of M in that basis."""
    omega = torch.randn(M.shape[1], width, generator=torch.Generator().manual_seed(0)).to(M)
    basis = _qr(M @ omega)[0]
    for _ in range(iterations):
        basis = _qr(M @ _qr(M.mT @ basis)[0])[0]
    U, s, Vh = _svd(basis.mT @ M)
    return basis @ U, s, Vh


def seed_of(*parts: str | int) -> int:
    """Returns a seed of 63 bits that depends on every part and on nothing else: the same on every machine and Python.

    >>> seed_of(0, 3, "layers.0.q_proj") == seed_of(0, 3, "layers.0.q_proj") != seed_of(0, 31, "layers.0.q_proj")
    True
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def fresh_A(rank: int, d_in: int, seed: int) -> Tensor:
    """Returns LoRA's first A, rank × d_in in float32: Kaiming-uniform with a = √5, which is U(−1/√d_in, 1/√d_in).

    Drawn row by row from a generator of its own, so that clients of different rank share their first rows.

    >>> torch.equal(fresh_A(2, 5, seed=1), fresh_A(4, 5, seed=1)[:2])
    True
    """
    generator = torch.Generator().manual_seed(seed)
    bound = d_in**-0.5
    A = torch.empty(rank, d_in)
    for row in A:
        row.uniform_(-bound, bound, generator=generator)
    return A
