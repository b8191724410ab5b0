"""A comparison as one HTML file, in the style of the report, and as CSV."""

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from umbel.report import comparison as compared
from umbel.report import figures, words
from umbel.report.comparison import Comparison, bracketed, front, plus_minus, read_comparison, summary, total_bytes
from umbel.report.jobs import entries
from umbel.report.page import document, facts, run_details, version

say = html.escape

NOTE = """\
<b>Own test</b>: each client’s model after its training and before aggregation, on its own test rows; <b>gap</b>: that minus
the score. <b>Worst error</b>: of aggregation, the relative distance of what was sent back from the weighted mean of the
clients’ updates, largest over layers, rounds and seeds. <b>Up</b>, <b>down</b>: bytes per client over the whole run.
<b>Personal</b>: clients’ models with the parts that
stayed with them, on their own test rows. <b>Unseen</b>: the common model on the test rows of clients that took no part.
<b>local</b>: one client alone, mean over clients. <b>central</b>: one model on everyone’s rows. All else is a mean over
seeds."""


def write_comparison(folder: Path) -> Path:
    """Writes comparison.html and comparison.csv into a comparison's folder, also while it goes on; returns the page's path.

    Raises:
        ReportError: It holds no comparison.
    """
    comparison = read_comparison(folder)
    (folder / "comparison.csv").write_text(compared.comparison_csv(comparison), encoding="utf-8")
    page = folder / "comparison.html"
    page.write_text(_page(comparison), encoding="utf-8")
    return page


def _page(comparison: Comparison) -> str:
    told = [{**row, "total_bytes": total_bytes(row)} for row in summary(comparison)]
    jobs, about = list(comparison.jobs.values()), comparison.about
    name = comparison.folder.resolve().name
    parts = [
        '<p class="kicker">umbel · federated LoRA · comparison</p>',
        f"<h1>{say(name)}</h1>",
        f'<p class="lead">{say(_lead(comparison, told))}</p>',
        *(f"<p>{say(text)}</p>" for text in compared.seed_notes(comparison)),
        facts(jobs),
        _table(comparison, told),
        _figures(about, told),
        _equal(about),
        _chosen(about),
        _again(comparison),
    ]
    shown = [entry for job in jobs for entry in entries([job])]
    return document(f"{name} – umbel comparison", parts, f"Written by umbel compare {version(shown)}from the runs’ own files.")


def _lead(comparison: Comparison, told: Sequence[dict[str, Any]]) -> str:
    scored = [row for row in told if row["kind"] == "method" and row["score"] is not None]
    if not scored:
        return "No score has been measured yet."
    lower = scored[0]["lower_is_better"]
    scored.sort(key=lambda row: row["score"], reverse=not lower)
    best, reference = scored[0], comparison.about["reference"]
    said = f"Best {best['metric']}{' (lower is better)' if lower else ''}: {best['label']} with {plus_minus(best)}"
    if best["difference"] is not None:
        said += f", {bracketed(best)} against {reference}"
    sure = [
        row["label"] for row in scored if row["difference_half"] is not None and abs(row["difference"]) > row["difference_half"]
    ]
    if any(row["difference_half"] is not None for row in scored):
        said += f". The interval of the difference to {reference} leaves out zero for: {', '.join(sure) or 'none'}"
    edge = ", ".join(row["label"] for row in front(told))
    return f"{said}. On the Pareto front of score and bytes: {edge}."


def _table(comparison: Comparison, told: Sequence[dict[str, Any]]) -> str:
    reference = comparison.about["reference"]
    metric = told[0]["metric"] + (" ↓" if told[0]["lower_is_better"] else "") if told else "score"
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        (f"{comparison.about['scored_on']} {metric}", plus_minus),
        (f"difference to {reference}", lambda row: "reference" if row["label"] == reference else bracketed(row)),
        ("own test", lambda row: words.score(row["own_test"])),
        ("gap", lambda row: words.difference(row["gap"])),
        *compared.partial_columns(told),
        ("worst error", lambda row: words.error(row["error_worst"])),
        ("up", lambda row: words.size(row["bytes_up"])),
        ("down", lambda row: words.size(row["bytes_down"])),
        ("rank", lambda row: words.MISSING if row["rank"] is None else str(row["rank"])),
        ("seeds", lambda row: f"{len(row['seeds'])} of {row['seeds_planned']}"),
        ("chosen", lambda row: compared.options(row["options"]) or words.MISSING),
    ]
    style, edge = figures.looks_of(told), {row["label"] for row in front(told)}
    head = "".join(f'<th scope="col"{_text(name)}>{say(name)}</th>' for name, _ in columns)
    body = ""
    for number, row in enumerate(told):
        kind = "" if row["kind"] == "method" else "baseline"
        kind += " first-baseline" if kind and told[number - 1]["kind"] == "method" else ""
        swatch = f'<span class="swatch" style="background:{style[row["label"]].colour}"></span>'
        under = "<small>Pareto front</small>" if row["label"] in edge else ""
        cells = "".join(f"<td{_text(name)}>{say(show(row))}</td>" for name, show in columns)
        body += f'<tr class="{kind}"><th scope="row">{swatch}{say(row["label"])}{under}</th>{cells}</tr>'
    return (
        '<h2>What each method reached, and what it cost</h2><div class="scroll" tabindex="0"><table>'
        f'<thead><tr><th scope="col">method</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="note">{NOTE}</p>'
    )


def _text(name: str) -> str:
    return ' class="text"' if name == "chosen" else ""


def _figures(about: dict[str, Any], told: Sequence[dict[str, Any]]) -> str:
    if not told:
        return ""
    axis = f"{about['scored_on']} {told[0]['metric']}" + (" (lower is better)" if told[0]["lower_is_better"] else "")
    edge = [row["label"] for row in front(told)]
    drawn = [
        (
            figures.score_and_bytes(told, edge, axis, "front"),
            "Mean over seeds, bars: ± sample standard deviation. The grey line is the Pareto front: at so many bytes, no "
            "method does better. Dashed: the baselines, which send nothing; named at the edge where they are far off.",
        ),
        (
            figures.means_by_round(told, axis, "rounds"),
            "The common model after each training round, mean over seeds. Dashed: the baselines.",
        ),
    ]
    boxes = "".join(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for svg, caption in drawn if svg)
    return f'<h2>Score against bytes, and by round</h2><div class="pair">{boxes}</div>' if boxes else ""


def _equal(about: dict[str, Any]) -> str:
    body = "".join(
        f'<tr><th scope="row">{say(label)}</th><td>{rank}</td><td>{count:,.0f}</td>'
        f'<td class="text">{"more than that even at rank 1" if over else ""}</td></tr>'
        for label, rank, count, over in compared.ranks_chosen(about)
    )
    heads = f'<th scope="col">method</th><th scope="col">rank</th><th scope="col">{say(about["equal"])}</th><th></th>'
    table = f'<div class="scroll tall" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    return (
        "<h2>What is held equal</h2>"
        + "".join(f"<p>{say(text)}</p>" for text in compared.equal_notes(about))
        + (table if body else "")
        + "<p>At every seed all methods have the same clients and rows, the same initial A (where their ranks are equal), the "
        "same batches and as many steps.</p>"
    )


def _chosen(about: dict[str, Any]) -> str:
    first, *_ = compared.choice_notes(about)
    body = "".join(
        _candidate(label, one, one["values"] == own["values"])
        for label, own in about["methods"].items()
        for one in own["candidates"]
    )
    heads = '<th scope="col">method</th><th scope="col" class="text">values</th>'
    heads += '<th scope="col">validation score</th><th scope="col" class="text">state</th>'
    table = f'<div class="scroll tall" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<h2>What was chosen on validation rows</h2><p>{say(first)}</p>" + (table if body else "")


def _candidate(label: str, one: dict[str, Any], taken: bool) -> str:
    under, best = ("<small>chosen</small>", ' class="best"') if taken else ("", "")
    return (
        f'<tr><th scope="row">{say(label)}{under}</th><td class="text">{say(compared.options(one["values"]))}</td>'
        f'<td{best}>{say(words.score(one["score"]))}</td><td class="text">{say(one["error"] or one["state"])}</td></tr>'
    )


def _again(comparison: Comparison) -> str:
    seed, job = next(iter(comparison.jobs.items()), (None, None))
    boxes = "".join(run_details(f"{run.label}, seed {seed}", run) for run in (job.methods if job else []) if run.info)
    file = (comparison.folder / "compare.toml").read_text(encoding="utf-8")
    return (
        "<h2>How to get these numbers again</h2><p>The file below, as it was given; finished runs are not repeated. Each "
        "<code>seed-…</code> folder is a job of its own: <code>umbel report</code> and <code>umbel eval</code> take it.</p>"
        f"<pre>umbel compare compare.toml --out another-folder</pre>"
        f"<details><summary>compare.toml</summary><pre>{say(file)}</pre></details>{boxes}"
    )
