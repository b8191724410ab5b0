"""umbel plan: what a run will need and send, from its file and the model's configuration alone, before anything starts."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from umbel import config as configuration
from umbel import method as methods
from umbel import run as running
from umbel.config import Config, ConfigError
from umbel.method import Method
from umbel.server import LayerShape, ServerError
from umbel.traffic import FOLLOWED, WAYS, Sites, TooWide, Traffic, traffic

MOST_SIDE = 2048
"""Of a shrunk layer, for methods that are not in the file: what does not fit is left out, since it takes minutes."""

WITHIN = ("train", "update")
"""Phases that make up a training round."""

FLOAT = 4
"""Bytes of a number of the adapter, whatever the model's dtype: PEFT trains it in float32."""


def plan(table: dict[str, Any], clients: int | None = None, link: str = "") -> dict[str, Any]:
    """Returns what `umbel plan` says: layers, and for each method bytes, memory, and time on the wire.

    Args:
        table: A configuration as TOML gives it.
        clients: Their number in place of `split.clients`.
        link: The speed of a site's connection, "20Mbit" or "10MB/s"; "" says no times.

    Raises:
        ConfigError: The configuration cannot be run, or no such link.
    """
    speed = bits_per_second(link) if link else None
    if clients is not None:
        table = configuration.override(table, f"split.clients={clients}")
    configs = configuration.configs(table)
    shared = running._shared(configs)  # pyright: ignore[reportPrivateUsage]
    if clients is not None and shared.split.kind in ("by", "files"):
        raise ConfigError(f"--clients: split.kind = {shared.split.kind!r} takes their number from the rows; leave it out")
    rows, labels, dataset, notes = _rows(shared)
    from umbel.client import model

    base = model.skeleton(shared, labels)
    looks: dict[str, dict[str, Any]] = {}

    def look(config: Config) -> dict[str, Any]:
        key = f"{config.lora} {config.training}"
        if key not in looks:
            looks[key] = _look(base, config)
        return looks[key]

    entries: list[dict[str, Any]] = []
    for label, config in configs.items():
        entries.append(_entry(label, config, look(config), rows, dataset, speed, True))
    known = {config.method.name for config in configs.values()}
    for name in [name for name in methods.names() if name not in known]:
        try:
            config = next(iter(configuration.configs({**table, "method": {"name": name}}).values()))
            entries.append(_entry(name, config, look(config), rows, dataset, speed, False))
        except ConfigError as error:
            entries.append({"label": name, "name": name, "in_file": False, "reason": _short(error)})
    first = next(iter(configs.values()))
    if 0 < first.server.clients_per_round < len(rows) and first.rounds > FOLLOWED:
        notes.append(f"Rounds after number {FOLLOWED} are taken to be like those before: not all clients take part in each.")
    seen = look(first)
    ranks = _ranks(first, rows, dataset)
    return {
        "model": {"name": shared.model.name, "dtype": shared.model.dtype, "parameters": seen["parameters"]},
        "clients": len(rows),
        "clients_per_round": first.server.clients_per_round or len(rows),
        "rounds": first.rounds,
        "wire": first.wire.dtype,
        "layers": _kinds(seen["layers"], ranks),
        "plain": {name: list(shape) for name, shape in seen["plain"].items()},
        "adapter_parameters": {str(k): _numbers(seen["layers"], ranks.get(k)) + _plain(seen) for k in rows},
        "link_bits_per_second": speed,
        "methods": entries,
        "notes": notes,
    }


def bits_per_second(link: str) -> float:
    """Returns a link's speed; k, M and G are powers of 1000, B is eight bits.

    >>> bits_per_second("20Mbit"), bits_per_second("10 MB/s")
    (20000000.0, 80000000.0)

    Raises:
        ConfigError: No such speed.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMG]?)(bit|B)(?:/s)?\s*", link)
    if found is None or not float(found[1]):
        raise ConfigError(f"--link: got {link!r}, allowed: a number with kbit, Mbit, Gbit, kB/s, MB/s or GB/s, e.g. 20Mbit")
    return float(found[1]) * 1000.0 ** " kMG".index((found[2] or " ").replace("K", "k")) * (8 if found[3] == "B" else 1)


def _short(error: Exception) -> str:
    """Why a method cannot run: the first part of the sentence."""
    return str(error).partition(";")[0]


# Who takes part


def _rows(config: Config) -> tuple[dict[int, int], int, Any, list[str]]:
    """Returns each client's training rows, the number of labels, the rows themselves or None, and what had to be assumed."""
    from umbel.client import data, split

    try:
        dataset = data.load(config)
    except ConfigError as error:
        K = config.split.clients
        if K < 1 or config.lora.rank_by:
            raise
        if config.task.kind == "classification" and not config.data.labels:
            raise ConfigError(
                f"the rows cannot be read here, so the size of the head is unknown; give data.labels (--set). {error}"
            ) from None
        away = split.unseen_clients(config, K)
        note = f"The rows cannot be read here, so 1,000 for each client are assumed ({error})."
        return {k: 1000 for k in range(K) if k not in away}, len(config.data.labels), None, [note]
    rows = {k: sum(owner == k for owner in dataset.owner_train) for k in range(dataset.clients) if k not in dataset.unseen}
    return rows, len(dataset.labels), dataset, []


def _ranks(config: Config, rows: Mapping[int, int], dataset: Any) -> dict[int, int]:
    from umbel.client import client

    told: Any = dataset or SimpleNamespace(clients=config.split.clients)
    ranks = client.ranks(config, told)
    return {k: rank for k, rank in ranks.items() if k in rows}


# The model


def _look(base: Any, config: Config) -> dict[str, Any]:
    """Returns what the adapter of a configuration is on this model, and what training would keep in memory."""
    from umbel.client.adapter import Adapter

    sizes = [(p.numel(), p.numel() * p.element_size()) for p in [*base.model.parameters(), *base.model.buffers()]]
    parameters = sum(p.numel() for p in base.model.parameters())
    adapter = Adapter(base.model, config.lora, base.heads, config.seed)
    try:
        adapted = sum(weight.numel() * weight.element_size() for weight in adapter.frozen_weights().values())
        return {
            "parameters": parameters,
            "weights": sum(size for _, size in sizes),
            "layers": dict(adapter.layers),
            "plain": {name: tuple(p.shape) for name, p in adapter.plain_parameters.items()},
            "adapted": adapted,
            "adapted_numbers": sum(weight.numel() for weight in adapter.frozen_weights().values()),
            "activations": _activations(adapter, config),
        }
    finally:
        adapter.remove()


def _activations(adapter: Any, config: Config) -> int | None:
    """Returns the bytes that autograd keeps of one batch of `data.max_length` tokens, by a forward pass without numbers.

    The logits are counted twice besides (they and their gradient). None where the architecture cannot be run that way.
    """
    import torch

    model = adapter.model.get_base_model()
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def note(x: Any) -> Any:
        if x.untyped_storage()._cdata not in own:
            kept[x.untyped_storage()._cdata] = x
        return x

    adapter.trainable(("A", "B"))
    model.train()
    size = config.training.per_device_train_batch_size
    tokens = torch.zeros(size, config.data.max_length, dtype=torch.long, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            # A head on the mean adds next to nothing, and needs the mask's numbers.
            out = getattr(model, "backbone", model)(input_ids=tokens)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    finally:
        model.eval()
    logits = getattr(out, "logits", None)
    twice = 0 if logits is None else 2 * logits.numel() * logits.element_size()
    return sum(x.untyped_storage().nbytes() for x in kept.values()) + twice


def _kinds(layers: Mapping[str, LayerShape], ranks: Mapping[int, int]) -> list[dict[str, Any]]:
    """Returns one entry for each last name and shape of layers."""
    alike: dict[tuple[str, LayerShape], list[str]] = {}
    for name, shape in layers.items():
        alike.setdefault((name.rpartition(".")[2], shape), []).append(name)
    own = sorted(set(ranks.values()))
    return [
        {
            "layers": len(names),
            "example": names[0],
            "d_out": shape.d_out,
            "d_in": shape.d_in,
            "ranks": own or [shape.rank],
        }
        for (_, shape), names in alike.items()
    ]


def _numbers(layers: Mapping[str, LayerShape], rank: int | None = None, names: Iterable[str] = ("A", "B")) -> int:
    """Returns how many numbers the named factors of all layers have."""
    total = 0
    for shape in layers.values():
        r = rank or shape.rank
        total += sum({"A": r * shape.d_in, "B": r * shape.d_out, "R": r * r}[name] for name in names)
    return total


def _plain(seen: Mapping[str, Any]) -> int:
    import math

    return sum(math.prod(shape) for shape in seen["plain"].values())


# One method


def _entry(
    label: str,
    config: Config,
    seen: Mapping[str, Any],
    rows: Mapping[int, int],
    dataset: Any,
    speed: float | None,
    in_file: bool,
) -> dict[str, Any]:
    entry: dict[str, Any] = {"label": label, "name": config.method.name, "in_file": in_file, "reason": None}
    member = running.Member(label, ".", config, list(rows), "method")
    ranks = _ranks(config, rows, dataset)
    layers = {name: replace(shape, rank=max(ranks.values())) if ranks else shape for name, shape in seen["layers"].items()}
    sites = Sites(layers, seen["plain"], rows, ranks, _said(config))
    try:
        told = traffic(running._plan(member), sites, 2**31 if in_file else MOST_SIDE)  # pyright: ignore[reportPrivateUsage]
    except ServerError as error:
        return {**entry, "reason": _short(error)}
    except TooWide:
        return {**entry, "reason": f"stacks {len(rows)} clients, which takes minutes to follow: put it into the file"}
    sent = _sent(told, rows)
    entry |= {"options": config.method.options, "at_most": told.at_most, **sent}
    if speed is not None:
        entry["seconds"] = _seconds(sent, speed)
    if in_file:
        entry["lines"] = told.lines
    phases = list(methods.load(config.method.name, **config.method.options).plan(config.rounds))
    return {**entry, "memory": _memory(config, phases, seen, layers, told)}


def _said(config: Config) -> dict[str, Any]:
    """What a client says of a round, as long as it would be."""
    share, loss = 1 / 3, 10 / 3
    scores: dict[str, float] = {} if config.task.kind == "instruction" else {"accuracy": share}
    scores |= {"accuracy_norm": share} if config.task.choices else {}
    return {"loss": loss, "steps": max(1, config.training.max_steps), "scores": {**scores, "loss": loss, "rows": 100}}


def _sent(told: Traffic, rows: Mapping[int, int]) -> dict[str, Any]:
    """Returns bytes for the site that has the most to carry, and for all."""

    def summed(lines: list[dict[str, Any]], client: int) -> dict[str, int]:
        return {way: sum(line[way].get(str(client), 0) for line in lines) for way in WAYS}

    sites = {k: summed(told.lines, k) for k in rows}
    most = max(sites, key=lambda k: sum(sites[k].values()))
    rounds: dict[int, list[dict[str, Any]]] = {}
    for line in told.lines:
        if line["phase"] in WITHIN:
            rounds.setdefault(line["train_round"], []).append(line)
    mine = [lines for lines in rounds.values() if str(most) in lines[0]["bytes_down"]]
    later = summed([line for lines in mine[1:] for line in lines], most)
    return {
        "site": most,
        "first_round": summed(mine[0] if mine else [], most),
        "later_round": {way: round(size / max(1, len(mine) - 1)) for way, size in later.items()},
        "besides": summed([line for line in told.lines if line["phase"] not in WITHIN], most),
        "run": sites[most],
        "sites": {str(k): own for k, own in sites.items()},
        "all_sites": {way: sum(own[way] for own in sites.values()) for way in WAYS},
        "training_rounds": len(rounds),
    }


def _seconds(sent: Mapping[str, Any], speed: float) -> dict[str, float]:
    """Returns seconds on the wire: a site over its own link, and all sites over one link of that speed."""

    def seconds(sizes: Mapping[str, int]) -> float:
        return sum(sizes.values()) * 8 / speed

    return {
        "first_round": seconds(sent["first_round"]),
        "later_round": seconds(sent["later_round"]),
        "run": seconds(sent["run"]),
        "server_round": seconds(sent["all_sites"]) / sent["training_rounds"],
        "server_run": seconds(sent["all_sites"]),
    }


def _memory(
    config: Config,
    phases: list[Method],
    seen: Mapping[str, Any],
    layers: Mapping[str, LayerShape],
    told: Traffic,
) -> dict[str, Any]:
    """Returns bytes in memory and on disk; what is rough in them is said on the page."""
    names = {"A", "B", *(name for phase in phases for name in phase.trains)}
    trained = max(_numbers(layers, names=phase.trains) for phase in phases if phase.trains) + _plain(seen)
    adapter = FLOAT * (_numbers(layers, names=names) + _plain(seen))
    moments = 0 if config.training.optim == "sgd" else 2 * FLOAT * trained
    # Products that came down stay beside the frozen weights, and those are copied before the first is added.
    products = 0
    for layer, width in told.merged.items():
        shape = layers[layer]
        products += FLOAT * min(width * config.rounds, shape.d_out, shape.d_in) * (shape.d_out + shape.d_in)
    merged = products + (seen["adapted"] if told.merged else 0)
    largest = max(size for line in told.lines for way in WAYS for size in line[way].values())
    measures = any(not phase.trains and phase.sends and phase.measures == "gradient" for phase in phases)
    measuring = seen["adapted"] + FLOAT * seen["adapted_numbers"] if measures else 0
    site = {
        "weights": seen["weights"],
        "adapter": adapter,
        "gradients": max(FLOAT * trained, measuring),
        "optimizer": moments,
        "activations": seen["activations"],
        "merged": merged,
        "messages": 2 * largest,
    }
    # What all held when the round began stays in the file where messages need it.
    common = FLOAT * _numbers(layers) if any(phase.speaks for phase in phases) else 0
    state = adapter + products + common + (moments if config.training.optimizer_state == "keep" else 0)
    return {
        "site": {**site, "total": sum(size or 0 for size in site.values())},
        # Two states, so that a kill at any moment leaves a whole one.
        "disk": {"model": _on_disk(config, seen), "states": 2 * state},
        "server": {"kept": told.kept + products, "messages": 2 * largest, "scoring": seen["weights"] + merged},
    }


def _on_disk(config: Config, seen: Mapping[str, Any]) -> int:
    from umbel.client import data

    place = data.locate(config.model.name)
    if place is None:
        return seen["weights"]
    files = [place / config.model.gguf_file] if config.model.gguf_file else [p for p in Path(place).rglob("*") if p.is_file()]
    size = sum(path.stat().st_size for path in files)
    return max(size, 0 if config.model.gguf_file else seen["weights"])
