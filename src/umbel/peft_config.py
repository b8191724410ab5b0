"""An adapter_config.json and tensor names, judged: is every layer s·B·A, with which s and rank? PEFT's rules, without PEFT.

Configurations from outside are hostile: patterns are regular expressions, and one that could run for ever is refused.
"""

import functools
import importlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from umbel.safetensors_file import FolderError, parse_object, short

MAX_CONFIG_BYTES = 10_000_000
PREFIX = "base_model.model."

Kind = Literal["linear", "embedding"]

_FACTORS: dict[str, tuple[str, Kind]] = {
    ".lora_A.weight": ("A", "linear"),
    ".lora_B.weight": ("B", "linear"),
    ".lora_embedding_A": ("A", "embedding"),
    ".lora_embedding_B": ("B", "embedding"),
}
_SUFFIXES: dict[Kind, tuple[str, str]] = {
    "linear": (".lora_B.weight", ".lora_A.weight"),
    "embedding": (".lora_embedding_B", ".lora_embedding_A"),
}
# PEFT saves a resized vocabulary's tables beside the adapter, trained or not.
_TABLES = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared", "tok_embeddings")

_OTHER_KINDS = {
    "use_dora": "DoRA, which rescales the whole weight",
    "use_qalora": "QA-LoRA, which pools the input",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "lora_bias": "LoRA with a bias in B",
    "alora_invocation_tokens": "aLoRA, which acts on some tokens only",
    "trainable_token_indices": "trainable tokens, which are rows and not products",
    "layer_replication": "layer replication, which changes the base model",
    "target_parameters": "an adapter on bare parameters (target_parameters)",
    "kasa_config": "KaSA, which changes the base model",
    "monteclora_config": "Monte Carlo LoRA",
    "velora_config": "VeLoRA",
    "arrow_config": "Arrow, which routes between adapters",
    "megatron_config": "an adapter on Megatron's parallel layers",
}
"""Keys that, where they say anything, make the adapter something else than s·B·A on one base model."""

_HARMLESS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias", "modules_to_save"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "init_lora_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
    *("ensure_weight_tying", "runtime_config"),
}

# PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take the first B A out of the base weight, or round it.
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")

_MOST_STEPS = 1e8
_MOST_SECONDS = 20.0
_MOST_REPEATS = 8


def keys(layer: str, kind: Kind) -> tuple[str, str]:
    """Returns the names of a layer's B and A in PEFT's files."""
    B, A = _SUFFIXES[kind]
    return PREFIX + layer + B, PREFIX + layer + A


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapted weight of one adapter.

    Args:
        d_out: Rows of B; of an embedding, the length of a token's vector.
        d_in: Columns of A; of an embedding, the number of tokens. ΔW is then (B A)ᵀ as PEFT stores the table.
        rank: r.
        scale: s in ΔW = s·B·A.
        kind: Of PEFT's layer.
    """

    d_out: int
    d_in: int
    rank: int
    scale: float
    kind: Kind


@dataclass(frozen=True)
class Contents:
    """What an adapter holds; adapters that are alike share one, so it is not to be changed.

    Args:
        config: adapter_config.json, checked.
        layers: By PEFT's name of the module, without "base_model.model.".
        plain: Shapes of what is not a factor (modules_to_save, biases), by name in the file without "base_model.model.".
    """

    config: Mapping[str, Any]
    layers: Mapping[str, Layer]
    plain: Mapping[str, tuple[int, ...]]


def as_bytes(config: Any) -> bytes:
    """Returns a PEFT configuration in memory, an object with `to_dict` or a mapping, as its file would read."""
    try:
        values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        return json.dumps(values, default=sorted).encode()
    except (TypeError, ValueError) as error:
        raise FolderError(
            f"config: got a {type(config).__name__}, wanted a LoraConfig or what its file holds ({error})"
        ) from None


def check(config: Mapping[str, Any]) -> None:
    """Raises FolderError unless the adapter is s·B·A on an unchanged base model, and each value is of its type."""

    def refuse(key: str, allowed: str) -> None:
        raise FolderError(f"{key} is {short(config.get(key))}; allowed: {allowed}")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "'LORA', other kinds of adapter are not products that can be merged")
    for key, kind in _OTHER_KINDS.items():
        if config.get(key):
            raise FolderError(f"{kind} ({key} is {short(config[key])}), which is not s·B·A; leave this folder out")
    for key, value in config.items():
        if value and key not in _HARMLESS and key not in _OTHER_KINDS:
            raise FolderError(
                f"unknown key {short(key)} is {short(value)}, and what it does to ΔW is not known here; "
                "leave this folder out, or remove the key if it has no effect"
            )
    start = config.get("init_lora_weights", True)
    if type(start) not in (bool, str) or (start.lower() if isinstance(start, str) else start) not in _STARTS:
        refuse(
            "init_lora_weights",
            f"{', '.join(map(repr, _STARTS))}; others change the base model: convert with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=…)",
        )
    for key in ("use_rslora", "fan_in_fan_out"):
        if type(config.get(key, False)) is not bool:
            refuse(key, "true, false")
    if not _is_rank(config.get("r", 8)):
        refuse("r", "a whole number from 1")
    if not _is_alpha(config.get("lora_alpha", 8)):
        refuse("lora_alpha", "a finite number above 0")
    for key, sound, allowed in (
        ("rank_pattern", _is_rank, "names with whole numbers from 1"),
        ("alpha_pattern", _is_alpha, "names with finite numbers above 0"),
    ):
        pattern = config.get(key) or {}
        if type(pattern) is not dict or not all(sound(value) for value in pattern.values()):
            refuse(key, allowed)
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        refuse("bias", "'none', 'all', 'lora_only'")
    for key in ("base_model_name_or_path", "revision", "task_type"):
        if type(config.get(key)) not in (str, type(None)):
            refuse(key, "a string or null")
    saved = config.get("modules_to_save") or []
    if type(saved) is not list or not all(type(name) is str and name for name in saved):
        refuse("modules_to_save", "a list of module names, or null")


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


def scales(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Returns each layer's s: α / r, or α / √r with use_rslora, with PEFT's rules for the patterns.

    Args:
        config: Checked.
        ranks: Of each layer, from its factors' shapes.

    Raises:
        FolderError: A factor's rank is not the configured one, or a pattern is no sound regular expression.
    """
    by_rank = _Patterns(config.get("rank_pattern") or {}, "rank_pattern")
    by_alpha = _Patterns(config.get("alpha_pattern") or {}, "alpha_pattern")
    result: dict[str, float] = {}
    for layer, rank in ranks.items():
        wanted = by_rank.get(layer, config.get("r", 8))
        if rank != wanted:
            raise FolderError(
                f"layer {short(layer)} has factors of rank {rank}, its r and rank_pattern say {wanted}; "
                "adapter_config.json and the tensors are of different adapters"
            )
        alpha = by_alpha.get(layer, config.get("lora_alpha", 8))
        result[layer] = alpha / math.sqrt(rank) if config.get("use_rslora", False) else alpha / rank
    return result


class _Patterns:
    """Values for layers by regular expression; the first that matches the end of a layer's name counts, as in PEFT."""

    def __init__(self, patterns: Mapping[str, Any], what: str) -> None:
        self._what, self._values = what, patterns
        self._deadline = time.monotonic() + _MOST_SECONDS
        # What `pattern_for` wrote is looked up: a mixture of experts has ten thousand such keys.
        self._exact: dict[str, int] = {}
        self._compiled: list[tuple[int, str, re.Pattern[str], float, int]] = []
        for place, key in enumerate(patterns):
            name = re.sub(r"\\(.)", r"\1", key[1:])
            if key == pattern_for(name):
                self._exact[name] = place
            else:
                self._in_time(key)
                self._compiled.append((place, key, *_compiled(key, what)))

    def _in_time(self, key: str) -> None:
        if time.monotonic() > self._deadline:
            raise FolderError(f"{self._what}: {short(key)} and others take too long; write the layers' names out")

    def get(self, layer: str, default: Any) -> Any:
        exact = self._exact.get(layer, len(self._values))
        for place, key, pattern, choices, repeats in self._compiled:
            if place > exact:
                break
            self._in_time(key)
            if choices * (len(layer) + 1.0) ** repeats > _MOST_STEPS:
                raise FolderError(f"{self._what}: {short(key)} could take for ever on {short(layer)}; write the names out")
            if pattern.match(layer):
                return self._values[key]
        if layer in self._exact:
            return self._values[pattern_for(layer)]
        # PEFT looks the name itself up where nothing matches; it may be a key that, as an expression, is something else.
        return self._values.get(layer, default)


def _compiled(key: str, what: str) -> tuple[re.Pattern[str], float, int]:
    """Returns PEFT's expression for a key, and a bound on its steps on a name of n characters: (c, k) for c · nᵏ."""
    text = rf"(.*\.)?({key})$"
    try:
        if len(key) > 1000:
            raise ValueError("longer than 1000 characters")
        choices, repeats = _steps(importlib.import_module("re._parser").parse(text))
        if repeats > _MOST_REPEATS:
            raise ValueError(f"{repeats} repeats")
        return re.compile(text), choices, repeats
    except (ValueError, OverflowError, RecursionError, re.error) as error:
        raise FolderError(f"{what}: {short(key)} is refused ({error}); write the layers' names out") from None


def _steps(items: Any) -> tuple[float, int]:
    """Bounds a parsed expression's backtracking: the product of its choices, and its repeats of one character.

    Raises:
        ValueError: It repeats a group, looks around or back, or the like: then there is no such bound.
    """
    choices, repeats = 1.0, 0
    for code, about in items:
        inner: Sequence[Any] = ()
        name = str(code)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, body = about
            if int(most) <= 1:
                inner, choices = (body,), choices * 2
            elif len(body) == 1 and str(body[0][0]) in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
                repeats += 1
            else:
                raise ValueError("a repeated group")
        elif name == "BRANCH":
            inner, choices = about[1], choices * len(about[1])
        elif name == "SUBPATTERN":
            inner = (about[-1],)
        elif name not in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
            raise ValueError(f"{name.lower()} in an expression")
        for part in inner:
            more, further = _steps(part)
            choices, repeats = choices * more, repeats + further
    return choices, repeats


def pattern_for(layer: str) -> str:
    """Returns a key of rank_pattern or alpha_pattern that matches this layer and no other.

    >>> pattern_for("model.layers.1.q_proj")
    '^model\\\\.layers\\\\.1\\\\.q_proj'
    """
    # PEFT puts (.*\.)? before and $ after; the anchor keeps longer names that end alike out.
    return "^" + re.escape(layer)


@functools.lru_cache(maxsize=64)
def judge(data: bytes, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Contents:
    """Returns what an adapter holds; adapters that are alike share one answer, so that a thousand cost little.

    Args:
        data: adapter_config.json.
        shapes: Each tensor's key and shape.

    Raises:
        FolderError: Not plain LoRA, or the tensors do not fit each other or the configuration.
    """
    config = parse_object(data, "adapter_config.json")
    check(config)
    factors: dict[tuple[str, Kind], dict[str, tuple[int, ...]]] = {}
    others: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes:
        name = key.removeprefix(PREFIX)
        if not key.isprintable():
            raise FolderError(f"tensor {short(key)} has characters in its name that cannot be printed; leave this folder out")
        if name == key:
            raise FolderError(
                f"tensor {short(key)} does not begin with {PREFIX!r}; save the adapter with PEFT's save_pretrained"
            )
        suffix = next((s for s in _FACTORS if name.endswith(s)), None)
        if suffix is None:
            others[name] = shape
        else:
            factor, kind = _FACTORS[suffix]
            factors.setdefault((name.removesuffix(suffix), kind), {})[factor] = shape
    if not factors:
        raise FolderError("holds no LoRA factors (lora_A, lora_B); wanted an adapter as PEFT's save_pretrained writes it")
    found: dict[str, tuple[int, int, int, Kind]] = {
        name: (*_sound_pair(name, pair), kind) for (name, kind), pair in factors.items()
    }
    if len(found) < len(factors):
        raise FolderError("a layer has factors of a linear layer and of an embedding; PEFT writes one kind for each layer")
    factor_of = scales(config, {name: rank for name, (_, _, rank, _) in found.items()})
    layers = {name: Layer(d_out, d_in, rank, factor_of[name], kind) for name, (d_out, d_in, rank, kind) in found.items()}
    for name in others:
        _explained(name, config, layers)
    return Contents(config, MappingProxyType(layers), MappingProxyType(others))


def _sound_pair(name: str, pair: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int]:
    """Returns (d_out, d_in, rank) of a layer's factors."""
    if set(pair) != {"A", "B"}:
        raise FolderError(f"layer {short(name)} has lora_{min(pair)} alone; A and B are needed")
    A, B = pair["A"], pair["B"]
    if max(len(A), len(B)) > 2:
        raise FolderError(f"layer {short(name)} has factors {A} and {B}, of a convolution or stacked experts; not merged here")
    if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
        raise FolderError(f"layer {short(name)} has A {A} and B {B}; wanted r × d_in and d_out × r")
    if "base_layer" in name.split(".") or not name:
        raise FolderError(f"layer {short(name)} lies inside another adapter (MultiheadAttention); not merged here")
    return B[0], A[1], A[0]


def _explained(name: str, config: Mapping[str, Any], layers: Mapping[str, Layer]) -> None:
    """Raises FolderError for a tensor that is neither a module saved whole, nor a bias, nor a vocabulary's table."""
    parts = name.split(".")
    if any(part.startswith("lora_magnitude") for part in parts):
        raise FolderError(f"tensor {short(name)}: DoRA, which rescales the whole weight; leave this folder out")
    if name.endswith(".lora_B.bias"):
        raise FolderError(f"tensor {short(name)}: LoRA with a bias in B, which is not s·B·A; leave this folder out")
    if any(part.startswith(("lora_", "trainable_tokens", "token_adapter")) for part in parts):
        raise FolderError(f"tensor {short(name)}: no part of a plain LoRA adapter; leave this folder out")
    owners = [".".join(parts[:i]) for i in range(1, len(parts))]
    # The end of a name, with no dot before it: that is how PEFT looks for modules_to_save.
    if any(owner.endswith(saved) for saved in config.get("modules_to_save") or () for owner in owners):
        return
    if parts[-1] == "bias" and config.get("bias", "none") != "none":
        return
    table = ".".join(parts[:-1]).removesuffix(".base_layer")
    of_embedding = table in layers and layers[table].kind == "embedding"
    if parts[-1] == "weight" and (of_embedding or table.rpartition(".")[2] in _TABLES):
        return
    raise FolderError(
        f"tensor {short(name)} is neither a factor nor named by modules_to_save or bias in adapter_config.json; "
        "leave this folder out, or save it again with PEFT"
    )
