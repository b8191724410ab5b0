"""Writes the tables of docs/network.md anew from results/netem.json; the text between them is written by hand.

python benchmarks/network/pages.py          # rewrites what stands between <!-- table: … --> and <!-- end -->
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from umbel.report import words

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "network.md"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

WAYS = ("bytes_down", "bytes_up")

Table = dict[str, Any]
Row = list[str]


def methods(told: Table) -> list[Row]:
    """The last round of training by method: what the record says, what the plan said, and how long it took."""
    heads = ["down", "plan", "up", "plan", "on the wire, min", "plan, min", "whole round, min"]
    rows = [["method", "`wire.dtype`", "TCP", *heads]]
    for case in told["cases"]:
        if case["slow"]:
            last, plan = [line for line in case["rounds"] if line["phase"] == "train"][-1], case["plan"]
            down, up = ([words.size(last[way]), _most(plan, way) + words.size(plan["later_round"][way])] for way in WAYS)
            most = "≤ " if plan["at_most"] else ""
            times = [f"{last['wire_seconds'] / 60:.2f}", most + f"{plan['seconds']['later_round'] / 60:.2f}"]
            rows.append([*_case(case), *down, *up, *times, f"{last['seconds'] / 60:.2f}"])
    return rows


def runs(told: Table) -> list[Row]:
    """Whole runs of all sites: bytes in record and plan, on the lines, and between the parts of the server."""
    heads = [
        "record",
        "plan",
        "plan / record",
        "lines",
        "lines / record",
        "server's loopback − record",
        "each download once + uploads",
    ]
    rows = [["method", "`wire.dtype`", "line", *heads, "whole run, min"]]
    for case in told["cases"]:
        record, plan, line = (sum(part.values()) for part in (case["record"], case["plan"]["all_sites"], case["link"]))
        once = sum(one["bytes_down"] for one in case["rounds"]) + case["record"]["bytes_up"]
        name, dtype, tcp = _case(case)
        most = "≤ " if case["plan"]["at_most"] else ""
        planned = [most + words.size(plan), most + f"{plan / record:.4f}"]
        inside = [words.size(case["loopback"] - record), words.size(once)]
        minutes = sum(one["seconds"] for one in case["rounds"]) / 60
        about = [name, dtype, tcp if case["slow"] else "none"]
        rows.append([*about, words.size(record), *planned, words.size(line), f"{line / record:.3f}", *inside, f"{minutes:.2f}"])
    return rows


def machine(told: Table) -> str:
    """When, where and with what it was measured."""
    about, line = told["provenance"], told["line"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    of = about["machine"]
    loads = [case["load"] for case in told["cases"]]
    dates, commits = (sorted({case[key][:10] for case in told["cases"]}) for key in ("date", "commit"))
    return (
        f"{', '.join(dates)}, {of['processor']}, {of['cores']} cores for the server and all sites, {of['platform']}, "
        f"{versions}, {about['nginx'].removeprefix('nginx version: ')}, commit {', '.join(commits)}. "
        f"Lines of {line['rate'] / 1e6:g} Mbit/s, {line['delay_ms']:g} ms and {100 * line['loss']:g} % loss in each direction, "
        f"made with {told['emulator']}. "
        f"Load while measuring {min(loads):.1f} to {max(loads):.1f}; one run each.\n"
    )


def _most(plan: Table, way: str) -> str:
    return "≤ " if way in plan["at_most"] else ""


def _case(case: Table) -> Row:
    return [f"`{case['method']}`", case["dtype"], case["tcp"]]


KINDS: dict[str, Callable[[Table], list[Row] | str]] = {"methods": methods, "runs": runs, "machine": machine}


def rendered(text: str, results: Path = HERE / "results") -> str:
    """Returns the page with every table as the result file of a folder has it."""
    told = json.loads((results / "netem.json").read_text(encoding="utf-8"))

    def block(match: re.Match[str]) -> str:
        made = KINDS[match[2]](told)
        return match[1] + (made if isinstance(made, str) else _markdown(made)) + match[3]

    return BLOCK.sub(block, text)


def _markdown(rows: list[Row]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
