"""The local loop against PyTorch and Transformers written out by hand."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, get_scheduler

import tiny
from umbel.client import fit
from umbel.client.adapter import Adapter
from umbel.client.data import Example, collate
from umbel.config import Lora, Training


def examples(rows: int = 10) -> list[Example]:
    draw = torch.Generator().manual_seed(3)
    ids = [torch.randint(4, 20, (4 + i % 5,), generator=draw).tolist() for i in range(rows)]
    return [Example(own, [-100, -100, *own[2:]]) for own in ids]


def adapter(folder: Path, dropout: float = 0.0) -> Adapter:
    base = AutoModelForCausalLM.from_pretrained(str(tiny.llama(folder)))
    base.requires_grad_(False)
    return Adapter(base, Lora(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"], lora_dropout=dropout), [], 1)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.3])
def test_the_schedule_is_that_of_transformers_over_the_whole_run(kind: str, warmup: float) -> None:
    training, total = Training(lr_scheduler_type=kind, warmup_ratio=warmup), 20  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=round(warmup * total), num_training_steps=total)
    for step in range(total):
        assert fit.learning_rate_factor(training, step, total) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_gradient_accumulation_equals_one_large_batch_of_equal_rows(tmp_path: Path) -> None:
    rows = [Example([5, 6, 7, 8], [-100, -100, 7, 8]), Example([9, 5, 4, 6], [-100, -100, 4, 6])]
    results = []
    for size, steps in ((2, 1), (1, 2)):
        own = adapter(tmp_path)
        training = Training(
            per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=3, learning_rate=1e-2, optim="sgd"
        )
        fit.fit(own, ("A", "B"), rows, training, 0, 1, 1, 1, {}, lambda *_: None)
        results.append(own.read())
    for layer, factors in results[0].items():
        for name, x in factors.items():
            torch.testing.assert_close(x, results[1][layer][name], atol=1e-6, rtol=1e-4)


def test_gradient_accumulation_weighs_every_response_token_alike(tmp_path: Path) -> None:
    """Rows of unequal length: two batches of one are the one batch of two, whose loss is a mean over all its tokens."""
    rows = [Example([5, 6, 7, 8, 9, 4, 6], [-100, -100, 7, 8, 9, 4, 6]), Example([9, 5, 4], [-100, -100, 4])]
    results = []
    for size, accumulated in ((2, 1), (1, 2)):
        own = adapter(tmp_path)
        training = Training(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            max_steps=2,
            learning_rate=1e-1,
            optim="sgd",
            max_grad_norm=0,
        )
        fit.fit(own, ("A", "B"), rows, training, 0, 1, 1, 1, {}, lambda *_: None)
        results.append(own.read())
    for layer, factors in results[0].items():
        for name, x in factors.items():
            torch.testing.assert_close(x, results[1][layer][name], atol=1e-7, rtol=1e-4)


def test_batches_depend_on_the_seed_only_and_a_pass_sees_every_row_once() -> None:
    rows = examples(7)
    first, again, other = (fit.batches(rows, 7, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    one = next(first)
    assert one == next(again)
    assert one != next(other)
    assert sorted(e.input_ids for e in one) == sorted(e.input_ids for e in rows)


def test_training_leaves_the_global_random_state_alone_and_repeats_itself_with_dropout(tmp_path: Path) -> None:
    training = Training(max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2)
    state = torch.random.get_rng_state()
    results = []
    for noise in (0, 5):
        own = adapter(tmp_path, dropout=0.3)
        torch.manual_seed(noise)
        fit.fit(own, ("A", "B"), examples(), training, 0, 11, 1, 1, {}, lambda *_: None)
        results.append(own.read())
    assert all(torch.equal(x, results[1][layer][name]) for layer, own in results[0].items() for name, x in own.items())
    torch.random.set_rng_state(state)
    fit.fit(adapter(tmp_path), ("A", "B"), examples(), training, 0, 11, 1, 1, {}, lambda *_: None)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kept", ["keep", "reset"])
def test_rounds_equal_one_loop_written_by_hand(kept: str, tmp_path: Path) -> None:
    """Two rounds of three steps against AdamW and a linear schedule over six steps, batch by batch."""
    training = Training(
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        optimizer_state=kept,
        max_grad_norm=0.5,  # type: ignore[arg-type]
    )
    ours, state = adapter(tmp_path), dict[str, torch.Tensor]()
    for train_round, seed in ((1, 21), (2, 22)):
        state = fit.fit(ours, ("A", "B"), examples(), training, 0, seed, train_round, 2, state, lambda *_: None).optimizer
    assert bool(state) == (kept == "keep")

    theirs = adapter(tmp_path)
    parameters = theirs.trainable(("A", "B"))
    theirs.model.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for train_round, seed in ((0, 21), (1, 22)):
        if kept == "reset":
            optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        stream = fit.batches(examples(), 4, torch.Generator().manual_seed(seed))
        for step in range(3):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 - (3 * train_round + step) / 6)
            batch = collate(next(stream), 0)
            theirs.model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
            optimizer.zero_grad()
    for layer, factors in ours.read().items():
        for name, x in factors.items():
            torch.testing.assert_close(x, theirs.read()[layer][name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_first_gradient_is_the_mean_over_rows_in_the_orientation_of_the_wire(kind: str, tmp_path: Path) -> None:
    targets = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn", "c_fc"]}[kind]
    base = AutoModelForCausalLM.from_pretrained(str(getattr(tiny, kind)(tmp_path)))
    base.config.attn_pdrop = base.config.resid_pdrop = base.config.embd_pdrop = 0.0
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    own = Adapter(base, Lora(r=3, target_modules=targets), [], 1)
    rows = [Example([5, 6, 7, 8], [-100, -100, 7, 8]), Example([9, 5, 4, 6], [-100, -100, 4, 6])] * 2
    got = fit.gradient(own, rows, Training(per_device_train_batch_size=3), 0, seed=4, samples=4)
    weights = own.frozen_weights()
    for weight in weights.values():
        weight.requires_grad_(True)
    own.model(**collate(rows, 0)).loss.backward()
    for layer, weight in weights.items():
        assert weight.grad is not None
        shape = own.layers[layer]
        assert got[layer].shape == (shape.d_out, shape.d_in)
        torch.testing.assert_close(got[layer], own.oriented(layer, weight.grad), atol=1e-6, rtol=1e-3)


def test_a_loss_that_is_not_finite_stops_the_client_with_advice(tmp_path: Path) -> None:
    own = adapter(tmp_path)
    own.trainable(("A", "B"))[0].data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 1; lower training.learning_rate"):
        fit.fit(own, ("A", "B"), examples(), Training(max_steps=1), 0, 1, 1, 1, {}, lambda *_: None)


def test_a_client_that_failed_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    own, training = adapter(tmp_path), Training(max_steps=2, learning_rate=1e-2)
    start = own.read()
    own.trainable(("A", "B"))[0].data.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        fit.fit(own, ("A", "B"), examples(), training, 0, 1, 1, 1, {}, lambda *_: None)
    results = []
    for one in (own, adapter(tmp_path)):
        one.write(start)
        fit.fit(one, ("A", "B"), examples(), training, 0, 1, 1, 1, {}, lambda *_: None)
        results.append(one.read())
    assert all(torch.equal(x, results[1][layer][name]) for layer, own in results[0].items() for name, x in own.items())


def test_a_layer_that_nothing_reads_has_a_gradient_of_zero(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(str(tiny.llama(tmp_path)))
    base.unread = torch.nn.Linear(5, 4)
    own = Adapter(base, Lora(r=3, target_modules=["q_proj", "unread"]), [], 1)
    got = fit.gradient(own, [Example([5, 6, 7, 8], [-100, -100, 7, 8])], Training(), 0, seed=4, samples=1)
    (unread,) = (layer for layer in got if layer.endswith("unread"))
    assert torch.equal(got.pop(unread), torch.zeros(4, 5))
    assert all(x.abs().max() > 0 for x in got.values())
