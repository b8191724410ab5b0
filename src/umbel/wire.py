"""Factors and downloads to bytes and back. Bytes from outside are hostile: everything is checked before memory is taken.

A message is one safetensors file: named tensors and, in its metadata under the key "umbel", a JSON header. Nothing is
pickled. Floating-point tensors travel in one dtype (float32, bfloat16 or int8) and are float32 after decoding. A masked upload
(see `umbel.masking`) holds int64 and nothing else, and is taken only where one is expected.

In int8 a matrix travels as whole numbers from −127 to 127 with one float32 scale for each row, under the matrix's name and
"|scale"; what is no matrix stays float32. A row is a direction of the adapter: for a B, d_out × r, that is a column (and
for the Q and Y of a method that names its messages so). So
cutting a pair to fewer directions, or putting pairs side by side, leaves every scale and with it every number as it was.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from umbel.method import Download, Factors

VERSION = 1
MAX_HEADER_BYTES = 16 * 2**20
MAX_DEPTH = 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8}
_MASKED = {"I64": torch.int64}
_SCALE = "|scale"
"""Ends the name of an int8 matrix's scales."""

ECHO = ("run", "round", "client", "kind")
"""What a reply repeats of its request's header, so that an old or misled one is known for what it is."""


class WireError(ValueError):
    """Bytes that are not a message of ours; says what is wrong."""


@dataclass(frozen=True)
class Message:
    """A JSON header and named tensors (`"<layer>|<factor>"`, `"plain|<parameter>"`)."""

    header: dict[str, Any] = field(default_factory=dict[str, Any])
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def encode(message: Message, dtype: str = "float32") -> bytes:
    """Returns the message as bytes; tensors are rounded to `dtype`, int64 stays as it is.

    >>> decode(encode(Message({"round": 3}, {"q|A": torch.ones(1, 2)}))).header
    {'round': 3}
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in message.tensors.items():
        x = tensor.detach().to("cpu")
        if _is_matrix(x, dtype):
            q, scale = _quantized(x, name)
            tensors |= {name: q, name + _SCALE: scale}
        else:
            # Copies, because safetensors refuses tensors that share memory, as slices of one stack do.
            cast_to = x.dtype if x.dtype == torch.int64 else torch.float32 if dtype == "int8" else DTYPES[dtype]
            tensors[name] = x.to(dtype=cast_to, copy=True, memory_format=torch.contiguous_format)
    header = json.dumps({"version": VERSION, **message.header}, separators=(",", ":"), allow_nan=False)
    return safetensors.torch.save(tensors, {"umbel": header})


def decode(data: bytes, max_bytes: int | None = None, max_header: int = MAX_HEADER_BYTES, masked: bool = False) -> Message:
    """Reads a message and checks it: size, header, version, dtypes, shapes against offsets.

    Args:
        data: Bytes from the network.
        max_bytes: Refuse more than so many, in the message or in its tensors as float32.
        max_header: Refuse names, shapes and JSON of more than so many bytes; parsed, JSON takes up to some 60 times its length.
        masked: Its tensors must be int64, and stay so; they must be floating-point numbers otherwise.

    Raises:
        WireError: Not a message of ours.
    """
    if max_bytes is not None and len(data) > max_bytes:
        raise WireError(f"message of {len(data)} bytes, allowed: {max_bytes}")
    header = _header(data, max_header)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(cast(dict[str, Any], metadata).get("umbel"), str):
        raise WireError("no umbel header in the message's metadata")
    fields = _object(cast(dict[str, str], metadata)["umbel"], "umbel header")
    version = fields.pop("version", None)
    if version != VERSION:
        raise WireError(f"wire version {version!r}, this side speaks {VERSION}: install the same umbel on both sides")
    for name, entry in header.items():
        _check_entry(name, entry, len(data), _MASKED if masked else _STORED)
    if masked:
        return Message(fields, _loaded(data, header))
    _check_scales(header)
    if max_bytes is not None and (needed := 4 * sum(math.prod(entry["shape"]) for entry in header.values())) > max_bytes:
        raise WireError(f"tensors of {needed} bytes as float32, allowed: {max_bytes}")
    tensors = _loaded(data, header)
    for name in header:
        if name.endswith(_SCALE) and not bool(((tensors[name] >= 0) & (tensors[name] <= _MOST_SCALE)).all()):
            raise WireError(f"tensor {name!r}: scales with NaN, infinity or values below 0 or beyond {_MOST_SCALE:.0e}")
    return Message(fields, _restored(tensors))


def _loaded(data: bytes, header: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise WireError(f"not a valid message: {error}") from None
    # In the order of the bytes: safetensors' own differs from process to process.
    return {name: tensors[name] for name in header}


def _header(data: bytes, most: int = MAX_HEADER_BYTES) -> dict[str, Any]:
    if len(data) < 8:
        raise WireError(f"message of {len(data)} bytes is truncated")
    (size,) = struct.unpack("<Q", data[:8])
    if size > min(most, len(data) - 8):
        raise WireError(f"header says {size} bytes, message has {len(data) - 8}, allowed: {most}")
    return _object(data[8 : 8 + size], "tensor header")


def _object(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_once)
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise WireError(f"{what} is not an object")
    return cast(dict[str, Any], value)


def _check_depth(value: Any) -> None:
    """Deeper JSON would be read, and fail where somebody shows or writes it."""
    level: list[Any] = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        if not level:
            return
        inside = (x for own in level for x in (cast(dict[str, Any], own).values() if isinstance(own, dict) else own))
        level = [x for x in inside if isinstance(x, (dict, list))]
    if level:
        raise ValueError(f"nested more than {MAX_DEPTH} times")


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


def _check_entry(name: str, entry: Any, size: int, allowed: Mapping[str, torch.dtype]) -> None:
    if not isinstance(entry, dict):
        raise WireError(f"tensor {name!r}: its entry is not an object")
    entry = cast(dict[str, Any], entry)
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in allowed:
        raise WireError(f"tensor {name!r}: dtype {dtype!r:.80}, allowed: {', '.join(allowed)}")
    if not isinstance(shape, list):
        raise WireError(f"tensor {name!r}: has no shape")
    dims = cast(list[Any], shape)
    if len(dims) > 8 or not all(type(d) is int and 0 <= d <= size for d in dims):
        raise WireError(f"tensor {name!r}: shape {dims!r:.80} does not fit a message of {size} bytes")
    if math.prod(cast(list[int], dims)) * allowed[dtype].itemsize > size:
        raise WireError(f"tensor {name!r}: shape {dims!r} says more than the message's {size} bytes")


def _check_scales(header: Mapping[str, Any]) -> None:
    """Every int8 matrix has its scales, and scales belong to an int8 matrix."""
    for name, entry in header.items():
        if entry["dtype"] == "I8":
            shape = entry["shape"]
            if len(shape) < 2:
                raise WireError(f"tensor {name!r}: int8 of shape {shape!r}, allowed: matrices")
            axis = _axis(name)
            wanted = shape[: len(shape) + axis] + ([] if axis == -1 else shape[-1:])
            scale = header.get(name + _SCALE)
            if scale is None or scale["dtype"] != "F32" or scale["shape"] != wanted:
                got = "none" if scale is None else f"{scale['dtype']} of shape {scale['shape']!r}"
                raise WireError(f"tensor {name!r}: int8 with scales {got}, wanted F32 of shape {wanted!r}")
        elif name.endswith(_SCALE) and header.get(name.removesuffix(_SCALE), {}).get("dtype") != "I8":
            raise WireError(f"tensor {name!r}: scales without an int8 matrix")


# int8

_LEAST = 2.0**-100
"""A row with no number larger than this is sent as zeros; the scales of all others are far from subnormal."""

_MOST_SCALE = 2.0**120
"""Bound on scales, so that 127 times one is finite; larger numbers are cut off."""


def _is_matrix(x: Tensor, dtype: str) -> bool:
    return dtype == "int8" and x.ndim >= 2 and x.numel() > 0 and x.dtype != torch.int64


def _axis(key: str) -> int:
    """Returns the dimension along which the numbers of one scale lie."""
    return -2 if key.rpartition("|")[2] in ("B", "merge.B", "Q", "Y") else -1


def _quantized(x: Tensor, key: str) -> tuple[Tensor, Tensor]:
    """Returns (whole numbers, scales); what was quantized before comes back to the last bit.

    Scales have 16 significant bits, so that 127 × scale and the division back are exact in float32.
    """
    x, axis = x.to(torch.float32), _axis(key)
    largest = x.abs().amax(axis)
    mantissa, exponent = torch.frexp((largest / 127).clamp(max=_MOST_SCALE))
    scale = torch.ldexp((mantissa * 2**16).round() / 2**16, exponent)
    scale = torch.where(largest < _LEAST, 0.0, scale)
    divisor = torch.where(scale > 0, scale, 1.0).unsqueeze(axis)
    # NaN is left to the scale, which the other side refuses.
    whole = torch.where(scale.unsqueeze(axis) > 0, x / divisor, 0.0).round().clamp(-127, 127).nan_to_num(0.0)
    return whole.to(torch.int8).contiguous(), scale.contiguous()


def _whole(q: Tensor, scale: Tensor, key: str) -> Tensor:
    return q.to(torch.float32).mul_(scale.unsqueeze(_axis(key)))


def _restored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a message's tensors as float32, int8 matrices multiplied by their scales."""
    return {
        key: _whole(x, tensors[key + _SCALE], key) if x.dtype == torch.int8 else x.to(torch.float32)
        for key, x in tensors.items()
        if not key.endswith(_SCALE)
    }


def rounded(tensor: Tensor, dtype: str, key: str = "") -> Tensor:
    """Returns what the other side will hold after the tensor travelled in `dtype`.

    Args:
        tensor: Of any shape.
        dtype: One of `DTYPES`.
        key: The tensor's name in the message, or its end: "B" and "merge.B" have one int8 scale per column.

    >>> rounded(torch.tensor([[127.0, 0.6], [0.0, 0.0]]), "int8")
    tensor([[127.,   1.],
            [  0.,   0.]])
    """
    if _is_matrix(tensor, dtype):
        return _whole(*_quantized(tensor, key), key)
    return tensor.to(torch.float32 if dtype == "int8" else DTYPES[dtype]).to(torch.float32)


class Spooled(Mapping[str, Factors]):
    """The factors of a message that was decoded once and now waits in a file: read a layer at a time, nothing kept.

    Args:
        data: The message; `decode` took it.
        path: Where to keep it. Not flushed to disk: whoever starts again asks again.
    """

    def __init__(self, data: bytes, path: Path) -> None:
        self._path = path
        entries = _header(data)
        entries.pop("__metadata__", None)
        first = 8 + struct.unpack("<Q", data[:8])[0]
        self._entries = {
            name: (_STORED[entry["dtype"]], tuple[int, ...](entry["shape"]), first + entry["data_offsets"][0])
            for name, entry in entries.items()
        }
        self._layers: dict[str, list[str]] = {}
        for name in self._entries:
            self._layers.setdefault(name.removesuffix(_SCALE).rpartition("|")[0], []).append(name)
        self._plain = self._layers.pop("plain", [])
        path.write_bytes(data)

    def __getitem__(self, layer: str) -> Factors:
        return {name.rpartition("|")[2]: x for name, x in self._read(self._layers[layer]).items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def plain(self) -> dict[str, Tensor]:
        """Reads the parameters that are not factors."""
        return unpack_plain(self._read(self._plain))

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        with self._path.open("rb", buffering=0) as file:
            for name in names:
                dtype, shape, start = self._entries[name]
                tensors[name] = torch.empty(shape, dtype=dtype)
                target = memoryview(cast(Any, tensors[name].reshape(-1).view(torch.uint8).numpy()))
                file.seek(start)
                while target:
                    got = file.readinto(target)
                    if not got:
                        raise OSError(f"{self._path}: shorter than it was written; is somebody else using the run's folder?")
                    target = target[got:]
        return _restored(tensors)


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
