"""DP-SGD at a client: against the loop without privacy, against gradients row by row, and against its own promises."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny
from umbel.client import fit, private
from umbel.client.adapter import Adapter
from umbel.client.data import Example
from umbel.client.model import quiet
from umbel.client.private import Noise
from umbel.config import Lora, Training

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


TRAINED = [(("A", "B"), 0), (("A",), 0), (("B",), 0), (("R",), 4), (("R",), 2)]


@pytest.mark.parametrize(("trains", "blocks"), TRAINED, ids=["AB", "A", "B", "R", "blocks"])
@pytest.mark.parametrize("kind", TARGETS)
def test_without_noise_and_clip_and_with_all_rows_it_is_the_loop_without_privacy(
    kind: str, trains: tuple[str, ...], blocks: int, tmp_path: Path
) -> None:
    ours, theirs = (filled(adapter(kind, tmp_path), blocks) for _ in range(2))
    before = everything(ours)
    private_fit(ours, trains, rows(), OPEN)
    open_fit(theirs, trains, rows())
    assert_close(everything(ours), everything(theirs))
    moved = {name for name, x in everything(ours).items() if not torch.equal(x, before[name])}
    trained = {name for name, p in ours.model.named_parameters() if p.requires_grad}
    unread = {name for name in trained if "pooler" in name}
    assert moved == trained - unread  # all that is trained, its own and the head's, and nothing frozen
    assert any("modules_to_save" in name for name in moved)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_so_does_a_causal_model_whose_replies_are_equally_long(kind: str, tmp_path: Path) -> None:
    ours, theirs = (filled(adapter(kind, tmp_path, causal=True)) for _ in range(2))
    private_fit(ours, ("A", "B"), rows(head=False), OPEN)
    open_fit(theirs, ("A", "B"), rows(head=False))
    assert_close(everything(ours), everything(theirs))
