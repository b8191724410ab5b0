"""Admission: every upload is checked whole and kept in a file, and when all are there those in line are folded."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbel import wire
from umbel.asking import Heard, read, rows_of
from umbel.engine import Reply
from umbel.server import Aggregator, Refused

FEWEST_FOR_MEDIAN = 3
"""Of uploads; among fewer, the median cannot tell which of them is out of line."""


@dataclass(frozen=True)
class Upload:
    """An upload that was checked and waits in its file for the others: n_k, its rank per layer, ‖ΔW_k‖_F."""

    weight: int
    factors: wire.Spooled
    ranks: dict[str, int]
    norm: float


def admit(reply: Reply, aggregator: Aggregator, heard: Heard, known: int, folder: Path) -> Upload | None:
    """Checks one reply by itself and puts it into a file, or notes why not.

    Args:
        reply: As it arrived.
        aggregator: Of this round.
        heard: Where refusals are noted.
        known: How many rows the client said it has when the run was opened.
        folder: Of the round's uploads.
    """
    message = read(reply, heard, aggregator.most_bytes(), aggregator.most_header())
    if message is None or reply.payload is None:
        return None
    started = time.perf_counter()
    client, trains = reply.client, bool(aggregator.phase.trains)
    try:
        factors = wire.unpack_factors(message.tensors)
        weight = rows_of(client, message.header)
        if weight > known or ((trains or aggregator.phase.continues) and weight != known):
            raise Refused(f"client {client} says it has {weight} rows, at the opening it had {known}")
        if trains:
            _check_steps(client, message.header)
        ranks = aggregator.check(client, weight, factors, wire.unpack_plain(message.tensors))
        aggregator.check_trained(client, factors)
        norm = aggregator.norm(client, factors)
        return Upload(weight, wire.Spooled(reply.payload, folder / f"{client}.safetensors"), ranks, norm)
    except (Refused, wire.WireError) as error:
        heard.refuse(client, str(error))
        return None
    finally:
        heard.seconds["server"] += time.perf_counter() - started


def _check_steps(client: int, header: Mapping[str, Any]) -> None:
    steps = header.get("steps")
    if type(steps) is not int or not 1 <= steps < 2**63:
        raise Refused(f"client {client} says it took {steps!r:.80} training steps, allowed: 1 or more")


def fold(uploads: Mapping[int, Upload], aggregator: Aggregator, heard: Heard, norm_limit: float) -> None:
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
