"""PEFT folders on disk: opened without trust, read a layer at a time, written a layer at a time.

Outside this file factors are in units of ΔW (the scale multiplied into B), A is r × d_in and B is d_out × r, as everywhere.
"""

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from umbel import peft_config
from umbel.method import Factors
from umbel.safetensors_file import DTYPES, FolderError, TensorFile, TensorWriter, parse_object, read_bytes, short
from umbel.server import LARGEST, MOST_ROWS

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"
PREFIX = "base_model.model."
MAX_INDEX_BYTES = 100_000_000

Kind = Literal["linear", "embedding"]

_SUFFIXES: dict[str, tuple[str, Kind]] = {
    ".lora_A.weight": ("A", "linear"),
    ".lora_B.weight": ("B", "linear"),
    ".lora_embedding_A": ("A", "embedding"),
    ".lora_embedding_B": ("B", "embedding"),
}
_KEYS: dict[Kind, tuple[str, str]] = {
    "linear": (".lora_B.weight", ".lora_A.weight"),
    "embedding": (".lora_embedding_B", ".lora_embedding_A"),
}
# PEFT saves a resized vocabulary's tables beside the adapter, trained or not.
_TABLES = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared", "tok_embeddings")


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


class StoredAdapter:
    """One adapter, on disk or in memory: what it is, and its factors layer by layer. Made by `open_folder` and `from_state`.

    Args:
        name: The folder as given.
        contents: What it holds; `config`, `layers` and `plain` are this class's attributes too.
        num_examples: n_k from umbel.json, if it is there.
        bytes: Size of all tensor files.
        fetch: Returns the tensors of some keys as stored.
    """

    def __init__(
        self,
        name: str,
        contents: Contents,
        num_examples: int | None,
        bytes: int,
        fetch: Callable[[Sequence[str]], list[Tensor]],
    ) -> None:
        self.name, self.config, self.layers, self.plain = name, contents.config, contents.layers, contents.plain
        self.num_examples, self.bytes, self._fetch = num_examples, bytes, fetch

    def read(self, layer: str) -> Factors:
        """Returns A (r × d_in) and B (d_out × r) in units of ΔW; float32, or float64 where the file has float64.

        May be called from several threads. What `from_state` gave may share memory with the state; do not write to it.

        Raises:
            FolderError: NaN, infinity or huge values, or the file is no longer what was opened.
        """
        about = self.layers[layer]
        B, A = self._fetch([PREFIX + layer + suffix for suffix in _KEYS[about.kind]])
        dtype = torch.float64 if torch.float64 in (A.dtype, B.dtype) else torch.float32
        factors = {"A": A.to(dtype), "B": B.to(dtype)}
        if about.scale != 1:
            factors["B"] = factors["B"] * about.scale
        for factor, x in factors.items():
            self._check(x, f"layer {short(layer)}, {factor}")
        return factors

    def read_plain(self, name: str) -> Tensor:
        """Returns a parameter that is not a factor; float32, or float64 where the file has float64.

        Raises:
            FolderError: As `read`.
        """
        (x,) = self._fetch([PREFIX + name])
        x = x if x.dtype == torch.float64 else x.float()
        self._check(x, short(name))
        return x

    def _check(self, x: Tensor, what: str) -> None:
        low, high = torch.aminmax(x)
        # NaN compares as false.
        if not (float(low) >= -LARGEST and float(high) <= LARGEST):
            raise FolderError(
                f"{self.name}: {what} has NaN, infinity or values beyond ±{LARGEST:.0e} in units of ΔW; leave this folder out"
            )


def open_folder(path: str | Path) -> StoredAdapter:
    """Opens a PEFT folder and checks all but the tensors' values; nothing of the tensors is read.

    Raises:
        FolderError: Not a PEFT folder, broken, hostile, or not plain LoRA.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FolderError(f"{folder}: no such folder; give folders with {CONFIG} and {TENSORS}")
    data = read_bytes(folder, CONFIG, peft_config.MAX_CONFIG_BYTES)
    files = _files(folder)
    shapes = {key: entry.shape for file in files for key, entry in file.entries.items()}
    judged = _judged(data, shapes, str(folder))
    # With one file, as almost always, no table of our own: a thousand of them would cost memory.
    where = {key: file for file in files for key in file.entries} if len(files) > 1 else None

    def fetch(keys: Sequence[str]) -> list[Tensor]:
        if where is None:
            return files[0].read(keys)
        return [where[key].read([key])[0] for key in keys]

    return StoredAdapter(str(path), judged, _num_examples(folder), sum(file.bytes for file in files), fetch)


def from_state(state: Mapping[str, Tensor], config: Any, name: str, num_examples: int | None = None) -> StoredAdapter:
    """Returns an adapter in memory, with the same checks as a folder.

    Args:
        state: As PEFT's get_peft_model_state_dict returns it.
        config: A LoraConfig, or what is in its adapter_config.json.
        name: For messages.
        num_examples: n_k, if known.

    Raises:
        FolderError: Broken, or not plain LoRA.
    """
    for key, x in state.items():
        if x.dtype not in DTYPES.values() or x.numel() == 0:
            raise FolderError(f"{name}: {short(key)} is {tuple(x.shape)} of {x.dtype}; allowed: not empty, {', '.join(DTYPES)}")
    rows = None if num_examples is None else _sound_rows(num_examples, name)
    try:
        data = peft_config.as_bytes(config)
    except FolderError as error:
        raise FolderError(f"{name}: {error}") from None
    judged = _judged(data, {key: tuple(x.shape) for key, x in state.items()}, name)
    size = sum(x.numel() * x.element_size() for x in state.values())
    return StoredAdapter(name, judged, rows, size, lambda keys: [state[key].detach().cpu() for key in keys])


def _files(folder: Path) -> list[TensorFile]:
    single, index = os.path.lexists(folder / TENSORS), os.path.lexists(folder / INDEX)
    if single and index:
        raise FolderError(f"{folder}: has both {TENSORS} and {INDEX}, and they may differ; remove one")
    if single:
        return [TensorFile(folder, TENSORS)]
    if not index:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:6])
        if (folder / "adapter_model.bin").exists():
            raise FolderError(
                f"{folder}: has adapter_model.bin only, a pickle file, which may run code when opened; convert it where you "
                "trust it: PEFT's from_pretrained, then save_pretrained"
            )
        raise FolderError(f"{folder}: has no {TENSORS}; found: {short(found)}")
    table = parse_object(read_bytes(folder, INDEX, MAX_INDEX_BYTES), str(folder / INDEX)).get("weight_map")
    if type(table) is not dict or not table or not all(type(name) is str for name in table.values()):
        raise FolderError(f"{folder / INDEX}: weight_map is {short(table)}; wanted tensor names with file names")
    names = sorted(set(table.values()))
    for name in names:
        if "/" in name or "\\" in name or "\0" in name or not name.endswith(".safetensors") or len(name) > 255:
            raise FolderError(f"{folder / INDEX}: file name {short(name)}; allowed: *.safetensors in the folder itself")
    files = [TensorFile(folder, name) for name in names]
    found = {key: name for name, file in zip(names, files, strict=True) for key in file.entries}
    if found != table or len(found) != sum(len(file.entries) for file in files):
        raise FolderError(f"{folder / INDEX}: weight_map does not agree with what its files hold; copy the folder again")
    return files


def _num_examples(folder: Path) -> int | None:
    if not os.path.lexists(folder / "umbel.json"):
        return None
    about = parse_object(read_bytes(folder, "umbel.json", peft_config.MAX_CONFIG_BYTES), str(folder / "umbel.json"))
    rows = about.get("num_examples")
    return None if rows is None else _sound_rows(rows, str(folder / "umbel.json"))


def _sound_rows(rows: Any, what: str) -> int:
    if type(rows) is not int or not 0 < rows <= MOST_ROWS:
        raise FolderError(f"{what}: num_examples is {short(rows)}; allowed: a whole number from 1 to {MOST_ROWS}")
    return rows


def _judged(config: bytes, shapes: Mapping[str, tuple[int, ...]], what: str) -> Contents:
    # Sites mostly send the same configuration and the same shapes, and then share one answer.
    judge = _judge if len(config) + 100 * len(shapes) < 2**20 else _judge.__wrapped__
    try:
        return judge(config, tuple(shapes.items()))
    except FolderError as error:
        raise FolderError(f"{what}: {error}") from None


@functools.lru_cache(maxsize=64)
def _judge(data: bytes, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Contents:
    config = peft_config.load(data)
    factors: dict[tuple[str, Kind], dict[str, tuple[int, ...]]] = {}
    others: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes:
        name = key.removeprefix(PREFIX)
        if name == key:
            raise FolderError(
                f"tensor {short(key)} does not begin with {PREFIX!r}; save the adapter with PEFT's save_pretrained"
            )
        suffix = next((s for s in _SUFFIXES if name.endswith(s)), None)
        if suffix is None:
            others[name] = shape
        else:
            factor, kind = _SUFFIXES[suffix]
            factors.setdefault((name.removesuffix(suffix), kind), {})[factor] = shape
    if not factors:
        raise FolderError("holds no LoRA factors (lora_A, lora_B); wanted an adapter as PEFT's save_pretrained writes it")
    found: dict[str, tuple[int, int, int, Kind]] = {
        name: (*_sound_pair(name, pair), kind) for (name, kind), pair in factors.items()
    }
    if len(found) < len(factors):
        raise FolderError("a layer has factors of a linear layer and of an embedding; PEFT writes one kind for each layer")
    scales = peft_config.scales(config, {name: rank for name, (_, _, rank, _) in found.items()})
    layers = {name: Layer(d_out, d_in, rank, scales[name], kind) for name, (d_out, d_in, rank, kind) in found.items()}
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


def check_together(adapters: Sequence[StoredAdapter], force: bool) -> list[str]:
    """Checks that adapters belong to one model, and returns what a reader of the result should know.

    Args:
        adapters: Opened.
        force: Takes different base models, revisions and task types, and parameters that some lack, and says so.

    Raises:
        FolderError: They do not fit.
    """
    notes: list[str] = []
    for key, what in (("base_model_name_or_path", "base models"), ("revision", "revisions"), ("task_type", "tasks")):
        _agree(adapters, key, what, force, notes)
    first: dict[str, StoredAdapter] = {}
    for adapter in adapters:
        for name, layer in adapter.layers.items():
            other = first.setdefault(name, adapter)
            if other.layers[name] is not layer:
                _same(f"layer {short(name)}", other, _form(other.layers[name]), adapter, _form(layer))
    owners: dict[str, StoredAdapter] = {}
    for adapter in adapters:
        for name, shape in adapter.plain.items():
            other = owners.setdefault(name, adapter)
            _same(f"parameter {short(name)}", other, other.plain[name], adapter, shape)
    for adapter in adapters:
        absent = [name for name in owners if name not in adapter.plain]
        if absent:
            text = f"{adapter.name}: does not have {_some(absent)}, which others do"
            if not force:
                raise FolderError(f"{text}; a mean over all needs it from all, --force takes the mean over those that have it")
            notes.append(f"{text}; taken as the mean over those that have it")
    notes += _lacking(adapters, list(first))
    for key, usual in (("bias", "none"), ("fan_in_fan_out", False)):
        values = sorted({json.dumps(adapter.config.get(key, usual)) for adapter in adapters})
        if len(values) > 1:
            notes.append(f"{key} differs ({', '.join(values)}); the factors do not depend on it")
    return notes


def _form(layer: Layer) -> tuple[int, int, str]:
    return layer.d_out, layer.d_in, layer.kind


def _same(what: str, one: StoredAdapter, ours: tuple[Any, ...], other: StoredAdapter, theirs: tuple[Any, ...]) -> None:
    if ours != theirs:
        raise FolderError(
            f"{what}: {_size(ours)} in {one.name}, {_size(theirs)} in {other.name}; adapters of one base model are needed"
        )


def _size(form: tuple[Any, ...]) -> str:
    return " × ".join(str(n) for n in form if type(n) is int) + "".join(f" ({n})" for n in form if type(n) is str)


def _agree(adapters: Sequence[StoredAdapter], key: str, what: str, force: bool, notes: list[str]) -> None:
    # Hugging Face's default branch, written out or not; a task that is not named may be any.
    usual: Any = "main" if key == "revision" else None
    first: dict[Any, str] = {}
    for adapter in adapters:
        first.setdefault(adapter.config.get(key) or usual, adapter.name)
    if key == "task_type":
        first.pop(None, None)
    if len(first) > 1:
        text = f"different {what}: " + ", ".join(f"{short(value)} in {name}" for value, name in list(first.items())[:4])
        if not force:
            raise FolderError(f"{text}; merge adapters of one base model, or give --force if these are the same")
        notes.append(f"{text}; merged all the same (--force)")


def _lacking(adapters: Sequence[StoredAdapter], names: list[str]) -> list[str]:
    """Says which layers not all adapters have: each where they are few, else how many in which folder."""
    lacking = {a.name: [name for name in names if name not in a.layers] for a in adapters if len(a.layers) < len(names)}
    notes = [
        f"layer{'s' if len(missing) > 1 else ''} {_some(missing)}: not in {name} (counts as zero there)"
        for name, missing in list(lacking.items())[:8]
    ]
    if len(lacking) > 8:
        notes.append(f"{len(lacking) - 8} more folders lack layers, which count as zero there")
    return notes


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class Writer:
    """Writes a PEFT folder a layer at a time; holds one layer in memory.

    Flushes nothing and cleans up nothing: it is to be used in `umbel.record.new_folder`, which does both.

    Args:
        folder: Exists; usually a temporary one.
        layers: Names of all layers to come.
        plain: Names of all other parameters to come.
        dtype: Of all tensors in the file.
    """

    def __init__(self, folder: Path, layers: Mapping[str, Kind], plain: Collection[str], dtype: torch.dtype) -> None:
        self._folder, self._layers = folder, dict(layers)
        names = [PREFIX + name + suffix for name, kind in layers.items() for suffix in _KEYS[kind]]
        self._file = TensorWriter(folder / TENSORS, names + [PREFIX + name for name in plain], dtype)
        self.bytes = 0

    def layer(self, name: str, B: Tensor, A: Tensor) -> Factors:
        """Writes B A (d_out × r, r × d_in, in units of ΔW) at scale 1.

        Returns:
            The factors as the file holds them, read back and widened to at least float32.

        Raises:
            FolderError: The values leave the file's dtype.
            OSError: The disk is full, for example.
        """
        kept = [self._file.add(PREFIX + name + s, x) for s, x in zip(_KEYS[self._layers[name]], (B, A), strict=True)]
        return {"B": _wide(kept[0]), "A": _wide(kept[1])}

    def plain(self, name: str, x: Tensor) -> Tensor:
        """Writes a parameter that is not a factor, and returns it as `layer` returns factors."""
        return _wide(self._file.add(PREFIX + name, x))

    def close(self, config: Mapping[str, Any]) -> None:
        """Ends the file and writes adapter_config.json beside it; `bytes` then is the size of the tensors' file."""
        self.bytes = self._file.close()
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (self._folder / CONFIG).write_text(text, encoding="utf-8")

    def abandon(self) -> None:
        """Lets go of the file after an error."""
        self._file.abandon()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def stock_config(adapters: Sequence[StoredAdapter], layers: Mapping[str, int], plain: Collection[str]) -> dict[str, Any]:
    """Returns the adapter_config.json of factors that are written at scale 1, as stock PEFT needs it.

    Args:
        adapters: What was merged; they agree as `check_together` has found.
        layers: Each layer's rank.
        plain: Names of the parameters that are not factors.
    """
    configs = [adapter.config for adapter in adapters]
    rank = Counter(layers.values()).most_common(1)[0][0]
    pattern = {peft_config.pattern_for(name): r for name, r in sorted(layers.items()) if r != rank}
    biases = {config.get("bias") or "none" for config in configs}
    saved = sorted({name for config in configs for name in config.get("modules_to_save") or ()})
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
        "target_modules": sorted(layers),
        "modules_to_save": saved if saved and plain else None,
        "bias": next(bias for bias in ("all", "lora_only", "none") if bias in biases),
        "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "task_type": _first(configs, "task_type"),
        "base_model_name_or_path": _first(configs, "base_model_name_or_path"),
        "revision": _first(configs, "revision"),
        "auto_mapping": _first(configs, "auto_mapping"),
    }


def _first(configs: Iterable[Mapping[str, Any]], key: str) -> Any:
    return next((config[key] for config in configs if config.get(key)), None)
