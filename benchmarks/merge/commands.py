"""The whole command on folders of adapters, as a user would start it: seconds and peak memory, beside reading and writing."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapters
import floors
from adapters import Kind, Model
from kernels import METHODS

PEAK = Path(__file__).with_name("peak.py")
START = [sys.executable, "-c", "import torch; import umbel.cli"]
UMBEL = [sys.executable, "-c", "from umbel.cli import main; main()"]
LONGEST = 600  # seconds that one command may take
PATIENCE = 20.0  # seconds; what took longer at first is not repeated


@dataclass(frozen=True)
class Case:
    """One model and several numbers of clients.

    Args:
        model: What is adapted.
        clients: Numbers of clients, ascending.
        distinct: How many adapters differ; the rest are hard links to them.
        kind: Of clients.
        methods: Labels of `METHODS`.
        checked: Of these, what is also run with the check of its result.
    """

    model: Model
    clients: list[int]
    distinct: int
    kind: Kind = "alike"
    methods: tuple[str, ...] = tuple(METHODS)
    checked: tuple[str, ...] = ("florist τ 0.9", "fedit")


def plan(clients: list[int]) -> list[Case]:
    """Returns q and v of Llama-2-7B at all numbers of clients, and all seven shapes up to 100."""
    few = [K for K in clients if K <= 100]
    cases = [
        Case(adapters.QV, few, 100),
        # A thousand of all 64 layers by the method that needs no stack; by all methods, and next to ten, on two blocks.
        Case(adapters.QV, [K for K in clients if K > 100], 100, methods=("fedit",), checked=()),
        Case(adapters.QV_FEW, [K for K in clients if K in (10, 1000)], 1000, checked=("fedit",)),
        Case(adapters.ALL_FEW, few, 100),
    ]
    return [case for case in cases if case.clients]


def quick() -> list[Case]:
    """Returns one small case."""
    return [Case(adapters.SMALL, [5], 3, methods=("florist τ 1", "fedit"), checked=("florist τ 1", "fedit"))]


def measure(case: Case, folder: Path, threads: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Yields per number of clients the floors and what every method took, with and without the check of the result.

    Files are read once before anything is timed, so that all find them in the page cache where they fit into memory.
    """
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    made = adapters.write(folder / "clients", case.kind, case.model, max(case.clients), case.distinct)
    start = [_run(START, env, folder) for _ in range(repeats)]
    for K in case.clients:
        files = [path / "adapter_model.safetensors" for path in made[:K]]
        floors.read_seconds(files[: case.distinct])
        read = {n: [floors.read_seconds(files, n) for _ in range(repeats)] for n in (1, threads)}
        yield {
            "model": case.model.name,
            "layers": len(case.model.layers),
            "rank": case.model.rank,
            "kind": case.kind,
            "clients": K,
            "distinct": min(case.distinct, K),
            "bytes_in": sum(file.stat().st_size for file in files),
            "start": {key: statistics.median(x[key] for x in start) for key in ("seconds", "peak_bytes")},
            "read_seconds": statistics.median(read[1]),
            "read_seconds_threads": statistics.median(read[threads]),
            "rows": list(_rows(case, made[:K], folder, env, repeats)),
        }
    shutil.rmtree(folder / "clients")


def _rows(case: Case, paths: list[Path], folder: Path, env: dict[str, str], repeats: int) -> Iterator[dict[str, Any]]:
    asked = [(label, checked) for label in case.methods for checked in (True, False) if not checked or label in case.checked]
    found: dict[tuple[str, bool], list[dict[str, Any]]] = {key: [] for key in asked}
    for _ in range(repeats):
        for key in asked:
            if not any("failed" in run or run["seconds"] > PATIENCE for run in found[key]):
                found[key].append(_merge(*key, paths, folder, env))
    for (label, checked), runs in found.items():
        about = {"method": label, "command": " ".join(["umbel merge …", *_options(label, checked)]), "checked": checked}
        if failed := [run["failed"] for run in runs if "failed" in run]:
            yield {**about, "failed": failed[0]}
            continue
        keys = ("seconds", "peak_bytes", "bytes_out", "write_seconds")
        median = {key: statistics.median(run[key] for run in runs) for key in keys}
        stages = {stage: statistics.median(run["stages"][stage] for run in runs) for stage in runs[0]["stages"]}
        result = {key: runs[0][key] for key in ("rank", "error_worst")}
        cold = _cold(paths, folder, env, repeats) if (label, checked) == ("fedit", False) else None
        yield {**about, **median, **result, "stages": stages, "samples": len(runs), **({"cold": cold} if cold else {})}


def _cold(paths: list[Path], folder: Path, env: dict[str, str], repeats: int) -> dict[str, float] | None:
    """FedIT and reading alone, each from files that the system has dropped from its cache."""
    files = [path / "adapter_model.safetensors" for path in paths]
    found: dict[str, list[float]] = {"read_seconds": [], "write_seconds": [], "merge_seconds": []}
    for _ in range(repeats):
        floors.forget(files)
        found["read_seconds"].append(floors.read_seconds(files))
        floors.forget(files)
        run = _merge("fedit", False, paths, folder, env)
        if "failed" in run:
            return None
        found["merge_seconds"].append(run["stages"]["total"])
        found["write_seconds"].append(run["write_seconds"])
    return {key: statistics.median(values) for key, values in found.items()}


def _options(label: str, checked: bool) -> list[str]:
    name, options = METHODS[label]
    settings = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    return ["--method", name, *settings, *([] if checked else ["--no-check"])]


def _merge(label: str, checked: bool, paths: list[Path], folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """Runs the command once, then writes as many bytes as it wrote."""
    out = folder / "merged"
    command = [*UMBEL, "merge", *map(str, paths), "--out", str(out), *_options(label, checked), "--json"]
    run = _run(command, env, folder)
    if "failed" not in run:
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        report = json.loads(run.pop("output"))
        found = list(report["layers"].values())
        run |= {"stages": report["seconds"], "bytes_out": size}
        run |= {"rank": statistics.mean(own["rank"] for own in found)}
        run |= {"error_worst": max(own["error"] for own in found) if checked else None}
        shutil.rmtree(out)
        run["write_seconds"] = floors.write_seconds(folder, size)
    return run


def _run(command: list[str], env: dict[str, str], folder: Path) -> dict[str, Any]:
    """Returns seconds, peak memory and output of a command, or why it failed."""
    output = folder / "output"
    watched = [sys.executable, "-I", "-S", str(PEAK), str(output), *command]
    process = subprocess.Popen(
        watched, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )
    try:
        told, errors = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"failed": f"more than {LONGEST} s"}
    run = json.loads(told)
    if run["code"] != 0:
        print(errors, file=sys.stderr)
        return {"failed": f"exit code {run['code']}"}
    return {**run, "output": output.read_text(encoding="utf-8")}
