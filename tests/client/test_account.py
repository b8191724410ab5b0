"""What a client's answers cost: from its configuration and its own rows to its ledger."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from recorded import lines
from umbel import privacy, wire
from umbel import run as running
from umbel.client.client import Client, Resident, tokens
from umbel.client.data import load as load_data
from umbel.client.model import load as load_model
from umbel.config import configs
from umbel.engine.reasons import reason
from umbel.ledger import BudgetError, Ledger
from umbel.privacy import PrivacyError
from umbel.server import ServerError

TRAINS = {"trains": ["A", "B"], "sends": ["A", "B"], "keeps": []}


def a_table(folder: Path, method: Any = None, **privacy_keys: Any) -> dict[str, Any]:
    own = {"unit": "example", "target_epsilon": 8.0, "target_delta": 1e-3, **privacy_keys}
    return tiny.table(folder, method, split={"kind": "iid", "clients": 3}, privacy=own)


def a_resident(table: dict[str, Any]) -> Resident:
    from umbel.client.adapter import Adapter

    config = next(iter(configs(table).values()))
    dataset = load_data(config)
    base = load_model(config, len(dataset.labels))
    adapter = Adapter(base.model, config.lora, base.heads, config.seed)
    return Resident(config, base, adapter, dataset, *tokens(config, base, dataset))


def a_request(kind: str, number: int = 1, **other: Any) -> bytes:
    header = {"run": "", "round": number, "client": 0, "kind": kind, "has": -1, "keep": number, "layers": {}, "plain": {}}
    header |= {"train_round": number, "rounds": 2, "score": False, **TRAINS, "samples": 10, "downloads": {}, **other}
    return wire.encode(wire.Message(header), "float32")


def ledger_of(folder: Path, client: int) -> Ledger:
    return Ledger(folder / "clients" / str(client) / "ledger")


def test_a_run_spends_its_epsilon_and_no_more_and_says_so_in_every_round(tmp_path: Path) -> None:
    table = a_table(tmp_path)
    folder = running.run(table, tmp_path / "out", baselines=False)
    trained = [line for line in lines(folder) if line["phase"] == "train"]
    assert [sorted(line["epsilon"]) for line in trained] == [["0", "1", "2"]] * 2
    for client in ("0", "1", "2"):
        first, last = (line["epsilon"][client] for line in trained)
        assert 0 < first < last
        assert 0.98 * 8 <= last <= 8
        entries = ledger_of(folder, int(client)).entries()
        assert [(own.round, own.kind, own.steps, own.sample_rate) for own in entries] == [
            (number, "train", 3, 8 / 30) for number in (1, 2)
        ]
        assert last == privacy.epsilon([own.spent for own in entries], 1e-3)


def test_the_loss_of_hidden_rows_is_in_no_reply_and_in_no_file(tmp_path: Path) -> None:
    resident = a_resident(a_table(tmp_path))
    reply = wire.decode(Client(0, resident, tmp_path / "c", "r").answer(a_request("train")))
    assert "loss" not in reply.header
    assert reply.header["epsilon"] > 0
    folder = running.run(a_table(tmp_path), tmp_path / "out", baselines=False)
    assert all(line["loss"] == {} for line in lines(folder))


def test_noise_does_not_follow_the_runs_seed(tmp_path: Path) -> None:
    resident = a_resident(a_table(tmp_path))
    one, other = (Client(0, resident, tmp_path / name, "r").answer(a_request("train")) for name in "ab")
    first, second = wire.decode(one).tensors, wire.decode(other).tensors
    assert first.keys() == second.keys()
    assert all(not torch.equal(first[key], second[key]) for key in first)


def test_the_same_request_is_answered_with_the_same_bits_and_paid_once(tmp_path: Path) -> None:
    resident = a_resident(a_table(tmp_path))
    client = Client(0, resident, tmp_path / "c", "r")
    first = wire.decode(client.answer(a_request("train")))
    again = wire.decode(Client(0, resident, tmp_path / "c", "r").answer(a_request("train")))
    assert all(torch.equal(x, again.tensors[key]) for key, x in first.tensors.items())
    assert first.header["epsilon"] == again.header["epsilon"]
    assert len(Ledger(tmp_path / "c" / "ledger").entries()) == 1


def test_a_changed_request_configuration_or_state_is_other_noise_and_paid_anew(tmp_path: Path) -> None:
    resident = a_resident(a_table(tmp_path, total_epsilon=1e4))
    Client(0, resident, tmp_path / "c", "r").answer(a_request("train"))
    ledger = Ledger(tmp_path / "c" / "ledger")

    def paid() -> int:
        return len({entry.request for entry in ledger.entries()})

    Client(0, resident, tmp_path / "c", "r").answer(a_request("train", rounds=3))  # another request
    assert paid() == 2
    table = a_table(tmp_path, total_epsilon=1e4)
    table["training"]["learning_rate"] = 2e-2
    Client(0, a_resident(table), tmp_path / "c", "r2").answer(a_request("train"))  # another configuration
    assert paid() == 3
    resident = a_resident(a_table(tmp_path, total_epsilon=1e4))
    request = a_request("train", 2, has=1, keep=1)
    Client(0, resident, tmp_path / "c", "r3").answer(request)  # this one overwrites the state that it begins from, …
    Client(0, resident, tmp_path / "c", "r3").answer(request)  # … so that the same request begins from another
    assert paid() == 5


def test_a_round_over_the_budget_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    resident = a_resident(a_table(tmp_path))
    client = Client(0, resident, tmp_path / "c", "r")
    trained: list[int] = []
    resident.on_step = lambda client, step, steps: trained.append(step)
    for number in (1, 2):
        client.answer(a_request("train", number))
    assert len(trained) == 6
    with pytest.raises(BudgetError, match=r"round 3 is refused: this run spent ε 7\.9") as error:
        Client(0, resident, tmp_path / "c", "r").answer(a_request("train", 3))  # a restart forgets nothing
    assert len(trained) == 6
    told = reason(error.value)
    assert "this run spent ε 7.9" in told
    assert "raise privacy.target_epsilon" in told
    assert str(tmp_path) not in told


def test_a_second_run_on_overlapping_rows_ends_with_the_reason(tmp_path: Path) -> None:
    table = a_table(tmp_path, ledger=str(tmp_path / "ledger"))
    running.run(table, tmp_path / "one", baselines=False)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more row of the sea", "label": "sea"}) + "\n")
    with pytest.raises(ServerError, match=r"client 0: BudgetError: round 1 is refused: all runs on these rows spent ε 7\.9"):
        running.run({**table, "seed": 4}, tmp_path / "two", baselines=False)
    table["privacy"]["total_epsilon"] = 40.0
    folder = running.run(table, tmp_path / "three", baselines=False)
    assert lines(folder)[-1]["epsilon"]["0"] <= 8


def test_a_client_that_may_spend_no_more_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    table = a_table(tmp_path, ledger=str(tmp_path / "ledger"))
    resident = a_resident(table)
    client = Client(0, resident, tmp_path / "c", "earlier")
    for number in (1, 2):
        client.answer(a_request("train", number))
    folder = running.run(table, tmp_path / "out", baselines=False)
    for line in lines(folder)[1:]:
        assert line["answered"] == [1, 2]
        assert "all runs on these rows spent" in line["refused"][0]["reason"]


def test_the_preflight_spends_nothing_and_tells_only_its_time(tmp_path: Path) -> None:
    client = Client(0, a_resident(a_table(tmp_path)), tmp_path / "c", "r")
    header = wire.decode(client.answer(a_request("open", preflight=True))).header
    assert set(header) == {"run", "round", "client", "kind", "layers", "plain", "rows", "preflight"}
    known = {"versions", "model", "tokenizer", "chat_template", "disk_bytes", "needs_bytes", "memory_bytes", "step_seconds"}
    assert set(header["preflight"]) <= known
    assert header["preflight"]["step_seconds"] > 0
    assert not Ledger(tmp_path / "c" / "ledger").exists


def test_a_run_that_was_killed_in_the_middle_ends_with_the_same_bits_and_pays_once(tmp_path: Path) -> None:
    table = a_table(tmp_path, {"name": "fed_sb", "eta": 1e-3}) | {"rounds": 3}
    code = f"from umbel import run; run.run({table!r}, __import__('pathlib').Path(__import__('sys').argv[1]), baselines=False)"
    before, whole, broken = (tmp_path / name for name in ("before", "whole", "broken"))
    first = subprocess.Popen([sys.executable, "-c", code, str(before)], stderr=subprocess.DEVNULL)
    paid = before / "clients" / "1" / "ledger" / "ledger.jsonl"
    while not paid.exists() or paid.read_bytes().count(b"\n") < 2:  # the start, and one round
        assert first.poll() is None
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    shutil.copytree(before, broken)
    before.rename(whole)  # twice the same beginning: it is under one secret, as two runs would not be
    endings = []
    for folder in (whole, broken):
        running.run(table, folder, baselines=False)
        endings.append((folder / "adapter" / "adapter_model.safetensors").read_bytes())
        for client in range(3):
            entries = ledger_of(folder, client).entries()
            assert [(own.kind, own.round) for own in entries] == [("measure", 0), ("train", 1), ("train", 2), ("train", 3)]
    assert endings[0] == endings[1]


def test_delta_above_one_in_n_is_refused_at_the_opening(tmp_path: Path) -> None:
    resident = a_resident(a_table(tmp_path, target_delta=0.04))
    with pytest.raises(PrivacyError, match=r"got 0\.04, allowed: at most 1/n = 0\.0333 for 30 rows of client 0; lower it"):
        Client(0, resident, tmp_path / "c", "r").answer(a_request("open", preflight=False))
    with pytest.raises(ServerError, match="allowed: at most 1/n"):
        running.run(a_table(tmp_path, target_delta=0.04), tmp_path / "out", baselines=False)


def test_where_uploads_are_masked_a_refusal_tells_no_number_that_follows_from_the_rows(tmp_path: Path) -> None:
    def refusals(masked: bool) -> list[str]:
        few = Client(0, a_resident(a_table(tmp_path, secure_aggregation=masked, target_delta=0.04)), tmp_path / "few", "r")
        spent = Client(0, a_resident(a_table(tmp_path, secure_aggregation=masked)), tmp_path / f"spent {masked}", "r")
        account, told = spent._account(), list[str]()
        assert account is not None
        for payload in (b"1", b"2"):
            account.train(1, payload, b"")
        for ask in (lambda: few.answer(a_request("open", preflight=False)), lambda: account.train(1, b"3", b"")):
            with pytest.raises((PrivacyError, BudgetError)) as error:
                ask()
            told.append(reason(error.value).rpartition(" (")[0])
        return told

    assert ["30 rows" in refusals(False)[0], "spent ε 7.9" in refusals(False)[1]] == [True, True]
    for vague in refusals(True):
        said = (
            r"(Privacy|Budget)Error: client 0 cannot take part within the ε and δ that were asked for; why is in its own log, "
        )
        assert re.fullmatch(said + "and what it has spent in its ledger", vague)


def test_noise_is_for_the_rounds_in_which_a_client_is_asked(tmp_path: Path) -> None:
    table = a_table(tmp_path)
    table |= {"rounds": 4, "server": {"clients_per_round": 1, "min_clients": 1}}
    folder = running.run(table, tmp_path / "out", baselines=False)
    asked = [line["asked"][0] for line in lines(folder) if line["phase"] == "train"]
    for client in set(asked):
        entries = ledger_of(folder, client).entries()
        assert len(entries) == asked.count(client)
        assert 0.98 * 8 <= privacy.epsilon([own.spent for own in entries], 1e-3) <= 8


@pytest.mark.parametrize("init", ["sign", "gradient"])
def test_a_start_on_private_rows_takes_its_share_and_training_the_rest(tmp_path: Path, init: str) -> None:
    table = a_table(tmp_path, {"name": "fed_sb", "init": init, "eta": 1e-3}, start_share=0.2)
    folder = running.run(table, tmp_path / "out", baselines=False)
    start, *trained = lines(folder)[1:]
    assert start["phase"] == "measure"
    for client in ("0", "1", "2"):
        assert 0.98 * 1.6 <= start["epsilon"][client] <= 1.6
        assert 0.98 * 8 <= trained[-1]["epsilon"][client] <= 8
        entries = ledger_of(folder, int(client)).entries()
        assert [own.kind for own in entries] == ["measure", "train", "train"]
        assert entries[0].sample_rate == pytest.approx(start["rows"][client] / 30)


def test_a_start_on_public_rows_or_at_random_is_free(tmp_path: Path) -> None:
    public = [{**row, "label": label} for row, label in zip(tiny.texts(20, 5), ["sea", "sky", "of no class"] * 7)]
    (tmp_path / "public.jsonl").write_text("\n".join(map(json.dumps, public)))
    table = a_table(tmp_path, {"name": "fed_sb", "eta": 1e-3})
    table["data"]["public"] = str(tmp_path / "public.jsonl")
    for name, own in (("public", table), ("random", a_table(tmp_path, {"name": "fed_sb", "init": "random"}))):
        folder = running.run(own, tmp_path / name, baselines=False)
        for client in range(3):
            assert [entry.kind for entry in ledger_of(folder, client).entries()] == ["train", "train"]
    assert "epsilon" not in lines(tmp_path / "public")[1]


def test_public_rows_are_what_the_start_is_measured_on(tmp_path: Path) -> None:
    (tmp_path / "public.jsonl").write_text("\n".join(map(json.dumps, tiny.texts(20, 5))))
    table = a_table(tmp_path)
    table["data"]["public"] = str(tmp_path / "public.jsonl")
    measures = {"trains": [], "sends": ["G"], "samples": 10}
    resident = a_resident(table)
    first = wire.decode(Client(0, resident, tmp_path / "c", "r").answer(a_request("measure", **measures)))
    resident.train = [resident.train[0]] * len(resident.train)  # its own rows make no difference
    second = wire.decode(Client(0, resident, tmp_path / "d", "r").answer(a_request("measure", **measures)))
    assert first.tensors
    assert all(torch.equal(x, second.tensors[key]) for key, x in first.tensors.items())


def test_a_measurement_on_public_rows_tells_nothing_of_how_many_a_client_has(tmp_path: Path) -> None:
    """Under client-level privacy the start has no noise, so rows must not weigh in it, nor cut its samples."""
    (tmp_path / "public.jsonl").write_text("\n".join(map(json.dumps, tiny.texts(40, 5))))
    table = tiny.table(tmp_path, {"name": "fed_sb", "eta": 1e-3, "samples": 75}, split={"kind": "dirichlet", "alpha": 1.0})
    table["split"]["clients"], table["data"]["public"] = 3, str(tmp_path / "public.jsonl")
    table["privacy"] = {"unit": "client", "target_epsilon": 50.0, "target_delta": 0.1}
    folder = running.run(table, tmp_path / "out", baselines=False)
    start, trained = lines(folder)[1:3]
    assert min(trained["rows"].values()) < 25
    assert len(set(trained["rows"].values())) == 3
    assert start["rows"] == {"0": 25, "1": 25, "2": 25}


def test_rows_that_another_run_dealt_to_another_client_have_paid(tmp_path: Path) -> None:
    rows = tiny.texts(60, 1)
    for name, part in (("one", rows[:30]), ("two", rows[30:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))

    def dealt(*names: str, **keys: Any) -> dict[str, Any]:
        table = a_table(tmp_path, ledger=str(tmp_path / "ledger"), **keys) | {"split": {"kind": "files"}, "rounds": 1}
        table["data"]["train"] = [str(tmp_path / f"{name}.jsonl") for name in names]
        return table

    running.run(dealt("one", "two"), tmp_path / "first", baselines=False)
    with pytest.raises(ServerError, match=r"clients 0, 1: BudgetError: .* all runs on these rows spent ε 7\.9"):
        running.run(dealt("two", "one"), tmp_path / "second", baselines=False)
    running.run(dealt("two", "one", total_epsilon=20.0), tmp_path / "third", baselines=False)


def test_the_baselines_are_hidden_too_and_leave_the_ledger_alone(tmp_path: Path) -> None:
    folder = running.run(a_table(tmp_path, target_delta=0.02, ledger=str(tmp_path / "ledger")), tmp_path / "out")
    central = json.loads((folder / "central" / "run.json").read_text())["config"]["privacy"]
    assert (central["unit"], central["target_delta"]) == ("example", 1 / 90)
    assert 7.8 <= lines(folder / "central")[-1]["epsilon"]["0"] <= 8
    assert 7.8 <= lines(folder / "local" / "client-2")[-1]["epsilon"]["2"] <= 8
    assert len(Ledger(tmp_path / "ledger" / "2").entries()) == 2


def test_without_privacy_nothing_changes(tmp_path: Path) -> None:
    folder = running.run(tiny.table(tmp_path, split={"kind": "iid"}), tmp_path / "out", baselines=False)
    assert not list(folder.rglob("ledger*"))
    assert all("epsilon" not in line for line in lines(folder))
    assert set(lines(folder)[-1]["loss"]) == {"0", "1", "2"}
