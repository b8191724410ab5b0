"""The aggregation errors of several methods on the same uploads of a real federation, in every layer and round.

    python benchmarks/methods/ordering.py benchmarks/methods/clinc150.toml out.json --set data.train=… --set data.test=…

The federation follows FedIT; in each round every method combines the very factors that FedIT got. Both targets that papers
use are reported: the weighted mean Σ p_k ΔW_k, and the sum over clients, K times that.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from umbel import config as configuration
from umbel import method as methods
from umbel import run as running
from umbel import wire
from umbel.client import client, data, model
from umbel.client.adapter import Adapter
from umbel.engine import Ask, Engine, Reply
from umbel.engine.local import Local
from umbel.loop import Plan, federate
from umbel.record import Record, write_json
from umbel.server import Aggregator, Server

METHODS = ("exact", "best_rank", "flora_na", "lora_fair", "fedit")
CHAINS = (("exact", "best_rank", "flora_na", "fedit"), ("best_rank", "lora_fair", "fedit"))


class Keeping:
    """An engine that keeps what clients reply."""

    def __init__(self, inner: Engine) -> None:
        self.inner, self.replies = inner, list[Reply]()

    def ask(self, asks: Iterable[Ask]) -> Iterator[Reply]:
        for reply in self.inner.ask(asks):
            self.replies.append(reply)
            yield reply


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table = configuration.read(arguments.file, arguments.assignments)
    asked = table.pop("compare", {})
    table |= {"seed": asked.get("seeds", [table.get("seed", 1)])[0], "method": {"name": "fedit"}}
    [config] = configuration.configs(table).values()
    dataset = data.load(config)
    base = model.load(config, len(dataset.labels))
    train, test = client.tokens(config, base, dataset)
    adapter = Adapter(base.model, config.lora, base.heads, config.seed)
    resident = client.Resident(config, base, adapter, dataset, train, test)
    rounds: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, everyone = Path(name), list(range(dataset.clients))
        answers = {k: client.Client(k, resident, folder / str(k)).answer for k in everyone}
        engine = Keeping(Local(answers))
        plan = Plan(methods.load("fedit"), config.rounds, everyone, config.seed, observe="never", score_clients=False)
        federate(engine, plan, Record(folder / "run"), lambda event: print(f"round {event['round']}", end="\r"))
    uploads = [wire.decode(reply.payload) for reply in engine.replies[len(everyone) :] if reply.payload is not None]
    for index in range(config.rounds):
        own = uploads[index * len(everyone) : (index + 1) * len(everyone)]
        rounds.append(_errors(own, everyone, adapter, config.seed))
    holds = all(bool(x["holds"]) for x in rounds)
    about = running.provenance(dataset.manifest(), model.fingerprint(config), config)
    del about["command"], about["adapter"]
    write_json(arguments.out, {"order": " and ".join(" ≤ ".join(x) for x in CHAINS), "holds": holds, "rounds": rounds, **about})
    print(json.dumps({"order holds in every layer and round": holds}))


def _errors(uploads: list[wire.Message], everyone: list[int], adapter: Adapter, seed: int) -> dict[str, object]:
    mean: dict[str, dict[str, float]] = {}
    total: dict[str, dict[str, float]] = {}
    for name in METHODS:
        aggregator = Aggregator(methods.load(name), Server(adapter.layers, seed))
        for k, message in zip(everyone, uploads, strict=True):
            factors = wire.unpack_factors(message.tensors)
            aggregator.add(k, message.header["rows"], factors, wire.unpack_plain(message.tensors))
        done = aggregator.done()
        assert done.error is not None
        assert done.error_of_sum is not None
        mean[name], total[name] = done.error, done.error_of_sum
    pairs = [pair for chain in CHAINS for pair in itertools.pairwise(chain)]
    holds = all(mean[a][layer] <= mean[b][layer] * (1 + 1e-6) + 1e-7 for a, b in pairs for layer in mean[a])
    return {"holds": holds, "to_mean": mean, "to_sum": total}


if __name__ == "__main__":
    main()
