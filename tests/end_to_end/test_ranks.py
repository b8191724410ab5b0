"""Clients of different rank and scale, and clients that take no part."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from recorded import kept, lines
from umbel import config as configuration
from umbel import report
from umbel import run as running
from umbel.config import ConfigError

MIXED = ("flora", "flexlora", "hetlora", "florist")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    table = tiny.table(folder, [{"name": name} for name in MIXED], lora={"r": [2, 4, 8], "lora_alpha": 16})
    return running.run(table, folder / "run")


@pytest.mark.parametrize("name", MIXED)
def test_every_client_keeps_its_own_rank_through_the_rounds(job: Path, name: str) -> None:
    for line in lines(job / name):
        assert line["refused"] == []
    for client, rank in enumerate([2, 4, 8]):
        # HetLoRA's clients may have given up directions.
        ranks = {x.shape[0] for key, x in kept(job / name, client).items() if key.endswith("|A")}
        assert max(ranks) <= rank if name == "hetlora" else ranks == {rank}


@pytest.mark.parametrize("name", MIXED)
def test_bytes_up_follow_each_clients_rank(job: Path, name: str) -> None:
    first = lines(job / name)[1]["bytes_up"]
    small, middle, large = (first[k] for k in "012")
    assert large - middle == pytest.approx(2 * (middle - small), rel=0.02)


@pytest.mark.parametrize("name", ["flexlora", "hetlora"])
def test_a_pair_is_cut_to_the_clients_rank_before_it_travels(job: Path, name: str) -> None:
    down = lines(job / name)[2]["bytes_down"]
    assert down["0"] < down["1"] < down["2"]


def test_a_stacked_sum_is_exact_whatever_the_ranks(job: Path) -> None:
    assert all(max(line["aggregation_error"].values()) < 1e-5 for line in lines(job / "flora")[1:])


def test_the_baselines_of_mixed_ranks_have_the_clients_own_ranks_and_the_largest(job: Path) -> None:
    for client, rank in enumerate([2, 4, 8]):
        own = json.loads((job / "local" / f"client-{client}" / "run.json").read_text())["config"]["lora"]
        assert (own["r"], own["lora_alpha"]) == (rank, 2.0 * rank)
    assert json.loads((job / "central" / "run.json").read_text())["config"]["lora"]["r"] == 8


def test_the_scale_is_the_same_for_all_clients_unless_each_has_its_alpha() -> None:
    same = configuration.Lora(r=[4, 16], lora_alpha=32)
    assert [same.of(k, r).scale for k, r in enumerate([4, 16])] == [2.0, 2.0]
    root = configuration.Lora(r=[4, 16], lora_alpha=32, use_rslora=True)
    assert [root.of(k, r).scale for k, r in enumerate([4, 16])] == pytest.approx([8.0, 8.0])
    own = configuration.Lora(r=[4, 16], lora_alpha=[4, 32])
    assert [own.of(k, r).scale for k, r in enumerate([4, 16])] == [1.0, 2.0]


def test_factors_travel_in_units_of_the_update_whatever_each_clients_scale_is(tmp_path: Path) -> None:
    # Two clients of one rank that differ in alpha only: from the same upload each must hold the same product.
    table = tiny.table(tmp_path, {"name": "fedit"}, lora={"lora_alpha": [8, 16, 32]}, training={"learning_rate": 1e-9})
    folder = running.run(table, tmp_path / "run")
    products = []
    for client, alpha in enumerate([8, 16, 32]):
        tensors = kept(folder, client)
        layer = next(key.removesuffix("|A") for key in tensors if key.endswith("|A"))
        products.append(tensors[f"{layer}|B"] * (alpha / 4) @ tensors[f"{layer}|A"])
    assert torch.allclose(products[0], products[1], atol=1e-7)
    assert torch.allclose(products[0], products[2], atol=1e-7)


def test_a_method_that_needs_one_rank_is_refused_at_the_start_in_a_sentence_that_names_others(tmp_path: Path) -> None:
    for name in ("fedit", "flora_na", "fed_sb", "ffa_lora", "fedex_lora"):
        with pytest.raises(ConfigError) as caught:
            running.run(tiny.table(tmp_path, {"name": name}, lora={"r": [2, 4, 8]}), tmp_path / "run")
        assert f"{name} needs one rank for all clients, got [2, 4, 8]; mixed ranks are for " in str(caught.value)
        assert "florist" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_list_of_another_length_than_clients_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.r: got 2 values, for 3 clients"):
        running.run(tiny.table(tmp_path, {"name": "flora"}, lora={"r": [2, 4]}), tmp_path / "run")


def with_column(folder: Path, table: dict[str, Any], ranks: list[Any]) -> dict[str, Any]:
    """The same rows with a client's name and rank in each, split by that name."""
    for which in ("train", "test"):
        path = Path(table["data"][which])
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{**row, "site": f"s{i % 3}", "rank": ranks[i % 3]} for i, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table["split"] = {"kind": "by", "column": "site"}
    return table


def test_ranks_may_come_from_a_column_of_the_clients_own_rows(tmp_path: Path) -> None:
    table = tiny.table(tmp_path, {"name": "florist"}, lora={"r": 8, "rank_by": "rank"})
    folder = running.run(with_column(tmp_path, table, [2, 8, 3]), tmp_path / "run")
    for client, rank in enumerate([2, 8, 3]):
        assert {x.shape[0] for key, x in kept(folder, client).items() if key.endswith("|A")} == {rank}


@pytest.mark.parametrize("rank", [0, 9, "many", 2.5])
def test_a_column_that_says_no_rank_is_refused_with_the_client(tmp_path: Path, rank: Any) -> None:
    table = tiny.table(tmp_path, {"name": "florist"}, lora={"r": 8, "rank_by": "rank"})
    with pytest.raises(ConfigError, match=rf"lora\.rank_by = 'rank': the rows of client 1 say {rank}; allowed: one number"):
        running.run(with_column(tmp_path, table, [2, rank, 3]), tmp_path / "run")


def test_unseen_clients_take_no_part(tmp_path: Path) -> None:
    table = tiny.table(tmp_path, {"name": "fedit"}, split={"unseen": 0.3})
    folder = running.run(table, tmp_path / "run")
    unseen = json.loads((folder / "split.json").read_text())["unseen"]
    assert len(unseen) == 1
    for line in lines(folder):
        assert not set(line["asked"]) & set(unseen)
    contents = json.loads((folder / "job.json").read_text())
    assert len(contents["local"]) == 2
    assert f"local/client-{unseen[0]}" not in contents["local"]
    scores = lines(folder)[-1]["global"]
    assert scores["rows"] == 45  # the common model is scored on everybody's test rows
    rows = [json.loads(line) for line in (folder / "clients" / "-1" / "scores.jsonl").read_text().splitlines()]
    away = [row["right"] for row in rows if row["client"] in unseen]
    assert scores["unseen_rows"] == len(away) > 0
    assert scores["unseen_accuracy"] == sum(away) / len(away)
    assert report.rows([report.read_job(folder)])[0]["unseen_score"] == scores["unseen_accuracy"]


def test_somebody_must_be_left(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"split\.unseen: got 0\.9, which leaves none of 3 clients"):
        running.run(tiny.table(tmp_path, {"name": "fedit"}, split={"unseen": 0.9}), tmp_path / "run")


def test_every_kind_of_run_has_its_score_on_the_unseen_clients_rows(tmp_path: Path) -> None:
    table = tiny.table(tmp_path, {"name": "fedit"}, split={"unseen": 0.3})
    folder = running.run(table, tmp_path / "run")
    [unseen] = json.loads((folder / "split.json").read_text())["unseen"]
    rows = {row["kind"]: row for row in report.rows([report.read_job(folder)])}
    places = {"method": ["."], "central": ["central"], "local": json.loads((folder / "job.json").read_text())["local"]}
    for kind, members in places.items():
        found = []
        for member in members:
            text = (folder / member / "clients" / "-1" / "scores.jsonl").read_text()
            own = [row["right"] for row in map(json.loads, text.splitlines()) if row["client"] == unseen]
            found.append(sum(own) / len(own))
        assert rows[kind]["unseen_score"] == pytest.approx(sum(found) / len(found)), kind


def test_ranks_of_every_method_are_looked_at_before_the_first_trains(tmp_path: Path) -> None:
    entries = [{"name": "fedit"}, {"name": "flora", "lora": {"r": [2, 4]}}]
    table = with_column(tmp_path, tiny.table(tmp_path, entries), [2, 2, 2])
    with pytest.raises(ConfigError, match=r"lora\.r: got 2 values, for 3 clients"):
        running.run(table, tmp_path / "run")
    assert not (tmp_path / "run" / "fedit").exists()
