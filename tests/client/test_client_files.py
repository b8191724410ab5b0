"""Real clients over a tiny real model: files that are gone, requests for others, scores of one's own rows."""

import json
import shutil

import pytest
import torch

import tiny
from federation import Site
from umbel import wire
from umbel.server import OBSERVER


@pytest.fixture
def site(tmp_path):
    def make(name="run", method=None, **sections):
        return Site(tmp_path / name, tiny.table(tmp_path, method, **sections))

    return make


def on_a_new_disk(site, turn, damaged=False):
    """Before client 1 trains in a round, its folder is emptied, or its files are torn."""

    def change(answers):
        def own(payload):
            header = wire.decode(payload).header
            if header["kind"] == "train" and header["train_round"] == turn and header["has"] >= 0:
                for file in (site.folder / "clients" / "1").glob("*.safetensors"):
                    file.write_bytes(file.read_bytes()[:100]) if damaged else file.unlink()
            return answers[1](payload)

        return {1: own}

    return change


@pytest.mark.parametrize("damaged", [False, True], ids=["gone", "torn"])
@pytest.mark.parametrize("method", [{"name": "fedit"}, {"name": "fed_sb"}, {"name": "florist", "adopt": "merge"}], ids=str)
def test_a_client_whose_files_are_gone_ends_with_the_same_bits(site, method, damaged):
    whole, lost = site("whole", method, rounds=3), site("lost", method, rounds=3)
    whole.run()
    lines = lost.run(on_a_new_disk(lost, 3, damaged))
    assert lost.ending() == whole.ending()
    told = [line["lost"] for line in lines if "lost" in line]
    assert told == [{"1": f"lost its state after round {lines[-1]['round'] - 2}"}]
    assert all(line["answered"] == line["asked"] for line in lines)


def test_a_client_that_kept_its_optimizer_says_that_it_is_gone_too(site):
    own = site(training={"optimizer_state": "keep"})
    lines = own.run(on_a_new_disk(own, 2))
    assert lines[-1]["lost"] == {"1": "lost its state and that of its optimizer after round 0"}


def test_a_client_answers_no_request_for_another(site):
    own = site()
    for asked in (2, "1", True, None, 1.0):
        request = wire.encode(wire.Message({"kind": "open", "run": "", "round": 0, "client": asked}))
        with pytest.raises(wire.WireError, match=f"this is client 1, the request is for client {asked!r}"):
            own.clients[1].answer(request)


def test_a_client_repeats_what_it_was_asked(site):
    own = site()
    request = {"kind": "open", "run": "heart", "round": 7, "client": 1}
    said = wire.decode(own.clients[1].answer(wire.encode(wire.Message(request)))).header
    assert {key: said[key] for key in wire.ECHO} == request
    assert "preflight" not in said


def test_clients_score_the_common_model_on_their_own_test_rows_and_keep_it(site):
    own, other = site("clients"), site("observer")
    last, seen = own.run(observe_by="clients")[-1], other.run()[-1]
    assert own.ending() == other.ending()
    assert last["global"]["rows"] == len(own.dataset.test)
    # The mean over the rows of all clients is the score on all rows.
    assert last["global"]["accuracy"] == pytest.approx(seen["global"]["accuracy"])
    assert last["global"]["loss"] == pytest.approx(seen["global"]["loss"], rel=1e-5)
    states = [wire.decode((own.folder / "clients" / str(k) / "2.safetensors").read_bytes()).tensors for k in range(3)]
    final = wire.decode((other.folder / "clients" / str(OBSERVER) / "2.safetensors").read_bytes()).tensors
    for state in states:
        assert state.keys() == final.keys()
        assert all(torch.equal(x, final[key]) for key, x in state.items())


def test_a_client_keeps_the_scores_of_its_own_model_when_it_scores_the_common_one(site):
    own, other = site("clients"), site("observer")
    own.run(observe_by="clients")
    other.run()
    for k in range(3):
        files = [run.folder / "clients" / str(k) / "scores.jsonl" for run in (own, other)]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert len([json.loads(line) for line in files[0].read_text().splitlines()]) == own.dataset.owner_test.count(k)


class Killed(BaseException):
    """The process ended here."""


@pytest.mark.parametrize("method", [{"name": "fedit"}, {"name": "fedsa_lora"}], ids=str)
def test_killed_while_clients_score_the_last_round_is_repeated_to_the_same_bits(site, method):
    keep = {"optimizer_state": "keep"}
    whole, broken = site("whole", method, training=keep), site("broken", method, training=keep)
    whole.run(observe_by="clients")

    def change(answers):
        def own(payload):
            said = answers[2](payload)
            if wire.decode(payload).header["kind"] == "observe":
                raise Killed
            return said

        return {2: own}

    with pytest.raises(Killed):
        broken.run(change, observe_by="clients")
    shutil.rmtree(broken.folder / "clients" / str(OBSERVER), ignore_errors=True)
    lines = broken.run(observe_by="clients")
    assert broken.ending() == whole.ending()
    assert not any("lost" in line for line in lines)
