"""The machines in miniature of examples/deployment, on which docs/deploy.md and docs/network.md stand. Needs root."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "deployment"
sys.path.insert(0, str(EXAMPLE))
machines = importlib.import_module("machines")

pytestmark = pytest.mark.network

LISTEN = """
import socket
with socket.create_server(("0.0.0.0", 5000)) as server:
    print("ready", flush=True)
    taken = 0
    while True:
        link, _ = server.accept()
        with link:
            while part := link.recv(1 << 16):
                taken += len(part)
            link.sendall(str(taken).encode())
"""
SEND = """
import socket, sys, time
began = time.monotonic()
with socket.create_connection((sys.argv[1], 5000)) as link:
    print(time.monotonic() - began)
    link.sendall(bytes(int(sys.argv[2])))
    link.shutdown(socket.SHUT_WR)
    print(link.recv(100).decode())
"""


@pytest.fixture(scope="module", autouse=True)
def allowed() -> None:
    if os.geteuid() != 0 or machines.allowed():
        pytest.skip("network namespaces need root, iproute2 and a kernel that has them")


def listening(net):
    process = net.start("server", [sys.executable, "-c", LISTEN], stdout=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"


def test_a_slow_line_delays_and_loses_and_everything_arrives() -> None:
    slow = machines.Line(rate=20_000_000, delay_ms=50, loss=0.05)
    with machines.Machines(["server", "site", "near"], {"site": slow}) as net:
        listening(net)
        size = 400_000
        told = {
            name: net.run(name, [sys.executable, "-c", SEND, net.address("server"), str(size)]) for name in ("near", "site")
        }
        seconds = {name: float(one.stdout.split()[0]) for name, one in told.items()}
        assert told["near"].stdout.split()[1] == str(size)
        assert told["site"].stdout.split()[1] == str(2 * size)
        assert seconds["near"] < 0.1 <= seconds["site"]
        # TCP repeats what was lost, so that the line carried more than was sent.
        assert net.counted("site")[0] > 1.03 * size > net.counted("near")[0] > 0.99 * size


def test_no_machine_and_no_process_is_left_when_something_fails() -> None:
    before = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    net = machines.Machines(["server", "site"], {"site": machines.Line(1_000_000, 1, 0)})
    started = []

    def fail() -> None:
        with net:
            listening(net)
            started.extend(net._running)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(started) >= 1
    assert all(process.poll() is not None for process in started)
    assert subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout == before
