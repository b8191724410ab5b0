"""Run directories, read back: a job's methods and baselines, each a run of rounds."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


class ReportError(ValueError):
    """A folder that cannot be reported; the message says what is wrong, where, and what is allowed."""


@dataclass(frozen=True)
class Run:
    """One federation: a method, the central baseline, or one client on its own.

    Args:
        label: What its job calls it.
        folder: Where it was read from.
        info: `run.json`; empty where the run has not started.
        lines: `rounds.jsonl`, in order, without a last line that was still being written.
        torn: Whether there was such a line.
    """

    label: str
    folder: Path
    info: dict[str, Any] = field(default_factory=dict[str, Any])
    lines: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    torn: bool = False

    @property
    def state(self) -> str:
        """ "waiting", "running", "done" or "failed"."""
        return str(self.info.get("state", "running" if self.lines else "waiting"))

    @property
    def trained(self) -> list[dict[str, Any]]:
        """The lines of training rounds, each with the score and the ranks that it came to.

        Those may stand in the line of a later exchange of the same round, or, where the common model came together only
        after the last round, of that.
        """
        lines: list[dict[str, Any]] = []
        for line in self.lines:
            phase = line.get("phase", "train")
            if phase == "train":
                lines.append(line)
            elif phase == "update" and lines:
                lines[-1] = {**lines[-1], "global": line.get("global"), "rank": line.get("rank")}
        whole = self.gathered
        return [*lines[:-1], {**lines[-1], "global": whole.get("global")}] if lines and whole else lines

    @property
    def gathered(self) -> dict[str, Any] | None:
        """The line in which clients sent what had stayed with them, where the method has one."""
        return next((line for line in self.lines if line.get("phase") == "gather"), None)

    @property
    def personal_score(self) -> float | None:
        """Σ n_k score_k / Σ n_k over clients: common parts with own parts, on own test rows, after the last round."""
        return None if self.gathered is None else self.local_score(self.gathered)

    @property
    def planned(self) -> int:
        """Training rounds that the configuration asks for; 0 where it is not known yet."""
        return int(self.config.get("rounds", 0))

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration as a table."""
        return self.info.get("config") or {}

    @property
    def metric(self) -> str:
        """Name of the score: "accuracy", or "loss", where lower is better."""
        known = self.info.get("metric") or {}
        scored = [line["global"] for line in self.lines if line.get("global")]
        return str(known.get("name", "loss" if scored and "accuracy" not in scored[0] else "accuracy"))

    @property
    def lower_is_better(self) -> bool:
        known = self.info.get("metric") or {}
        return known.get("better", "lower" if self.metric == "loss" else "higher") == "lower"

    @property
    def clients(self) -> int:
        """K; from the rounds where `run.json` does not say."""
        return int(self.info.get("clients") or len({k for line in self.lines for k in line.get("asked", [])}))

    def score(self, line: dict[str, Any], metric: str = "") -> float | None:
        """The aggregated model on all test rows after that round; None where it was not measured."""
        return (line.get("global") or {}).get(metric or self.metric)

    def local_score(self, line: dict[str, Any]) -> float | None:
        """Σ n_k score_k / Σ n_k over clients: own model, own n_k test rows, before aggregation."""
        told = [x for x in (line.get("local") or {}).values() if x and x.get(self.metric) is not None and x.get("rows")]
        total = sum(x["rows"] for x in told)
        return sum(x["rows"] * x[self.metric] for x in told) / total if total else None

    def bytes_per_client(self, key: Literal["bytes_up", "bytes_down"]) -> list[float]:
        """Bytes so far at the end of each line: mean over all K clients, asked or not."""
        total, result = 0, list[float]()
        for line in self.lines:
            total += sum((line.get(key) or {}).values())
            result.append(total / max(self.clients, 1))
        return result

    def seconds(self) -> dict[str, float]:
        """Wall seconds by stage, over all rounds; "other" is what `total` has beyond the named stages."""
        sums: dict[str, float] = {}
        for line in self.lines:
            for stage, value in (line.get("seconds") or {}).items():
                sums[stage] = sums.get(stage, 0.0) + value
        named = sum(value for stage, value in sums.items() if stage != "total")
        sums["total"] = max(sums.get("total", 0.0), named)
        return {**sums, "other": sums["total"] - named}


@dataclass(frozen=True)
class Job:
    """The runs that belong together: same clients, same data, same seed.

    Args:
        folder: The job folder, or the one run folder.
        methods: In the order of the configuration.
        central: The baseline that has everyone's data, where it was asked for.
        local: The baselines of one client each.
        split: `split.json`: who owns which rows; empty where there is none yet.
    """

    folder: Path
    methods: list[Run]
    central: Run | None = None
    local: list[Run] = field(default_factory=list[Run])
    split: dict[str, Any] = field(default_factory=dict[str, Any])


def read_job(folder: Path) -> Job:
    """Reads a job folder, or the folder of one run.

    A run that has not started is a run without lines; one that is being written is read as far as it got.

    Args:
        folder: With `job.json` (a job), or `run.json` or `rounds.jsonl` (one run).

    Raises:
        ReportError: If the folder holds none of these, or a file in it is not what it should be.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"no folder {str(folder)!r}")
    if (folder / "job.json").exists():
        job = _read(folder / "job.json")
        members: dict[str, str] = job.get("members") or {}
        labels = job.get("methods") or [label for label in members if label.partition("/")[0] not in ("central", "local")]
        local = job.get("local") or []
        return Job(
            folder=folder,
            methods=[read_run(folder / members.get(label, label), label) for label in labels],
            central=read_run(folder / job["central"], "central") if job.get("central") else None,
            local=[read_run(folder / place, Path(place).name) for place in local],
            split=_read(folder / "split.json"),
        )
    if not (folder / "run.json").exists() and not (folder / "rounds.jsonl").exists():
        raise ReportError(
            f"{str(folder)!r} is not a run: it has no job.json, run.json or rounds.jsonl. "
            "Give the folder that `umbel run` wrote, or one method's folder inside it"
        )
    run = read_run(folder)
    split = _read(folder / "split.json") or _read(folder.resolve().parent / "split.json")
    if run.label == "central":
        return Job(folder, [], central=run, split=split)
    return Job(folder, [run], split=split)


def read_run(folder: Path, label: str = "") -> Run:
    """Reads one run folder; one that is not there yet gives a run without lines."""
    info = _read(folder / "run.json")
    lines, torn = _lines(folder / "rounds.jsonl")
    return Run(label or str(info.get("label") or folder.resolve().name), folder, info, lines, torn)


def _read(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, an empty one where there is no file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ReportError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ReportError(f"{path}: got {type(value).__name__}, allowed: one JSON object")
    return value


def _lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Returns the lines of `rounds.jsonl`, and whether a last, half-written one was left out."""
    try:
        texts = [text for text in path.read_bytes().split(b"\n") if text.strip()]
    except FileNotFoundError:
        return [], False
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError as error:
            # Only the last line can be one that is being written, or that a crash cut short.
            if number == len(texts):
                return lines, True
            raise ReportError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(line, dict):
            raise ReportError(f"{path}, line {number}: got {type(line).__name__}, allowed: one JSON object per round")
        lines.append(line)
    return lines, False


@dataclass(frozen=True)
class Entry:
    """One row of the closing table.

    Args:
        label: The run's label, with its job before it where two jobs use the same.
        kind: What it stands for.
        job: Where it belongs.
        runs: One run; for "local" one per client.
    """

    label: str
    kind: Literal["method", "local", "central"]
    job: Job
    runs: list[Run]


def entries(jobs: Sequence[Job]) -> list[Entry]:
    """Returns methods in their order, then each job's baselines."""
    found = [Entry(run.label, "method", job, [run]) for job in jobs for run in job.methods]
    for job in jobs:
        found += [Entry("local", "local", job, job.local)] if job.local else []
        found += [Entry("central", "central", job, [job.central])] if job.central else []
    if len({entry.label for entry in found}) == len(found):
        return found
    names = job_names(jobs)
    return [dataclasses.replace(entry, label=f"{names[id(entry.job)]}/{entry.label}") for entry in found]


def job_names(jobs: Sequence[Job]) -> dict[int, str]:
    """Returns a name for each job (by id): its folder's name, with as much of the path as tells several apart."""
    folders = [job.folder.resolve() for job in jobs]
    if len(set(folders)) < 2:
        return {id(job): folder.name for job, folder in zip(jobs, folders)}
    above = os.path.commonpath(folders)
    return {id(job): os.path.relpath(folder, above) for job, folder in zip(jobs, folders)}
