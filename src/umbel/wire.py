"""Factors and downloads to bytes and back. Bytes from outside are hostile: everything is checked before memory is taken.

A message is one safetensors file: named tensors and, in its metadata under the key "umbel", a JSON header. Nothing is
pickled. Floating-point tensors travel in one dtype (float32 or bfloat16) and are float32 after decoding.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from umbel.method import Download, Factors

VERSION = 1
MAX_HEADER_BYTES = 16 * 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ECHO = ("run", "round", "client", "kind")
"""What a reply repeats of its request's header, so that an old or misled one is known for what it is."""

_ITEM_BYTES = {"F32": 4, "BF16": 2}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class WireError(ValueError):
    """Bytes that are not a message of ours; says what is wrong."""


@dataclass(frozen=True)
class Message:
    """A JSON header and named tensors (`"<layer>|<factor>"`, `"plain|<parameter>"`)."""

    header: dict[str, Any] = field(default_factory=dict[str, Any])
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def encode(message: Message, dtype: str = "float32") -> bytes:
    """Returns the message as bytes; tensors are cast to `dtype`.

    >>> decode(encode(Message({"round": 3}, {"q|A": torch.ones(1, 2)}))).header
    {'round': 3}
    """
    # Copies, because safetensors refuses tensors that share memory, as slices of one stack do.
    tensors = {
        name: tensor.detach().to(device="cpu", dtype=DTYPES[dtype], copy=True, memory_format=torch.contiguous_format)
        for name, tensor in message.tensors.items()
    }
    header = json.dumps({"version": VERSION, **message.header}, separators=(",", ":"), allow_nan=False)
    return safetensors.torch.save(tensors, {"umbel": header})


def decode(data: bytes, max_bytes: int | None = None) -> Message:
    """Reads a message and checks it: size, header, version, dtypes, shapes against offsets.

    Args:
        data: Bytes from the network.
        max_bytes: Refuse more than so many.

    Raises:
        WireError: Not a message of ours.
    """
    if max_bytes is not None and len(data) > max_bytes:
        raise WireError(f"message of {len(data)} bytes, allowed: {max_bytes}")
    header = _header(data)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(cast(dict[str, Any], metadata).get("umbel"), str):
        raise WireError("no umbel header in the message's metadata")
    fields = _object(cast(dict[str, str], metadata)["umbel"], "umbel header")
    version = fields.pop("version", None)
    if version != VERSION:
        raise WireError(f"wire version {version!r}, this side speaks {VERSION}: install the same umbel on both sides")
    for name, entry in header.items():
        _check_entry(name, entry, len(data))
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise WireError(f"not a valid message: {error}") from None
    # In the order of the bytes: safetensors' own differs from process to process.
    return Message(fields, {name: tensors[name].to(torch.float32) for name in header})


def _header(data: bytes) -> dict[str, Any]:
    if len(data) < 8:
        raise WireError(f"message of {len(data)} bytes is truncated")
    (size,) = struct.unpack("<Q", data[:8])
    if size > min(MAX_HEADER_BYTES, len(data) - 8):
        raise WireError(f"header says {size} bytes, message has {len(data) - 8}, allowed: {MAX_HEADER_BYTES}")
    return _object(data[8 : 8 + size], "tensor header")


def _object(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise WireError(f"{what} is not an object")
    return cast(dict[str, Any], value)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is not a finite number")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has a key twice")
    return result


def _check_entry(name: str, entry: Any, size: int) -> None:
    if not isinstance(entry, dict):
        raise WireError(f"tensor {name!r}: its entry is not an object")
    entry = cast(dict[str, Any], entry)
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise WireError(f"tensor {name!r}: dtype {dtype!r}, allowed: {', '.join(_ITEM_BYTES)}")
    if not isinstance(shape, list):
        raise WireError(f"tensor {name!r}: has no shape")
    dims = cast(list[Any], shape)
    if len(dims) > 8 or not all(type(d) is int and 0 <= d <= size for d in dims):
        raise WireError(f"tensor {name!r}: shape {dims!r} does not fit a message of {size} bytes")
    if math.prod(cast(list[int], dims)) * _ITEM_BYTES[dtype] > size:
        raise WireError(f"tensor {name!r}: shape {dims!r} says more than the message's {size} bytes")


def rounded(tensor: Tensor, dtype: str) -> Tensor:
    """Returns what the other side will hold after the tensor travelled in `dtype`."""
    return tensor.to(DTYPES[dtype]).to(torch.float32)


def pack(downloads: Mapping[str, Download]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns (header, tensors) of per-layer downloads."""
    tensors: dict[str, Tensor] = {}
    for layer, download in downloads.items():
        tensors |= {f"{layer}|{name}": x for name, x in download.factors.items()}
        if download.merge is not None:
            tensors |= {f"{layer}|merge.B": download.merge[0], f"{layer}|merge.A": download.merge[1]}
    resets = {layer: download.reset for layer, download in downloads.items() if download.reset is not None}
    return {"reset": resets}, tensors


def unpack(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Download]:
    """The inverse of `pack`; `plain|…` tensors are passed over.

    Raises:
        WireError: Half a merge, or resets that are not seeds.
    """
    factors = unpack_factors(tensors)
    resets = cast(dict[str, int], header.get("reset", {}))
    if type(resets) is not dict or not all(type(seed) is int and 0 <= seed < 2**63 for seed in resets.values()):
        raise WireError(f"reset: got {resets!r:.80}, allowed: a seed of 63 bits per layer")
    downloads: dict[str, Download] = {}
    for layer in [*factors, *(layer for layer in resets if layer not in factors)]:
        own = dict(factors.get(layer, {}))
        B, A = own.pop("merge.B", None), own.pop("merge.A", None)
        if (B is None) != (A is None):
            raise WireError(f"layer {layer!r}: a merge needs both B and A")
        merge = None if B is None or A is None else (B, A)
        downloads[layer] = Download(own, merge, resets.get(layer))
    return downloads


def pack_factors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Returns the named tensors of per-layer factors."""
    return {f"{layer}|{name}": x for layer, own in factors.items() for name, x in own.items()}


def unpack_factors(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The inverse of `pack_factors`; `plain|…` tensors are passed over.

    Raises:
        WireError: A tensor name without a layer.
    """
    result: dict[str, Factors] = {}
    for key, tensor in tensors.items():
        layer, separator, name = key.rpartition("|")
        if not separator or not layer:
            raise WireError(f"tensor {key!r}: its name is not '<layer>|<factor>'")
        if layer != "plain":
            result.setdefault(layer, {})[name] = tensor
    return result


def pack_plain(plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the named tensors of parameters that are not factors (heads, biases)."""
    return {f"plain|{name}": x for name, x in plain.items()}


def unpack_plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `pack_plain`."""
    return {key.removeprefix("plain|"): x for key, x in tensors.items() if key.startswith("plain|")}
