"""Masks that cancel in a sum, and the numbers that they hide (Bonawitz et al., arXiv 1611.04482): pure functions.

In one exchange each client u has two fresh key pairs and a secret b_u. With every other client v it agrees on a key, whose
keystream one of the two adds and the other subtracts, and it adds the keystream of b_u. What it sends is then uniform; in the
sum of all, the streams between clients cancel. Shares of b_u and of u's private mask key lie with the others, sealed for each,
so that any `threshold` of them can open the one or the other: b_u where u's upload arrived, its key where it did not.

Sums are of whole numbers modulo 2⁶⁴: n_k x as round(n_k x 2²⁸).
"""

import base64
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

FRACTION_BITS = 28
"""Of a number in a sum; the rounding of one n_k x is at most 2⁻²⁹."""

WHOLE_BITS = 34
"""|n_k x| is at most 2³⁴ / K, so the sum of K uploads stays within ±2⁶², and one that does not was opened wrongly."""

SECRET_BYTES, SHARE_BYTES = 32, 48
"""Of a key or a b_u, and of a share of one (Flower's Shamir pads to whole blocks of 16)."""

FEWEST = 2
"""Clients in an exchange: a sum over one is its upload."""

ROWS, LOSS = "rows", "loss"
"""Names of Σ n_k and Σ n_k loss_k among the tensors of a masked upload; no factor's name is without a bar."""

_CHUNK = 2**17


class MaskError(ValueError):
    """Keys, shares or numbers that do not fit; says what is wrong."""


def threshold(clients: int) -> int:
    """Returns t, how many of so many clients open a sum, and must be left for that: all but a third.

    >>> [threshold(clients) for clients in (2, 3, 5, 10)]
    [2, 2, 4, 7]
    """
    return clients - clients // 3


def needs() -> None:
    """Raises MaskError, which names the extra to install, where the packages of secure aggregation are not there."""
    try:
        _primitives()
        _shamir()
    except ImportError as error:
        raise MaskError(
            f"privacy.secure_aggregation needs packages that are not installed ({error.name}): pip install 'umbel[federation]'"
        ) from None


def _primitives() -> Any:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import x25519
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return InvalidTag, hashes, x25519, Cipher, algorithms, ChaCha20Poly1305, HKDF


def _shamir() -> Any:
    from flwr.common.secure_aggregation.crypto import shamir

    return shamir


def to_text(data: bytes) -> str:
    """Returns bytes as base64, for a message's header."""
    return base64.b64encode(data).decode()


def from_text(text: Any, length: int, what: str) -> bytes:
    """The inverse of `to_text`.

    Raises:
        MaskError: It is not base64, or not of this length.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        raise MaskError(f"{what} is {text!r:.40}, wanted: base64") from None
    if len(data) != length:
        raise MaskError(f"{what} is {len(data)} bytes, wanted: {length}")
    return data


# Keys


def fresh() -> bytes:
    """Returns a new secret of 32 bytes from the system: a private key of X25519, or a b_u."""
    return os.urandom(SECRET_BYTES)


def public(private: bytes) -> bytes:
    """Returns the public key of a private one, 32 bytes."""
    x25519 = _primitives()[2]
    return x25519.X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def commitment(secret: bytes) -> str:
    """Returns what tells a secret from others without telling it: the SHA-256 of its 32 random bytes, in hexadecimal."""
    return hashlib.sha256(b"umbel own mask" + secret).hexdigest()


def exchange_of(run: str, number: int, keys: Mapping[int, tuple[bytes, bytes]]) -> bytes:
    """Returns the exchange's identity, 32 bytes; all keys and seals are bound to it.

    Args:
        run: Its id.
        number: Of the round.
        keys: Per client the two public keys, for seals and for masks.
    """
    listed = [[client, *(key.hex() for key in keys[client])] for client in sorted(keys)]
    return hashlib.sha256(json.dumps([run, number, listed]).encode()).digest()


def _agreed(private: bytes, other: bytes, use: bytes) -> bytes:
    _, hashes, x25519, _, _, _, HKDF = _primitives()
    try:
        common = x25519.X25519PrivateKey.from_private_bytes(private).exchange(x25519.X25519PublicKey.from_public_bytes(other))
    except ValueError as error:
        raise MaskError(f"a public key that is none ({error})") from None
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"umbel " + use).derive(common)


# Shares


def split(secret: bytes, needed: int, holders: int) -> list[bytes]:
    """Returns a share of 48 bytes for each holder; `needed` of them give the secret, fewer say nothing of it."""
    return [share[4:] for share in _shamir().create_shares(secret, needed, holders)]


def joined(shares: Mapping[int, bytes], needed: int, fits: Callable[[bytes], bool]) -> bytes:
    """Returns the secret of which `shares` are; some may be wrong, as long as `needed` others are there.

    Args:
        shares: By the holder's place among the holders, from 0.
        needed: As it was split.
        fits: Tells the secret.

    Raises:
        MaskError: No choice of `needed` holders in a row gives it.
    """
    # Each run of holders, so that few wrong ones do not spoil all choices.
    around = sorted(shares) * 2
    for first in range(len(shares) if len(shares) >= needed else 0):
        places = around[first : first + needed]
        try:
            secret = _shamir().combine_shares([(place + 1).to_bytes(4, "little") + shares[place] for place in places])
        except ValueError:
            continue
        if len(secret) == SECRET_BYTES and fits(secret):
            return secret
    raise MaskError(f"{len(shares)} shares do not give the secret, of which {needed} right ones are needed")


SEALED_BYTES = 12 + 2 * SHARE_BYTES + 16
"""Of two sealed shares: nonce, text and tag."""


def seal(private: bytes, other: bytes, exchange: bytes, sender: int, receiver: int, text: bytes) -> bytes:
    """Returns a text that only the holder of the other key can read, and that it knows to be from this sender."""
    cipher, nonce = _sealing(private, other, exchange), os.urandom(12)
    return nonce + cipher.encrypt(nonce, text, json.dumps([sender, receiver]).encode())


def unseal(private: bytes, other: bytes, exchange: bytes, sender: int, receiver: int, sealed: bytes) -> bytes:
    """The inverse of `seal`, at the receiver.

    Raises:
        MaskError: It was sealed by or for somebody else, in another exchange, or was changed.
    """
    InvalidTag = _primitives()[0]
    try:
        cipher = _sealing(private, other, exchange)
        return cipher.decrypt(sealed[:12], sealed[12:], json.dumps([sender, receiver]).encode())
    except (InvalidTag, ValueError):
        raise MaskError(f"what client {sender} sealed for client {receiver} cannot be opened") from None


def _sealing(private: bytes, other: bytes, exchange: bytes) -> Any:
    return _primitives()[5](_agreed(private, other, b"seal " + exchange))


# Masks


def own_stream(secret: bytes, exchange: bytes) -> bytes:
    """Returns the key of the stream that a client adds for itself, from its b_u."""
    return hashlib.sha256(b"umbel own stream" + exchange + secret).digest()


def pair_stream(private: bytes, other: bytes, exchange: bytes) -> bytes:
    """Returns the key of the stream between two clients, from one's private and the other's public mask key."""
    return _agreed(private, other, b"mask " + exchange)


def add_stream(numbers: Tensor, key: bytes, sign: int) -> None:
    """Adds a key's stream to int64 numbers, in place and modulo 2⁶⁴, or subtracts it.

    Args:
        numbers: Of one dimension, contiguous.
        key: Of 32 bytes, for ChaCha20.
        sign: 1 or −1.
    """
    _, _, _, Cipher, algorithms, _, _ = _primitives()
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()
    into, zeros = numbers.numpy().view(np.uint64), bytes(8 * _CHUNK)
    for start in range(0, len(into), _CHUNK):
        part = into[start : start + _CHUNK]
        mask = np.frombuffer(stream.update(zeros[: 8 * len(part)]), dtype="<u8")
        (np.add if sign > 0 else np.subtract)(part, mask, out=part)


def mask(numbers: Tensor, me: int, secret: bytes, private: bytes, others: Mapping[int, bytes], exchange: bytes) -> None:
    """Masks a client's int64 numbers in place.

    Args:
        numbers: Of one dimension, contiguous.
        me: The client.
        secret: Its b_u.
        private: Its private mask key.
        others: Public mask keys of the others in the exchange.
        exchange: Its identity.
    """
    add_stream(numbers, own_stream(secret, exchange), 1)
    for other, key in others.items():
        add_stream(numbers, pair_stream(private, key, exchange), 1 if me < other else -1)


def unmask(
    numbers: Tensor, secrets: Mapping[int, bytes], gone: Mapping[int, bytes], keys: Mapping[int, bytes], exchange: bytes
) -> None:
    """Takes the masks off a sum of masked numbers, in place.

    Args:
        numbers: The sum over the clients of `secrets`.
        secrets: b_u of each client whose upload is in the sum.
        gone: Private mask keys of those whose upload is not, and whose streams the others have added.
        keys: Public mask keys.
        exchange: Its identity.
    """
    for secret in secrets.values():
        add_stream(numbers, own_stream(secret, exchange), -1)
    for client, private in gone.items():
        for other in secrets:
            add_stream(numbers, pair_stream(private, keys[other], exchange), 1 if client < other else -1)


# Whole numbers


def to_fixed(x: Tensor, weight: int, clients: int) -> Tensor:
    """Returns round(weight x 2²⁸) as int64, of one dimension.

    Args:
        x: Numbers.
        weight: n_k, or 1.
        clients: K, for the largest number that a sum can take.

    Raises:
        MaskError: NaN, infinity, or |weight x| beyond 2³⁴ / K.
    """
    scaled = x.detach().to("cpu", torch.float64).reshape(-1) * weight
    most = 2.0**WHOLE_BITS / clients
    # NaN is in no range, either.
    if not bool((scaled.abs() <= most).all()):
        raise MaskError(
            f"a number times this client's rows is NaN, infinite or beyond {most:.3g} (2^{WHOLE_BITS} / {clients} clients), "
            "the most that a masked sum can take: has the training diverged?"
        )
    return (scaled * 2.0**FRACTION_BITS).round().to(torch.int64)


def from_fixed(total: Tensor, weight: int) -> Tensor:
    """Returns total / 2²⁸ / weight in float32: a sum's mean.

    Raises:
        MaskError: The sum is beyond what honest uploads add up to.
    """
    most = 2 ** (WHOLE_BITS + FRACTION_BITS)
    # |−2⁶³| is negative.
    if not bool(((total <= most) & (total >= -most)).all()):
        raise MaskError("the sum is beyond what its uploads can add up to")
    return (total.to(torch.float64) / 2.0**FRACTION_BITS / weight).to(torch.float32)


def rounding_error(clients: int, weight: int) -> float:
    """Returns the most by which an entry of a masked mean differs from the exact one, before it is rounded to float32.

    >>> rounding_error(3, 300) < 1e-9
    True
    """
    return clients * 2.0 ** -(FRACTION_BITS + 1) / weight
