"""The few calls of Flower's HTTP API that umbel makes itself: who is registered, register, unregister, and a site's probe.

Flower 1.41 speaks protobuf over HTTPS. These messages have one or two fields each, so they are written and read here, which
takes milliseconds; the `flwr` command takes seconds a call and does not show which node has which key.
"""

import base64
import contextlib
import http.client
import json
import ssl
import struct
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from umbel import kit

UNREGISTERED = "unregistered"
_NO_NODE, _BAD_INTERVAL = 2004, 2003
"""Flower's error codes: no node has this key (or it cannot be activated), the heartbeat interval is not allowed."""


@dataclass(frozen=True)
class Node:
    """A node as the SuperLink keeps it. `status` is registered, online, offline or unregistered."""

    node_id: int
    public_key: bytes
    status: str


@dataclass(frozen=True)
class Answer:
    """What came back over HTTP. `date` is the other side's clock, None where it did not say."""

    status: int
    body: bytes
    date: datetime | None

    @property
    def code(self) -> int:
        """Flower's own error code, 0 where there is none."""
        try:
            return int(json.loads(self.body)["code"])
        except (ValueError, KeyError, TypeError):
            return 0


class ApiError(RuntimeError):
    """The SuperLink refused a call."""


class Control:
    """The operator's side, on loopback. `address` is host:port, `ca` what its certificate must be signed by."""

    def __init__(self, address: str, ca: Path) -> None:
        self.address, self.context = address, ssl.create_default_context(cafile=ca)

    def healthy(self) -> bool:
        """Whether the SuperLink answers."""
        try:
            return request("GET", self.address, "/health", self.context, proxied=False).status == 200
        except OSError:
            return False

    def nodes(self) -> list[Node]:
        """Returns every node that was ever registered."""
        found = []
        for number, value in decode(self._call("list-nodes", b"")):
            if number == 1 and isinstance(value, bytes):
                fields = dict(decode(value))
                found.append(Node(int(fields[1]), bytes(fields[11]), bytes(fields[4]).decode()))  # type: ignore[arg-type]
        return found

    def register(self, key: bytes, name: str) -> int:
        """Lets a public key in; returns the node's id."""
        return int(dict(decode(self._call("register-node", encode((1, key), (3, name.encode())))))[1])

    def unregister(self, node_id: int) -> None:
        """Shuts a node out; the SuperLink never takes its key again."""
        self._call("unregister-node", encode((1, node_id)))

    def _call(self, name: str, message: bytes) -> bytes:
        answer = request("POST", self.address, f"/v1/control/{name}", self.context, message, proxied=False)
        if answer.status != 200:
            said = answer.body[:300].decode(errors="replace")
            raise ApiError(f"SuperLink at {self.address}: {name} answered {answer.status}: {said}")
        return answer.body


class Fleet:
    """A site's side, through the public address."""

    def __init__(self, address: str, ca: Path, key: ec.EllipticCurvePrivateKey) -> None:
        self.address, self.context, self.key = address, ssl.create_default_context(cafile=ca), key

    def probe(self) -> Answer:
        """Asks to be activated with an interval that is never allowed: what is refused says whether the key is known."""
        return self._call("activate-node", encode((1, kit.flower_bytes(self.key.public_key())), (2, -1.0)))

    def deactivate(self, node_id: int) -> Answer:
        """Says that this site's node is not online, as a SuperNode does when it ends."""
        return self._call("deactivate-node", encode((1, node_id)))

    def _call(self, name: str, message: bytes) -> Answer:
        headers = signed(self.key, datetime.now(UTC))
        return request("POST", self.address, f"/v1/fleet/{name}", self.context, message, headers)


def signed(key: ec.EllipticCurvePrivateKey, moment: datetime) -> dict[str, str]:
    """Returns the headers by which a site shows that it has a key, and when."""
    stamp = moment.isoformat()
    signature = key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    return {
        "flwr-public-key": base64.b64encode(kit.flower_bytes(key.public_key())).decode(),
        "flwr-timestamp": stamp,
        "flwr-signature": base64.b64encode(signature).decode(),
    }


def knows_key(answer: Answer) -> bool | None:
    """Whether the server knows the key that `Fleet.probe` was made with; None where the answer says neither."""
    return {_BAD_INTERVAL: True, _NO_NODE: False}.get(answer.code)


def request(
    verb: str,
    address: str,
    path: str,
    context: ssl.SSLContext,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    *,
    proxied: bool = True,
    timeout: float = 10,
) -> Answer:
    """Makes one HTTPS request, through the environment's HTTPS_PROXY where `proxied`; OSError where nobody answers."""
    with contextlib.closing(connection(address, context, proxied, timeout)) as link:
        sent = {"content-type": "application/protobuf", "accept": "application/protobuf"} | (headers or {})
        try:
            link.request(verb, path, body, sent)
            answer = link.getresponse()
            return Answer(answer.status, answer.read(1 << 20), _date(answer.headers.get("date")))
        except http.client.HTTPException as error:
            raise ConnectionError(f"answers, but not as an HTTPS server: {error!r}") from None


def _date(text: str | None) -> datetime | None:
    with contextlib.suppress(ValueError):
        return parsedate_to_datetime(text) if text else None


def connection(address: str, context: ssl.SSLContext, proxied: bool, timeout: float) -> http.client.HTTPSConnection:
    """Returns a connection that is not open yet."""
    host, port = kit.host_and_port(address)
    proxy = urllib.request.getproxies().get("https") if proxied and not urllib.request.proxy_bypass(host) else None
    if proxy is None:
        return http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
    middle = proxy.split("://")[-1].rstrip("/").rpartition("@")[2]
    link = http.client.HTTPSConnection(*kit.host_and_port(middle), timeout=timeout, context=context)
    link.set_tunnel(host, port)
    return link


# Protobuf: a message is a sequence of fields, each a number with a kind, and a value


def encode(*fields: tuple[int, bytes | int | float]) -> bytes:
    """Writes a message of bytes, whole numbers (uint64) and floats (double)."""
    message = b""
    for number, value in fields:
        if isinstance(value, bytes):
            message += _varint(number << 3 | 2) + _varint(len(value)) + value
        elif isinstance(value, int):
            message += _varint(number << 3) + _varint(value)
        else:
            message += _varint(number << 3 | 1) + struct.pack("<d", value)
    return message


def decode(message: bytes) -> Iterator[tuple[int, bytes | int | float]]:
    """Yields the fields of a message; text and messages inside it as bytes. ApiError where it is none."""
    at = 0
    try:
        while at < len(message):
            tag, at = _read_varint(message, at)
            kind = tag & 7
            if kind == 0:
                value, at = _read_varint(message, at)
            elif kind == 1:
                value, at = struct.unpack_from("<d", message, at)[0], at + 8
            elif kind == 2:
                size, at = _read_varint(message, at)
                value, at = message[at : at + size], at + size
                if at > len(message):
                    raise ValueError(size)
            else:
                raise ValueError(kind)
            yield tag >> 3, value
    except (IndexError, ValueError, struct.error):
        raise ApiError("the SuperLink's answer is no message of Flower 1.41; which version of flwr runs there?") from None


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
