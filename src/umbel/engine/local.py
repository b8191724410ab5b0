"""Clients in this process, one after the other, over one resident base model: the reference and the default."""

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from umbel.engine import Ask, Reply


class Local:
    """Answers asks by calling the clients here. Bytes in, bytes out, as over a network.

    Args:
        answer: Per client the function that answers a request's bytes with a reply's.
    """

    def __init__(self, answer: Mapping[int, Callable[[bytes], bytes]]) -> None:
        self._answer = answer

    def ask(self, asks: Iterable[Ask]) -> Iterator[Reply]:
        for ask in asks:
            try:
                yield Reply(ask.client, self._answer[ask.client](ask.payload))
            except Exception as error:
                # One client's failure must not end the round for the others; type, message and place are the reason.
                place = traceback.extract_tb(error.__traceback__)[-1]
                reason = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
                yield Reply(ask.client, None, reason)
