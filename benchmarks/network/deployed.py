"""A federation on this machine as a user would start it, what its processes take of memory, and Flower's floor beside it."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umbel import deployment, federation, kit

HERE = Path(__file__).parent
START_SECONDS, RUN_SECONDS = 180, 900
SAMPLE_SECONDS = 0.2

KINDS = {
    "flower-superlink": "SuperLink",
    "flwr-serverapp": "ServerApp",
    "nginx": "nginx",
    "flower-supernode": "SuperNode",
    "umbel.client.worker": "worker",
    "flwr-clientapp": "ClientApp",
}
"""What a process is, by a word of its command line; the first that is found counts."""
SHORT_LIVED = {"ServerApp", "ClientApp"}


class Federation:
    """A kit, its server and its sites, running until the block ends.

    Args:
        folder: For everything; made here.
        sites: Their number. Each takes its rows from the run's own file.
    """

    def __init__(self, folder: Path, sites: int) -> None:
        self.folder, self.names = folder, [f"site-{k}" for k in range(sites)]
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Federation":
        self.folder.mkdir(parents=True)
        kit.init(self.folder / "kit", f"127.0.0.1:{deployment.free_port()}", self.names)
        try:
            self._start("server", "server", "start", str(self.folder / "kit" / "server"), until="ready: ")
            for name in self.names:
                self._start(name, "site", "start", str(self.folder / "kit" / name), "--data", "run", until="online: ")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            process.wait(60)

    def _start(self, name: str, *arguments: str, until: str) -> None:
        log = self.folder / f"{name}.log"
        with log.open("wb") as file:
            command = [sys.executable, "-m", "umbel.cli", *arguments]
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=self.folder)
        self.processes.append(process)
        end = time.monotonic() + START_SECONDS
        while until not in log.read_text(encoding="utf-8"):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{name} does not start:\n{log.read_text(encoding='utf-8')}")
            time.sleep(0.1)

    @property
    def kit(self) -> kit.Federation:
        """As it is now: the server notes its SuperLink's address when it starts."""
        return kit.read(self.folder / "kit" / "server")

    def umbel(self, table: dict[str, Any], name: str) -> dict[str, Any]:
        """Runs a job; returns its wall seconds, the lines of its record, the peaks of memory and the work."""
        folder = self.folder / name
        with Watch(self.roots) as watch:
            began = time.perf_counter()
            submitted = federation.submit(table, folder, self.kit.folder)
            federation.follow(submitted, lambda event: None)
            seconds = time.perf_counter() - began
        lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
        refused = [entry for line in lines for entry in line["refused"]]
        if refused or any(len(line["answered"]) < len(self.names) for line in lines):
            raise RuntimeError(f"{name}: not every site took part: {refused}")
        return {"seconds": seconds, "lines": lines, "memory": watch.peaks, "cpu": watch.cpu}

    def echo(self, sizes: list[list[int]], name: str) -> dict[str, Any]:
        """Exchanges bytes of these sizes with every site; returns wall seconds, those of each exchange, peaks and work."""
        out = self.folder / f"{name}.json"
        options = {"sizes": json.dumps(sizes), "nodes": len(self.names), "out": str(out)}
        given = " ".join(f"{key}={json.dumps(value)}" for key, value in options.items())
        with Watch(self.roots) as watch:
            began = time.perf_counter()
            told = federation.flwr(self.kit, "run", str(HERE / "echo"), "umbel", "--run-config", given)
            if not told.get("success"):
                raise RuntimeError(f"Flower took no run: {told}")
            while not out.exists():
                if time.perf_counter() - began > RUN_SECONDS:
                    raise RuntimeError(f"{name}: no end after {RUN_SECONDS} s; see {self.folder}/kit/server/logs")
                time.sleep(0.5)
            seconds = time.perf_counter() - began
        found = json.loads(out.read_text(encoding="utf-8"))
        wanted = [up * len(self.names) for _, up in sizes]
        if found["bytes_up"] != wanted:
            raise RuntimeError(f"{name}: {found['bytes_up']} bytes came back, not {wanted}")
        return {"seconds": seconds, "exchanges": found["seconds"], "memory": watch.peaks, "cpu": watch.cpu}

    @property
    def roots(self) -> list[int]:
        return [process.pid for process in self.processes]


@dataclass
class Watch:
    """Watches the descendants of some processes, and what they take by kind.

    What was started for one message or one run and is still there from the last one does not count.

    Args:
        roots: Their process ids.
        peaks: The largest VmHWM of one of a kind, its largest resident memory so far, in bytes.
        cpu: Seconds that all of a kind have worked, but for the last moment of a process that ends between two looks.
    """

    roots: list[int]
    peaks: dict[str, int] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> "Watch":
        there = {pid: kind for pid in descendants(self.roots) if (kind := kind_of(pid))}
        self._old = {pid for pid, kind in there.items() if kind in SHORT_LIVED}
        self._kinds = {pid: kind for pid, kind in there.items() if pid not in self._old}
        self._before = {pid: worked(pid) for pid in self._kinds}
        self._after = dict(self._before)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        for pid, seconds in self._after.items():
            kind = self._kinds[pid]
            self.cpu[kind] = round(self.cpu.get(kind, 0.0) + seconds - self._before.get(pid, 0.0), 2)

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            for pid in descendants(self.roots) - self._old:
                # One that has ended has no command line any more, but still its seconds.
                kind = kind_of(pid) or self._kinds.get(pid, "")
                if kind:
                    self._kinds[pid] = kind
                    self._after[pid] = max(worked(pid), self._after.get(pid, 0.0))
                    self.peaks[kind] = max(peak(pid), self.peaks.get(kind, 0))


def descendants(roots: list[int]) -> set[int]:
    """Returns all processes below some, with them."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    stats = {pid: _read(pid, "stat").rpartition(")")[2].split() for pid in pids}
    parents = {pid: int(fields[1]) for pid, fields in stats.items() if fields}
    found, new = set(roots), set(roots)
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return found


def kind_of(pid: int) -> str:
    """Returns what a process is; "" for one that has ended or is nothing of ours."""
    command = _read(pid, "cmdline").replace("\0", " ")
    return next((kind for word, kind in KINDS.items() if word in command), "")


def peak(pid: int) -> int:
    """Returns a process's VmHWM in bytes; 0 where it has ended."""
    lines = _read(pid, "status").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def worked(pid: int) -> float:
    """Returns the seconds that a process itself has worked; 0 where it is gone."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _read(pid: int, name: str) -> str:
    try:
        return Path("/proc", str(pid), name).read_bytes().decode(errors="replace")
    except OSError:
        return ""
