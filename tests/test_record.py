"""What a run leaves on disk: whole or not at all, one process at a time, and mended after a kill."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from umbel import record
from umbel.record import CHECKPOINT, Record, RecordError, locked, new_folder, sha256, write_file, write_json


def fail(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def full_disk(at):
    """A disk that is full at the flush, at the rename, or after the first ten bytes of a file."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as after:
        if at == "write":
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            after.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        elif at == "flush":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(Path, "replace", fail)
        yield


NO_ROOM = r"No space left|too large"
FULL = pytest.mark.parametrize("at", ["write", "flush", "rename"])


# Files and folders


def test_a_file_is_replaced_by_what_was_written(tmp_path):
    for content in (b"old", b"the new"):
        write_file(tmp_path / "run.json", content)
        assert (tmp_path / "run.json").read_bytes() == content
    assert os.listdir(tmp_path) == ["run.json"]


@FULL
def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path, at):
    write_file(tmp_path / "run.json", b"old")
    with full_disk(at), pytest.raises(OSError, match=NO_ROOM):
        write_file(tmp_path / "run.json", b"the new one, longer" * 10_000)
    assert os.listdir(tmp_path) == ["run.json"]
    assert (tmp_path / "run.json").read_bytes() == b"old"


@FULL
def test_a_full_disk_leaves_no_file_where_there_was_none(tmp_path, at):
    with full_disk(at), pytest.raises(OSError, match=NO_ROOM):
        write_file(tmp_path / "run.json", b"the new one" * 10_000)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_half_is_overwritten(tmp_path):
    (tmp_path / "run.json.partial").write_bytes(b"much longer than what comes" * 9)
    write_file(tmp_path / "run.json", b"new")
    assert os.listdir(tmp_path) == ["run.json"]
    assert (tmp_path / "run.json").read_bytes() == b"new"


def test_json_comes_back_and_names_keep_their_letters(tmp_path):
    value = {"name": "Zürich ∂", "odd": "file-\udcff", "rows": [1, 2.5, None, True]}
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == value
    assert "Zürich ∂" in (tmp_path / "x.json").read_text(encoding="utf-8")


def test_a_folder_takes_the_old_ones_place_only_when_it_is_done(tmp_path):
    place = tmp_path / "adapter"
    for content in ("one", "two"):
        with new_folder(place) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / content).write_text(content)
            assert temporary != place
            assert (place / "inner").exists() == (content == "two")
        assert os.listdir(place / "inner") == [content]
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_that_is_not_finished_leaves_the_old_one_and_nothing_beside_it(tmp_path, error):
    place = tmp_path / "adapter"
    with new_folder(place) as temporary:
        (temporary / "old").write_text("old")

    def stop():
        with new_folder(place) as temporary:
            (temporary / "new").write_text("new")
            raise error

    with pytest.raises(error):
        stop()
    assert os.listdir(tmp_path) == ["adapter"]
    assert os.listdir(place) == ["old"]


@pytest.mark.parametrize("at", ["write", "flush"])
def test_a_full_disk_leaves_the_old_folder_and_nothing_beside_it(tmp_path, at):
    place = tmp_path / "adapter"
    with new_folder(place) as temporary:
        (temporary / "old").write_text("old")
    with full_disk(at), pytest.raises(OSError, match=NO_ROOM), new_folder(place) as temporary:
        (temporary / "new").write_text("new" * 10_000 if at == "write" else "new")
    assert os.listdir(tmp_path) == ["adapter"]
    assert os.listdir(place) == ["old"]


def test_a_folder_that_a_killed_process_left_half_is_cleared_first(tmp_path):
    (tmp_path / "adapter.partial").mkdir()
    (tmp_path / "adapter.partial" / "stale").write_text("stale")
    with new_folder(tmp_path / "adapter") as temporary:
        (temporary / "new").write_text("new")
    assert os.listdir(tmp_path / "adapter") == ["new"]


def test_the_hash_of_a_file_is_what_sha256sum_prints(tmp_path):
    (tmp_path / "a").write_bytes(b"content" * 300_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"content" * 300_000).hexdigest()


def test_the_hash_of_a_folder_knows_names_places_and_contents_and_not_the_folders_own_name(tmp_path):
    def folder(name, files):
        for path, content in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(content)
        return sha256(tmp_path / name)

    whole = folder("one", {"a": b"bc", "d/e": b"f"})
    assert whole == folder("two", {"d/e": b"f", "a": b"bc"})
    others = [{"a": b"bd", "d/e": b"f"}, {"ab": b"c", "d/e": b"f"}, {"a": b"bc", "e": b"f"}, {"a": b"bcd/ef"}, {"a": b"bc"}]
    assert len({whole, *(folder(f"other {n}", files) for n, files in enumerate(others))}) == 6


# One process at a time

HOLD = """
import sys
from pathlib import Path
from umbel.record import locked
with locked(Path(sys.argv[1])):
    print("holding", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder `tmp_path / "job"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "job")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "holding\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_folder_that_another_process_holds_is_refused_until_that_process_is_killed(tmp_path, holder):
    with pytest.raises(RecordError, match="is in use by another umbel process"), locked(tmp_path / "job"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path / "job"):
        pass


def test_a_folder_is_free_again_after_the_block_however_it_ends(tmp_path):
    with pytest.raises(ValueError), locked(tmp_path / "new" / "job"):
        raise ValueError
    with locked(tmp_path / "new" / "job"):
        pass


# run.json


def test_a_resumed_run_keeps_when_it_started_and_the_configuration_is_written_beside_it(tmp_path, monkeypatch):
    own = Record(tmp_path / "run")
    assert own.info == {}
    monkeypatch.setattr(record, "now", lambda: "2026-01-01T00:00:00+00:00")
    own.start({"rounds": 3}, {"label": "fedit", "state": "new"})
    own.update(state="failed", error="it broke", finished="2026-01-02T00:00:00+00:00")
    assert own.info["error"] == "it broke"
    monkeypatch.setattr(record, "now", lambda: "2026-01-03T00:00:00+00:00")
    own.start({"rounds": 3}, {"label": "fedit"})
    assert own.info == {
        "label": "fedit",
        "state": "running",
        "started": "2026-01-01T00:00:00+00:00",
        "finished": None,
        "error": None,
    }
    assert (tmp_path / "run" / "run.toml").read_text() == "rounds = 3\n"


# Rounds


def line(number):
    return {"round": number, "phase": "train", "refused": [{"client": 1, "reason": "Größe"}]}


def committed(folder, rounds):
    own = Record(folder)
    for number in range(rounds):
        own.commit({"round": number}, {"held/q|A": torch.full((2, 3), float(number))}, line(number))
    return own


def lines_on_disk(folder):
    return [json.loads(text) for text in (folder / "rounds.jsonl").read_bytes().splitlines()]


def test_what_was_committed_last_is_restored(tmp_path):
    committed(tmp_path, 3)
    header, tensors, last = Record(tmp_path).restore()
    assert header == {"round": 2}
    assert torch.equal(tensors["held/q|A"], torch.full((2, 3), 2.0))
    assert last == line(2)
    assert lines_on_disk(tmp_path) == [line(0), line(1), line(2)]


def test_a_record_without_a_checkpoint_begins_anew(tmp_path):
    assert Record(tmp_path).restore() is None
    (tmp_path / "rounds.jsonl").write_text(json.dumps(line(0)) + "\n")
    assert Record(tmp_path).restore() is None
    assert not (tmp_path / "rounds.jsonl").exists()


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    own = committed(tmp_path, 2)
    with (tmp_path / "rounds.jsonl").open("ab") as file:
        file.write(b'{"round": 2, "pha')
    assert own.lines() == [line(0), line(1)]
    assert Record(tmp_path / "new").lines() == []


LENGTH = len(json.dumps(line(2), ensure_ascii=False).encode()) + 1


@pytest.mark.parametrize("cut", [1, 2, *range(3, LENGTH, 8), LENGTH])
def test_a_last_line_torn_anywhere_or_missing_is_written_again(tmp_path, cut):
    own = committed(tmp_path, 3)
    path = tmp_path / "rounds.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    own.restore()
    assert lines_on_disk(tmp_path) == [line(0), line(1), line(2)]
    assert path.read_bytes().endswith(b"}\n")
    own.commit({"round": 3}, {}, line(3))
    assert lines_on_disk(tmp_path) == [line(0), line(1), line(2), line(3)]


@pytest.mark.parametrize("beyond", [json.dumps(line(3)) + "\n", json.dumps(line(2)) + "\n", '{"round": 3', "\0\0\0\0", "\n\n"])
def test_lines_beyond_the_checkpoint_are_dropped(tmp_path, beyond):
    own = committed(tmp_path, 3)
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write(beyond)
    own.restore()
    assert lines_on_disk(tmp_path) == [line(0), line(1), line(2)]


@FULL
def test_a_full_disk_at_the_checkpoint_leaves_the_round_before(tmp_path, at):
    own = committed(tmp_path, 2)
    with full_disk(at), pytest.raises(OSError, match=NO_ROOM):
        own.commit({"round": 2}, {}, line(2))
    assert own.restore()[2] == line(1)
    assert lines_on_disk(tmp_path) == [line(0), line(1)]


def test_a_full_disk_at_the_line_loses_neither_the_round_nor_its_line(tmp_path, monkeypatch):
    own, calls, fsync = committed(tmp_path, 2), [], os.fsync

    def fail_third(descriptor):  # the checkpoint takes two: its file and the folder
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_third)
    with pytest.raises(OSError, match="No space left"):
        own.commit({"round": 2}, {}, line(2))
    monkeypatch.undo()
    assert own.restore()[2] == line(2)
    assert lines_on_disk(tmp_path) == [line(0), line(1), line(2)]


def test_a_damaged_checkpoint_is_named(tmp_path):
    own = committed(tmp_path, 2)
    (tmp_path / CHECKPOINT).write_bytes((tmp_path / CHECKPOINT).read_bytes()[:-5])
    with pytest.raises(RecordError, match=CHECKPOINT):
        own.restore()
