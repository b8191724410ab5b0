"""Machines in miniature: network namespaces of one Linux computer, each with an address of its own, on one bridge.

    with Machines(["server", "hospital-a"]) as machines:
        machines.start("server", ["umbel", "server", "start", "kit/server"])
        machines.run("hospital-a", ["curl", f"https://{machines.address('server')}:9092/"])

The bridge has a namespace, too, so that the computer's own network stays as it is. Needs root and iproute2. Where namespaces
are not allowed, `Machines(names, apart=False)` runs all on the loopback interface.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

NETWORK = "10.77.0"
LINE = Path(__file__).with_name("line.py")
STOP_SECONDS = 30


class MachinesError(RuntimeError):
    """Something of a computer in miniature that does not work; says what."""


@dataclass(frozen=True)
class Line:
    """A machine's line to the bridge: bits per second and milliseconds in each direction, and the share of lost packets."""

    rate: int
    delay_ms: float
    loss: float


class Machines:
    """Namespaces with one network card each.

    Args:
        names: Of the machines; the i-th has the address 10.77.0.(i+1).
        lines: What a machine's line is like, where it is not as fast as the computer.
        apart: False has no namespaces: all machines are this one, at 127.0.0.1.
    """

    def __init__(self, names: Sequence[str], lines: Mapping[str, Line] | None = None, apart: bool = True) -> None:
        self.names, self.lines, self.apart = list(names), dict(lines or {}), apart
        self.emulator = ""
        self._made: list[str] = []
        self._running: list[subprocess.Popen[Any]] = []
        self._pipes: list[IO[Any]] = []
        self._prefix = f"umbel-{os.getpid()}-"

    def __enter__(self) -> "Machines":
        try:
            if self.apart:
                self._lay()
        except BaseException:
            self.take_down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.take_down()

    def address(self, name: str) -> str:
        """Returns a machine's address."""
        return f"{NETWORK}.{self.names.index(name) + 1}" if self.apart else "127.0.0.1"

    def start(self, name: str, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Starts a command on a machine; it ends with the machines. `options` are those of `subprocess.Popen`."""
        # In a session of its own: Ctrl-C reaches us alone, and we end what we started in order.
        process = subprocess.Popen([*self._on(name), *command], text=True, start_new_session=True, **options)
        self._running.append(process)
        if process.stdout is not None:
            self._pipes.append(process.stdout)
        return process

    def run(self, name: str, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a command on a machine to its end and returns what it wrote, both streams as one."""
        return subprocess.run(
            [*self._on(name), *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **options
        )

    def counted(self, name: str, card: str = "eth0") -> tuple[int, int]:
        """Returns the bytes that a machine's network card has sent and received, all headers and repeats included."""
        found = json.loads(self.run(name, ["ip", "-json", "-statistics", "link", "show", card]).stdout)[0]["stats64"]
        return found["tx"]["bytes"], found["rx"]["bytes"]

    def stop(self, process: subprocess.Popen[Any]) -> None:
        """Ends what `start` began: SIGTERM, and SIGKILL to its group where that does not do."""
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._running.remove(process)

    def take_down(self) -> None:
        """Ends what was started, last first, and deletes the namespaces; a second Ctrl-C does not leave half of them."""
        with _undisturbed():
            for process in reversed(self._running[:]):
                self.stop(process)
            for pipe in self._pipes:
                pipe.close()
            for namespace in reversed(self._made[:]):
                _ip("netns", "delete", namespace)
                self._made.remove(namespace)

    def _on(self, name: str) -> list[str]:
        return ["ip", "netns", "exec", self._prefix + name] if self.apart else []

    def _lay(self) -> None:
        for name in ("bridge", *self.names):
            _ip("netns", "add", self._prefix + name)
            self._made.append(self._prefix + name)
            _ip("-netns", self._prefix + name, "link", "set", "lo", "up")
        _ip("-netns", self._prefix + "bridge", "link", "add", "br0", "type", "bridge")
        _ip("-netns", self._prefix + "bridge", "link", "set", "br0", "up")
        for number, name in enumerate(self.names):
            here, there = ["-netns", self._prefix + "bridge"], ["-netns", self._prefix + name]
            port = f"port{number}"
            if name in self.lines and not _has_netem():
                self._emulate(name, port, self.lines[name])
            else:
                _ip(*here, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", self._prefix + name)
            _ip(*here, "link", "set", port, "master", "br0", "up")
            _ip(*there, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            _ip(*there, "link", "set", "eth0", "up")
            if name in self.lines and _has_netem():
                self.emulator = "tc netem"
                for end, card in (("bridge", port), (name, "eth0")):
                    _netem(self._prefix + end, card, self.lines[name])

    def _emulate(self, name: str, port: str, line: Line) -> None:
        """Connects a machine through `line.py`, for kernels that have no netem."""
        self.emulator = "line.py"
        told = json.dumps(asdict(line))
        process = self.start("bridge", [sys.executable, str(LINE), port, "wire", told], stdout=subprocess.PIPE)
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise MachinesError(f"the line of {name} does not work; are TUN/TAP devices (/dev/net/tun) allowed here?")
        here = ["-netns", self._prefix + "bridge"]
        _ip(*here, "link", "set", "wire", "netns", self._prefix + name, "name", "eth0")


def allowed() -> str:
    """Returns "" where this computer allows network namespaces, else why it does not."""
    name = f"umbel-{os.getpid()}-tried"
    try:
        _ip("netns", "add", name)
    except (MachinesError, FileNotFoundError) as error:
        return str(error)
    with contextlib.suppress(MachinesError):
        _ip("-netns", name, "link", "set", "lo", "up")
    _ip("netns", "delete", name)
    return ""


def _has_netem() -> bool:
    """Whether the kernel has netem, tried on a loopback interface that nobody uses."""
    name = f"umbel-{os.getpid()}-netem"
    _ip("netns", "add", name)
    tried = subprocess.run(
        ["tc", "-netns", name, "qdisc", "add", "dev", "lo", "root", "netem"], capture_output=True, check=False
    )
    _ip("netns", "delete", name)
    return tried.returncode == 0


def _netem(namespace: str, card: str, line: Line) -> None:
    like = ["rate", f"{line.rate}bit", "delay", f"{line.delay_ms}ms", "loss", f"{100 * line.loss}%", "limit", "1000"]
    subprocess.run(["tc", "-netns", namespace, "qdisc", "add", "dev", card, "root", "netem", *like], check=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MachinesError(f"ip {' '.join(arguments)}: {done.stderr.strip() or done.returncode}")


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_for(path: Path, text: str, process: subprocess.Popen[Any], seconds: float = 90) -> None:
    """Waits until a log has a text; MachinesError where its process ends before, or it takes too long."""
    end = time.monotonic() + seconds
    while text not in (said := path.read_text(encoding="utf-8") if path.exists() else ""):
        if process.poll() is not None or time.monotonic() > end:
            raise MachinesError(f"{path}: no {text!r} within {seconds:g} s; it says:\n{said[-2000:]}")
        time.sleep(0.1)
