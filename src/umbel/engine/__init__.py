"""How a request reaches clients and replies come back: one method, `ask`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Ask:
    """Bytes for one client (our number, not the engine's node id)."""

    client: int
    payload: bytes


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
