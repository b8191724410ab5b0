"""The result as a stock PEFT folder: written, read back, and compared with the run's own model."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from umbel import __version__, algebra
from umbel.client import model as models
from umbel.client.adapter import public_name
from umbel.client.data import Example, collate
from umbel.client.model import Base, PooledClassifier
from umbel.client.prompts import pad_id
from umbel.config import Config
from umbel.record import new_folder

TASK_TYPES = {"choice": "CAUSAL_LM", "instruction": "CAUSAL_LM"}


@dataclass(frozen=True)
class Result:
    """What a run has learned.

    Args:
        product: Per layer (B, A), in units of ΔW: adapter and merges together.
        plain: Trained parameters that are not factors.
        labels: Class names, in the head's order.
        rows: Training rows of all clients.
    """

    product: Mapping[str, tuple[Tensor, Tensor]]
    plain: Mapping[str, Tensor]
    labels: list[str]
    rows: int


class PublishError(RuntimeError):
    """The folder that was written does not reproduce the run's model."""


def write(folder: Path, config: Config, path: str, result: Result) -> None:
    """Writes a stock PEFT folder: per layer B A at scale 1 with its own rank, and the head.

    Args:
        folder: Replaced whole or not at all.
        config: The run's.
        path: Of the base model.
        result: What to write.
    """
    import peft

    factors = {layer: algebra.compact(B, A) for layer, (B, A) in result.product.items()}
    ranks = {layer: A.shape[0] for layer, (_, A) in factors.items()}
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = {layer: r for layer, r in ranks.items() if r != rank}
    pooled = config.model.pooling == "mean"
    stock_head = config.task.kind == "classification" and not pooled
    options = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=sorted(ranks),
        task_type=TASK_TYPES.get(config.task.kind, "FEATURE_EXTRACTION" if pooled else "SEQ_CLS"),
        base_model_name_or_path=path,
        revision=config.model.revision or None,
        inference_mode=True,
        modules_to_save=sorted({name.rpartition(".")[0] for name in result.plain}) if stock_head else None,
    )
    tensors: dict[str, Tensor] = {}
    for layer, (B, A) in factors.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = B.contiguous()
    if stock_head:
        tensors |= {f"base_model.model.{name}": x.contiguous() for name, x in result.plain.items()}
    with new_folder(folder) as temporary:
        options.save_pretrained(str(temporary))
        # PEFT keeps the targets as a set, whose order differs from process to process.
        written = json.loads((temporary / "adapter_config.json").read_text(encoding="utf-8"))
        written["target_modules"] = sorted(ranks)
        (temporary / "adapter_config.json").write_text(json.dumps(written, indent=2, sort_keys=True), encoding="utf-8")
        safetensors.torch.save_file(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
        if pooled:
            head = {name: x.contiguous() for name, x in result.plain.items()}
            safetensors.torch.save_file(head, temporary / "head.safetensors")
        about: dict[str, Any] = {"umbel": __version__, "method": config.method.name}
        about |= {"num_examples": result.rows, "labels": result.labels}
        about["pooling"] = config.model.pooling
        (temporary / "umbel.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(_card(config, path, len(result.labels)), encoding="utf-8")


def _card(config: Config, path: str, labels: int) -> str:
    lines = [
        "---",
        f"base_model: {json.dumps(path)}",
        "library_name: peft",
        "tags: [lora, federated]",
        "---",
        "",
        f"# LoRA adapter from a federated run ({config.method.name}, {config.rounds} rounds)",
        "",
        "Made by umbel. Load it with plain PEFT:",
        "",
        "```python",
    ]
    pooled = config.model.pooling == "mean"
    kind = {"classification": "AutoModel" if pooled else "AutoModelForSequenceClassification"}.get(
        config.task.kind, "AutoModelForCausalLM"
    )
    extra = f", gguf_file={config.model.gguf_file!r}" if config.model.gguf_file else ""
    extra += f", num_labels={labels}" if kind == "AutoModelForSequenceClassification" else ""
    lines += [
        "from peft import PeftModel",
        f"from transformers import {kind}",
        f"model = PeftModel.from_pretrained({kind}.from_pretrained({path!r}{extra}), '.')",
        "```",
    ]
    if pooled:
        lines += [
            "",
            "`head.safetensors` holds the linear head (`classifier.weight`, `classifier.bias`): it reads the mean of "
            "`last_hidden_state` over the tokens that are not padding. Class names are in `umbel.json`, in the head's order.",
        ]
    own = config.privacy
    if own.unit != "none":
        unit = {"example": "single training rows", "client": "what one client sent"}[own.unit]
        lines += ["", f"Differential privacy of {unit}: ε ≤ {own.target_epsilon:g} at δ = {own.target_delta:g}, in this run."]
    return "\n".join(lines) + "\n"


class Stock:
    """A base model fresh from disk, onto which stock PEFT loads one folder after the other.

    Args:
        config: Of a run; the model, task and seed are what counts.
        labels: Classes of the head.
    """

    def __init__(self, config: Config, labels: int) -> None:
        self._config, self._labels = config, labels
        self._base: Base | None = None

    @contextlib.contextmanager
    def loaded(self, folder: Path) -> Iterator[Base]:
        """Yields the base model with a folder's adapter and head on it, and takes them off again.

        Args:
            folder: A PEFT folder that `write` made.

        Raises:
            PublishError: Keys of the folder and of the model do not match.
        """
        import peft

        # Another seed: what the folder lacks must not come out right because it was drawn alike.
        self._base = base = self._base or models.load(self._config, self._labels, seed=self._config.seed + 1)
        head = base.model if isinstance(base.model, PooledClassifier) else None
        carrier = base.model if head is None else head.backbone
        with models.quiet():
            model = peft.PeftModel.from_pretrained(carrier, str(folder))  # type: ignore[arg-type]
        wanted = set(safetensors.torch.load_file(folder / "adapter_model.safetensors"))
        found = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
        if wanted != found:
            raise PublishError(f"{folder}: keys differ from what PEFT loads: {sorted(wanted ^ found)[:4]}")
        try:
            if head is None:
                yield Base(model.eval(), base.tokenizer, base.path, base.heads)
            else:
                saved = safetensors.torch.load_file(folder / "head.safetensors")
                head.classifier.load_state_dict({name.removeprefix("classifier."): x for name, x in saved.items()})
                head.backbone = model
                yield Base(head.eval(), base.tokenizer, base.path, base.heads)
        finally:
            plain: Any = model.unload()
            if hasattr(plain, "peft_config"):
                del plain.peft_config
            if head is not None:
                head.backbone = plain


@torch.inference_mode()
def difference(published: Base, own: nn.Module, examples: list[Example]) -> float:
    """Returns max |Δ logits| / max |logits| of two models on some rows, in full precision."""
    pad = pad_id(published.tokenizer)
    batch = {key: x for key, x in collate(examples, pad).items() if key != "labels"}
    wanted = own(**batch).logits.float()
    got = published.model(**batch).logits.float()
    # Padded positions attend to nothing and hold no meaning.
    if wanted.ndim == 3:
        mask = batch["attention_mask"].bool()
        wanted, got = wanted[mask], got[mask]
    return float((wanted - got).abs().max() / wanted.abs().max().clamp(min=1e-12))


def _factor_errors(model: nn.Module, product: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[float]:
    """Yields per layer the relative distance of what PEFT loaded from what was learned."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            layer: Any = module
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            yield algebra.relative_error((B.detach() * layer.scaling["default"], A.detach()), product[public_name(name)])


def _probe(base: Base, config: Config) -> Example:
    """Returns something to compare on where there are no rows."""
    tokens = base.tokenizer("What was written must be what was learned.")["input_ids"][: config.data.max_length]
    return Example(tokens, 0 if config.task.kind == "classification" else list(tokens))


def publish(folder: Path, config: Config, result: Result, own: Base, stock: Stock, examples: list[Example]) -> dict[str, Any]:
    """Writes the folder, reloads it over a base model fresh from disk, and compares with the run's model.

    Args:
        folder: Replaced whole or not at all.
        config: The run's.
        result: What to write.
        own: The run's model, holding the result.
        stock: Where to load the folder again.
        examples: Rows to compare on; with none, a sentence of ours.

    Returns:
        What `run.json` says of the adapter.

    Raises:
        PublishError: The outputs differ by more than the base model's rounding explains.
    """
    from umbel.record import sha256

    write(folder, config, own.path, result)
    with stock.loaded(folder) as published:
        factors = max(_factor_errors(published.model, result.product))
        apart = difference(published, own.model, examples or [_probe(own, config)])
    # Merged products are rounded to the base weights' precision in the run, and are exact in the folder.
    allowed = {"float32": 1e-4, "bfloat16": 0.2}[config.model.dtype]
    if not apart <= allowed:
        raise PublishError(f"{folder}: reloaded with plain PEFT, logits differ by {apart:.2e} (relative), allowed: {allowed}")
    if not factors <= 1e-5:
        raise PublishError(
            f"{folder}: reloaded with plain PEFT, a layer's ΔW differs by {factors:.2e} (relative), allowed: 1e-5"
        )
    ranks = [B.shape[1] for B, _ in result.product.values()]
    return {
        "sha256": sha256(folder / "adapter_model.safetensors"),
        "reload_max_difference": apart,
        "reload_factor_error": factors,
        "reload_rows": len(examples),
        "largest_rank": max(ranks),
    }
