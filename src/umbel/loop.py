"""federate(): choose clients, ask, fold, combine, record, resume."""

import itertools
import json
import math
import random
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from umbel import algebra, preflight, wire
from umbel.engine import Ask, Engine, Reply
from umbel.method import Method, taking_mixed_ranks
from umbel.record import Record
from umbel.server import MOST_ROWS, OBSERVER, Aggregated, Aggregator, LayerShape, Refused, Server, ServerError

Progress = Callable[[dict[str, Any]], None]
Schema = dict[str, LayerShape | tuple[int, ...]]
"""What clients must agree on: layers by name, and the shapes of other parameters under "plain|<name>"."""

MOST_OPENING_BYTES = 16 * 2**20
"""Of a reply to the opening, which holds names and numbers only."""

MOST_LOST_BYTES = 4096
"""Of a reply that says only that its client's files are gone."""

LOST = {"state": "its state", "state and optimizer": "its state and that of its optimizer"}
"""What a client may say that it has lost, and how the record says it."""

MOST_SCORES, MOST_NAME = 50, 50
"""Scores that a client may report of one model, and the length of a score's name."""

MOST_SAID, LONGEST_SAID = 64, 4096
"""Of the entries in the header of a reply: how many are kept, and how long one may be as JSON."""

UPLOADS = "uploads"
"""The folder under the record's where a round's uploads wait until all are there."""

FEWEST_FOR_MEDIAN = 3
"""Of uploads; among fewer, the median cannot tell which of them is out of line."""

STAGES = ("fit", "evaluate", "adapter", "wire", "server", "record")


@dataclass(frozen=True)
class Plan:
    """What federate() needs to know of a run.

    Args:
        method: The method.
        rounds: Training rounds.
        clients: Their numbers.
        seed: The run's.
        dtype: The wire's.
        clients_per_round: Asked in each round; 0 asks all.
        measure_error: See `Aggregator`.
        observe: "rounds" scores the common model after every round, "end" after the last, "never" not at all.
        observe_by: "observer" scores it on all test rows. "clients", where the server has none, score it on their own, after
            the last round only; they have the final adapter then, too.
        observe_start: Score the common model before the first round too.
        score_clients: Every client scores its own model on its own test rows, after training and before aggregation.
        most_rank: The largest rank that a client may say it has; 0 bounds it by the layer's size alone.
        run: Names the run for ever, so that a reply to another one is refused; "" where there is one run only.
        min_clients: Uploads without which a round is not committed, answers without which a run does not begin; 0 is half of
            the clients asked, rounded up: a result of fewer would speak for a minority, and two clients may lose one.
        rejoin: Clients that were not there at the opening are asked again before each training round.
        expected: Facts of the server that clients must share, as `umbel.preflight.mismatch` compares them; None asks for none.
        norm_limit: Refuse an upload whose ΔW has more than so many times the median norm of the round's; 0 refuses none.
    """

    method: Method
    rounds: int
    clients: list[int]
    seed: int = 0
    dtype: str = "float32"
    clients_per_round: int = 0
    measure_error: bool = True
    observe: str = "rounds"
    observe_start: bool = False
    score_clients: bool = True
    most_rank: int = 0
    run: str = ""
    min_clients: int = 0
    observe_by: str = "observer"
    rejoin: bool = False
    expected: Mapping[str, Any] | None = None

    def quorum(self, asked: int) -> int:
        """Returns how many of so many clients asked must have answered.

        >>> [Plan(Method, 1, []).quorum(asked) for asked in (1, 2, 3, 5)]
        [1, 1, 2, 3]
        """
        return min(self.min_clients or math.ceil(asked / 2), asked)

    norm_limit: float = 100.0


@dataclass
class _Heard:
    """What came out of one round of asking, besides tensors; `run`, `round` and `kind` are what was asked."""

    run: str
    round: int
    kind: str
    answered: list[int] = field(default_factory=list[int])
    refused: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    replies: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    bytes_down: dict[str, int] = field(default_factory=dict[str, int])
    bytes_up: dict[str, int] = field(default_factory=dict[str, int])
    norms: dict[int, float] = field(default_factory=dict[int, float])
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    joined: list[int] = field(default_factory=list[int])
    lost: dict[str, str] = field(default_factory=dict[str, str])
    facts: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    def add(self, other: "_Heard") -> None:
        """Takes over what another asking in the same round came to, but not its answers."""
        self.refused += other.refused
        self.joined += other.joined
        self.lost |= other.lost
        self.facts |= other.facts
        for mine, theirs in ((self.bytes_down, other.bytes_down), (self.bytes_up, other.bytes_up)):
            for client, length in theirs.items():
                mine[client] = mine.get(client, 0) + length
        for stage, seconds in other.seconds.items():
            self.seconds[stage] += seconds

    def add_seconds(self, header: Mapping[str, Any]) -> None:
        """Adds what a client says its stages took; anything but numbers is passed over."""
        said = header.get("seconds")
        for stage in STAGES:
            value = said.get(stage) if isinstance(said, dict) else None
            self.seconds[stage] += float(value) if _is_number(value) and 0 <= value < 1e9 else 0.0

    def echo(self, client: int) -> dict[str, Any]:
        """Returns what a request to a client says of itself, and what its reply must repeat."""
        return {"run": self.run, "round": self.round, "client": client, "kind": self.kind}

    def check_echo(self, client: int, header: Mapping[str, Any]) -> None:
        """Raises Refused where a reply's header does not repeat its request's."""
        for key, asked in self.echo(client).items():
            got = header.get(key)
            if type(got) is not type(asked) or got != asked:
                raise Refused(f"client {client} answered for {key} {got!r:.80}, asked was {key} {asked!r:.80}")

    def refuse(self, client: int, reason: str) -> None:
        self.refused.append({"client": client, "reason": reason[:1000]})

    def arrange(self, asked: list[int]) -> None:
        """Puts all in the order of asking, so that nothing depends on who was faster."""
        place = {client: i for i, client in enumerate(asked)}
        self.refused.sort(key=lambda refused: (place.get(refused["client"], len(asked)), refused["client"]))
        self.replies = {client: self.replies[client] for client in asked if client in self.replies}
        self.bytes_up = {str(client): self.bytes_up[str(client)] for client in asked if str(client) in self.bytes_up}

    def reasons(self) -> str:
        return "; ".join(f"client {refused['client']}: {refused['reason']}" for refused in self.refused)


def federate(engine: Engine, plan: Plan, record: Record, progress: Progress = lambda event: None) -> Server:
    """Runs a federation to its end, or on from where its record stops.

    Every round is durable before the next begins; a run that was killed at any moment ends with the same bytes.

    Args:
        engine: Reaches the clients (and the observer, unless `plan.observe` is "never").
        plan: What to run.
        record: Where to write it.
        progress: Called with `{"round", "rounds", "phase", "client", "clients"}` as clients answer, and with `{"event":
            "refused", "round", "client", "reason"}` for each that was left out.

    Returns:
        The server, with the result in `model()` and `plain`.

    Raises:
        ServerError: A round with nobody left, or a method that refuses what it got.
    """
    phases = list(plan.method.plan(plan.rounds))
    restored = record.restore()
    # Who answered the opening and did not fit it; asked again by the next process only, since a person has to mend that.
    barred: set[int] = set()
    if restored is None:
        server, rows = _open(engine, plan, record, barred)
    else:
        header, tensors, _ = restored
        layers = {name: LayerShape(*shape) for name, shape in header["layers"].items()}
        plain = {name: tuple(shape) for name, shape in header["plain"].items()}
        server, rows = Server(layers, plan.seed, plan.dtype, plain), {int(k): n for k, n in header["rows"].items()}
        server.restore(header, tensors)
    # Of a round that a kill ended; its clients are asked again.
    shutil.rmtree(record.folder / UPLOADS, ignore_errors=True)
    committing = 0.0
    for index in range(server.round, len(phases)):
        committing = _round(engine, plan, record, server, rows, barred, phases, index, progress, committing)
    return server


def _open(engine: Engine, plan: Plan, record: Record, barred: set[int]) -> tuple[Server, dict[int, int]]:
    """Asks every client for its layers and rows; those whose layers or other parameters are not the majority's are left out."""
    began = time.perf_counter()
    heard = _Heard(plan.run, 0, "open")
    rows, said = _ask_to_open(engine, plan, plan.clients, heard)
    if not said:
        raise ServerError(f"no client answered the opening ({heard.reasons()})")
    ranks = {client: _ranks(own) for client, own in said.items()}
    if plan.method.mixed_ranks:
        most = {layer: max(own.get(layer, 1) for own in ranks.values()) for own in ranks.values() for layer in own}
        said = {client: _with_ranks(own, most) for client, own in said.items()}
    agreed = _majority(said)
    for client, own in said.items():
        if own == agreed:
            heard.answered.append(client)
        else:
            heard.refuse(client, _difference(client, own, agreed))
    _check_quorum(plan, "the opening", plan.clients, heard)
    barred |= set(heard.replies) - set(heard.answered)
    rows = {client: rows[client] for client in heard.answered}
    layers = {name: shape for name, shape in agreed.items() if isinstance(shape, LayerShape)}
    largest = {name: max(ranks[client][name] for client in rows) for name in layers}
    layers = {name: replace(shape, rank=largest[name]) for name, shape in layers.items()}
    plain = {name.removeprefix("plain|"): x for name, x in agreed.items() if not isinstance(x, LayerShape)}
    server = Server(layers, plan.seed, plan.dtype, plain)
    for client in rows:
        for layer in layers:
            server.note_rank(client, layer, ranks[client][layer])
    scores = _observe(engine, plan, server, True, heard) if plan.observe_start and plan.observe_by == "observer" else None
    line = _line(0, "open", 0, plan.clients, heard, None, scores, began)
    _commit(record, server, rows, line)
    return server, rows


def _ask_to_open(engine: Engine, plan: Plan, clients: list[int], heard: _Heard) -> tuple[dict[int, int], dict[int, Schema]]:
    """Returns what clients say of their rows and layers; those whose facts are not the server's are refused."""
    rows: dict[int, int] = {}
    said: dict[int, Schema] = {}
    wanted = {} if plan.expected is None else {"preflight": True}

    def request(client: int) -> bytes:
        return wire.encode(wire.Message({**heard.echo(client), **wanted}))

    for reply in _in_order(engine.ask(_counted(clients, request, heard)), clients):
        message = _read(reply, heard)
        if message is None:
            continue
        client = reply.client
        try:
            if plan.expected is not None:
                heard.facts[str(client)] = facts = preflight.read(message.header.get("preflight"))
                wrong = preflight.mismatch(plan.expected, facts)
                if wrong:
                    raise Refused(f"client {client}: {wrong}")
            rows[client] = _rows(client, message.header)
            said[client] = _schema(client, message.header, plan.most_rank)
            if plan.expected is not None:
                heard.facts[str(client)]["layers"] = len(_ranks(said[client]))
        except Refused as error:
            heard.refuse(client, str(error))
    return rows, said


def _join(engine: Engine, plan: Plan, server: Server, rows: dict[int, int], barred: set[int], heard: _Heard) -> None:
    """Asks those who were not there at the opening once more; who fits the others takes part from this round on."""
    missing = [client for client in plan.clients if client not in rows and client not in barred]
    if not missing:
        return
    opening = _Heard(plan.run, heard.round, "open")
    counted, said = _ask_to_open(engine, plan, missing, opening)
    plain = {f"plain|{name}": shape for name, shape in (server.plain_shapes or {}).items()}
    agreed: Schema = {**server.layers, **plain}
    for client, own in said.items():
        ranks = _ranks(own)
        large = [name for name, shape in server.layers.items() if ranks.get(name, 0) > shape.rank]
        if plan.method.mixed_ranks and large:
            most = server.layers[large[0]].rank
            opening.refuse(
                client, f"layer {large[0]!r}: client {client} has rank {ranks[large[0]]}, the run's largest is {most}"
            )
            continue
        if plan.method.mixed_ranks:
            own = _with_ranks(own, {**ranks, **_ranks(agreed)})
        if own != agreed:
            opening.refuse(client, _difference(client, own, agreed))
            continue
        rows[client] = counted[client]
        opening.joined.append(client)
        for layer in server.layers:
            server.note_rank(client, layer, ranks[layer])
    barred |= set(opening.replies) - set(rows)
    heard.add(opening)


def _rows(client: int, header: Mapping[str, Any]) -> int:
    rows = header.get("rows")
    if type(rows) is not int or not 1 <= rows <= MOST_ROWS:
        raise Refused(f"client {client} says it has {rows!r:.80} rows, allowed: 1 to {MOST_ROWS:.0e}")
    return rows


def _schema(client: int, header: Mapping[str, Any], most_rank: int = 0) -> Schema:
    """Reads what a client says of its layers, and, named "plain|…", of its parameters that are not factors."""
    layers = header.get("layers")
    if not isinstance(layers, dict) or not layers:
        raise Refused(f"client {client} says its layers are {layers!r:.80}, allowed: one or more with (d_out, d_in, rank)")
    for name, shape in layers.items():
        if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and 1 <= n < 2**31 for n in shape):
            raise Refused(f"layer {name!r}: client {client} says {shape!r:.80}, allowed: d_out, d_in and rank, 1 or more each")
        # One client's word must not make everybody's factors large.
        most = most_rank or max(shape[:2])
        if shape[2] > most:
            raise Refused(f"layer {name!r}: client {client} says rank {shape[2]}, allowed: 1 to {most}")
    plain = header.get("plain", {})
    if not isinstance(plain, dict):
        raise Refused(f"client {client} says its other parameters are {plain!r:.80}, allowed: names with shapes")
    for name, shape in plain.items():
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
            raise Refused(f"parameter {name!r}: client {client} says {shape!r:.80}, allowed: a list of sizes")
    others = {f"plain|{name}": tuple(shape) for name, shape in plain.items()}
    return {**{name: LayerShape(*shape) for name, shape in layers.items()}, **others}


def _ranks(schema: Schema) -> dict[str, int]:
    return {name: shape.rank for name, shape in schema.items() if isinstance(shape, LayerShape)}


def _with_ranks(schema: Schema, ranks: Mapping[str, int]) -> Schema:
    return {name: replace(x, rank=ranks[name]) if isinstance(x, LayerShape) else x for name, x in schema.items()}


def _majority(said: Mapping[int, Schema]) -> Schema:
    """Returns the layers that most clients have, in the order in which the first of them names them."""
    (most, count), *others = Counter(frozenset(layers.items()) for layers in said.values()).most_common(2)
    agreed = next(layers for layers in said.values() if frozenset(layers.items()) == most)
    if others and others[0][1] == count:
        client, own = next((client, own) for client, own in said.items() if own != agreed)
        raise ServerError(_difference(client, own, agreed))
    return agreed


def _difference(client: int, own: Schema, others: Schema) -> str:
    name = next(name for name in {**others, **own} if own.get(name) != others.get(name))
    mine, theirs = own.get(name), others.get(name)
    if isinstance(mine, LayerShape) and isinstance(theirs, LayerShape) and replace(mine, rank=theirs.rank) == theirs:
        return f"layer {name!r}: client {client} has rank {mine.rank}, others {theirs.rank}; {taking_mixed_ranks()}"
    return (
        f"layer {name!r}: client {client} has {mine}, others {theirs}. All clients need the same base model and the same [lora]"
    )


def _round(
    engine: Engine,
    plan: Plan,
    record: Record,
    server: Server,
    rows: dict[int, int],
    barred: set[int],
    phases: list[Method],
    index: int,
    progress: Progress,
    committing: float,
) -> float:
    """Runs one phase; returns the seconds its commit took, which the next round's line carries."""
    began = time.perf_counter() - committing
    phase = phases[index]
    train_round = sum(1 for earlier in phases[: index + 1] if earlier.trains)
    heard = _Heard(plan.run, index + 1, _kind(phase))
    if plan.rejoin and phase.trains:
        _join(engine, plan, server, rows, barred, heard)
    asked = _choose(plan, sorted(rows), train_round) if phase.trains else sorted(rows)
    if not phase.trains and phase.measures == "factors":
        asked = [client for client in asked if server.has.get(client, -1) >= 0]  # who never took part holds nothing
    heard.seconds["record"] = committing
    if phase.sends:
        (record.folder / UPLOADS).mkdir()
        aggregator = Aggregator(phase, server, plan.measure_error)
        total = sum(rows[client] for client in asked)

        def request(client: int) -> bytes:
            share = math.ceil(getattr(phase, "samples", 0) * rows[client] / total)
            return _request(server, phase, heard.echo(client), train_round, plan, share)

        uploads: dict[int, _Upload] = {}
        for reply in _once_each(_ask(engine, server, phase, asked, request, heard, aggregator.most_bytes()), asked, heard):
            upload = _admit(reply, aggregator, heard, rows[reply.client], record.folder / UPLOADS)
            uploads |= {} if upload is None else {reply.client: upload}
            progress(
                {"round": max(1, train_round), "rounds": plan.rounds, "phase": _kind(phase), "clients": len(asked)}
                | {"client": reply.client, "answered": len(heard.replies)}
            )
        _fold({client: uploads[client] for client in asked if client in uploads}, aggregator, heard, plan.norm_limit)
        heard.arrange(asked)
        _check_quorum(plan, f"round {index + 1}", asked, heard)
    else:
        # A phase that sends nothing (Fed-SB's random start) is the server's alone.
        asked = []
        aggregator = Aggregator(phase, server, False)
        aggregator.folded.append(OBSERVER)
    started = time.perf_counter()
    try:
        aggregated = aggregator.done()
    except ServerError as error:
        reasons = f" ({heard.reasons()})" if heard.refused else ""
        raise ServerError(f"round {index + 1}: {error}{reasons}") from error
    for client in heard.replies:
        server.took(client)
    server.settle(aggregated)
    heard.seconds["server"] += time.perf_counter() - started
    for refused in heard.refused:
        progress({"event": "refused", "round": max(1, train_round), **refused})
    last = index + 1 == len(phases)
    scores = None
    # Where a part of the model stays with the clients, there is a common model only in the end.
    if plan.observe_by == "clients":
        scores = _observe_by_clients(engine, plan, server, sorted(rows), heard) if plan.observe != "never" and last else None
    elif (plan.observe == "rounds" and phase.trains and not phase.keeps) or (plan.observe != "never" and last):
        scores = _observe(engine, plan, server, last, heard)
    counted = train_round if _kind(phase) != "measure" else 0
    line = _line(index + 1, _kind(phase), counted, asked, heard, aggregated, scores, began)
    seconds = _commit(record, server, rows, line)
    shutil.rmtree(record.folder / UPLOADS, ignore_errors=True)
    return seconds


def _kind(phase: Method) -> str:
    return "train" if phase.trains else {"gradient": "measure", "factors": "gather"}[phase.measures]


def _choose(plan: Plan, clients: list[int], index: int) -> list[int]:
    """Draws the round's clients by the seed and the round alone."""
    if not 0 < plan.clients_per_round < len(clients):
        return clients
    return sorted(random.Random(algebra.seed_of(plan.seed, "choose", index)).sample(clients, plan.clients_per_round))


def _check_quorum(plan: Plan, where: str, asked: list[int], heard: _Heard) -> None:
    """Raises ServerError where too few of the clients asked are left; it names the others, why, and how to go on."""
    left, wanted = len(heard.answered), plan.quorum(len(asked))
    if left >= wanted:
        return
    who = {0: "no client is left", 1: "1 client is left"}.get(left, f"{left} clients are left")
    least = f"server.min_clients = {plan.min_clients}" if plan.min_clients else "server.min_clients = 0, half of them"
    raise ServerError(
        f"{where}: {who} of {len(asked)}, wanted: {wanted} ({least}). "
        f"Missing: {heard.reasons()}. Finished rounds are kept; with the clients back, go on with `umbel run --resume`"
    )


def _request(server: Server, phase: Method, echo: Mapping[str, Any], train_round: int, plan: Plan, samples: int) -> bytes:
    client = echo["client"]
    packed, tensors = wire.pack(server.owed_to(client))
    header = {
        **echo,
        "has": server.has.get(client, -1),
        "keep": server.round,
        "train_round": train_round,
        "rounds": plan.rounds,
        "score": plan.score_clients,
        "trains": phase.trains,
        "sends": phase.sends,
        "keeps": phase.keeps,
        "samples": samples,
        **packed,
    }
    return wire.encode(wire.Message(header, tensors | wire.pack_plain(server.plain)), server.dtype)


def _counted(
    asked: Iterable[int], request: Callable[[int], bytes], heard: _Heard, most_bytes: int = MOST_OPENING_BYTES
) -> Iterator[Ask]:
    for client in asked:
        started = time.perf_counter()
        payload = request(client)
        heard.seconds["wire"] += time.perf_counter() - started
        heard.bytes_down[str(client)] = heard.bytes_down.get(str(client), 0) + len(payload)
        yield Ask(client, payload, most_bytes)


def _ask(
    engine: Engine,
    server: Server,
    phase: Method | None,
    asked: list[int],
    request: Callable[[int], bytes],
    heard: _Heard,
    most_bytes: int = MOST_OPENING_BYTES,
) -> Iterator[Reply]:
    """Asks clients; one whose files are gone is sent everything afresh in the same round, if it can answer then.

    Where nothing is kept at home, it ends with the bits that it would have had. What it alone had is gone, as the record says.
    """
    again: list[int] = []
    for reply in engine.ask(_counted(asked, request, heard, most_bytes)):
        client = reply.client
        if client in again:
            continue
        lost = _lost(reply) if client in asked and client in server.has else None
        if lost is None:
            yield _needing_nothing(reply)
            continue
        assert reply.payload is not None
        heard.bytes_up[str(client)] = len(reply.payload)
        gathers = phase is not None and not phase.trains and phase.measures == "factors"
        own = f" and with it its {' and '.join(phase.sends)}, which nobody else has" if phase and gathers else ""
        if phase and phase.keeps:
            own = f" and with it its own {' and '.join(phase.keeps)}, kept at home until now"
        heard.lost[str(client)] = f"lost {lost} after round {server.has[client]}{own}"
        # It cuts what it is sent to its own rank.
        del server.has[client]
        server.ranks.pop(client, None)
        if gathers:
            yield Reply(client, None, heard.lost[str(client)])
        else:
            again.append(client)
    if again:
        yield from map(_needing_nothing, engine.ask(_counted(again, request, heard, most_bytes)))


def _needing_nothing(reply: Reply) -> Reply:
    """Returns the reply, or why it is none where it speaks of a loss although the request needed nothing that was kept."""
    if _lost(reply) is None:
        return reply
    return Reply(reply.client, None, "says its files are gone, which the request did not need")


def _lost(reply: Reply) -> str | None:
    """Returns what a client says that it has lost; None for any other reply."""
    if reply.payload is None or len(reply.payload) > MOST_LOST_BYTES:
        return None
    try:
        said = wire.decode(reply.payload).header.get("lost")
    except wire.WireError:
        return None
    return LOST.get(said) if isinstance(said, str) else None


def _in_order(replies: Iterable[Reply], asked: list[int]) -> Iterator[Reply]:
    """Yields replies in the order of asking: an early one waits, a silent one is skipped when it is reported."""
    waiting: dict[int, Reply] = {}
    turn = 0
    for reply in replies:
        waiting[reply.client] = reply
        while turn < len(asked) and asked[turn] in waiting:
            yield waiting.pop(asked[turn])
            turn += 1
    for client in asked[turn:]:
        yield waiting.get(client, Reply(client, None, "no reply"))


def _once_each(replies: Iterable[Reply], asked: list[int], heard: _Heard) -> Iterator[Reply]:
    """Yields the first reply of everybody who was asked, as it arrives, then the silent ones; others are noted as refusals."""
    answered, strange = set[int](), set[tuple[int, str]]()
    for reply in replies:
        if reply.client in asked and reply.client not in answered:
            answered.add(reply.client)
            yield reply
            continue
        known = reply.client in asked
        reason = "answered more than once; its first answer counts" if known else "was not asked in this round"
        if (reply.client, reason) not in strange:
            strange.add((reply.client, reason))
            heard.refuse(reply.client, f"client {reply.client} {reason}")
    for client in asked:
        if client not in answered:
            yield Reply(client, None, "no reply")


def _read(
    reply: Reply, heard: _Heard, most_bytes: int = MOST_OPENING_BYTES, most_header: int = wire.MAX_HEADER_BYTES
) -> wire.Message | None:
    """Decodes a reply and notes its header; a failure is noted as a refusal."""
    if reply.payload is None:
        heard.refuse(reply.client, reply.reason)
        return None
    started = time.perf_counter()
    heard.bytes_up[str(reply.client)] = heard.bytes_up.get(str(reply.client), 0) + len(reply.payload)
    try:
        message = wire.decode(reply.payload, most_bytes, most_header)
        heard.check_echo(reply.client, message.header)
    except (wire.WireError, Refused) as error:
        heard.refuse(reply.client, str(error))
        return None
    heard.seconds["wire"] += time.perf_counter() - started
    heard.replies[reply.client] = _short(message.header)
    heard.add_seconds(message.header)
    return message


def _short(header: Mapping[str, Any]) -> dict[str, Any]:
    """Returns of what a client says what is short enough to be kept until the round is over, and to be recorded."""
    entries = itertools.islice(header.items(), MOST_SAID)
    return {key: value for key, value in entries if len(key) + len(json.dumps(value)) <= LONGEST_SAID}


@dataclass(frozen=True)
class _Upload:
    """An upload that was checked and waits in its file for the others: n_k, its rank per layer, ‖ΔW_k‖_F."""

    weight: int
    factors: wire.Spooled
    ranks: dict[str, int]
    norm: float


def _admit(reply: Reply, aggregator: Aggregator, heard: _Heard, known: int, folder: Path) -> _Upload | None:
    """Checks one reply by itself and puts it into a file, or notes why not.

    Args:
        reply: As it arrived.
        aggregator: Of this round.
        heard: Where refusals are noted.
        known: How many rows the client said it has when the run was opened.
        folder: Of the round's uploads.
    """
    message = _read(reply, heard, aggregator.most_bytes(), aggregator.most_header())
    if message is None or reply.payload is None:
        return None
    started = time.perf_counter()
    client, trains = reply.client, bool(aggregator.phase.trains)
    try:
        factors = wire.unpack_factors(message.tensors)
        weight = _rows(client, message.header)
        if weight > known or (trains and weight != known):
            raise Refused(f"client {client} says it has {weight} rows, at the opening it had {known}")
        if trains:
            _check_steps(client, message.header)
        ranks = aggregator.check(client, weight, factors, wire.unpack_plain(message.tensors))
        aggregator.check_trained(client, factors)
        norm = aggregator.norm(client, factors)
        return _Upload(weight, wire.Spooled(reply.payload, folder / f"{client}.safetensors"), ranks, norm)
    except (Refused, wire.WireError) as error:
        heard.refuse(client, str(error))
        return None
    finally:
        heard.seconds["server"] += time.perf_counter() - started


def _check_steps(client: int, header: Mapping[str, Any]) -> None:
    steps = header.get("steps")
    if type(steps) is not int or not 1 <= steps < 2**63:
        raise Refused(f"client {client} says it took {steps!r:.80} training steps, allowed: 1 or more")


def _fold(uploads: Mapping[int, _Upload], aggregator: Aggregator, heard: _Heard, norm_limit: float) -> None:
    """Folds the round's uploads in, in the order given, except those whose norm is out of line."""
    started = time.perf_counter()
    norms = [upload.norm for upload in uploads.values()]
    # The lower of the two in the middle: what is too large must not move the measure.
    median = statistics.median_low(norms) if len(norms) >= FEWEST_FOR_MEDIAN else 0.0
    for client, upload in uploads.items():
        heard.norms[client] = upload.norm
        if norm_limit and median and upload.norm > norm_limit * median:
            heard.refuse(
                client,
                f"client {client}: its ΔW has norm {upload.norm:.4g}, allowed: {norm_limit:g} (server.norm_limit) times "
                f"{median:.4g}, the median of the round's {len(norms)} uploads",
            )
            continue
        aggregator.fold(client, upload.weight, upload.factors, upload.factors.plain(), upload.ranks)
        heard.answered.append(client)
    heard.seconds["server"] += time.perf_counter() - started


def _observe(engine: Engine, plan: Plan, server: Server, generate: bool, heard: _Heard) -> dict[str, Any] | None:
    """Scores the common model on all test rows, by a client that only observes."""
    seen = _Heard(plan.run, server.round, "observe")

    def request(client: int) -> bytes:
        return _observation(server, seen.echo(client), generate, "float32")

    reply = next(_ask(engine, server, None, [OBSERVER], request, seen), Reply(OBSERVER, None, "no reply"))
    if reply.payload is None:
        raise ServerError(f"scoring the common model failed: {reply.reason}")
    try:
        message = wire.decode(reply.payload)
        seen.check_echo(OBSERVER, message.header)
    except (wire.WireError, Refused) as error:
        raise ServerError(f"scoring the common model failed: {error}") from error
    heard.add_seconds(message.header)
    server.took(OBSERVER)
    return _scores(message.header.get("scores"))


def _observe_by_clients(engine: Engine, plan: Plan, server: Server, clients: list[int], heard: _Heard) -> dict[str, Any] | None:
    """Scores the common model at every client, on its own test rows; returns the mean over rows. Who is silent is skipped."""
    seen = _Heard(plan.run, server.round, "observe")
    scored: list[dict[str, float]] = []

    def request(client: int) -> bytes:
        return _observation(server, seen.echo(client), True, server.dtype)

    for reply in _in_order(_ask(engine, server, None, clients, request, seen), clients):
        message = _read(reply, seen)
        if message is None:
            continue
        server.took(reply.client)
        said = _scores(message.header.get("scores")) or {}
        # Within what sums can take.
        scores = {name: x for name, x in said.items() if abs(x) <= MOST_ROWS}
        if type(scores.get("rows")) is int and scores["rows"] >= 1:
            scored.append(scores)
    seen.refused = [{**own, "reason": f"scoring the common model: {own['reason']}"[:1000]} for own in seen.refused]
    heard.add(seen)
    return _mean_scores(scored)


def _mean_scores(scored: list[dict[str, float]]) -> dict[str, float] | None:
    """Returns each score's mean weighted by "rows", or by "<score>_rows" where only some rows have it; rows are added up.

    >>> _mean_scores([{"accuracy": 1.0, "rows": 1}, {"accuracy": 0.5, "rows": 3}, {"rows": 2}])
    {'accuracy': 0.625, 'rows': 6}
    """
    result: dict[str, float] = {}
    for name in dict.fromkeys(name for own in scored for name in own):
        having = [own for own in scored if name in own]
        if name == "rows" or name.endswith("_rows"):
            result[name] = sum(own[name] for own in having)
            continue
        weights = [max(0.0, own.get(f"{name}_rows", own["rows"])) for own in having]
        mean = math.fsum(w * own[name] for w, own in zip(weights, having)) / (math.fsum(weights) or 1.0)
        if math.isfinite(mean):
            result[name] = mean
    return result or None


def _observation(server: Server, echo: Mapping[str, Any], generate: bool, dtype: str) -> bytes:
    client = echo["client"]
    packed, tensors = wire.pack(server.owed_to(client))
    header = {**echo, "has": server.has.get(client, -1), "keep": server.round, "generate": generate, **packed}
    return wire.encode(wire.Message(header, tensors | wire.pack_plain(server.plain)), dtype)


def _is_number(value: Any) -> TypeGuard[float]:
    """True for JSON's numbers within a float's range; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _number(value: Any) -> float | None:
    """Returns a number, None for anything else that a client may say."""
    return value if _is_number(value) else None


def _scores(value: Any) -> dict[str, float] | None:
    """Returns the entries that are numbers, not more than a client can honestly have, None where there are none."""
    entries = value.items() if isinstance(value, dict) else ()
    found = {key: x for key, x in entries if key.isascii() and len(key) <= MOST_NAME and _is_number(x)}
    return dict(list(found.items())[:MOST_SCORES]) or None


def _line(
    number: int,
    phase: str,
    train_round: int,
    asked: list[int],
    heard: _Heard,
    aggregated: Aggregated | None,
    scores: dict[str, Any] | None,
    began: float,
) -> dict[str, Any]:
    def said(key: str, read: Callable[[Any], Any] = _number) -> dict[str, Any]:
        values = {str(client): read(heard.replies[client].get(key)) for client in heard.answered}
        return {client: value for client, value in values.items() if value is not None}

    # Where the ideal is zero no error is relative to it, and JSON has no infinity.
    errors: dict[str, dict[str, float] | None] = {}
    for kind in ("error", "error_of_sum"):
        measured: dict[str, float] = (getattr(aggregated, kind) if aggregated else None) or {}
        errors[kind] = {layer: x for layer, x in measured.items() if math.isfinite(x)} or None
    return {
        "round": number,
        "phase": phase,
        "train_round": train_round,
        "asked": asked,
        "answered": heard.answered,
        "refused": heard.refused,
        "rows": said("rows"),
        "steps": said("steps"),
        "loss": said("loss"),
        "rounding": said("rounding"),
        "norm": {str(client): norm for client, norm in heard.norms.items()},
        "bytes_down": heard.bytes_down,
        "bytes_up": heard.bytes_up,
        "seconds": {**{k: round(v, 4) for k, v in heard.seconds.items()}, "total": time.perf_counter() - began},
        "local": said("scores", _scores),
        "global": scores,
        "aggregation_error": errors["error"],
        "aggregation_error_of_sum": errors["error_of_sum"],
        "rank": aggregated.rank if aggregated else {},
        **{key: value for key, value in (("joined", heard.joined), ("lost", heard.lost), ("preflight", heard.facts)) if value},
    }


def _commit(record: Record, server: Server, rows: Mapping[int, int], line: dict[str, Any]) -> float:
    """Makes the round durable; returns the seconds it took."""
    started = time.perf_counter()
    header, tensors = server.state()
    header["layers"] = {name: [s.d_out, s.d_in, s.rank] for name, s in server.layers.items()}
    header["plain"] = {name: list(shape) for name, shape in (server.plain_shapes or {}).items()}
    header["rows"] = {str(client): n for client, n in rows.items()}
    record.commit(header, tensors, line)
    return time.perf_counter() - started
