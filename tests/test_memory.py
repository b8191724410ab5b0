"""The server's memory in one round does not grow with the number of clients; measured in processes of their own."""

import subprocess
import sys

import pytest

ROUND = """
import resource, sys, tempfile
from pathlib import Path
import torch
from umbel import wire
from umbel.engine import Reply
from umbel.loop import Plan, federate
from umbel.method import load
from umbel.record import Record

torch.set_num_threads(1)
name, count = sys.argv[1], int(sys.argv[2])
SIZE, RANK, LAYERS = 384, 48, 24
NAMES = [f"layer.{i}" for i in range(LAYERS)]

class Clients:
    def ask(self, asks):
        for ask in asks:
            header = wire.decode(ask.payload).header
            kept = {key: header[key] for key in wire.ECHO}
            if header["kind"] == "open":
                said = {**kept, "layers": {layer: [SIZE, SIZE, RANK] for layer in NAMES}, "rows": 1 + ask.client}
                yield Reply(ask.client, wire.encode(wire.Message(said)))
                continue
            draw = torch.Generator().manual_seed(ask.client)
            factors = {
                layer: {"A": torch.randn(RANK, SIZE, generator=draw), "B": torch.randn(SIZE, RANK, generator=draw)}
                for layer in NAMES
            }
            said = {**kept, "rows": 1 + ask.client, "steps": 1}
            yield Reply(ask.client, wire.encode(wire.Message(said, wire.pack_factors(factors))))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB

with tempfile.TemporaryDirectory() as folder:
    before = peak()
    method = load(name, rank=RANK) if name == "florist" else load(name)  # so that what is sent down does not grow, either
    plan = Plan(method, rounds=1, clients=list(range(count)), observe="never", measure_error=sys.argv[3] == "yes")
    record = Record(Path(folder))
    federate(Clients(), plan, record)
    line = record.lines()[-1]
    assert line["answered"] == list(range(count)), line["refused"]
    print(peak() - before, min(line["bytes_up"].values()) / 2**20)
"""


def grown(name: str, clients: int, error: str) -> tuple[float, float]:
    """MiB by which the process grew in a round of so many clients, and MiB of one upload."""
    command = [sys.executable, "-c", ROUND, name, str(clients), error]
    done = subprocess.run(command, capture_output=True, text=True, timeout=85)
    assert done.returncode == 0, done.stderr
    memory, upload = map(float, done.stdout.split())
    return memory, upload


@pytest.mark.parametrize(("name", "error"), [("fedit", "no"), ("fedit", "yes"), ("florist", "yes")])
def test_forty_clients_take_the_memory_of_five(name: str, error: str) -> None:
    few, upload = grown(name, 5, error)
    many, _ = grown(name, 40, error)
    assert upload > 3
    # 35 uploads more, if they were kept, would be 35 of these.
    assert many < few + 8 * upload, (few, many, upload)
