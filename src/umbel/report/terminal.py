"""The closing table for the terminal."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from umbel.report import words
from umbel.report.closing import best, refusals, rows, sometimes
from umbel.report.jobs import Job, entries

if TYPE_CHECKING:
    from rich.table import Table


Column = tuple[str, Callable[[dict[str, Any]], str]]

OPTIONAL = ("error\nmean", "flexible\nmatch", "exact\nmatch", "\nserver", "\novrhd")
"""Columns that go, in this order, where the terminal is too narrow for all."""

LEGEND = (
    "own test: clients' models before aggregation, on their own rows; gap: that − score. "
    "error: ‖ΔW sent − weighted mean‖ / ‖weighted mean‖ over layers, last round. "
    "up, down: bytes per client. ovrhd: time not in fit or evaluate."
)


def table(jobs: Sequence[Job], width: int | None = None) -> "Table":
    """Returns the closing table; what does not fit is left to the page and to JSON.

    Args:
        jobs: What to show.
        width: Characters to fill; None asks the terminal.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    told = rows(jobs)
    labels = [row["label"] + _state(row) for row in told]
    width = width or Console().width
    columns = _fitting(told, width - min(max(map(_length, ["method", *labels])), width // 4))
    result = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, header_style="bold")
    result.add_column("\nmethod", overflow="fold", max_width=width // 4)
    for heading, _ in columns:
        result.add_column(heading, justify="right", no_wrap=True)
    for number, (label, row) in enumerate(zip(labels, told)):
        ends = row["kind"] == "method" and number + 1 < len(told) and told[number + 1]["kind"] != "method"
        style = "bold" if best(told, "score", row) else "dim" if row["kind"] != "method" else ""
        # Text, not str: a label may hold what rich would read as markup.
        result.add_row(Text(label), *(Text(show(row)) for _, show in columns), style=style, end_section=ends)
    lower = sorted({row["metric"] for row in told if row["lower_is_better"]})
    result.caption = LEGEND
    if any(row["personal_score"] is not None for row in told):
        result.caption += " personal: common and own parts together, on own test rows."
    if any(row["epsilon"] is not None for row in told):
        result.caption += " ε: spent by the client that spent most, per row of its own."
    result.caption += "".join(f" {metric}: lower is better." for metric in lower)
    for entry in entries(jobs):
        for run in entry.runs:
            for client, reason, left in refusals(run):
                result.caption += escape(f"\nleft out of {entry.label}: client {client}, rounds {words.rounds(left)}: {reason}")
    result.caption_justify = "left"
    return result


def _headed(name: str) -> str:
    """Two words on two lines, one word on the lower."""
    return name.replace(" ", "\n") if " " in name else f"\n{name}"


def _columns(metric: str, told: Sequence[dict[str, Any]]) -> list[Column]:
    """Returns (heading, row to text)."""
    return [
        (f"\n{metric}", lambda row: words.score(row["score"])),
        ("own\ntest", lambda row: words.score(row["local_score"])),
        ("\ngap", lambda row: words.difference(row["gap"])),
        *((_headed(name), lambda row, key=key: words.score(row[key])) for name, key in sometimes(told).items()),
        ("error\nmax", lambda row: words.error(row["error_max"])),
        ("error\nmean", lambda row: words.error(row["error_mean"])),
        *([("\nε", lambda row: words.epsilon(row["epsilon"]))] if any(row["epsilon"] is not None for row in told) else []),
        ("\nup", lambda row: words.size(row["bytes_up"])),
        ("\ndown", lambda row: words.size(row["bytes_down"])),
        ("\nserver", lambda row: words.duration(row["server_seconds"])),
        ("\nwall", lambda row: words.duration(row["wall_seconds"])),
        ("\novrhd", lambda row: words.share(row["overhead"])),
    ]


def _fitting(told: list[dict[str, Any]], room: int) -> list[Column]:
    """Returns the columns that fit into so many characters, with one between them."""
    columns = _columns("/".join(dict.fromkeys(row["metric"] for row in told)) or "score", told)
    for gone in OPTIONAL:
        if sum(1 + max(map(_length, [heading, *map(show, told)])) for heading, show in columns) <= room:
            break
        columns = [column for column in columns if column[0] != gone]
    return columns


def _length(text: str) -> int:
    return max(map(len, text.split("\n")))


def by_round(jobs: Sequence[Job], width: int | None = None) -> "Table":
    """Returns the table of scores after each round; where not all rounds fit, some between the first and the last.

    Args:
        jobs: What to show.
        width: Characters to fill; None asks the terminal.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    told = rows(jobs)
    name = max(map(len, ["after round", *(row["label"] for row in told)]))
    length = max((len(row["scores"]) for row in told), default=0)
    # Models that could do something before training (answers by likelihood, instructions) were scored then, too.
    started = any(row["score_start"] is not None for row in told)
    room = max(2, ((width or Console().width) - name) // 6 - started)
    shown = sorted({round(i * (length - 1) / max(1, min(room, length) - 1)) for i in range(min(room, length))})
    result = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, header_style="bold")
    result.add_column("after round", overflow="fold", max_width=name)
    if started:
        result.add_column("0", justify="right", no_wrap=True)
    for i in shown:
        result.add_column(str(i + 1), justify="right", no_wrap=True)
    for row in told:
        scores = [row["score_start"]] if started else []
        scores += [row["scores"][i] if i < len(row["scores"]) else None for i in shown]
        style = "dim" if row["kind"] != "method" else ""
        result.add_row(Text(row["label"]), *(words.score(x) for x in scores), style=style)
    return result


def _state(row: dict[str, Any]) -> str:
    """Returns what stands under the label of a run that is not done."""
    of = f" {row['rounds']}/{row['rounds_planned']}" if row["rounds_planned"] else ""
    return "" if row["state"] == "done" else f"\n{row['state']}{of}"
