"""The closing table: what each method reached, how true its aggregate was, and what it cost."""

import math
from collections.abc import Sequence
from typing import Any

from umbel.report import words
from umbel.report.jobs import Entry, Job, Run, entries, job_names

SOMETIMES = {
    "exact match": "exact_match",
    "flexible match": "exact_match_flexible",
    "pass@1": "pass_at_1",
    "personal": "personal_score",
    "unseen": "unseen_score",
}
"""Scores that only some tasks, methods and splits have: what they are called, and their key in a row."""


def sometimes(told: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Returns those of `SOMETIMES` that any row has."""
    return {name: key for name, key in SOMETIMES.items() if any(row[key] is not None for row in told)}


def rows(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Returns one row per method, then the baselines `local` and `central`.

    Each row has:

    * `label`, `kind` ("method", "local", "central"), `job` (folder), `state`, `clients`, `rounds` (done), `rounds_planned`;
    * `metric`, `lower_is_better`, `scores` (all test rows, after each training round), `score` (the last that was
      measured), `score_min` and `score_max` (over clients; `local` only), `exact_match`,
      `exact_match_flexible` and `pass_at_1` (likewise the last);
    * `local_score`: mean over clients, weighted by test rows, of a client's own model on its own test rows after the last
      training and before aggregation; `personal_score`: likewise, of common parts and those that stayed with the clients, after
      the last aggregation, for methods that leave some there; `gap`: that, or else the local score, minus the score;
    * `unseen_score`: the last score on the test rows of the clients that took no part (`split.unseen`);
    * `by_client`: `client`, `local_score`, `gap` and `personal_score` of each;
    * `error_max`, `error_mean`: aggregation error over layers in the last round that measured it;
      `error_max_rounds`, `error_mean_rounds`: the same, averaged over rounds;
    * `epsilon`: ε spent so far by the client that spent most, where rows are hidden one by one;
    * `bytes_up`, `bytes_down`: per client (mean over all clients), whole run;
    * `server_seconds`, `wall_seconds`, `overhead`: share of the rounds' time that is neither training nor evaluation.

    The row `local` is the mean over its clients (seconds: the sum). What was not measured, or means nothing for a baseline
    (it sends nothing), is None.
    """
    return [_row(entry) for entry in entries(jobs)]


def by_round(entry: Entry) -> list[list[float]]:
    """Returns the scores on all test rows after each training round: one, or for "local" one per client that got there."""
    told = [[run.score(line) for line in run.trained] for run in entry.runs]
    length = max((len(x) for x in told), default=0)
    return [[score for x in told if r < len(x) and (score := x[r]) is not None] for r in range(length)]


def errors(run: Run) -> list[tuple[int, dict[str, float]]]:
    """Returns (training round, aggregation error by layer) for each round that measured it."""
    return [
        (line.get("train_round", 0), {name: math.nan if x is None else x for name, x in line["aggregation_error"].items()})
        for line in run.trained
        if line.get("aggregation_error")
    ]


def ranks(run: Run) -> list[tuple[int, dict[str, float]]]:
    """Returns (training round, rank sent by layer), or nothing where every rank is the adapter's own."""
    lora = run.config.get("lora") or {}
    listed = lora["r"] if isinstance(lora.get("r"), list) else [lora.get("r")]
    own = {*listed, *(lora.get("rank_pattern") or {}).values()}
    series = [(line.get("train_round", 0), line["rank"]) for line in run.trained if line.get("rank")]
    return series if any(rank not in own for _, layer in series for rank in layer.values()) else []


def _row(entry: Entry) -> dict[str, Any]:
    runs = [run for run in entry.runs if run.lines] or entry.runs[:1]
    first = runs[0]
    federated = entry.kind == "method"
    scores = [_mean(x) for x in by_round(entry)]
    last = [x for run in runs if (x := _reached(run)) is not None]
    local = [(line, x) for run in runs for line in run.trained[-1:] if (x := _local(run, line)) is not None]
    layers = [list(by_layer.values()) for _, by_layer in errors(first)] if federated else []
    personal = first.personal_score if federated else None
    seconds = [run.seconds() for run in runs]
    total, fit, evaluate = (sum(x.get(stage, 0.0) for x in seconds) for stage in ("total", "fit", "evaluate"))
    wall = sum(run.info.get("seconds") or x["total"] for run, x in zip(runs, seconds))
    return {
        "label": entry.label,
        "kind": entry.kind,
        "job": str(entry.job.folder),
        "state": _state(entry.runs),
        "error": next((run.info["error"] for run in entry.runs if run.info.get("error")), None),
        "clients": len(entry.runs) if entry.kind == "local" else first.clients,
        "rounds": min(len(run.trained) for run in entry.runs),
        "rounds_planned": first.planned,
        "metric": first.metric,
        "lower_is_better": first.lower_is_better,
        "scores": scores,
        "score_start": _mean([run.score(line) for run in runs for line in run.lines if line.get("phase") == "open"]),
        "score": _mean(last),
        "score_min": min(last) if entry.kind == "local" and last else None,
        "score_max": max(last) if entry.kind == "local" and last else None,
        **{
            key: _mean([x for run in runs if (x := _reached(run, key)) is not None])
            for key in ("exact_match", "exact_match_flexible", "pass_at_1")
        },
        "local_score": _mean([score for _, (score, _) in local]),
        "gap": _mean([(score if personal is None else personal) - whole for _, (score, whole) in local if whole is not None]),
        "personal_score": personal,
        "unseen_score": _mean([_reached(run, f"unseen_{run.metric}") for run in runs]),
        "by_client": _by_client(first) if federated else [],
        "error_max": max(layers[-1], key=_nan_largest) if layers else None,
        "error_mean": _mean(layers[-1]) if layers else None,
        "error_max_rounds": _mean([max(x, key=_nan_largest) for x in layers]),
        "error_mean_rounds": _mean([x for x in map(_mean, layers) if x is not None]),
        "epsilon": max((x for run in runs for line in run.lines for x in (line.get("epsilon") or {}).values()), default=None),
        "bytes_up": first.bytes_per_client("bytes_up")[-1] if federated and first.lines else None,
        "bytes_down": first.bytes_per_client("bytes_down")[-1] if federated and first.lines else None,
        "server_seconds": sum(x.get("server", 0.0) for x in seconds) if first.lines else None,
        "wall_seconds": wall if first.lines else None,
        "overhead": 1 - (fit + evaluate) / max(total, wall) if total > 0 else None,
    }


def _local(run: Run, line: dict[str, Any]) -> tuple[float, float | None] | None:
    """Returns (own models on own test rows, common model on all test rows) of one round."""
    own = run.local_score(line)
    return None if own is None else (own, run.score(line))


def _by_client(run: Run) -> list[dict[str, Any]]:
    """Returns each client's own model on its own test rows, that minus the common model's score, and its personal model."""
    if not run.trained:
        return []
    line, whole = run.trained[-1], run.score(run.trained[-1])
    personal = (run.gathered or {}).get("local") or {}
    return [
        {
            "client": int(client),
            "local_score": own,
            "gap": None if whole is None else (own if mine is None else mine) - whole,
            "personal_score": mine,
        }
        for client, scores in sorted((line.get("local") or {}).items(), key=lambda x: int(x[0]))
        for mine in [(personal.get(client) or {}).get(run.metric)]
        if (own := (scores or {}).get(run.metric)) is not None
    ]


def _reached(run: Run, metric: str = "") -> float | None:
    """Returns the score after the last round; of a run that is not done, the last that was measured.

    A finished run whose last model has no score (it diverged, and its loss is no number) has none.
    """
    scores = [run.score(line, metric) for line in run.trained]
    return scores[-1] if scores and run.state == "done" else _last(scores)


def _state(runs: Sequence[Run]) -> str:
    states = [run.state for run in runs]
    for state in ("failed", "running"):
        if state in states:
            return state
    return states[0] if len(set(states)) == 1 else "running"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known else None


def _last(values: Sequence[float | None]) -> float | None:
    return next((x for x in reversed(values) if x is not None), None)


def _nan_largest(value: float) -> float:
    """Sort key under which what is not a number counts as the largest: it must show."""
    return math.inf if math.isnan(value) else value


def refusals(run: Run) -> list[tuple[int, str, list[int]]]:
    """Returns (client, reason, rounds) for each client that was refused, or that was asked and fell silent."""
    found: dict[tuple[int, str], list[int]] = {}
    for line in run.lines:
        refused = {x.get("client", -1): str(x.get("reason", "no reason given")) for x in line.get("refused") or []}
        silent = set(line.get("asked") or []) - set(line.get("answered") or []) - set(refused)
        for client, reason in [*refused.items(), *((client, "did not answer") for client in sorted(silent))]:
            found.setdefault((client, reason), []).append(line.get("round", 0))
    return [(client, reason, rounds) for (client, reason), rounds in sorted(found.items())]


def headline(jobs: Sequence[Job]) -> list[str]:
    """Returns sentences that say what the table shows, the main one first; of several jobs, one paragraph for each."""
    if len(jobs) == 1:
        return _sentences(rows(jobs))
    names = job_names(jobs)
    return [f"{names[id(job)]}: {' '.join(_sentences(rows([job])))}" for job in jobs]


def _sentences(told: list[dict[str, Any]]) -> list[str]:
    methods = [row for row in told if row["kind"] == "method"]
    sign = 1 if _lower(methods) else -1
    scored = [x for x in methods if x["score"] is not None]
    scored.sort(key=lambda x: _nan_largest(sign * x["score"]))  # a score that is not a number comes last
    local, central = (
        next((x for x in told if x["kind"] == kind and x["score"] is not None), None) for kind in ("local", "central")
    )
    reached = [
        *([_alone(local)] if local else []),
        *([f"federated with {scored[0]['label']} {words.score(scored[0]['score'])}"] if scored else []),
        *([f"trained on everyone’s rows in one place {words.score(central['score'])}"] if central else []),
    ]
    first = next((x for x in (*scored, local, central) if x), None)
    result = [f"Test {_named(first)}: {'; '.join(reached)}."] if first else ["No score has been measured yet."]
    if scored and local and central and (way := sign * (local["score"] - central["score"])) > 0:
        gained = sign * (local["score"] - scored[0]["score"])
        if gained > 0:
            result.append(f"Federating covers {words.share(gained / way)} of the way from clients alone to pooled data.")
        else:
            result.append("Federating gains nothing here over clients alone.")
    if len(scored) > 1:
        listed = ", ".join(f"{x['label']} {words.score(x['score'])}" for x in scored)
        result.append(f"The methods, best first: {listed}.")
    return result + _costs(methods)


def _costs(methods: list[dict[str, Any]]) -> list[str]:
    """Returns sentences on the aggregation error, the bytes, and what is not done."""
    result: list[str] = []
    measured = sorted((x for x in methods if x["error_max"] is not None), key=lambda x: _nan_largest(x["error_max"]))
    if measured:
        least, most = measured[0], measured[-1]
        also = f" with {least['label']}, by {words.error(most['error_max'])} with {most['label']}" if most is not least else ""
        result.append(
            "In the worst layer of the last round, what the server sent back differed from the weighted mean of the clients’ "
            f"updates by {words.error(least['error_max'])} of its norm{also or ' with ' + least['label']}."
        )
    furthest = max((x["rounds"] for x in methods), default=0)
    sent = [x for x in methods if x["bytes_up"] is not None and x["rounds"] == furthest]
    sent = sorted(sent, key=lambda x: x["bytes_up"] + x["bytes_down"])
    if sent:
        each = [f"{words.size(x['bytes_up'] + x['bytes_down'])} with {x['label']}" for x in sent]
        each = each if len(each) < 3 else [each[0], each[-1]]
        result.append(f"Sent and received per client over the run: {(' to ' if len(sent) > 2 else ', ').join(each)}.")
    for row in methods:
        if row["state"] != "done":
            of = f"after {row['rounds']} of {row['rounds_planned']} rounds" if row["rounds_planned"] else "not started"
            why = f": {row['error']}" if row["error"] else ""
            result.append(f"{row['label']} is {row['state']}, {of}{why}.".replace("is failed", "failed"))
    return result


def _named(row: dict[str, Any]) -> str:
    return f"{row['metric']} (lower is better)" if row["lower_is_better"] else row["metric"]


def _alone(row: dict[str, Any]) -> str:
    span = f" ({words.score(row['score_min'])} to {words.score(row['score_max'])})" if row["clients"] > 1 else ""
    return f"a client alone reaches {words.score(row['score'])}{span}"


def _lower(told: list[dict[str, Any]]) -> bool:
    return any(row["lower_is_better"] for row in told)


def best(told: Sequence[dict[str, Any]], key: str, row: dict[str, Any]) -> bool:
    """Returns whether no other finished method of the same job does better by that key; False where there is no other."""
    # A run that stopped early has sent less: that is no merit.
    rivals = [x for x in told if x["kind"] == "method" and x["job"] == row["job"] and x["state"] == "done"]
    values = [x[key] for x in rivals if x[key] is not None and not math.isnan(x[key])]
    if row not in rivals or row[key] is None or len(values) < 2:
        return False
    return row[key] == (max(values) if key == "score" and not row["lower_is_better"] else min(values))


def as_json(jobs: Sequence[Job]) -> dict[str, Any]:
    """Returns the closing table as plain JSON values, with what was refused; a number that is not finite is None."""
    names = job_names(jobs)
    return finite(
        {
            "headline": headline(jobs),
            "rows": rows(jobs),
            "refused": [
                {"job": names[id(job)], "label": run.label, "client": client, "reason": reason, "rounds": when}
                for job in jobs
                for run in job.methods
                for client, reason, when in refusals(run)
            ],
        }
    )


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
