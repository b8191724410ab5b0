"""Membership inference on a federation's final model, on one client's upload, and on the mean of the round's uploads.

    python benchmarks/privacy/membership.py CLINC150-FOLDER WORK-FOLDER [--runs 6]

A pool of rows is dealt to three clients; in each run every client trains on a random half of its rows, and the attacker, who
has all rows, says which were in. A third of the pool are canaries: their label is drawn among the wrong ones, so they can only
be known by heart. Two attacks: a threshold on the loss, and LiRA (Carlini et al., arXiv 2112.03570) with a variance common to
all rows, where the other runs of the same setting are the shadow runs. WORK-FOLDER keeps every run as soon as it is done, so
that the script goes on where it was stopped; the result goes to results/membership.json.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import setting
from umbel import algebra
from umbel.record import write_json

CLIENTS, POOL, CANARIES = 3, 600, 200
ROUNDS, STEPS, BATCH = 2, 8, 32
DELTA = 1e-3
EPSILONS = (None, 8.0, 3.0, 1.0)
METHODS = {
    "fedit": {"method": {"name": "fedit"}, "lora": {"r": 8, "lora_alpha": 8}},
    "fed_sb": {"method": {"name": "fed_sb", "init": "random"}, "lora": {"r": 32, "lora_alpha": 32}},
}
VIEWS = ("final model", "one client's upload", "mean of the uploads")
FALSE_POSITIVES = (0.01, 0.05)

Table = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", type=Path, help="folder of CLINC150")
    parser.add_argument("work", type=Path, help="folder for what is done so far")
    parser.add_argument("--runs", type=int, default=6)
    arguments = parser.parse_args()
    setting.one_thread()
    arguments.work.mkdir(parents=True, exist_ok=True)
    loaded = setting.Loaded.of(configured(arguments.rows, "fedit", None, 0))
    pool, labels = drawn_pool(loaded)
    # Run by run over all settings, so that whatever is done when it is stopped is a comparison.
    for run in range(arguments.runs):
        for method in METHODS:
            for epsilon in EPSILONS:
                done = arguments.work / f"{method}-{epsilon}-{run}.json"
                if not done.exists():
                    config = configured(arguments.rows, method, epsilon, run + 1)
                    write_json(done, observed(loaded, config, pool, labels, members(run)))
                    print(done.stem, json.loads(done.read_text())["accuracy"], flush=True)
    write_json(setting.RESULTS / "membership.json", {**told(arguments.work, arguments.runs), "provenance": loaded.provenance})


def configured(rows: Path, method: str, epsilon: float | None, seed: int) -> Any:
    """Returns the configuration of one run."""
    private: Table = {"unit": "example", "target_epsilon": epsilon, "target_delta": DELTA, "max_grad_norm": 0.5}
    training = {"learning_rate": 2e-2, "per_device_train_batch_size": BATCH, "max_steps": STEPS}
    described = setting.table(rows, **METHODS[method], training=training, rounds=ROUNDS, seed=seed)
    return setting.configured(described | ({"privacy": private} if epsilon else {}))


def drawn_pool(loaded: setting.Loaded) -> tuple[list[int], dict[int, int]]:
    """Returns the pool's rows, canaries first, and the canaries' wrong labels."""
    draw = torch.Generator().manual_seed(6)
    pool = torch.randperm(len(loaded.train), generator=draw)[:POOL].tolist()
    many = len(loaded.dataset.labels)
    shift = torch.randint(1, many, (CANARIES,), generator=draw).tolist()
    return pool, {row: (_label(loaded, row) + by) % many for row, by in zip(pool, shift)}


def _label(loaded: setting.Loaded, row: int) -> int:
    label = loaded.train[row].labels
    assert isinstance(label, int)
    return label


def members(run: int) -> list[bool]:
    """Returns which rows of the pool are in a run: half of every client's canaries and of its other rows.

    Runs 2i and 2i + 1 are each other's complement, so that every row is in half of the runs.
    """
    draw = torch.Generator().manual_seed(algebra.seed_of("members", run // 2) % 2**63)
    chosen = [False] * POOL
    for group in (range(CANARIES), range(CANARIES, POOL)):
        for client in range(CLIENTS):
            own = [i for i in group if i % CLIENTS == client]
            for i in torch.randperm(len(own), generator=draw)[: len(own) // 2].tolist():
                chosen[own[i]] = True
    return chosen if run % 2 == 0 else [not x for x in chosen]


def observed(loaded: setting.Loaded, config: Any, pool: list[int], labels: dict[int, int], inside: list[bool]) -> Table:
    """Trains once and returns what each attacker computes of every row of the pool: the logit of its label's probability."""
    owner = [-2] * len(loaded.train)
    for i, row in enumerate(pool):
        owner[row] = i % CLIENTS if inside[i] else -2
    own = loaded.owned(owner, labels)
    rows = [own.train[i] for i in pool]
    with tempfile.TemporaryDirectory() as name, setting.federation(own, config, Path(name)) as done:
        done.final(config.seed)
        log_p = setting.log_probabilities(own, rows)
        test = own.test[: 3 * 300 : 3]
        found: Table = {"accuracy": setting.accuracy(setting.log_probabilities(own, test), test)}
        found["members"] = [int(x) for x in inside]
        found["final model"] = logits(log_p, rows)
        found["one client's upload"], found["mean of the uploads"] = [0.0] * POOL, []
        middle = done.uploads[0]
        for client, message in enumerate(middle):
            done.put(message.tensors)
            mine = [i for i in range(POOL) if i % CLIENTS == client]
            for i, value in zip(mine, logits(setting.log_probabilities(own, part := [rows[i] for i in mine]), part)):
                found["one client's upload"][i] = value
        mean = {key: torch.stack([message.tensors[key] for message in middle]).mean(0) for key in middle[0].tensors}
        done.put(mean)
        found["mean of the uploads"] = logits(setting.log_probabilities(own, rows), rows)
        found["epsilon"] = [line.get("epsilon") for line in done.record.lines()][-1]
    return found


def logits(log_p: Tensor, rows: list[Any]) -> list[float]:
    """Returns log p_y − log(1 − p_y) of each row's label y, as LiRA takes it: near normal where losses are not."""
    index = torch.tensor([row.labels for row in rows])
    right = log_p.double().gather(1, index[:, None])[:, 0]
    wrong = log_p.double().scatter(1, index[:, None], -math.inf).logsumexp(1)
    return (right - wrong).tolist()


def told(work: Path, runs: int) -> Table:
    """Returns every attack's success on every setting."""
    rows: list[Table] = []
    for method in METHODS:
        for epsilon in EPSILONS:
            named = [work / f"{method}-{epsilon}-{run}.json" for run in range(runs)]
            # Whole pairs of complements only.
            files = [path for run, path in enumerate(named) if path.exists() and named[run ^ 1].exists()]
            found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
            inside = torch.tensor([x["members"] for x in found], dtype=torch.bool)
            about = {"method": method, "epsilon": epsilon, "accuracy": setting.interval([x["accuracy"] for x in found])}
            about["allowed"] = {str(f): min(1.0, math.exp(epsilon) * f + DELTA) if epsilon else None for f in FALSE_POSITIVES}
            for view in VIEWS:
                values = torch.tensor([x[view] for x in found], dtype=torch.float64)
                for attack, scores in (("loss", values), ("LiRA", likelihood_ratios(values, inside))):
                    for group, part in (("canaries", slice(0, CANARIES)), ("all rows", slice(0, POOL))):
                        measured = success(scores[:, part], inside[:, part])
                        rows.append({**about, "view": view, "attack": attack, "rows": group, **measured})
    return {
        "clients": CLIENTS, "pool": POOL, "canaries": CANARIES, "rounds": ROUNDS, "steps": STEPS, "batch": BATCH,
        "delta": DELTA, "methods": METHODS, "runs": runs, "rows": rows,
    }  # fmt: skip


def likelihood_ratios(values: Tensor, inside: Tensor) -> Tensor:
    """Returns LiRA's score, runs × rows: for each run, the others are its shadows, except its complement.

    The complement would tell who is in: with it, a row that is in has one shadow more that is without it. So every row is in
    half of the shadows, whatever it is in the run. The means in and out are a row's own; the two variances are common to all
    rows, since a row has few shadows.

    Args:
        values: Runs × rows; runs 2i and 2i + 1 are each other's complement (see `members`), and there are four or more.
        inside: Likewise.

    >>> inside = torch.tensor([[True, False], [False, True]] * 2)
    >>> noise = torch.tensor([[0.1, 0.0], [0.0, 0.1], [0.0, 0.2], [0.2, 0.0]])
    >>> bool((likelihood_ratios(inside * 3.0 + noise, inside) > 0).equal(inside))
    True
    """
    scores = torch.empty_like(values)
    for run in range(len(values)):
        others = [i for i in range(len(values)) if i // 2 != run // 2]
        x, member = values[others], inside[others]
        likelihood: list[Tensor] = []
        for of in (member, ~member):
            count = len(others) // 2
            mean = torch.where(of, x, 0.0).sum(0) / count
            variance = torch.where(of, (x - mean) ** 2, 0.0).sum() / (max(1, count - 1) * x.shape[1])
            # A mean over few shadows is uncertain itself.
            spread = variance.clamp(min=1e-12) * (1 + 1 / count)
            likelihood.append(-((values[run] - mean) ** 2) / (2 * spread) - spread.log() / 2)
        scores[run] = likelihood[0] - likelihood[1]
    return scores


def success(scores: Tensor, inside: Tensor) -> Table:
    """Returns the area under the ROC curve and the true-positive rates at low false-positive ones, over runs."""
    areas = [area(x[of], x[~of]) for x, of in zip(scores, inside)]
    result: Table = {"auc": setting.interval(areas)}
    for f in FALSE_POSITIVES:
        result[f"tpr at {f}"] = setting.interval([rate(x[of], x[~of], f) for x, of in zip(scores, inside)])
    return result


def area(member: Tensor, other: Tensor) -> float:
    """Returns P(a member's score > another's) + P(equal) / 2.

    >>> area(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    above = (member[:, None] > other[None]).double() + (member[:, None] == other[None]).double() / 2
    return float(above.mean())


def rate(member: Tensor, other: Tensor, false: float) -> float:
    """Returns the share of members above the threshold that at most this share of the others exceed.

    >>> rate(torch.tensor([2.0, 5.0]), torch.arange(5.0), 0.2)
    0.5
    """
    allowed = int(false * len(other))
    threshold = other.sort(descending=True).values[allowed]
    return float((member > threshold).double().mean())


if __name__ == "__main__":
    main()
