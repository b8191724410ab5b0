"""Writes the tables of docs/performance.md anew from the result files; the text between them is written by hand.

    python benchmarks/merge/pages.py          # rewrites what stands between <!-- table: … --> and <!-- end -->

A marker names a kind of table: `<!-- table: florist -->`. A table whose results are not there says so.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from umbel.report import words

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "performance.md"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Table = dict[str, Any]
Row = list[str]


def florist(tables: Table) -> list[Row]:
    """FLoRIST beside the paper's route, the dense one and the products alone."""
    timed = ["umbel, ms", "two SVDs, ms", "ratio", "dense, ms", "ratio", "products, ms", "umbel / products"]
    rows = [["layer", "clients", "kind", "τ", *timed, "rank", "theirs", "error", "theirs"]]
    for case, found in _kernels(tables):
        for tau in ("0.9", "1", "1, merge"):
            own, paper = found[f"florist τ {tau}"], found.get(f"two SVDs, τ {tau.removesuffix(', merge')}", {})
            dense, floor = found.get("FlexLoRA, dense", {}), found[f"products of florist τ {tau}"]
            times = [_ms(own), _ms(paper), _ratio(paper, own), _ms(dense), _ratio(dense, own), _ms(floor), _ratio(own, floor)]
            equal = [_rank(own), _rank(paper), words.error(own["error"]), words.error(paper.get("error"))]
            rows.append([*_case(case), tau, *times, *equal])
    return rows


def flora_na(tables: Table) -> list[Row]:
    """FLoRA-NA beside Adam and the Gram products alone."""
    timed = ["umbel, ms", "Adam, ms", "ratio", "steps", "products, ms", "umbel / products"]
    rows = [["layer", "clients", "kind", *timed, "error", "Adam's", "FedIT's"]]
    for case, found in _kernels(tables):
        own, adam, floor = found["flora_na"], found.get("Adam, dense", {}), found["products of flora_na"]
        steps = adam.get("note", words.MISSING).removesuffix(" steps")
        errors = [_error(row) for row in (own, adam, found["fedit"])]
        times = [_ms(own), _ms(adam), _ratio(adam, own), steps, _ms(floor), _ratio(own, floor)]
        rows.append([*_case(case), *times, *errors])
    return rows


def others(tables: Table) -> list[Row]:
    """PEFT and the dense route, each beside umbel's method that makes the same or better."""
    rows = [["layer", "clients", "kind", "instead of umbel", "ms", "umbel", "ms", "ratio", "error", "umbel's"]]
    for case, found in _kernels(tables):
        for name in ("PEFT linear", "PEFT cat", "PEFT svd", "FlexLoRA, dense"):
            if name in found:
                row, own = found[name], found[found[name]["beside"]]
                rows.append(
                    [*_case(case), name, _ms(row), f"`{own['name']}`", _ms(own), _ratio(row, own), _error(row), _error(own)]
                )
    return rows


def commands(tables: Table) -> list[Row]:
    """The whole command, with the check of its result and without, beside reading and writing alone."""
    stages = ["reading", "computing", "checking", "writing"]
    floors = ["read alone", "write alone", "merge / both"]
    rows = [
        ["model", "clients", "method", "check", "wall, s", "merge", *stages, *floors, "in", "out", "mean rank", "worst error"]
    ]
    for case in _cases(tables, "commands"):
        for row in case["rows"]:
            about = [case["model"], f"{case['clients']:,}", f"`{row['method']}`", "yes" if row["checked"] else "no"]
            if "failed" in row:
                rows.append([*about, row["failed"], *[words.MISSING] * 12])
                continue
            floor = case["read_seconds"] + row["write_seconds"]
            spent = [row["stages"].get(stage) for stage in stages]
            alone = [case["read_seconds"], row["write_seconds"]]
            times = [
                *map(_seconds, [row["seconds"], row["stages"]["total"], *spent, *alone]),
                f"{row['stages']['total'] / floor:.1f}",
            ]
            result = [
                words.size(case["bytes_in"]),
                words.size(row["bytes_out"]),
                f"{row['rank']:.4g}",
                words.error(row["error_worst"]),
            ]
            rows.append([*about, *times, *result])
    return rows


def fedit(tables: Table) -> list[Row]:
    """FedIT without the check against reading and writing alone, from a warm and from a cold page cache."""
    rows = [["layers", "clients", "in", "cache", "read alone, s", "write alone, s", "merge, s", "merge / both"]]
    for case in _first(tables):
        row = next((row for row in case["rows"] if row["method"] == "fedit" and not row["checked"] and "cold" in row), None)
        if row is None:
            continue
        about = [str(case["layers"]), f"{case['clients']:,}", words.size(case["bytes_in"])]
        warm = (case["read_seconds"], row["write_seconds"], row["stages"]["total"])
        cold = (row["cold"]["read_seconds"], row["cold"]["write_seconds"], row["cold"]["merge_seconds"])
        for cache, (read, write, merge) in (("warm", warm), ("cold", cold)):
            rows.append([*about, cache, *(f"{x:.3f}" for x in (read, write, merge)), f"{merge / (read + write):.2f}"])
    return rows


def memory(tables: Table) -> list[Row]:
    """Peak memory of the whole command by the number of clients, for the model of few layers that all numbers were run on."""
    named = [case["model"] for case in _cases(tables, "commands") if case["clients"] == 1000]
    cases = [case for case in _cases(tables, "commands") if named and case["model"] == named[-1]]
    rows = [["method", "check", *(f"{case['clients']:,} clients" for case in cases), "1,000 / 10"]]
    found = {(case["clients"], row["method"], row["checked"]): row.get("peak_bytes") for case in cases for row in case["rows"]}
    for method, checked in dict.fromkeys((method, checked) for _, method, checked in found):
        peaks = [found.get((case["clients"], method, checked)) for case in cases]
        few, most = (found.get((K, method, checked)) for K in (10, 1000))
        ratio = f"{most / few:.2f}" if few and most else words.MISSING
        rows.append([f"`{method}`", "yes" if checked else "no", *map(words.size, peaks), ratio])
    if not cases:
        return rows
    rows.append(["importing alone", words.MISSING, *(words.size(case["start"]["peak_bytes"]) for case in cases), words.MISSING])
    return rows


def extrapolated(tables: Table) -> list[Row]:
    """The whole command, measured, beside what other routes would compute: one layer's time by the number of layers."""
    rivals = ["two SVDs, τ 0.9", "two SVDs, τ 1", "Adam, dense", "FlexLoRA, dense", "PEFT svd", "PEFT cat", "PEFT linear"]
    rows = [["clients", "instead of umbel", "one layer × layers, s", "umbel", "whole command, s", "ratio"]]
    # Cases of one shape come first, and the first model's layers have it.
    kernels = {(case["clients"], case["kind"]): found for case, found in reversed(list(_kernels(tables)))}
    for case in _first(tables):
        found = kernels.get((case["clients"], case["kind"]), {})
        own = {row["method"]: row for row in case["rows"] if not row["checked"] and "failed" not in row}
        for name in rivals:
            if name in found and found[name]["beside"] in own:
                label, seconds = found[name]["beside"], found[name]["seconds"] * case["layers"]
                whole = own[label]["seconds"]
                times = [_seconds(seconds), f"`{label}`", _seconds(whole), f"{seconds / whole:.1f}"]
                rows.append([f"{case['clients']:,}", name, *times])
    return rows


def machine(tables: Table) -> str:
    """When, where and with what each part was measured."""
    lines: list[str] = []
    for part, told in tables.items():
        about = told["provenance"]
        of = about["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        commit = (about["commit"] or "unknown")[:10] + (" with changes" if about["changed_since"] else "")
        lines.append(
            f"* {part}: {about['date'][:10]}, {of['processor']}, {of['cores']} cores, {about['threads']} threads, "
            f"{words.size(of['memory_bytes'])} memory, {versions}; umbel {about['umbel']}, commit {commit}; "
            f"median of {about['repeats']}; load when it began {of['load']:.2f}."
        )
    return "\n".join(lines) + "\n"


def _cases(tables: Table, part: str) -> list[Table]:
    return tables[part]["cases"] if part in tables else []


def _first(tables: Table) -> list[Table]:
    cases = _cases(tables, "commands")
    return [case for case in cases if case["model"] == cases[0]["model"]]


def _kernels(tables: Table) -> Iterator[tuple[Table, dict[str, Table]]]:
    for case in _cases(tables, "kernels"):
        yield case, {row["name"]: row for row in case["rows"]}


def _case(case: Table) -> Row:
    return [" × ".join(map(str, case["shape"])), f"{case['clients']:,}", case["kind"]]


def _ms(row: Table) -> str:
    """Returns milliseconds with three digits."""
    if "seconds" not in row:
        return words.MISSING
    value = row["seconds"] * 1000
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def _seconds(value: float | None) -> str:
    return words.MISSING if value is None else f"{value:.2f}" if value < 99.995 else f"{value:,.0f}"


def _ratio(slow: Table, fast: Table) -> str:
    return f"{slow['seconds'] / fast['seconds']:.1f}" if "seconds" in slow and "seconds" in fast else words.MISSING


def _rank(row: Table) -> str:
    return str(row.get("rank", words.MISSING))


def _error(row: Table) -> str:
    """Returns an error with the digits that tell nearly equal ones apart."""
    return words.MISSING if row.get("error") is None else f"{row['error']:.3e}"


KINDS: dict[str, Callable[[Table], list[Row] | str]] = {
    "florist": florist,
    "flora_na": flora_na,
    "others": others,
    "commands": commands,
    "fedit": fedit,
    "memory": memory,
    "extrapolated": extrapolated,
    "machine": machine,
}
NEEDED = {
    "commands": ["commands"],
    "fedit": ["commands"],
    "memory": ["commands"],
    "extrapolated": ["kernels", "commands"],
    "machine": [],
}


def rendered(text: str, results: Path = HERE / "results") -> str:
    """Returns the page with every table as the result files of a folder have it."""
    files = [results / f"{part}.json" for part in ("kernels", "commands")]
    tables = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()}

    def block(match: re.Match[str]) -> str:
        missing = [part for part in NEEDED.get(match[2], ["kernels"]) if part not in tables]
        if missing or not tables:
            return match[1] + "Not measured yet.\n" + match[3]
        made = KINDS[match[2]](tables)
        return match[1] + (made if isinstance(made, str) else markdown(made)) + match[3]

    return BLOCK.sub(block, text)


def markdown(rows: list[Row]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
