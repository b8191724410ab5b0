"""safetensors files from outside, read a tensor at a time, and written a tensor at a time.

The library maps a whole file into memory, and with a thousand files the mapped pages count as this process's. Here a tensor's
bytes go from the file straight into its own memory, and nothing stays. Files from outside are hostile: all of the header is
checked before memory is taken for a tensor.
"""

import functools
import json
import math
import os
import stat
import struct
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library itself takes at most."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_AXES = 8


class FolderError(ValueError):
    """A PEFT folder that cannot be read or merged; says which file, what, got, allowed and what to do, in one line."""


def short(value: Any) -> str:
    """Returns what somebody else's file says, fit for an error message: escaped, and not longer than 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:76] + " …" + text[-1]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file.

    Args:
        dtype: One of `DTYPES`.
        shape: At least one entry everywhere.
        start: Of its bytes, from the beginning of the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def _inside(folder: Path, name: str) -> str:
    """Returns the real path of a file of a folder; raises FolderError for a link that leads out of it."""
    path = folder / name
    try:
        home, real = os.path.realpath(folder), os.path.realpath(path, strict=True)
    except OSError as error:
        raise FolderError(f"{path}: cannot be read ({error.strerror}); give a whole PEFT folder") from None
    if not real.startswith(home.rstrip(os.sep) + os.sep):
        raise FolderError(f"{path}: a link out of its folder, to {short(real)}; copy the folder with its files (cp -rL)")
    return real


def _open(real: str, path: Path) -> int:
    """Opens a regular file and returns its descriptor; raises FolderError, which names `path`."""
    try:
        # Not blocking, because opening a named pipe would wait for a writer for ever.
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise FolderError(f"{path}: cannot be read ({error.strerror}); give a PEFT folder that this user may read") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FolderError(f"{path}: not a regular file; give a folder as PEFT's save_pretrained writes it")
    return descriptor


def _fill(descriptor: int, start: int, target: memoryview, path: Path) -> None:
    done = 0
    while done < len(target):
        try:
            got = os.preadv(descriptor, [target[done:]], start + done)
        except OSError as error:
            raise FolderError(f"{path}: cannot be read ({error.strerror}); copy the file again") from None
        if got == 0:
            raise FolderError(f"{path}: ends after {start + done} bytes, wanted {start + len(target)}; copy the file again")
        done += got


def read_bytes(folder: Path, name: str, most: int) -> bytes:
    """Returns the content of a small file of a folder.

    Raises:
        FolderError: It cannot be read, or has more than `most` bytes.
    """
    descriptor = _open(_inside(folder, name), folder / name)
    try:
        size = os.fstat(descriptor).st_size
        if size > most:
            raise FolderError(f"{folder / name}: {size} bytes; allowed: up to {most}")
        data = bytearray(size)
        _fill(descriptor, 0, memoryview(data), folder / name)
        return bytes(data)
    finally:
        os.close(descriptor)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{short(name)} twice")
    return result


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Returns the JSON object in `data`.

    Raises:
        FolderError: Not JSON, not an object, or a name is there twice.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_once, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{what}: not sound JSON ({str(error)[:120]!r}); copy the file again") from None
    if type(value) is not dict:
        raise FolderError(f"{what}: got JSON of type {type(value).__name__}, wanted an object")
    return value


def _entry(name: str, value: Any, size: int) -> tuple[Entry, int]:
    """Returns a tensor's entry with `start` counted from the data, and its end; raises ValueError."""
    if type(value) is not dict or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{short(name)} has no dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f"{short(name)} is of dtype {short(dtype)}; allowed: {', '.join(DTYPES)}")
    for numbers in (shape, offsets):
        if type(numbers) is not list or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{short(name)} has {short(numbers)} for shape or data_offsets")
    if len(shape) > _MOST_AXES or 0 in shape:
        raise ValueError(f"{short(name)} has shape {short(shape)}, an empty or partial tensor (DeepSpeed ZeRO-3 not gathered?)")
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise ValueError(f"{short(name)} lies at {short(offsets)}, the file has {size} bytes of data")
    entry = Entry(DTYPES[dtype], tuple(shape), offsets[0])
    if entry.bytes != offsets[1] - offsets[0]:
        raise ValueError(
            f"{short(name)} has {offsets[1] - offsets[0]} bytes, shape {short(shape)} of {dtype} needs {entry.bytes}"
        )
    return entry, offsets[1]


@functools.lru_cache(maxsize=64)
def _entries(header: bytes, size: int) -> Mapping[str, Entry]:
    """Returns the tensors that a header lists; files that are alike share one answer, so that a thousand cost little.

    Args:
        header: JSON.
        size: Of all data after it.

    Raises:
        ValueError: What is wrong, in words.
    """
    if header[:1] != b"{":
        raise ValueError("does not begin with an object")
    table = parse_object(header, "header")
    metadata = table.pop("__metadata__", {})
    if type(metadata) is not dict:
        raise ValueError(f"__metadata__ is {short(metadata)}, not an object")
    found = {name: _entry(name, value, size) for name, value in table.items()}
    at = 0
    for name, (entry, end) in sorted(found.items(), key=lambda item: item[1][0].start):
        if entry.start != at:
            raise ValueError(f"{short(name)} begins at {entry.start}, the tensor before it ends at {at}")
        at = end
    if at != size:
        raise ValueError(f"tensors end at {at}, the data at {size}")
    first = 8 + len(header)
    return MappingProxyType({name: Entry(e.dtype, e.shape, first + e.start) for name, (e, _) in found.items()})


class TensorFile:
    """A safetensors file in a folder from outside: checked when opened, read a few tensors at a time, open only while read.

    Args:
        folder: Where it lies; a link that leads out of it is refused.
        name: Of the file.

    Raises:
        FolderError: Unreadable, truncated, or its header is wrong.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path = path = folder / name
        self._real = _inside(folder, name)
        descriptor = _open(self._real, path)
        try:
            self._identity = _identity(descriptor)
            self.bytes = os.fstat(descriptor).st_size
            if self.bytes < 8:
                raise FolderError(f"{path}: {self.bytes} bytes are no safetensors file; copy the file again")
            length = bytearray(8)
            _fill(descriptor, 0, memoryview(length), path)
            (size,) = struct.unpack("<Q", length)
            if size > min(MAX_HEADER_BYTES, self.bytes - 8):
                raise FolderError(
                    f"{path}: says that its header has {size} bytes, the file has {self.bytes}, allowed: up to "
                    f"{MAX_HEADER_BYTES}; copy the file again"
                )
            header = bytearray(size)
            _fill(descriptor, 8, memoryview(header), path)
        finally:
            os.close(descriptor)
        # A huge header is not worth keeping.
        entries = _entries if size <= 2**20 else _entries.__wrapped__
        try:
            self.entries: Mapping[str, Entry] = entries(bytes(header), self.bytes - 8 - size)
        except ValueError as error:
            raise FolderError(f"{path}: wrong safetensors header: {error}; copy the file again") from None
        # A file may have holes and be larger than any disk.
        most, memory = max((e.bytes for e in self.entries.values()), default=0), _machine_bytes()
        if most > memory // 2:
            raise FolderError(
                f"{path}: a tensor of {most} bytes; allowed on this machine: up to half its memory, {memory // 2}"
            )

    def read(self, names: Sequence[str]) -> list[Tensor]:
        """Returns new tensors with what the file holds, in its own dtypes.

        Raises:
            FolderError: The file has changed since it was opened, or cannot be read.
        """
        descriptor = _open(self._real, self._path)
        try:
            if _identity(descriptor) != self._identity:
                raise FolderError(f"{self._path}: was changed while it was being read; run again when nobody writes to it")
            return [_read(descriptor, self.entries[name], self._path) for name in names]
        finally:
            os.close(descriptor)

    def announce(self, names: Sequence[str]) -> None:
        """Asks the system to have tensors in its cache, and does not wait for it."""
        if not hasattr(os, "posix_fadvise"):
            return
        descriptor = _open(self._real, self._path)
        try:
            end = -1
            begin = 0
            for entry in sorted((self.entries[name] for name in names), key=lambda entry: entry.start):
                if entry.start > end:
                    _willneed(descriptor, begin, end)
                    begin = entry.start
                end = entry.start + entry.bytes
            _willneed(descriptor, begin, end)
        finally:
            os.close(descriptor)


def _willneed(descriptor: int, begin: int, end: int) -> None:
    if end > begin:
        os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)


@functools.cache
def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _identity(descriptor: int) -> tuple[int, ...]:
    about = os.fstat(descriptor)
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def _memory(x: Tensor) -> memoryview:
    """Returns the bytes of a contiguous tensor, without a copy."""
    flat: Any = x.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _read(descriptor: int, entry: Entry, path: Path) -> Tensor:
    result = torch.empty(entry.shape, dtype=entry.dtype)
    _fill(descriptor, entry.start, _memory(result), path)
    return result


class TensorWriter:
    """A safetensors file written a tensor at a time; room for its header is kept at the front.

    Nothing is flushed to disk here; `umbel.record.new_folder` does that before the folder takes its name.

    Args:
        path: Must not exist.
        names: Of all tensors to come, in any order.
        dtype: Of all of them.
    """

    def __init__(self, path: Path, names: Collection[str], dtype: torch.dtype) -> None:
        self._path, self._dtype = path, dtype
        self._names = set(names)
        # Per tensor its name as JSON and no more than this for dtype, shape and offsets.
        room = 128 + sum(len(json.dumps(name)) + 80 + 20 * (_MOST_AXES + 2) for name in self._names)
        self._room = -(-room // 8) * 8
        self._table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._end = 0
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def add(self, name: str, x: Tensor) -> Tensor:
        """Writes a tensor, rounded to the file's dtype, and returns what the file then holds, in its dtype.

        Raises:
            FolderError: Rounded, it is no longer finite.
            OSError: The disk is full, for example.
        """
        if name not in self._names or name in self._table:
            raise ValueError(f"{self._path}: {name!r} was not announced, or is written twice")
        rounded = x.detach().to("cpu", self._dtype).contiguous()
        # One pass, where isfinite takes three; NaN passes through to both ends.
        low, high = torch.aminmax(rounded)
        if not math.isfinite(float(low)) or not math.isfinite(float(high)):
            raise FolderError(
                f"{self._path}: {name} leaves the range of {self._dtype} (got up to {float(x.abs().max()):.3g}, allowed: up to "
                f"{torch.finfo(self._dtype).max:.3g}); write float32 or bfloat16"
            )
        entry = Entry(self._dtype, tuple(x.shape), 8 + self._room + self._end)
        self._write(entry.start, _memory(rounded))
        offsets = [self._end, self._end + entry.bytes]
        self._table[name] = {"dtype": NAMES[self._dtype], "shape": list(x.shape), "data_offsets": offsets}
        self._end += entry.bytes
        return _read(self._descriptor, entry, self._path)

    def finish(self) -> int:
        """Writes the header and returns the file's size in bytes."""
        header = json.dumps(self._table, separators=(",", ":")).encode()
        self._write(0, memoryview(struct.pack("<Q", self._room) + header.ljust(self._room)))
        self.release()
        return 8 + self._room + self._end

    def release(self) -> None:
        """Lets go of the file, finished or not."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, start: int, data: memoryview) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._descriptor, data[done:], start + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from None
