"""FLoRA-NA: one coefficient per client and factor, closest to the mean of products (arXiv 2509.26399).

    B̂ = Σ_u P_u B_u,  Â = Σ_v Q_v A_v                                                       (1)
    (P, Q) = argmin L,  L = ‖B̂ Â − Σ_u p_u B_u A_u‖_F²                                      (2)    the paper's Eq. 6
    C^B_uw = B_uᵀ B_w,  C^A_vz = A_v A_zᵀ,  G_uvwz = Σ C^B_uw ∘ C^A_vz = ⟨B_u A_v, B_w A_z⟩  (3)
    g_uv = Σ_w p_w G_uvww,  c = Σ_uw p_u p_w G_uuww                                          (4)
    L = Σ G_uvwz P_u Q_v P_w Q_z − 2 Σ g_uv P_u Q_v + c                                      (5)
    P ← (H + ρ I)⁻¹ (g Q + ρ P),  H_uw = Σ_vz G_uvwz Q_v Q_z,  ρ = 1e-8 tr(H) / U            (6)    and so for Q

(1) and (2) are the paper's, with p_u for its 1/U. It does not say how (2) is solved, from where, or whether layers share
coefficients: (3) to (6) are ours, alternating least squares from P = Q = p (FedIT), each half-step damped towards the last
value so that L never rises. G has U⁴ numbers and is not formed; H comes from the blocks.
"""

# pyright: reportConstantRedefinition=false
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from umbel import algebra
from umbel.method import Download, Each, Factors, Method, MethodError, stacked

Uploads = list[tuple[Factors, float]]
Blocks = list[tuple[Tensor, Tensor]]  # per layer (C^B, C^A)
EXACT = 1e-14  # L / c below which float64 Gram blocks cannot tell L from 0; a relative error of 1e-7


@dataclass(frozen=True)
class FLoRANA(Method):
    """Picks the best B̂ Â among scalar combinations of the clients' factors; never worse than FedIT, at FedIT's traffic.

    Args:
        scope: Coefficients per "layer", or one pair "shared" by all layers (errors then add up over layers).
        sweeps: At most so many updates of P and Q.
        tolerance: Stop when a sweep lowers L by less than this share.
    """

    collect = Each

    scope: Literal["layer", "shared"] = "layer"
    sweeps: int = 50
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if self.scope not in ("layer", "shared"):
            raise MethodError(f"flora_na: scope: got {self.scope!r}, allowed: 'layer', 'shared'")
        if self.sweeps < 1 or self.tolerance < 0:
            raise MethodError(f"flora_na: got sweeps {self.sweeps}, tolerance {self.tolerance}, allowed: ≥ 1 and ≥ 0")

    @property
    def together(self) -> bool:
        return self.scope == "shared"

    def combine(self, got: Uploads, held: Factors) -> Download:
        return self.combine_layers({"": got}, {"": held})[""]

    def combine_layers(self, got: Mapping[str, Uploads], held: Mapping[str, Factors]) -> dict[str, Download]:
        downloads: dict[str, Download] = {}
        for group in [list(got)] if self.scope == "shared" else [[layer] for layer in got]:
            stacks = {layer: (stacked(layer, got[layer], "B"), stacked(layer, got[layer], "A")) for layer in group}
            p = torch.tensor([weight for _, weight in got[group[0]]], dtype=torch.float64)
            P, Q, _ = self.coefficients([algebra.gram_blocks(Bs, As) for Bs, As in stacks.values()], p)
            downloads |= {layer: _mix(Bs, As, P, Q, p) for layer, (Bs, As) in stacks.items()}
        return downloads

    def coefficients(self, blocks: Blocks, p: Tensor) -> tuple[Tensor, Tensor, list[float]]:
        """Returns (P, Q, [L of FedIT, L after each sweep]), by (6) over the sum of `blocks`."""
        g = torch.stack([torch.einsum("w,uwrs,vwrs->uv", p, C_B, C_A) for C_B, C_A in blocks]).sum(0)  # (4)
        c = float(p @ g.diagonal())
        H = _quadratic(blocks, p)
        P, Q, losses = p, p, [float(p @ H @ p - 2 * p @ g @ p) + c]  # (5)
        for _ in range(self.sweeps):
            if losses[-1] <= EXACT * c:
                break
            P = _half_step(H, g @ Q, P)
            Q = _half_step(_quadratic([(C_A, C_B) for C_B, C_A in blocks], P), g.mT @ P, Q)
            H = _quadratic(blocks, Q)
            losses.append(float(P @ H @ P - 2 * P @ g @ Q) + c)  # (5)
            if losses[-2] - losses[-1] <= self.tolerance * losses[-2]:
                break
        return (P, Q, losses) if losses[-1] < losses[0] else (p, p, losses)  # rounding must not make it worse than FedIT


def _quadratic(blocks: Blocks, fixed: Tensor) -> Tensor:
    return torch.stack([algebra.gram_form(C, D, fixed) for C, D in blocks]).sum(0)  # H of (6), or its twin for Q


def _half_step(H: Tensor, target: Tensor, last: Tensor) -> Tensor:
    ridge = 1e-8 * float(H.trace()) / len(last)
    if ridge <= 0:
        return last  # the fixed side's sum is zero, so nothing depends on these coefficients
    return algebra.solve(H + ridge * torch.eye(len(last), dtype=H.dtype), target + ridge * last)  # (6)


def _sums(chosen: Tensor, p: Tensor, xs: Tensor) -> Tensor:
    wide = torch.promote_types(xs.dtype, torch.float32)
    return (torch.stack([chosen, p]).to(wide) @ xs.flatten(1).to(wide)).view(2, *xs.shape[1:])


def _mix(Bs: Tensor, As: Tensor, P: Tensor, Q: Tensor, p: Tensor) -> Download:
    """(1), with (cP, Q/c), which L does not see, chosen so that ‖B̂‖/‖Â‖ is FedIT's ratio."""
    (B, B_mean), (A, A_mean) = _sums(P, p, Bs), _sums(Q, p, As)
    squares = [float(x.square().sum(dtype=torch.float64)) for x in (B_mean, A, A_mean, B)]
    gauge = (squares[0] * squares[1] / (squares[2] * squares[3])) ** 0.25 if min(squares) > 0 else 1.0
    return Download(factors={"B": (B * gauge).to(Bs.dtype), "A": (A / gauge).to(As.dtype)})
