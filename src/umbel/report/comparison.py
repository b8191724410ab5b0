"""A comparison read back: every run as a line, and every method as a mean over seeds with its difference to the first."""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umbel.report import words
from umbel.report.closing import errors, finite, rows, sometimes
from umbel.report.jobs import Job, ReportError, read_job

if TYPE_CHECKING:
    from rich.table import Table

STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Student's t, 0.975 quantile, for 1 to 30 degrees of freedom; beyond, the last is a little too wide."""

COLUMNS = (
    "label",
    "kind",
    "method",
    "seed",
    "state",
    "scored_on",
    "metric",
    "score",
    "exact_match",
    "exact_match_flexible",
    "pass_at_1",
    "difference",
    "own_test",
    "gap",
    "personal_score",
    "unseen_score",
    "error_worst",
    "bytes_up",
    "bytes_down",
    "rank",
    "options",
    "rounds",
    "wall_seconds",
    "folder",
)
"""Of comparison.csv."""


MEANS = ("gap", "personal_score", "unseen_score", "exact_match", "exact_match_flexible", "pass_at_1", "bytes_up", "bytes_down")


@dataclass(frozen=True)
class Comparison:
    """What `umbel compare` left in a folder.

    Args:
        folder: Where.
        about: `compare.json`.
        jobs: By seed, those that have begun.
    """

    folder: Path
    about: dict[str, Any]
    jobs: dict[int, Job]


def read_comparison(folder: Path) -> Comparison:
    """Reads a comparison's folder.

    Raises:
        ReportError: It holds none.
    """
    try:
        about = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        raise ReportError(f"{folder} holds no comparison; give a folder that `umbel compare` made") from None
    places = {seed: folder / f"seed-{seed}" for seed in about["seeds"]}
    return Comparison(folder, about, {seed: read_job(x) for seed, x in places.items() if (x / "job.json").exists()})


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and half the width of its 95 % confidence interval (Student's t); None for one value.

    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> mean, round(half, 4)
    (2.0, 2.4843)
    """
    mean, sd = spread(values)
    if sd is None:
        return mean, None
    return mean, STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * sd / math.sqrt(len(values))


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and the sample standard deviation, which one value does not have.

    >>> spread([1.0, 3.0]), spread([1.0])
    ((2.0, 1.4142135623730951), (1.0, None))
    """
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))


def runs(comparison: Comparison) -> list[dict[str, Any]]:
    """Returns one row per method and seed, then the baselines `local` and `central` likewise.

    Besides what `umbel.report.rows` says of a run, each row has `seed`, `method`, `rank`, `options` (what was chosen),
    `scored_on`, `error_worst` (over layers and rounds) and `difference` (score minus the reference's at the same seed). What
    is not done has no score.
    """
    told: list[dict[str, Any]] = []
    for seed, job in comparison.jobs.items():
        worst = {run.label: _worst([x for _, layers in errors(run) for x in layers.values()]) for run in job.methods}
        for row in rows([job]):
            own = comparison.about["methods"].get(row["label"], {})
            done = row["state"] == "done"
            told.append(
                {
                    **row,
                    "seed": seed,
                    "method": own.get("name", ""),
                    "rank": own.get("rank"),
                    "options": own.get("values", {}),
                    "scored_on": comparison.about["scored_on"],
                    "score": row["score"] if done else None,
                    "error_worst": worst.get(row["label"]),
                }
            )
    reference = {row["seed"]: row["score"] for row in told if row["label"] == comparison.about["reference"]}
    for row in told:
        known = row["score"], reference.get(row["seed"])
        row["difference"] = None if None in known else known[0] - known[1]
    order = [*comparison.about["methods"], "local", "central"]
    return sorted((x for x in told if x["label"] in order), key=lambda x: order.index(x["label"]))


def _worst(values: Sequence[float]) -> float | None:
    return max(values, key=lambda x: math.inf if math.isnan(x) else x) if values else None


def summary(comparison: Comparison) -> list[dict[str, Any]]:
    """Returns one row per method, then `local` and `central`: means over the seeds that are done.

    Each row has `label`, `kind`, `method`, `rank`, `options`, `seeds` (done), `seeds_planned`, `metric`, `lower_is_better`,
    `score`, `score_sd` (of the sample; None for one seed), `difference` (to the reference's, paired by seed; None for the
    reference), `difference_half` (half its 95 % interval), `scores` (by round), `own_test`, `gap`, `personal_score`,
    `unseen_score`, `exact_match`, `exact_match_flexible`, `pass_at_1`, `bytes_up`, `bytes_down` (per client, whole run),
    `error_worst` (over layers, rounds, seeds), and `failed`, a list of (seed, reason).
    """
    told = runs(comparison)
    labels = dict.fromkeys(row["label"] for row in told)
    return [_summed(comparison, [row for row in told if row["label"] == label]) for label in labels]


def _summed(comparison: Comparison, own: list[dict[str, Any]]) -> dict[str, Any]:
    first = own[0]
    done = [row for row in own if row["score"] is not None]
    score, sd = spread([row["score"] for row in done]) if done else (None, None)
    paired = [row["difference"] for row in own if row["difference"] is not None]
    difference, half = interval(paired) if paired and first["label"] != comparison.about["reference"] else (None, None)
    length = min((len(row["scores"]) for row in done), default=0)
    return {
        **{key: first[key] for key in ("label", "kind", "method", "rank", "options", "metric", "lower_is_better")},
        "seeds": [row["seed"] for row in done],
        "seeds_planned": len(comparison.about["seeds"]),
        "score": score,
        "score_sd": sd,
        "difference": difference,
        "difference_half": half,
        "scores": [_mean([row["scores"][r] for row in done]) for r in range(length)],
        "own_test": _mean([row["local_score"] for row in done]),
        **{key: _mean([row[key] for row in done]) for key in MEANS},
        "error_worst": _worst([row["error_worst"] for row in done if row["error_worst"] is not None]),
        "failed": [(row["seed"], row["error"]) for row in own if row["state"] == "failed"],
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known else None


def front(told: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the methods that no other beats at no more bytes, from the fewest bytes to the best score."""
    sign = -1 if any(row["lower_is_better"] for row in told) else 1
    points = [row for row in told if row["kind"] == "method" and row["score"] is not None and total_bytes(row)]
    result: list[dict[str, Any]] = []
    for row in sorted(points, key=lambda x: (total_bytes(x), -sign * x["score"])):
        if not result or sign * row["score"] > sign * result[-1]["score"]:
            result.append(row)
    return result


def total_bytes(row: dict[str, Any]) -> float:
    """Returns what a client sends and receives in a whole run."""
    return (row["bytes_up"] or 0.0) + (row["bytes_down"] or 0.0)


def rank_notes(about: dict[str, Any]) -> list[str]:
    """Returns sentences on what was held equal, and the ranks that follow from it."""
    unit = " bytes" if about["equal"] == "bytes" else ""
    result = equal_notes(about)
    for label, rank, count, over in ranks_chosen(about):
        result.append(f"{label}: rank {rank} ({count:,.0f}{unit}{', more than that even at rank 1' if over else ''})")
    return result


def ranks_chosen(about: dict[str, Any]) -> list[tuple[str, int, float, bool]]:
    """Returns (label, rank, what is counted at it, whether that is too much), where ranks were chosen by a formula."""
    own = about["methods"].items() if about["equal"] != "rank" else ()
    return [(label, x["rank"], x["count"], x["over"]) for label, x in own]


def equal_notes(about: dict[str, Any]) -> list[str]:
    """Returns sentences on what was held equal."""
    if about["equal"] == "rank":
        return ["Held equal: the rank, as the file gives it."]
    what, unit = {
        "parameters": ("numbers of factors that a client trains (mean over rounds)", ""),
        "bytes": ("factors that a client sends and receives over the whole run", " bytes"),
    }[about["equal"]]
    budget = f"{about['budget']:,.0f}{unit}"
    result = [f"Held equal: {what}, at most FedIT’s at rank {about['budget_rank']}, {budget}. Heads are not counted."]
    if about["equal"] == "bytes":
        result.append("Counted with invented clients: where a method’s rank depends on the data, it sends at most this.")
    return result


def choice_notes(about: dict[str, Any]) -> list[str]:
    """Returns sentences on how hyper-parameters were chosen."""
    if about["chosen_on"] is None:
        where = "validation" if about["scored_on"] == "validation" else "test"
        return [f"Nothing was chosen here: hyper-parameters are the file’s. Scores are on {where} rows."]
    share, seed = words.share(about["chosen_on"]["validation"]), about["chosen_on"]["seed"]
    result = [
        f"Hyper-parameters were chosen on validation rows ({share} of the training rows, seed {seed}); scores are on test "
        f"rows, on which nothing was chosen. local and central take {about['reference']}’s."
    ]
    for label, own in about["methods"].items():
        if own["candidates"]:
            failed = sum(x["state"] == "failed" for x in own["candidates"])
            of = words.count(len(own["candidates"]), "candidate") + (f", {failed} failed" if failed else "")
            result.append(f"{label}: {options(own['values'])} (of {of})")
    return result


def options(values: dict[str, Any]) -> str:
    """
    >>> options({"training.learning_rate": 1e-3, "energy": 0.9})
    'learning_rate 0.001, energy 0.9'
    """
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in values.items())


def seed_notes(comparison: Comparison) -> list[str]:
    """Returns sentences on seeds and intervals, and on what is not done."""
    about = comparison.about
    seeds, reference = ", ".join(map(str, about["seeds"])), about["reference"]
    result = [
        f"Mean ± sample standard deviation over the seeds {seeds}. Difference to {reference}: paired by seed, 95 % interval of "
        "Student’s t in brackets; it covers what varies from seed to seed, not which test rows there happen to be."
    ]
    if len(about["seeds"]) == 1:
        result = [f"One seed ({seeds}): no standard deviation and no interval; a difference may be chance."]
    if about["methods"][reference]["name"] != "fedit":
        result.append(f"FedIT is not among the methods: differences are to the first, {reference}.")
    for row in summary(comparison):
        result += [f"{row['label']} failed at seed {seed}: {reason}" for seed, reason in row["failed"]]
    return result


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Returns the table, every run, and what was chosen and held equal, as plain JSON values."""
    said = [*rank_notes(comparison.about), *choice_notes(comparison.about), *seed_notes(comparison)]
    return finite(
        {
            **comparison.about,
            "rows": summary(comparison),
            "front": [row["label"] for row in front(summary(comparison))],
            "runs": runs(comparison),
            "notes": said,
        }
    )


def comparison_csv(comparison: Comparison) -> str:
    """Returns one line per method and seed, with the columns `COLUMNS`; what is not known is empty."""
    target = io.StringIO()
    writer = csv.DictWriter(target, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in runs(comparison):
        values = {**row, "own_test": row["local_score"], "options": json.dumps(row["options"])}
        values["folder"] = f"seed-{row['seed']}/{row['label']}"
        writer.writerow({key: "" if values[key] is None else values[key] for key in COLUMNS})
    return target.getvalue()


def plus_minus(row: dict[str, Any]) -> str:
    """
    >>> plus_minus({"score": 0.5, "score_sd": 0.01}), plus_minus({"score": None, "score_sd": None})
    ('0.500 ± 0.010', '–')
    """
    return words.score(row["score"]) + ("" if row["score_sd"] is None else f" ± {words.score(row['score_sd'])}")


def bracketed(row: dict[str, Any]) -> str:
    """
    >>> bracketed({"difference": 0.02, "difference_half": 0.05})
    '+0.020 [−0.030, +0.070]'
    """
    mean, half = row["difference"], row["difference_half"]
    if mean is None or half is None:
        return words.difference(mean)
    return f"{words.difference(mean)} [{words.difference(mean - half)}, {words.difference(mean + half)}]"


def partial_columns(told: Sequence[dict[str, Any]]) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    """Returns (heading, row to text) of scores that only some tasks, methods and splits have, where any row has them."""
    return [(name, lambda row, key=key: words.score(row[key])) for name, key in sometimes(told).items()]


def comparison_table(comparison: Comparison, width: int | None = None) -> "Table":
    """Returns the table for the terminal; where it is too narrow, the first columns of `OPTIONAL` go first.

    Args:
        comparison: What to show.
        width: Characters to fill; None asks the terminal.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    told = summary(comparison)
    metric = told[0]["metric"] + (" ↓" if told[0]["lower_is_better"] else "") if told else "score"
    columns = [
        (metric, plus_minus),
        (f"vs {words.cut(comparison.about['reference'], 12)}", bracketed),
        ("up", lambda row: words.size(row["bytes_up"])),
        ("down", lambda row: words.size(row["bytes_down"])),
        ("worst\nerror", lambda row: words.error(row["error_worst"])),
        ("rank", lambda row: words.MISSING if row["rank"] is None else str(row["rank"])),
        ("own\ntest", lambda row: words.score(row["own_test"])),
        ("gap", lambda row: words.difference(row["gap"])),
        *partial_columns(told),
        ("seeds", lambda row: f"{len(row['seeds'])}/{row['seeds_planned']}"),
    ]
    width = width or Console().width
    name = min(max([6, *(len(row["label"]) for row in told)]), width // 4)
    left: list[str] = []
    for gone in OPTIONAL:
        shown = [max(map(len, [*heading.split("\n"), *map(show, told)])) for heading, show in columns]
        if name + sum(1 + x for x in shown) <= width:
            break
        left += [gone.replace("\n", " ") for heading, _ in columns if heading == gone]
        columns = [column for column in columns if column[0] != gone]
    result = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, header_style="bold")
    result.add_column("method", overflow="fold", max_width=width // 4, vertical="bottom")
    for heading, _ in columns:
        result.add_column(heading, justify="right", no_wrap=True)
    for number, row in enumerate(told):
        ends = row["kind"] == "method" and number + 1 < len(told) and told[number + 1]["kind"] != "method"
        style = "dim" if row["kind"] != "method" else ""
        result.add_row(Text(row["label"]), *(Text(show(row)) for _, show in columns), style=style, end_section=ends)
    said = [*choice_notes(comparison.about), *seed_notes(comparison)]
    said.append("up, down: bytes per client, whole run. worst error: of aggregation, over layers, rounds and seeds.")
    configs = [run.config for job in comparison.jobs.values() for run in job.methods]
    said += [f"Hidden in each run: {x}." for x in dict.fromkeys(words.hidden(c.get("privacy") or {}) for c in configs) if x]
    if left:
        said.append(f"Left out for want of width: {', '.join(left)}; the page, the CSV and --json have them.")
    result.caption = escape("\n".join(said))
    result.caption_justify = "left"
    return result


OPTIONAL = ("gap", "own\ntest", "seeds", "flexible match", "personal", "unseen", "rank", "worst\nerror", "down", "up")
"""Columns that go, in this order, where the terminal is too narrow for all."""
