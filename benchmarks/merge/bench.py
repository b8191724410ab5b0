"""Merging adapters: umbel, what one would take instead, and the floors, side by side in one run and with equal threads.

    python benchmarks/merge/bench.py                 # both parts at Llama-2-7B's shapes; 4 GB of disk, deleted afterwards
    python benchmarks/merge/bench.py --part kernels --clients 5 10
    python benchmarks/merge/bench.py --quick         # small shapes, seconds

It prints a table per case and writes kernels.json and commands.json, from which benchmarks/merge/pages.py makes the tables of
docs/performance.md.
"""

import argparse
import importlib.metadata
import os
import platform
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# As the umbel command does, before torch is imported, so that both parts run under the same setting.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

HERE = Path(__file__).parent
PACKAGES = ("torch", "peft", "numpy", "safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=("kernels", "commands"), help="only one of the two")
    parser.add_argument("--clients", type=int, nargs="+", default=[5, 10, 50, 100, 1000])
    parser.add_argument("--repeats", type=int, help="of which the median is taken; 5, with --quick 1")
    parser.add_argument("--threads", type=int, default=2, help="of everything that is timed")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--folder", type=Path, help="where adapters lie while it runs; the system's temporary folder otherwise")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    asked.repeats = asked.repeats or (1 if asked.quick else 5)

    import torch

    torch.set_num_threads(asked.threads)
    asked.results.mkdir(parents=True, exist_ok=True)
    if asked.part != "commands":
        _kernels(asked)
    if asked.part != "kernels":
        _commands(asked)


def _kernels(asked: argparse.Namespace) -> None:
    import kernels

    told: dict[str, Any] = {"provenance": provenance(asked), "cases": []}
    for case in kernels.quick() if asked.quick else kernels.plan(asked.clients):
        told["cases"].append(kernels.measure(case, asked.repeats))
        _write(asked.results / "kernels.json", told)
        _print_kernels(case.title, told["cases"][-1])


def _commands(asked: argparse.Namespace) -> None:
    import commands

    told: dict[str, Any] = {"provenance": provenance(asked), "cases": []}
    for case in commands.quick() if asked.quick else commands.plan(asked.clients):
        with tempfile.TemporaryDirectory(prefix="umbel-merge-", dir=asked.folder) as name:
            for found in commands.measure(case, Path(name), asked.threads, asked.repeats):
                told["cases"].append(found)
                _write(asked.results / "commands.json", told)
                _print_commands(found)


def provenance(asked: argparse.Namespace) -> dict[str, Any]:
    """Returns when, where and with what it was measured."""
    import torch

    from umbel import __version__

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.machine())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "umbel": __version__,
        "commit": _git("rev-parse", "HEAD"),
        "changed_since": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": {
            "processor": processor,
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "platform": platform.platform(),
            "load": os.getloadavg()[0],
        },
        "threads": asked.threads,
        "mkl": torch.backends.mkl.is_available(),
        "repeats": asked.repeats,
        "quick": asked.quick,
    }


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _write(path: Path, told: dict[str, Any]) -> None:
    from umbel.record import write_json

    write_json(path, told)


def _print_kernels(title: str, case: dict[str, Any]) -> None:
    own = {row["name"]: row for row in case["rows"] if row["by"] == "umbel"}
    lines = []
    for row in case["rows"]:
        times = row["seconds"] / own[row["beside"]]["seconds"]
        said = {"umbel": "", "rival": f"{times:.1f} × {row['beside']}", "floor": f"{1 / times:.1f} × slower is {row['beside']}"}
        numbers = [f"{row['seconds'] * 1000:.2f}", said[row["by"]], str(row["rank"] or ""), _small(row["error"])]
        lines.append([row["by"], row["name"], *numbers, str(row["samples"]), row["note"]])
    _print(title, ["", "", "ms per layer", "", "rank", "error", "samples", ""], lines)


def _print_commands(case: dict[str, Any]) -> None:
    title = f"{case['model']}, {case['layers']} layers, {case['clients']} clients, {case['kind']}; "
    title += f"reading alone {case['read_seconds']:.3f} s, start {case['start']['seconds']:.2f} s"
    lines = []
    for row in case["rows"]:
        if "failed" in row:
            lines.append([row["command"], row["failed"]])
            continue
        stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in row["stages"].items())
        merge = row["stages"]["total"]
        floor = case["read_seconds"] + row["write_seconds"]
        cost = [
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{row['bytes_out'] / 1e6:.0f}",
            f"{row['rank']:g}",
            _small(row["error_worst"]),
        ]
        lines.append([row["command"], f"{row['seconds']:.2f}", stages, f"{merge / floor:.2f}", *cost])
    _print(title, ["", "seconds", "by stage", "total × floors", "peak MB", "MB out", "rank", "error"], lines)


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _print(title: str, headings: list[str], lines: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None)
    for n, heading in enumerate(headings):
        table.add_column(heading, justify="left" if n < 2 else "right")
    for line in lines:
        table.add_row(*line)
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
