"""The exact sum in float32 against dense float64, where factors are ill-conditioned, deficient, alike, huge, tiny or zero."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import umbel

Pair = tuple[Tensor, Tensor]
Make = Callable[[int, int, int, int], Pair]
"""(d_out, d_in, r, seed) to (B, A)."""


def _random(d_out: int, d_in: int, r: int, seed: int) -> Pair:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(d_out, r, generator=draw), torch.randn(r, d_in, generator=draw)


def _conditioned(d_out: int, d_in: int, r: int, seed: int) -> Pair:
    """Singular values of both factors from 1 to 1e-6, in a basis that shows it nowhere."""
    B, A = _random(d_out, d_in, r, seed)
    values = torch.logspace(0, -6, r, dtype=torch.float64)
    turn = torch.linalg.qr(_random(r, r, r, seed + 1)[0].double())[0]
    Q_B, Q_A = torch.linalg.qr(B.double())[0], torch.linalg.qr(A.double().T)[0]
    return (Q_B * values @ turn).float(), (turn.T * values @ Q_A.T).float()


def _deficient(d_out: int, d_in: int, r: int, seed: int) -> Pair:
    B, A = _random(d_out, d_in, r, seed)
    return B[:, :1].repeat(1, r), A[:1].repeat(r, 1) + A[-1:]


def _proportional(d_out: int, d_in: int, r: int, seed: int) -> Pair:
    B, A = _random(d_out, d_in, r, 0)
    return B * (1 + seed) / 3, A


def _nearly_alike(d_out: int, d_in: int, r: int, seed: int) -> Pair:
    (B, A), (B_own, A_own) = _random(d_out, d_in, r, 0), _random(d_out, d_in, r, seed)
    return B + 1e-5 * B_own, A + 1e-5 * A_own


def _some_zero(d_out: int, d_in: int, r: int, seed: int) -> Pair:
    B, A = _random(d_out, d_in, r, seed)
    return B * (seed % 2), A


def _lopsided(d_out: int, d_in: int, r: int, seed: int) -> Pair:
    B, A = _random(d_out, d_in, r, seed)
    return 1e10 * B, 1e-10 * A


def _tiny(d_out: int, d_in: int, r: int, seed: int) -> Pair:
    B, A = _random(d_out, d_in, r, seed)
    return 1e-15 * B, 1e-15 * A


def _unlike_sizes(d_out: int, d_in: int, r: int, seed: int) -> Pair:
    B, A = _random(d_out, d_in, r, seed)
    return B * 10.0 ** (-seed % 7), A


SHAPES = {"tall": (80, 48, 4, 5), "wide": (48, 80, 4, 5), "more rank than rows": (48, 80, 8, 10), "one row": (1, 64, 2, 3)}
"""d_out, d_in, r and sites."""


def _adapter(pair: Pair, alpha: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    B, A = pair
    r = A.shape[0]
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["q"], base_model_name_or_path="base")  # type: ignore[arg-type]
    return {"base_model.model.h.q.lora_A.weight": A, "base_model.model.h.q.lora_B.weight": B}, config.to_dict()


def _product(state: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    (A,) = [x.double() for name, x in state.items() if "lora_A" in name]
    (B,) = [x.double() for name, x in state.items() if "lora_B" in name]
    assert config["lora_alpha"] == config["r"] == A.shape[0]
    return B @ A


@pytest.mark.parametrize("method", ["florist", "flora", "fedex_lora", "exact"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "make",
    [
        _random,
        _conditioned,
        _deficient,
        _proportional,
        _nearly_alike,
        _some_zero,
        _lopsided,
        _tiny,
        _unlike_sizes,
    ],
    ids=lambda make: make.__name__,
)
def test_the_exact_sum_is_right_to_a_few_roundings(make: Make, shape: str, method: str) -> None:
    d_out, d_in, r, K = SHAPES[shape]
    pairs = [make(d_out, d_in, min(r, d_out), seed) for seed in range(K)]
    rows = [1 + 7 * k for k in range(K)]
    states, configs = zip(*(_adapter(pair, alpha=3) for pair in pairs))
    options = {"energy": 1.0} if method == "florist" else {}
    state, config, report = umbel.aggregate(list(states), list(configs), method=method, options=options, weights=rows)
    ideal = sum(
        (n / sum(rows) * 3 / A.shape[0] * B.double() @ A.double() for (B, A), n in zip(pairs, rows)),
        torch.zeros(d_out, d_in),
    )
    apart = float((_product(state, config) - ideal).norm() / ideal.norm())
    assert apart <= 2e-6
    assert report["layers"]["h.q"]["error"] == pytest.approx(apart, rel=1e-3, abs=3e-7)


@pytest.mark.parametrize("method", ["florist", "fedit", "flora_na", "flora", "fedex_lora", "exact", "best_rank", "lora_fair"])
def test_a_layer_of_zeros_stays_zero(method: str) -> None:
    adapters = [_adapter((0 * B, A), alpha=3) for B, A in (_random(20, 12, 3, seed) for seed in range(3))]
    states, configs = zip(*adapters)
    state, config, report = umbel.aggregate(list(states), list(configs), method=method, weights=[1, 2, 3])
    assert not _product(state, config).any()
    assert report["layers"]["h.q"]["error"] == 0.0
