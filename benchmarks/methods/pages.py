"""Writes the tables of docs/results.md and docs/methods/power.md anew from the result files; the text is written by hand.

    python benchmarks/methods/pages.py          # rewrites what stands between <!-- table: … --> and <!-- end -->

A marker names a result file and a kind of table: `<!-- table: clinc150 methods -->`.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from umbel.report import words
from umbel.report.comparison import bracketed, plus_minus

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
PAGES = (DOCS / "results.md", DOCS / "methods" / "power.md")
BLOCK = re.compile(r"(<!-- table: (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Table = dict[str, Any]


def methods(told: Table) -> str:
    """Score, difference to FedIT, bytes, errors and gap of every method."""
    rows = [["method", "rank", "score", "against FedIT", "own test", "gap", "up", "down", "worst error", "chosen"]]
    for row in sorted(told["rows"], key=lambda x: (x["kind"] != "method", -x["score"])):
        chosen = ", ".join(f"{value}" for value in row["options"].values())
        numbers = [plus_minus(row), bracketed(row), words.score(row["own_test"]), words.difference(row["gap"])]
        cost = [words.size(row["bytes_up"]), words.size(row["bytes_down"]), words.error(row["error_worst"])]
        rows.append([f"`{row['label']}`", _rank(row["rank"]), *numbers, *cost, chosen or words.MISSING])
    return markdown(rows)


def curve(told: Table) -> str:
    """The same without what is fixed, in the file's order."""
    rows = [["run", "score", "against FedIT", "up", "down", "worst error", "mean rank sent"]]
    for row in told["rows"]:
        ranks = [x for e in told["errors"] if e["label"] == row["label"] for x in e["rank"] if x is not None]
        sent = f"{sum(ranks) / len(ranks):.1f}" if ranks and row["kind"] == "method" else words.MISSING
        cost = [words.size(row["bytes_up"]), words.size(row["bytes_down"]), words.error(row["error_worst"])]
        rows.append([f"`{row['label']}`", plus_minus(row), bracketed(row), *cost, sent])
    return markdown(rows)


def generated(told: Table) -> str:
    """Loss before and after, and what was solved of the rows that were generated for."""
    rows = [["run", "test loss before", "after", "exact match", "flexible", "up", "down"]]
    for row in told["rows"]:
        began = next((x["score_start"] for x in told["runs"] if x["label"] == row["label"]), None)
        numbers = [began, row["score"], row["exact_match"], row["exact_match_flexible"]]
        rows.append(
            [f"`{row['label']}`", *map(words.score, numbers), words.size(row["bytes_up"]), words.size(row["bytes_down"])]
        )
    return markdown(rows)


def divergence(told: Table) -> str:
    """Errors against both targets, mean over layers, rounds and seeds."""
    rows = [["method", "to the weighted mean", "to the sum over clients"]]
    for row in told["rows"]:
        own = [e for e in told["errors"] if e["label"] == row["label"]]
        found = [[x for e in own for x in e[key] if x is not None] for key in ("to_mean", "to_sum")]
        if all(found):
            rows.append([f"`{row['label']}`", *(words.error(sum(x) / len(x)) for x in found)])
    return markdown(rows)


def order(told: Table) -> str:
    """Errors on the same uploads, mean over layers, by round."""
    names = list(told["rounds"][0]["to_mean"])
    rows = [["", *(f"round {n}" for n, _ in enumerate(told["rounds"], 1))]]
    for target, said in (("to_mean", "to the mean"), ("to_sum", "to the sum")):
        for name in names:
            values = [list(x[target][name].values()) for x in told["rounds"]]
            rows.append([f"`{name}`, {said}", *(words.error(sum(x) / len(x)) for x in values)])
    return markdown(rows)


def warm(told: Table) -> str:
    """Errors of several rules on the same uploads, mean over layers, by scenario and round."""
    names = list(next(iter(told["scenarios"].values()))["rounds"][0])
    rows = [["clients", "round", *names]]
    for said, own in told["scenarios"].items():
        for number, found in enumerate(own["rounds"], 1):
            values = [found.get(name) for name in names]
            cells = [x["mean"] if isinstance(x, dict) else x for x in values]
            rows.append([said, str(number), *(words.MISSING if x is None else f"{x:.4f}" for x in cells)])
    return markdown(rows)


def machine(told: Table) -> str:
    """Where it was made."""
    about = told.get("provenance", told)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    of = about["machine"]
    data = ", ".join(f"{name} {value[:12]}…" for name, value in about["data"].items() if name in ("train", "test"))
    return (
        f"{of['cores']} cores ({of['processor']}), {of['threads']} thread(s), {versions}; umbel {about['umbel']}; "
        f"model {about['model']['sha256'][:12]}…, data {data} (sha256).\n"
    )


def _rank(value: Any) -> str:
    return words.MISSING if value is None else str(value)


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


KINDS: dict[str, Callable[[Table], str]] = {
    "methods": methods,
    "curve": curve,
    "generated": generated,
    "divergence": divergence,
    "order": order,
    "warm": warm,
    "machine": machine,
}


def rendered(text: str) -> str:
    """Returns the page with every table as the result files have it."""

    def block(match: re.Match[str]) -> str:
        told = json.loads((HERE / "results" / f"{match[2]}.json").read_text(encoding="utf-8"))
        return match[1] + KINDS[match[3]](told) + match[4]

    return BLOCK.sub(block, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")
