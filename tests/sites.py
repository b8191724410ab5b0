"""Three sites' adapters of every kind of LoRA, written by PEFT itself, and what plain PEFT in float64 makes of them.

Nothing of umbel is in here: this is the oracle that `umbel merge` is held against.
"""

import copy
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, BertModel

import tiny

ATTENTION = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "intermediate.dense"]}
LLAMA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
GPT2 = {"r": 3, "lora_alpha": 6, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
ALL_LINEAR = {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}
PATTERNS = {"rank_pattern": {"layer.1.attention.self.query": 2}, "alpha_pattern": {"intermediate.dense": 5}}


@dataclass(frozen=True)
class Kind:
    """One kind of LoRA: the base model, and each site's options of PEFT.

    Args:
        base: Writes the base model into a folder.
        loader: The stock class that reads it.
        sites: Options of `peft.LoraConfig`, one entry per site.
        dtype: Of the tensors in the sites' files.
        shards: Files that each site's tensors are spread over.
    """

    base: Callable[[Path], Path]
    loader: Any
    sites: tuple[dict[str, Any], ...]
    dtype: torch.dtype = torch.float32
    shards: int = 1

    @property
    def one_rank(self) -> bool:
        """True where all sites have the same rank in each layer that they adapt."""
        return len({(site["r"], json.dumps(site.get("rank_pattern"))) for site in self.sites}) == 1


def _all(base: Callable[[Path], Path], loader: Any, options: dict[str, Any], **rest: Any) -> Kind:
    return Kind(base, loader, (options,) * 3, **rest)


def _each(base: Callable[[Path], Path], loader: Any, options: dict[str, Any], *own: dict[str, Any]) -> Kind:
    return Kind(base, loader, tuple({**options, **changes} for changes in own))


def _twelve_layers(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=24)
    BertModel(config).save_pretrained(str(folder))
    return folder


class Tangle(nn.Module):
    """A model of nobody's library, whose modules' names are easily taken for each other: h.1.q, h_1.q and x.h.1.q."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.h = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(16, 16)}) for _ in range(2))
        self.h_1 = nn.ModuleDict({"q": nn.Linear(16, 16)})
        self.x = nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(16, 16)}) for _ in range(2))})

    @classmethod
    def from_pretrained(cls, folder: Path | None, dtype: torch.dtype = torch.float32) -> "Tangle":
        torch.manual_seed(0)
        return cls().to(dtype)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        y = self.embed(input_ids) * attention_mask[..., None]
        for block in (*self.h, self.h_1, *self.x["h"]):  # type: ignore[misc]
            y = y + torch.tanh(block["q"](y))
        return SimpleNamespace(last_hidden_state=y)


KINDS: dict[str, Kind] = {
    "linear": _all(tiny.bert, AutoModel, ATTENTION),
    "grouped queries": _all(tiny.llama, AutoModelForCausalLM, LLAMA),
    "Conv1D": _all(tiny.gpt2, AutoModelForCausalLM, GPT2),
    "mixed ranks": _each(tiny.bert, AutoModel, ATTENTION, {"r": 2}, {"r": 4}, {"r": 7}),
    "mixed alpha": _each(tiny.llama, AutoModelForCausalLM, LLAMA, {"lora_alpha": 2}, {"lora_alpha": 8}, {"lora_alpha": 12}),
    "rsLoRA at one site": _each(tiny.llama, AutoModelForCausalLM, LLAMA, {}, {"use_rslora": True}, {}),
    "more rank than the matrix has": _all(tiny.llama, AutoModelForCausalLM, LLAMA | {"r": 12}),
    "patterns": _all(tiny.bert, AutoModel, ATTENTION | PATTERNS),
    "patterns and rsLoRA, unlike": _each(
        tiny.bert,
        AutoModel,
        ATTENTION,
        PATTERNS,
        {"rank_pattern": {r"^encoder\.layer\.0\.intermediate\.dense": 6}, "use_rslora": True},
        {"alpha_pattern": {"query": 3, "layer.0.intermediate.dense": 1.5}},
    ),
    "layers 1 and 11 of unlike rank": _all(
        _twelve_layers,
        AutoModel,
        {
            "r": 2,
            "lora_alpha": 9,
            "target_modules": ["query", "value"],
            "rank_pattern": {r"layer\.1\.attention\.self\.query": 5},
        },
    ),
    "names that look alike": _all(
        lambda folder: folder,
        Tangle,
        {"r": 3, "lora_alpha": 2, "target_modules": ["q"], "rank_pattern": {r"^h\.1\.q": 5, r"^x\.h\.1\.q": 1}},
    ),
    "all linear layers, but for some": _each(
        tiny.bert,
        AutoModel,
        ALL_LINEAR,
        {},
        {"exclude_modules": ["key", "output.dense"]},
        {"target_modules": r".*\.(query|key)"},
    ),
    "other beginnings": _each(
        tiny.bert,
        AutoModel,
        ATTENTION,
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False, "lora_dropout": 0.3},
        {"init_lora_weights": "orthogonal"},
    ),
    "layers that a site lacks": _each(
        tiny.bert,
        AutoModel,
        ATTENTION,
        {"target_modules": ["query"]},
        {"target_modules": ["query", "intermediate.dense"]},
        {"target_modules": ["value", "intermediate.dense"], "layers_to_transform": [1]},
    ),
    "embedding": _all(tiny.bert, AutoModel, ATTENTION | {"target_modules": ["word_embeddings", "query"]}),
    "embedding saved whole, too": _all(
        tiny.llama, AutoModelForCausalLM, LLAMA | {"target_modules": ["embed_tokens", "q_proj"]}
    ),
    "head": _all(tiny.bert, AutoModelForSequenceClassification, ATTENTION | {"task_type": "SEQ_CLS"}),
    "biases of adapted layers": _all(tiny.bert, AutoModel, ATTENTION | {"bias": "lora_only"}),
    "all biases": _all(tiny.bert, AutoModel, ATTENTION | {"bias": "all"}),
    "bfloat16": _all(tiny.llama, AutoModelForCausalLM, LLAMA, dtype=torch.bfloat16),
    "float64": _all(tiny.gpt2, AutoModelForCausalLM, GPT2, dtype=torch.float64),
    "float16": _all(tiny.bert, AutoModel, ATTENTION, dtype=torch.float16),
    "shards": _all(tiny.bert, AutoModel, ATTENTION, shards=3),
}

Factors = dict[str, tuple[Tensor, Tensor]]
"""Per layer (B, A), d_out × r and r × d_in in float64, whose product is what the adapter adds."""


@dataclass(frozen=True)
class Sites:
    """Adapters on disk and the base model they belong to."""

    kind: Kind
    model: Path
    folders: tuple[Path, ...]

    def base(self) -> nn.Module:
        """Returns a base model as it is on disk, in float64; a head that it lacks is drawn alike every time."""
        return copy.deepcopy(self._base)

    @cached_property
    def _base(self) -> nn.Module:
        torch.manual_seed(5)
        return self.kind.loader.from_pretrained(self.model, dtype=torch.float64).eval()

    def loaded(self, folder: Path) -> PeftModel:
        """Returns base and adapter in float64, as stock PEFT loads them."""
        with quiet():
            model = PeftModel.from_pretrained(self.base(), str(_whole(folder)))
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        return model.eval()

    def weights_with(self, folder: Path) -> dict[str, Tensor]:
        """Returns all parameters of the base model with an adapter merged into it by PEFT."""
        with quiet():
            return dict(self.loaded(folder).merge_and_unload().named_parameters())

    def exact(self, shares: Sequence[float]) -> dict[str, Tensor]:
        """Returns base + Σ p_k ΔW_k, heads and biases as well, each ΔW_k taken from a whole model that PEFT has merged.

        A layer that a site lacks is the base's own there, so it adds zero.
        """
        total = {name: x.detach().clone() for name, x in self._base.named_parameters()}
        for p, updates in zip(shares, self._updates):
            for name, x in updates.items():
                total[name] += p * x
        return total

    @cached_property
    def _updates(self) -> list[dict[str, Tensor]]:
        return [self.updates(self.weights_with(folder)) for folder in self.folders]

    def updates(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns what some weights have more than the base's, where anything."""
        base = dict(self._base.named_parameters())
        return {name: (x - base[name]).detach() for name, x in weights.items() if not torch.equal(x, base[name])}

    @cached_property
    def factors(self) -> list[Factors]:
        """Every site's factors as PEFT holds them, its scale multiplied into B."""
        return [self._factors(folder) for folder in self.folders]

    def matrices(self, layer: str) -> tuple[list[Tensor], list[Tensor]]:
        """Returns (all sites' B, all sites' A) of a layer that every site adapts."""
        return [own[layer][0] for own in self.factors], [own[layer][1] for own in self.factors]

    def _factors(self, folder: Path) -> Factors:
        result: Factors = {}
        for name, layer in adapted(self.loaded(folder)).items():
            if layer.lora_embedding_A:
                A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
            else:
                A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            result[name] = (B.detach() * layer.scaling["default"], A.detach())
        return result

    def outputs(self, model: nn.Module) -> Tensor:
        """Returns a model's logits, or last hidden states, on a batch of three rows."""
        ids = torch.randint(4, 20, (3, 9), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return out.logits if hasattr(out, "logits") else out.last_hidden_state

    def outputs_with(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Returns the base model's outputs when its parameters are these."""
        model = self.base()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        return self.outputs(model)


def made(kind: Kind, folder: Path) -> Sites:
    """Writes the base model and every site's adapter into a folder, with random factors on both sides."""
    (folder / "model").mkdir(parents=True)
    model = kind.base(folder / "model")
    folders = tuple(folder / f"site-{'abc'[k]}" for k in range(len(kind.sites)))
    for k, (options, place) in enumerate(zip(kind.sites, folders)):
        torch.manual_seed(5)
        with quiet():
            peft_model = get_peft_model(kind.loader.from_pretrained(model), LoraConfig(**options))
        train(peft_model, seed=100 + k)
        _save(peft_model, kind, place)
    return Sites(kind, model, folders)


def train(model: PeftModel, seed: int) -> None:
    """Gives everything that has a gradient other values, of a size that changes the outputs."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.copy_(0.3 * noise if "lora_" in name else parameter + 0.2 * noise)


def _save(model: PeftModel, kind: Kind, place: Path) -> None:
    with quiet():
        model.save_pretrained(str(place))
    file = place / "adapter_model.safetensors"
    tensors = {name: x.to(kind.dtype) for name, x in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    if kind.shards > 1:
        spread(place, kind.shards)


def spread(place: Path, shards: int) -> None:
    """Spreads a folder's tensors over several files and an index, as huggingface_hub does."""
    file = place / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    files = [f"adapter_model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    placed = {name: files[i % shards] for i, name in enumerate(sorted(tensors))}
    for one in files:
        save_file({name: tensors[name] for name in placed if placed[name] == one}, place / one, {"format": "pt"})
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": placed}
    (place / "adapter_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _whole(folder: Path) -> Path:
    """Returns a folder whose tensors are in one file, which is all that PEFT can load."""
    index = folder / "adapter_model.safetensors.index.json"
    if not index.exists():
        return folder
    whole = folder.with_name(folder.name + "-whole")
    if not whole.exists():
        whole.mkdir()
        (whole / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        save_file({k: v for file in files for k, v in load_file(folder / file).items()}, whole / "adapter_model.safetensors")
    return whole


def adapted(model: PeftModel) -> dict[str, Any]:
    """Returns PEFT's LoRA layers by their names in the base model."""
    found = {name: m for name, m in model.named_modules() if isinstance(getattr(m, "lora_A", None), nn.ModuleDict)}
    return {name.removeprefix("base_model.model."): m for name, m in found.items()}


def quiet() -> warnings.catch_warnings:
    """PEFT and Transformers warn of names that are about to change, and of embeddings being saved."""
    return warnings.catch_warnings(action="ignore")
