"""Envelopes: one request or reply as one signed file, for sites that no network reaches.

    umbel-envelope 1\\n | SHA-256 of the signer's key (32 bytes) | the head's length (4) | the signature's (2) |
    signature | head | payload

The signature (ECDSA, P-384, SHA-384) is over all before it but for its own length, and over the head. The head is JSON and says
how long the payload is and what its SHA-256 is. A file comes from anywhere: its signer is known and its signature checked
before anything else of it is looked at, and lengths are compared before memory is taken. Signed is not secret: who finds
the file can read it.
"""

import base64
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from umbel import kit

NAME, VERSION = b"umbel-envelope ", b"1\n"
LENGTHS = struct.Struct(">32sIH")
PREFIX_BYTES = len(NAME + VERSION) + LENGTHS.size
MOST_HEAD_BYTES = 4 * 2**20
MOST_SIGNATURE_BYTES = 256
BLOCK_BYTES = 2**20

SERVER = "server"
"""The server's name on an envelope; no site can have it."""


class EnvelopeError(ValueError):
    """A file that is refused; says what it is, what was expected and, where there is something, what to do."""


@dataclass(frozen=True)
class Head:
    """What is signed.

    Args:
        sender: SERVER or a site's name.
        to: Likewise.
        run: The job's id.
        member: Of the job's methods.
        round: As the payload says it.
        kind: Of the request, also in its reply.
        length: Of the payload, in bytes.
        sha256: Of the payload.
        reply_to: Of a reply, the request's `Envelope.digest`.
        most_bytes: Of a request, the most bytes that the reply's payload may have.
        job: Of a request, what else a site must know (see `umbel.client.site.Job`).
    """

    sender: str
    to: str
    run: str
    member: str
    round: int
    kind: str
    length: int
    sha256: str
    reply_to: str = ""
    most_bytes: int = 0
    job: dict[str, Any] = field(default_factory=dict[str, Any])

    def encode(self) -> bytes:
        """Returns the head as it is signed: the same head is the same bytes."""
        return json.dumps(asdict(self), separators=(",", ":"), sort_keys=True).encode()


@dataclass(frozen=True)
class Envelope:
    """A file whose signature and head were checked. Its payload was not: `read` and `copy` do that.

    Args:
        path: Where it is.
        head: What is signed.
        digest: SHA-256 of the head's bytes, hexadecimal.
        signer: Fingerprint of the key that signed it.
        front: All bytes before the payload.
    """

    path: Path
    head: Head
    digest: str
    signer: str
    front: bytes


def write(path: Path, head: Head, payload: bytes, key: ec.EllipticCurvePrivateKey) -> None:
    """Writes a signed file, whole or not at all; `head.length` and `head.sha256` are the payload's."""
    said = head.encode()
    signer = _raw(kit.public_text(key.public_key()))
    signature = key.sign(_signed(signer, said), ec.ECDSA(hashes.SHA384()))
    front = NAME + VERSION + LENGTHS.pack(signer, len(said), len(signature)) + signature + said
    with _replacing(path) as file:
        file.write(front)
        file.write(payload)


def look(path: Path, keys: Mapping[str, str]) -> Envelope:
    """Checks a file's signer, signature and head, and that it is as long as the head says.

    Args:
        path: A file from anywhere.
        keys: Per fingerprint (as `kit.fingerprint` gives it) the public key, OpenSSH text; whose signatures count.

    Raises:
        EnvelopeError: It is none of ours, or is refused.
    """
    with _regular(path) as file:
        start = file.read(PREFIX_BYTES)
        if not start.startswith(NAME[: len(start)]) or not start:
            raise EnvelopeError(f"{path}: no file of umbel's (it begins with {start[:8]!r}, expected: {NAME!r})")
        version = start[len(NAME) : len(NAME + VERSION)]
        if not VERSION.startswith(version):
            raise EnvelopeError(
                f"{path}: an envelope of version {version!r}, this umbel reads {VERSION!r}; use the same umbel on both sides"
            )
        if len(start) < PREFIX_BYTES:
            raise EnvelopeError(f"{path}: truncated; it has {len(start)} bytes, its first part has {PREFIX_BYTES}")
        raw, head_bytes, signature_bytes = LENGTHS.unpack(start[-LENGTHS.size :])
        signer = "SHA256:" + base64.b64encode(raw).decode().rstrip("=")
        if signer not in keys:
            raise EnvelopeError(f"{path}: signed with the key {signer}, accepted: {', '.join(keys) or 'none'}")
        if head_bytes > MOST_HEAD_BYTES or signature_bytes > MOST_SIGNATURE_BYTES:
            raise EnvelopeError(
                f"{path}: says its head has {head_bytes} bytes and its signature {signature_bytes}, "
                f"allowed: {MOST_HEAD_BYTES} and {MOST_SIGNATURE_BYTES}"
            )
        rest = file.read(signature_bytes + head_bytes)
        if len(rest) < signature_bytes + head_bytes:
            raise EnvelopeError(f"{path}: truncated within its head; it has {len(start + rest)} bytes")
        signature, said = rest[:signature_bytes], rest[signature_bytes:]
        try:
            kit.read_public_key(keys[signer], signer).verify(signature, _signed(raw, said), ec.ECDSA(hashes.SHA384()))
        except InvalidSignature:
            raise EnvelopeError(
                f"{path}: the signature is not that of {signer} over this head: damaged on its way, or forged"
            ) from None
        head = _head(path, said)
        have, say = os.fstat(file.fileno()).st_size - len(start + rest), head.length
        if have != say:
            what = "truncated" if have < say else "longer than it may be"
            raise EnvelopeError(f"{path}: {what}; its payload has {have} bytes, the signed head says {say}")
    return Envelope(path, head, hashlib.sha256(said).hexdigest(), signer, start + rest)


def read(envelope: Envelope, most_bytes: int) -> bytes:
    """Returns the payload, after checking it against the head.

    Raises:
        EnvelopeError: It has more bytes than allowed, or others than were signed.
    """
    return b"".join(_payload(envelope, most_bytes))


def copy(envelope: Envelope, most_bytes: int, to: Path) -> None:
    """Writes the same file elsewhere, whole or not at all; a block of it is in memory at a time.

    Raises:
        EnvelopeError: The payload has more bytes than allowed, or others than were signed.
    """
    with _replacing(to) as file:
        file.write(envelope.front)
        for block in _payload(envelope, most_bytes):
            file.write(block)


def _payload(envelope: Envelope, most_bytes: int) -> Iterator[bytes]:
    path, left, digest = envelope.path, envelope.head.length, hashlib.sha256()
    if left > most_bytes:
        raise EnvelopeError(f"{path}: its payload has {left} bytes, allowed: {most_bytes}")
    with _regular(path) as file:
        file.seek(len(envelope.front))
        while block := file.read(min(BLOCK_BYTES, left)):
            left -= len(block)
            digest.update(block)
            yield block
    if digest.hexdigest() != envelope.head.sha256:
        raise EnvelopeError(
            f"{path}: damaged; the payload's sha256 is {digest.hexdigest()[:16]}…, signed is {envelope.head.sha256[:16]}…"
        )


def _signed(signer: bytes, head: bytes) -> bytes:
    return NAME + VERSION + signer + struct.pack(">I", len(head)) + head


def _raw(public_key: str) -> bytes:
    return hashlib.sha256(base64.b64decode(public_key.split()[1])).digest()


def _head(path: Path, said: bytes) -> Head:
    """Reads a head whose signature is good; its signer may be hostile all the same, and names become names of files."""
    try:
        table = json.loads(said)
    except (ValueError, RecursionError) as error:
        raise EnvelopeError(f"{path}: its head is no JSON ({type(error).__name__})") from None
    expected = Head("", "", "", "", 0, "", 0, "")
    if not isinstance(table, dict) or table.keys() != asdict(expected).keys():
        got = ", ".join(sorted(table)) if isinstance(table, dict) else type(table).__name__
        raise EnvelopeError(f"{path}: its head has {got:.200}, expected: {', '.join(sorted(asdict(expected)))}")
    for name, value in asdict(expected).items():
        wrong = type(table[name]) is not type(value) or (isinstance(value, int) and not 0 <= table[name] < 2**63)
        form = _FORMS.get(name)
        if wrong or (form is not None and not re.fullmatch(form, table[name])):
            raise EnvelopeError(f"{path}: its head says {name} = {table[name]!r:.80}, expected: {form or type(value).__name__}")
    return Head(**table)


_FORMS = {
    "run": r"[0-9a-f]{8,64}",
    "member": r"[^./\\ \x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{0,99}",
    "kind": r"[a-z]{1,20}",
    "sha256": r"[0-9a-f]{64}",
    "reply_to": r"([0-9a-f]{64})?",
}


@contextmanager
def _regular(path: Path) -> Iterator[BinaryIO]:
    # A pipe or a device would keep us waiting.
    if path.exists() and not path.is_file():
        raise EnvelopeError(f"{path}: no plain file")
    with path.open("rb") as file:
        yield file


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a temporary file that takes `path`'s place, on the disk, when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
