"""`umbel compare`: what is held equal, chosen, repeated and reused; on tiny real models."""

import csv
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tiny
from recorded import lines
from umbel import compare as comparing
from umbel import config as configuration
from umbel import method as methods
from umbel import report
from umbel import run as running
from umbel.cli import app
from umbel.compare import Ranks, compare, largest_rank, trained, travelled
from umbel.config import ConfigError
from umbel.method import Download, Method
from umbel.record import RecordError
from umbel.report.comparison import COLUMNS, bracketed, front, interval, spread, summary

LAYERS = Counter({(32, 32): 2, (48, 32): 2})  # of tiny.bert: query and intermediate.dense


@dataclass(frozen=True)
class OneFactor(Method):
    """Trains and sends B alone; A stays as it was drawn."""

    trains = sends = ("B",)

    def combine(self, got, held):
        return Download(factors={"B": got["B"]})


@dataclass(frozen=True)
class Alternating(Method):
    """Trains B in odd rounds and A in even ones."""

    def plan(self, rounds):
        return [OneFactor() if n % 2 else OtherFactor() for n in range(1, rounds + 1)]

    def combine(self, got, held):
        raise NotImplementedError  # its phases do it


@dataclass(frozen=True)
class OtherFactor(Method):
    """Trains and sends A alone."""

    trains = sends = ("A",)

    def combine(self, got, held):
        return Download(factors={"A": got["A"]})


def table(folder: Path, **compare: Any) -> dict[str, Any]:
    """A comparison of three methods at two seeds on the tiny BERT; differences show after two rounds of six steps."""
    result = tiny.table(folder, training={"learning_rate": 2e-2, "max_steps": 6})
    del result["method"], result["seed"]
    own = {"seeds": [1, 2], "methods": [{"name": "florist", "choose": {"energy": [0.5, 1.0]}}, "fedit", "fed_sb"]}
    return {**result, "compare": {**own, **compare}}


def last_score(folder: Path) -> float:
    return lines(folder)[-1]["global"]["accuracy"]


def times(folder: Path) -> dict[str, int]:
    """When each run's rounds were last written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("rounds.jsonl"))}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def finished(place):
    return compare(table(place), place / "out")


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished comparison that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


# Runs


def test_every_method_and_both_baselines_run_at_every_seed(finished):
    for seed in (1, 2):
        job = json.loads((finished / f"seed-{seed}" / "job.json").read_text())
        assert job["methods"] == ["fedit", "florist", "fed_sb"]  # the reference first
        for label in ("fedit", "florist", "fed_sb", "central", "local/client-2"):
            run = json.loads((finished / f"seed-{seed}" / label / "run.json").read_text())
            assert (run["state"], run["config"]["seed"]) == ("done", seed)


def test_methods_of_a_seed_share_clients_rows_initial_factors_and_batches(finished):
    first = {}
    for seed in (1, 2):
        losses = [lines(finished / f"seed-{seed}" / label)[1]["loss"] for label in ("fedit", "florist")]
        assert losses[0] == losses[1]
        steps = [
            [line["steps"] for line in lines(finished / f"seed-{seed}" / label) if line["phase"] == "train"]
            for label in ("fedit", "florist", "fed_sb")
        ]
        assert steps[0] == steps[1] == steps[2]
        alone = [lines(finished / f"seed-{seed}" / "local" / f"client-{k}")[1]["loss"][str(k)] for k in range(3)]
        assert alone == [losses[0][str(k)] for k in range(3)]
        first[seed] = losses[0], json.loads((finished / f"seed-{seed}" / "split.json").read_text())["rows"]["train"]
    assert first[1] != first[2]
    assert first[1][1] != first[2][1]


def test_a_finished_comparison_is_not_repeated(finished, place):
    before = times(finished)
    heard = []
    compare(table(place), finished, heard.append)
    assert times(finished) == before
    assert [event for event in heard if event["event"] in ("round", "step")] == []
    assert len(before) == 2 * (3 + 1 + 3) + 2  # methods, central, local; candidates


def test_a_comparison_that_was_stopped_goes_on_where_it_was_and_ends_with_the_same_numbers(finished, place, tmp_path):
    def stop(event):
        if event["event"] == "member" and event["label"].startswith("fed_sb, seed 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(table(place), tmp_path / "out", stop)
    before = times(tmp_path / "out")
    assert any("seed-2/fedit" in name for name in before)
    assert not any("seed-2/fed_sb" in name for name in before)
    compare(table(place), tmp_path / "out")
    after = times(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert set(after) == set(times(finished))
    assert [last_score((tmp_path / "out" / name).parent) for name in after] == [
        last_score((finished / name).parent) for name in after
    ]


def test_a_method_that_joins_later_finds_the_others_done(copy, place):
    before = times(copy)
    own = table(place)["compare"]["methods"]
    compare(table(place, methods=[*own, "flora_na"]), copy)
    after = times(copy)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {f"seed-{seed}/flora_na/rounds.jsonl" for seed in (1, 2)}
    assert {row["label"] for row in summary(report.read_comparison(copy))} == {
        *("fedit", "florist", "fed_sb", "flora_na"),
        *("local", "central"),
    }


def test_a_seed_that_joins_later_finds_the_others_done_and_one_that_goes_is_left_out(copy, place):
    before = times(copy)
    compare(table(place, seeds=[1, 3]), copy)
    after = times(copy)
    assert {name: after[name] for name in before} == before
    assert {row["seed"] for row in report.comparison_json(report.read_comparison(copy))["runs"]} == {1, 3}


def test_a_method_that_would_now_be_another_is_refused(copy, place):
    changed = table(place)
    changed["training"]["learning_rate"] = 1e-3
    before = {name: (copy / name).read_bytes() for name in ("compare.toml", "compare.json", "chosen.json", "comparison.csv")}
    with pytest.raises(RecordError, match=r"began with another configuration \(training.learning_rate = 0.02, now 0.001\)"):
        compare(changed, copy)
    fewer = [{"name": "florist", "energy": 0.7}, "fedit", "fed_sb"]
    with pytest.raises(RecordError, match=r"seed-1/florist began with another configuration"):
        compare(table(place, methods=fewer), copy)
    assert {name: (copy / name).read_bytes() for name in before} == before


def test_a_seeds_folder_is_an_ordinary_job(copy):
    before = times(copy)
    running.resume(copy / "seed-1")
    assert times(copy) == before
    assert [row["label"] for row in report.rows([report.read_job(copy / "seed-1")])] == [
        *("fedit", "florist", "fed_sb"),
        *("local", "central"),
    ]


def test_somebody_elses_folder_is_left_alone(place, tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(RecordError, match=r"thesis.txt.* holds no comparison"):
        compare(table(place), tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["thesis.txt"]


def test_a_method_without_a_common_model_in_between_is_compared_by_the_one_of_the_end(place, tmp_path):
    compare(table(place, methods=["fedit", "fedsa_lora"], seeds=[1]), tmp_path / "out")
    told = {row["label"]: row for row in summary(report.read_comparison(tmp_path / "out"))}
    gathered = lines(tmp_path / "out" / "seed-1" / "fedsa_lora")[-1]
    assert gathered["phase"] == "gather"
    assert told["fedsa_lora"]["score"] == gathered["global"]["accuracy"]
    assert told["fedsa_lora"]["scores"] == [None, gathered["global"]["accuracy"]]
    assert told["fedsa_lora"]["personal_score"] is not None
    assert told["fedit"]["personal_score"] is None
    assert "personal" in (tmp_path / "out" / "comparison.html").read_text()


# Choosing


def test_the_best_on_validation_rows_is_chosen_and_run_on_test_rows(finished):
    said = json.loads((finished / "chosen.json").read_text())
    assert (said["seed"], said["validation"]) == (1, 0.1)
    told = said["methods"]["florist"]
    scores = []
    for candidate in told["candidates"]:
        folder = finished / "choose" / f"florist,energy={candidate['values']['energy']}"
        assert lines(folder)[-1]["global"]["rows"] == 9  # a tenth of 90
        assert candidate["score"] == last_score(folder)
        scores.append(candidate["score"])
    best = told["candidates"][scores.index(max(scores))]["values"]
    assert told["values"] == best
    for seed in (1, 2):
        config = configuration.from_table(configuration.read(finished / f"seed-{seed}" / "florist" / "run.toml"))
        assert config.method.options == best
        assert config.data.validation == 0
        assert lines(finished / f"seed-{seed}" / "florist")[-1]["global"]["rows"] == 45


def test_choosing_never_looks_at_test_rows(place, finished, tmp_path):
    blind = table(place)
    blind["data"]["test"] = str(tmp_path / "nowhere.jsonl")
    with pytest.raises(ConfigError, match=r"nowhere.jsonl"):
        compare(blind, tmp_path / "out")
    assert (tmp_path / "out" / "chosen.json").read_text() == (finished / "chosen.json").read_text()


def test_a_method_whose_every_candidate_fails_stops_nobody_and_may_be_mended(place, tmp_path):
    own = {"seeds": [1], "choose": {"training.learning_rate": [1e-2, 2e-2]}}
    # A rank beyond the layer's smaller side.
    compare(table(place, **own, methods=["fedit", {"name": "ravan", "lora": {"r": 60}}]), tmp_path / "out")
    told = {row["label"]: row for row in summary(report.read_comparison(tmp_path / "out"))}
    assert told["fedit"]["score"] is not None
    assert told["ravan"]["score"] is None
    assert "lower lora.r" in told["ravan"]["failed"][0][1]
    before = times(tmp_path / "out")
    compare(table(place, **own, methods=["fedit", {"name": "ravan", "lora": {"r": 4}}]), tmp_path / "out")
    told = {row["label"]: row for row in summary(report.read_comparison(tmp_path / "out"))}
    assert told["ravan"]["score"] is not None
    after = times(tmp_path / "out")
    assert {name: x for name, x in after.items() if "ravan" not in name} == {
        name: x for name, x in before.items() if "ravan" not in name
    }


def test_a_candidate_that_fails_is_not_chosen_and_stops_nobody(place, tmp_path):
    own = {"methods": ["fedit"], "seeds": [1], "choose": {"training.learning_rate": [1e30, 1e-2]}}
    compare(table(place, **own), tmp_path / "out")
    told = json.loads((tmp_path / "out" / "chosen.json").read_text())["methods"]["fedit"]
    assert [candidate["state"] for candidate in told["candidates"]] == ["failed", "done"]
    assert told["values"] == {"training.learning_rate": 1e-2}
    for label in ("fedit", "central", "local/client-0"):
        assert configuration.read(tmp_path / "out" / "seed-1" / label / "run.toml")["training"]["learning_rate"] == 1e-2
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "no standard deviation and no interval" in page
    assert "validation rows (10 % of the training rows, seed 1)" in page


def test_a_method_that_fails_stops_nobody_and_shows(place, tmp_path):
    own = {"methods": ["fedit", {"name": "fed_sb", "lora": {"r": 33}}], "seeds": [1]}
    compare(table(place, **own), tmp_path / "out")
    comparison = report.read_comparison(tmp_path / "out")
    told = {row["label"]: row for row in summary(comparison)}
    assert told["fedit"]["score"] is not None
    assert told["central"]["score"] is not None
    assert told["fed_sb"]["score"] is None
    assert any(
        "fed_sb failed at seed 1: " in note and "rank 33" in note for note in report.comparison_json(comparison)["notes"]
    )


def test_what_a_method_says_for_itself_counts_more_than_what_is_chosen_for_all(place):
    own = {"name": "florist", "training": {"learning_rate": 1e-3}}
    read = comparing.read(table(place, methods=["fedit", own], choose={"training.learning_rate": [1e-2, 3e-2]}))
    assert [len(entry.candidates()) for entry in read.entries] == [2, 1]


# What is held equal


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (methods.load("fedit"), 4),
        (methods.load("florist"), 4),
        (OneFactor(), 4 * (2 * 64 + 2 * 80) // (2 * 32 + 2 * 48)),
        (Alternating(), 2 * 4),
        (methods.load("fed_sb"), math.isqrt(4 * (2 * 64 + 2 * 80) // 4)),
        (methods.load("ffa_lora"), 4 * (2 * 64 + 2 * 80) // (2 * 32 + 2 * 48)),
        (methods.load("rolora"), 2 * 4 * (64 + 80) // (64 + 80)),
        (methods.load("ravan", heads=4), 32),  # 4 · 32² / 4 numbers, and the layers have no larger rank
        (methods.load("ravan", heads=3), 27),  # 4 · 27² / 3 = 972 of 1152; 28 has two heads, 29 one, and 30 would be 1200
    ],
    ids=lambda x: type(x).__name__,
)
def test_ranks_at_equal_parameters_follow_the_formula(method, expected):
    budget = 4 * (2 * (32 + 32) + 2 * (48 + 32))
    assert trained(methods.load("fedit"), 2, LAYERS, 4) == budget
    assert largest_rank(lambda r: trained(method, 2, LAYERS, r), budget, 4, 32) == expected
    assert trained(method, 2, LAYERS, expected) <= budget
    assert expected == 32 or trained(method, 2, LAYERS, expected + 1) > budget


def test_ranks_at_equal_bytes_follow_the_formula():
    rounds, one = 3, 2 * 64 + 2 * 80
    count = {
        name: lambda r, name=name, own=own: travelled(methods.load(name, **own), rounds, LAYERS, r, 3)
        for name, own in (("fedit", {}), ("fed_sb", {"init": "random"}), ("florist", {"rank": 2}))
    }
    assert count["fedit"](4) == (2 * rounds - 1) * 4 * one  # the last round's result is sent to nobody
    assert count["florist"](4) == rounds * 4 * one + (rounds - 1) * 2 * one
    # Three downloads (the start's B, A and R, then R) and three uploads.
    assert count["fed_sb"](4) == 4 * one + 4 * (4 * 4) * (rounds + rounds)
    assert travelled(OneFactor(), rounds, LAYERS, 4, 3) == (2 * rounds - 1) * 4 * (2 * 32 + 2 * 48)


@pytest.mark.parametrize(
    "own",
    [
        *({"name": name} for name in ("fedit", "fed_sb", "fedsa_lora", "fedex_lora", "rolora")),
        {"name": "florist", "adopt": "merge", "energy": 1.0},
        {"name": "ravan", "heads": 2},
    ],
    ids=lambda own: own["name"],
)
def test_counted_numbers_are_those_that_travel(place, tmp_path, own):
    """Bytes of two real runs, whose heads and names are the same, differ by what the count says."""
    measured, counted = [], []
    for r in (2, 4):
        entry = {**own, "lora": {"r": r, "lora_alpha": 2 * r}}
        job = {**{key: x for key, x in table(place).items() if key != "compare"}, "seed": 1, "method": [entry]}
        folder = running.run(job, tmp_path / str(r), baselines=False)
        (row,) = report.rows([report.read_job(folder)])
        measured.append(row["bytes_up"] + row["bytes_down"])
        options = {key: x for key, x in own.items() if key != "name"}
        counted.append(4 * travelled(methods.load(own["name"], **options), 2, LAYERS, r, 3))
    assert measured[1] - measured[0] == pytest.approx(counted[1] - counted[0], abs=300)  # digits in headers


@pytest.mark.parametrize("own", [{"name": "rolora"}, {"name": "fedit"}, {"name": "flora"}], ids=lambda own: own["name"])
def test_what_travels_is_counted_where_few_clients_are_asked(place, tmp_path, own):
    """A client that returns gets the last of each factor and all merges since. Who is asked is another draw than the run's."""
    measured, counted, rounds = [], [], 12
    for r in (2, 4):
        shared = {key: x for key, x in table(place).items() if key != "compare"}
        shared |= {"seed": 1, "rounds": rounds, "server": {"clients_per_round": 1}, "training": {"max_steps": 1}}
        entry = {**own, "lora": {"r": r, "lora_alpha": 2 * r}}
        folder = running.run({**shared, "method": [entry]}, tmp_path / str(r), baselines=False)
        (row,) = report.rows([report.read_job(folder)])
        measured.append(row["bytes_up"] + row["bytes_down"])
        counted.append(4 * travelled(methods.load(own["name"]), rounds, LAYERS, r, 1, 3))
    assert measured[1] - measured[0] == pytest.approx(counted[1] - counted[0], rel=0.15)


def test_the_scale_stays_and_the_ranks_chosen_are_those_that_run(place, tmp_path):
    own = {"methods": ["fedit", {"name": "fed_sb", "init": "random"}], "seeds": [1], "equal": "parameters"}
    heard = []
    compare(table(place, **own), tmp_path / "out", heard.append)
    rank = math.isqrt(4 * (2 * 64 + 2 * 80) // 4)
    lora = configuration.read(tmp_path / "out" / "seed-1" / "fed_sb" / "run.toml")["lora"]
    assert (lora["r"], lora["lora_alpha"] / lora["r"]) == (rank, 2)
    assert set(lines(tmp_path / "out" / "seed-1" / "fed_sb")[-1]["rank"].values()) == {rank}
    assert configuration.read(tmp_path / "out" / "seed-1" / "fedit" / "run.toml")["lora"]["r"] == 4
    assert f"fed_sb: rank {rank} ({4 * rank * rank:,})" in [e["text"] for e in heard if e["event"] == "note"]


def test_a_method_that_is_too_much_even_at_rank_one_says_so(place):
    config = configuration.configs(comparing.read(table(place)).job(1, [{"name": "fedit"}]))["fedit"]
    ranks = Ranks("bytes", config, LAYERS, 3)
    dense = configuration.configs(comparing.read(table(place)).job(1, [{"name": "fed_sb"}]))["fed_sb"]
    rank, count = ranks.of(dense)  # its start sends G, as large as the weights
    assert rank == 1
    assert count > ranks.budget


# Numbers


def test_the_difference_is_paired_and_its_interval_is_students():
    differences = [0.01, 0.03, 0.08]
    mean, sd = 0.04, math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2)
    assert spread(differences) == pytest.approx((mean, sd))
    assert interval(differences) == pytest.approx((mean, 4.303 * sd / math.sqrt(3)))
    assert interval([0.5]) == (0.5, None)


def test_the_summary_is_that_of_the_runs_own_files(finished):
    told = {row["label"]: row for row in summary(report.read_comparison(finished))}
    scores = {
        label: [last_score(finished / f"seed-{seed}" / label) for seed in (1, 2)] for label in ("fedit", "florist", "central")
    }
    for label, (one, two) in scores.items():
        assert told[label]["score"] == pytest.approx((one + two) / 2)
        assert told[label]["score_sd"] == pytest.approx(abs(one - two) / math.sqrt(2))
    one, two = (scores["central"][n] - scores["fedit"][n] for n in (0, 1))
    assert told["central"]["difference"] == pytest.approx((one + two) / 2)
    assert told["central"]["difference_half"] == pytest.approx(12.706 * abs(one - two) / 2)
    assert told["fedit"]["difference"] is None
    worst = max(
        x
        for seed in (1, 2)
        for line in lines(finished / f"seed-{seed}" / "fedit")
        if line["aggregation_error"]
        for x in line["aggregation_error"].values()
    )
    assert told["fedit"]["error_worst"] == worst
    sent = [sum(sum(line["bytes_up"].values()) for line in lines(finished / f"seed-{seed}" / "fedit")) / 3 for seed in (1, 2)]
    assert told["fedit"]["bytes_up"] == pytest.approx(sum(sent) / 2)


def test_the_csv_has_a_line_per_run(finished):
    with (finished / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [(row["label"], row["seed"]) for row in rows] == [
        (label, seed) for label in ("fedit", "florist", "fed_sb", "local", "central") for seed in ("1", "2")
    ]
    for row in rows:
        if row["label"] not in ("local",):
            assert float(row["score"]) == last_score(finished / row["folder"])
        fedit = next(float(x["score"]) for x in rows if (x["label"], x["seed"]) == ("fedit", row["seed"]))
        assert float(row["difference"]) == pytest.approx(float(row["score"]) - fedit)
        assert (row["state"], row["scored_on"], row["metric"]) == ("done", "test", "accuracy")
    assert json.loads(rows[2]["options"]).keys() == {"energy"}


def test_the_front_is_what_nobody_beats_at_no_more_bytes():
    def row(label, score, sent, lower=False):
        return {"label": label, "kind": "method", "score": score, "bytes_up": sent, "bytes_down": 0.0, "lower_is_better": lower}

    points = [("a", 0.5, 10.0), ("b", 0.4, 20.0), ("c", 0.7, 30.0), ("d", 0.7, 40.0), ("e", 0.6, 30.0)]
    assert [x["label"] for x in front([row(*point) for point in points])] == ["a", "c"]
    assert [x["label"] for x in front([row(*point, lower=True) for point in points])] == ["a", "b"]


def test_the_page_shows_every_method_and_what_was_chosen(finished):
    page = (finished / "comparison.html").read_text()
    for text in ("fed_sb", "Pareto front", "difference to fedit", "energy 0.5", "energy 1.0", "umbel compare compare.toml"):
        assert text in page
    assert page.count("<svg") == page.count("</svg>") == 2
    for row in summary(report.read_comparison(finished)):
        if row["label"] != "fedit":
            assert bracketed(row) in page


def test_the_page_takes_sixteen_methods_whose_labels_lie_apart(finished):
    from umbel.report import figures

    rows = [
        {"label": f"method_{n}", "kind": "method", "score": 0.5 + 0.001 * n, "score_sd": 0.01, "scores": [0.4, 0.5]}
        | {"total_bytes": 1e6 * (1 + 0.02 * n), "lower_is_better": False}
        for n in range(16)
    ]
    looks = figures.looks_of(rows)
    assert len({(look.colour, look.marker) for look in looks.values()}) == 16
    svg = figures.score_and_bytes(rows, ["method_0"], "accuracy", "test")
    assert all(f">method_{n}</text>" in svg for n in range(16))


# The command


def umbel(*arguments):
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, list(map(str, arguments)), catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_the_table_and_goes_on_when_it_is_given_again(finished, copy):
    before = times(copy)
    code, out, _ = umbel("compare", finished / "compare.toml", "--out", copy)
    assert code == 0
    assert "vs fedit" in out
    assert "nothing was chosen" in out
    assert str(copy / "comparison.csv") in out
    code, out, _ = umbel("compare", finished / "compare.toml", "--out", copy, "--json")
    told = json.loads(out)
    assert [row["label"] for row in told["rows"]] == ["fedit", "florist", "fed_sb", "local", "central"]
    assert len(told["runs"]) == 10
    assert times(copy) == before


def test_the_table_says_what_its_runs_hide(copy):
    own = {"unit": "example", "target_epsilon": 3.0, "target_delta": 1e-5}
    for path in copy.glob("seed-*/*/run.json"):
        told = json.loads(path.read_text())
        path.write_text(json.dumps(told | {"config": told["config"] | {"privacy": own}}))
    shown = report.comparison_table(report.read_comparison(copy), 120)
    assert "Hidden in each run: each row: ε ≤ 3 at δ = 1e-05." in str(shown.caption)


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(finished, tmp_path):
    command = [sys.executable, "-m", "umbel.cli", "compare", str(finished / "compare.toml"), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        begun = tmp_path / "out" / "seed-1" / "fedit" / "run.json"
        until = time.monotonic() + 60
        while not begun.exists() and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in err
    code, _, _ = umbel(*command[3:])
    assert code == 0
    assert len(times(tmp_path / "out")) == len(times(finished))


def test_run_and_compare_send_each_others_files_to_the_other(finished, tmp_path):
    code, _, err = umbel("run", finished / "compare.toml", "--out", tmp_path / "out")
    assert code == 2
    assert "`umbel compare`" in err
    code, _, err = umbel("compare", finished / "seed-1" / "job.toml", "--out", tmp_path / "out")
    assert code == 2
    assert "[compare] is missing" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"seed": [1]}, "unknown key 'compare.seed'. Did you mean 'seeds'?"),
        ({"seeds": []}, "'compare.seeds': got []"),
        ({"seeds": [1, 1]}, "'compare.seeds': got [1, 1]"),
        ({"equal": "time"}, "'compare.equal': got 'time', allowed: 'rank', 'parameters', 'bytes'"),
        ({"methods": []}, "'compare.methods': got []"),
        ({"methods": ["fedt"]}, "Did you mean 'fedit'?"),
        ({"methods": ["fedit", "fedit"]}, "the label 'fedit' comes twice"),
        ({"methods": ["fedit", {"name": "florist", "choose": {"enrgy": [0.5]}}]}, "Did you mean 'energy'?"),
        ({"choose": {"energy": [0.5]}}, "'energy' is for every method, so it is section.key"),
        ({"choose": {"data.max_length": [8]}}, "methods share that section"),
        ({"choose": {"training.learning_rate": 1e-3}}, "allowed: a list of values"),
        ({"choose": {"training.learning_rate": [1e-3, 1e-3]}}, "allowed: different values"),
        ({"methods": [{"name": "fedit", "training": 3}]}, "'training' is a table, got 3"),
        ({"choose": {"training.learning_rate": [1e-3, -1.0]}}, "training.learning_rate: got -1.0"),
        ({"methods": ["fedit", {"name": "fed_sb", "lora": {"r": 8}}], "equal": "bytes"}, "lora.r: got 8, but compare.equal"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(place, tmp_path, compare, message):
    with pytest.raises(ConfigError) as caught:
        comparing.compare(table(place, **compare), tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_seed_or_a_method_beside_compare_is_a_mistake(place):
    for key, value in (("seed", 1), ("method", {"name": "fedit"})):
        with pytest.raises(ConfigError, match=f"'{key}' beside"):
            comparing.read({**table(place), key: value})


def test_counting_leaves_the_global_random_state_alone():
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    travelled(methods.load("florist"), 2, LAYERS, 4, 3)
    assert torch.equal(state, torch.random.get_rng_state())
