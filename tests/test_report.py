"""Reports read run folders. The folders here are made up in code; their numbers are chosen, not measured."""

import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from umbel import report

HOSTILE = '<script>alert("x")</script>'
LABELS = ["rec.autos", "sci.med", "talk.politics.mideast"]
MODULES = ("query", "value")


def make_line(
    number: int, clients: int, layers: list[str], score: float, error: float, *, own: float = 0.0, **more: object
) -> dict:
    """One training round in which every client answered; client k has 10 (k + 1) test rows and sends 1000 (k + 1) bytes."""
    keys = [str(k) for k in range(clients)]
    seconds = {"fit": 6.0, "evaluate": 2.0, "adapter": 0.5, "wire": 0.25, "server": 0.125, "record": 0.125, "total": 10.0}
    line = {"round": number, "phase": "train", "train_round": number, "refused": [], "seconds": seconds}
    line |= {"asked": list(range(clients)), "answered": list(range(clients))}
    line |= {"bytes_up": {k: 1000 * (int(k) + 1) for k in keys}, "bytes_down": dict.fromkeys(keys, 4000)}
    line["local"] = {k: {"accuracy": own or score + 0.1, "loss": 1.0, "rows": 10 * (int(k) + 1)} for k in keys}
    line["global"] = {"accuracy": score, "loss": 2.0 - score, "rows": 100}
    line["aggregation_error"] = {name: error * (n + 1) for n, name in enumerate(layers)}
    line["rank"] = dict.fromkeys(layers, 8)
    return line | more


def make_run(folder: Path, label: str, lines: list[dict], rounds: int = 2, clients: int = 2, **more: object) -> None:
    """One run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "method": {"name": "florist"},
        "model": {"name": "some/tiny-model"},
        "split": {"kind": "dirichlet", "alpha": 0.3},
        "lora": {"r": 8, "lora_alpha": 16.0, "rank_pattern": {}},
        "training": {"learning_rate": 1e-3, "max_steps": 0, "num_train_epochs": 1.0},
        "rounds": rounds,
        "seed": 0,
    }
    info = {"umbel": "0.1.0", "label": label, "state": "done", "started": "2026-01-01T00:00:00", "config": config}
    info |= {"versions": {"torch": "2.13.0"}, "machine": {"cores": 2, "memory_bytes": 8_000_000_000}, "error": None}
    info |= {
        "metric": {"name": "accuracy", "better": "higher"},
        "clients": clients,
        "seconds": 25.0,
        "model": {"name": "some/tiny-model"},
    }
    (folder / "run.json").write_text(json.dumps(info | more))
    (folder / "run.toml").write_text(f'seed = 0\n# {label}\n[model]\nname = "some/tiny-model"\n')
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_layers(blocks: int, modules: tuple[str, ...] = MODULES) -> list[str]:
    return [f"encoder.layer.{n}.attention.self.{name}" for n in range(blocks) for name in modules]


def make_job(folder: Path, labels: tuple[str, ...] = ("fedit", "florist"), layers: list[str] | None = None) -> Path:
    """Two clients, two rounds; scores 0.4 then 0.5 for the first method, 0.1 more for the next; error 0.01 then 0.02."""
    layers = layers or make_layers(2)
    for n, label in enumerate(labels):
        opening = {"round": 0, "phase": "open", "train_round": 0, "asked": [0, 1], "answered": [0, 1], "refused": []}
        opening |= {
            "bytes_up": {"0": 500, "1": 500},
            "bytes_down": {"0": 100, "1": 300},
            "seconds": {"total": 5.0, "adapter": 5.0},
        }
        lines = [make_line(r, 2, layers, 0.3 + 0.1 * r + 0.1 * n, 0.01 * r) for r in (1, 2)]
        make_run(folder / f"run-{n}", label, [opening, *lines])
    for k, scores in enumerate(([0.2, 0.25], [0.3, 0.35])):
        lines = [make_line(r, 1, layers, scores[r - 1], 0.0, own=0.9) for r in (1, 2)]
        make_run(folder / f"local/client-{k}", "local", lines, clients=1)
    make_run(folder / "central", "central", [make_line(r, 1, layers, 0.6 + 0.05 * r, 0.0) for r in (1, 2)], clients=1)
    members = {label: f"run-{n}" for n, label in enumerate(labels)}
    job = {"members": members, "methods": list(labels), "central": "central", "local": ["local/client-0", "local/client-1"]}
    (folder / "job.json").write_text(json.dumps(job))
    split = {
        "kind": "dirichlet",
        "clients": 2,
        "labels": LABELS,
        "train": [[5, 0, 20], [30, 2, 1]],
        "test": [[1, 1, 8], [10, 8, 2]],
    }
    (folder / "split.json").write_text(json.dumps(split))
    return folder


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_lines(path: Path, change) -> None:
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


def by_label(folder: Path) -> dict[str, dict]:
    return {row["label"]: row for row in report.rows([report.read_job(folder)])}


def shown(folder: Path, width: int) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(report.table([report.read_job(folder)], width))
    return text.getvalue()


def test_rows_are_the_numbers_computed_by_hand(tmp_path):
    found = by_label(make_job(tmp_path))
    assert list(found) == ["fedit", "florist", "local", "central"]
    row = found["florist"]
    assert row["scores"] == pytest.approx([0.5, 0.6])
    assert row["score"] == pytest.approx(0.6)
    assert row["local_score"] == pytest.approx(0.7)
    assert row["gap"] == pytest.approx(0.1)
    # Four layers with error 0.01 r (1, 2, 3, 4) in round r.
    assert (row["error_max"], row["error_mean"]) == pytest.approx((0.08, 0.05))
    assert (row["error_max_rounds"], row["error_mean_rounds"]) == pytest.approx((0.06, 0.0375))
    # The handshake, then two rounds: up 500 + 2 (1000 + 2000) / 2, down (100 + 300) / 2 + 2 · 4000.
    assert (row["bytes_up"], row["bytes_down"]) == pytest.approx((3500, 8200))
    assert (row["server_seconds"], row["wall_seconds"]) == pytest.approx((0.25, 25.0))
    # 5 s of handshake and 2 · 10 s of rounds, of which 2 · 8 s fit and evaluate.
    assert row["overhead"] == pytest.approx(9 / 25)


def test_the_local_row_is_the_mean_over_clients_with_their_range(tmp_path):
    row = by_label(make_job(tmp_path))["local"]
    assert row["scores"] == pytest.approx([0.25, 0.3])
    assert (row["score"], row["score_min"], row["score_max"]) == pytest.approx((0.3, 0.25, 0.35))
    assert (row["local_score"], row["gap"], row["wall_seconds"]) == pytest.approx((0.9, 0.6, 50.0))
    assert row["bytes_up"] is None
    assert row["error_max"] is None


def test_own_test_scores_are_weighted_by_test_rows(tmp_path):
    own = {"0": {"accuracy": 0.9, "rows": 10}, "1": {"accuracy": 0.6, "rows": 30}, "2": {"accuracy": 0.0, "rows": 0}}
    make_run(tmp_path, "fedit", [make_line(1, 2, make_layers(1), 0.5, 0.1, local=own)])
    row = by_label(tmp_path)["fedit"]
    assert row["local_score"] == pytest.approx(0.675)
    assert row["gap"] == pytest.approx(0.175)


def test_bytes_are_a_mean_over_all_clients_also_those_that_sat_out(tmp_path):
    lines = [make_line(1, 4, make_layers(1), 0.5, 0.1, bytes_up={"2": 8000}, bytes_down={"2": 400})]
    make_run(tmp_path, "fedit", lines, clients=4)
    row = by_label(tmp_path)["fedit"]
    assert (row["bytes_up"], row["bytes_down"]) == (2000, 100)


def test_a_torn_last_line_is_left_out_and_said(tmp_path):
    make_job(tmp_path)
    path = tmp_path / "run-1" / "rounds.jsonl"
    path.write_bytes(path.read_bytes() + json.dumps(make_line(3, 2, make_layers(2), 0.9, 0.5)).encode()[:-40])
    assert by_label(tmp_path)["florist"]["scores"] == pytest.approx([0.5, 0.6])
    assert "was not complete" in report.write_html([report.read_job(tmp_path)], tmp_path / "out.html").read_text()


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    make_job(tmp_path)
    path = tmp_path / "run-1" / "rounds.jsonl"
    path.write_text(path.read_text().replace("\n", '\n{"round": 1, \n', 1))
    with pytest.raises(report.ReportError, match=r"rounds\.jsonl, line 2: not JSON"):
        report.read_job(tmp_path)


def test_a_folder_without_a_run_is_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(report.ReportError, match=r"no job\.json, run\.json or rounds\.jsonl"):
        report.read_job(tmp_path)
    with pytest.raises(report.ReportError, match="no folder"):
        report.read_job(tmp_path / "nothing")


def test_a_job_in_progress_shows_what_there_is(tmp_path):
    make_job(tmp_path)
    for place in ("run-1", "local/client-1", "central"):
        for file in (tmp_path / place).iterdir():
            file.unlink()
        (tmp_path / place).rmdir()
    rewrite(tmp_path / "run-0" / "run.json", state="running", seconds=None)
    path = tmp_path / "run-0" / "rounds.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:2]) + "\n")
    found = by_label(tmp_path)
    assert (found["fedit"]["state"], found["fedit"]["rounds"], found["fedit"]["wall_seconds"]) == ("running", 1, 15.0)
    assert (found["florist"]["state"], found["florist"]["score"]) == ("waiting", None)
    assert found["local"]["score"] == pytest.approx(0.25)
    assert "running 1/2" in shown(tmp_path, 80)
    page = report.write_html([report.read_job(tmp_path)], tmp_path / "out.html").read_text()
    assert "fedit is running, after 1 of 2 rounds." in page
    assert "florist is waiting, not started." in page


def test_a_job_that_has_only_begun_still_makes_a_page(tmp_path):
    (tmp_path / "job.json").write_text(
        json.dumps({"members": {"fedit": "."}, "methods": ["fedit"], "local": ["local/client-0"]})
    )
    assert (
        "No score has been measured yet."
        in report.write_html([report.read_job(tmp_path)], tmp_path / "a" / "b.html").read_text()
    )
    assert "fedit" in shown(tmp_path, 80)


def test_one_run_folder_is_a_job_of_its_own_with_its_jobs_split(tmp_path):
    job = report.read_job(make_job(tmp_path) / "run-1")
    assert [run.label for run in job.methods] == ["florist"]
    assert job.split["labels"] == LABELS
    baseline = report.read_job(tmp_path / "central").central
    assert baseline is not None
    assert baseline.label == "central"


def test_runs_of_two_jobs_are_told_apart_by_their_folders(tmp_path):
    jobs = [report.read_job(make_job(tmp_path / name)) for name in ("seed-0", "seed-1")]
    labels = [row["label"] for row in report.rows(jobs)]
    assert labels[:4] == ["seed-0/fedit", "seed-0/florist", "seed-1/fedit", "seed-1/florist"]
    assert len(set(labels)) == len(labels) == 8
    page = report.write_html(jobs, tmp_path / "out.html").read_text()
    assert page.count("Who has which rows") == 1, "the same split is drawn once"


def test_the_headline_says_what_the_numbers_say(tmp_path):
    sentences = report.as_json([report.read_job(make_job(tmp_path))])["headline"]
    assert sentences[0] == (
        "Test accuracy: a client alone reaches 0.300 (0.250 to 0.350); federated with florist 0.600; "
        "trained on everyone’s rows in one place 0.700."
    )
    assert sentences[1] == "Federating covers 75 % of the way from clients alone to pooled data."
    assert sentences[2] == "The methods, best first: florist 0.600, fedit 0.500."


def test_the_headline_admits_that_nothing_was_gained(tmp_path):
    make_job(tmp_path)
    for n in range(2):
        rewrite_lines(tmp_path / f"run-{n}" / "rounds.jsonl", lambda line: line | {"global": {"accuracy": 0.2, "rows": 9}})
    assert "Federating gains nothing here over clients alone." in report.as_json([report.read_job(tmp_path)])["headline"]


def test_lower_loss_is_better(tmp_path):
    make_job(tmp_path)
    for path in tmp_path.rglob("run.json"):
        rewrite(path, metric={"name": "loss", "better": "lower"})
    found = by_label(tmp_path)
    assert found["florist"]["scores"] == pytest.approx([1.5, 1.4])
    told = report.as_json([report.read_job(tmp_path)])["headline"]
    assert told[0].startswith(
        "Test loss (lower is better): a client alone reaches 1.700 (1.650 to 1.750); federated with florist 1.400"
    )
    assert told[1] == "Federating covers 75 % of the way from clients alone to pooled data."
    page = report.write_html([report.read_job(tmp_path)], tmp_path / "out.html").read_text()
    assert "test loss (lower is better)" in page
    assert '<td class="best">1.400</td>' in page


@pytest.mark.parametrize("width", [80, 100])
def test_the_terminal_table_fits(tmp_path, width):
    make_job(tmp_path, labels=("fedit", "a-method-with-a-long-name"))
    text = shown(tmp_path, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for expected in ("0.600", "+0.100", "8.0e-02", "3.50 kB", "8.20 kB", "36 %"):
        assert expected in text


def test_a_label_is_not_read_as_terminal_markup(tmp_path):
    assert "[red]x" in shown(make_job(tmp_path, labels=("[red]x", "florist")), 100)


def test_json_is_strict_where_a_number_is_not_finite(tmp_path):
    make_job(tmp_path)
    rewrite_lines(tmp_path / "run-0" / "rounds.jsonl", lambda line: line | {"aggregation_error": {"layer": math.nan}})
    told = report.as_json([report.read_job(tmp_path)])
    assert json.loads(json.dumps(told, allow_nan=False))["rows"][0]["error_max"] is None
    assert "nan" in shown(tmp_path, 80), "a person is shown that it is not a number"


def test_a_diverged_run_is_shown_last_and_never_best(tmp_path):
    make_job(tmp_path)
    for path in tmp_path.rglob("run.json"):
        rewrite(path, metric={"name": "loss", "better": "lower"})
    broken = {"global": {"loss": math.nan, "rows": 9}, "aggregation_error": {"a": math.inf, "b": 0.0}}
    rewrite_lines(tmp_path / "run-0" / "rounds.jsonl", lambda line: line | broken)
    told = report.as_json([report.read_job(tmp_path)])["headline"]
    assert "federated with florist 1.400" in told[0]
    assert told[2] == "The methods, best first: florist 1.400, fedit nan."
    page = report.write_html([report.read_job(tmp_path)], tmp_path / "out.html").read_text()
    assert "<td>nan</td>" in page


def test_a_run_that_stopped_early_is_not_the_cheapest(tmp_path):
    make_job(tmp_path)
    rewrite(tmp_path / "run-0" / "run.json", state="failed", error="out of memory")
    path = tmp_path / "run-0" / "rounds.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:2]) + "\n")
    told = report.as_json([report.read_job(tmp_path)])["headline"]
    assert "Sent and received per client over the run: 11.7 kB with florist." in told
    assert told[-1] == "fedit failed, after 1 of 2 rounds: out of memory."
    assert "2.00 kB</td>" in (page := report.write_html([report.read_job(tmp_path)], tmp_path / "out.html").read_text())
    assert 'class="best"' not in page


def test_who_was_refused_and_who_was_silent_is_listed(tmp_path):
    make_job(tmp_path)
    refused = {"answered": [0], "refused": [{"client": 1, "reason": f"B is zero {HOSTILE}"}]}
    rewrite_lines(tmp_path / "run-0" / "rounds.jsonl", lambda line: line | (refused if line["round"] else {"answered": [1]}))
    told = report.as_json([report.read_job(tmp_path)])["refused"]
    assert [(x["label"], x["client"], x["rounds"]) for x in told] == [("fedit", 0, [0]), ("fedit", 1, [1, 2])]
    assert told[0]["reason"] == "did not answer"
    page = report.write_html([report.read_job(tmp_path)], tmp_path / "out.html").read_text()
    assert "B is zero &lt;script&gt;" in page
    assert "1–2" in page


class Seen(HTMLParser):
    """Collects tags, attributes and identifiers; raises on a tag that is closed but not open."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def seen(page: str) -> Seen:
    parser = Seen()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_the_page_escapes_everything_that_comes_from_files(tmp_path):
    make_job(tmp_path, labels=(HOSTILE, "florist"), layers=[f"layer.{n}.{HOSTILE}" for n in range(2)])
    for path in tmp_path.rglob("run.json"):
        rewrite(path, versions={HOSTILE: HOSTILE}, model={"name": HOSTILE}, error=HOSTILE, state="failed", umbel=HOSTILE)
        info = json.loads(path.read_text())
        rewrite(path, config=info["config"] | {"model": {"name": HOSTILE}, "split": {"kind": "by", "column": HOSTILE}})
        path.with_name("run.toml").write_text(HOSTILE)
    rewrite(tmp_path / "split.json", labels=[HOSTILE, "$x$", '" onload="x'])
    refused = [{"client": HOSTILE, "reason": HOSTILE}]
    rewrite_lines(
        tmp_path / "run-1" / "rounds.jsonl", lambda line: line | {"refused": refused, "rank": {HOSTILE: line["round"]}}
    )
    page = report.write_html([report.read_job(tmp_path)], tmp_path / "out.html").read_text()
    parser = seen(page)
    assert "script" not in parser.tags
    assert not [key for key, _ in parser.attributes if key.startswith("on")]
    assert page.count("&lt;script&gt;") > 10
    assert "$x$" in page, "a dollar is not mathematics"


def test_the_page_refers_to_nothing_outside_and_runs_nothing(tmp_path):
    page = report.write_html([report.read_job(make_job(tmp_path))], tmp_path / "out.html").read_text()
    parser = seen(page)
    assert parser.tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    places = [value for key, value in parser.attributes if key in ("src", "href", "xlink:href", "data", "action", "srcset")]
    assert places
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in places)
    assert not re.search(r"https?:|@import|url\((?!#)", page)


def test_identifiers_on_the_page_are_unique_and_all_are_there(tmp_path):
    page = report.write_html([report.read_job(make_job(tmp_path))], tmp_path / "out.html").read_text()
    defined = [value for key, value in seen(page).attributes if key == "id"]
    assert len(set(defined)) == len(defined)
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page)) == set(defined)


def test_every_figure_says_in_words_what_it_shows(tmp_path):
    make_job(tmp_path)
    ranks = {"rank": {"layer": 3, "other": 5}}
    rewrite_lines(tmp_path / "run-1" / "rounds.jsonl", lambda line: line | ranks)
    page = report.write_html([report.read_job(tmp_path)], tmp_path / "out.html").read_text()
    labels = re.findall(r'<svg role="img" aria-label="([^"]{20,})"', page)
    # Two lines of scores, error scale and two panels, rank scale and one panel, stages, split.
    assert len(labels) == page.count("<svg") == 9
    assert page.count("<figure") == page.count("<figcaption") == 6
    assert "florist 0.600" in labels[0]


def test_rank_is_drawn_only_where_it_is_not_the_adapters_own(tmp_path):
    make_job(tmp_path)
    path = tmp_path / "out.html"
    assert "Rank by layer" not in report.write_html([report.read_job(tmp_path)], path).read_text()
    rewrite_lines(tmp_path / "run-0" / "rounds.jsonl", lambda line: line | {"rank": {"layer": 16}})
    assert "fedit sent rank 16 in every layer and round." in report.write_html([report.read_job(tmp_path)], path).read_text()


def test_a_hundred_clients_and_two_hundred_layers_stay_legible(tmp_path):
    layers = make_layers(32, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    make_job(tmp_path, layers=layers)
    rewrite(tmp_path / "split.json", labels=[f"label {n}" for n in range(77)], train=[[k % 7] * 77 for k in range(100)])
    page = report.write_html([report.read_job(tmp_path)], tmp_path / "out.html").read_text()
    panel = page[page.index("Heat map of aggregation error") :]
    named = re.findall(r">(\d+) q_proj</text>", panel[: panel.index("</svg>")])
    assert 8 <= len(named) <= 26, "some layers are named, each the first of its block"
    assert ">31 down_proj</text>" not in page
    assert len(page) < 400_000


def test_layer_names_are_short_and_still_differ():
    from umbel.report import words

    assert words.layers(make_layers(2)) == ["0 query", "0 value", "1 query", "1 value"]
    assert words.layers(["encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense", "pooler.dense"]) == [
        "0 attention.output.dense",
        "0 output.dense",
        "pooler.dense",
    ]
    assert words.layers(["lm_head"]) == ["lm_head"]


def test_drawing_ignores_and_keeps_the_callers_matplotlib_settings(tmp_path):
    import matplotlib

    job = report.read_job(make_job(tmp_path))
    plain = report.write_html([job], tmp_path / "a.html").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path"}):
        assert report.write_html([job], tmp_path / "b.html").read_bytes() == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_importing_the_report_imports_neither_torch_nor_matplotlib():
    heavy = "{'torch', 'transformers', 'peft', 'matplotlib', 'numpy'}"
    code = f"import sys, umbel.report; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("width", [60, 100])
def test_the_scores_after_each_round_begin_with_the_first_and_end_with_the_last(tmp_path, width):
    make_job(tmp_path)
    job = report.read_job(tmp_path)
    drawn = Console(width=width, record=True, file=io.StringIO())
    drawn.print(report.by_round([job], width))
    lines = drawn.export_text().splitlines()
    assert max(map(len, lines)) <= width
    told = next(row for row in report.rows([job]) if row["kind"] == "method")
    line = next(line.split() for line in lines if line.startswith(told["label"]))
    assert float(line[1]) == pytest.approx(told["scores"][0], abs=5e-4)
    assert float(line[-1]) == pytest.approx(told["scores"][-1], abs=5e-4)


def test_the_terminal_says_who_was_left_out_and_why(tmp_path):
    make_job(tmp_path)
    refused = {"answered": [0], "refused": [{"client": 1, "reason": "sent [bold]NaN"}]}
    rewrite_lines(tmp_path / "run-0" / "rounds.jsonl", lambda line: line | refused)
    text = " ".join(shown(tmp_path, 100).split())
    assert "left out of" in text
    assert "client 1" in text
    assert "sent [bold]NaN" in text


def test_epsilon_is_shown_where_rows_are_hidden_and_nowhere_else(tmp_path):
    def told(folder, **more):
        make_run(
            folder, "hidden", [make_line(n, 2, LABELS, 0.5, 0.0, **{k: x[n - 1] for k, x in more.items()}) for n in (1, 2)]
        )
        job = report.read_job(folder)
        console = Console(file=io.StringIO(), width=200)
        console.print(report.table([job]))
        page = report.write_html([job], folder / "report.html").read_text()
        return report.as_json([job])["rows"][0]["epsilon"], console.file.getvalue(), page

    value, text, page = told(tmp_path / "a", epsilon=[{"0": 1.1, "1": 1.0}, {"0": 2.987654, "1": 2.5}])
    assert value == 2.987654
    assert "2.99" in text
    assert "ε: spent by the client that spent most" in " ".join(text.split())
    assert "<td>2.99</td>" in page
    value, text, page = told(tmp_path / "b")
    assert value is None
    assert "ε" not in text
    assert '<th scope="col">ε</th>' not in page
