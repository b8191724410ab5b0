"""How a request reaches clients and replies come back: one method, `ask`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

NO_REPLY = "no reply within"
"""Begins the reason of a client that got its request and was silent until the deadline."""


@dataclass(frozen=True)
class Ask:
    """Bytes for one client (our number, not the engine's node id), and the most bytes that its reply may have."""

    client: int
    payload: bytes
    most_bytes: int = 2**40


@dataclass(frozen=True)
class Reply:
    """A client's bytes, or the reason why there are none."""

    client: int
    payload: bytes | None
    reason: str = ""


class Engine(Protocol):
    """Carries requests to clients and their replies back."""

    def ask(self, asks: Iterable[Ask]) -> Iterator[Reply]:
        """Yields one reply per ask, in any order, as they arrive; a silent client yields its reason."""
        ...


class Waiting(Exception):
    """Replies that somebody has to bring are missing. The run ends here in good order and goes on when they are there.

    Args:
        asked: Per request "site", "run", "round", "kind", "request" (its file) and "state": "here", "missing", or why it is
            not waited for.
    """

    def __init__(self, asked: Sequence[Mapping[str, Any]]) -> None:
        self.asked = [dict(own) for own in asked]
        missing = [own["site"] for own in self.asked if own["state"] == "missing"]
        super().__init__(f"waiting for {', '.join(dict.fromkeys(missing))}")
