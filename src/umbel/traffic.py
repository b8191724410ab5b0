"""What a run will send, in bytes, before it begins: the real loop, server and wire with clients that answer invented factors.

No size is computed by a formula per method. One layer of each shape takes part, and a message's length for all layers follows
from its own header. A layer's sides are shrunk for that, as long as no width in any message reaches them: a method depends on
d_out and d_in only where a stack gets as wide as the matrix, so below that it does the same to a small one.
"""

# pyright: reportConstantRedefinition=false

import itertools
import json
import math
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umbel import wire
from umbel.client import masked
from umbel.engine import Ask, Reply
from umbel.loop import Plan, federate
from umbel.method import HELD, Factors, Mean, Method
from umbel.record import Record
from umbel.server import Aggregator, LayerShape, Server, ServerError

Shape = tuple[int, ...]

WAYS = ("bytes_down", "bytes_up")

ALIKE = 4
"""Rounds after which a run in which everybody takes part sends nothing new, but for what its phases change."""

FOLLOWED = 32
"""Rounds that are followed one by one where not all clients take part in each; later ones are taken to be like them."""


@dataclass(frozen=True)
class Sites:
    """Who takes part, and with what.

    Args:
        layers: All adapted layers, with the largest rank.
        plain: Shapes of the trained parameters that are not factors.
        rows: Training rows of each client.
        ranks: Per client the rank of its adapter, where clients differ.
        said: What a client says of a round besides its rows: "loss", "steps", "scores" as it would look.
    """

    layers: Mapping[str, LayerShape]
    plain: Mapping[str, Shape]
    rows: Mapping[int, int]
    ranks: Mapping[int, int] = field(default_factory=dict[int, int])
    said: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Traffic:
    """What a run will send.

    Args:
        lines: As of `rounds.jsonl`: "round", "phase", "train_round", and "bytes_down" and "bytes_up" by client.
        at_most: Of "bytes_down" and "bytes_up" those that depend on what clients will have learned; `lines` then has the most
            that they can be.
        kept: Bytes that the server keeps of uploads at the worst moment of a round, and of what is held in common.
        merged: Per layer the width of the product that clients add to the frozen weight in a round; empty where none does.
        followed: Training rounds that were followed; all others are like one of them.
    """

    lines: list[dict[str, Any]]
    at_most: list[str]
    kept: int
    merged: dict[str, int]
    followed: int


class TooWide(Exception):
    """A width reached the side of a shrunk layer, so that the layer's own size may matter."""


def traffic(plan: Plan, sites: Sites, most_side: int = 2**31) -> Traffic:
    """Returns what a run of this plan will send.

    Args:
        plan: The run's; nothing is scored or measured here.
        sites: Who takes part.
        most_side: How large a layer may become before it is given up: what takes minutes where hundreds of clients are stacked.

    Raises:
        ServerError: The method refuses these layers or ranks.
        TooWide: It was given up.
    """
    rounds = _enough(plan)
    short = replace(plan, rounds=rounds, observe="never", observe_start=False)
    small, apart = _settled(short, sites, most_side)
    alike = _simulate(short, sites, small, agree=True)
    kept, merged = _kept(short, sites)
    at_most = [way for way in WAYS if [line[way] for line in apart] != [line[way] for line in alike]]
    phases, followed = list(plan.method.plan(plan.rounds)), list(plan.method.plan(rounds))
    lines = _whole_run(apart, phases, followed, rounds < plan.rounds and _partly(plan))
    return Traffic(lines, at_most, kept, merged, rounds)


def _settled(plan: Plan, sites: Sites, most_side: int) -> tuple["Small", list[dict[str, Any]]]:
    """Returns layers so large that some more changes no message, and what was sent with them."""
    side = 4 + 2 * max(shape.rank for shape in sites.layers.values())
    while True:
        small, larger = Small(sites.layers, side), Small(sites.layers, side + 7)
        try:
            lines = _simulate(plan, sites, small, agree=False)
            if small.layers == small.full or lines == _simulate(plan, sites, larger, agree=False):
                return small, lines
        except TooWide:
            pass
        side *= 2
        if side > most_side:
            raise TooWide


def _partly(plan: Plan) -> bool:
    return 0 < plan.clients_per_round < len(plan.clients)


# Which rounds are followed, and which of them a round is like


def _enough(plan: Plan) -> int:
    """Returns how many training rounds show everything that the run's phases do."""
    if _partly(plan):
        return min(plan.rounds, FOLLOWED)
    wanted = set(_steps(list(plan.method.plan(plan.rounds))))
    for rounds in range(min(plan.rounds, ALIKE), plan.rounds):
        if wanted <= set(_steps(list(plan.method.plan(rounds)))):
            return rounds
    return plan.rounds


def _steps(phases: Sequence[Method]) -> list[Any]:
    """Returns for each phase what tells it from others: what it is, and what came before it."""
    names = ["", *(f"{type(phase).__qualname__}{sorted(vars(phase).items())}" for phase in phases)]
    return list(itertools.pairwise(names))


def _whole_run(
    lines: list[dict[str, Any]], phases: list[Method], followed: list[Method], in_turn: bool
) -> list[dict[str, Any]]:
    """Returns a line for every phase of the run: that of the like phase that was followed last, or of all such in turn."""
    steps, known = _steps(phases), _steps(followed)
    result = [lines[0]]
    train_round = 0
    for index, step in enumerate(steps):
        train_round += bool(phases[index].trains)
        if index < len(known) and steps[: index + 1] == known[: index + 1]:
            like = index
        else:
            fitting = [i for i, own in enumerate(known) if own == step]
            late = [i for i in fitting if i >= len(known) // 2] or fitting
            # By the training round, so that what goes on with a round is of the same clients.
            like = late[train_round % len(late)] if in_turn else late[-1]
        line = lines[like + 1]
        result.append({**line, "round": index + 1, "train_round": train_round if line["train_round"] else 0})
    return result


# Layers of one shape stand for each other


class Small:
    """One layer of each shape, no larger than it needs to be, and lengths of messages with all layers.

    Args:
        layers: All layers.
        side: The smaller side of a shrunk layer.
    """

    def __init__(self, layers: Mapping[str, LayerShape], side: int) -> None:
        self.side = side
        alike: dict[LayerShape, list[str]] = {}
        for name, shape in layers.items():
            alike.setdefault(shape, []).append(name)
        self.names = {names[0]: names for names in alike.values()}
        self.full = {names[0]: shape for shape, names in alike.items()}
        self.layers = {name: self._shrunk(shape) for name, shape in self.full.items()}
        self._lengths: dict[Any, tuple[int, int]] = {}

    def _shrunk(self, shape: LayerShape) -> LayerShape:
        if self.side >= min(shape.d_out, shape.d_in):
            return shape
        wide, tall = shape.d_in > shape.d_out, shape.d_out > shape.d_in
        return LayerShape(self.side + tall, self.side + wide, shape.rank)

    def grown(self, layer: str, shape: Sequence[int]) -> list[int]:
        """Returns a tensor's shape as it is in the real layer."""
        full, small = self.full[layer], self.layers[layer]
        sides = {small.d_out: full.d_out, small.d_in: full.d_in}
        return [sides.get(n, n) for n in shape]

    def length(self, payload: bytes) -> int:
        """Returns how long a message would be with all layers in it.

        Raises:
            TooWide: A factor in it is as wide as a shrunk layer.
        """
        said, header = opened(payload)
        key = json.dumps(header)
        if key not in self._lengths:
            self._lengths[key] = self._tensors(header)
        entries, numbers = self._lengths[key]
        # The header stands inside JSON as a text, so its quotes are escaped.
        text = _compact({"umbel": _compact(self._grown_header(said), ascii=True)})
        both = len("{") + len(f'"__metadata__":{text}'.encode()) + (1 + entries if entries else 0) + len("}")
        return 8 + math.ceil(both / 8) * 8 + numbers

    def _tensors(self, header: Mapping[str, Any]) -> tuple[int, int]:
        """Returns the length of all tensors' entries, with commas between them, and of their numbers."""
        found: list[tuple[int, str, str, list[int], int]] = []
        order = {dtype: i for i, dtype in enumerate(dict.fromkeys(entry["dtype"] for entry in header.values()))}
        for name, entry in header.items():
            shape, (start, end) = entry["shape"], entry["data_offsets"]
            parts = name.split("|")
            layer = next((part for part in parts if part in self.names), None)
            if layer is None:
                found.append((order[entry["dtype"]], name, entry["dtype"], shape, end - start))
                continue
            self._check(layer, parts[-1], shape)
            grown = self.grown(layer, shape)
            count = (end - start) * math.prod(grown) // max(1, math.prod(shape))
            for other in self.names[layer]:
                renamed = "|".join(other if part == layer else part for part in parts)
                found.append((order[entry["dtype"]], renamed, entry["dtype"], grown, count))
        entries: dict[str, Any] = {}
        start = 0
        for _, name, dtype, shape, count in sorted(found):
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + count]}
            start += count
        return len(_compact(entries).encode()) - 2 if entries else 0, start

    def _check(self, layer: str, name: str, shape: Sequence[int]) -> None:
        if self.layers[layer] == self.full[layer] or name.removeprefix("merge.") not in ("A", "B", "R"):
            return
        width = max(shape) if name == "R" else shape[0] if name.endswith("A") else shape[1]
        if width >= self.side:
            raise TooWide

    def _grown_header(self, value: Any, layer: str | None = None) -> Any:
        """Repeats what is said of a layer for all that it stands for."""
        if isinstance(value, dict):
            result: dict[str, Any] = {}
            for key, own in value.items():
                for name in self.names.get(key, [key]):
                    result[name] = self._grown_header(own, key if key in self.names else layer)
            return result
        if isinstance(value, list) and layer is not None and all(type(n) is int for n in value):
            return self.grown(layer, value)
        return value


def opened(payload: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a message's header and its tensors' entries (dtype, shape, place), without the tensors."""
    (size,) = struct.unpack("<Q", payload[:8])
    entries = json.loads(payload[8 : 8 + size])
    return json.loads(entries.pop("__metadata__")["umbel"]), entries


def _compact(value: Any, ascii: bool = False) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=ascii)


# The simulated run

STAGES = {
    "train": (("wire", "adapter", "fit", "evaluate", "record"), ("loss", "steps", "scores")),
    "update": (("wire", "adapter", "record"), ()),
    "measure": (("wire", "adapter", "fit", "record"), ()),
    "gather": (("wire", "adapter", "evaluate", "record"), ("scores",)),
}
"""Per kind of request the stages whose seconds a client says, and what else it says."""


class Answering:
    """A client without a model: it answers every request with factors of the right shapes.

    Args:
        number: Its number.
        place: Its place among the clients, and how many there are.
        sites: Who takes part.
        small: The layers it has.
        plan: The run's.
        agree: Clients differ as much as they can (the widest spectrum a mean of products may have) and give up nothing, or
            have one direction in common that outweighs all others, and whatever a method lets them give up.
        folder: For the secrets of masked uploads.
    """

    def __init__(
        self, number: int, place: tuple[int, int], sites: Sites, small: Small, plan: Plan, agree: bool, folder: Path = Path()
    ) -> None:
        self.place, self.sites, self.small, self.agree = place, sites, small, agree
        self.method, self.dtype = plan.method, plan.dtype
        self.rank = {layer: sites.ranks.get(number, shape.rank) for layer, shape in small.layers.items()}
        self._phases = list(plan.method.plan(plan.rounds))
        self._R: dict[str, Shape] = {}
        self._given: dict[str, Factors] = {}
        self._drawn: dict[tuple[str, str, Shape], Tensor] = {}
        # All alike, so that no upload weighs more: a spectrum of weights would be no flat one.
        self.rows = 1 if plan.privacy.secure_aggregation else max(sites.rows.values())
        self.exchange = masked.Exchange(number, folder / str(number)) if plan.privacy.secure_aggregation else None

    def answer(self, payload: bytes) -> bytes:
        """Answers one request as `umbel.client.client.Client` does."""
        header, entries = opened(payload)
        echo = {key: header.get(key) for key in wire.ECHO}
        if header["kind"] == "open":
            layers = {layer: [s.d_out, s.d_in, self.rank[layer]] for layer, s in self.small.layers.items()}
            plain = {name: list(shape) for name, shape in self.sites.plain.items()}
            return wire.encode(wire.Message({**echo, "layers": layers, "plain": plain, "rows": self.rows}))
        if self.exchange is not None and header["kind"] in masked.KINDS:
            return wire.encode(wire.Message({**echo, **self.exchange.answer(header), "seconds": {"wire": 0.123}}))
        self.take({name: entry["shape"] for name, entry in entries.items()})
        measures = header["kind"] == "measure"
        phase = self._phases[header["round"] - 1]
        if self.agree and header["kind"] == "train":
            self._give_up()
        factors = self.upload(phase, header["round"])
        sends_plain = not measures and not header["keeps"] and not phase.continues
        tensors = wire.pack_factors(factors) | (wire.pack_plain(self.plain(header["round"])) if sends_plain else {})
        rows = max(1, min(header["samples"], self.rows)) if measures else self.rows
        stages, keys = STAGES[header["kind"]]
        told = {"steps": 1, **self.sites.said}
        said = {key: told[key] for key in keys if key in told}
        said |= {} if self.dtype == "float32" else {"rounding": 1 / 300}
        shown = {"rows": rows, **said}
        if self.exchange is not None:
            tensors, shown = self.exchange.mask(header, rows, said.get("loss"), tensors), {}
        answer = {**echo, **shown, "seconds": dict.fromkeys(stages, 0.123)}
        return wire.encode(wire.Message(answer, tensors), self.dtype)

    def take(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Notes the shape of an R that came down, and of what was given for this phase, from tensors' names and shapes."""
        self._R |= {name.removesuffix("|R"): tuple(shape) for name, shape in shapes.items() if name.endswith("|R")}
        for key, shape in shapes.items():
            layer, _, name = key.rpartition("|")
            if layer in self.rank and name not in (*HELD, "merge.B", "merge.A"):
                self._given.setdefault(layer, {})[name] = torch.eye(shape[0], shape[1])

    def _give_up(self) -> None:
        """Lets the method cut this client's rank after a training that made everything smaller."""
        if type(self.method).trained is Method.trained:
            return
        for layer in self.rank:
            after = {name: self._factor(layer, name) for name in ("A", "B")}
            before = {name: 2 * x for name, x in after.items()}
            self.rank[layer] = self.method.trained(before, after)["A"].shape[0]

    def plain(self, index: int) -> dict[str, Tensor]:
        """Returns the parameters that are not factors."""
        return {name: torch.full(shape, 0.01 * index) for name, shape in self.sites.plain.items()}

    def factors(self, sends: Iterable[str], index: int) -> dict[str, Factors]:
        """Returns what is sent in a round: other numbers in each."""
        return {layer: {name: self._factor(layer, name) * (1 + index / 64) for name in sends} for layer in self.rank}

    def upload(self, phase: Method, index: int) -> dict[str, Factors]:
        """Returns what is sent in a phase."""
        if not phase.speaks:
            return self.factors(phase.sends, index)
        result: dict[str, Factors] = {}
        for layer, own in self.factors(("A", "B"), index).items():
            shape = self.small.layers[layer]
            common = {"A": torch.ones(shape.rank, shape.d_in), "B": torch.ones(shape.d_out, shape.rank)}
            result[layer] = phase.message(own, common | self._given.get(layer, {}))
        return result

    def _factor(self, layer: str, name: str) -> Tensor:
        rank = self.rank[layer]
        R = self._R.get(layer, (rank, rank))
        key = layer, name, (rank, *R)
        if key not in self._drawn:
            self._drawn[key] = self._draw(self.small.layers[layer], rank, R, name)
        return self._drawn[key]

    def _draw(self, shape: LayerShape, rank: int, R: Shape, name: str) -> Tensor:
        if name == "R":
            return _waves(R[0], R[1], range(R[1]), max(R))
        if name == "G":
            return _waves(shape.d_out, shape.d_in, range(shape.d_in), max(shape.d_out, shape.d_in))
        index, count = self.place
        most = max(s.rank for s in self.small.layers.values())
        own = _waves(shape.d_out if name == "B" else shape.d_in, rank, range(index * most, index * most + rank), count * most)
        if self.agree:
            own[:, 0] = own[:, 0] + 10 * own.shape[0] ** -0.5
        return own if name == "B" else own.T.contiguous()


def _waves(rows: int, columns: int, which: Sequence[int], count: int) -> Tensor:
    """Returns columns of the cosine transform of size `count`, cut or filled with zeros to so many rows.

    All its columns together are orthonormal, or, with fewer rows than columns, spread evenly over all directions: a sum of
    their outer products has the flattest spectrum there is.
    """
    frequency = torch.arange(rows, dtype=torch.float64)[:, None]
    place = torch.tensor(list(which)[:columns], dtype=torch.float64)[None] + 0.5
    waves = torch.cos(torch.pi / count * place * frequency) * (2 / count) ** 0.5
    waves[:1] *= 0.5**0.5
    return torch.where(frequency < count, waves, torch.zeros_like(waves)).float()


class _Scale:
    """An engine that weighs what it carries, as it would be with all layers."""

    def __init__(self, clients: Mapping[int, Answering], small: Small) -> None:
        self._clients, self._small = clients, small
        self.weighed: tuple[dict[str, int], dict[str, int]] = ({}, {})

    def ask(self, asks: Iterable[Ask]) -> Iterator[Reply]:
        for ask in asks:
            reply = self._clients[ask.client].answer(ask.payload)
            down, up = self.weighed
            for bytes_of, payload in ((down, ask.payload), (up, reply)):
                bytes_of[str(ask.client)] = bytes_of.get(str(ask.client), 0) + self._small.length(payload)
            yield Reply(ask.client, reply)


class _Lines(Record):
    """A record that keeps the lines in memory and nothing on disk."""

    def __init__(self, scale: _Scale) -> None:
        self.folder = Path()
        self.scale, self.kept = scale, list[dict[str, Any]]()

    def restore(self) -> None:
        return None

    def commit(self, header: dict[str, Any], tensors: dict[str, Any], line: dict[str, Any]) -> None:
        if line["refused"]:
            raise ServerError(f"client {line['refused'][0]['client']}: {line['refused'][0]['reason']}")
        down, up = self.scale.weighed
        told = {key: line[key] for key in ("round", "phase", "train_round", "asked")}
        self.kept.append({**told, "bytes_down": dict(down), "bytes_up": dict(up)})
        down.clear()
        up.clear()


def _clients(plan: Plan, sites: Sites, small: Small, agree: bool, folder: Path = Path()) -> dict[int, Answering]:
    count = len(plan.clients)
    return {k: Answering(k, (i, count), sites, small, plan, agree, folder) for i, k in enumerate(plan.clients)}


def _simulate(plan: Plan, sites: Sites, small: Small, agree: bool) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        scale = _Scale(_clients(plan, sites, small, agree, Path(folder)), small)
        record = _Lines(scale)
        # Noise at the server is as long as the mean it is added to, and nothing here may be written into a ledger.
        federate(scale, replace(plan, measure_error=False, privacy=replace(plan.privacy, unit="none")), record)
    return record.kept


# What the server keeps


def _kept(plan: Plan, sites: Sites) -> tuple[int, dict[str, int]]:
    """Returns the most bytes that a round's folding keeps, with what is held in common, and per layer the width that is merged.

    Both are read off the real objects, of layers that are wider than all clients' factors side by side, or the real ones.
    """
    most_rank = max(shape.rank for shape in sites.layers.values())
    small = Small(sites.layers, 1 + sum(sites.ranks.get(k, most_rank) for k in plan.clients) + 2 * most_rank)
    clients = _clients(plan, sites, small, agree=False)
    server = Server(small.layers, plan.seed, plan.dtype, dict(sites.plain))
    most, merged = 0, dict[str, int]()
    for index, phase in enumerate(list(plan.method.plan(1))):
        everybody = list(clients)
        asked = everybody[: plan.clients_per_round or None] if phase.trains or phase.continues else everybody
        aggregator = Aggregator(phase, server, plan.measure_error)
        for k in asked if phase.sends else []:
            for layer, rank in clients[k].rank.items():
                server.note_rank(k, layer, rank)
            clients[k].take({name: x.shape for name, x in wire.pack_factors(server.held).items()})
            plain = clients[k].plain(index + 1) if aggregator._sends_plain() else {}  # pyright: ignore[reportPrivateUsage]
            aggregator.add(k, 1.0, clients[k].upload(phase, index + 1), plain)
        if not phase.sends:
            aggregator.folded.append(-1)
        most = max(most, _bytes([vars(server)], small) + _collected(aggregator, small))
        aggregated = aggregator.done()
        for layer, download in aggregated.downloads.items():
            merged |= {name: download.merge[0].shape[1] for name in small.names[layer] if download.merge is not None}
        server.settle(aggregated)
    if plan.privacy.secure_aggregation:
        most += _masked(plan, sites)
    return most, merged


def _masked(plan: Plan, sites: Sites) -> int:
    """Returns the bytes of a sum of masked uploads and of the upload that is added to it: int64, all layers at once.

    What a method says of its factors, as `power` does, is taken for as many numbers as the larger of them.
    """
    plain = sum(math.prod(shape) for shape in sites.plain.values())
    numbers = [plain]
    for phase in plan.method.plan(1):
        for_each = {
            shape: {
                "A": shape.rank * shape.d_in,
                "B": shape.d_out * shape.rank,
                "R": shape.rank**2,
                "G": shape.d_out * shape.d_in,
            }
            for shape in set(sites.layers.values())
        }
        numbers.append(
            plain
            + sum(
                for_each[shape].get(name, shape.rank * max(shape.d_in, shape.d_out))
                for shape in sites.layers.values()
                for name in phase.sends
            )
        )
    return 2 * 8 * max(numbers)


def _collected(aggregator: Aggregator, small: Small) -> int:
    """Returns the bytes of uploads that are in memory at a time: one layer's, of all clients where they are not added up."""
    phase, uploads = aggregator.phase, [factors for _, _, factors in aggregator._uploads]  # pyright: ignore[reportPrivateUsage]
    together = phase.collect is not Mean or (aggregator.measure_error and len(phase.sends) > 1)
    sizes: list[int] = []
    for layer, names in small.names.items():
        each = [sum(4 * math.prod(small.grown(layer, x.shape)) for x in own[layer].values()) for own in uploads if layer in own]
        one = sum(each) if together else max(each, default=0)
        sizes.append(one * len(names) if phase.together else one)
    return sum(sizes) if phase.together else max(sizes, default=0)


def _bytes(root: Any, small: Small) -> int:
    """Returns the bytes of all tensors within reach, each storage once and as large as in all the layers it stands for."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    waiting: list[tuple[Any, str | None]] = [(root, None)]
    while waiting:
        thing, layer = waiting.pop()
        if id(thing) in seen or isinstance(thing, (str, bytes, int, float, type(None), type)):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            times = len(small.names[layer]) if layer else 1
            shape = small.grown(layer, thing.shape) if layer else list(thing.shape)
            place = thing.untyped_storage().data_ptr()
            found[place] = max(found.get(place, 0), math.prod(shape) * thing.element_size() * times)
        elif isinstance(thing, Mapping):
            waiting += [(own, key if isinstance(key, str) and key in small.names else layer) for key, own in thing.items()]
        elif isinstance(thing, (list, tuple, set)):
            waiting += [(own, layer) for own in thing]
        elif hasattr(thing, "__dict__"):
            waiting.append((vars(thing), layer))
    return sum(found.values())
