"""The report as one HTML file: everything inside, nothing fetched, no script."""

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from umbel.report import figures, words
from umbel.report.closing import best, errors, headline, ranks, refusals, rows, sometimes
from umbel.report.jobs import Entry, Job, Run, entries, job_names
from umbel.report.style import CSS

say = html.escape  # every text that comes from a file goes through it


NOTE = """\
<b>Score</b>: the aggregated model on all test rows, last round (↓: lower is better). <b>Own test</b>: each client’s model
after its training and before aggregation, on its own test rows, mean weighted by rows; <b>gap</b>: that minus the score.
<b>Personal</b>: common parts with those that stay at the client, on own test rows. <b>Unseen</b>: the aggregated model on
the test rows of clients that took no part. <b>Error</b>: aggregation error, the relative distance of what was sent back
from the weighted mean of the clients’ updates; max and mean over layers, of the last round and in the mean over all rounds.
<b>Per client</b>: bytes over the whole run, mean over clients; <b>ε</b>: privacy spent per row, by the client that spent
most. <b>Overhead</b>: share of the run’s time outside training and evaluation. <b>local</b>: one client alone, mean over
clients (range below; times are sums). <b>central</b>: one model on everyone’s rows. Bold: best of the methods."""


RANKED = ("score", "error_max", "error_mean", "bytes_up", "bytes_down")


def write_html(jobs: Sequence[Job], path: Path) -> Path:
    """Writes the report.

    Args:
        jobs: What to show; several stand in the same table and figures.
        path: The file to write; its folder is made.

    Returns:
        `path`.
    """
    path = Path(path)
    told, shown = rows(jobs), entries(jobs)
    title = " · ".join(dict.fromkeys(job_names(jobs).values())) or "umbel"
    lead = "lead" if len(jobs) == 1 else "job"
    first, *others = headline(jobs) or ["Nothing to report."]
    parts = [
        '<p class="kicker">umbel · federated LoRA</p>',
        f"<h1>{say(title)}</h1>",
        f'<p class="{lead}">{say(first)}</p>',
        *(f"<p>{say(sentence)}</p>" for sentence in others),
        facts(jobs),
        _closing_table(told, shown),
        *_score_figures(told, shown),
        _by_client(told),
        _error_maps(shown),
        _rank_maps(shown),
        '<div class="pair">',
        _stages(shown),
        *_splits(jobs),
        "</div>",
        _refused(shown),
        _provenance(shown),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    footer = f"Written by umbel report {version(shown)}from the run’s own files."
    path.write_text(document(f"{title} – umbel report", parts, footer), encoding="utf-8")
    return path


def document(title: str, parts: Sequence[str], footer: str) -> str:
    """Returns a whole page of parts that are HTML; title and footer are text, or HTML that was made safe."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{say(title)}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<footer>{footer}</footer>\n</main>\n</body>\n</html>\n"
    )


def facts(jobs: Sequence[Job]) -> str:
    """Returns what the runs have in common, as tiles; what differs between them is left to the details."""
    runs = [run for job in jobs for run in (*job.methods, *([job.central] if job.central else []))]
    methods = [run for job in jobs for run in job.methods]
    ask: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("Model", lambda c: _model_name(str(c["model"]["name"]))),
        ("Adapter", lambda c: f"rank {c['lora']['r']}, α\N{NO-BREAK SPACE}{c['lora']['lora_alpha']:g}"),
        ("Split", lambda c: _split_words(c["split"])),
        ("Rounds", lambda c: c["rounds"]),
        ("Local training", lambda c: _training_words(c["training"])),
        ("Learning rate", lambda c: f"{c['training']['learning_rate']:g}"),
        ("Seed", lambda c: c["seed"]),
    ]
    clients = {run.clients for run in methods if run.clients}
    tiles = [("Clients", str(clients.pop()))] if len(clients) == 1 else []
    for name, of in ask:
        try:
            values = {str(of(run.config)) for run in runs if run.config}
        except (KeyError, TypeError, ValueError):
            continue
        tiles += [(name, value) for value in values if value] if len(values) == 1 else []
    if not tiles:
        return ""
    return '<dl class="facts">' + "".join(f"<div><dt>{k}</dt><dd>{say(v)}</dd></div>" for k, v in tiles) + "</dl>"


def _model_name(name: str) -> str:
    """Returns the last part of a path or hub name; the one before where a folder is just called "model"."""
    parts = Path(name.removeprefix("pkg:")).parts
    return parts[-2] if len(parts) > 1 and parts[-1] == "model" else parts[-1] if parts else ""


def _split_words(table: dict[str, Any]) -> str:
    kind = table["kind"]
    return {
        "dirichlet": f"Dirichlet, α\N{NO-BREAK SPACE}{table.get('alpha')}",
        "by": f"by {table.get('column')}",
        "iid": "IID",
    }.get(kind, str(kind))


def _training_words(table: dict[str, Any]) -> str:
    steps, epochs = table.get("max_steps", 0), table.get("num_train_epochs", 0)
    return words.count(steps, "step") if steps else f"{epochs:g} epoch" + ("" if epochs == 1 else "s")


def _closing_table(told: list[dict[str, Any]], shown: Sequence[Entry]) -> str:
    style = figures.looks(shown)
    metric = " / ".join(dict.fromkeys(row["metric"] + (" ↓" if row["lower_is_better"] else "") for row in told)) or "score"
    groups: list[tuple[str, list[tuple[str, str, Callable[[Any], str]]]]] = [
        (
            "Score",
            [
                (metric, "score", words.score),
                ("own test", "local_score", words.score),
                ("gap", "gap", words.difference),
                *((name, key, words.score) for name, key in sometimes(told).items()),
            ],
        ),
        ("Error, last round", [("max", "error_max", words.error), ("mean", "error_mean", words.error)]),
        ("Error, all rounds", [("max", "error_max_rounds", words.error), ("mean", "error_mean_rounds", words.error)]),
        (
            "Per client",
            [
                ("up", "bytes_up", words.size),
                ("down", "bytes_down", words.size),
                *([("ε", "epsilon", words.epsilon)] if any(row["epsilon"] is not None for row in told) else []),
            ],
        ),
        (
            "Time",
            [
                ("server", "server_seconds", words.duration),
                ("wall", "wall_seconds", words.duration),
                ("overhead", "overhead", words.share),
            ],
        ),
    ]
    columns = [column for _, group in groups for column in group]
    over = "".join(
        f'<th class="group" colspan="{len(group)}" scope="colgroup"><span>{name}</span></th>' for name, group in groups
    )
    under = "".join(f'<th scope="col">{say(name)}</th>' for name, *_ in columns)
    body = "".join(
        _table_row(row, columns, told, style[row["label"]].colour, n == 0 or told[n - 1]["kind"] == "method")
        for n, row in enumerate(told)
    )
    return (
        "<h2>What each method reached, and what it cost</h2>"
        '<div class="scroll" tabindex="0"><table>'
        f'<thead><tr><th rowspan="2" scope="col">method</th>{over}</tr><tr>{under}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        f'<p class="note">{NOTE}</p>'
    )


def _table_row(row: dict[str, Any], columns: Sequence[Any], told: Sequence[dict[str, Any]], colour: str, first: bool) -> str:
    cells: list[str] = []
    for _, key, show in columns:
        text = say(show(row[key]))
        if key == "score" and row["score_min"] is not None and row["clients"] > 1:
            text += f"<small>{words.score(row['score_min'])}–{words.score(row['score_max'])}</small>"
        wins = key in RANKED and best(told, key, row)
        cells.append(f'<td class="best">{text}</td>' if wins else f"<td>{text}</td>")
    of = f" {row['rounds']} of {row['rounds_planned']} rounds" if row["rounds_planned"] else ""
    state = "" if row["state"] == "done" else f"<small>{say(row['state'])}{of}</small>"
    kind = "" if row["kind"] == "method" else ' class="baseline first-baseline"' if first else ' class="baseline"'
    swatch = f'<span class="swatch" style="background:{colour}"></span>'
    return f'<tr{kind}><th scope="row">{swatch}{say(row["label"])}{state}</th>{"".join(cells)}</tr>'


def _by_client(told: list[dict[str, Any]]) -> str:
    """Returns what each client's own model reached on its own test rows, and how far that is from the common model."""
    federated = [row for row in told if row["by_client"]]
    if not federated:
        return ""
    clients = sorted({own["client"] for row in federated for own in row["by_client"]})
    body = ""
    for row in federated:
        own = {x["client"]: x for x in row["by_client"]}
        cells = "".join(_client_cell(own.get(client)) for client in clients)
        mean = {"local_score": row["local_score"], "gap": row["gap"], "personal_score": row["personal_score"]}
        body += f'<tr><th scope="row">{say(row["label"])}</th>{_client_cell(mean)}{cells}</tr>'
    heads = "".join(f'<th scope="col">client {client}</th>' for client in clients)
    return (
        "<h2>Personal and global</h2>"
        "<p>Each client’s own model on its own test rows after the last training and before aggregation; under it the gap to "
        "the common model on all test rows, and, where parts stay with the clients, the score of common and own parts "
        "together.</p>"
        '<div class="scroll" tabindex="0"><table><thead><tr><th scope="col">method</th><th scope="col">mean</th>'
        f"{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _client_cell(own: dict[str, Any] | None) -> str:
    if own is None:
        return "<td>–</td>"
    personal = own["personal_score"]
    with_own = "" if personal is None else f"<small>{words.score(personal)} personal</small>"
    return f"<td>{words.score(own['local_score'])}<small>{words.difference(own['gap'])}</small>{with_own}</td>"


def _score_figures(told: list[dict[str, Any]], shown: Sequence[Entry]) -> list[str]:
    """Returns one section per metric: jobs with different metrics do not share an axis."""
    result: list[str] = []
    for number, metric in enumerate(dict.fromkeys(row["metric"] for row in told)):
        same = [entry for entry, row in zip(shown, told) if row["metric"] == metric]
        lower = next(row["lower_is_better"] for row in told if row["metric"] == metric)
        axis = f"test {metric}" + (" (lower is better)" if lower else "")
        drawn = [
            (
                figures.score_by_round(same, axis, f"rounds-{number}"),
                "Score on all test rows after each training round. Dashed: the baselines; the band spans the clients alone.",
            ),
            (
                figures.score_by_bytes(same, axis, f"bytes-{number}"),
                "The same scores against what one client has sent and received by then (mean over clients, log scale).",
            ),
        ]
        boxes = "".join(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for svg, caption in drawn if svg)
        heading = "Score by round and by bytes" if number == 0 else f"{metric.capitalize()} by round and by bytes"
        if boxes:
            result.append(f'<h2>{say(heading)}</h2><div class="pair">{boxes}</div>' + _score_numbers(same, told))
    return result


def _score_numbers(same: Sequence[Entry], told: list[dict[str, Any]]) -> str:
    labels = {entry.label for entry in same}
    listed = [row for row in told if row["label"] in labels]
    length = max(len(row["scores"]) for row in listed)
    heads = "".join(f'<th scope="col">{r}</th>' for r in range(1, length + 1))
    body = "".join(
        f'<tr><th scope="row">{say(row["label"])}</th>'
        + "".join(f"<td>{words.score(x)}</td>" for x in [*row["scores"], *[None] * (length - len(row["scores"]))])
        + "</tr>"
        for row in listed
    )
    return (
        '<details><summary>The scores as numbers</summary><div class="scroll" tabindex="0"><table>'
        f'<thead><tr><th scope="col">after round</th>{heads}</tr></thead><tbody>{body}</tbody></table></div></details>'
    )


def _error_maps(shown: Sequence[Entry]) -> str:
    without = [entry.label for entry in shown if entry.kind == "method" and entry.runs[0].trained and not errors(entry.runs[0])]
    caption = (
        "‖ΔW sent − Σ pₖ ΔWₖ‖ / ‖Σ pₖ ΔWₖ‖ in the Frobenius norm, for each layer (down) and round (across). Darker is further "
        "from the weighted mean of the clients’ updates; about 10⁻⁷ is the rounding of 32-bit numbers."
    )
    if without:
        caption += f" Not measured: {', '.join(without)}."
    return _heat_maps("Aggregation error by layer", figures.error_panels(shown), caption)


def _rank_maps(shown: Sequence[Entry]) -> str:
    """Returns ranks that differ from the adapter's: a panel where they vary, a sentence where they are one number."""
    other = [(entry.label, ranks(entry.runs[0])) for entry in shown if entry.kind == "method"]
    known = [(label, {rank for _, layer in series for rank in layer.values()}) for label, series in other]
    fixed = [f"{label} sent rank {found.pop()} in every layer and round." for label, found in known if len(found) == 1]
    caption = " ".join(
        ["Rank of the product that was sent back, for each layer (down) and round (across), where it varies.", *fixed]
    )
    drawn = figures.rank_panels(shown)
    if fixed and not drawn[1]:
        return f"<h2>Rank by layer</h2><p>{say(' '.join(fixed))}</p>"
    return _heat_maps("Rank by layer", drawn, caption)


def _heat_maps(heading: str, drawn: tuple[str, list[figures.Panel]], caption: str) -> str:
    scale, panels = drawn
    if not panels:
        return ""
    boxes = "".join(f"<div><h3>{say(panel.title)}</h3>{panel.svg}</div>" for panel in panels)
    return (
        f'<h2>{heading}</h2><figure><div class="scale">{scale}</div><div class="panels">{boxes}</div>'
        f"<figcaption>{say(caption)}</figcaption></figure>"
    )


def _stages(shown: Sequence[Entry]) -> str:
    svg = figures.stages(shown)
    if not svg:
        return ""
    key = "".join(f'<li><span class="swatch" style="background:{c}"></span>{stage}</li>' for stage, c in figures.STAGES.items())
    return (
        f'<section><h2>Where the time went</h2><figure><ul class="legend">{key}</ul>{svg}'
        "<figcaption>Wall seconds by stage, summed over rounds and clients; at the end of each bar the share outside fit and "
        "evaluate. “other” is what the stages do not account for.</figcaption></figure></section>"
    )


def _splits(jobs: Sequence[Job]) -> list[str]:
    """Returns who has which rows; jobs over the same split share one figure."""
    result, seen = list[str](), list[Any]()
    for job in jobs:
        counts: list[list[int]] = job.split.get("train") or []
        if not counts or counts in seen:
            continue
        seen.append(counts)
        svg, scale = figures.split(counts, [str(x) for x in job.split.get("labels") or []], f"split-{len(seen)}")
        totals = [sum(row) for row in counts]
        test = sum(map(sum, job.split.get("test") or []))
        least, most = min(totals), max(totals)
        sizes = f"{least:,} rows each" if least == most else f"{least:,} to {most:,} rows each"
        name = f" ({say(job_names(jobs)[id(job)])})" if len(jobs) > 1 else ""
        result.append(
            f'<section><h2>Who has which rows{name}</h2><figure><div class="scale">{scale}</div>{svg}'
            f"<figcaption>Training rows per label and client: {words.count(len(totals), 'client')}, {sizes}, "
            f"{sum(totals):,} in all; {test:,} test rows. "
            "Shading follows the square root.</figcaption></figure></section>"
        )
    return result


def _refused(shown: Sequence[Entry]) -> str:
    found = [(entry.label, *refusal) for entry in shown for run in entry.runs for refusal in refusals(run)]
    heading = "<h2>Who was refused</h2>"
    if not found:
        return heading + "<p>Nobody: every client that was asked answered, and every answer was taken.</p>"
    body = "".join(
        f'<tr><th scope="row">{say(label)}</th><td>{say(str(client))}</td><td>{words.rounds(when)}</td>'
        f'<td class="text">{say(reason)}</td></tr>'
        for label, client, reason, when in found
    )
    return heading + (
        '<div class="scroll tall" tabindex="0"><table><thead><tr><th scope="col">method</th><th scope="col">client</th>'
        f'<th scope="col">rounds</th><th scope="col" class="text">reason</th></tr></thead><tbody>{body}</tbody></table></div>'
    )


def _provenance(shown: Sequence[Entry]) -> str:
    runs = [(entry.label, run) for entry in shown if entry.kind != "local" for run in entry.runs]
    boxes = "".join(run_details(label, run) for label, run in runs if run.info)
    return f"<h2>How to get these numbers again</h2>{boxes}" if boxes else ""


def run_details(label: str, run: Run) -> str:
    """Returns one run's resolved configuration, versions, machine and hashes."""
    try:
        config = (run.folder / "run.toml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        config = json.dumps(run.config, indent=2, ensure_ascii=False)
    info = run.info
    about = {
        "umbel": info.get("umbel"),
        "started": info.get("started"),
        "finished": info.get("finished"),
        "error": info.get("error"),
    }
    about |= {
        f"{part} {key}" if part != "versions" else key: value
        for part in ("versions", "machine", "model", "data", "adapter")
        for key, value in (info.get(part) or {}).items()
    }
    body = "".join(
        f'<tr><th scope="row">{say(str(key))}</th><td class="text">{say(_plain(key, value))}</td></tr>'
        for key, value in about.items()
        if value is not None
    )
    torn = '<p class="alert">The last line of rounds.jsonl was not complete and is left out.</p>' if run.torn else ""
    return (
        f"<details><summary>{say(label)}</summary>{torn}<h3>Resolved configuration</h3><pre>{say(config)}</pre>"
        f'<h3>Versions, machine, hashes</h3><div class="scroll"><table><tbody>{body}</tbody></table></div></details>'
    )


def _plain(key: str, value: Any) -> str:
    if key.endswith("_bytes") or key.endswith(" memory_bytes"):
        return words.size(value) if isinstance(value, (int, float)) else str(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def version(shown: Sequence[Entry]) -> str:
    """Returns the version that made the runs, where they agree."""
    known = {str(run.info["umbel"]) for entry in shown for run in entry.runs if run.info.get("umbel")}
    return f"(runs made with umbel {say(known.pop())}) " if len(known) == 1 else ""
