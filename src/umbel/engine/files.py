"""Files: asks become signed files that somebody carries to the sites, and replies are files that come back.

Under the job's folder, with the same name on both sides: `outbox/<site>/<run>-round-<n>-<kind>.umbel` and
`inbox/<site>/…`. A request that was closed without its reply ends with `.closed`. They stay until their round is durable, since
until then every start of the run asks and folds the round anew; the same state asks with the same bytes, so that what was
carried away still counts.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbel import envelope as envelopes
from umbel import kit
from umbel.engine import Ask, Reply, Waiting
from umbel.envelope import SERVER, Envelope, EnvelopeError, Head

OUTBOX, INBOX = "outbox", "inbox"
SUFFIX, CLOSED = ".umbel", ".closed"


@dataclass(frozen=True)
class Request:
    """A request that lies in the outbox.

    Args:
        envelope: The signed file.
        site: Whom it is for.
        reply: Where its reply is, once it was imported.
    """

    envelope: Envelope
    site: str
    reply: Path

    @property
    def closed(self) -> bool:
        """True where its round is to go on without it."""
        return self.envelope.path.suffix == CLOSED


@dataclass(frozen=True)
class _Asked:
    """One ask: the request in the outbox, or the reason why there is none."""

    client: int
    most_bytes: int
    site: kit.Site | None = None
    request: Request | None = None
    reason: str = ""


class Files:
    """Answers asks from files that were brought, and raises `Waiting` where some are missing.

    Args:
        folder: The job's.
        federation: The kit's server folder, with the key that signs and the sites.
        job: What every site must know (see `umbel.client.site.Job`).
    """

    def __init__(self, folder: Path, federation: kit.Federation, job: Mapping[str, Any]) -> None:
        self._folder, self._server, self._job = folder, federation.folder, job
        self._key = kit.read_private_key(federation.folder / "signing.key")
        self._invited: list[dict[str, Any]] = []

    def ask(self, asks: Iterable[Ask]) -> Iterator[Reply]:
        """Writes what is not written yet; yields all replies, or none as long as somebody's is missing.

        Raises:
            Waiting: It names who is missing.
        """
        sites = {site.number: site for site in kit.read(self._server).sites}
        asked = [self._request(ask, sites.get(ask.client)) for ask in asks]
        requests = [own.request for own in asked if own.request is not None]
        if not requests:
            yield from (Reply(own.client, None, own.reason) for own in asked)
            return
        self._forget_before(requests[0].envelope.head.round)
        replies = [self._reply(own) for own in asked]
        states = [self._state(own, reply) for own, reply in zip(asked, replies)]
        # Whoever was not there at the opening may still come; nobody waits for that.
        head = requests[0].envelope.head
        if head.kind == "open" and head.round > 0:
            self._invited = [state | {"state": "may join"} for state in states if state["state"] == "missing"]
        elif any(state["state"] == "missing" for state in states):
            raise Waiting(states + self._invited)
        for own, reply, state in zip(asked, replies, states):
            if not isinstance(reply, Envelope):
                yield Reply(own.client, None, own.reason or f"brought no reply: {state['state']}")
                continue
            try:
                payload = envelopes.read(reply, own.most_bytes)
            except EnvelopeError as error:
                raise Waiting([state | {"state": "missing", "reason": str(error)}]) from None
            yield Reply(own.client, payload)

    def _request(self, ask: Ask, site: kit.Site | None) -> _Asked:
        if site is None or site.state != kit.ACTIVE:
            reason = "no site has this number" if site is None else f"site {site.name!r} is revoked"
            return _Asked(ask.client, ask.most_bytes, site, reason=reason)
        said = _header(ask.payload)
        head = Head(
            sender=SERVER,
            to=site.name,
            run=self._job["run"],
            member=self._job["member"],
            round=said["round"],
            kind=said["kind"],
            length=len(ask.payload),
            sha256=hashlib.sha256(ask.payload).hexdigest(),
            most_bytes=ask.most_bytes,
            job={key: value for key, value in self._job.items() if key not in ("run", "member")},
        )
        request = self._kept(head)
        if request is None:
            path = self._free_path(head)
            envelopes.write(path, head, ask.payload, self._key)
            request = Request(envelopes.look(path, self._own_key), site.name, reply_path(self._folder, path))
        return _Asked(ask.client, ask.most_bytes, site, request)

    @property
    def _own_key(self) -> dict[str, str]:
        return own_key(self._server)

    def _kept(self, head: Head) -> Request | None:
        """Returns the same request from an earlier start; what it says of the job (a site may have joined since) stays."""
        for request in requests_in(self._folder, self._own_key, head.to):
            old = request.envelope.head
            if (old.run, old.member, old.sha256) == (head.run, head.member, head.sha256):
                return request
        return None

    def _free_path(self, head: Head) -> Path:
        folder, name = self._folder / OUTBOX / head.to, f"{head.member}-round-{head.round}-{head.kind}"
        number, path = 1, folder / (name + SUFFIX)
        while path.exists() or path.with_suffix(CLOSED).exists():
            # The same round asks the same site again, whose files were gone.
            number += 1
            path = folder / f"{name}-{number}{SUFFIX}"
        return path

    def _reply(self, asked: _Asked) -> Envelope | str:
        """Returns a verified reply to exactly this request, or why there is none."""
        if asked.request is None or asked.site is None or not asked.request.reply.exists():
            return ""
        try:
            reply = envelopes.look(asked.request.reply, {asked.site.fingerprint: asked.site.public_key})
            check_reply(reply, asked.request)
        except EnvelopeError as error:
            return str(error)
        return reply

    def _state(self, asked: _Asked, reply: Envelope | str) -> dict[str, Any]:
        name = f"client {asked.client}" if asked.site is None else asked.site.name
        if asked.request is None:
            return {"site": name, "state": asked.reason}
        head = asked.request.envelope.head
        path = asked.request.envelope.path.relative_to(self._folder)
        state = {"site": name, "run": head.member, "round": head.round, "kind": head.kind, "request": path.as_posix()}
        if isinstance(reply, Envelope):
            return state | {"state": "here"}
        if asked.request.closed:
            return state | {"state": "closed without it"}
        return state | {"state": "missing"} | ({"reason": reply} if reply else {})

    def _forget_before(self, current: int) -> None:
        """Removes requests and replies of rounds that are durable."""
        for request in requests_in(self._folder, self._own_key):
            head = request.envelope.head
            if head.member == self._job["member"] and head.round < current:
                request.reply.unlink(missing_ok=True)
                request.envelope.path.unlink(missing_ok=True)


def own_key(server: Path) -> dict[str, str]:
    """Returns the server's public key by its fingerprint.

    Args:
        server: The kit's server folder, or a site's, where the file is called server.pub.
    """
    path = server / "signing.pub" if (server / "signing.pub").exists() else server / "server.pub"
    text = kit.public_text(kit.read_public_key(path.read_text(encoding="utf-8", errors="replace").strip(), str(path)))
    return {kit.fingerprint(text): text}


def requests_in(folder: Path, keys: Mapping[str, str], site: str = "*") -> list[Request]:
    """Returns the requests in a job's outbox, those of one site or all; a file that is none of ours is passed over."""
    found: list[Request] = []
    for path in sorted((folder / OUTBOX).glob(f"{site}/*")):
        if path.suffix not in (SUFFIX, CLOSED) or path.name.startswith("."):
            continue
        try:
            found.append(Request(envelopes.look(path, keys), path.parent.name, reply_path(folder, path)))
        except EnvelopeError:
            continue
    return found


def reply_path(folder: Path, request: Path) -> Path:
    """Returns where the reply to a request of the outbox is kept."""
    return folder / INBOX / request.parent.name / f"{request.stem}{SUFFIX}"


def check_reply(reply: Envelope, request: Request) -> None:
    """Refuses a reply that is not to exactly this request.

    Raises:
        EnvelopeError: It names both values.
    """
    head, asked = reply.head, request.envelope.head
    expected = {"sender": request.site, "to": SERVER, "run": asked.run, "member": asked.member}
    expected |= {"round": asked.round, "kind": asked.kind, "reply_to": request.envelope.digest}
    for name, value in expected.items():
        if getattr(head, name) != value:
            raise EnvelopeError(f"{reply.path}: its {name} is {getattr(head, name)!r:.80}, asked was {value!r}")
    if head.length > asked.most_bytes:
        raise EnvelopeError(f"{reply.path}: its payload has {head.length} bytes, allowed: {asked.most_bytes}")


def _header(payload: bytes) -> dict[str, Any]:
    """Returns the header of a message that we made ourselves, without its tensors."""
    (size,) = struct.unpack("<Q", payload[:8])
    return json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["umbel"])
