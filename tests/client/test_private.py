"""DP-SGD at a client: against the loop without privacy, against gradients row by row, and against its own promises."""

import hashlib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny
from umbel.client import fit, private
from umbel.client.adapter import Adapter
from umbel.client.data import Example, collate
from umbel.client.model import PooledClassifier, quiet
from umbel.client.private import Noise, Secret
from umbel.config import ConfigError, Lora, Training
from umbel.methods.hetlora import HetLoRA

TARGETS = {"bert": ["query", "intermediate.dense"], "gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "v_proj"]}
OPEN = Noise(0.0, 1e6, 1.0, seed=1)
"""Hides nothing: every row in every batch, no noise, no clip."""
SGD = Training(max_steps=3, per_device_train_batch_size=12, learning_rate=0.5, optim="sgd", max_grad_norm=0, weight_decay=0.1)


def rows(count: int = 12, head: bool = True) -> list[Example]:
    """Rows of unequal length; replies of one length, so that the mean over a batch's tokens is the mean over its rows."""
    draw = torch.Generator().manual_seed(3)
    ids = [torch.randint(4, 20, (5 + i % 5,), generator=draw).tolist() for i in range(count)]
    return [Example(own, i % 3 if head else [*[-100] * (len(own) - 3), *own[-3:]]) for i, own in enumerate(ids)]


def adapter(kind: str, folder: Path, dtype: torch.dtype = torch.float32, dropout: float = 0.0, causal: bool = False) -> Adapter:
    folder = folder / kind
    folder.mkdir(exist_ok=True)
    path = str(getattr(tiny, kind)(folder))
    with quiet():
        torch.manual_seed(7)
        auto: Any = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
        base = auto.from_pretrained(path, dtype=dtype, **({} if causal else {"num_labels": 3}))
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout  # type: ignore[assignment]
    base.config.pad_token_id = 0
    base.requires_grad_(False)
    head = [] if causal else [{"bert": "classifier"}.get(kind, "score")]
    return Adapter(base, Lora(r=4, lora_alpha=6, target_modules=TARGETS[kind], lora_dropout=dropout), head, 1)


def filled(own: Adapter, with_R: int = 0) -> Adapter:
    """Factors away from zero, so that every one of them has a gradient; with_R: the size of R's blocks."""
    draw = torch.Generator().manual_seed(9)
    factors = {}
    for layer, shape in own.layers.items():
        factors[layer] = {
            "A": torch.randn(shape.rank, shape.d_in, generator=draw) / 4,
            "B": torch.randn(shape.d_out, shape.rank, generator=draw) / 4,
        }
        if with_R:
            factors[layer]["R"] = torch.randn(shape.rank, with_R, generator=draw)
    own.write(factors)
    return own


def private_fit(own: Adapter, trains: tuple[str, ...], examples: list[Example], noise: Noise, **options: Any) -> fit.Fitted:
    training = options.pop("training", SGD)
    arguments = {"train_round": 1, "rounds": 1, "optimizer_state": {}, "progress": lambda *_: None} | options
    return private.fit(own, trains, examples, training, 0, noise, **arguments)


def open_fit(own: Adapter, trains: tuple[str, ...], examples: list[Example], **options: Any) -> fit.Fitted:
    training = options.pop("training", SGD)
    arguments = {"train_round": 1, "rounds": 1, "optimizer_state": {}, "progress": lambda *_: None} | options
    return fit.fit(own, trains, examples, training, 0, 1, **arguments)


def everything(own: Adapter) -> dict[str, Tensor]:
    """All parameters, the frozen ones too."""
    return {name: p.detach().clone() for name, p in own.model.named_parameters()}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 2e-6, rtol: float = 1e-4) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        torch.testing.assert_close(x, other[name], atol=atol, rtol=rtol, msg=lambda text, name=name: f"{name}: {text}")


TRAINED = pytest.mark.parametrize(
    ("trains", "blocks"),
    [(("A", "B"), 0), (("A",), 0), (("B",), 0), (("R",), 4), (("R",), 2)],
    ids=["AB", "A", "B", "R", "blocks"],
)
KINDS = pytest.mark.parametrize("kind", TARGETS)
STEP = replace(SGD, max_steps=1, learning_rate=1.0, weight_decay=0.0, lr_scheduler_type="constant")
"""One step whose gradient is how far the parameters move."""


def trained(own: Adapter) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in own.model.named_parameters() if p.requires_grad}


def step_of(own: Adapter, trains: tuple[str, ...], examples: list[Example], noise: Noise, **options: Any) -> dict[str, Tensor]:
    """The gradient by which a private step moves; the adapter is as it was before."""
    before = everything(own)
    private_fit(own, trains, examples, noise, **{"training": STEP, **options})
    moved = {name: before[name] - x for name, x in trained(own).items()}
    with torch.no_grad():
        for name, p in own.model.named_parameters():
            p.copy_(before[name])
    return moved


def gradient_of(own: Adapter, trains: tuple[str, ...], example: Example) -> dict[str, Tensor]:
    """The gradient of one row by itself, without any hook."""
    own.trainable(trains)
    own.model.zero_grad(set_to_none=True)
    fit.loss_of(own.model, collate([example], 0), False).backward()
    result = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in own.model.named_parameters()
        if p.requires_grad
    }
    own.model.zero_grad(set_to_none=True)
    return result


def norm(gradient: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(x.double().square().sum()) for x in gradient.values()))


def clipped_sum(gradients: list[dict[str, Tensor]], C: float) -> dict[str, Tensor]:
    scales = [min(1.0, C / norm(own)) for own in gradients]
    return {name: torch.stack([c * own[name] for c, own in zip(scales, gradients)]).sum(0) for name in gradients[0]}


# Against the loop without privacy


@TRAINED
@KINDS
def test_without_noise_and_clip_and_with_all_rows_it_is_the_loop_without_privacy(
    kind: str, trains: tuple[str, ...], blocks: int, tmp_path: Path
) -> None:
    ours, theirs = (filled(adapter(kind, tmp_path), blocks) for _ in range(2))
    before = everything(ours)
    private_fit(ours, trains, rows(), OPEN, train_round=2, rounds=3)
    open_fit(theirs, trains, rows(), train_round=2, rounds=3)
    assert_close(everything(ours), everything(theirs))
    moved = {name for name, x in everything(ours).items() if not torch.equal(x, before[name])}
    # All that is trained, the factors and the head, and nothing that is frozen.
    assert moved == trained(ours).keys()
    assert any("modules_to_save" in name for name in moved)
    assert sum(".lora_" in name for name in moved) == len(ours.layers) * (2 if len(trains) == 2 or blocks == 2 else 1)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_so_it_is_for_a_causal_model_whose_replies_are_equally_long(kind: str, tmp_path: Path) -> None:
    ours, theirs = (filled(adapter(kind, tmp_path, causal=True)) for _ in range(2))
    private_fit(ours, ("A", "B"), rows(head=False), OPEN)
    open_fit(theirs, ("A", "B"), rows(head=False))
    assert_close(everything(ours), everything(theirs))


def test_an_optimizer_that_is_kept_goes_on_as_without_privacy(tmp_path: Path) -> None:
    training = replace(SGD, optim="adamw_torch", learning_rate=1e-3, optimizer_state="keep", max_steps=2)
    ours, theirs = (filled(adapter("bert", tmp_path)) for _ in range(2))
    mine, other = dict[str, Tensor](), dict[str, Tensor]()
    for train_round in (1, 2):
        place = {"training": training, "train_round": train_round, "rounds": 2}
        mine = private_fit(ours, ("A", "B"), rows(), OPEN, optimizer_state=mine, **place).optimizer
        other = open_fit(theirs, ("A", "B"), rows(), optimizer_state=other, **place).optimizer
    assert mine["0.step"] == 4
    assert_close(mine, other)
    assert_close(everything(ours), everything(theirs), atol=1e-5)


@pytest.mark.parametrize("blocks", [0, 4, 2])
@KINDS
def test_a_bfloat16_base_and_autocast_come_close_to_the_same_loop_without_privacy(
    kind: str, blocks: int, tmp_path: Path
) -> None:
    trains = ("R",) if blocks else ("A", "B")
    for dtype, bf16 in ((torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True)):
        ours, theirs = (filled(adapter(kind, tmp_path, dtype), blocks) for _ in range(2))
        before = everything(ours)
        training = replace(SGD, max_steps=2, bf16=bf16, per_device_train_batch_size=5)
        private_fit(ours, trains, rows(), OPEN, training=training)
        open_fit(theirs, trains, rows(), training=replace(training, per_device_train_batch_size=12))
        mine, other = trained(ours), trained(theirs)
        far = norm({name: x - before[name] for name, x in other.items()})
        apart = norm({name: x - other[name] for name, x in mine.items()})
        assert apart < 0.02 * far, f"{dtype}, autocast {bf16}"
        assert not any(torch.equal(x, before[name]) for name, x in mine.items())


def test_dropout_is_on_follows_the_secret_and_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    results = []
    for noise, seed in ((OPEN, 1), (OPEN, 2), (replace(OPEN, seed=2), 1)):
        own = filled(adapter("bert", tmp_path, dropout=0.3))
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        private_fit(own, ("A", "B"), rows(), noise)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not own.model.training
        results.append(everything(own))
    assert all(torch.equal(x, results[1][name]) for name, x in results[0].items())
    assert not all(torch.equal(x, results[2][name]) for name, x in results[0].items())


# The clip, row by row


@TRAINED
@KINDS
def test_each_row_is_clipped_over_all_parameters_together_whatever_part_of_the_batch_it_is_in(
    kind: str, trains: tuple[str, ...], blocks: int, tmp_path: Path
) -> None:
    own, examples = filled(adapter(kind, tmp_path), blocks), rows()
    gradients = [gradient_of(own, trains, example) for example in examples]
    C = sorted(norm(g) for g in gradients)[6]  # half of the rows are clipped, half are not
    expected = {name: x / len(examples) for name, x in clipped_sum(gradients, C).items()}
    for size in (1, 5, 12):
        training = replace(STEP, per_device_train_batch_size=size)
        assert_close(step_of(own, trains, examples, replace(OPEN, max_grad_norm=C), training=training), expected, atol=1e-5)


def test_the_gradients_of_causal_rows_with_unequal_replies_are_those_of_each_row_alone(tmp_path: Path) -> None:
    own = filled(adapter("llama", tmp_path, causal=True))
    unequal = [Example(e.input_ids, [-100, -100, *e.input_ids[2:]]) for e in rows(head=False)]
    expected = clipped_sum([gradient_of(own, ("A", "B"), example) for example in unequal], 1e6)
    got = step_of(own, ("A", "B"), unequal, OPEN)
    assert_close(got, {name: x / len(unequal) for name, x in expected.items()}, atol=1e-5)


def mean_over_the_batch(model: torch.nn.Module, batch: Mapping[str, Tensor], bf16: bool) -> Tensor:
    """A planted mistake: the loss as it is without privacy, per row. A row's share depends on the lengths of the others."""
    labels, logits = batch["labels"][:, 1:], fit.logits_of(model, batch, bf16)[:, :-1]
    tokens = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    return tokens.sum(1) / (labels != -100).sum() * len(labels)


@pytest.mark.parametrize(("losses", "right"), [(private.row_losses, True), (mean_over_the_batch, False)])
def test_a_rows_loss_is_its_own_and_a_mean_over_the_batch_would_be_found_out(
    losses: Callable[..., Tensor], right: bool, tmp_path: Path
) -> None:
    own = adapter("llama", tmp_path, causal=True)
    unequal = [Example(e.input_ids, [-100, -100, *e.input_ids[2:]]) for e in rows(head=False)]
    with torch.no_grad():
        together = losses(own.model, collate(unequal, 0), False)
        alone = torch.stack([fit.loss_of(own.model, collate([example], 0), False) for example in unequal])
    assert together.shape == (len(unequal),)
    assert torch.allclose(together, alone, atol=1e-5) == right


def test_a_row_without_a_reply_has_no_loss(tmp_path: Path) -> None:
    own = adapter("llama", tmp_path, causal=True)
    silent = Example([5, 6, 7], [-100] * 3)
    losses = private.row_losses(own.model, collate([silent, *rows(2, head=False)], 0), False)
    assert losses[0] == 0
    assert (losses[1:] > 0).all()


@pytest.mark.parametrize("function", ["fit", "gradient"])
@KINDS
def test_one_row_more_or_less_changes_the_sum_by_no_more_than_the_clip(kind: str, function: str, tmp_path: Path) -> None:
    own, C = filled(adapter(kind, tmp_path)), 0.01 if function == "fit" else 0.002
    noise = replace(OPEN, max_grad_norm=C)

    def total(examples: list[Example]) -> dict[str, Tensor]:
        if function == "fit":
            moved = step_of(own, ("A", "B"), examples, noise)
        else:
            moved = private.gradient(own, examples, STEP, 0, noise)
        return {name: x.double() * len(examples) for name, x in moved.items()}

    everybody = total(rows())
    for left_out in (0, 5, 11):
        others = total([example for i, example in enumerate(rows()) if i != left_out])
        change = norm({name: x - others[name] for name, x in everybody.items()})
        assert change == pytest.approx(C, rel=2e-2)  # every row here is longer than C, and counts for all of it
        assert change < C * (1 + 1e-3)


def test_a_head_in_bfloat16_is_clipped_in_float32(tmp_path: Path) -> None:
    """In bfloat16 the factor of (2) is up to 0.4 % too large, for one C more than for another."""
    own = filled(adapter("bert", tmp_path, torch.bfloat16))
    parameters = [*own.trainable(("A", "B")), *own.plain_parameters.values()]
    assert {p.dtype for p in parameters} == {torch.float32, torch.bfloat16}
    own.model.train()

    def sums(C: float) -> tuple[float, float]:
        """The norm of the sum over one row, twelve times, of the head and of all parameters."""
        with private.hooked(own, parameters, replace(OPEN, max_grad_norm=C), 1, 1) as rows_gradient:
            rows_gradient(rows(1) * 12, STEP, 0)
            found = {str(i): p.grad.float() for i, p in enumerate(parameters) if p.grad is not None}
        return norm({i: x for i, x in found.items() if parameters[int(i)].dtype == torch.bfloat16}), norm(found)

    head, everywhere = sums(1e6)
    for i in range(20):
        C = 0.01 * 1.05**i
        # What is left is the rounding of the sum's numbers, each by itself.
        assert sums(C) == pytest.approx((12 * C * head / everywhere, 12 * C), rel=2.5e-3)


def test_a_row_whose_gradient_is_not_finite_counts_for_nothing_and_stops_nobody(tmp_path: Path) -> None:
    own = filled(adapter("bert", tmp_path))
    with torch.no_grad():
        own.model.get_input_embeddings().weight[30] = float("inf")
    spoilt = [*rows(), Example([4, 30, 5], 0)]
    expected = step_of(own, ("A", "B"), rows(), OPEN)
    got = step_of(own, ("A", "B"), spoilt, OPEN)
    assert_close({name: x * len(spoilt) / len(rows()) for name, x in got.items()}, expected)
    weights = private.gradient(own, rows(), STEP, 0, OPEN)
    got = private.gradient(own, spoilt, STEP, 0, OPEN)
    assert_close({name: x * len(spoilt) / len(rows()) for name, x in got.items()}, weights)


def test_parameters_that_are_no_longer_finite_stop_the_client_with_advice(tmp_path: Path) -> None:
    own = filled(adapter("bert", tmp_path))
    with pytest.raises(FloatingPointError, match=r"not finite after step \d; lower training.learning_rate"):
        private_fit(own, ("A", "B"), rows(), OPEN, training=replace(SGD, learning_rate=1e38, max_steps=9))


def test_a_penalty_on_the_factors_is_neither_clipped_nor_divided(tmp_path: Path) -> None:
    method = HetLoRA(gamma=0.5, regularization=3.0)
    own, C = filled(adapter("bert", tmp_path)), 1e-3
    without = step_of(own, ("A", "B"), rows(), replace(OPEN, max_grad_norm=C))
    own.trainable(("A", "B"))
    penalties = [method.penalty(factors) for factors in own.live().values()]
    sum(x for x in penalties if x is not None).backward()  # type: ignore[union-attr]
    named = own.model.named_parameters()
    alone = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named if p.requires_grad}
    own.model.zero_grad(set_to_none=True)
    assert norm(alone) > 1000 * C
    got = step_of(own, ("A", "B"), rows(), replace(OPEN, max_grad_norm=C), method=method)
    assert_close(got, {name: x + without[name] for name, x in alone.items()}, atol=1e-5)


def test_a_method_may_have_the_client_give_up_directions_afterwards(tmp_path: Path) -> None:
    own = filled(adapter("bert", tmp_path))
    strong = HetLoRA(gamma=0.5, regularization=0.3)
    private_fit(own, ("A", "B"), rows(), OPEN, training=replace(SGD, max_steps=3, learning_rate=0.1), method=strong)
    assert {factors["A"].shape[0] for factors in own.read().values()} == {2}


# Noise


def assert_standard_normal(z: Tensor, what: str) -> None:
    count = z.numel()
    assert abs(float(z.mean())) < 5 / math.sqrt(count), what
    assert abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2 / count), what


def test_the_noise_on_every_parameter_has_the_deviation_that_is_accounted_for(tmp_path: Path) -> None:
    own, noise = filled(adapter("bert", tmp_path)), Noise(2.0, 0.5, 0.25, seed=5)
    exact = step_of(own, ("A", "B"), rows(), replace(noise, multiplier=0.0))
    noised = step_of(own, ("A", "B"), rows(), noise)
    found = {name: (x - exact[name]) / (2.0 * 0.5 / (0.25 * 12)) for name, x in noised.items()}
    for name, z in found.items():
        assert_standard_normal(z, name)
    flat = torch.cat([z.flatten() for z in found.values()])
    assert_standard_normal(flat, "all")
    assert len(flat.unique()) > 0.99 * len(flat)  # no numbers twice, in no two layers
    # The kurtosis of a normal distribution is 3; that of uniform noise would be 1.8.
    assert abs(float(flat.pow(4).mean()) - 3) < 5 * math.sqrt(96 / len(flat))


def test_the_noise_of_the_first_gradient_has_the_deviation_that_is_accounted_for(tmp_path: Path) -> None:
    own, noise = filled(adapter("gpt2", tmp_path)), Noise(3.0, 0.2, 0.5, seed=5)
    exact = private.gradient(own, rows(), STEP, 0, replace(noise, multiplier=0.0))
    noised = private.gradient(own, rows(), STEP, 0, noise)
    found = {name: (x - exact[name]) / (3.0 * 0.2 / (0.5 * 12)) for name, x in noised.items()}
    for name, z in found.items():
        assert_standard_normal(z, name)
    one, two = (z.flatten() for name, z in found.items() if name.endswith("c_attn"))
    assert abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 5 / math.sqrt(len(one))  # each layer has its own


def test_every_step_and_every_round_has_noise_of_its_own(tmp_path: Path) -> None:
    own, noise = filled(adapter("bert", tmp_path)), Noise(1.0, 1.0, 1e-9, seed=5)
    kept = replace(STEP, optim="sgd")
    one = step_of(own, ("A", "B"), rows(), noise, training=kept)
    two = step_of(own, ("A", "B"), rows(), noise, training=replace(kept, max_steps=2))
    later = step_of(own, ("A", "B"), rows(), noise, train_round=2, rounds=2)
    noises = [one, {name: x - one[name] for name, x in two.items()}, later]
    flat = [torch.cat([x.flatten() for x in own.values()]) for own in noises]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(float(torch.corrcoef(torch.stack([flat[i], flat[j]]))[0, 1])) < 5 / math.sqrt(len(flat[0]))


def test_an_empty_batch_is_a_step_of_noise_alone(tmp_path: Path) -> None:
    own, seen = filled(adapter("bert", tmp_path)), list[tuple[int, int]]()
    before = everything(own)
    never = Noise(0.0, 1.0, 1e-12, seed=3)
    fitted = private_fit(
        own, ("A", "B"), rows(), never, training=replace(STEP, max_steps=2), progress=lambda *at: seen.append(at)
    )
    assert all(torch.equal(x, before[name]) for name, x in everything(own).items())
    assert (fitted.steps, seen) == (2, [(1, 2), (2, 2)])
    assert math.isnan(fitted.loss)
    # 12e-12 rows are expected; the noise is divided by them like any gradient.
    noised = step_of(own, ("A", "B"), rows(), replace(never, multiplier=1e-12))
    assert noised.keys() == trained(own).keys()
    for name, x in noised.items():
        assert_standard_normal(x * 12, name)
    assert all(float(x.abs().max()) == 0 for x in private.gradient(own, rows(), STEP, 0, never).values())


# Which rows


def test_the_step_is_over_the_rows_drawn_and_divided_by_how_many_are_expected(tmp_path: Path) -> None:
    own, examples, sizes = filled(adapter("bert", tmp_path)), rows(), set[int]()
    gradients = [gradient_of(own, ("A", "B"), example) for example in examples]
    for seed in range(4):
        noise = Noise(0.0, 1e6, 0.4, seed)
        drawn = Secret(seed, "sampling", 1).poisson(12, 0.4)
        sizes.add(len(drawn))
        expected = clipped_sum([gradients[i] for i in drawn], 1e6)
        got = step_of(own, ("A", "B"), examples, noise)
        assert_close(got, {name: x / (0.4 * 12) for name, x in expected.items()}, atol=1e-5)
    assert len(sizes) > 1


def test_rows_are_drawn_at_the_rate_asked_each_by_itself() -> None:
    secret, count, n, q = Secret(1, "sampling"), 6000, 20, 0.3
    drawn = torch.zeros(count, n, dtype=torch.float64)
    for i in range(count):
        drawn[i, secret.poisson(n, q)] = 1
    assert ((drawn.mean(0) - q).abs() < 5 * math.sqrt(q * (1 - q) / count)).all()
    covariance = torch.cov(drawn.T) - q * (1 - q) * torch.eye(n)
    off = covariance[~torch.eye(n, dtype=torch.bool)]
    assert (off.abs() < 5 * q * (1 - q) / math.sqrt(count)).all()
    # Batches of one size, as without privacy, have no variance; these have that of a binomial distribution.
    assert float(drawn.sum(1).var()) == pytest.approx(n * q * (1 - q), rel=5 * math.sqrt(2 / count))
    # Nor does one batch say anything of the next.
    again = (drawn[1:] * drawn[:-1]).mean(0)
    assert ((again - q * q).abs() < 6 * q / math.sqrt(count)).all()


def test_no_more_rows_than_the_physical_batch_are_looked_at_in_one_go(tmp_path: Path) -> None:
    own, sizes = filled(adapter("bert", tmp_path)), list[int]()
    watch = own.model.register_forward_pre_hook(lambda _, __, given: sizes.append(len(given["input_ids"])), with_kwargs=True)
    training = replace(STEP, per_device_train_batch_size=5, gradient_accumulation_steps=2)
    private_fit(own, ("A", "B"), rows(), OPEN, training=training)
    watch.remove()
    assert sizes == [5, 5, 2]


def test_accumulated_steps_make_the_batch_larger_and_never_larger_than_all_rows() -> None:
    training = Training(per_device_train_batch_size=8, gradient_accumulation_steps=3)
    assert private.sample_rate(training, 96) == 0.25
    assert private.sample_rate(training, 10) == 1.0


# The secret


def test_the_same_secret_gives_the_same_bits_and_another_one_other_batches_and_other_noise(tmp_path: Path) -> None:
    own = filled(adapter("bert", tmp_path))
    # The last one differs from the first in bits that PyTorch's own generator on a CPU passes over.
    seeds = [7, 7, 8, 7 + 2**32]
    steps = [step_of(own, ("A", "B"), rows(), Noise(1.0, 1.0, 0.5, seed)) for seed in seeds]
    starts = [private.gradient(own, rows(), STEP, 0, Noise(1.0, 1.0, 0.5, seed)) for seed in seeds]
    for found in (steps, starts):
        assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())
        for other in found[2:]:
            assert not any(torch.equal(x, other[name]) for name, x in found[0].items())
    batches = [tuple(Secret(seed, "sampling", 1).poisson(64, 0.5)) for seed in seeds]
    assert len(set(batches)) == 3


def test_nothing_public_decides_the_noise(tmp_path: Path) -> None:
    """All that a server could know is the same, PyTorch's random state too; the secret is not."""
    results = []
    for seed in (7, 8):
        own = filled(adapter("bert", tmp_path))
        torch.manual_seed(0)
        results.append(step_of(own, ("A", "B"), rows(), Noise(1.0, 1.0, 1.0, seed)))
    flat = [torch.cat([x.flatten() for x in own.values()]) for own in results]
    exact = torch.cat([x.flatten() for x in step_of(own, ("A", "B"), rows(), Noise(0.0, 1.0, 1.0, 0)).values()])
    z = [x - exact for x in flat]
    assert abs(float(torch.corrcoef(torch.stack(z))[0, 1])) < 5 / math.sqrt(len(exact))


def test_the_stream_is_that_of_shake_256_over_secret_purpose_and_count() -> None:
    key = repr((9, "noise", 3)).encode()
    secret = Secret(9, "noise", 3)
    for count in (0, 1):
        stream = hashlib.shake_256(key + count.to_bytes(8, "big")).digest(16)
        expected = [((int.from_bytes(stream[i : i + 8], "little") >> 11) + 0.5) / 2**53 for i in (0, 8)]
        assert secret.uniform(2).tolist() == expected
    assert Secret(9, "noise", 3).uniform(2).tolist() != Secret(9, "sampling", 3).uniform(2).tolist()


def test_many_normal_numbers_are_normal_and_never_the_same_twice() -> None:
    z = Secret(1, "noise").normal(torch.Size([2**20 + 3])).double()
    assert_standard_normal(z, "all")
    for bound in (1.0, 2.0, 4.0):
        share = math.erfc(bound / math.sqrt(2))
        assert abs(float((z.abs() > bound).double().mean()) - share) < 5 * math.sqrt(share / len(z))
    for lag in (1, 2**19, 2**20):  # next to each other, one pair of Box and Muller's, one piece and the next
        count = len(z) - lag
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 6 / math.sqrt(count)


def test_the_secret_is_in_no_message(tmp_path: Path) -> None:
    seed = 123456789012345
    assert str(seed) not in repr(Noise(1.0, 1.0, 0.5, seed))
    for wrong in ({"multiplier": -1.0}, {"max_grad_norm": 0.0}, {"sample_rate": 0.0}, {"sample_rate": 1.5}):
        with pytest.raises(ValueError, match="allowed: multiplier") as caught:
            Noise(**({"multiplier": 1.0, "max_grad_norm": 1.0, "sample_rate": 0.5, "seed": seed} | wrong))  # type: ignore[arg-type]
        assert str(seed) not in str(caught.value)


# The model, before and after


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """All hooks and attributes of every module and parameter."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = [dict(value) for key, value in vars(module).items() if key.endswith("_hooks")]
        found[name] = (sorted(vars(module)), hooks)
    return found | {f"{name}|": sorted(vars(p)) for name, p in model.named_parameters()}


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_opacus_is_left_and_the_next_client_gets_the_same_bits(fails: bool, blocks: int, tmp_path: Path) -> None:
    trains = ("R",) if blocks else ("A", "B")
    ours, theirs = (filled(adapter("bert", tmp_path), blocks) for _ in range(2))
    start, before = everything(ours), state_of(ours.model)

    def stop(step: int, steps: int) -> None:
        if fails and step == 2:
            raise KeyboardInterrupt

    try:
        private_fit(ours, trains, rows(), Noise(1.0, 1.0, 0.5, 3), progress=stop)
    except KeyboardInterrupt:
        assert fails
    assert all(p.grad is None for p in ours.model.parameters())
    private.gradient(ours, rows(), STEP, 0, Noise(1.0, 1.0, 0.5, 3))
    assert state_of(ours.model) == before
    assert all(p.grad is None for p in ours.model.parameters())
    with torch.no_grad():
        for name, p in ours.model.named_parameters():
            p.copy_(start[name])
    open_fit(ours, trains, rows())
    open_fit(theirs, trains, rows())
    assert all(torch.equal(x, everything(theirs)[name]) for name, x in everything(ours).items())


def test_what_moves_is_the_models_own_also_after_it_was_moved_reloaded_and_given_another_rank(tmp_path: Path) -> None:
    """meta-pytorch/opacus#820: an optimizer that held other tensors than the model trained nothing, and nobody saw it."""
    own = filled(adapter("bert", tmp_path))
    private_fit(own, ("A", "B"), rows(), Noise(1.0, 1.0, 0.5, 3))
    own.model.to(torch.float64).to(torch.float32)
    history, tensors = own.state()
    own.restart(5)
    own.set_state(history, tensors)
    own.write({layer: {"A": f["A"][:2] + 0.1, "B": f["B"][:, :2] + 0.1} for layer, f in own.read().items()})
    gradients = [gradient_of(own, ("A", "B"), example) for example in rows()]
    predicted = clipped_sum(gradients, 0.5)
    before = everything(own)
    private_fit(own, ("A", "B"), rows(), replace(OPEN, max_grad_norm=0.5), training=STEP)
    after = everything(own)
    for name, x in predicted.items():
        torch.testing.assert_close(before[name] - after[name], x / 12, atol=1e-5, rtol=1e-3)
        assert not torch.equal(before[name], after[name]), name
    assert {name for name in before if not torch.equal(before[name], after[name])} == predicted.keys()
    read = {name for factors in own.read().values() for name in factors}
    assert read == {"A", "B"}


def test_a_layer_that_nothing_reads_moves_by_noise_alone_and_keeps_no_memory(tmp_path: Path) -> None:
    """BERT's pooler is computed, and a head on the mean does not look at it: Opacus sees its way in and never its way back."""
    folder, kept = tmp_path / "bert", list[str]()
    folder.mkdir()
    with quiet():
        base = PooledClassifier(AutoModel.from_pretrained(str(tiny.bert(folder))), 3)
    base.requires_grad_(False)
    own = filled(Adapter(base, Lora(r=2, target_modules=["query", "pooler.dense"]), ["classifier"], 1))

    def look(*_: int) -> None:
        kept.extend(name for name, module in own.model.named_modules() if "activations" in vars(module))

    exact = step_of(own, ("A", "B"), rows(), OPEN, training=replace(STEP, max_steps=3), progress=look)
    assert kept == []
    unread = [name for name in exact if "pooler" in name]
    assert len(unread) == 2
    assert all(float(exact[name].abs().max()) == 0 for name in unread)
    noised = step_of(own, ("A", "B"), rows(), Noise(1.0, 1.0, 1.0, 3))
    assert all(float(noised[name].abs().min()) > 0 for name in unread)
    start = private.gradient(own, rows(), STEP, 0, OPEN)
    assert float(start["pooler.dense"].abs().max()) == 0
    assert float(private.gradient(own, rows(), STEP, 0, Noise(1.0, 1.0, 1.0, 3))["pooler.dense"].abs().min()) > 0


class Flat(torch.nn.Module):
    """A layer that sees tokens one after the other and not rows, as an expert among others does."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def test_a_layer_that_does_not_see_row_by_row_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    with quiet():
        base: Any = AutoModelForCausalLM.from_pretrained(str(tiny.llama(folder)))
    base.model.layers[0].mlp.up_proj = Flat(base.model.layers[0].mlp.up_proj)
    base.requires_grad_(False)
    own = filled(Adapter(base, Lora(r=2, target_modules=["inner"]), [], 1))
    with pytest.raises(ConfigError, match=r"inner.*gradients for 12 rows.*lora.target_modules"):
        private_fit(own, ("A", "B"), rows(head=False), OPEN)
    base.mixes = torch.nn.BatchNorm1d(3)
    for function in (lambda: private_fit(own, ("A", "B"), rows(), OPEN), lambda: private.gradient(own, rows(), STEP, 0, OPEN)):
        with pytest.raises(ConfigError, match="'mixes' is a batch normalization"):
            function()


def test_without_opacus_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    with pytest.raises(ConfigError, match=r"pip install 'umbel\[privacy\]'"):
        private_fit(adapter("bert", tmp_path), ("A", "B"), rows(), OPEN)


# The first gradient


@KINDS
def test_the_first_gradient_without_noise_and_clip_over_all_rows_is_the_one_without_privacy(kind: str, tmp_path: Path) -> None:
    own = adapter(kind, tmp_path)
    before = everything(own)
    got = private.gradient(own, rows(), STEP, 0, OPEN)
    assert_close(got, fit.gradient(own, rows(), STEP, 0, seed=1, samples=12))
    for layer, shape in own.layers.items():
        assert got[layer].shape == (shape.d_out, shape.d_in)
        assert got[layer].dtype == torch.float32
    assert all(torch.equal(x, before[name]) for name, x in everything(own).items())
    assert not any(p.requires_grad for p in own.model.parameters())
    assert not own.model.training


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_of_the_first_gradient_is_clipped_over_all_layers_together(
    dtype: torch.dtype, bf16: bool, tmp_path: Path
) -> None:
    own, examples, training = adapter("gpt2", tmp_path, dtype), rows(), replace(STEP, bf16=bf16)
    alone = [private.gradient(own, [example], training, 0, OPEN) for example in examples]
    C = sorted(norm(g) for g in alone)[6]
    got = private.gradient(own, examples, training, 0, replace(OPEN, max_grad_norm=C))
    assert_close(got, {name: x / 12 for name, x in clipped_sum(alone, C).items()}, atol=1e-6)
    assert norm({name: x * 12 for name, x in got.items()}) <= 12 * C * (1 + 1e-5)


def test_the_first_gradient_is_over_the_rows_drawn_and_divided_by_how_many_are_expected(tmp_path: Path) -> None:
    own, examples, noise = adapter("llama", tmp_path), rows(), Noise(0.0, 1e6, 0.4, seed=6)
    drawn = [examples[i] for i in Secret(6, "sampling", "gradient").poisson(12, 0.4)]
    assert 0 < len(drawn) < 12
    alone = clipped_sum([private.gradient(own, [example], STEP, 0, OPEN) for example in drawn], 1e6)
    assert_close(private.gradient(own, examples, STEP, 0, noise), {name: x / 4.8 for name, x in alone.items()})
