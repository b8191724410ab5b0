"""What noise costs, by Opacus' accountants, and where it comes from. Nothing is kept here.

Two data sets are neighbours where one of them has one unit more (a row, or a client): add-or-remove. Every step takes each
unit into its batch by itself, with probability q (Poisson sampling), adds up what the units in it contribute, each clipped to
norm C, and adds noise of standard deviation σ C. A history is a list of (σ, q, steps), in any order.
"""

import hashlib
import math
import random
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umbel import algebra

Spent = tuple[float, float, int]
"""(σ, q, steps): so many steps with that noise multiplier and that sample rate."""

Mechanism = tuple[float, int]
"""(q, steps): what is to be done, with a noise that is still to be found."""

SLACK = 0.004
"""Width of the error bound of the numerical accountant, as a share of ε; it is added to ε."""

MOST_POINTS = 2**21
"""Of the numerical accountant's grid; where more would be needed, its error bound is widened."""

LEAST_DELTA = 1e-10
"""Below it the numerical accountant is not asked: the rounding of its Fourier transforms would count."""

ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64)) + [2**k for k in range(6, 13)]
"""Rényi orders. Opacus' own end at 63, which says nothing of an ε below 0.2."""

HIGHEST_NOISE = 1e6


class PrivacyError(ValueError):
    """Numbers that have no guarantee, or an accountant that is missing; says what to do."""


def epsilon(history: Sequence[Spent], delta: float) -> float:
    """Returns the ε that a history has at δ.

    It is the smaller of two proven upper bounds, both Opacus': of Rényi divergences, and of the privacy loss itself,
    composed numerically with its error bound added (PRV), which is 5 to 15 % lower. So where the second cannot be had
    (δ < 1e-10, or numbers beyond its range) the first counts, and ε is too high rather than too low.

    Args:
        history: (σ, q, steps) each; entries of the same σ and q count as one.
        delta: 0 < δ < 1.

    Returns:
        ε ≥ 0; infinite where a step had no noise.

    Raises:
        PrivacyError: δ or an entry is out of range, or Opacus is not installed.
    """
    if not 0 < delta < 1:
        raise PrivacyError(f"δ: got {delta}, allowed: 0 < δ < 1")
    merged: Counter[tuple[float, float]] = Counter()
    for sigma, rate, steps in history:
        if not (math.isfinite(sigma) and sigma >= 0 and 0 <= rate <= 1 and steps >= 0):
            raise PrivacyError(f"history: got σ = {sigma}, q = {rate}, {steps} steps; allowed: σ ≥ 0, 0 ≤ q ≤ 1, steps ≥ 0")
        merged[float(sigma), float(rate)] += steps
    counted = tuple(sorted((*own, steps) for own, steps in merged.items() if steps and own[1]))
    if any(sigma == 0 for sigma, _, _ in counted):
        return math.inf
    # With much noise and a large δ, the formulas come out below 0.
    return max(0.0, _epsilon(counted, float(delta))) if counted else 0.0


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[Spent, ...], delta: float) -> float:
    accountants = _opacus()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # At q = 1 it takes the logarithm of 0 on a branch that it does not use; orders at the ends of the range are warned of.
        warnings.simplefilter("ignore")
        rdp = accountants.RDPAccountant()
        rdp.history = list(history)
        upper = float(rdp.get_epsilon(delta, alphas=ORDERS))
        if delta < LEAST_DELTA or not 0 < upper < 500:
            return upper
        prv = accountants.PRVAccountant()
        prv.history = list(history)
        steps = sum(steps for _, _, steps in history)
        # Its grid spans about ±(ε + 6) in steps of error / √(steps · ln(12000 / δ) / 2).
        finest = 2 * (upper + 6) * math.sqrt(steps * math.log(12_000 / delta) / 2) / MOST_POINTS
        error = math.inf
        # The first bound may be several times ε; what is found tells how narrow the error bound must be.
        while error > (wanted := max(SLACK * upper, finest)) * 1.5:
            error = min(0.5, wanted)
            try:
                numerical = float(prv.get_epsilon(delta, eps_error=error))
            except (RuntimeError, ValueError, ArithmeticError, IndexError):
                break
            upper = min(upper, numerical) if math.isfinite(numerical) and numerical > 0 else upper
    return upper


def _opacus() -> Any:
    try:
        from opacus import accountants
    except ImportError:
        raise PrivacyError("the accountant of differential privacy is Opacus': pip install 'umbel[privacy]'") from None
    return accountants


@lru_cache(maxsize=1024)
def noise_multiplier(target: float, delta: float, mechanisms: tuple[Mechanism, ...], before: tuple[Spent, ...] = ()) -> float:
    """Returns the smallest σ, up to 1 % of ε, with which all mechanisms together stay within ε = `target`.

    Args:
        target: ε.
        delta: δ.
        mechanisms: (q, steps) of everything that shall have this σ: all steps of all rounds of a run.
        before: What is in the composition already, with noise of its own.

    Raises:
        PrivacyError: No σ is enough: what was before has spent the target.
    """

    def cost(sigma: float) -> float:
        return epsilon([*before, *((sigma, rate, steps) for rate, steps in mechanisms)], delta)

    spent = epsilon(before, delta)
    if spent >= target:
        raise PrivacyError(f"ε = {target:g} at δ = {delta:g} is spent already ({spent:.4g}), no noise is enough")
    high = 1.0
    while (reached := cost(high)) > target:
        high *= 2
        if high > HIGHEST_NOISE:
            raise PrivacyError(
                f"ε = {target:g} at δ = {delta:g} needs noise beyond {HIGHEST_NOISE:g}; raise ε or take fewer steps"
            )
    low = high / 2
    while high < 1.5 and (tried := cost(low)) <= target and low > 1e-3:
        high, low, reached = low, low / 2, tried
    for _ in range(60):
        if reached >= 0.99 * target or high - low <= 1e-9 * high:
            break
        middle = math.sqrt(low * high)
        tried = cost(middle)
        if tried <= target:
            high, reached = middle, tried
        else:
            low = middle
    return high


def chosen(seed: int, clients: Sequence[int], clients_per_round: int, train_round: int) -> list[int]:
    """Returns the clients that a training round asks, drawn by the seed and the round alone.

    Args:
        seed: The run's.
        clients: Those that there are.
        clients_per_round: How many are asked; 0 asks all.
        train_round: From 1.
    """
    if not 0 < clients_per_round < len(clients):
        return list(clients)
    draw = random.Random(algebra.seed_of(seed, "choose", train_round))
    return sorted(draw.sample(list(clients), clients_per_round))


def participations(seed: int, rounds: int, clients: Sequence[int], clients_per_round: int, client: int) -> int:
    """Returns in how many of a run's training rounds a client is asked.

    The draw is public, so it hides nobody: rounds count as they are, not as sampled clients.

    >>> sum(participations(0, 10, range(4), 2, client) for client in range(4))
    20
    """
    return sum(client in chosen(seed, clients, clients_per_round, number) for number in range(1, rounds + 1))


def sample_rate(batch: int, rows: int) -> float:
    """Returns q: the probability of each row to be in a batch of so many rows on average, at most 1.

    >>> sample_rate(16, 64), sample_rate(16, 8)
    (0.25, 1.0)
    """
    return min(1.0, batch / rows)


def check_delta(delta: float, units: int, of: str) -> None:
    """Raises PrivacyError where δ is more than 1 / n: publishing one unit in the clear would be within the promise.

    Args:
        delta: δ.
        units: n.
        of: What they are, e.g. "client 2's rows".
    """
    if not 0 < delta <= 1 / units:
        raise PrivacyError(
            f"privacy.target_delta: got {delta:g}, allowed: at most 1/n = {1 / units:.3g} for {units} {of}; lower it"
        )


class Secret:
    """Random numbers that nobody can tell without a client's secret: the stream of SHAKE-256.

    PyTorch's own generator would not do: on a CPU it takes 32 bits of its seed, which can be tried one by one, and a few
    thousand of its numbers, as the noise of a layer without a gradient shows them, give away all the others.

    Args:
        seed: The secret.
        purpose: What the numbers are for; other purposes have other numbers.
    """

    def __init__(self, seed: int, *purpose: str | int) -> None:
        self._key, self._drawn = repr((seed, *purpose)).encode(), 0

    def uniform(self, count: int) -> Tensor:
        """Returns so many numbers between 0 and 1, both excluded, float64, of 53 bits each."""
        stream = hashlib.shake_256(self._key + self._drawn.to_bytes(8, "big")).digest(8 * count)
        self._drawn += 1
        return torch.from_numpy(((np.frombuffer(stream, "<u8") >> 11) + 0.5) * 2.0**-53)

    def normal(self, shape: torch.Size) -> Tensor:
        """Returns standard normal numbers by Box and Muller's formula, float32."""
        result = torch.empty(shape.numel())
        for part in result.split(2**20):  # in pieces, as a large layer's numbers take four times its memory on the way
            u, v = self.uniform(2 * math.ceil(len(part) / 2)).chunk(2)
            radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
            part.copy_(torch.cat([radius * angle.cos(), radius * angle.sin()])[: len(part)])
        return result.view(shape)

    def poisson(self, rows: int, rate: float) -> list[int]:
        """Returns the rows of one batch: each of 0 … rows − 1 with probability `rate`, by itself."""
        return (self.uniform(rows) < rate).nonzero().flatten().tolist()
