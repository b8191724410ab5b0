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

Table = dict[str, Any]
Row = list[str]


def methods(told: Table) -> list[Row]:
    """One round of training by method: what the plan says, what the record says, what the line carried, and how long."""
    heads = ["down", "plan", "up", "plan", "on the wire, min", "plan, min", "whole round, min"]
    rows = [["method", "`wire.dtype`", "TCP", *heads]]
    for case in told["cases"]:
        if case["slow"]:
            rounds = _training(case)
            later, plan = rounds[-1], case["plan"]
            sizes = [(later[way], plan["later_round"][way]) for way in ("bytes_down", "bytes_up")]
            times = [later["wire_seconds"], plan["seconds"]["later_round"], later["seconds"]]
            shown = [words.size(x) for pair in sizes for x in pair]
            rows.append([*_case(case), *shown, *(f"{x / 60:.2f}" for x in times)])
    return rows


def runs(told: Table) -> list[Row]:
    """Whole runs: bytes in the record, in the plan and on the lines of all sites, and what crossed the server's loopback."""
    rows = [
        ["method", "`wire.dtype`", "line", "record", "plan", "plan / record", "lines", "lines / record", "loopback − lines"]
    ]
    for case in told["cases"]:
        record, plan, line = (sum(part.values()) for part in (case["record"], case["plan"]["all_sites"], case["link"]))
        name, dtype, tcp = _case(case)
        about = [name, dtype, tcp if case["slow"] else "none"]
        ratios = [f"{plan / record:.4f}", words.size(line), f"{line / record:.3f}", words.size(case["loopback"] - line)]
        rows.append([*about, words.size(record), words.size(plan), *ratios])
    return rows


def machine(told: Table) -> str:
    """When, where and with what it was measured."""
    about, line = told["provenance"], told["line"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    of = about["machine"]
    loads = [case["load"] for case in told["cases"]]
    commit = about["commit"][:10] + (" with changes" if about["changed_since"] else "")
    return (
        f"{about['date'][:10]}, {of['processor']}, {of['cores']} cores for the server and all sites, {of['platform']}, "
        f"{versions}, {about['nginx'].removeprefix('nginx version: ')}, commit {commit}. "
        f"Lines of {line['rate'] / 1e6:g} Mbit/s, {line['delay_ms']:g} ms and {100 * line['loss']:g} % loss in each direction, "
        f"made with {told['emulator']}. "
        f"Load while measuring {min(loads):.1f} to {max(loads):.1f}; one run each.\n"
    )


def _training(case: Table) -> list[Table]:
    return [line for line in case["rounds"] if line["phase"] == "train"]


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
