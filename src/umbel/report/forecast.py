"""The table of `umbel plan`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from umbel.report import words

if TYPE_CHECKING:
    from rich.console import Group

LEGEND = (
    "down, up: bytes of the site that carries most; round 1 and the mean of later rounds of training, besides: opening, "
    "measuring, gathering. ≤: depends on what clients learn, at most so much."
)
MEMORY = (
    "site: weights, adapter, gradients, optimizer, activations (rough: one batch as long as data.max_length), messages. "
    "server: what it keeps of a round's uploads; scoring the common model takes as much as a site's weights on top."
)
TIMES = (
    "times: bytes over the link and nothing else, no latency; a site over its own link, all sites over one link of that speed."
)


OPTIONAL = (
    *("\nsite\ndisk", "\nround 1\ndown", "\nround 1\nup", "\nbesides\ndown", "\nbesides\nup"),
    *("site's\nlink,\na round", "\nserver\nkeeps", "\nsite\nmemory"),
)
"""Columns that go, in this order, where the terminal is too narrow for all."""


def forecast_table(told: Mapping[str, Any], width: int | None = None) -> "Group":
    """Returns the tables of `umbel plan`: layers, then a row for each method.

    Args:
        told: What `umbel.planning.plan` returns.
        width: Characters to fill; None asks the terminal.
    """
    from rich import box
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

    def new(*headings: str) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, header_style="bold")
        for index, heading in enumerate(headings):
            table.add_column(heading, justify="right" if index else "left", no_wrap=index > 0, overflow="fold")
        return table

    layers = new("layers", "shape", "rank")
    for kind in told["layers"]:
        layers.add_row(
            Text(f"{kind['layers']} × like {kind['example']}"), f"{kind['d_out']} × {kind['d_in']}", _span(kind["ranks"])
        )
    for name, shape in told["plain"].items():
        layers.add_row(Text(name), " × ".join(map(str, shape)), "whole")
    shown = [entry for entry in told["methods"] if entry["reason"] is None]
    columns, left_out = _fitting(told, shown, (width or Console().width) - max([6, *(len(entry["label"]) for entry in shown)]))
    table = new("\n\nmethod", *(heading for heading, _ in columns))
    for index, entry in enumerate(shown):
        last = entry["in_file"] and index + 1 < len(shown) and not shown[index + 1]["in_file"]
        cells = [cell(entry) for _, cell in columns]
        table.add_row(Text(entry["label"]), *cells, style="" if entry["in_file"] else "dim", end_section=last)
    away = [f"{entry['label']}: {entry['reason']}" for entry in told["methods"] if entry["reason"] is not None]
    legend = [LEGEND, MEMORY, *([TIMES] if told["link_bits_per_second"] else [])]
    if left_out:
        legend.append(f"Left out for want of width: {', '.join(left_out)}; --json has them.")
    return Group(
        Text(_headline(told)),
        layers,
        Text(),
        table,
        Text("\n".join(legend), style="dim"),
        *(Text(f"cannot run: {line}", style="dim") for line in away),
        *(Text(f"note: {note}") for note in told["notes"]),
    )


def _site_memory(entry: Mapping[str, Any]) -> str:
    site = entry["memory"]["site"]
    return ("> " if site["activations"] is None else "") + words.size(site["total"])


def _headline(told: Mapping[str, Any]) -> str:
    model, numbers = told["model"], sorted(set(told["adapter_parameters"].values()))
    asked = told["clients_per_round"]
    some = f", {asked} in each round" if asked < told["clients"] else ""
    link = told["link_bits_per_second"]
    return (
        f"{model['name']}: {model['parameters']:,} parameters in {model['dtype']}; a client trains {_span(numbers)} besides.\n"
        f"{words.count(told['clients'], 'client')}{some}, {words.count(told['rounds'], 'round')}, {told['wire']} on the wire"
        + (f", {link / 1e6:g} Mbit/s.\n" if link else ".\n")
    )


def _span(numbers: list[int]) -> str:
    return f"{numbers[0]:,}" if len(numbers) == 1 else f"{numbers[0]:,} to {numbers[-1]:,}"


def _fitting(told: Mapping[str, Any], shown: list[dict[str, Any]], room: int) -> tuple[list[tuple[str, Any]], list[str]]:
    """Returns the columns that fit into so many characters, with one between them, and the headings of the others."""

    def sizes(key: str, way: str) -> Any:
        fixed = key == "besides" or (key, way) == ("first_round", "bytes_down")
        return lambda entry: ("≤ " if way in entry["at_most"] and not fixed else "") + words.size(entry[key][way])

    columns: list[tuple[str, Any]] = []
    for heading, key in (("round 1", "first_round"), ("later", "later_round"), ("besides", "besides"), ("whole run", "run")):
        columns += [(f"\n{heading}\n{way}", sizes(key, f"bytes_{way}")) for way in ("down", "up")]
    columns += [
        ("\nsite\nmemory", _site_memory),
        ("\nserver\nkeeps", lambda entry: words.size(entry["memory"]["server"]["kept"])),
        ("\nsite\ndisk", lambda entry: words.size(sum(entry["memory"]["disk"].values()))),
    ]
    if told["link_bits_per_second"]:
        columns += [
            ("site's\nlink,\na round", lambda entry: words.duration(entry["seconds"]["later_round"])),
            ("\n\nrun", lambda entry: words.duration(entry["seconds"]["run"])),
            ("one link\nfor all,\nrun", lambda entry: words.duration(entry["seconds"]["server_run"])),
        ]
    left_out: list[str] = []
    for gone in OPTIONAL:
        if sum(1 + max(len(part) for part in [*head.split("\n"), *map(cell, shown)]) for head, cell in columns) <= room:
            break
        left_out += [" ".join(gone.split()) for heading, _ in columns if heading == gone]
        columns = [column for column in columns if column[0] != gone]
    return columns, left_out
