"""What a run leaves on disk: written here, read here. Every file appears whole or not at all."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w

from umbel import wire

CHECKPOINT = "checkpoint.safetensors"


class RecordError(RuntimeError):
    """A folder that cannot be written to or read from as a run; says what to do."""


def write_file(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, flushes it to disk and renames it: a kill leaves the old file or the new."""
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    write_file(path, _json(value, indent=1))


def write_lines(path: Path, values: Iterable[Any]) -> None:
    """Writes JSON Lines, whole or not at all."""
    write_file(path, b"".join(_json(value) for value in values))


def _json(value: Any, indent: int | None = None) -> bytes:
    # A lone surrogate (a file name in somebody's error message) has no UTF-8; as \udc80 it is JSON all the same.
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def flush_folder(folder: Path) -> None:
    """Makes durable which files are in a folder, and under which names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that takes `path`'s place when the block ends well."""
    temporary = path.with_name(path.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)
    flush_folder(path.parent)


@contextlib.contextmanager
def locked(folder: Path, seconds: float = 0) -> Iterator[None]:
    """Holds a folder for one process; a second one waits so many seconds and is refused. A killed process lets go by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + seconds
    with (folder / ".lock").open("w") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise RecordError(
                        f"{folder} is in use by another umbel process; wait for it, or give another folder"
                    ) from None
                time.sleep(0.2)
        yield


def sha256(path: Path) -> str:
    """Returns the hash of a file, as `sha256sum` prints it, or of a folder's files with their names and sizes."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        if file != path:
            digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def now() -> str:
    """Returns the time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Record:
    """One run's folder: `run.toml`, `run.json`, `rounds.jsonl`, the checkpoint, the clients' states, the adapter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def info(self) -> dict[str, Any]:
        """The content of `run.json`; empty before `start`."""
        path = self.folder / "run.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def start(self, table: dict[str, Any], info: dict[str, Any]) -> None:
        """Writes the resolved configuration and what is known before the first round; keeps `started` of a resumed run."""
        write_file(self.folder / "run.toml", tomli_w.dumps(table).encode())
        before = self.info
        write_json(
            self.folder / "run.json",
            {**info, "state": "running", "started": before.get("started", now()), "finished": None, "error": None},
        )

    def update(self, **values: Any) -> None:
        """Changes entries of `run.json`."""
        write_json(self.folder / "run.json", {**self.info, **values})

    def commit(self, header: dict[str, Any], tensors: dict[str, Any], line: dict[str, Any]) -> None:
        """Makes a round durable: first the state (with the round's line inside), then the line in `rounds.jsonl`.

        Args:
            header: The server's state, JSON part.
            tensors: The server's state, tensors.
            line: What `rounds.jsonl` says of the round.
        """
        write_file(self.folder / CHECKPOINT, wire.encode(wire.Message({"server": header, "line": line}, tensors)))
        with (self.folder / "rounds.jsonl").open("ab") as file:
            file.write(_json(line))
            file.flush()
            os.fsync(file.fileno())

    def restore(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]] | None:
        """Returns (header, tensors, last line) of the last durable round, or None; mends `rounds.jsonl` to agree with it.

        Raises:
            RecordError: The checkpoint is damaged.
        """
        path = self.folder / CHECKPOINT
        if not path.exists():
            (self.folder / "rounds.jsonl").unlink(missing_ok=True)
            return None
        try:
            message = wire.decode(path.read_bytes())
        except wire.WireError as error:
            raise RecordError(f"{path} is damaged ({error}); delete the folder {self.folder} to run it anew") from error
        last = message.header["line"]
        lines = [line for line in self.lines() if line["round"] < last["round"]] + [last]
        write_file(self.folder / "rounds.jsonl", b"".join(_json(line) for line in lines))
        return message.header["server"], message.tensors, last

    def rows(self) -> int:
        """Returns the training rows of all clients, as they said when they joined; of masked ones the most in one sum."""
        summed = [line["sum"]["rows"] for line in self.lines() if "sum" in line and line["phase"] == "train"]
        restored = self.restore()
        return max(summed) if summed else sum(restored[0]["rows"].values()) if restored else 0

    def lines(self) -> list[dict[str, Any]]:
        """Returns the rounds so far; a line torn by a kill is left out."""
        path = self.folder / "rounds.jsonl"
        result: list[dict[str, Any]] = []
        for text in path.read_bytes().splitlines() if path.exists() else []:
            try:
                result.append(json.loads(text))
            except ValueError:
                break
        return result
