"""Writes the tables and figures of the privacy benchmarks anew; the text between them is written by hand.

    python benchmarks/privacy/pages.py          # rewrites what stands between <!-- measured: … --> and <!-- end -->

A marker in docs/privacy.md or docs/results.md names a result file and a kind of table: `<!-- measured: membership attacks -->`.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from umbel.report import words
from umbel.report.comparison import interval, spread

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
BLOCK = re.compile(r"(<!-- measured: (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#52606d"

Table = dict[str, Any]
Row = list[str]


# Membership


def attacks(told: Table) -> str:
    """Success against the final model, of the better attack's canaries and of both attacks on all rows."""
    rows = [
        ["method", "ε", "accuracy", "loss: AUC", "LiRA: AUC", "LiRA: TPR at 1 % FPR", "at 5 %", "allowed by ε at 1 %", "at 5 %"]
    ]
    for one in _cells(told, "final model", "LiRA", "canaries"):
        loss = next(x for x in _cells(told, "final model", "loss", "canaries") if _same(x, one))
        allowed = [words.MISSING if x is None else words.score(x) for x in one["allowed"].values()]
        rates = [_about(one[f"tpr at {f}"]) for f in one["allowed"]]
        rows.append([*_name(one), _about(one["accuracy"]), _about(loss["auc"]), _about(one["auc"]), *rates, *allowed])
    return markdown(rows)


def views(told: Table) -> str:
    """What a server sees of a round, masked and not."""
    rows = [["method", "ε", "one client's upload: canaries", "all rows", "mean of the uploads: canaries", "all rows"]]
    for one in _cells(told, "final model", "LiRA", "canaries"):
        cells = [
            _about(next(x for x in _cells(told, view, "LiRA", group) if _same(x, one))["auc"])
            for view in ("one client's upload", "mean of the uploads")
            for group in ("canaries", "all rows")
        ]
        rows.append([*_name(one), *cells])
    return markdown(rows)


def _cells(told: Table, view: str, attack: str, group: str) -> list[Table]:
    return [x for x in told["rows"] if (x["view"], x["attack"], x["rows"]) == (view, attack, group)]


def _same(one: Table, other: Table) -> bool:
    return (one["method"], one["epsilon"]) == (other["method"], other["epsilon"])


def _name(one: Table) -> Row:
    return [f"`{one['method']}`", "no noise" if one["epsilon"] is None else f"{one['epsilon']:g}"]


def _about(found: Table) -> str:
    """A mean and half the width of its interval."""
    return words.score(found["mean"]) + ("" if found["half"] is None else f" ± {found['half']:.3f}")


# Inversion


def tokens(told: Table) -> str:
    """Share of tokens recovered, by method and rank, batch and what stands between."""
    wanted = [x["defence"] for x in told["cases"] if x["batch"] == 1 and not x["defence"].startswith("σ")]
    names = list(dict.fromkeys(wanted))
    rows = [["method", "rows", "tokens", "guessing", *names]]
    for first in [x for x in told["cases"] if x["defence"] == "none"]:
        own = {x["defence"]: x for x in told["cases"] if _place(x) == _place(first)}
        cells = [_between(own[name]["recovered"]) if name in own else words.MISSING for name in names]
        about = [f"`{first['method']}` r = {first['rank']}", str(first["batch"]), f"{first['tokens']['mean']:.0f}"]
        rows.append([*about, words.score(first["guessed"]["mean"]), *cells])
    return markdown(rows)


def _place(one: Table) -> tuple[Any, ...]:
    return one["method"], one["rank"], one["batch"]


def _between(found: Table) -> str:
    """A share with its interval."""
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


# The comparison


def scores(told: Table) -> str:
    """Accuracy by method, rank and start; recipes side by side."""
    columns = [(recipe, epsilon) for epsilon in (1.0, 3.0) for recipe in ("released", "corrected")]
    rows = [["method", "rank", "start", "up, training", *(f"ε = {e:g}, {recipe}" for recipe, e in columns)]]
    places = list(dict.fromkeys(_run_place(x) for x in told["runs"] if x["epsilon"] is not None))
    for place in sorted(places, key=lambda x: (x[0] != "fed_sb", x[0], x[1], x[2])):
        method, rank, start = place
        cells = [_mean(_values(told, place, recipe, e)) for recipe, e in columns]
        sent = next(x["up"] for x in told["runs"] if _run_place(x) == place and x["epsilon"] is not None) / told["clients"]
        rows.append([f"`{method}`", str(rank), start or words.MISSING, words.size(sent), *cells])
    return markdown(rows)


def leads(told: Table) -> str:
    """Fed-SB against the best baseline of the same recipe, paired by seed."""
    rows = [["Fed-SB", "against", "ε = 1", "ε = 3"]]
    places = list(
        dict.fromkeys((x["recipe"], *_run_place(x)) for x in told["runs"] if x["method"] == "fed_sb" and x["epsilon"])
    )
    for recipe, method, rank, start in sorted(places, key=lambda x: (x[0] != "released", x[3], x[2])):
        cells, names = [], []
        for epsilon in (1.0, 3.0):
            own = _values(told, (method, rank, start), recipe, epsilon)
            name, rival = _best_rival(told, recipe, epsilon)
            names.append(name)
            if len(own.keys() & rival.keys()) < 2:
                cells.append(words.MISSING)
                continue
            mean, half = interval([own[seed] - rival[seed] for seed in own if seed in rival])
            cells.append(f"{mean:+.3f} [{mean - (half or 0):+.3f}, {mean + (half or 0):+.3f}]".replace("-", "−"))
        rows.append([f"{recipe}, r = {rank}, {start}", " / ".join(dict.fromkeys(names)), *cells])
    return markdown(rows)


def _best_rival(told: Table, recipe: str, epsilon: float) -> tuple[str, dict[int, float]]:
    places = {
        _run_place(x) for x in told["runs"] if x["method"] != "fed_sb" and x["recipe"] == recipe and x["epsilon"] == epsilon
    }
    found = {place: _values(told, place, recipe, epsilon) for place in sorted(places)}
    best = max(found, key=lambda place: sum(found[place].values()) / len(found[place]))
    return f"`{best[0]}` r = {best[1]}", found[best]


def _run_place(run: Table) -> tuple[str, int, str]:
    return run["method"], run["rank"], run["start"]


def _values(told: Table, place: tuple[str, int, str], recipe: str, epsilon: float | None) -> dict[int, float]:
    """Returns the accuracy of every seed."""
    own = [x for x in told["runs"] if (_run_place(x), x["recipe"], x["epsilon"]) == (place, recipe, epsilon)]
    return {x["seed"]: x["accuracy"] for x in own}


def _mean(values: dict[int, float]) -> str:
    if not values:
        return words.MISSING
    mean, deviation = spread(list(values.values()))
    return words.score(mean) + ("" if deviation is None else f" ± {deviation:.3f}")


def without(told: Table) -> str:
    """The same without noise, for scale."""
    rows = [["without noise", "rank", "accuracy", "learning rate"]]
    places = list(dict.fromkeys(_run_place(x) for x in told["runs"] if x["epsilon"] is None))
    for place in places:
        rate = next(x["rate"] for x in told["runs"] if _run_place(x) == place and x["epsilon"] is None)
        rows.append([f"`{place[0]}`", str(place[1]), _mean(_values(told, place, "without noise", None)), f"{rate:g}"])
    return markdown(rows)


def machine(told: Table) -> str:
    """Where it was made."""
    about = told["provenance"]
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    of = about["machine"]
    data = ", ".join(f"{name} {value[:12]}…" for name, value in about["data"].items() if name in ("train", "test"))
    return (
        f"{of['processor']}, one thread, {versions}; umbel {about['umbel']}, commit {about['commit']}; "
        f"model {about['model']['sha256'][:12]}…, data {data} (sha256).\n"
    )


def markdown(rows: list[Row]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


KINDS: dict[str, Callable[[Table], str]] = {
    "attacks": attacks,
    "views": views,
    "tokens": tokens,
    "scores": scores,
    "leads": leads,
    "without": without,
    "machine": machine,
}


def rendered(text: str, results: Path = HERE / "results") -> str:
    """Returns a page with every table as the result files have it."""

    def block(match: re.Match[str]) -> str:
        told = json.loads((results / f"{match[2]}.json").read_text(encoding="utf-8"))
        return match[1] + KINDS[match[3]](told) + match[4]

    return BLOCK.sub(block, text)


# Figures


def draw_attacks(membership: Table, inversion: Table, path: Path) -> None:
    """Membership by ε, and tokens by σ."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.6), layout="constrained")
    at = {None: 0, 8.0: 1, 3.0: 2, 1.0: 3}
    for method, colour, shift in (("fedit", BLUE, -0.08), ("fed_sb", ORANGE, 0.08)):
        for view, mark in (("one client's upload", "o"), ("mean of the uploads", "s"), ("final model", "^")):
            own = [x for x in _cells(membership, view, "LiRA", "canaries") if x["method"] == method]
            places = [at[x["epsilon"]] + shift + {"o": -0.04, "s": 0.0, "^": 0.04}[mark] for x in own]
            means, halves = [x["auc"]["mean"] for x in own], [x["auc"]["half"] or 0.0 for x in own]
            left.errorbar(places, means, yerr=halves, fmt=mark, color=colour, ms=5, lw=1, label=f"{method}: {view}")
    left.axhline(0.5, color=GREY, lw=0.8, ls=":")
    left.set_xticks(list(at.values()), ["no noise", "ε = 8", "ε = 3", "ε = 1"])
    left.set_ylabel("AUC of LiRA on canaries")
    left.legend(fontsize=7, frameon=False)
    left.set_title("Who was in the training rows?", fontsize=10, loc="left")
    for (method, rank), colour, line in _lines(inversion):
        own = [x for x in inversion["cases"] if (x["method"], x["rank"], x["batch"]) == (method, rank, 1)]
        curve = sorted((x for x in own if x["defence"][0] in "σε" or x["defence"] == "none"), key=lambda x: x["sigma"])
        low = min(x["sigma"] for x in curve if x["sigma"]) / 10
        xs = [x["sigma"] or low for x in curve]
        means = [x["recovered"]["mean"] for x in curve]
        bars = [
            [m - x["recovered"]["low"] for m, x in zip(means, curve)],
            [x["recovered"]["high"] - m for m, x in zip(means, curve)],
        ]
        right.errorbar(xs, means, yerr=bars, fmt=line, color=colour, ms=3, lw=1.2, label=f"{method} r = {rank}")
    guess = sum(x["guessed"]["mean"] for x in inversion["cases"] if x["batch"] == 1 and x["defence"] == "none") / len(
        list(_lines(inversion))
    )
    right.axhline(guess, color=GREY, lw=0.8, ls=":", label="guessing frequent tokens")
    for x in inversion["cases"]:
        if x["batch"] == 1 and x["rank"] == 8 and x["defence"].startswith("ε"):
            right.axvline(x["sigma"], color=GREY, lw=0.5)
    right.text(0.13, 0.62, "ε = 8, 3, 1", rotation=90, fontsize=7, color=GREY)
    right.set_xscale("log")
    right.set_xlabel("noise multiplier σ (leftmost: none)")
    right.set_ylabel("share of tokens recovered, one row")
    right.legend(fontsize=7, frameon=False)
    right.set_title("Which words were in the row?", fontsize=10, loc="left")
    _save(figure, path)


def _lines(inversion: Table) -> list[tuple[tuple[str, int], str, str]]:
    cases = list(dict.fromkeys((x["method"], x["rank"]) for x in inversion["cases"]))
    seen: dict[str, int] = {}
    found: list[tuple[tuple[str, int], str, str]] = []
    for case in cases:
        seen[case[0]] = seen.get(case[0], 0) + 1
        found.append((case, BLUE if case[0] == "fedit" else ORANGE, "o-" if seen[case[0]] == 1 else "s--"))
    return found


def draw_comparison(told: Table, path: Path) -> None:
    """Accuracy of every cell, released beside corrected."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9.2, 4.2), layout="constrained", sharex=True, sharey=True)
    places = list(dict.fromkeys(_run_place(x) for x in told["runs"] if x["epsilon"]))
    places = sorted(places, key=lambda x: (x[0] != "fed_sb", x[0], x[2], x[1]))[::-1]
    names = [f"{method} r = {rank}" + (f", {start}" if start else "") for method, rank, start in places]
    for panel, epsilon in zip(panels, (1.0, 3.0)):
        for recipe, colour, shift in (("released", ORANGE, 0.15), ("corrected", BLUE, -0.15)):
            for i, place in enumerate(places):
                values = list(_values(told, place, recipe, epsilon).values())
                if values:
                    panel.plot(values, [i + shift] * len(values), ".", color=colour, ms=4, alpha=0.6)
                    panel.plot([sum(values) / len(values)], [i + shift], "|", color=colour, ms=11, mew=2)
        panel.set_title(f"ε = {epsilon:g}", fontsize=10, loc="left")
        panel.set_xlabel("accuracy, three seeds and their mean")
        panel.grid(axis="x", lw=0.4, color="#dfe3e8")
    panels[0].set_yticks(range(len(places)), names, fontsize=8)
    for recipe, colour in (("as released", ORANGE), ("corrected", BLUE)):
        panels[1].plot([], [], "|", color=colour, ms=11, mew=2, label=recipe)
    panels[1].legend(fontsize=8, frameon=False, loc="best")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    for page in ("privacy.md", "results.md"):
        (DOCS / page).write_text(rendered((DOCS / page).read_text(encoding="utf-8")), encoding="utf-8")
    read = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (HERE / "results").glob("*.json")}
    draw_attacks(read["membership"], read["inversion"], DOCS / "attacks.png")
    draw_comparison(read["comparison"], DOCS / "private-comparison.png")
