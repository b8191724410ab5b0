"""The local training loop, and the gradient that Fed-SB starts from: plain PyTorch."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from umbel.client.adapter import Adapter
from umbel.client.data import Example, collate
from umbel.config import Training
from umbel.method import Factors, Method


@dataclass(frozen=True)
class Fitted:
    """What a local fit leaves, besides the trained parameters.

    Args:
        loss: Mean training loss over the steps.
        steps: Optimizer steps taken.
        optimizer: The optimizer's state as named tensors; empty where it is not kept.
    """

    loss: float
    steps: int
    optimizer: dict[str, Tensor]


def steps_per_round(training: Training, rows: int) -> int:
    """Returns the optimizer steps that a client with so many rows takes in one round."""
    if training.max_steps > 0:
        return training.max_steps
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return max(1, math.ceil(rows * training.num_train_epochs / batch))


def learning_rate_factor(training: Training, step: int, total: int) -> float:
    """Returns the factor on the learning rate at a step of the whole run, by Transformers' formulas.

    >>> [learning_rate_factor(Training(warmup_ratio=0.2), step, 10) for step in (0, 1, 2, 6)]
    [0.0, 0.5, 1.0, 0.5]
    """
    warmup = math.ceil(training.warmup_ratio * total)
    if step < warmup:
        return step / max(1, warmup)
    if training.lr_scheduler_type == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    if training.lr_scheduler_type == "linear":
        return max(0.0, 1.0 - done)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))


def logits_of(model: nn.Module, batch: Mapping[str, Tensor], bf16: bool) -> Tensor:
    """Returns the model's logits: rows × labels for a head, rows × positions × vocabulary for a causal model."""
    with torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=bf16):
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def loss_of(model: nn.Module, batch: Mapping[str, Tensor], bf16: bool) -> Tensor:
    """Returns the mean cross-entropy: over rows for a head, over response tokens for a causal model."""
    labels, logits = batch["labels"], logits_of(model, batch, bf16)
    if labels.ndim == 1:
        return nn.functional.cross_entropy(logits.float(), labels)
    # Positions without a label need no float32 copy over the vocabulary.
    target = labels[:, 1:]
    wanted = target != -100
    return nn.functional.cross_entropy(logits[:, :-1][wanted].float(), target[wanted])


def _targets(labels: Tensor) -> int:
    """Returns how many rows, or response tokens, a loss is the mean over."""
    return labels.shape[0] if labels.ndim == 1 else int((labels[:, 1:] != -100).sum())


def batches(examples: list[Example], size: int, generator: torch.Generator) -> Iterator[list[Example]]:
    """Yields batches for ever, in passes over shuffled examples; a pass's short rest is filled from the next."""
    waiting: list[Example] = []
    while True:
        while len(waiting) < size:
            waiting += [examples[i] for i in torch.randperm(len(examples), generator=generator).tolist()]
        yield waiting[:size]
        waiting = waiting[size:]


def fit(
    adapter: Adapter,
    trains: tuple[str, ...],
    examples: list[Example],
    training: Training,
    pad_id: int,
    seed: int,
    train_round: int,
    rounds: int,
    optimizer_state: Mapping[str, Tensor],
    progress: Callable[[int, int], None],
    method: Method | None = None,
) -> Fitted:
    """Trains the named factors and the head on one client's examples.

    Args:
        adapter: The adapter, on its model.
        trains: Factors with a gradient.
        examples: This client's training rows.
        training: The loop's options.
        pad_id: The padding token.
        seed: Of data order and dropout; the caller derives it from (run, client, round).
        train_round: Counted from 1; places the steps in the whole run's schedule.
        rounds: Of the whole run.
        optimizer_state: Of the last round, to go on with; empty to start anew.
        progress: Called with (step, steps).
        method: Whose penalty on the factors is added to the loss, and who may cut them afterwards.
    """
    steps = steps_per_round(training, len(examples))
    factors, head = adapter.trainable(trains), list(adapter.plain_parameters.values())
    optimizer = optimizer_of(training, factors, head)
    load_state(optimizer, optimizer_state)
    before = held_before(adapter, method)
    rates = [group["lr"] for group in optimizer.param_groups]
    stream = batches(examples, training.per_device_train_batch_size, torch.Generator().manual_seed(seed))
    device = next(adapter.model.parameters()).device
    adapter.model.train()
    losses: list[float] = []
    optimizer.zero_grad(set_to_none=True)  # what a client that failed may have left
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(steps):
            factor = learning_rate_factor(training, (train_round - 1) * steps + step, rounds * steps)
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
            parts = [collate(next(stream), pad_id) for _ in range(training.gradient_accumulation_steps)]
            # Weighted by what each part's mean is over, so that parts count as the one batch that they are.
            counts = [_targets(part["labels"]) for part in parts]
            total = 0.0
            for part, count in zip(parts, counts):
                batch = {key: x.to(device) for key, x in part.items()}
                loss = loss_of(adapter.model, batch, training.bf16) * (count / sum(counts))
                loss.backward()
                total += loss.item()
            extra = penalty_of(adapter, method)
            if extra is not None:
                extra.backward()
            if not math.isfinite(total):
                raise FloatingPointError(f"training loss is {total} at step {step + 1}; lower training.learning_rate")
            if training.max_grad_norm > 0:
                torch.nn.utils.clip_grad_norm_([*factors, *head], training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
            progress(step + 1, steps)
    adapter.model.eval()
    give_up(adapter, method, before)
    kept = state_of(optimizer) if training.optimizer_state == "keep" else {}
    return Fitted(sum(losses) / len(losses), steps, kept)


def penalty_of(adapter: Adapter, method: Method | None) -> Tensor | None:
    """Returns what the method adds to the loss for all layers, a scalar with a gradient; None where it adds nothing."""
    if method is None or type(method).penalty is Method.penalty:
        return None
    extra = [x for own in adapter.live().values() if (x := method.penalty(own)) is not None]
    return torch.stack(extra).sum() if extra else None


def held_before(adapter: Adapter, method: Method | None) -> dict[str, Factors]:
    """Returns the factors before training, for a method that asks for them afterwards; nothing for the others."""
    return adapter.read() if method is not None and type(method).trained is not Method.trained else {}


def give_up(adapter: Adapter, method: Method | None, before: Mapping[str, Factors]) -> None:
    """Lets the method have a client give up directions after training; `before` is what `held_before` returned."""
    if before and method is not None:
        adapter.write({layer: method.trained(before[layer], own) for layer, own in adapter.read().items()})


def optimizer_of(training: Training, factors: list[nn.Parameter], head: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Returns the optimizer of the factors, and of the head at its own learning rate."""
    groups = [{"params": factors, "lr": training.learning_rate}]
    if head:
        groups.append({"params": head, "lr": training.head_learning_rate or training.learning_rate})
    if training.optim == "sgd":
        return torch.optim.SGD(groups, weight_decay=training.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=training.weight_decay)


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns copies of an optimizer's state, by <index of the parameter>.<name>."""
    return {
        f"{index}.{key}": value.detach().clone()
        for index, own in optimizer.state_dict()["state"].items()
        for key, value in own.items()
    }


def load_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `state_of`; does nothing where there is no state, or where it is of other shapes."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fits = all(x.shape in ((), parameters[i].shape) for i, own in state.items() for x in own.values() if i < len(parameters))
    # A client that gave up directions begins anew.
    if state and fits:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def gradient(
    adapter: Adapter, examples: list[Example], training: Training, pad_id: int, seed: int, samples: int
) -> dict[str, Tensor]:
    """Returns the mean gradient of every adapted frozen weight over some of a client's rows, d_out × d_in, float32.

    It is zero for a layer on which the loss does not depend.

    In training mode (with dropout), as LoRA-SB's released code does; the model must be at its frozen weights (B = 0).
    """
    weights = adapter.frozen_weights()
    chosen = next(batches(examples, min(samples, len(examples)), torch.Generator().manual_seed(seed)))
    sums = {name: torch.zeros(weight.shape) for name, weight in weights.items()}
    adapter.trainable(())
    for weight in weights.values():
        weight.requires_grad_(True)
    adapter.model.train()
    size = training.per_device_train_batch_size
    device = next(adapter.model.parameters()).device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            batch = {key: x.to(device) for key, x in collate(part, pad_id).items()}
            loss_of(adapter.model, batch, training.bf16).backward()
            for name, weight in weights.items():
                if weight.grad is None:
                    continue  # nothing reads this layer, as BERT's pooler where the head takes the mean: zero
                sums[name] += weight.grad.float().cpu() * (len(part) / len(chosen))
                weight.grad = None
    adapter.model.eval()
    for weight in weights.values():
        weight.requires_grad_(False)
    return {name: adapter.oriented(name, total).contiguous() for name, total in sums.items()}
