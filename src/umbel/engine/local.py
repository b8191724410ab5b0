"""Clients in this process, one after the other, over one resident base model: the reference and the default."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from umbel.engine import Ask, Reply
from umbel.engine.reasons import place


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
                # One client's failure must not end the round for the others. Its rows are ours here, so nothing is left out.
                yield Reply(ask.client, None, f"{type(error).__name__}: {error} ({place(error)})")
