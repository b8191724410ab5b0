"""What is asked of clients and what is heard of them, before anything is folded. What a client says is hostile."""

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from torch import Tensor

from umbel import wire
from umbel.config import Privacy
from umbel.engine import Ask, Engine, Reply
from umbel.method import Method
from umbel.server import MOST_ROWS, Refused, Server, ServerError

MOST_OPENING_BYTES = 4 * 2**20
"""Of a reply to the opening, which holds names and numbers only."""

MOST_LOST_BYTES = 4096
"""Of a reply that says only that its client's files are gone."""

LOST = {"state": "its state", "state and optimizer": "its state and that of its optimizer"}
"""What a client may say that it has lost, and how the record says it."""

MOST_SAID, LONGEST_SAID = 64, 4096
"""Of the entries in the header of a reply: how many are kept, and how long one may be as JSON."""

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
        privacy: With `unit` = "client", uploads are clipped and the mean gets noise (see `umbel.central`). With
            `secure_aggregation` clients mask what they send, and only sums are opened (see `umbel.sums`).
        plain: Under that unit, what parameters that are not factors are before the first round; those not named here are 0.
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
    norm_limit: float = 100.0
    privacy: Privacy = field(default_factory=Privacy)
    plain: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def quorum(self, asked: int) -> int:
        """Returns how many of so many clients asked must have answered.

        >>> [Plan(Method, 1, []).quorum(asked) for asked in (1, 2, 3, 5)]
        [1, 1, 2, 3]
        """
        return min(self.min_clients or math.ceil(asked / 2), asked)


@dataclass
class Heard:
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
    noise: dict[str, Any] = field(default_factory=dict[str, Any])
    epsilon: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, other: "Heard") -> None:
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
            self.seconds[stage] += float(value) if is_number(value) and 0 <= value < 1e9 else 0.0

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
        # A client's own words are shown on the operator's terminal, where control characters would be commands.
        text = "".join(c if c.isprintable() else " " for c in reason[:1000])
        self.refused.append({"client": client, "reason": text})

    def arrange(self, asked: list[int]) -> None:
        """Puts all in the order of asking, so that nothing depends on who was faster."""
        place = {client: i for i, client in enumerate(asked)}
        self.refused.sort(key=lambda refused: (place.get(refused["client"], len(asked)), refused["client"]))
        self.replies = {client: self.replies[client] for client in asked if client in self.replies}
        self.bytes_up = {str(client): self.bytes_up[str(client)] for client in asked if str(client) in self.bytes_up}

    def reasons(self) -> str:
        """Returns who was refused and why; clients with one reason together."""
        by_reason: dict[str, list[int]] = {}
        for refused in self.refused:
            by_reason.setdefault(refused["reason"], []).append(refused["client"])
        return "; ".join(
            f"client{'s' if len(clients) > 1 else ''} {', '.join(map(str, clients))}: {reason}"
            for reason, clients in by_reason.items()
        )


def counted(
    asked: Iterable[int], request: Callable[[int], bytes], heard: Heard, most_bytes: int = MOST_OPENING_BYTES
) -> Iterator[Ask]:
    for client in asked:
        started = time.perf_counter()
        payload = request(client)
        heard.seconds["wire"] += time.perf_counter() - started
        heard.bytes_down[str(client)] = heard.bytes_down.get(str(client), 0) + len(payload)
        yield Ask(client, payload, most_bytes)


def ask(
    engine: Engine,
    server: Server,
    phase: Method | None,
    asked: list[int],
    request: Callable[[int], bytes],
    heard: Heard,
    most_bytes: int = MOST_OPENING_BYTES,
) -> Iterator[Reply]:
    """Asks clients; one whose files are gone is sent everything afresh in the same round, if it can answer then.

    Where nothing is kept at home, it ends with the bits that it would have had. What it alone had is gone, as the record says.
    """
    again: list[int] = []
    for reply in engine.ask(counted(asked, request, heard, most_bytes)):
        client = reply.client
        if client in again:
            continue
        lost = _lost(reply) if client in asked and client in server.has else None
        if lost is None:
            yield _needing_nothing(reply)
            continue
        assert reply.payload is not None
        heard.bytes_up[str(client)] = len(reply.payload)
        gathers = phase is not None and not phase.trains and phase.measures != "gradient"
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
        yield from map(_needing_nothing, engine.ask(counted(again, request, heard, most_bytes)))


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


def in_order(replies: Iterable[Reply], asked: list[int]) -> Iterator[Reply]:
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


def once_each(replies: Iterable[Reply], asked: list[int], heard: Heard) -> Iterator[Reply]:
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


def read(
    reply: Reply,
    heard: Heard,
    most_bytes: int = MOST_OPENING_BYTES,
    most_header: int = wire.MAX_HEADER_BYTES,
    masked: bool = False,
) -> wire.Message | None:
    """Decodes a reply and notes its header; a failure is noted as a refusal."""
    if reply.payload is None:
        heard.refuse(reply.client, reply.reason)
        return None
    started = time.perf_counter()
    heard.bytes_up[str(reply.client)] = heard.bytes_up.get(str(reply.client), 0) + len(reply.payload)
    try:
        message = wire.decode(reply.payload, most_bytes, most_header, masked)
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


def check_quorum(plan: Plan, where: str, asked: list[int], heard: Heard) -> None:
    """Raises ServerError where too few of the clients asked are left; it names the others, why, and how to go on."""
    left, wanted = len(heard.answered), plan.quorum(len(asked))
    if left >= wanted:
        return
    who = {0: "no client is left", 1: "1 client is left"}.get(left, f"{left} clients are left")
    least = f"server.min_clients = {plan.min_clients}" if plan.min_clients else "server.min_clients = 0, half of them"
    raise ServerError(
        f"{where}: {who} of {len(asked)}, wanted: {wanted} ({least}). "
        f"Left out: {heard.reasons()}. Finished rounds are kept; with the clients back, go on with `umbel run --resume`"
    )


def rows_of(client: int, header: Mapping[str, Any]) -> int:
    rows = header.get("rows")
    if type(rows) is not int or not 1 <= rows <= MOST_ROWS:
        raise Refused(f"client {client} says it has {rows!r:.80} rows, allowed: 1 to {MOST_ROWS:.0e}")
    return rows


def is_number(value: Any) -> TypeGuard[float]:
    """True for JSON's numbers within a float's range; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
