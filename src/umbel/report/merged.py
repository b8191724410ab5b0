"""Tables of `umbel merge`: what came out, layer by layer, and what would."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from umbel.report import words

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

MOST_ROWS = 40
"""With more layers the table has one row for all layers of a name, and the worst layers; merge.json has all."""

WORST = 5


def merged_table(report: Mapping[str, Any]) -> "Group":
    """Returns the closing table of a merge: per layer error, rank and energy; below it totals.

    Args:
        report: What `umbel.merge` returns.
    """
    layers = dict(sorted(report["layers"].items(), key=lambda item: _natural(item[0])))
    table = _table(f"{_method(report)}, {words.count(len(report['clients']), 'adapter')}", "layer", "error", "rank", "energy")
    if len(layers) <= MOST_ROWS:
        for name, own in layers.items():
            table.add_row(_text(name + _lacking(report, own)), _error(own), str(own["rank"]), _energy(own))
    else:
        for kind, names in _kinds(layers).items():
            own = [layers[name] for name in names]
            table.add_row(_text(f"{kind} × {len(names)}"), _range(own, "error"), _range(own, "rank"), _range(own, "energy"))
        known = [name for name in layers if layers[name]["error"] is not None]
        table.add_section()
        for name in sorted(known, key=lambda name: -layers[name]["error"])[:WORST]:
            own = layers[name]
            table.add_row(
                _text(f"{name} (among the worst){_lacking(report, own)}"), _error(own), str(own["rank"]), _energy(own)
            )
    seconds = report["seconds"]
    stages = ", ".join(f"{stage} {seconds[stage]:.2f} s" for stage in ("reading", "computing", "checking", "writing"))
    legend = "error: ‖ΔW written − Σ p ΔW‖ / ‖Σ p ΔW‖, from the file as it was read back; energy: ‖ΔW written‖² / ‖Σ p ΔW‖².\n"
    plain = report["plain"]
    text = (
        (legend if any(own["error"] is not None for own in layers.values()) else "")
        + (f"also averaged, not in the error: {', '.join(plain[:4])}{' …' * (len(plain) > 4)}.\n" if plain else "")
        + f"weights: {_weights(report)}. in {words.size(report['bytes_in'])}, out {words.size(report['bytes_out'])}, "
        f"peak memory {words.size(report['peak_memory_bytes'])}.\n"
        f"{words.duration(seconds['total'])}: {stages}."
    )
    return _noted(table, text, report)


def plan_table(plan: Mapping[str, Any]) -> "Group":
    """Returns the table of `umbel merge --dry-run`.

    Args:
        plan: What `merging.plan` returns.
    """
    title = f"would merge {words.count(len(plan['clients']), 'adapter')} by {_method(plan)}"
    table = _table(title, "layers", "matrix", "ranks in", "rank out", "error", "energy")
    for row in plan["layers"]:
        low, high = row["ranks_in"]
        ranks = str(low) if low == high else f"{low} to {high}"
        table.add_row(
            _text(f"{row['layers']} × like {row['example']}"),
            f"{row['d_out']} × {row['d_in']}",
            ranks,
            str(row["rank"]),
            _error(row),
            _energy(row),
        )
    text = (
        "rank out, error and energy: of the first layer of each shape, which was merged to see.\n"
        f"weights: {_weights(plan)}. in {words.size(plan['bytes_in'])}, out about {words.size(plan['bytes_out'])}; "
        f"about {words.duration(plan['seconds'])} and {words.size(plan['memory_bytes'])} of memory."
    )
    return _noted(table, text, plan)


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=_text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    return table


def _noted(table: "Table", text: str, told: Mapping[str, Any]) -> "Group":
    from rich.console import Group

    return Group(table, _text(text), *(_text(f"note: {note}") for note in told["notes"]))


def _text(text: str) -> Any:
    # Text, not str: a name may hold what rich would read as markup.
    from rich.text import Text

    return Text(text)


def _method(told: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key} {value}" for key, value in told["method"].items() if key != "name")
    return told["method"]["name"] + (f" ({options})" if options else "")


def _weights(told: Mapping[str, Any]) -> str:
    sources = {"given": "as given", "num_examples": "num_examples of each umbel.json", "equal": "all equal"}
    source = sources[told["weights_from"]]
    shares = [client["share"] for client in told["clients"]]
    if told["weights_from"] == "equal" or len(shares) > 12:
        return source
    return f"{source} ({', '.join(f'{share:.3g}' for share in shares)})"


def _natural(name: str) -> list[Any]:
    """Sorts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _lacking(report: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    return f" (in {own['clients']} of {len(report['clients'])})" if "clients" in own else ""


def _error(own: Mapping[str, Any]) -> str:
    return "–" if own["error"] is None else _small(own["error"])


def _small(error: float) -> str:
    # Blocks of inner products tell no less apart.
    return "< 1e-7" if error < 1e-7 else f"{error:.2g}"


def _energy(own: Mapping[str, Any]) -> str:
    return "–" if own["energy"] is None else f"{own['energy']:.4f}"


def _range(own: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [row[key] for row in own if row[key] is not None]
    if not values:
        return "–"
    show = {"error": _small, "energy": "{:.4f}".format, "rank": str}[key]
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def _kinds(layers: Mapping[str, Any]) -> dict[str, list[str]]:
    result: dict[str, list[str]] = {}
    for name in layers:
        result.setdefault(name.rpartition(".")[2], []).append(name)
    return result
