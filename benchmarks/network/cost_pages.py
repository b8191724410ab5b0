"""Writes the tables of docs/network-cost.md anew from results/cost.json; the text between them is written by hand.

python benchmarks/network/cost_pages.py     # rewrites what stands between <!-- table: … --> and <!-- end -->
"""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from umbel.report import words

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "network-cost.md"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

STAGES = ("fit", "evaluate", "adapter", "wire", "server", "record")
PROCESSES = ("ServerApp", "SuperLink", "nginx", "SuperNode", "worker", "ClientApp")

Table = dict[str, Any]
Row = list[str]


def overhead(told: Table) -> list[Row]:
    """A round of umbel beside Flower's echo of as many bytes."""
    heads = ["rounds", "umbel, s", "echo, s", "umbel − echo, s", "umbel / echo", "whole job: umbel, s", "echo, s"]
    rows = [["up per site", "down per site", *heads]]
    for case in told["sites"]["cases"]:
        own, echo = _rounds(case, "umbel"), _rounds(case, "echo")
        middle = statistics.median(own), statistics.median(echo)
        whole = [f"{statistics.median(turn[by]['seconds'] for turn in case['turns']):.0f}" for by in ("umbel", "echo")]
        more = f"{middle[0] - middle[1]:+.1f}".replace("-", "−")
        numbers = [_spread(own), _spread(echo), more, f"{middle[0] / middle[1]:.2f}"]
        down, up = case["turns"][0]["sizes"][-1]
        rows.append([words.size(up), words.size(down), str(len(own)), *numbers, *whole])
    return rows


def stages(told: Table) -> list[Row]:
    """Where umbel's own seconds of a round went, all sites' together, by the record."""
    rows = [["up per site", *STAGES, "sum"]]
    for case in told["sites"]["cases"]:
        lines = [line for turn in case["turns"] for line in turn["umbel"]["stages"]]
        middle = [statistics.median(line[stage] for line in lines) for stage in STAGES]
        rows.append([words.size(case["turns"][0]["sizes"][-1][1]), *(f"{x:.2f}" for x in middle), f"{sum(middle):.2f}"])
    return rows


def work(told: Table) -> list[Row]:
    """Seconds of processor time of a whole job, opening and end included, by process; all of a kind together."""
    rows = [["up per site", "", *PROCESSES, "sum"]]
    for case in told["sites"]["cases"]:
        size = words.size(case["turns"][0]["sizes"][-1][1])
        for by in ("umbel", "echo"):
            found = [statistics.median(turn[by]["cpu"].get(process, 0.0) for turn in case["turns"]) for process in PROCESSES]
            rows.append([size, by, *(f"{x:.1f}" for x in found), f"{sum(found):.1f}"])
    return rows


def processes(told: Table) -> list[Row]:
    """Peak memory of each process by payload; of several of a kind the largest."""
    cases = told["sites"]["cases"]
    sizes = [words.size(case["turns"][0]["sizes"][-1][1]) for case in cases]
    rows = [["process", *(f"{size} up" for size in sizes)]]
    for by, who in (("umbel", "umbel"), ("echo", "echo")):
        for process in PROCESSES:
            # What runs on from umbel's turn still has umbel's peak when it is the echo's.
            if by == "echo" and process not in ("ServerApp", "ClientApp"):
                continue
            found = [case["turns"][0][by]["memory"].get(process) for case in cases]
            rows.append([f"{process}, {who}", *map(words.size, found)])
    return rows


def server(told: Table) -> list[Row]:
    """By how much the server's process grew in a round, by the number of clients."""
    heads = ["one upload", "all uploads", "all uploads of one layer", "server grew by", "seconds"]
    rows = [["method", "`aggregation_error`", "clients", *heads]]
    for case in told["memory"]["cases"]:
        sizes = [words.size(case[key]) for key in ("upload", "uploads", "one_layer", "grown")]
        error = "measured" if case["error"] else "not"
        rows.append([f"`{case['method']}`", error, str(case["clients"]), *sizes, f"{case['seconds']:.1f}"])
    return rows


def simulated(told: Table) -> list[Row]:
    """A round by the number of simulated sites and the engine."""
    heads = ["first round, s", "later rounds, s", "per client, ms", "of it training, s", "whole job, s"]
    rows = [["model", "clients", "engine", *heads]]
    for case in told["simulated"]["cases"]:
        first, *later = case["rounds"]
        middle = statistics.median(later)
        fit = statistics.median(line["fit"] for line in case["stages"][1:])
        numbers = [f"{first:.2f}", _spread(later, 2), f"{1000 * middle / case['clients']:.0f}", f"{fit:.2f}"]
        rows.append([case["model"], str(case["clients"]), case["engine"], *numbers, f"{case['seconds']:.0f}"])
    return rows


def flower(told: Table) -> list[Row]:
    """The same work as Flower's LoRA examples do it."""
    heads = ["umbel, s", "Flower's pattern, s", "ratio", "umbel, s of work", "Flower's", "ratio"]
    heads += ["first loss", "theirs", "last loss", "theirs"]
    rows = [["model", "clients", "steps × rows", *heads]]
    for case in told["flower"]["cases"]:
        own, theirs = _rounds(case, "umbel"), _rounds(case, "flower")
        work = [[x for turn in case["turns"] for x in turn[by]["cpu"]] for by in ("umbel", "flower")]
        ratios = [f"{statistics.median(b) / statistics.median(a):.1f}" for a, b in ((own, theirs), (work[0], work[1]))]
        about = [case["model"], str(case["clients"]), f"{case['steps']} × {case['batch']}"]
        losses = [f"{case['turns'][0][by]['loss'][at]:.3f}" for at in (0, -1) for by in ("umbel", "flower")]
        spreads = [_spread(values, 2) for values in (own, theirs, *work)]
        rows.append([*about, *spreads[:2], ratios[0], *spreads[2:], ratios[1], *losses])
    return rows


def machine(told: Table) -> str:
    """When, where and with what each part was measured, and what else the machine did then."""
    lines = []
    for part, found in told.items():
        about, of = found["provenance"], found["provenance"]["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        around = list(_around(found["cases"]))
        busy, load = ([one[key] for one in around] for key in ("busy_cores", "load"))
        commit = about["commit"][:10] + (" with changes" if about["changed_since"] else "")
        lines.append(
            f"* {part}: {about['date'][:10]}, {of['processor']}, {of['cores']} cores, {words.size(of['memory_bytes'])} memory, "
            f"{of['platform']}, {versions}, commit {commit}. Other work on the machine just before each measurement: "
            f"{min(busy):.1f} to {max(busy):.1f} cores, median {statistics.median(busy):.1f} "
            f"(load {min(load):.1f} to {max(load):.1f})."
        )
    return "\n".join(lines) + "\n"


def _rounds(case: Table, by: str) -> list[float]:
    """Returns the seconds of every round of all turns; of Flower's pattern and what stands beside it without the first."""
    first = 1 if by == "flower" or "steps" in case else 0
    return [seconds for turn in case["turns"] for seconds in turn[by]["rounds"][first:]]


def _spread(values: list[float], digits: int = 1) -> str:
    """Returns the median, and the smallest and the largest where there are several."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def _around(found: Any) -> Any:
    """Yields every note of the machine's other work."""
    if isinstance(found, dict):
        if "busy_cores" in found:
            yield found
        for value in found.values():
            yield from _around(value)
    elif isinstance(found, list):
        for value in found:
            yield from _around(value)


KINDS: dict[str, Callable[[Table], list[Row] | str]] = {
    "overhead": overhead,
    "stages": stages,
    "work": work,
    "processes": processes,
    "server": server,
    "simulated": simulated,
    "flower": flower,
    "machine": machine,
}
NEEDED = {"overhead": "sites", "stages": "sites", "work": "sites", "processes": "sites", "server": "memory"}


def rendered(text: str, results: Path = HERE / "results") -> str:
    """Returns the page with every table as the result file of a folder has it."""
    file = results / "cost.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def block(match: re.Match[str]) -> str:
        if NEEDED.get(match[2], match[2]) not in {*told, *(["machine"] if told else [])}:
            return match[1] + "Not measured yet.\n" + match[3]
        made = KINDS[match[2]](told)
        return match[1] + (made if isinstance(made, str) else _markdown(made)) + match[3]

    return BLOCK.sub(block, text)


def _markdown(rows: list[Row]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
