"""Replies over Flower's grid: what is still on its way holds up nobody else's."""

import threading
import time
from collections.abc import Iterable
from typing import Any, cast

import pytest

pytest.importorskip("flwr", reason="flwr is not installed")

from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError, inflate_object_from_contents, pull_objects
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import http_grid

from umbel import wire
from umbel.engine import Ask, Reply
from umbel.engine.flower import PULLERS, Flower, to_content

PAYLOAD = wire.encode(wire.Message({"said": "hello"}))
FOR_EVER = 1e9


class Store:
    """A grid whose replies are announced at once and whose last part is there so many seconds later, per node."""

    def __init__(self, delays: dict[int, float]) -> None:
        self.delays, self.began, self.sent = delays, time.monotonic(), dict[str, Message]()
        self.claimed = set[str]()
        self.lock = threading.Lock()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            self.sent[message.object_id] = message
        return [message.object_id for message in messages]

    def pull_messages(self, identities: list[str]) -> list[Message]:
        (identity,) = identities
        with self.lock:
            if identity in self.claimed:
                return []  # as a SuperLink, which gives a reply once
            self.claimed.add(identity)
        asked = self.sent[identity]
        reply = Message(to_content(PAYLOAD), reply_to=asked)
        objects = {key: one.deflate() for key, one in get_all_nested_objects(reply).items()}
        last, node = next(iter(objects)), asked.metadata.dst_node_id

        def pull(key: str) -> bytes:
            if key == last and time.monotonic() - self.began < self.delays[node]:
                raise ObjectUnavailableError(key)
            return objects[key]

        contents = getattr(http_grid, "pull_objects")(list(objects), pull)  # noqa: B009
        return [cast(Message, inflate_object_from_contents(reply.object_id, contents))]


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower's own start of a ServerApp says of it."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(http_grid, "pull_objects", pull_objects)  # put back afterwards


def answers(delays: list[float], deadline: float) -> tuple[dict[int, Reply], list[int]]:
    nodes = {client: client + 100 for client in range(len(delays))}
    grid: Any = Store({nodes[client]: delay for client, delay in enumerate(delays)})
    engine = Flower(grid, lambda: nodes, lambda: set(nodes), {"run": "x"}, deadline)
    replies = list(engine.ask(Ask(client, PAYLOAD, 10**6) for client in nodes))
    return {reply.client: reply for reply in replies}, [reply.client for reply in replies]


def test_sites_that_stop_in_the_middle_of_a_reply_hold_up_nobody_else() -> None:
    stopped = 2 * PULLERS
    replies, order = answers([*[FOR_EVER] * stopped, 0.0, 0.0], 6)
    assert sorted(order[:2]) == [stopped, stopped + 1]
    assert [replies[client].payload for client in order[:2]] == [PAYLOAD, PAYLOAD]
    assert all(replies[client].payload is None for client in range(stopped))


def test_a_reply_that_is_still_being_sent_is_taken_when_all_of_it_is_there() -> None:
    replies, _ = answers([*[1.5] * (PULLERS + 1), 0.0], 30)
    assert all(reply.payload == PAYLOAD for reply in replies.values())
