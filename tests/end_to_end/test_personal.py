"""FedSA-LoRA in a run: B and the head stay at the clients; the common model comes together once, in the end."""

from pathlib import Path

import pytest
import torch

import tiny
from recorded import kept, lines
from umbel import report, wire
from umbel import run as running


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("personal")
    table = tiny.table(folder, [{"name": "fedsa_lora"}, {"name": "fedit"}], rounds=3)
    return running.run(table, folder / "run")


def test_only_a_travels_while_clients_train(job: Path) -> None:
    for ours, all_of_it in zip(lines(job / "fedsa_lora")[1:4], lines(job / "fedit")[1:4]):
        assert ours["phase"] == "train"
        assert ours["bytes_up"]["0"] < 0.6 * all_of_it["bytes_up"]["0"]
        assert ours["global"] is None
        assert ours["aggregation_error"] is None
        assert len(ours["local"]) == 3


def test_what_stays_at_home_differs_from_client_to_client_and_a_does_not(job: Path) -> None:
    first, second = kept(job / "fedsa_lora", 0), kept(job / "fedsa_lora", 1)
    for name in first:
        same = torch.equal(first[name], second[name])
        assert same == name.endswith("|A"), name


def test_the_common_model_is_the_mean_of_what_the_clients_hold(job: Path) -> None:
    gathered = lines(job / "fedsa_lora")[-1]
    assert gathered["phase"] == "gather"
    assert gathered["global"]["rows"] == 45
    rows = [gathered["rows"][k] for k in "012"]
    states = [kept(job / "fedsa_lora", k) for k in range(3)]
    held = wire.decode((job / "fedsa_lora" / "checkpoint.safetensors").read_bytes()).tensors
    names = [name for name in states[0] if name.endswith("|B")]
    assert names
    for name in names:
        mean = sum(n * state[name].double() for n, state in zip(rows, states)) / sum(rows) * 2  # the scale is 2
        assert torch.allclose(held[f"held/{name}"].double(), mean, rtol=1e-5, atol=1e-7)
    for name in [name for name in states[0] if name.startswith("plain|")]:
        mean = sum(n * state[name].double() for n, state in zip(rows, states)) / sum(rows)
        assert torch.allclose(held[name.replace("plain|", "plain/")].double(), mean, rtol=1e-5, atol=1e-7)


def test_the_table_has_the_personal_score_beside_the_common_one(job: Path) -> None:
    row, other = report.rows([report.read_job(job)])[:2]
    gathered = lines(job / "fedsa_lora")[-1]
    own = [gathered["local"][k] for k in "012"]
    assert row["personal_score"] == pytest.approx(sum(x["rows"] * x["accuracy"] for x in own) / 45)
    assert row["score"] == gathered["global"]["accuracy"]
    assert row["gap"] == pytest.approx(row["personal_score"] - row["score"])
    assert other["gap"] == pytest.approx(other["local_score"] - other["score"])
    assert [client["personal_score"] for client in row["by_client"]] == [x["accuracy"] for x in own]
    assert other["personal_score"] is None
    assert [client["gap"] for client in other["by_client"]] == [
        pytest.approx(client["local_score"] - other["score"]) for client in other["by_client"]
    ]


def test_a_client_that_never_took_part_is_not_in_the_mean(tmp_path: Path) -> None:
    table = tiny.table(tmp_path, {"name": "fedsa_lora"}, rounds=1, server={"clients_per_round": 2})
    opened, trained, gathered = lines(running.run(table, tmp_path / "run"))
    assert len(opened["asked"]) == 3
    assert len(trained["asked"]) == 2
    assert gathered["asked"] == trained["asked"]
