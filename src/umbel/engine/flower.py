"""Flower: asks become messages to nodes, replies come back. Nothing but translation.

A payload travels as two byte arrays: what differs from client to client (the length and the JSON header of our safetensors
message) and what does not (its tensors). Flower cuts arrays into chunks, names each chunk by its hash and sends no chunk
twice, so that one download for all clients crosses to the server's store once, and a broken transfer goes on where it was.
"""

import concurrent.futures
import json
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_children_ids_from_object_content
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError, pull_objects
from flwr.superlink.grid import http_grid

from umbel.engine import NO_REPLY, Ask, Reply

if TYPE_CHECKING:
    from umbel.engine.flower_strategy import as_strategy as as_strategy

CHUNK_BYTES = 5 * 2**20
"""How Flower cuts arrays."""

ENVELOPE_BYTES = 2**16
"""What Flower's own records take of a reply."""

POLL_SECONDS = 0.5

CONNECT_SECONDS, RECONNECT_SECONDS = 60, 10
"""How long a call waits for clients that are not connected: the first one for all, later ones for who was there before."""

PULLERS = 4
"""Replies that are taken from the store at a time; each is in memory whole."""


class EnvelopeError(ValueError):
    """A message of Flower's that does not hold what ours hold."""


def to_content(payload: bytes, job: Mapping[str, Any] | None = None, error: str = "") -> RecordDict:
    """Returns a payload, a job for the client, or the reason why there is no payload, as Flower's records."""
    records = RecordDict()
    if job is not None:
        records["job"] = ConfigRecord({"json": json.dumps(job, separators=(",", ":"), sort_keys=True)})
    if error:
        records["error"] = ConfigRecord({"reason": error})
        return records
    cut = 8 + struct.unpack("<Q", payload[:8])[0]
    records["payload"] = ArrayRecord({"head": _array(payload[:cut]), "body": _array(payload[cut:])})
    return records


def _array(data: bytes) -> Array:
    return Array(dtype="bytes", shape=(len(data),), stype="safetensors", data=data)


def job_of(content: RecordDict) -> dict[str, Any]:
    """Returns the job in a request.

    Raises:
        EnvelopeError: There is none.
    """
    record = content.get("job")
    text = record.get("json") if isinstance(record, ConfigRecord) else None
    try:
        job = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        job = None
    if not isinstance(job, dict):
        raise EnvelopeError("the message holds no job; it is not umbel's, or of another version")
    return job


def payload_of(content: RecordDict) -> bytes:
    """Returns the payload in a message.

    Raises:
        EnvelopeError: There is none.
    """
    record = content.get("payload")
    parts = [record.get(name) for name in ("head", "body")] if isinstance(record, ArrayRecord) else [None]
    if not all(isinstance(part, Array) for part in parts):
        raise EnvelopeError("the message holds no payload; it is not umbel's, or of another version")
    return b"".join(part.data for part in parts if isinstance(part, Array))


def reply_of(client: int, message: Message) -> Reply:
    """Returns what a client answered."""
    if message.has_error():
        reason = " ".join((message.error.reason or "").split())
        return Reply(client, None, f"Flower: {reason[:300] or 'no reason'} (code {message.error.code})")
    record = message.content.get("error")
    if isinstance(record, ConfigRecord):
        return Reply(client, None, str(record.get("reason"))[:1000])
    try:
        return Reply(client, payload_of(message.content))
    except EnvelopeError as error:
        return Reply(client, None, str(error))


class Flower:
    """Carries asks over a Grid.

    Args:
        grid: Of the ServerApp.
        nodes: Returns the connected clients: our numbers and Flower's node ids.
        everyone: Returns all clients that may be there, connected or not.
        job: Goes with every ask (see `umbel.client.site.Job`).
        deadline: Seconds that one call of `ask` may take; who has not answered by then is reported as silent.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Callable[[], Mapping[int, int]],
        everyone: Callable[[], set[int]],
        job: Mapping[str, Any],
        deadline: float,
    ) -> None:
        self._grid, self._nodes, self._everyone, self._deadline = grid, nodes, everyone, deadline
        self._job = {**job, "seconds": deadline}
        self._last: set[int] | None = None
        setattr(http_grid, "pull_objects", _pull_objects)  # noqa: B010

    def ask(self, asks: Iterable[Ask]) -> Iterator[Reply]:
        """Sends all asks, then yields replies as they arrive, and for each client that is silent the reason."""
        until = time.monotonic() + self._deadline
        nodes, sent = self._connected(until), dict[str, Ask]()
        for ask in asks:
            node = nodes.get(ask.client)
            if node is None:
                yield Reply(ask.client, None, "not connected")
                continue
            message = Message(to_content(ask.payload, self._job), node, "train", ttl=self._deadline)
            (identity,) = self._grid.push_messages([message])
            if identity is None:
                yield Reply(ask.client, None, "Flower took no message for this node")
            else:
                sent[identity] = replace(ask, payload=b"")
        yield from self._replies(sent, until)

    def _connected(self, until: float) -> Mapping[int, int]:
        """Returns who is there, after giving those a moment who are expected: at first all, later who was there before."""
        until = min(until, time.monotonic() + (CONNECT_SECONDS if self._last is None else RECONNECT_SECONDS))
        wanted = self._everyone() if self._last is None else self._last
        nodes = self._nodes()
        while wanted - set(nodes) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            nodes = self._nodes()
        self._last = set(nodes)
        return nodes

    def _replies(self, sent: dict[str, Ask], until: float) -> Iterator[Reply]:
        # Threads that only wait for a site to send on are beside the PULLERS.
        pool = concurrent.futures.ThreadPoolExecutor(max(1, len(sent)), thread_name_prefix="umbel-pull")
        idle, looked = deque(sent), 0
        flying: dict[concurrent.futures.Future[Reply | None], str] = {}
        pulls: dict[str, _Pull] = {}
        taking = threading.Semaphore(PULLERS)
        try:
            while (idle or flying) and time.monotonic() < until:
                while idle and sum(not pulls[own].aside for own in flying.values()) < PULLERS:
                    identity = idle.popleft()
                    pulls[identity] = _Pull(sent[identity].most_bytes, until, taking)
                    flying[pool.submit(self._pull, identity, sent[identity].client, pulls[identity])] = identity
                for future in concurrent.futures.wait(flying, POLL_SECONDS, concurrent.futures.FIRST_COMPLETED).done:
                    identity, looked = flying.pop(future), looked + 1
                    reply = future.result()
                    if reply is None:
                        idle.append(identity)
                    else:
                        looked = 0
                        del sent[identity]
                        yield reply
                if looked >= len(sent):
                    # Nobody has anything new.
                    looked = 0
                    time.sleep(POLL_SECONDS)
            for ask in sent.values():
                yield Reply(ask.client, None, f"{NO_REPLY} {self._deadline:g} seconds (server.round_deadline)")
        finally:
            for pull in pulls.values():
                pull.until = 0  # so that no thread keeps this process from ending
            pool.shutdown(wait=False, cancel_futures=True)

    def _pull(self, identity: str, client: int, pull: "_Pull") -> Reply | None:
        _bound.pull = pull
        try:
            with pull.taking:
                found = list(self._grid.pull_messages([identity]))
        except httpx.HTTPStatusError as error:
            if error.response.status_code < 500:
                raise
            return Reply(client, None, f"a reply that the SuperLink cannot hand out ({error.response.status_code})")
        except httpx.HTTPError:
            raise  # a SuperLink that is not there is nobody's reply
        except Exception as error:
            # Flower's records are a node's bytes, too, and reading them is not ours.
            return Reply(client, None, f"a malformed reply ({type(error).__name__})")
        replies = (message for message in found if message.metadata.reply_to_message_id == identity)
        return next((reply_of(client, message) for message in replies), None)


@dataclass
class _Pull:
    """What one reply may take, until when (`time.monotonic`), its turn, and whether it gave that up until all is there."""

    most_bytes: int
    until: float
    taking: threading.Semaphore
    aside: bool = False


class _Incomplete(Exception):
    """A part of a reply is not there yet."""


_bound = threading.local()
"""The `pull` that runs in this thread; none where somebody else uses Flower's grid."""


def _pull_objects(object_ids: list[str], pull_object_fn: Callable[[str], bytes], **options: Any) -> dict[str, bytes]:
    """Takes the place of Flower's function of this name in its grid, which takes whatever a node announces.

    A reply is refused while it arrives, before more than its bound is in memory. An array lists its chunks by number and may
    list one a million times, so its length is added up before Flower joins the chunks.
    """
    bound: _Pull | None = getattr(_bound, "pull", None)
    if bound is None:
        return pull_objects(object_ids, pull_object_fn, **options)
    most, allowed = bound.most_bytes + ENVELOPE_BYTES, f"allowed: {bound.most_bytes} bytes"
    parts = 64 + most // CHUNK_BYTES
    if len(object_ids) > parts:
        raise ObjectPullError(object_ids[0], f"a reply of {len(object_ids)} parts, {allowed}")

    def take(keep: bool) -> dict[str, bytes]:
        taken = 0

        def pull(object_id: str) -> bytes:
            nonlocal taken
            if time.monotonic() > bound.until:
                raise ObjectPullError(object_id, "the deadline is over")
            try:
                content = pull_object_fn(object_id)
            except ObjectUnavailableError:
                if keep:
                    raise _Incomplete from None
                raise
            taken += len(content)
            if taken > most:
                raise ObjectPullError(object_id, f"the reply is longer than {taken - len(content)} bytes, {allowed}")
            return content if keep else b""

        left = max(1.0, bound.until - time.monotonic())
        return pull_objects(object_ids, pull, **{**options, "max_time": left, "max_tries_per_object": None})

    try:
        contents = take(keep=True)
    except _Incomplete:
        # A site that dies or dallies while it sends must not hold up the others, nor what it sent so far fill our memory.
        bound.aside = True
        bound.taking.release()
        try:
            take(keep=False)
        finally:
            bound.aside = False
            bound.taking.acquire()
        contents = take(keep=True)
    for object_id, content in contents.items():
        if content.startswith(b"Array "):
            length = _joined(content, contents)
            if length > most:
                raise ObjectPullError(object_id, f"an array of {length} bytes, {allowed}")
    return contents


def _joined(array: bytes, contents: Mapping[str, bytes]) -> int:
    """Returns how long an array will be when its chunks are joined."""
    try:
        children = get_object_children_ids_from_object_content(array)
        indices = json.loads(get_object_body(array, Array))["arraychunk_ids"]
        return sum(len(contents[children[i]]) for i in indices)
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise ObjectPullError("", f"a malformed array ({type(error).__name__})") from None


def __getattr__(name: str) -> Any:
    # When first asked for: it needs torch, which a process that only passes a message on does not wait for.
    if name == "as_strategy":
        from umbel.engine.flower_strategy import as_strategy

        return as_strategy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
