"""DP-SGD at one client: the local loop in which no single row shows, by Opacus.

    g_i = ∇ loss_i                                           (1)    over all trained parameters of one row together
    clip(g) = g · min(1, C / ‖g‖)                            (2)
    g̃ = (Σ_{i in batch} clip(g_i) + N(0, σ² C² I)) / (q n)   (3)    each of n rows is in the batch with probability q

(Abadi et al. 2016, arXiv 1607.00133.) What it costs is a matter of (q, σ, steps) alone, whatever factors are trained.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from umbel import privacy
from umbel.client import fit as plain
from umbel.client.adapter import Adapter, public_name
from umbel.client.data import Example, collate
from umbel.client.fit import Fitted
from umbel.config import ConfigError, Training
from umbel.method import Method
from umbel.privacy import Secret


@dataclass(frozen=True)
class Noise:
    """How the rows of one client are hidden.

    Args:
        multiplier: σ ≥ 0; the noise on the sum of clipped gradients has standard deviation σ C. 0 adds none.
        max_grad_norm: C > 0, to which the gradient of every row is clipped.
        sample_rate: q, 0 < q ≤ 1; each row is in a batch with this probability, whatever the others are.
        seed: 64 bits or more of a client's secret, of which sampling, noise and dropout follow. Must be fresh for every
            answer: two answers with the same noise tell their difference without any.

    Raises:
        ValueError: A number outside its range.
    """

    multiplier: float
    max_grad_norm: float
    sample_rate: float
    seed: int = field(repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.multiplier < math.inf or not 0 < self.max_grad_norm < math.inf or not 0 < self.sample_rate <= 1:
            # Without the seed, which is a secret.
            raise ValueError(
                f"noise: got multiplier {self.multiplier}, max_grad_norm {self.max_grad_norm}, sample_rate "
                f"{self.sample_rate}; allowed: multiplier ≥ 0, max_grad_norm > 0, 0 < sample_rate ≤ 1"
            )


def sample_rate(training: Training, rows: int) -> float:
    """Returns q for which a batch has as many rows on average as it has without privacy, at most 1.

    >>> sample_rate(Training(per_device_train_batch_size=8, gradient_accumulation_steps=2), 64)
    0.25
    """
    return privacy.sample_rate(training.per_device_train_batch_size * training.gradient_accumulation_steps, rows)


def row_losses(model: nn.Module, batch: Mapping[str, Tensor], bf16: bool) -> Tensor:
    """Returns one loss per row, n: its cross-entropy, or the mean over the row's own response tokens.

    The mean over all tokens of a batch, as it is without privacy, would let each row's gradient depend on the others' lengths.
    """
    labels, logits = batch["labels"], plain.logits_of(model, batch, bf16)
    if labels.ndim == 1:
        return nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    target = labels[:, 1:]
    wanted = target != -100
    losses = nn.functional.cross_entropy(logits[:, :-1][wanted].float(), target[wanted], reduction="none")
    row = wanted.nonzero()[:, 0]
    return losses.new_zeros(len(labels)).index_add(0, row, losses) / wanted.sum(1).clamp(min=1)


def fit(
    adapter: Adapter,
    trains: tuple[str, ...],
    examples: list[Example],
    training: Training,
    pad_id: int,
    noise: Noise,
    train_round: int,
    rounds: int,
    optimizer_state: Mapping[str, Tensor],
    progress: Callable[[int, int], None],
    method: Method | None = None,
) -> Fitted:
    """Trains the named factors and the head on one client's examples, hiding each of them.

    As `umbel.client.fit.fit`, but for three things: batches are Poisson samples of q n rows on average, of which
    `per_device_train_batch_size` are looked at in one go; the clip of each row takes the place of `training.max_grad_norm`; and
    the loss is the mean over rows of `row_losses`. An empty batch is a step like the others, of noise alone.

    Args:
        adapter: The adapter, on its model.
        trains: Factors with a gradient.
        examples: This client's training rows.
        training: The loop's options.
        pad_id: The padding token.
        noise: How they are hidden.
        train_round: Counted from 1; places the steps in the whole run's schedule.
        rounds: Of the whole run.
        optimizer_state: Of the last round, to go on with; empty to start anew.
        progress: Called with (step, steps).
        method: Whose penalty on the factors is added to the gradient, and who may cut them afterwards.

    Returns:
        With a loss for the client's own eyes: the mean over the rows drawn, which no noise hides; not a number without rows.

    Raises:
        ConfigError: Opacus is missing, or the model does not look at rows one by one.
        FloatingPointError: Parameters are no longer finite.
    """
    steps = plain.steps_per_round(training, len(examples))
    factors, head = adapter.trainable(trains), list(adapter.plain_parameters.values())
    optimizer = plain.optimizer_of(training, factors, head)
    plain.load_state(optimizer, optimizer_state)
    before = plain.held_before(adapter, method)
    rates = [group["lr"] for group in optimizer.param_groups]
    sampling = Secret(noise.seed, "sampling", train_round)
    losses: list[float] = []
    adapter.model.train()
    with hooked(adapter, [*factors, *head], noise, len(examples), train_round) as rows_gradient, torch.random.fork_rng():
        torch.manual_seed(_dropout_seed(noise, train_round))
        for step in range(steps):
            factor = plain.learning_rate_factor(training, (train_round - 1) * steps + step, rounds * steps)
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
            batch = [examples[i] for i in sampling.poisson(len(examples), noise.sample_rate)]
            losses += rows_gradient(batch, training, pad_id)
            # A function of the factors, which no row is needed for: to clip it would weaken it, to noise it hides nothing.
            extra = plain.penalty_of(adapter, method)
            if extra is not None:
                extra.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _check_finite([*factors, *head], step)
            progress(step + 1, steps)
    adapter.model.eval()
    plain.give_up(adapter, method, before)
    kept = plain.state_of(optimizer) if training.optimizer_state == "keep" else {}
    return Fitted(sum(losses) / len(losses) if losses else math.nan, steps, kept)


def gradient(adapter: Adapter, examples: list[Example], training: Training, pad_id: int, noise: Noise) -> dict[str, Tensor]:
    """Returns (3) of every adapted frozen weight over one Poisson sample, d_out × d_in, float32.

    Clipped over all layers of a row together. Takes the place of `umbel.client.fit.gradient` where the rows are to be hidden;
    one row at a time, so that one gradient is in memory, and not one for each row. A layer that nothing reads is noise alone.

    Args:
        adapter: The adapter, on its model, which must be at its frozen weights (B = 0).
        examples: This client's training rows.
        training: The loop's options, of which `bf16` counts.
        pad_id: The padding token.
        noise: How the rows are hidden.
    """
    weights = adapter.frozen_weights()
    adapter.trainable(())
    _check_rows_apart(adapter.model)
    for weight in weights.values():
        weight.requires_grad_(True)
    sums = {name: torch.zeros(weight.shape) for name, weight in weights.items()}
    device = next(adapter.model.parameters()).device
    adapter.model.train()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(_dropout_seed(noise, 0))
            for i in Secret(noise.seed, "sampling", "gradient").poisson(len(examples), noise.sample_rate):
                batch = {key: x.to(device) for key, x in collate([examples[i]], pad_id).items()}
                row_losses(adapter.model, batch, training.bf16).sum().backward()
                _add_clipped(sums, weights, noise.max_grad_norm)
    finally:
        adapter.model.eval()
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
    draw, deviation = Secret(noise.seed, "noise", "gradient"), noise.multiplier * noise.max_grad_norm
    for total in sums.values():
        total.add_(draw.normal(total.shape), alpha=deviation).div_(noise.sample_rate * len(examples))
    return {name: adapter.oriented(name, total).contiguous() for name, total in sums.items()}


def _add_clipped(sums: dict[str, Tensor], weights: Mapping[str, nn.Parameter], C: float) -> None:
    """Adds (2) of the row whose gradient the weights hold, over all of them together, and clears it."""
    own = {name: _finite(weight.grad) for name, weight in weights.items() if weight.grad is not None}
    # In float64: in float32 the squares of a large layer add up to too little, and the row would come out longer than C.
    norm = math.hypot(*(float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in own.values()))
    for name, g in own.items():
        sums[name] += g.cpu() * min(1.0, C / (norm + 1e-6))  # as Opacus has it
        weights[name].grad = None


RowsGradient = Callable[[list[Example], Training, int], list[float]]


@contextmanager
def hooked(
    adapter: Adapter, parameters: list[nn.Parameter], noise: Noise, rows: int, train_round: int
) -> Iterator[RowsGradient]:
    """Puts Opacus' hooks on the model, and takes all of them off again.

    Yields:
        A function that leaves (3) over a batch in the parameters' gradients and returns the rows' losses.
    """
    hooks_of, clipper_of = _opacus()
    _check_rows_apart(adapter.model)
    # Opacus clips and sums in the parameters' own precision; in bfloat16 a row would come out up to 0.4 % longer than C.
    slots = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in parameters]
    clipper = clipper_of(slots, noise, rows, Secret(noise.seed, "noise", train_round))
    names = {id(p): public_name(name) for name, p in adapter.model.named_parameters()}
    device = next(adapter.model.parameters()).device
    hooks = hooks_of(adapter.model, loss_reduction="sum")

    def rows_gradient(batch: list[Example], training: Training, pad_id: int) -> list[float]:
        losses: list[float] = []
        size = training.per_device_train_batch_size
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        for number, part in enumerate(parts or [[]]):
            if part:
                found = row_losses(adapter.model, {k: x.to(device) for k, x in collate(part, pad_id).items()}, training.bf16)
                with warnings.catch_warnings():
                    # PyTorch says so of the first adapted layer, whose input has no gradient; its output's is all that counts.
                    warnings.filterwarnings("ignore", "Full backward hook is firing")
                    found.sum().backward()
                losses += found.tolist()
            for p, slot in zip(parameters, slots, strict=True):
                gradients = _of_rows(p, len(part), names[id(p)])
                p.grad_sample = None  # type: ignore[attr-defined]  # where p has a slot, Opacus does not clear it
                slot.grad_sample = gradients  # type: ignore[attr-defined]
            more = number + 1 < len(parts)
            clipper.signal_skip_step(more)
            clipper.pre_step()
            if more:
                clipper.zero_grad(set_to_none=True)
            _forget(adapter.model)
        for p, slot in zip(parameters, slots, strict=True):
            assert slot.grad is not None
            p.grad = slot.grad.to(p.dtype)
            slot.grad_sample = slot.summed_grad = None  # type: ignore[attr-defined]
        return losses

    try:
        yield rows_gradient
    finally:
        hooks.cleanup()
        _forget(adapter.model)
        for p in parameters:
            p.grad = None  # whatever ended the training, nothing of a row is left for the next client
            _drop(p, "summed_grad")


def _opacus() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns Opacus' hooks, and what makes its optimizer draw noise from a secret."""
    try:
        from opacus.grad_sample import GradSampleHooks
        from opacus.optimizers import DPOptimizer
    except ImportError as error:
        raise ConfigError(f"privacy.unit = 'example' needs Opacus: pip install 'umbel[privacy]' ({error})") from error

    class Clipper(DPOptimizer):
        """Opacus' (2) and (3), with the noise of a `Secret`. Its own step is never taken."""

        def __init__(self, slots: list[nn.Parameter], noise: Noise, rows: int, draw: Secret) -> None:
            super().__init__(
                torch.optim.SGD(slots),
                noise_multiplier=noise.multiplier,
                max_grad_norm=noise.max_grad_norm,
                expected_batch_size=noise.sample_rate * rows,  # type: ignore[arg-type]  # a mean, which need not be whole
            )
            self.draw = draw

        def add_noise(self) -> None:
            for p in self.params:
                normal = self.draw.normal(p.shape).to(p.device)
                p.grad = p.summed_grad.add(normal, alpha=self.noise_multiplier * self.max_grad_norm)  # type: ignore[attr-defined]

    return GradSampleHooks, Clipper


def _of_rows(p: nn.Parameter, rows: int, name: str) -> Tensor:
    """Returns the gradients of one parameter, one per row, float32; zero where the loss does not depend on it."""
    got: Tensor | None = getattr(p, "grad_sample", None)
    if got is None or not rows:
        return torch.zeros(rows, *p.shape, device=p.device)
    if len(got) != rows:
        raise ConfigError(
            f"{name!r} has {len(got)} gradients for {rows} rows: it sees something else than one row after the other, as in a "
            "mixture of experts. privacy.unit = 'example' cannot train it; take it out of lora.target_modules"
        )
    return _finite(got)


def _finite(gradient: Tensor) -> Tensor:
    """Returns it in float32, 0 where it is not finite: what has no length cannot be clipped, an error would tell of a row."""
    return torch.nan_to_num(gradient.float(), nan=0.0, posinf=0.0, neginf=0.0)


def _forget(model: nn.Module) -> None:
    """Drops what Opacus keeps of a forward pass in layers that no gradient reaches; it would pile up, and outlive the hooks."""
    for module in model.modules():
        _drop(module, "activations", "max_batch_len")
        for p in module.parameters(recurse=False):
            _drop(p, "_current_grad_sample")
            if hasattr(p, "_forward_counter"):
                p._forward_counter = 0  # type: ignore[attr-defined]


def _drop(of: object, *names: str) -> None:
    for name in names:
        if name in vars(of):  # not hasattr: PEFT's wrapper of a head also has what the head has
            delattr(of, name)


def _check_rows_apart(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"{public_name(name)!r} is a batch normalization, which mixes rows; privacy.unit = 'example' needs a model "
                "without one"
            )


def _check_finite(parameters: list[nn.Parameter], step: int) -> None:
    # Not the loss, as it is without privacy: whether a client stops may depend on what was noised, and on nothing else.
    if not all(bool(p.isfinite().all()) for p in parameters):
        raise FloatingPointError(f"parameters are not finite after step {step + 1}; lower training.learning_rate")


def _dropout_seed(noise: Noise, train_round: int) -> int:
    return int(Secret(noise.seed, "dropout", train_round).uniform(1).item() * 2**53)
