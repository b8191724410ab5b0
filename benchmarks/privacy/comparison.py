"""Fed-SB's private comparison at our size: the recipe as it was released, and corrected, side by side.

    python benchmarks/privacy/comparison.py CLINC150-FOLDER WORK-FOLDER

Three clients of 5,000 rows each, ten domains of CLINC150 as labels, MiniLM, DP-SGD at each client, one aggregation after
local training. "released" is what the Fed-SB authors' scripts do: δ = 1 / number of batches of a client, and a start that is
measured on the private rows of all clients, in one place, without noise and outside the accountant. That is wrong on purpose,
so it is built here, as a client of its own (`Released`), and is no option of umbel. "corrected" is umbel as it is: δ ≤ 1 / n,
and Fed-SB's start either free (random, or from public rows) or paid from the same budget.

WORK-FOLDER keeps every run as soon as it is done; the script goes on where it was stopped. The learning rate of every method
and rank is chosen from one grid on validation rows. The result goes to results/comparison.json.
"""

import argparse
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

import setting
from umbel import algebra, wire
from umbel import method as methods
from umbel.client import client, fit, private
from umbel.client.client import Answer
from umbel.client.prompts import pad_id
from umbel.config import Config
from umbel.privacy import noise_multiplier
from umbel.record import write_json
from umbel.server import Aggregator, Server

SEEDS, EPSILONS = (1, 2, 3), (1.0, 3.0)
RATES = (2e-3, 6e-3, 2e-2, 6e-2, 2e-1)
"""The last four are tried with noise, the first four without."""
CLIENTS, BATCH, STEPS, CLIP, DELTA = 3, 48, 10, 0.1, 1e-5
SAMPLES, PUBLIC = 192, 192
"""Rows that a start is measured on: of all clients together, and public ones."""

Table = dict[str, Any]
Cell = tuple[str, int, str, str]
"""Method, rank, recipe ("released", "corrected" or "without noise"), and Fed-SB's start."""

CELLS: list[list[Cell]] = [
    [
        ("fed_sb", 32, "released", "sign"),
        *[("fed_sb", 32, "corrected", start) for start in ("random", "sign")],
        *[(name, 32, recipe, "") for recipe in ("released", "corrected") for name in ("fedit", "ffa_lora")],
    ],
    [
        *[("fed_sb", r, "released", "sign") for r in (64, 16)],
        *[("fed_sb", r, "corrected", start) for start in ("random", "sign") for r in (64, 16)],
    ],
    [
        *[(name, 8, "corrected", "") for name in ("fedit", "ffa_lora")],
        *[("fed_sb", 32, "corrected", start) for start in ("gradient", "public")],
    ],
    [("fed_sb", 32, "without noise", "random"), ("fedit", 32, "without noise", "")],
]
"""In the order in which they run, all seeds of one group after the other, so that what is done is a comparison at any time.

FedEx-LoRA's clients do in one round what FedIT's do: it combines the very uploads of `fedit`, in the same run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", type=Path, help="folder of CLINC150")
    parser.add_argument("work", type=Path, help="folder for what is done so far")
    arguments = parser.parse_args()
    setting.one_thread()
    arguments.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.rows, arguments.work)
    for group in CELLS:
        for seed in SEEDS:
            for cell in group:
                for epsilon in EPSILONS if cell[2] != "without noise" else (None,):
                    bench.run(cell, epsilon, seed, bench.rate(cell)["chosen"])
                    bench.tell()


class Bench:
    """Rows and model, and the runs that are done."""

    def __init__(self, rows: Path, work: Path) -> None:
        self.rows, self.work = rows, work
        self.rates: dict[tuple[str, bool], Table] = {}
        lines = (rows / "val.jsonl").read_text(encoding="utf-8").splitlines()
        # The file is sorted by label: every fifth row to choose rates on, and as many public ones as asked for from the others.
        validation = [line for i, line in enumerate(lines) if i % 5 == 0]
        public = [line for i, line in enumerate(lines) if i % 5 == 1]
        public = public[:: len(public) // PUBLIC][:PUBLIC]
        for name, part in (("validation", validation), ("public", public)):
            (work / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
        self.test = setting.Loaded.of(self.config(("fedit", 8, "without noise", ""), None, 1, 1e-3))
        self.rows_each = self.test.dataset.owner_train.count(0)
        self.validation = setting.Loaded.of(self.config(("fedit", 8, "without noise", ""), None, 1, 1e-3, validation=True))

    def config(self, cell: Cell, epsilon: float | None, seed: int, rate: float, validation: bool = False) -> Config:
        """Returns the configuration of a run."""
        name, rank, recipe, start = cell
        method: Table = {"name": name}
        if name == "fed_sb":
            method |= {"init": "sign" if start == "public" else start, "samples": SAMPLES}
        training = {"learning_rate": rate, "per_device_train_batch_size": BATCH, "max_steps": STEPS}
        files: Table = {"max_test_rows": 1000}
        files |= {"public": str(self.work / "public.jsonl")} if start == "public" else {}
        files |= {"test": str(self.work / "validation.jsonl")} if validation else {}
        private: Table = {"unit": "example", "target_epsilon": epsilon, "target_delta": DELTA, "max_grad_norm": CLIP}
        return setting.configured(
            setting.table(
                self.rows,
                method=method,
                lora={"r": rank, "lora_alpha": rank},
                data=files,
                training=training,
                rounds=1,
                seed=seed,
                **({"privacy": private} if recipe == "corrected" else {}),
            )
        )

    def rate(self, cell: Cell) -> Table:
        """Returns the learning rate of a method, for all ranks, starts and ε: chosen at rank 32, the first seed, ε = 3."""
        name, noisy = cell[0], cell[2] != "without noise"
        if (name, noisy) not in self.rates:
            start = "random" if name == "fed_sb" else ""
            own: Cell = (name, 32, "corrected" if noisy else "without noise", start)
            tried = {x: self.run(own, 3.0 if noisy else None, SEEDS[0], x, True)["accuracy"] for x in RATES[noisy:][:4]}
            self.rates[name, noisy] = {"chosen": max(tried, key=lambda x: tried[x]), "tried": tried}
        return self.rates[name, noisy]

    def tell(self) -> None:
        """Writes the result of what is done."""
        files = sorted(self.work.glob("run-*.json"))
        runs = [run for path in files for run in split(json.loads(path.read_text(encoding="utf-8")))]
        about: Table = {"clients": CLIENTS, "rows": self.rows_each, "batch": BATCH, "steps": STEPS, "max_grad_norm": CLIP}
        about |= {"delta": DELTA, "samples": SAMPLES, "public": PUBLIC, "rates": list(RATES)}
        chosen = [{"method": method, "noise": noisy, **found} for (method, noisy), found in self.rates.items()]
        told = {**about, "chosen": chosen, "runs": runs, "provenance": self.test.provenance}
        write_json(setting.RESULTS / "comparison.json", told)

    def run(self, cell: Cell, epsilon: float | None, seed: int, rate: float, validation: bool = False) -> Table:
        """Runs one cell, or returns what it came to before."""
        kind = "rate" if validation else "run"
        label = "-".join(map(str, (kind, *cell, epsilon, seed, *((rate,) if validation else ())))).replace(" ", "_")
        done = self.work / f"{label}.json"
        if not done.exists():
            config = self.config(cell, epsilon, seed, rate, validation)
            loaded = (self.validation if validation else self.test).dealt(config)
            released = released_client(epsilon) if cell[2] == "released" and epsilon else client.Client
            with tempfile.TemporaryDirectory() as name, setting.federation(loaded, config, Path(name), released) as end:
                end.final(seed)
                accuracy = setting.accuracy(setting.log_probabilities(loaded, loaded.test), loaded.test)
                fedex = fedex_lora(end, loaded, seed) if cell[0] == "fedit" else None
                spent = [line.get("epsilon") for line in end.record.lines()][-1]
                sent = sum(end.record.lines()[-1]["bytes_up"].values())
            about: Table = dict(zip(("method", "rank", "recipe", "start"), cell))
            about |= {"epsilon": epsilon, "seed": seed, "rate": rate, "spent": spent, "up": sent}
            told = {**about, "accuracy": accuracy, "fedex_lora": fedex}
            write_json(done, told)
            print(label, accuracy, flush=True)
        return json.loads(done.read_text(encoding="utf-8"))


def fedex_lora(end: setting.Federated, loaded: setting.Loaded, seed: int) -> float:
    """Returns the accuracy of what FedEx-LoRA makes of FedIT's uploads of one round."""
    shapes = {name: tuple(x.shape) for name, x in end.server.plain.items()}
    server = Server(end.adapter.layers, seed, plain_shapes=shapes)
    aggregator = Aggregator(methods.load("fedex_lora"), server, False)
    for k, message in enumerate(end.uploads[0]):
        factors, plain = wire.unpack_factors(message.tensors), wire.unpack_plain(message.tensors)
        aggregator.add(k, message.header["rows"], factors, plain)
    server.settle(aggregator.done())
    end.adapter.restart(seed)
    end.adapter.apply(server.owed[-1], server.plain, own_rank=False)
    return setting.accuracy(setting.log_probabilities(loaded, loaded.test), loaded.test)


def split(run: Table) -> list[Table]:
    """Returns a run, and the one of FedEx-LoRA that it holds."""
    fedex = run.pop("fedex_lora")
    return [run] if fedex is None else [run, {**run, "method": "fedex_lora", "accuracy": fedex}]


def released_client(epsilon: float) -> type[client.Client]:
    """Returns a client that trains as the released recipe does: δ = 1 / number of batches, and a start without any noise."""

    class Released(client.Client):
        def _train(self, header: Answer, beside: dict[str, Tensor]) -> tuple[Answer, dict[str, Tensor], dict[str, Tensor]]:
            mine, resident = self._mine(), self.resident
            rate = BATCH / len(mine)
            sigma = released_sigma(epsilon, rate)
            noise = private.Noise(sigma, CLIP, rate, algebra.seed_of("released", resident.config.seed, self.number))
            trains, pad = tuple(header["trains"]), pad_id(resident.base.tokenizer)
            nothing = (1, 1, {}, lambda step, steps: None)
            fitted = private.fit(resident.adapter, trains, mine, resident.config.training, pad, noise, *nothing)
            tensors = wire.pack_factors(resident.adapter.read(header["sends"])) | wire.pack_plain(resident.adapter.read_plain())
            return {"rows": len(mine), "steps": fitted.steps, "scores": None}, tensors, {}

        def _measure(self, header: Answer) -> tuple[Answer, dict[str, Tensor]]:
            resident = self.resident
            # The pooled rows of all clients, as the released script has them on one machine.
            pooled = [row for row, owner in zip(resident.train, resident.dataset.owner_train) if owner >= 0]
            training, pad = resident.config.training, pad_id(resident.base.tokenizer)
            gradients = fit.gradient(resident.adapter, pooled, training, pad, resident.config.seed, SAMPLES)
            return {"rows": SAMPLES // CLIENTS}, wire.pack_factors({layer: {"G": G} for layer, G in gradients.items()})

    return Released


@cache
def released_sigma(epsilon: float, rate: float) -> float:
    """Returns σ at δ = 1 / number of batches, for the training alone."""
    return noise_multiplier(epsilon, rate, ((rate, STEPS),))


if __name__ == "__main__":
    main()
