"""PEFT folders on disk: opened without trust, read a layer at a time, written a layer at a time.

Outside this file factors are in units of ΔW (the scale multiplied into B), A is r × d_in and B is d_out × r, as everywhere.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umbel.method import Factors
from umbel.peft_config import MAX_CONFIG_BYTES, PREFIX, Contents, Kind, Layer, as_bytes, judge, keys, pattern_for
from umbel.safetensors_file import DTYPES, FolderError, TensorFile, TensorWriter, parse_object, read_bytes, short
from umbel.server import LARGEST, MOST_ROWS

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"
HEAD = "head.safetensors"
"""Where umbel keeps a mean-pooled classifier's head, which no stock class of Transformers has."""

MAX_INDEX_BYTES = 100_000_000


class StoredAdapter:
    """One adapter, on disk or in memory: what it is, and its factors layer by layer. Made by `open_folder` and `from_state`.

    Args:
        name: The folder as given.
        contents: What it holds; `config`, `layers` and `plain` are this class's attributes too.
        about: What umbel.json says, if it is there: `num_examples` is n_k, `labels` are the head's classes in its order.
        bytes: Size of all tensor files.
        fetch: Returns new tensors with what some keys hold, as stored.
        announce: Told which keys will soon be fetched.
        head: The file of a head outside the adapter; its parameters' names begin with "head.safetensors/".
    """

    def __init__(
        self,
        name: str,
        contents: Contents,
        about: Mapping[str, Any],
        bytes: int,
        fetch: Callable[[Sequence[str]], list[Tensor]],
        head: TensorFile | None = None,
        announce: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        self.name, self.config, self.layers, self.plain = name, contents.config, contents.layers, contents.plain
        if head is not None:
            self.plain = {**self.plain, **{f"{HEAD}/{key}": entry.shape for key, entry in head.entries.items()}}
        self.about, self.bytes, self._fetch, self._head, self._announce = about, bytes, fetch, head, announce

    @property
    def num_examples(self) -> int | None:
        """n_k, if known."""
        return self.about.get("num_examples")

    def read(self, layer: str) -> Factors:
        """Returns A (r × d_in) and B (d_out × r) in units of ΔW; float32, or float64 where the file has float64.

        They are new tensors.

        Raises:
            FolderError: NaN, infinity or huge values, or the file is no longer what was opened.
        """
        about = self.layers[layer]
        B, A = self._fetch(keys(layer, about.kind))
        dtype = torch.float64 if torch.float64 in (A.dtype, B.dtype) else torch.float32
        factors = {"A": A.to(dtype), "B": B.to(dtype)}
        if about.scale != 1:
            factors["B"].mul_(about.scale)
        for factor, x in factors.items():
            self._check(x, f"layer {short(layer)}, {factor}")
        return factors

    def size(self, layer: str) -> int:
        """Returns about how many bytes `read` of a layer takes."""
        about = self.layers[layer]
        return 4 * about.rank * (about.d_in + about.d_out)

    def announce(self, layers: Sequence[str]) -> None:
        """Tells the system that layers will soon be read, so that the disk works while something else is computed."""
        if self._announce is not None:
            self._announce([key for layer in layers for key in keys(layer, self.layers[layer].kind)])

    def read_plain(self, name: str) -> Tensor:
        """Returns a parameter that is not a factor; float32, or float64 where the file has float64.

        Raises:
            FolderError: As `read`.
        """
        if self._head is not None and name.startswith(HEAD):
            (x,) = self._head.read([name[len(HEAD) + 1 :]])
        else:
            (x,) = self._fetch([PREFIX + name])
        x = wide(x)
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
    if not os.path.isdir(folder):
        raise FolderError(f"{folder}: no such folder; give folders with {CONFIG} and {TENSORS}")
    data = read_bytes(folder, CONFIG, MAX_CONFIG_BYTES)
    files = _files(folder)
    shapes = {key: entry.shape for file in files for key, entry in file.entries.items()}
    judged = _judged(data, shapes, str(folder))
    # With one file, as almost always, no table of our own: a thousand of them would cost memory.
    where = {key: file for file in files for key in file.entries} if len(files) > 1 else None

    def fetch(wanted: Sequence[str]) -> list[Tensor]:
        if where is None:
            return files[0].read(wanted)
        return [where[key].read([key])[0] for key in wanted]

    head = TensorFile(folder, HEAD) if os.path.lexists(folder / HEAD) else None
    size = sum(file.bytes for file in files) + (head.bytes if head is not None else 0)
    return StoredAdapter(str(path), judged, _about(folder), size, fetch, head, files[0].announce if where is None else None)


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
    about = {} if num_examples is None else {"num_examples": _sound_rows(num_examples, name)}
    try:
        data = as_bytes(config)
    except FolderError as error:
        raise FolderError(f"{name}: {error}") from None
    judged = _judged(data, {key: tuple(x.shape) for key, x in state.items()}, name)
    size = sum(x.numel() * x.element_size() for x in state.values())
    return StoredAdapter(name, judged, about, size, lambda wanted: [state[key].detach().to("cpu", copy=True) for key in wanted])


def _files(folder: Path) -> list[TensorFile]:
    single, index = os.path.lexists(folder / TENSORS), os.path.lexists(folder / INDEX)
    if single and index:
        raise FolderError(f"{folder}: has both {TENSORS} and {INDEX}, and they may differ; remove one")
    if single:
        return [TensorFile(folder, TENSORS)]
    if not index:
        if os.path.lexists(folder / "adapter_model.bin"):
            raise FolderError(
                f"{folder}: has adapter_model.bin only, a pickle file, which may run code when opened; convert it where you "
                "trust it: PEFT's from_pretrained, then save_pretrained"
            )
        raise FolderError(f"{folder}: has neither {TENSORS} nor {INDEX}; give a folder as PEFT's save_pretrained writes it")
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


def _about(folder: Path) -> dict[str, Any]:
    """Returns what umbel.json says and a merge needs: `num_examples`, `labels`, `pooling`."""
    if not os.path.lexists(folder / "umbel.json"):
        return {}
    about = parse_object(read_bytes(folder, "umbel.json", MAX_CONFIG_BYTES), str(folder / "umbel.json"))
    found = {key: about[key] for key in ("num_examples", "labels", "pooling") if about.get(key)}
    if "num_examples" in about:
        _sound_rows(about["num_examples"], str(folder / "umbel.json"))
    return found


def _sound_rows(rows: Any, what: str) -> int:
    if type(rows) is not int or not 0 < rows <= MOST_ROWS:
        raise FolderError(f"{what}: num_examples is {short(rows)}; allowed: a whole number from 1 to {MOST_ROWS}")
    return rows


def _judged(config: bytes, shapes: Mapping[str, tuple[int, ...]], what: str) -> Contents:
    # Sites mostly send the same configuration and the same shapes, and then share one answer.
    judge_it = judge if len(config) + 100 * len(shapes) < 2**20 else judge.__wrapped__
    try:
        return judge_it(config, tuple(shapes.items()))
    except FolderError as error:
        raise FolderError(f"{what}: {error}") from None


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
            text = f"{adapter.name}: has no {_some(absent)}, which others have"
            if not force:
                raise FolderError(f"{text}; a mean over all needs it from all, --force takes the mean over those that have it")
            notes.append(f"{text}; taken as the mean over those that have it")
    notes += _lacking(adapters, list(first))
    for key in ("labels", "pooling"):
        known = [adapter for adapter in adapters if key in adapter.about]
        for adapter in known[1:]:
            if adapter.about[key] != known[0].about[key]:
                raise FolderError(
                    f"umbel.json: {key} {short(known[0].about[key])} in {known[0].name}, {short(adapter.about[key])} in "
                    f"{adapter.name}; a mean of heads needs the same classes in the same order"
                )
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

    Flushes nothing and removes nothing: it is to be used in `umbel.record.new_folder`, which does both.

    Args:
        folder: Exists; usually a temporary one.
        layers: Names of all layers to come.
        plain: Names of all other parameters to come.
        dtype: Of all tensors in the file.
    """

    def __init__(self, folder: Path, layers: Mapping[str, Kind], plain: Collection[str], dtype: torch.dtype) -> None:
        self._folder, self._layers = folder, dict(layers)
        names = [key for name, kind in layers.items() for key in keys(name, kind)]
        head = [name[len(HEAD) + 1 :] for name in plain if name.startswith(HEAD)]
        self._file = TensorWriter(
            folder / TENSORS, names + [PREFIX + name for name in plain if not name.startswith(HEAD)], dtype
        )
        self._head = TensorWriter(folder / HEAD, head, dtype) if head else None
        self.bytes = 0

    def layer(self, name: str, B: Tensor, A: Tensor) -> Factors:
        """Writes B A (d_out × r, r × d_in, in units of ΔW) at scale 1.

        Returns:
            The factors as the file holds them, read back and widened to at least float32.

        Raises:
            FolderError: The values leave the file's dtype.
            OSError: The disk is full, for example.
        """
        kept = [self._file.add(key, x) for key, x in zip(keys(name, self._layers[name]), (B, A), strict=True)]
        return {"B": wide(kept[0]), "A": wide(kept[1])}

    def plain(self, name: str, x: Tensor) -> Tensor:
        """Writes a parameter that is not a factor, and returns it as `layer` returns factors."""
        if self._head is not None and name.startswith(HEAD):
            return wide(self._head.add(name[len(HEAD) + 1 :], x))
        return wide(self._file.add(PREFIX + name, x))

    def close(self, config: Mapping[str, Any]) -> None:
        """Ends the file and writes adapter_config.json beside it; `bytes` then is the size of the tensors' file."""
        self.bytes = self._file.finish() + (self._head.finish() if self._head is not None else 0)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (self._folder / CONFIG).write_text(text, encoding="utf-8")

    def abandon(self) -> None:
        """Lets go of the file after an error; the caller removes the folder."""
        self._file.release()
        if self._head is not None:
            self._head.release()


def wide(x: Tensor) -> Tensor:
    """Returns a tensor in at least float32."""
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
    pattern = {pattern_for(name): r for name, r in sorted(layers.items()) if r != rank}
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
        "modules_to_save": saved if saved and any(not name.startswith(HEAD) for name in plain) else None,
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
