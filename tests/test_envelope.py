"""Signed files: what is written is read back, and every other file is refused with a reason before memory is taken."""

import base64
import json
import os
import struct
import tracemalloc
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from umbel import envelope, kit
from umbel.envelope import EnvelopeError, Head

KEY = ec.generate_private_key(ec.SECP384R1())
PUBLIC = kit.public_text(KEY.public_key())
KEYS = {kit.fingerprint(PUBLIC): PUBLIC}
BODY = bytes(range(256)) * 40
HEAD = Head("server", "lab-c", "0123456789abcdef", "fedit", 3, "train", len(BODY), sha256(BODY).hexdigest(), job={"clients": 3})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    envelope.write(tmp_path / "request.umbel", HEAD, BODY, KEY)
    return tmp_path / "request.umbel"


def refusal(path: Path, most: int = 10**6, keys: dict[str, str] = KEYS) -> str:
    with pytest.raises(EnvelopeError) as error:
        envelope.read(envelope.look(path, keys), most)
    return str(error.value).removeprefix(f"{path}: ")


def with_head(path: Path, said: bytes, body: bytes = BODY) -> Path:
    """Writes a file with any bytes for a head, which a known signer signed."""
    signer = sha256(base64.b64decode(PUBLIC.split()[1])).digest()
    first = b"umbel-envelope 1\n" + signer + struct.pack(">I", len(said))
    signature = KEY.sign(first + said, ec.ECDSA(hashes.SHA384()))
    path.write_bytes(first + struct.pack(">H", len(signature)) + signature + said + body)
    return path


def test_what_is_written_is_read_back_and_a_copy_is_the_same_file(path, tmp_path):
    seen = envelope.look(path, KEYS)
    assert seen.head == HEAD
    assert seen.signer == kit.fingerprint(PUBLIC)
    assert seen.digest == sha256(HEAD.encode()).hexdigest()
    assert envelope.read(seen, len(BODY)) == BODY
    envelope.copy(seen, len(BODY), tmp_path / "inbox" / "copy")
    assert (tmp_path / "inbox" / "copy").read_bytes() == path.read_bytes()


def test_the_same_request_is_the_same_bytes_but_for_the_signature(path, tmp_path):
    other = tmp_path / "again.umbel"
    envelope.write(other, HEAD, BODY, KEY)
    first, second = envelope.look(path, KEYS), envelope.look(other, KEYS)
    assert first.digest == second.digest
    assert first.front[-len(HEAD.encode()) :] == second.front[-len(HEAD.encode()) :]


def test_a_file_cut_anywhere_is_refused(path):
    whole = path.read_bytes()
    for length in [*range(envelope.PREFIX_BYTES + 700), len(whole) - 1]:
        path.write_bytes(whole[:length])
        reason = refusal(path)
        assert "truncated" in reason or length == 0, (length, reason)
    path.write_bytes(whole + b"\0")
    assert refusal(path) == f"longer than it may be; its payload has {len(BODY) + 1} bytes, the signed head says {len(BODY)}"


def test_any_flipped_bit_is_refused(path):
    whole = path.read_bytes()
    front = len(envelope.look(path, KEYS).front)
    for place in [*range(front), front, front + 5000, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(bytes(damaged))
        assert refusal(path)


def test_reasons_name_both_values(path, tmp_path):
    other = kit.public_text(ec.generate_private_key(ec.SECP384R1()).public_key())
    assert refusal(path, keys={kit.fingerprint(other): other}) == (
        f"signed with the key {kit.fingerprint(PUBLIC)}, accepted: {kit.fingerprint(other)}"
    )
    assert refusal(path, keys={kit.fingerprint(PUBLIC): other}).startswith("the signature is not that of SHA256:")
    assert refusal(path, most=100) == f"its payload has {len(BODY)} bytes, allowed: 100"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"umbel-envelope 1\n", b"umbel-envelope 2\n"))
    assert refusal(path).startswith("an envelope of version b'2\\n', this umbel reads b'1\\n'")
    path.write_bytes(b"PK\x03\x04" + whole)
    assert refusal(path).startswith("no file of umbel's (it begins with b'PK\\x03\\x04umbe', expected: b'umbel-envelope ')")
    path.write_bytes(whole[:-1] + b"\0")
    assert refusal(path).startswith("damaged; the payload's sha256 is ")
    os.mkfifo(tmp_path / "pipe")
    for nothing in (tmp_path, tmp_path / "pipe"):
        assert refusal(nothing) == "no plain file"


def table(**changes: Any) -> bytes:
    return json.dumps({**json.loads(HEAD.encode()), **changes}).encode()


HEADS = {
    "no JSON": (b"{", "its head is no JSON (JSONDecodeError)"),
    "a pickle": (b"\x80\x04K\x01.", "its head is no JSON (UnicodeDecodeError)"),
    "nested without end": (b"[" * 10**5, "its head is no JSON (RecursionError)"),
    "a list": (b"[1]", "its head has list, expected: "),
    "one key more": (table(cc="x"), "its head has cc, "),
    "a path for a member": (table(member="../../etc"), "its head says member = '../../etc', expected: "),
    "a line's end in a member": (table(member="a\nb"), "its head says member = 'a\\nb', expected: "),
    "a path for a run": (table(run="../../etc"), "its head says run = '../../etc', expected: "),
    "a round that is true": (table(round=True), "its head says round = True, expected: int"),
    "a round below none": (table(round=-1), "its head says round = -1, expected: int"),
    "a length that is text": (table(length="9"), "its head says length = '9', expected: int"),
    "a length beyond all": (table(length=2**70), "its head says length = 1180591620717411303424, expected: int"),
    "a job that is a list": (table(job=[1]), "its head says job = [1], expected: dict"),
    "a hash that is none": (table(sha256="0"), "its head says sha256 = '0', expected: "),
}


@pytest.mark.parametrize(("said", "reason"), HEADS.values(), ids=HEADS)
def test_a_head_that_its_signer_made_to_harm_is_refused(tmp_path, said, reason):
    got = refusal(with_head(tmp_path / "bad.umbel", said))
    assert got.startswith(reason)
    assert len(got) < 400


def test_lengths_are_compared_before_memory_is_taken(tmp_path):
    signer = sha256(base64.b64decode(PUBLIC.split()[1])).digest()
    big = tmp_path / "big.umbel"
    big.write_bytes(b"umbel-envelope 1\n" + struct.pack(">32sIH", signer, 2**32 - 1, 2**16 - 1))
    claims = with_head(tmp_path / "claims.umbel", table(length=2**41), b"")
    for path in (big, claims):
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + 2**41)  # no block of it is on the disk
    tracemalloc.start()
    assert refusal(big).startswith(f"says its head has {2**32 - 1} bytes and its signature {2**16 - 1}, allowed: ")
    assert refusal(claims, most=2**40) == f"its payload has {2**41} bytes, allowed: {2**40}"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_nothing_is_left_where_writing_failed(path, tmp_path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\0")
    with pytest.raises(EnvelopeError, match="damaged"):
        envelope.copy(envelope.look(path, KEYS), 10**6, tmp_path / "inbox" / "copy")
    assert list((tmp_path / "inbox").iterdir()) == []
