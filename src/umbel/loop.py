"""federate(): choose clients, ask, fold, combine, record, resume."""

import math
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

from umbel import central, privacy, sums, wire
from umbel.admission import Upload, admit, fold
from umbel.asking import Heard, Plan, ask, check_quorum, in_order, is_number, once_each, read
from umbel.engine import Engine, Reply
from umbel.method import Method
from umbel.opening import agree, join
from umbel.record import Record
from umbel.server import MOST_ROWS, OBSERVER, Aggregated, Aggregator, LayerShape, Refused, Server, ServerError

__all__ = ["Plan", "Progress", "federate"]

Progress = Callable[[dict[str, Any]], None]

MOST_SCORES, MOST_NAME = 50, 50
"""Scores that a client may report of one model, and the length of a score's name."""

UPLOADS = "uploads"
"""The folder under the record's where a round's uploads wait until all are there."""


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
    """Opens the run with those who agree, and makes that durable."""
    began = time.perf_counter()
    heard = Heard(plan.run, 0, "open")
    server, rows = agree(engine, plan, heard, barred)
    scores = _observe(engine, plan, server, True, heard) if plan.observe_start and plan.observe_by == "observer" else None
    line = _line(0, "open", 0, plan.clients, heard, None, scores, began)
    _commit(record, server, rows, line)
    return server, rows


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
    heard = Heard(plan.run, index + 1, _kind(phase))
    if plan.rejoin and phase.trains:
        join(engine, plan, server, rows, barred, heard)
    asked = privacy.chosen(plan.seed, sorted(rows), plan.clients_per_round, train_round) if phase.trains else sorted(rows)
    if phase.continues:
        asked = server.in_phase()
    if not phase.trains and phase.measures == "factors":
        asked = [client for client in asked if server.has.get(client, -1) >= 0]  # who never took part holds nothing
    heard.seconds["record"] = committing
    hiding = _hiding(plan, record, phase, train_round, heard)
    if hiding:
        asked = hiding.within_budget(asked)
    summed = None
    if phase.sends:
        (record.folder / UPLOADS).mkdir()
        aggregator = Aggregator(phase, server, plan.measure_error and not plan.privacy.secure_aggregation)
        shares = _shares(plan, phase, rows, asked)

        def request(client: int, more: Mapping[str, Any] = {}) -> bytes:
            return _request(server, phase, {**heard.echo(client), **more}, train_round, plan, shares[client])

        def arrived(client: int) -> None:
            progress(
                {"round": max(1, train_round), "rounds": plan.rounds, "phase": _kind(phase), "clients": len(asked)}
                | {"client": client, "answered": len(heard.replies)}
            )

        if plan.privacy.secure_aggregation:
            try:
                summed = sums.add_up(engine, server, phase, plan, asked, request, aggregator, heard, arrived)
            except sums.GivenUp as lack:
                summed = {"given_up": str(lack)}
        else:
            # A measurement on public rows may take more of them than a client has of its own.
            known = {client: max(rows[client], shares[client]) for client in asked} if heard.kind == "measure" else rows
            uploads = _collect(engine, plan, server, known, asked, request, aggregator, heard, record, arrived)
            if hiding:
                folding = time.perf_counter()
                hiding.fold(uploads, aggregator, len(asked))
                heard.seconds["server"] += time.perf_counter() - folding
            else:
                fold(uploads, aggregator, heard, plan.norm_limit)
        heard.arrange(asked)
        if not _given_up(summed):
            check_quorum(plan, f"round {index + 1}", asked, heard)
        if hiding:
            hiding.spend(aggregator)
    else:
        # A phase that sends nothing (Fed-SB's random start) is the server's alone.
        asked = []
        aggregator = Aggregator(phase, server, False)
        aggregator.folded.append(OBSERVER)
    started = time.perf_counter()
    try:
        aggregated = server.as_before() if _given_up(summed) else aggregator.done()
    except ServerError as error:
        reasons = f" ({heard.reasons()})" if heard.refused else ""
        raise ServerError(f"round {index + 1}: {error}{reasons}") from error
    # Whose upload was refused goes on from what it had before: its training, and what rounding lost of it, count for nothing.
    for client in heard.answered:
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
    elif (plan.observe == "rounds" and _ends_round(phases, index)) or (plan.observe != "never" and last):
        scores = _observe(engine, plan, server, last, heard)
    counted = train_round if _kind(phase) != "measure" else 0
    line = _line(index + 1, _kind(phase), counted, asked, heard, aggregated, scores, began)
    line |= {} if summed is None else {"sum": summed}
    seconds = _commit(record, server, rows, line)
    shutil.rmtree(record.folder / UPLOADS, ignore_errors=True)
    return seconds


def _given_up(summed: Mapping[str, Any] | None) -> bool:
    return summed is not None and "given_up" in summed


def _shares(plan: Plan, phase: Method, rows: Mapping[int, int], asked: list[int]) -> dict[int, int]:
    """Returns how many of a measurement's rows each client takes: by its rows, or all the same where clients are hidden."""
    counts = {client: 1 if plan.privacy.unit == "client" else rows[client] for client in asked}
    return {client: math.ceil(getattr(phase, "samples", 0) * own / sum(counts.values())) for client, own in counts.items()}


def _hiding(plan: Plan, record: Record, phase: Method, train_round: int, heard: Heard) -> central.Hiding | None:
    """Returns what hides clients in a phase, under client-level privacy; what is measured there is measured on public rows."""
    if plan.privacy.unit != "client" or not phase.sends or heard.kind == "measure":
        return None
    return central.Hiding(plan, record, train_round, heard)


def _collect(
    engine: Engine,
    plan: Plan,
    server: Server,
    rows: Mapping[int, int],
    asked: list[int],
    request: Callable[[int], bytes],
    aggregator: Aggregator,
    heard: Heard,
    record: Record,
    arrived: Callable[[int], None],
) -> dict[int, Upload]:
    """Returns the uploads that were admitted, in the order of asking."""
    uploads: dict[int, Upload] = {}
    replies = ask(engine, server, aggregator.phase, asked, request, heard, aggregator.most_bytes())
    for reply in once_each(replies, asked, heard):
        upload = admit(reply, aggregator, heard, rows[reply.client], record.folder / UPLOADS)
        uploads |= {} if upload is None else {reply.client: upload}
        arrived(reply.client)
    return {client: uploads[client] for client in asked if client in uploads}


def _kind(phase: Method) -> str:
    return "train" if phase.trains else {"gradient": "measure", "factors": "gather", "update": "update"}[phase.measures]


def _ends_round(phases: list[Method], index: int) -> bool:
    """Whether there is a new common model after this phase: a training round is over, and nothing of it stays at home."""
    phase = phases[index]
    over = index + 1 == len(phases) or not phases[index + 1].continues
    return over and (phase.continues or bool(phase.trains and not phase.keeps))


def _request(server: Server, phase: Method, echo: Mapping[str, Any], train_round: int, plan: Plan, samples: int) -> bytes:
    client = echo["client"]
    owed = server.owed_to(client, plan.method.whole)
    packed, tensors = wire.pack(owed)
    # Whoever starts afresh must know how large the common factors are.
    ranks = {layer: server.layers[layer].rank for layer, own in owed.items() if own.reset is not None and plan.method.whole}
    # Within a round, heads stay as each client trained them.
    tensors |= {} if phase.continues else wire.pack_plain(server.plain)
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
        **({"ranks": ranks} if ranks else {}),
        **packed,
    }
    return wire.encode(wire.Message(header, tensors), server.dtype)


def _observe(engine: Engine, plan: Plan, server: Server, generate: bool, heard: Heard) -> dict[str, Any] | None:
    """Scores the common model on all test rows, by a client that only observes."""
    seen = Heard(plan.run, server.round, "observe")

    def request(client: int) -> bytes:
        return _observation(server, seen.echo(client), generate, "float32")

    reply = next(ask(engine, server, None, [OBSERVER], request, seen), Reply(OBSERVER, None, "no reply"))
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


def _observe_by_clients(engine: Engine, plan: Plan, server: Server, clients: list[int], heard: Heard) -> dict[str, Any] | None:
    """Scores the common model at every client, on its own test rows; returns the mean over rows. Who is silent is skipped."""
    seen = Heard(plan.run, server.round, "observe")
    scored: list[dict[str, float]] = []

    def request(client: int) -> bytes:
        return _observation(server, seen.echo(client), True, server.dtype, plan.method.whole)

    for reply in in_order(ask(engine, server, None, clients, request, seen), clients):
        message = read(reply, seen)
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
    """Returns each score's mean weighted by "rows", or by "<score>rows_of" where only some rows have it; rows are added up.

    >>> _mean_scores([{"accuracy": 1.0, "rows": 1}, {"accuracy": 0.5, "rows": 3}, {"rows": 2}])
    {'accuracy': 0.625, 'rows': 6}
    """
    result: dict[str, float] = {}
    for name in dict.fromkeys(name for own in scored for name in own):
        having = [own for own in scored if name in own]
        if name == "rows" or name.endswith("rows_of"):
            result[name] = sum(own[name] for own in having)
            continue
        weights = [max(0.0, own.get(f"{name}rows_of", own["rows"])) for own in having]
        mean = math.fsum(w * own[name] for w, own in zip(weights, having)) / (math.fsum(weights) or 1.0)
        if math.isfinite(mean):
            result[name] = mean
    return result or None


def _observation(server: Server, echo: Mapping[str, Any], generate: bool, dtype: str, whole: bool = False) -> bytes:
    client = echo["client"]
    packed, tensors = wire.pack(server.owed_to(client, whole))
    header = {**echo, "has": server.has.get(client, -1), "keep": server.round, "generate": generate, **packed}
    return wire.encode(wire.Message(header, tensors | wire.pack_plain(server.plain)), dtype)


def _number(value: Any) -> float | None:
    """Returns a number, None for anything else that a client may say."""
    return value if is_number(value) else None


def _scores(value: Any) -> dict[str, float] | None:
    """Returns the entries that are numbers, not more than a client can honestly have, None where there are none."""
    entries = value.items() if isinstance(value, dict) else ()
    found = {key: x for key, x in entries if key.isascii() and len(key) <= MOST_NAME and is_number(x)}
    return dict(list(found.items())[:MOST_SCORES]) or None


def _line(
    number: int,
    phase: str,
    train_round: int,
    asked: list[int],
    heard: Heard,
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
        **{
            key: value
            for key, value in (
                ("joined", heard.joined),
                ("lost", heard.lost),
                ("preflight", heard.facts),
                ("noise", heard.noise),
                ("epsilon", heard.epsilon or said("epsilon")),
            )
            if value
        },
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
