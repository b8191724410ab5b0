"""What a site says of itself, and that having been asked changes nothing: real clients over a tiny real model."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import federation
import tiny
from umbel import __version__, wire
from umbel.client import model, preflight
from umbel.preflight import mismatch, read


class Site(federation.Site):
    def facts(self, number=0):
        return preflight.facts(self.resident, self.folder / "clients" / str(number), number)


@pytest.fixture
def site(tmp_path):
    """Makes sites: one model and one set of rows, a folder for each run."""

    def make(name="run", method=None, **sections):
        table = tiny.table(tmp_path, method, **sections)
        return Site(tmp_path / name, table)

    return make


def test_a_client_says_its_versions_hashes_room_and_the_time_of_a_step(site):
    own = site()
    state = torch.random.get_rng_state()
    said = own.facts()
    assert set(said["versions"]) == {"umbel", "python", "torch", "transformers", "peft"}
    assert said["versions"]["umbel"] == __version__
    assert said["versions"]["torch"] == torch.__version__
    assert said["model"] == model.fingerprint(own.config)
    assert said["disk_bytes"] == pytest.approx(shutil.disk_usage(own.folder.parent).free, rel=0.2)
    assert 10**6 < said["memory_bytes"] < 10**15
    assert 0 < said["step_seconds"] < 60
    assert torch.equal(torch.random.get_rng_state(), state)
    assert read(json.loads(json.dumps(said))) == said


def test_the_room_it_needs_is_that_of_its_state_files(site):
    for keep in ("reset", "keep"):
        own = site(keep, training={"optimizer_state": keep})
        needs = own.facts()["needs_bytes"]
        own.run(observe="never")
        sizes = [file.stat().st_size for file in (own.folder / "clients" / "0").glob("*.safetensors")]
        assert needs == pytest.approx(3 * max(sizes), rel=0.25)
        assert needs <= 3 * max(sizes)


def test_a_tokenizer_that_was_used_has_the_hash_of_a_new_one_and_another_has_another(site, tmp_path):
    own = site()
    before = preflight.identity(own.config, own.base.tokenizer)
    own.base.tokenizer(["ship wave", "the"], padding=True, truncation=True, max_length=2)
    assert preflight.identity(own.config, own.base.tokenizer) == before
    assert preflight.identity(own.config, model.load(own.config, 3).tokenizer) == before
    own.base.tokenizer.add_tokens(["harbour"])
    after = preflight.identity(own.config, own.base.tokenizer)
    assert [key for key in before if before[key] != after[key]] == ["tokenizer"]
    own.base.tokenizer.chat_template = tiny.CHAT
    assert preflight.identity(own.config, own.base.tokenizer)["chat_template"] != before["chat_template"]


def test_the_hash_of_the_model_is_that_of_its_files(site):
    own = site()
    before = own.facts()
    weights = Path(own.base.path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    after = preflight.facts(dataclasses.replace(own.resident), own.folder, 0)  # as another process says
    assert mismatch(before, after) == f"base model sha256 {after['model'][:12]}…, server {before['model'][:12]}…"
    assert mismatch(before, before) is None


METHODS = {
    "fedit": {"name": "fedit"},
    "fed_sb": {"name": "fed_sb"},
    "rolora": {"name": "rolora"},
    "florist merge": {"name": "florist", "adopt": "merge"},
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_preflight_changes_no_later_bit(site, method):
    lora = {"lora_dropout": 0.1}
    plain, asked = site("plain", method, lora=lora), site("asked", method, lora=lora)
    lines = asked.run(expected=preflight.identity(asked.config, asked.base.tokenizer))
    others = plain.run()
    assert asked.ending() == plain.ending()
    assert [line["global"] for line in lines] == [line["global"] for line in others]
    assert [line["loss"] for line in lines] == [line["loss"] for line in others]
    assert set(lines[0]["preflight"]) == {"0", "1", "2"}
    assert "preflight" not in others[0]
    for number in range(3):
        states = [file.name for file in (asked.folder / "clients" / str(number)).glob("*.safetensors")]
        assert states
        for name in states:
            one, other = (wire.decode((run.folder / "clients" / str(number) / name).read_bytes()) for run in (asked, plain))
            assert one.header == other.header
            assert all(torch.equal(x, other.tensors[key]) for key, x in one.tensors.items())


def test_a_preflight_in_the_middle_of_a_run_changes_no_later_bit(site):
    plain, asked = site("plain"), site("asked")
    plain.run()

    def change(answers):
        def own(payload):
            if wire.decode(payload).header["kind"] == "train":
                asked.facts(2)
            return answers[1](payload)

        return {1: own}

    asked.run(change)
    assert asked.ending() == plain.ending()


def test_a_client_of_its_own_rank_needs_room_for_that_rank(site):
    own = site(lora={"r": [2, 4, 8], "lora_alpha": 8}, method={"name": "florist"})
    own.resident.ranks = {0: 2, 1: 4, 2: 8}
    needs = [own.facts(k)["needs_bytes"] for k in range(3)]
    assert needs[0] < needs[1] < needs[2]
    assert own.adapter.layers == dataclasses.replace(own.resident).adapter.layers


def test_a_client_without_rows_times_no_step(site):
    own = site()
    own.dataset.owner_train[:] = [0 if owner == 1 else owner for owner in own.dataset.owner_train]
    assert "step_seconds" not in own.facts(1)
    assert "step_seconds" in own.facts(0)
