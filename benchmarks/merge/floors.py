"""What no merge can be faster than, measured in the same run: reading, writing, and the products that cannot be avoided."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

CHUNK = 1 << 23


def read_seconds(files: Sequence[Path], threads: int = 1) -> float:
    """Returns the seconds it takes to read every byte of the files into one buffer per thread, used again and again."""
    shares = [files[i::threads] for i in range(threads)]
    begun = time.perf_counter()
    if threads == 1:
        _read(files)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(_read, shares))
    return time.perf_counter() - begun


def _read(files: Sequence[Path]) -> None:
    buffer = memoryview(bytearray(CHUNK))
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            offset = 0
            while got := os.preadv(descriptor, [buffer], offset):
                offset += got
        finally:
            os.close(descriptor)


def forget(files: Sequence[Path]) -> None:
    """Asks the system to drop the files from its cache, so that the next reading comes from the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def write_seconds(folder: Path, size: int) -> float:
    """Returns the seconds it takes to write so many bytes to a new file of the folder and flush them to disk."""
    chunk, path = os.urandom(CHUNK), folder / "floor.bin"
    begun = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            for at in range(0, size, CHUNK):
                file.write(chunk[: size - at])
            os.fsync(file.fileno())
        return time.perf_counter() - begun
    finally:
        path.unlink(missing_ok=True)


def grams(B: Tensor, A: Tensor) -> Callable[[], object]:
    """Returns the products of both stacks with themselves, in float32; the one dense product where the stack is the wider.

    A stack of more columns than the layer has rows or columns is no low-rank product any more: B A itself is then smaller
    than its Gram matrices and cheaper.
    """
    if B.shape[1] > min(B.shape[0], A.shape[1]):
        return lambda: B @ A
    return lambda: (B.mT @ B, A @ A.mT)


def products(B: Tensor, A: Tensor, rank: int) -> Callable[[], object]:
    """Returns those and the two products back onto `rank` columns: B X and Y A, in float32."""
    first = grams(B, A)
    generator = torch.Generator().manual_seed(0)
    width = min(B.shape[1], B.shape[0], A.shape[1])
    # A stack that is too wide has been replaced by one as wide as the layer when its columns are multiplied back.
    own_B, own_A = B[:, :width].contiguous(), A[:width].contiguous()
    X = torch.randn(width, rank, generator=generator)
    Y = torch.randn(rank, width, generator=generator)
    return lambda: (first(), own_B @ X, Y @ own_A)
