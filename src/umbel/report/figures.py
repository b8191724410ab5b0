"""The report's figures as inline SVG. The only place that imports matplotlib, and only while it draws."""

import functools
import html
import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar

from umbel.report import words
from umbel.report.closing import by_round, errors, ranks
from umbel.report.jobs import Entry

WIDE, PANEL = 4.7, 3.1
"""Widths in inches: a figure of which two stand side by side on a wide screen, and one of several small panels. Small enough
that their text can be read on a phone, where each takes the full width."""

INK, FAINT, GRID, EMPTY = "#1f2933", "#52606d", "#e4e7eb", "#eef0f2"
# Okabe and Ito's colours, without their yellow (too light on white) and black (kept for the central baseline); then Tol's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#332288", "#8C510A")
MARKERS = "osD^vPX"
STAGES = {
    "fit": "#0072B2",
    "evaluate": "#8CC3E6",
    "adapter": "#009E73",
    "wire": "#E69F00",
    "server": "#D55E00",
    "record": "#CC79A7",
    "other": "#B8BFC6",
}
ERROR_SCALE = ("#FFF8E7", "#FBD28B", "#EE9142", "#C44F1B", "#6B1F0C")
COUNT_SCALE = ("#F3F8FC", "#B5D6EC", "#5FA3D0", "#0072B2", "#083A5E")
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "umbel",
    "text.parse_math": False,  # a "$" in a label is a "$"
    "image.composite_image": False,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


@dataclass(frozen=True)
class Look:
    """How one row of the table is drawn, the same in every figure."""

    colour: str
    marker: str = ""
    dash: str = "-"


@dataclass(frozen=True)
class Panel:
    """One drawing with the name to set over it."""

    title: str
    svg: str


P = ParamSpec("P")
T = TypeVar("T")


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Runs a function that draws under the report's style, whatever the caller's matplotlib is set to."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        import matplotlib

        settings: Any = {**matplotlib.rcParamsDefault, **STYLE}
        with matplotlib.rc_context(settings), warnings.catch_warnings():
            # A label in a script that matplotlib's own font lacks: the reader's browser has one.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            return draw(*args, **kwargs)

    return drawn


def looks(entries: Sequence[Entry]) -> dict[str, Look]:
    """Returns a colour, a marker and a dash by label; baselines are grey and black, dashed."""
    return looks_of([{"label": entry.label, "kind": entry.kind} for entry in entries])


def _look(number: int) -> Look:
    turn, place = divmod(number, len(COLOURS))
    return Look(COLOURS[place], MARKERS[number % len(MARKERS)], ("-", "--", ":", "-.")[turn % 4])


def _baseline(kind: str) -> Look:
    return Look("#7b8794" if kind == "local" else "#000000", "", "--")


@styled
def score_by_round(entries: Sequence[Entry], metric: str, name: str) -> str:
    """Draws the score on all test rows after each training round; "" where nothing was scored."""
    figure, axes = _axes(WIDE, 3.2)
    style, ends = looks(entries), list[tuple[float, str, Look]]()
    length = max((len(by_round(entry)) for entry in entries), default=0)
    for entry in entries:
        look = style[entry.label]
        points = [(r, x) for r, x in enumerate(by_round(entry), 1) if x]
        if not points:
            continue
        rounds, means = [r for r, _ in points], [sum(x) / len(x) for _, x in points]
        if start := _start(entry):
            rounds, means = [0, *rounds], [start, *means]
        if len(rounds) == 1 and entry.kind != "method":
            axes.axhline(means[0], color=look.colour, linestyle=look.dash, linewidth=1.3)
        else:
            _line(axes, rounds, means, look)
        if entry.kind == "local" and max(len(x) for _, x in points) > 1:
            _band(axes, [(r, min(x), max(x)) for r, x in points], length)
        ends.append((means[-1], entry.label, look))
    axes.set_xlabel("training round")
    axes.set_ylabel(metric)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _key(axes, ends)
    told = ", ".join(f"{label} {words.score(value)}" for value, label, _ in ends)
    return _svg(figure, name, f"Line chart of {metric} after each training round. At the end: {told}.") if ends else ""


@styled
def score_by_bytes(entries: Sequence[Entry], metric: str, name: str) -> str:
    """Draws the score against bytes sent and received per client so far, log scale; baselines as horizontal lines."""
    figure, axes = _axes(WIDE, 3.2)
    style, ends = looks(entries), list[tuple[float, str, Look]]()
    for entry in entries:
        look = style[entry.label]
        means = [sum(x) / len(x) if x else None for x in by_round(entry)]
        if entry.kind != "method":
            if means and (last := means[-1]) is not None:
                axes.axhline(last, color=look.colour, linestyle=look.dash, linewidth=1.3)
                ends.append((last, entry.label, look))
            continue
        run = entry.runs[0]
        sent: list[float] = []
        for line, up, down in zip(run.lines, run.bytes_per_client("bytes_up"), run.bytes_per_client("bytes_down")):
            phase = line.get("phase", "train")
            if phase in ("train", "update"):
                sent = [*(sent if phase == "train" else sent[:-1]), up + down]
        points = [(x, y) for x, y in zip(sent, means) if y is not None and x > 0]
        if points:
            _line(axes, [x for x, _ in points], [y for _, y in points], look)
            ends.append((points[-1][1], entry.label, look))
    if not any(style[label].marker for _, label, _ in ends):
        return ""
    _log_bytes(axes)
    axes.set_xlabel("sent and received per client so far")
    axes.set_ylabel(metric)
    _key(axes, ends)
    return _svg(figure, name, f"Line chart of {metric} against the bytes that a client has sent and received, log scale.")


def looks_of(rows: Sequence[dict[str, Any]]) -> dict[str, Look]:
    """The same for rows of a table."""
    federated = [row["label"] for row in rows if row["kind"] == "method"]
    result = {label: _look(number) for number, label in enumerate(federated)}
    return result | {row["label"]: _baseline(row["kind"]) for row in rows if row["kind"] != "method"}


@styled
def means_by_round(rows: Sequence[dict[str, Any]], metric: str, name: str) -> str:
    """Draws the score after each training round, mean over seeds; "" where nothing was scored."""
    figure, axes = _axes(WIDE, _tall(len(rows)))
    style, ends = looks_of(rows), list[tuple[float, str, Look]]()
    for row in rows:
        points = [(r, x) for r, x in enumerate(row["scores"], 1) if x is not None]
        look = style[row["label"]]
        if len(points) == 1 and row["kind"] != "method":
            axes.axhline(points[0][1], color=look.colour, linestyle=look.dash, linewidth=1.3)
        elif points:
            _line(axes, [r for r, _ in points], [x for _, x in points], look)
        if points:
            ends.append((points[-1][1], row["label"], look))
    axes.set_xlabel("training round")
    axes.set_ylabel(metric)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _key(axes, ends)
    return _svg(figure, name, f"Line chart of {metric} after each training round, mean over seeds.") if ends else ""


@styled
def score_and_bytes(rows: Sequence[dict[str, Any]], best: Sequence[str], metric: str, name: str) -> str:
    """Draws each method as a point, its label beside it: bytes of the whole run (log) and score, mean and deviation over seeds.

    Args:
        rows: Of a comparison's summary, with `total_bytes`.
        best: Labels on the Pareto front, from the fewest bytes.
        metric: Name of the upright axis.
        name: Unique on the page.
    """
    figure, axes = _axes(WIDE, _tall(len(rows)))
    style = looks_of(rows)
    points = {row["label"]: row for row in rows if row["kind"] == "method" and row["score"] is not None and row["total_bytes"]}
    if not points:
        return ""
    for label, row in points.items():
        look = style[label]
        x, y, deviation = row["total_bytes"], row["score"], row["score_sd"]
        bar = {"ecolor": look.colour, "elinewidth": 1.1, "capsize": 2.5, "yerr": deviation or None}
        axes.errorbar([x], [y], color=look.colour, marker=look.marker, markersize=7, markeredgecolor="white", zorder=3, **bar)
    near, far = _baselines(rows, list(points.values()))
    for row in near:
        look = style[row["label"]]
        axes.axhline(row["score"], color=look.colour, linestyle=look.dash, linewidth=1.2, zorder=1)
    axes.margins(x=0.16, y=0.12)
    _log_bytes(axes)
    low, high = axes.get_xlim()
    if high / low < 4:
        # Near each other, as where bytes are held equal: a scale of which some ticks are in sight, and no point at its edge.
        half = max(1.35, math.sqrt(high / low) * 1.12)
        axes.set_xlim(math.sqrt(low * high) / half, math.sqrt(low * high) * half)
        axes.xaxis.get_major_locator().set_params(subs=(1, 1.5, 2, 3, 4, 5, 7))
    axes.set_xlim(axes.get_xlim())
    edge = [(points[label]["total_bytes"], points[label]["score"]) for label in best if label in points]
    # Only as far as the axes reach: what more bytes would bring is not known.
    edge.append((axes.get_xlim()[1], edge[-1][1]))
    axes.step([x for x, _ in edge], [y for _, y in edge], where="post", color="#9aa5b1", linewidth=1.4, zorder=2)
    axes.set_xlabel("sent and received per client over the whole run")
    axes.set_ylabel(metric)
    # What a label should not lie across: deviations, the front's steps, the baselines.
    lines = [(x, row["score"] - (row["score_sd"] or 0), x, row["score"] + (row["score_sd"] or 0)) for x, row in _placed(points)]
    lines += [(x, y, later, y) for (x, y), (later, _) in itertools.pairwise(edge)]
    lines += [(later, y, later, higher) for (_, y), (later, higher) in itertools.pairwise(edge)]
    lines += [(axes.get_xlim()[0], row["score"], axes.get_xlim()[1], row["score"]) for row in near]
    _name_points(axes, [(x, row["score"], row["label"], style[row["label"]].colour) for x, row in _placed(points)], lines)
    for row in near:
        place = (1.0, row["score"])
        text = axes.annotate(
            row["label"], place, (4, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points", va="center"
        )
        text.set(fontsize=8.8, color=style[row["label"]].colour)
    for row in far:
        below = row["score"] < axes.get_ylim()[0]
        said = f"{row['label']} {words.score(row['score'])} {'↓' if below else '↑'}"
        height, shift, stands = (0.0, 4, "bottom") if below else (1.0, -4, "top")
        text = axes.annotate(said, (1.0, height), (4, shift), xycoords="axes fraction", textcoords="offset points", va=stands)
        text.set(fontsize=8.8, color=style[row["label"]].colour)
    told = ", ".join(
        f"{label} {words.score(row['score'])} at {words.size(row['total_bytes'])}" for label, row in points.items()
    )
    return _svg(figure, name, f"{metric} against bytes per client, log scale: {told}. Pareto front: {', '.join(best)}.")


Rows = list[dict[str, Any]]


def _baselines(rows: Sequence[dict[str, Any]], points: Rows) -> tuple[Rows, Rows]:
    """Returns the baselines that can share an axis with the methods, and those so far off that these would lie on a line."""
    low = min(row["score"] - (row["score_sd"] or 0) for row in points)
    high = max(row["score"] + (row["score_sd"] or 0) for row in points)
    room = max(0.5 * (high - low), 0.02 * abs(high))
    known = [row for row in rows if row["kind"] != "method" and row["score"] is not None]
    near = [row for row in known if low - room <= row["score"] <= high + room]
    return near, [row for row in known if row not in near]


def _tall(labels: int) -> float:
    """Height in inches at which so many labels find room beside the axes."""
    return max(3.2, 0.8 + 0.19 * labels)


def _placed(points: dict[str, dict[str, Any]]) -> list[tuple[float, dict[str, Any]]]:
    return [(row["total_bytes"], row) for row in points.values()]


Box = tuple[float, float, float, float]
"""Left, low, right, high."""


def _name_points(axes: Any, points: list[tuple[float, float, str, str]], lines: list[Box]) -> None:
    """Writes each point's label beside it, clear of other points and labels, and of lines where there is room for that.

    Args:
        axes: Where.
        points: (x, y, label, colour).
        lines: Upright or level ones, as boxes without width, in units of the axes.
    """
    figure = axes.figure
    figure.canvas.draw()  # settles the layout, so that places in pixels are final
    inch = figure.dpi
    centres = [axes.transData.transform((x, y)) for x, y, *_ in points]
    taken = [(x - 0.06 * inch, y - 0.06 * inch, x + 0.06 * inch, y + 0.06 * inch) for x, y in centres]
    frame = axes.get_window_extent()
    ends = axes.transData.transform([corner for x, y, right, high in lines for corner in ((x, y), (right, high))]).reshape(
        -1, 4
    )
    crossed = [(min(x, right) - 1, min(y, high) - 1, max(x, right) + 1, max(y, high) + 1) for x, y, right, high in ends]
    for (*_, label, colour), (left, low) in zip(points, centres):
        text = words.end(label, 18)
        width, height = 0.068 * inch * len(text), 0.15 * inch
        boxes = list(_around(left, low, width, height, inch))
        inside = [
            box for box in boxes if frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
        ]
        free = [box for box in inside if not any(_overlap(box, other) for other in taken)]
        clear = [box for box in free if not any(_overlap(box, other) for other in crossed)]
        box = (clear or free or inside or boxes)[0]
        taken.append(box)
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        if math.hypot(middle[0] - left, middle[1] - low) > 0.15 * inch + width / 2:
            nearest = min(max(left, box[0]), box[2]), min(max(low, box[1]), box[3])
            link = axes.transData.inverted().transform([(left, low), nearest])
            axes.plot(link[:, 0], link[:, 1], color=colour, linewidth=0.6, alpha=0.7, zorder=2)
        place = axes.transData.inverted().transform(middle)
        axes.text(*place, text, ha="center", va="center", fontsize=8.8, color=colour, zorder=4)


def _around(x: float, y: float, width: float, height: float, inch: float) -> Iterator[Box]:
    """Yields boxes for a label around a point, the nearest first."""
    for far in (0.08, 0.2, 0.35, 0.5, 0.7, 0.95, 1.2):
        reach = far * inch
        for across, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            left = x - width / 2 + across * (width / 2 + reach)
            low = y - height / 2 + up * (height / 2 + reach)
            yield left, low, left + width, low + height


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@styled
def error_panels(entries: Sequence[Entry]) -> tuple[str, list[Panel]]:
    """Draws the aggregation error, layer by round, a panel per method; returns the common scale and the panels."""
    from matplotlib.colors import LogNorm

    told = [(entry.label, by_layer) for entry in entries if entry.kind == "method" and (by_layer := errors(entry.runs[0]))]
    known = [x for _, series in told for _, layer in series for x in layer.values() if 1e-9 < x < math.inf]
    # Below 1e-9 is rounding of float64: one shade for all of it.
    low = 10.0 ** math.floor(math.log10(min(known, default=1e-9)))
    high = 10.0 ** math.ceil(math.log10(max(known, default=1e-8)))
    norm = LogNorm(low, high if high > low else low * 10, clip=True)
    drawn = [
        _layer_panel(label, series, norm, ERROR_SCALE, "aggregation error", f"error-{n}")
        for n, (label, series) in enumerate(told)
    ]
    return _scale(norm, ERROR_SCALE, "aggregation error (log scale)", "error-scale", words.power) if told else "", drawn


@styled
def rank_panels(entries: Sequence[Entry]) -> tuple[str, list[Panel]]:
    """Draws the rank of what was sent, layer by round, a panel per method in which it varies; likewise."""
    from matplotlib.colors import LogNorm, Normalize

    told = [(entry.label, series) for entry in entries if entry.kind == "method" and _varies(series := ranks(entry.runs[0]))]
    known = [rank for _, series in told for _, layer in series for rank in layer.values()]
    low, high = min(known, default=0), max(known, default=1)
    far = high > 30 * max(low, 1)
    norm = LogNorm(max(low, 1), high, clip=True) if far else Normalize(0, high)
    drawn = [
        _layer_panel(label, series, norm, COUNT_SCALE, "rank", f"rank-{n}", "{:.0f}") for n, (label, series) in enumerate(told)
    ]
    name = "rank of what was sent back" + (" (log scale)" if far else "")
    return _scale(norm, COUNT_SCALE, name, "rank-scale") if told else "", drawn


def _varies(series: list[tuple[int, dict[str, float]]]) -> bool:
    return len({rank for _, layer in series for rank in layer.values()}) > 1


@styled
def stages(entries: Sequence[Entry]) -> str:
    """Draws wall seconds by stage, one stacked bar per method; the share outside fit and evaluate stands at its end."""
    told = [(entry.label, entry.runs[0].seconds()) for entry in entries if entry.kind == "method"]
    told = [(label, seconds) for label, seconds in told if seconds["total"] > 0]
    if not told:
        return ""
    figure, axes = _axes(WIDE, 0.95 + 0.27 * len(told), grid="x")
    for place, (_, seconds) in enumerate(told):
        left = 0.0
        for stage, colour in STAGES.items():
            axes.barh(place, seconds.get(stage, 0.0), left=left, height=0.62, color=colour)
            left += seconds.get(stage, 0.0)
        rest = 1 - (seconds.get("fit", 0.0) + seconds.get("evaluate", 0.0)) / seconds["total"]
        axes.annotate(
            words.share(rest), (left, place), (4, 0), textcoords="offset points", va="center", fontsize=9, color=FAINT
        )
    axes.set_yticks(range(len(told)), [words.end(label, 18) for label, _ in told], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, max(seconds["total"] for _, seconds in told) * 1.12)
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("wall seconds, all rounds, all clients")
    listed = "; ".join(f"{label} {words.duration(seconds['total'])}" for label, seconds in told)
    return _svg(figure, "stages", f"Stacked bars of wall seconds by stage. In all: {listed}.")


@styled
def split(counts: list[list[int]], labels: list[str], name: str) -> tuple[str, str]:
    """Draws how many rows of each label each client has; returns the drawing and its scale ("" where cells hold the number)."""
    from matplotlib.colors import PowerNorm

    names = labels or ["rows"]
    columns = [row if labels else [sum(row)] for row in counts]
    matrix = [[column[n] if n < len(column) else 0 for column in columns] for n in range(len(names))]
    # A square root: between a client with three rows and one with three hundred, both must show.
    norm = PowerNorm(0.5, 0, max(max(map(max, matrix)), 1))
    numbers = "{:.0f}" if len(columns) <= 12 and len(names) <= 24 else ""
    heading = [words.cut(name, 24) for name in names]
    told = f"Heat map of training rows: {words.count(len(columns), 'client')} by {words.count(len(names), 'label')}."
    ticks = [str(k) for k in range(len(columns))]
    drawing = _heat(matrix, heading, ticks, norm, COUNT_SCALE, "client", told, name, WIDE, numbers)
    return drawing, "" if numbers else _scale(norm, COUNT_SCALE, "training rows of one label", f"{name}-scale")


def _layer_panel(
    label: str,
    series: list[tuple[int, dict[str, float]]],
    norm: Any,
    scale: Sequence[str],
    what: str,
    name: str,
    numbers: str = "",
) -> Panel:
    names = list(dict.fromkeys(layer for _, by_layer in series for layer in by_layer))
    matrix = [[by_layer.get(layer, math.nan) for _, by_layer in series] for layer in names]
    known = [x for row in matrix for x in row if not math.isnan(x)]
    span = f"{min(known):.2g} to {max(known):.2g}" if known else "nothing"
    told = (
        f"Heat map of {what} with {label}, {words.count(len(names), 'layer')} by {words.count(len(series), 'round')}: {span}."
    )
    ticks = [str(r) for r, _ in series]
    numbers = numbers if len(names) <= 26 and len(series) <= 8 else ""
    return Panel(label, _heat(matrix, words.layers(names), ticks, norm, scale, "round", told, name, PANEL, numbers))


def _heat(
    matrix: Sequence[Sequence[float]],
    names: list[str],
    ticks: list[str],
    norm: Any,
    scale: Sequence[str],
    across: str,
    told: str,
    name: str,
    width: float,
    numbers: str = "",
) -> str:
    """Draws a matrix as a heat map, rows named on the left; a missing value is grey.

    Args:
        matrix: Rows × columns.
        names: Of the rows; where they are many, only some are written.
        ticks: Of the columns, likewise.
        norm: From value to 0…1.
        scale: Colours from low to high.
        across: What columns are.
        told: The drawing in words.
        name: Unique on the page.
        width: In inches.
        numbers: Format of the value to write into each cell; "" writes none.
    """
    import numpy as np

    height = 0.62 + min(max(len(names) * (0.17 if len(names) <= 26 else 0.06), 0.35), 4.2)
    figure, axes = _axes(width, height, grid="")
    values = np.ma.masked_invalid(np.array(matrix, dtype=float))
    colours = _colours(scale)
    axes.imshow(values, cmap=colours, norm=norm, aspect="auto", interpolation="none")
    rows, columns = _some(names, 26), _every(len(ticks), 12)
    axes.set_yticks(rows, [names[n] for n in rows], fontsize=8.5)
    axes.set_xticks(columns, [ticks[n] for n in columns], fontsize=8.5)
    axes.set_xlabel(across)
    axes.tick_params(length=0 if len(rows) == len(names) else 2)
    for side in axes.spines.values():
        side.set_visible(False)
    if len(names) <= 40 and len(ticks) <= 40:
        # White seams between cells.
        axes.set_xticks(np.arange(len(ticks) - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(len(names) - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
        axes.tick_params(which="minor", length=0)
    for (row, column), value in np.ndenumerate(values.filled(math.nan)) if numbers else ():
        if not math.isnan(value):
            red, green, blue, _ = colours(norm(value))
            dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.55
            colour = "white" if dark else INK if value else "#9aa5b1"
            axes.text(column, row, numbers.format(value), ha="center", va="center", fontsize=8, color=colour)
    return _svg(figure, name, told)


def _scale(norm: Any, scale: Sequence[str], label: str, name: str, show: Callable[[float], str] = "{:,.0f}".format) -> str:
    """Draws a colour bar of its own, to stand over several panels."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    figure, axes = _axes(WIDE, 0.62, grid="")
    decades = math.log10(norm.vmax or 1) - math.log10(norm.vmin or 1) if isinstance(norm, LogNorm) else 0
    bar = figure.colorbar(
        ScalarMappable(norm, _colours(scale)),
        cax=axes,
        orientation="horizontal",
        ticks=LogLocator(subs=(1,) if decades > 3 else (1, 2, 5)) if decades else MaxNLocator(6, integer=True),
        format=FuncFormatter(lambda value, _: show(value)),
    )
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.set_label(label)
    return _svg(figure, name, f"Colour scale: {label}, from {norm.vmin:.3g} (light) to {norm.vmax:.3g} (dark).")


def _colours(scale: Sequence[str]) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("umbel", list(scale))
    colours.set_bad("#d5dae0")
    return colours


def _every(length: int, most: int) -> list[int]:
    return list(range(0, length, max(1, math.ceil(length / most))))


def _some(names: list[str], most: int) -> list[int]:
    """Returns which names to write; of many, a step that falls on the first layer of a block where blocks are alike."""
    if len(names) <= most:
        return list(range(len(names)))
    step = math.ceil(len(names) / (most * 0.7))
    blocks = [name.partition(" ")[0] for name in names]
    period = next((n for n, block in enumerate(blocks) if block != blocks[0]), 1)
    return list(range(0, len(names), math.ceil(step / period) * period))


def _axes(width: float, height: float, grid: Literal["", "x", "both"] = "both") -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    if grid:
        axes.grid(axis=grid)
    return figure, axes


def _line(axes: Any, x: Sequence[float], y: Sequence[float], look: Look) -> None:
    axes.plot(
        x,
        y,
        color=look.colour,
        linestyle=look.dash,
        linewidth=1.8 if look.marker else 1.4,
        marker=look.marker,
        markevery=math.ceil(len(x) / 10),
        markeredgecolor="white",
        markeredgewidth=0.6,
        clip_on=False,
    )


def _band(axes: Any, spans: list[tuple[int, float, float]], length: int) -> None:
    rounds, low, high = ([span[n] for span in spans] for n in range(3))
    if length > 1 and len(rounds) > 1:
        axes.fill_between(rounds, low, high, color="#7b8794", alpha=0.14, linewidth=0)
    else:
        axes.vlines(rounds[-1], low[-1], high[-1], color="#7b8794", alpha=0.4, linewidth=5)


def _start(entry: Entry) -> float | None:
    """Returns the score before any training round, where it was measured."""
    found = [run.score(line) for run in entry.runs for line in run.lines if line.get("phase") in ("open", "measure")]
    known = [x for x in found if x is not None]
    return sum(known) / len(known) if known else None


def _log_bytes(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if high / low > 300 else (1, 3) if high / low > 30 else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: re.sub(r"\.0+ ", " ", words.size(value))))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _key(axes: Any, ends: list[tuple[float, str, Look]]) -> None:
    """Writes the labels right of the axes, each as near to the end of its line as the others let it."""
    if not ends:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    apart = min(0.18 / (axes.figure.get_figheight() - 0.6), 1 / len(ends))
    ends = sorted(ends, key=lambda end: end[0] if math.isfinite(end[0]) else -math.inf)
    places: list[float] = []
    for value, *_ in ends:
        wanted = (value - low) / (high - low) if math.isfinite(value) else 0.0
        places.append(max(wanted, places[-1] + apart) if places else wanted)
    ceiling = 1.0
    for n in reversed(range(len(places))):
        places[n] = min(places[n], ceiling)
        ceiling = places[n] - apart
    for place, (value, label, look) in zip(places, ends):
        marks = {"color": look.colour, "linestyle": look.dash, "marker": look.marker, "transform": axes.transAxes}
        axes.plot([1.03, 1.09], [place] * 2, markevery=[1], markersize=5, clip_on=False, linewidth=1.6, **marks)
        text = f"{words.end(label, 16)} {words.score(value)}"
        axes.text(1.12, place, text, transform=axes.transAxes, va="center", fontsize=8.8)


def _svg(figure: Any, name: str, told: str) -> str:
    """Returns the figure as an SVG element for a page: it scales, says in words what it shows, and refers to nothing outside.

    Args:
        figure: The drawing.
        name: Prefix of the identifiers inside, unique on the page.
        told: The drawing in words.
    """
    target = io.StringIO()
    figure.savefig(target, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = target.getvalue()
    text = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, _, body = text.partition(">")
    view = re.search(r'viewBox="([^"]*)"', head)
    box = view[1] if view else "0 0 0 0"
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', body))

    def own(tag: re.Match[str]) -> str:
        named = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", tag[0])
        return re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{name}-", named)

    body = re.sub(r"<[^>]*>", own, body)
    body = re.sub(r"\n\s*", "\n", body)
    pixels = figure.get_figwidth() * 96 * (1.1 if figure.get_figwidth() == PANEL else 1.25)
    return f'<svg role="img" aria-label="{html.escape(told)}" viewBox="{box}" style="max-width:{pixels:.0f}px">{body}'
