"""What an adapter_config.json says, judged: is every layer s·B·A, and with which s and rank. PEFT's own rules, without PEFT.

Configurations from outside are hostile: patterns are regular expressions, and one that could run for ever is refused.
"""

import importlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from umbel.safetensors_file import FolderError, parse_object, short

MAX_CONFIG_BYTES = 10_000_000

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


def load(data: bytes) -> dict[str, Any]:
    """Returns the configuration in the bytes of an adapter_config.json, checked.

    Raises:
        FolderError: Not sound, or not plain LoRA.
    """
    config = parse_object(data, "adapter_config.json")
    check(config)
    return config


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
        self._compiled = [(key, *_compiled(key, what)) for key in patterns]
        self._deadline = time.monotonic() + _MOST_SECONDS

    def get(self, layer: str, default: Any) -> Any:
        for key, pattern, choices, repeats in self._compiled:
            if choices * (len(layer) + 1.0) ** repeats > _MOST_STEPS or time.monotonic() > self._deadline:
                raise FolderError(
                    f"{self._what}: {short(key)} could take for ever on {short(layer)}; write the layers' names out"
                )
            if pattern.match(layer):
                return self._values[key]
        # PEFT looks the name itself up where nothing matches; it may be a key that, as an expression, is something else.
        return self._values.get(layer, default)


def _compiled(key: str, what: str) -> tuple[re.Pattern[str], float, int]:
    """Returns PEFT's expression for a key, and a bound on its steps on a name of n characters: (c, k) for c · nᵏ."""
    text = rf"(.*\.)?({key})$"
    try:
        if len(key) > 1000:
            raise ValueError("longer than 1000 characters")
        choices, repeats = _steps(importlib.import_module("re._parser").parse(text))
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
