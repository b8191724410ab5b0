"""The operator's side of a federation, as far as it is files: what was submitted, what may be changed, what has ended."""

import json
import tomllib

import pytest

import tiny
from umbel import config, federation, kit
from umbel import run as running
from umbel.client import data
from umbel.config import ConfigError
from umbel.record import RecordError, write_json


@pytest.fixture
def server(tmp_path):
    return kit.init(tmp_path / "kit", "127.0.0.1:9092", ["hospital-a", "hospital-b"]).folder


def noted(folder, server, number):
    folder.mkdir()
    write_json(folder / federation.REQUEST, {"federation": str(server), "table": {"rounds": 2}, "number": number})
    return folder


def test_a_job_that_was_never_submitted_says_so(tmp_path, server):
    folder = noted(tmp_path / "job", server, None)
    with pytest.raises(federation.FederationError, match="prepared and never submitted"):
        federation.find(folder)
    assert federation.find(folder, submitted=False).federation.folder == server
    assert federation.table_of(folder) == {"rounds": 2}


def test_a_moved_kit_is_said_with_the_way_to_go_on(tmp_path, server):
    folder = noted(tmp_path / "job", server, "7")
    server.rename(tmp_path / "elsewhere")
    with pytest.raises(federation.FederationError, match=r"is gone .*--resume .* --federation DIR"):
        federation.find(folder)


def test_a_job_that_has_ended_is_not_stopped_again(tmp_path, server):
    folder = noted(tmp_path / "job", server, "7")
    (folder / federation.EVENTS).write_text(json.dumps({"number": "7", "event": "end", "error": ""}) + "\n")
    with pytest.raises(federation.FederationError, match="has ended already"):
        federation.stop(federation.find(folder))


def test_a_torn_event_is_left_for_later(tmp_path, server):
    folder = noted(tmp_path / "job", server, "7")
    whole = json.dumps({"number": "7", "event": "stage", "text": "x"})
    (folder / federation.EVENTS).write_text(whole + "\n" + whole[:9])
    assert [event["text"] for event in federation.events(folder)] == ["x"]


def test_on_resuming_only_what_is_waited_for_may_be_set(tmp_path):
    table = tiny.table(tmp_path)
    running.run(table, tmp_path / "job", baselines=False)
    running.adjust(tmp_path / "job", ["server.round_deadline=7", "server.min_clients=2"])
    after = tomllib.loads((tmp_path / "job" / "job.toml").read_text())
    assert after["server"] == {"round_deadline": 7, "min_clients": 2}
    assert after["seed"] == table["seed"]
    with pytest.raises(ConfigError, match=r"--set changes only server.min_clients, .*, privacy.total_epsilon of it"):
        running.adjust(tmp_path / "job", ["seed=4"])
    with pytest.raises(ConfigError, match="round_deadline"):
        running.adjust(tmp_path / "job", ["server.round_deadline=-1"])
    with pytest.raises(RecordError, match="nothing to resume"):
        running.adjust(tmp_path / "nothing", ["server.min_clients=2"])
    assert federation.is_done(tmp_path / "job")
    assert not federation.is_done(tmp_path / "nothing")


def test_test_rows_that_are_not_at_the_server_are_refused_and_none_at_all_are_not(tmp_path):
    labels = {"labels": list(tiny.TOPICS)}
    (made,) = config.configs(tiny.table(tmp_path, data={**labels, "test": "mistyped.jsonl"})).values()
    with pytest.raises(ConfigError, match=r"data.test at the server: .*mistyped.*Leave it out"):
        data.load_server(made, 3)
    (made,) = config.configs(tiny.table(tmp_path, data={**labels, "test": ""})).values()
    assert data.load_server(made, 3).test == []
    (made,) = config.configs(tiny.table(tmp_path)).values()
    with pytest.raises(ConfigError, match=r"data.labels: got \[\], allowed: two or more"):
        data.load_server(made, 3)
