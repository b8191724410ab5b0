"""Sums that nobody can open: one round whose uploads are masked, from the clients' keys to the mean.

The server passes on keys and sealed shares, adds up what it cannot read, and learns with the clients' help one sum. It holds
that sum and one upload at a time.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from umbel import masking, wire
from umbel.asking import Heard, Plan, ask, check_quorum, counted, once_each, read
from umbel.engine import Engine, Reply
from umbel.masking import LOSS, ROWS, SEALED_BYTES, SECRET_BYTES, SHARE_BYTES, MaskError, from_text, to_text
from umbel.method import Method
from umbel.server import MOST_ROWS, OBSERVER, Aggregator, Refused, Server, ServerError

T = TypeVar("T")


class GivenUp(ServerError):
    """A further sum of a round lacks a client that the one before has, so it must not be opened."""


class Request(Protocol):
    """Makes the phase's usual request to a client, with more in its header."""

    def __call__(self, client: int, more: Mapping[str, Any]) -> bytes: ...


@dataclass(frozen=True)
class _Keys:
    """A client's two public keys: for seals and for masks."""

    seal: bytes
    mask: bytes


@dataclass
class Sum:
    """The running sum of masked uploads.

    Args:
        aggregator: Knows what an honest upload looks like.
    """

    aggregator: Aggregator
    total: Tensor | None = None
    shapes: Mapping[str, tuple[int, ...]] | None = None

    def add(self, client: int, tensors: Mapping[str, Tensor]) -> None:
        """Takes one upload, of which only names and shapes can be checked.

        Raises:
            Refused: They are not the phase's, or not those of the first upload.
        """
        shapes = {key: tuple(x.shape) for key, x in sorted(tensors.items())}
        own = {key: shape for key, shape in shapes.items() if key not in (ROWS, LOSS)}
        # All checks of a plain upload but those of its values, which are noise.
        like = {key: torch.zeros(()).expand(shape) for key, shape in own.items()}
        self.aggregator.check(client, 1, wire.unpack_factors(like), wire.unpack_plain(like))
        if shapes.get(ROWS) != (1,) or shapes.get(LOSS, (1,)) != (1,):
            raise Refused(f"client {client}: its rows and loss have shapes {shapes.get(ROWS)}, {shapes.get(LOSS)}, wanted (1,)")
        if self.shapes is not None and shapes != self.shapes:
            raise Refused(f"client {client}: its masked upload has other names or shapes than the first one's")
        flat = torch.cat([x.reshape(-1) for _, x in sorted(tensors.items())])
        self.shapes, self.total = shapes, flat if self.total is None else self.total.add_(flat)

    def opened(self, clients: int) -> tuple[dict[str, Tensor], int, float | None]:
        """Returns, once the masks are off, the mean by name, Σ n_k, and the mean loss, None where none was told.

        Raises:
            MaskError: No honest uploads add up to this.
        """
        assert self.total is not None
        assert self.shapes is not None
        pieces = self.total.split([math.prod(shape) for shape in self.shapes.values()])
        sums = dict(zip(self.shapes, pieces, strict=True))
        rows = int(sums.pop(ROWS))
        if not clients <= rows <= MOST_ROWS:
            raise MaskError(f"{clients} clients cannot have {rows} rows, allowed: {clients} to {MOST_ROWS:.0e}")
        means = {key: masking.from_fixed(x, rows).reshape(self.shapes[key]) for key, x in sums.items()}
        loss = means.pop(LOSS, None)
        return means, rows, None if loss is None else float(loss)


def add_up(
    engine: Engine,
    server: Server,
    phase: Method,
    plan: Plan,
    asked: list[int],
    request: Request,
    aggregator: Aggregator,
    heard: Heard,
    arrived: Callable[[int], None],
) -> dict[str, Any]:
    """Runs the four steps of an exchange and folds the mean as one upload.

    Args:
        engine: Reaches the clients.
        server: What is held in common.
        phase: What is asked.
        plan: The run's.
        asked: K clients.
        request: Makes the phase's request.
        aggregator: Of this round.
        heard: Where those whose uploads are in the sum, and refusals, are noted.
        arrived: Called with each client whose upload has come.

    Returns:
        What the record says of the sum: "clients" in it, "threshold", "rows" Σ n_k, and "loss", their mean.

    Raises:
        GivenUp: The phase goes on with a round, and not everybody of its first sum is left; nothing is opened.
        ServerError: Fewer than `masking.threshold` clients were left after a step, too few uploads came for the round to count,
            or the sum is none.
    """
    try:
        masking.needs()
    except MaskError as error:
        raise ServerError(str(error)) from error
    if phase.continues and not asked:
        raise GivenUp("nothing is left of this round")
    exchange = _Exchange(engine, plan, heard, asked)
    exchange.ask_keys()
    exchange.ask_shares()
    summed, there = Sum(aggregator), list[int]()

    def masked(client: int) -> bytes:
        return request(client, {"sealed": exchange.sealed_for(client)})

    replies = ask(engine, server, phase, exchange.among, masked, heard, 2 * aggregator.most_bytes())
    for reply in once_each(replies, exchange.among, heard):
        there += [reply.client] if _take(reply, summed, aggregator, heard) else []
        arrived(reply.client)
    there.sort()
    exchange.check_enough("its upload", there)
    if phase.continues and there != sorted(asked):
        # Of the same training, so the difference of the two sums would be of who is missing, and of nothing else.
        raise GivenUp(f"clients {sorted(set(asked) - set(there))} are not in the second sum of what was trained once")
    # An opened sum can be had again for the same clients only, so a round that will not count must not be opened.
    heard.answered += [client for client in asked if client in there]
    check_quorum(plan, f"round {heard.round}", asked, heard)
    opening = exchange.ask_unmask(there)
    started = time.perf_counter()
    try:
        assert summed.total is not None
        exchange.unmask(summed.total, opening, there)
        means, rows, loss = summed.opened(len(there))
        factors, plain = wire.unpack_factors(means), wire.unpack_plain(means)
        aggregator.check(OBSERVER, rows, factors, plain)
    except (MaskError, Refused) as error:
        raise ServerError(
            f"round {heard.round}: the sum over clients {there} cannot be opened: {error}. One of their messages is wrong, and "
            "masks hide whose. Finished rounds are kept; go on with `umbel run --resume`, which asks everybody anew"
        ) from error
    aggregator.fold(OBSERVER, rows, factors, plain, {})
    heard.seconds["server"] += time.perf_counter() - started
    said = {"clients": len(there), "threshold": exchange.needed, "rows": rows}
    return said if loss is None else {**said, "loss": loss}


def _take(reply: Reply, summed: Sum, aggregator: Aggregator, heard: Heard) -> bool:
    message = read(reply, heard, 2 * aggregator.most_bytes(), aggregator.most_header(), masked=True)
    if message is None:
        return False
    started = time.perf_counter()
    try:
        summed.add(reply.client, message.tensors)
        return True
    except (Refused, wire.WireError) as error:
        heard.refuse(reply.client, str(error))
        return False
    finally:
        heard.seconds["server"] += time.perf_counter() - started


Opening = Mapping[int, Mapping[str, Mapping[int, bytes]]]
"""Per client that helped the shares that it held: "own" of those whose upload came, "key" of the others."""


class _Exchange:
    """The small messages of one exchange.

    Args:
        engine: Reaches the clients.
        plan: The run's.
        heard: Of the round, which takes over refusals, bytes and seconds.
        asked: K clients, from 0.
    """

    def __init__(self, engine: Engine, plan: Plan, heard: Heard, asked: list[int]) -> None:
        self._engine, self._plan, self._heard, self._asked = engine, plan, heard, asked
        self.needed = masking.threshold(len(asked))
        self._keys: dict[int, _Keys] = {}
        # Per sender what it sealed for each other, and what its b_u is known by.
        self._sealed: dict[int, dict[int, str]] = {}
        self._commitments: dict[int, str] = {}

    @property
    def among(self) -> list[int]:
        """Those whose uploads may carry streams of each other: who sent shares."""
        return sorted(self._sealed)

    def sealed_for(self, client: int) -> dict[str, str]:
        return {str(sender): own[client] for sender, own in self._sealed.items() if sender != client}

    def ask_keys(self) -> None:
        if len(self._asked) < masking.FEWEST:
            raise ServerError(
                f"round {self._heard.round}: privacy.secure_aggregation needs {masking.FEWEST} clients or more, asked: "
                f"{self._asked}; a sum over one is its upload"
            )
        asked = {"clients": self._asked}
        found = self._ask("keys", self._asked, lambda client: asked, _read_keys)
        twice = [key for own in found.values() for key in (own.seal, own.mask)]
        for client in [client for client, own in found.items() if twice.count(own.seal) + twice.count(own.mask) > 2]:
            # A copied key would have two clients share a stream, and whoever was honest would refuse the list.
            self._heard.refuse(client, f"client {client} has a key of somebody else's")
            del found[client]
        self.check_enough("its keys", found)
        self._keys = found

    def ask_shares(self) -> None:
        keys = self._keys
        listed = {"public": {str(client): [to_text(own.seal), to_text(own.mask)] for client, own in keys.items()}}

        def read(client: int, header: Mapping[str, Any]) -> tuple[dict[int, str], str]:
            sealed = _entries(header, "sealed", set(keys) - {client})
            for other, text in sealed.items():
                from_text(text, SEALED_BYTES, f"what is sealed for client {other}")
            known = header.get("commitment")
            if not isinstance(known, str) or len(known) != 64:
                raise Refused(f"its commitment is {known!r:.80}, wanted: 64 hexadecimal digits")
            return sealed, known

        found = self._ask("shares", sorted(keys), lambda client: listed, read)
        self.check_enough("its shares", found)
        self._sealed = {client: own[0] for client, own in found.items()}
        self._commitments = {client: own[1] for client, own in found.items()}

    def ask_unmask(self, there: list[int]) -> Opening:
        """Asks those whose uploads came for their part in the opening."""
        gone = set(self.among) - set(there)

        def read(client: int, header: Mapping[str, Any]) -> dict[str, dict[int, bytes]]:
            wanted = {"own": set(there), "key": gone}
            return {
                kind: {
                    k: from_text(text, SHARE_BYTES, f"share of client {k}") for k, text in _entries(header, kind, of).items()
                }
                for kind, of in wanted.items()
            }

        found = self._ask("unmask", there, lambda client: {"survivors": there}, read)
        self.check_enough("its part in the opening", found)
        return found

    def unmask(self, total: Tensor, opening: Opening, there: list[int]) -> None:
        """Takes the masks off the sum, in place.

        Raises:
            MaskError: The shares do not give somebody's secret.
        """
        keys, known = self._keys, self._commitments
        secrets = {
            k: self._secret(opening, "own", k, lambda secret, k=k: masking.commitment(secret) == known[k]) for k in there
        }
        gone = {
            k: self._secret(opening, "key", k, lambda secret, k=k: masking.public(secret) == keys[k].mask)
            for k in self.among
            if k not in there
        }
        identity = masking.exchange_of(self._plan.run, self._heard.round, {k: (own.seal, own.mask) for k, own in keys.items()})
        masking.unmask(total, secrets, gone, {k: own.mask for k, own in keys.items()}, identity)

    def _secret(self, opening: Opening, kind: str, client: int, fits: Callable[[bytes], bool]) -> bytes:
        """Returns b_u or the private mask key of a client, of which others gave shares."""
        places = {holder: place for place, holder in enumerate(sorted(self._keys))}
        try:
            return masking.joined({places[holder]: own[kind][client] for holder, own in opening.items()}, self.needed, fits)
        except MaskError as error:
            raise MaskError(f"client {client}: {error}") from None

    def _ask(
        self,
        kind: str,
        clients: list[int],
        header: Callable[[int], Mapping[str, Any]],
        take: Callable[[int, Mapping[str, Any]], T],
    ) -> dict[int, T]:
        stage, found = Heard(self._plan.run, self._heard.round, kind), dict[int, T]()

        def request(client: int) -> bytes:
            return wire.encode(wire.Message({**stage.echo(client), **header(client)}))

        for reply in once_each(self._engine.ask(counted(clients, request, stage)), clients, stage):
            message = read(reply, stage)
            if message is None:
                continue
            try:
                found[reply.client] = take(reply.client, message.header)
            except (Refused, MaskError) as error:
                stage.refuse(reply.client, f"client {reply.client}: {error}")
        if kind == "unmask":
            # Not left out: with enough others its sum is opened without it.
            in_it = "its upload is in the sum, its help to open it was not there: "
            stage.refused = [{**own, "reason": in_it + own["reason"]} for own in stage.refused]
        self._heard.add(stage)
        return {client: found[client] for client in clients if client in found}

    def check_enough(self, what: str, left: Mapping[int, Any] | list[int]) -> None:
        """Raises ServerError where fewer are left than open a sum."""
        if len(left) >= self.needed:
            return
        raise ServerError(
            f"round {self._heard.round}: {len(left)} of {len(self._asked)} clients sent {what}, needed: {self.needed}; "
            "fewer cannot open a masked sum (all but a third of those asked; privacy.secure_aggregation). "
            f"Left out: {self._heard.reasons()}. Finished rounds are kept; with the clients back, go on with "
            "`umbel run --resume`"
        )


def _read_keys(client: int, header: Mapping[str, Any]) -> _Keys:
    both = header.get("public")
    if not isinstance(both, list) or len(both) != 2:
        raise Refused(f"its public keys are {both!r:.80}, wanted: two")
    return _Keys(*(from_text(text, SECRET_BYTES, "a public key") for text in both))


def _entries(header: Mapping[str, Any], key: str, wanted: set[int]) -> dict[int, str]:
    own = header.get(key)
    if not isinstance(own, dict) or set(own) != {str(k) for k in wanted}:
        raise Refused(f"{key!r} is {own!r:.80}, wanted: an entry for each of clients {sorted(wanted)}")
    return {int(k): text for k, text in own.items()}
