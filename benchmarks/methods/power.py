"""How near `power` comes to the best pair, over the rounds of real federations, and where it does not.

    python benchmarks/methods/power.py benchmarks/methods/clinc150.toml out.json --set data.train=… --set data.test=…

The federations follow `power`. In each round every rule combines the very factors that clients had after training, with the A_0
that they had before it. The server of such a run sees sums only, so what is measured here is read from the clients.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umbel import algebra, wire
from umbel import config as configuration
from umbel import method as methods
from umbel import run as running
from umbel.client import client, data, model
from umbel.client.adapter import Adapter
from umbel.engine import Ask, Reply
from umbel.engine.local import Local
from umbel.loop import Plan, federate
from umbel.method import Download, Factors, Method, MethodError, Stack
from umbel.record import CHECKPOINT, Record, write_json

RATE = {"learning_rate": 4e-3}
SCENARIOS: dict[str, dict[str, Any]] = {
    "all of 10": {"training": RATE},
    "3 of 10": {"training": RATE, "server": {"clients_per_round": 3}},
    "ranks 2, 4 and 8, 5 of 10": {
        "rounds": 4,
        "training": RATE,
        "lora": {"r": [2, 4, 8, 8, 2, 4, 8, 2, 4, 8]},
        "server": {"clients_per_round": 5},
    },
    "3 of 10, 32 steps": {"rounds": 2, "training": {**RATE, "max_steps": 32}, "server": {"clients_per_round": 3}},
    "3 of 10, 32 steps at 5 times the rate": {
        "rounds": 2,
        "training": {"learning_rate": 2e-2, "max_steps": 32},
        "server": {"clients_per_round": 3},
    },
}

Uploads = list[tuple[float, dict[str, Factors]]]


@dataclass
class Watching:
    """An engine of clients of this process that keeps, per training round, A_0 and every client's factors."""

    answers: dict[int, Any]
    adapter: Adapter
    rows: dict[int, int]
    checkpoint: Path
    rounds: list[tuple[dict[str, Factors], Uploads]] = field(default_factory=list[Any])

    def ask(self, asks: Iterable[Ask]) -> Iterator[Reply]:
        for each in asks:
            header = wire.decode(each.payload).header
            reply = next(iter(Local(self.answers).ask([each])))
            if header["kind"] == "train":
                self._keep(each.client, header["train_round"])
            yield reply

    def _keep(self, k: int, number: int) -> None:
        if len(self.rounds) < number:
            tensors = wire.decode(self.checkpoint.read_bytes()).tensors
            held = {key.removeprefix("held/"): x for key, x in tensors.items() if key.startswith("held/")}
            self.rounds.append((wire.unpack_factors(held), []))
        # The adapter is that of the client whose turn it was.
        self.rounds[-1][1].append((float(self.rows[k]), self.adapter.read()))


def combined(method: Method, uploads: list[tuple[float, Factors]], held: Factors) -> algebra.Product:
    """Returns what a round of a method makes of one layer, by the contract alone: every message, and the last download."""
    held = dict(held)
    for phase in method.plan(1):
        collector = phase.collect()
        for rows, own in uploads:
            collector.add(phase.message(own, held), rows)
        held = {**Download(held).lasting().factors, **phase.combine(collector.done(), held).factors}
    return methods.product(held)


def cold(held: Factors, layer: str) -> Factors:
    """The same start with random rows in the place of A_0's."""
    rank, d_in = held["A"].shape
    return {**held, "A": algebra.fresh_A(rank, d_in, algebra.seed_of("cold", layer))}


def errors(start: dict[str, Factors], uploads: Uploads) -> dict[str, dict[str, float]]:
    """Returns per rule the relative error to Σ p_k ΔW_k, mean and largest over layers; left out is who refuses mixed ranks."""
    found: dict[str, list[float]] = {}
    for layer, held in start.items():
        own = [(rows, factors[layer]) for rows, factors in uploads]
        stack = Stack()
        for rows, factors in own:
            stack.add({name: x.double() for name, x in factors.items()}, rows)
        ideal = stack.done()
        rules: dict[str, tuple[Method, Factors]] = {
            "best pair": (methods.load("florist", rank=held["A"].shape[0]), held),
            "power": (methods.load("power"), held),
            "power, 2 iterations": (methods.load("power", iterations=2), held),
            "flora_na": (methods.load("flora_na"), held),
            "fedit": (methods.load("fedit"), held),
            "power from a random start": (methods.load("power"), cold(held, layer)),
        }
        for name, (method, begin) in rules.items():
            try:
                sent = combined(method, own, begin)
            except MethodError:
                continue
            found.setdefault(name, []).append(algebra.relative_error(sent, (ideal["B"], ideal["A"])))
    return {name: {"mean": sum(x) / len(x), "largest": max(x)} for name, x in found.items()}


def turned(start: dict[str, Factors], uploads: Uploads) -> float:
    """Returns how far clients' A left the rows of A_0: ‖A_k − A_k P‖ / ‖A_k‖ with P onto them, mean over clients and layers."""
    shares: list[float] = []
    for layer, held in start.items():
        Q = algebra.orthonormal(held["A"].mT)
        for _, factors in uploads:
            A = factors[layer]["A"]
            shares.append(float(algebra.frobenius(A - (A @ Q) @ Q.mT) / algebra.frobenius(A)))
    return sum(shares) / len(shares)


def scenario(table: dict[str, Any], changes: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    merged = {**table, **{k: {**table.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changes.items()}}
    [config] = configuration.configs({**merged, "method": {"name": "power"}}).values()
    dataset = data.load(config)
    base = model.load(config, len(dataset.labels))
    train, test = client.tokens(config, base, dataset)
    adapter = Adapter(base.model, config.lora, base.heads, config.seed)
    everyone = list(range(dataset.clients))
    resident = client.Resident(config, base, adapter, dataset, train, test, ranks=client.ranks(config, dataset))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        answers = {k: client.Client(k, resident, folder / str(k)).answer for k in everyone}
        rows = {k: len(resident.rows_of(k)) for k in everyone}
        engine = Watching(answers, adapter, rows, folder / "run" / CHECKPOINT)
        some = config.server.clients_per_round
        options: dict[str, Any] = {"clients_per_round": some, "observe": "never", "score_clients": False}
        plan = Plan(resident.method, config.rounds, everyone, config.seed, **options)
        federate(engine, plan, Record(folder / "run"), lambda event: print(f"round {event['round']}", end="\r"))
    rounds = [{**errors(*kept), "A outside A_0": turned(*kept)} for kept in engine.rounds]
    adapter.remove()
    return (
        {"changes": changes, "clients": len(everyone), "rounds": rounds, "seconds": time.perf_counter() - began},
        config,
        dataset,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    parser.add_argument("--only", action="append", default=[], help="a scenario to run anew; all where none is given")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table = configuration.read(arguments.file, arguments.assignments)
    asked = table.pop("compare", {})
    table["seed"] = asked.get("seeds", [table.get("seed", 1)])[0]
    told: dict[str, Any] = {"scenarios": {}}
    if arguments.only and arguments.out.exists():
        told["scenarios"] = json.loads(arguments.out.read_text(encoding="utf-8"))["scenarios"]
    for name in arguments.only or SCENARIOS:
        found, config, dataset = scenario(table, SCENARIOS[name])
        told["scenarios"][name] = found
        about = running.provenance(dataset.manifest(), model.fingerprint(config), config)
        del about["command"], about["adapter"]
        told |= about
        write_json(arguments.out, told)
        print(json.dumps({name: round(found["seconds"])}))


if __name__ == "__main__":
    main()
