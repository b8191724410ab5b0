"""Finished adapters to one adapter, a layer at a time, by the methods' own collectors and `combine`; no base model, no GPU.

What a method would send to its clients comes out as a stock PEFT folder: factors as they are, and a product that it would
add to the frozen weight as extra rank beside them. The result is read back and compared with the exact Σ p_k ΔW_k.
"""

import collections
import dataclasses
import fcntl
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from umbel import __version__, algebra, peft_folder
from umbel.method import Collector, Factors, Mean, Method, MethodError, Stack, load, names, taking_mixed_ranks
from umbel.peft_config import PREFIX, Kind, Layer, keys
from umbel.peft_folder import StoredAdapter
from umbel.record import new_folder, write_json
from umbel.server import update

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

STAGES = ("reading", "computing", "checking", "writing")

WRITTEN = {"README.md", "adapter_config.json", "adapter_model.safetensors", "head.safetensors", "merge.json", "umbel.json"}
"""Files of a merged folder; one that holds any other is not replaced."""

UNFINISHED = ".unfinished"
"""Stands in the temporary folder until it is whole, so that what a killed merge left is known from somebody's own."""

AHEAD = 256 * 2**20
"""Bytes that the system is asked to have in its cache before they are needed, shared by all clients' files."""

Progress = Callable[[str, int, int], None]
"""Called with what was done last, layers done, layers in all."""


class MergeError(ValueError):
    """What was given cannot be merged; says what is wrong, where, what is allowed and what to do."""


class Sink(Protocol):
    """Where merged tensors go; each returns what is really kept, at least in float32."""

    def layer(self, name: str, B: Tensor, A: Tensor) -> Factors: ...
    def plain(self, name: str, x: Tensor) -> Tensor: ...


@dataclass
class _Memory:
    """A sink that keeps PEFT's state dict."""

    adapters: Sequence[StoredAdapter]
    dtype: torch.dtype
    state: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def layer(self, name: str, B: Tensor, A: Tensor) -> Factors:
        kept = {"B": B.to(self.dtype).contiguous(), "A": A.to(self.dtype).contiguous()}
        for key, factor in zip(keys(name, _shape(self.adapters, name).kind), ("B", "A")):
            self.state[key] = kept[factor]
        return {factor: peft_folder.wide(x) for factor, x in kept.items()}

    def plain(self, name: str, x: Tensor) -> Tensor:
        self.state[PREFIX + name] = kept = x.to(self.dtype)
        return peft_folder.wide(kept)


def merge(
    paths: Sequence[str | Path],
    out: str | Path,
    *,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    dtype: str = "float32",
    force: bool = False,
    check: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merges PEFT folders into one PEFT folder, which appears whole or not at all.

    Args:
        paths: Folders as PEFT's save_pretrained writes them.
        out: The new folder; an older merge there is replaced, anything else is left alone and refused.
        method: One that works from uploads alone; florist with energy = 1, which is exact, if not given.
        options: The method's.
        weights: n_k > 0 of each folder; `num_examples` of each folder's umbel.json if not given, else equal.
        rank: Write every layer with this rank: the best approximation, padded with zeros where it has less.
        dtype: Of the file.
        force: Take adapters of base models that differ in name or revision.
        check: Compare what was written with the exact Σ p_k ΔW_k.
        progress: Called after each layer.

    Returns:
        What merge.json holds: per layer error, rank, energy; weights, notes, bytes, seconds.

    Raises:
        FolderError: A folder is broken, hostile or not plain LoRA, or they do not fit.
        MergeError: The options do not fit.
        MethodError: The method, its options, or ranks that it does not take.
        OSError: The disk is full, for example.
    """
    begun = time.perf_counter()
    target, paths = Path(out), _listed(paths)
    _check_free(target, paths)
    job = _job([peft_folder.open_folder(path) for path in paths], method, options, weights, rank, dtype, force, check)
    job.notes += _repeated(paths)
    job.seconds["reading"] += time.perf_counter() - begun
    with _parents_of(target), _unfinished(target, paths) as temporary:
        kinds: dict[str, Kind] = {name: _shape(job.adapters, name).kind for name in job.layers}
        writer = peft_folder.Writer(temporary, kinds, job.plain, DTYPES[dtype])
        try:
            layers = job.run(writer, progress or (lambda last, done, total: None))
            with job.timed("writing"):
                writer.close(job.config(layers))
        finally:
            writer.abandon()
        report = job.report(layers, bytes_out=writer.bytes)
        flushed = time.perf_counter()
        write_json(temporary / "umbel.json", job.about_adapter())
        (temporary / "README.md").write_text(_card(job, report), encoding="utf-8")
        report["seconds"]["writing"] += time.perf_counter() - flushed
        report["seconds"]["total"] = time.perf_counter() - begun
        write_json(temporary / "merge.json", report)
        (temporary / UNFINISHED).unlink()
    report["seconds"]["total"] = time.perf_counter() - begun
    return report


def aggregate(
    states: Sequence[Mapping[str, Tensor]],
    configs: Sequence[Any],
    *,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    dtype: str = "float32",
    force: bool = False,
    check: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Merges adapters in memory, by the same rules as `merge`.

    Args:
        states: Of each client, what PEFT's `get_peft_model_state_dict` returns.
        configs: Of each client, its LoraConfig or the dictionary in its adapter_config.json.
        method, options, weights, rank, dtype, force, check: As in `merge`.

    Returns:
        (state, config, report): for `set_peft_model_state_dict`, for `LoraConfig(**config)`, and as `merge` returns.
    """
    if len(states) != len(configs):
        raise MergeError(f"got {len(states)} states and {len(configs)} configs; one config for each state")
    adapters = [peft_folder.from_state(s, c, f"client {k}") for k, (s, c) in enumerate(zip(states, configs))]
    begun = time.perf_counter()
    job = _job(adapters, method, options, weights, rank, dtype, force, check)
    sink = _Memory(adapters, DTYPES[dtype])
    layers = job.run(sink, lambda last, done, total: None)
    report = job.report(layers, bytes_out=sum(x.numel() * x.element_size() for x in sink.state.values()))
    report["seconds"]["total"] = time.perf_counter() - begun
    return sink.state, job.config(layers), report


def plan(
    paths: Sequence[str | Path],
    *,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    dtype: str = "float32",
    force: bool = False,
    check: bool = True,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Says what `merge` would do: one layer of each shape is merged in memory, and its cost taken for all of that shape.

    A method that combines all layers at once is run on all of them.

    Returns:
        method, clients, weights, notes; layers by shape with their ranks; and foretold bytes_out, memory_bytes and seconds.
    """
    paths = _listed(paths)
    if out is not None:
        _check_free(Path(out), paths)
    job = _job([peft_folder.open_folder(path) for path in paths], method, options, weights, rank, dtype, force, check)
    job.notes += _repeated(paths)
    like: dict[tuple[Any, ...], list[str]] = collections.defaultdict(list)
    for name in job.layers:
        shape = _shape(job.adapters, name)
        ranks = tuple(a.layers[name].rank if name in a.layers else 0 for a in job.adapters)
        like[shape.d_out, shape.d_in, shape.kind, ranks].append(name)
    rows: list[dict[str, Any]] = []
    seconds, bytes_out = 0.0, 0
    for (d_out, d_in, _, ranks), alike in like.items():
        sample = alike if job.method.together else alike[:1]
        begun = time.perf_counter()
        found = job.run(_Memory(job.adapters, DTYPES[dtype]), lambda last, done, total: None, sample)
        times = len(alike) / len(sample)
        seconds += times * (time.perf_counter() - begun)
        rank_out = max(found[name]["rank"] for name in sample)
        bytes_out += len(alike) * rank_out * (d_out + d_in) * DTYPES[dtype].itemsize
        own = [r for r in ranks if r]
        rows.append(
            {"layers": len(alike), "d_out": d_out, "d_in": d_in, "ranks_in": [min(own), max(own)], "rank": rank_out}
            | {key: found[sample[0]][key] for key in ("error", "energy")}
            | {"example": alike[0]}
        )
    return {
        **job.about(),
        "layers": rows,
        "bytes_in": sum(adapter.bytes for adapter in job.adapters),
        "bytes_out": bytes_out,
        # A layer of each shape has been merged by now, and one at a time is all that a merge holds.
        "memory_bytes": _peak_bytes(),
        "seconds": seconds,
    }


def usable() -> list[str]:
    """Returns the names of umbel's methods that work from finished adapters alone."""
    return [name for name in names() if _refusal(load(name)) is None]


@dataclass
class _Job:
    """One merge: what goes in, by which method, and what was measured."""

    adapters: Sequence[StoredAdapter]
    method: Method
    label: str
    options: Mapping[str, Any]
    weights: Sequence[float]
    weights_from: Literal["given", "num_examples", "equal"]
    rank: int | None
    dtype: str
    check: bool
    notes: list[str]
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @property
    def layers(self) -> list[str]:
        """Names of all layers that some client has, in the order of the first that has them."""
        return _layers(self.adapters)

    @property
    def plain(self) -> list[str]:
        return list(dict.fromkeys(name for adapter in self.adapters for name in adapter.plain))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begun

    def run(self, sink: Sink, progress: Progress, only: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """Merges layers and then parameters that are not factors; returns per layer what was measured."""
        layers = list(only or self.layers)
        groups = [layers] if self.method.together else [[name] for name in layers]
        owners = {name: [k for k, adapter in enumerate(self.adapters) if name in adapter.layers] for name in layers}
        found: dict[str, dict[str, Any]] = {}
        uploads = _uploads(self.adapters, [(k, name) for name in layers for k in owners[name]], self.seconds)
        for group in groups:
            found |= self._merge(group, owners, uploads, sink)
            progress(group[-1], len(found), len(layers))
        for name in [] if only else self.plain:
            self._mean(name, sink)
        return found

    def _merge(
        self, group: Sequence[str], owners: Mapping[str, list[int]], uploads: Iterator[Factors], sink: Sink
    ) -> dict[str, dict[str, Any]]:
        """Merges the layers of one call of `combine_layers`."""
        got: dict[str, Any] = {}
        held: dict[str, Factors] = {}
        ideal: dict[str, algebra.Product] = {}
        for name in group:
            got[name], exact = self._collect(name, owners[name], uploads)
            # Before the uploads there is nothing: ΔW = 0, at the rank of the largest.
            shape, r = _shape(self.adapters, name), max(self.adapters[k].layers[name].rank for k in owners[name])
            held[name] = {"A": torch.zeros(r, shape.d_in), "B": torch.zeros(shape.d_out, r)}
            if exact is not None:
                ideal[name] = exact
        with self.timed("computing"):
            downloads = self.method.combine_layers(got, held)
        found: dict[str, dict[str, Any]] = {}
        for name, download in downloads.items():
            with self.timed("computing"):
                merged = self._fitted(algebra.compact(*update(name, download, held[name])))
                merged = self._shared(merged, owners[name])
            with self.timed("writing"):
                kept = sink.layer(name, *merged)
            found[name] = {"error": None, "rank": merged[0].shape[1], "energy": None}
            if name in ideal:
                with self.timed("checking"):
                    found[name] |= self._compared(name, (kept["B"], kept["A"]), self._shared(ideal[name], owners[name]))
            if len(owners[name]) < len(self.adapters):
                found[name]["clients"] = len(owners[name])
        return found

    def _collect(self, name: str, owners: list[int], uploads: Iterator[Factors]) -> tuple[Any, algebra.Product | None]:
        """Returns what the method's collector makes of one layer, and the exact mean of the products where it is checked."""
        collector = self.method.collect()
        exact = Stack() if self.check else None
        for k in owners:
            factors = next(uploads)
            with self.timed("computing"):
                self._add(collector, factors, k, name)
            if exact is not None:
                with self.timed("checking"):
                    # In float64: the stack of a method is in float32, and its roundings would not be seen.
                    exact.add({key: x.double() for key, x in factors.items()}, self.weights[k])
        with self.timed("computing"):
            got = collector.done()
        if exact is None:
            return got, None
        with self.timed("checking"):
            stack = exact.done()
        return got, (stack["B"], stack["A"])

    def _shared(self, merged: algebra.Product, owners: list[int]) -> algebra.Product:
        """Who lacks a layer has ΔW = 0 there, and the mean over those who have it counts by their share."""
        if len(owners) == len(self.adapters):
            return merged
        return merged[0] * (sum(self.weights[k] for k in owners) / sum(self.weights)), merged[1]

    def _compared(self, name: str, kept: algebra.Product, ideal: algebra.Product) -> dict[str, float]:
        error, energy = algebra.error_and_energy(kept, ideal)
        if math.isfinite(error):
            return {"error": error, "energy": energy}
        self.notes.append(f"layer {name}: the mean of the updates is zero, and no error is relative to it")
        return {}

    def _add(self, collector: Collector, factors: Factors, k: int, name: str) -> None:
        try:
            collector.add(factors, self.weights[k])
        except MethodError as error:
            raise MethodError(f"layer {name!r}: {self.adapters[k].name} {error}") from None

    def _fitted(self, merged: algebra.Product) -> algebra.Product:
        """The product at the rank that was asked for."""
        B, A = merged
        if self.rank is None or B.shape[1] == self.rank:
            return merged
        if B.shape[1] > self.rank:
            B, A, _ = algebra.truncated_product(B, A, rank=self.rank)
        missing = self.rank - B.shape[1]
        return torch.nn.functional.pad(B, (0, missing)), torch.nn.functional.pad(A, (0, 0, 0, missing))

    def _mean(self, name: str, sink: Sink) -> None:
        mean = Mean()
        for k, adapter in enumerate(self.adapters):
            if name in adapter.plain:
                with self.timed("reading"):
                    x = adapter.read_plain(name)
                with self.timed("computing"):
                    mean.add({name: x}, self.weights[k])
        with self.timed("writing"):
            sink.plain(name, mean.done()[name])

    def config(self, layers: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        return peft_folder.stock_config(self.adapters, {name: own["rank"] for name, own in layers.items()}, self.plain)

    def about_adapter(self) -> dict[str, Any]:
        """What umbel.json says, so that a merge can be merged again."""
        about: dict[str, Any] = {"umbel": __version__, "method": self.label}
        for key in ("labels", "pooling"):
            about |= next(({key: a.about[key]} for a in self.adapters if key in a.about), {})
        if self.weights_from == "num_examples":
            about["num_examples"] = round(sum(self.weights))
        return about

    def about(self) -> dict[str, Any]:
        total = sum(self.weights)
        return {
            "umbel": __version__,
            "method": {"name": self.label, **self.options},
            "clients": [
                {"path": adapter.name, "weight": weight, "share": weight / total}
                for adapter, weight in zip(self.adapters, self.weights)
            ],
            "weights_from": self.weights_from,
            "notes": self.notes,
        }

    def report(self, layers: Mapping[str, dict[str, Any]], bytes_out: int) -> dict[str, Any]:
        return {
            **self.about(),
            "layers": dict(layers),
            "plain": self.plain,
            "dtype": self.dtype,
            "bytes_in": sum(adapter.bytes for adapter in self.adapters),
            "bytes_out": bytes_out,
            "peak_memory_bytes": _peak_bytes(),
            "seconds": {**self.seconds, "total": 0.0},
        }


def _job(
    adapters: Sequence[StoredAdapter],
    name: str | None,
    options: Mapping[str, Any] | None,
    weights: Sequence[float] | None,
    rank: int | None,
    dtype: str,
    force: bool,
    check: bool,
) -> _Job:
    if not adapters:
        raise MergeError("no adapters; give the folders to merge")
    own = dict(options or {})
    if name is None:
        if own:
            raise MergeError(f"options {', '.join(own)} without a method; name it, e.g. florist")
        name, own = "florist", {"energy": 1.0, "adopt": "merge"}
    chosen = load(name, **own)
    if dataclasses.is_dataclass(chosen):
        own = {key: value for key, value in dataclasses.asdict(chosen).items() if value is not None}
    refusal = _refusal(chosen)
    if refusal is not None:
        raise MergeError(f"method {name!r} {refusal}. From finished adapters work: {', '.join(usable())}")
    if dtype not in DTYPES:
        raise MergeError(f"dtype: got {dtype!r}, allowed: {', '.join(DTYPES)}")
    notes = peft_folder.check_together(adapters, force)
    most = max(min(shape.d_out, shape.d_in) for adapter in adapters for shape in adapter.layers.values())
    if rank is not None and not (type(rank) is int and 1 <= rank <= most):
        raise MergeError(f"rank: got {rank!r}, allowed: a whole number from 1 to {most}, the rank of the largest layer")
    if not chosen.mixed_ranks:
        _check_one_rank(name, adapters)
    if chosen.together and any(len(adapter.layers) < len(_layers(adapters)) for adapter in adapters):
        raise MergeError(
            f"{name} with {_said(own)} combines all layers at once and needs all of them in every folder; {notes[-1]}"
        )
    numbers, weights_from = _weights(adapters, weights, notes)
    return _Job(adapters, chosen, name, own, numbers, weights_from, rank, dtype, check, notes)


def _refusal(chosen: Method) -> str | None:
    """Why a method cannot work from finished adapters, or None where it can."""
    if chosen.keeps:
        return f"leaves {', '.join(chosen.keeps)} with each client, so that there is no common adapter"
    if chosen.speaks:
        return (
            "asks every client more than once, each time about what the last answers came to, which finished adapters cannot "
            "answer; best_rank and flexlora compute from them what it comes near"
        )
    if set(chosen.sends) == {"B"}:
        return "averages B on an A that all clients must share; where all folders have the same A, fedit gives the same"
    if set(chosen.sends) != {"A", "B"}:
        return f"averages {', '.join(chosen.sends)}, which a PEFT folder does not hold"
    if list(chosen.plan(1)) != [chosen]:
        return "trains something else in each round, which a folder does not say"
    return None


def _check_one_rank(name: str, adapters: Sequence[StoredAdapter]) -> None:
    first: dict[str, StoredAdapter] = {}
    for adapter in adapters:
        for layer, own in adapter.layers.items():
            other = first.setdefault(layer, adapter)
            if other.layers[layer].rank != own.rank:
                raise MethodError(
                    f"layer {layer!r}: rank {other.layers[layer].rank} in {other.name}, {own.rank} in {adapter.name}. "
                    f"{name} needs one rank; {taking_mixed_ranks()}"
                )


def _weights(
    adapters: Sequence[StoredAdapter], given: Sequence[float] | None, notes: list[str]
) -> tuple[list[float], Literal["given", "num_examples", "equal"]]:
    if given is not None:
        if len(given) != len(adapters):
            raise MergeError(f"weights: got {len(given)}, allowed: {len(adapters)}, one for each folder")
        given = [weight.item() if isinstance(weight, Tensor) else weight for weight in given]
        for weight, adapter in zip(given, adapters):
            if not (isinstance(weight, Real) and 0 < weight <= 1e12):
                raise MergeError(
                    f"weights: got {weight!r} for {adapter.name}, allowed: above 0, at most 1e12; leave out who counts 0"
                )
        return [float(weight) for weight in given], "given"
    known = [adapter.num_examples for adapter in adapters]
    rows = [float(n) for n in known if n is not None]
    if len(rows) == len(known):
        return rows, "num_examples"
    if rows:
        lacking = [adapter.name for adapter, n in zip(adapters, known) if n is None]
        notes.append(f"no umbel.json with num_examples in {', '.join(lacking[:3])}; all weigh the same")
    return [1.0] * len(adapters), "equal"


def _layers(adapters: Sequence[StoredAdapter]) -> list[str]:
    return list(dict.fromkeys(name for adapter in adapters for name in adapter.layers))


def _said(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value!r}" for key, value in options.items()) or "its defaults"


def _shape(adapters: Sequence[StoredAdapter], name: str) -> Layer:
    return next(adapter.layers[name] for adapter in adapters if name in adapter.layers)


def _listed(paths: Sequence[str | Path]) -> list[str | Path]:
    if isinstance(paths, str | Path):
        raise MergeError(f"paths: got {str(paths)!r}, wanted a list of folders")
    return list(paths)


def _repeated(paths: Sequence[str | Path]) -> list[str]:
    """Says which folders were given more than once, under whatever name: mostly a slip, but it may be meant."""
    given = collections.Counter(Path(path).resolve() for path in paths)
    return [f"{path} was given {n} times and counts {n} times" for path, n in given.items() if n > 1][:3]


@contextmanager
def _unfinished(out: Path, paths: Sequence[str | Path]) -> Iterator[Path]:
    """Yields the temporary folder that becomes `out`; only one process at a time merges into one folder."""
    with ExitStack() as held:
        # Held for a moment only: between looking and making nobody else may do either.
        folder = os.open(out.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            _check_free(out, paths)
            temporary = held.enter_context(new_folder(out))
            mark = held.enter_context((temporary / UNFINISHED).open("w"))
            fcntl.flock(mark, fcntl.LOCK_EX)
        finally:
            os.close(folder)
        yield temporary


def _check_free(out: Path, paths: Sequence[str | Path]) -> None:
    whole = out.resolve()
    for path in paths:
        if Path(path).resolve().is_relative_to(whole):
            raise MergeError(f"{out} is or holds one of the folders to merge, {path}; give another --out")
    left = whole.with_name(whole.name + ".partial")
    if left.exists() and not (left / UNFINISHED).is_file():
        raise MergeError(f"{left} is in the way, and no merge left it; rename it, or give another --out")
    if left.exists():
        with (left / UNFINISHED).open() as mark:
            try:
                fcntl.flock(mark, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise MergeError(f"another merge is writing {out}; wait for it, or give another --out") from None
    if Path.cwd().is_relative_to(whole):
        raise MergeError(f"{out} is or holds the folder you work in, which cannot be replaced; give --out a name of its own")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise MergeError(f"{out} is there already and is no folder; give another --out, or remove it")
    found = {path.name for path in out.iterdir()} if out.exists() else set[str]()
    foreign = sorted(found - WRITTEN)
    if foreign or (found and "merge.json" not in found):
        what = f"holds {foreign[0]}" if foreign else "has no merge.json"
        raise MergeError(f"{out} is there already and is no earlier merge: it {what}; give another --out, or remove it")


@contextmanager
def _parents_of(out: Path) -> Iterator[None]:
    """Makes the folders above `out`, and takes them away again if the block fails."""
    made = [folder for folder in out.absolute().parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _uploads(
    adapters: Sequence[StoredAdapter], wanted: Sequence[tuple[int, str]], seconds: dict[str, float]
) -> Iterator[Factors]:
    """Yields the factors of (client, layer) pairs in order; the system is told ahead what will be read of each file."""
    own: dict[int, list[str]] = collections.defaultdict(list)
    for k, name in wanted:
        own[k].append(name)
    at, told = dict.fromkeys(own, 0), dict.fromkeys(own, 0)

    def tell(k: int) -> None:
        begin, size = told[k], 0
        while told[k] < len(own[k]) and (told[k] == begin or size <= AHEAD // len(own)):
            size += adapters[k].size(own[k][told[k]])
            told[k] += 1
        adapters[k].announce(own[k][begin : told[k]])

    for k in own:
        tell(k)
    for k, name in wanted:
        begun = time.perf_counter()
        at[k] += 1
        if at[k] == told[k] < len(own[k]):
            tell(k)
        factors = adapters[k].read(name)
        seconds["reading"] += time.perf_counter() - begun
        yield factors


def _peak_bytes() -> int:
    """Returns the largest memory this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _card(job: _Job, report: Mapping[str, Any]) -> str:
    base = job.config({name: {"rank": 1} for name in job.layers})["base_model_name_or_path"]
    errors = [own["error"] for own in report["layers"].values() if own["error"] is not None]
    said = f" Largest distance of a layer from the exact weighted mean: {max(errors):.2g} of its norm." if errors else ""
    return (
        "---\n"
        + (f"base_model: {json.dumps(base)}\n" if base else "")
        + "library_name: peft\ntags: [lora, merged]\n---\n\n"
        + f"# LoRA adapter merged from {len(job.adapters)} adapters ({job.label})\n\nMade by umbel {__version__}.{said} "
        + "merge.json has every layer's. Load it with plain PEFT:\n\n```python\nfrom peft import PeftModel\n"
        + "model = PeftModel.from_pretrained(base_model, '.')\n```\n"
    )
