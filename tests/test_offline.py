"""Runs by carried files: the bits of a local run, what is refused and why, and kills in mid-work."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

import tiny
from umbel import envelope, kit, offline, wire
from umbel import run as running
from umbel.asking import MOST_OPENING_BYTES
from umbel.cli import app
from umbel.config import ConfigError
from umbel.engine import Waiting
from umbel.envelope import EnvelopeError
from umbel.record import RecordError
from umbel.server import ServerError

SITES = ["hospital-a", "hospital-b", "lab-c"]
METHODS = [{"name": "fedit"}, {"name": "fedsa_lora"}]


class Federation:
    """A kit, a run in `folder`, and somebody who carries."""

    def __init__(self, place: Path, table: dict[str, Any], own: dict[str, Path] | None = None) -> None:
        kit.init(place / "kit", "fed.example.org", SITES)
        for name in SITES:
            kit.update_site(place / "kit" / name, data=str(own[name]) if own else "run")
        self.place, self.kit, self.server, self.folder = place, place / "kit", place / "kit" / "server", place / "run"
        self.table = table

    def begin(self) -> list[dict[str, Any]]:
        with pytest.raises(Waiting) as waiting:
            offline.begin(self.table, self.folder, self.server)
        return waiting.value.asked

    def go_on(self) -> list[dict[str, Any]]:
        """Goes on; returns what is waited for, nothing where all is done."""
        try:
            offline.go_on(self.folder)
        except Waiting as waiting:
            return waiting.asked
        return []

    def answered(self, asked: dict[str, Any]) -> Path:
        """Has a site answer a request; returns the reply."""
        out = self.place / "stick" / asked["site"] / Path(asked["request"]).name
        offline.answer(self.kit / asked["site"], self.folder / asked["request"], out)
        return out

    def bring(self, asked: list[dict[str, Any]]) -> None:
        files = [self.answered(own) for own in asked if own["state"] == "missing"]
        states = [(own.state, own.reason) for own in offline.take(self.folder, self.server, files)]
        assert states == [("taken", "")] * len(files)

    def take(self, *files: Path) -> list[tuple[str, str]]:
        return [(own.state, own.reason) for own in offline.take(self.folder, self.server, list(files))]

    def finish(self, asked: list[dict[str, Any]]) -> int:
        """Carries until nobody is waited for; returns the number of trips."""
        trips = 0
        while asked:
            self.bring(asked)
            asked, trips = self.go_on(), trips + 1
        return trips


def adapters(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("*/adapter/*.safetensors"))}


def test_carried_files_give_the_bits_of_a_local_run_for_all_methods_of_a_job(tmp_path):
    table = tiny.table(tmp_path, METHODS)
    running.run(table, tmp_path / "local", baselines=False)
    federation = Federation(tmp_path, table)
    asked = federation.begin()
    assert [own["run"] for own in asked] == ["fedit"] * 3 + ["fedsa_lora"] * 3  # one trip serves both
    trips = federation.finish(asked)
    assert trips == 4  # opening, two rounds, and FedSA-LoRA's last gathering
    assert adapters(federation.folder) == adapters(tmp_path / "local")
    assert len(adapters(federation.folder)) == 4  # factors and head of two methods
    assert not (federation.folder / "outbox").exists()
    assert offline.waiting(federation.folder) == []


def test_masked_sums_by_carried_files_have_the_bits_of_a_local_run_and_take_four_trips_a_round(tmp_path):
    table = tiny.table(tmp_path, METHODS, privacy={"secure_aggregation": True})
    running.run(table, tmp_path / "local", baselines=False)
    federation = Federation(tmp_path, table)
    assert federation.finish(federation.begin()) == 1 + 4 * 3  # opening, two rounds, and FedSA-LoRA's last gathering
    assert adapters(federation.folder) == adapters(tmp_path / "local")
    assert len(adapters(federation.folder)) == 4


def test_two_exchanges_of_a_round_are_two_trips_and_the_bits_of_a_local_run(tmp_path):
    table = tiny.table(tmp_path, [{"name": "power"}])
    running.run(table, tmp_path / "local", baselines=False)
    federation = Federation(tmp_path, table)
    assert federation.finish(federation.begin()) == 5  # opening, two rounds of two
    ours, theirs = ((folder / "adapter" / "adapter_model.safetensors") for folder in (tmp_path / "local", federation.folder))
    assert ours.read_bytes() == theirs.read_bytes()


def test_rows_that_only_their_sites_have_give_the_bits_of_a_local_run_over_the_same_files(tmp_path):
    files = {}
    for seed, name in enumerate(SITES):
        for part, rows in (("train", 25 + 5 * seed), ("test", 12)):
            files[name, part] = tmp_path / f"{name}-{part}.jsonl"
            lines = [json.dumps(row) for row in tiny.texts(rows, 10 * seed + (part == "test"))]
            files[name, part].write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = tiny.table(tmp_path, data={"labels": sorted(tiny.TOPICS)})
    here = {"train": [str(files[name, "train"]) for name in SITES], "test": [str(files[name, "test"]) for name in SITES]}
    running.run({**table, "data": table["data"] | here, "split": {"kind": "files"}}, tmp_path / "local", baselines=False)

    away = {"train": "nowhere.jsonl", "test": ""}
    own = {name: files[name, "train"] for name in SITES}
    federation = Federation(tmp_path, {**table, "data": table["data"] | away, "split": {"kind": "files"}}, own)
    for name in SITES:
        kit.update_site(federation.kit / name, test=str(files[name, "test"]))
    assert federation.finish(federation.begin()) == 4  # opening, two rounds, and the sites' scores of the result
    last = json.loads((federation.folder / "rounds.jsonl").read_text().splitlines()[-1])
    assert last["global"]["rows"] == 36
    assert (federation.folder / "adapter" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "local" / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    # No row of a site is in what came back or in what the server keeps.
    words = files["lab-c", "train"].read_text().splitlines()[0].encode()
    assert not [path for path in federation.folder.rglob("*") if path.is_file() and words in path.read_bytes()]


@pytest.fixture
def begun(tmp_path):
    federation = Federation(tmp_path, tiny.table(tmp_path))
    return federation, federation.begin()


def test_a_run_that_waits_says_for_whom_and_asking_again_changes_nothing(begun):
    federation, asked = begun
    info = json.loads((federation.folder / "run.json").read_text())
    assert (info["state"], info["error"]) == ("waiting", None)
    assert [(own["site"], own["state"], own["round"], own["kind"]) for own in info["waiting"]] == [
        (name, "missing", 0, "open") for name in SITES
    ]
    files = {path: path.read_bytes() for path in (federation.folder / "outbox").rglob("*.umbel")}
    assert len(files) == 3
    federation.bring(asked[:1])
    again = federation.go_on()
    assert [own["state"] for own in again] == ["here", "missing", "missing"]
    assert {path: path.read_bytes() for path in (federation.folder / "outbox").rglob("*.umbel")} == files
    assert offline.waiting(federation.folder) == again


def test_the_same_request_gets_the_same_reply_and_the_next_round_goes_on_from_the_sites_files(begun):
    federation, asked = begun
    federation.bring(asked)
    asked = federation.go_on()
    first = federation.answered(asked[0]).read_bytes()
    assert federation.answered(asked[0]).read_bytes() == first
    state = federation.kit / "hospital-a" / "state"
    assert [path.name for path in state.rglob("*.safetensors")] == ["0.safetensors"]
    # With the kept reply gone it trains anew, from the same state, to the same adapter.
    next(state.rglob("reply.umbel")).unlink()
    anew = payload(federation, "hospital-a", federation.answered(asked[0]))
    assert tensors(anew) == tensors(payload(federation, "hospital-a", write(federation.place / "first", first)))


def test_an_old_request_is_refused_by_its_site_so_that_no_state_is_lost(begun):
    federation, opening = begun
    old = federation.place / "old.umbel"
    shutil.copy(federation.folder / opening[0]["request"], old)
    federation.bring(opening)
    federation.bring(federation.go_on())
    with pytest.raises(EnvelopeError, match="of round 0, this site has answered round 1 of this run; bring the newest one"):
        offline.answer(federation.kit / "hospital-a", old, federation.place / "reply.umbel")
    assert not (federation.place / "reply.umbel").exists()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def payload(federation: Federation, site: str, reply: Path) -> bytes:
    return envelope.read(envelope.look(reply, offline.own_public(federation.kit / site)), 2**30)


def tensors(data: bytes) -> dict[str, bytes]:
    return {name: x.numpy().tobytes() for name, x in wire.decode(data).tensors.items()}


def signed(federation: Federation, site: str, reply: Path, body: bytes | None = None, **changes: Any) -> Path:
    """Returns a reply that a site which means harm signs with its own key, a good one but for the changes."""
    good = envelope.look(reply, offline.own_public(federation.kit / site))
    body = payload(federation, site, reply) if body is None else body
    head = replace(good.head, **{"length": len(body), "sha256": sha256(body).hexdigest(), **changes})
    path = reply.with_name("changed.umbel")
    envelope.write(path, head, body, kit.read_private_key(federation.kit / site / "site.key"))
    return path


def test_every_reply_that_is_not_to_what_was_asked_is_refused_with_both_values(begun):
    federation, asked = begun
    reply = federation.answered(asked[0])
    run = json.loads((federation.folder / "job.json").read_text())["id"]
    other = "0" * 16

    def refused(**changes: Any) -> str:
        ((state, reason),) = federation.take(signed(federation, "hospital-a", reply, **changes))
        assert state == "refused"
        return reason

    assert refused(run=other, reply_to="1" * 64) == f"of run {other}, this is run {run}"
    assert refused(run=other) == f"its run is '{other}', asked was '{run}'"
    assert refused(round=1, kind="train", reply_to="1" * 64) == (
        "for round 1 (train) of 'fedit', asked now is round 0 (open) of 'fedit'"
    )
    assert refused(round=3) == "its round is 3, asked was 0"
    assert refused(member="flora", reply_to="1" * 64).startswith(
        "for round 0 (open) of 'flora', asked now is round 0 (open) of"
    )
    assert re.fullmatch(r"to request 1{16}…, asked now is [0-9a-f]{16}… \(.*open.umbel\)", refused(reply_to="1" * 64))
    assert refused(sender="lab-c") == "its sender is 'lab-c', asked was 'hospital-a'"
    assert refused(to="lab-c") == "its to is 'lab-c', asked was 'server'"
    assert refused(kind="train") == "its kind is 'train', asked was 'open'"
    assert refused(reply_to="", sender="server") == "a request, expected: a reply, which `umbel site export` makes"
    assert refused(member="../../x").startswith("its head says member = '../../x', expected: ")
    assert refused(run="../x").startswith("its head says run = '../x', expected: ")
    assert refused(round=-1).startswith("its head says round = -1, expected: int")
    assert refused(length=7).startswith("longer than it may be; its payload has ")
    assert refused(sha256="0" * 64).startswith("damaged; the payload's sha256 is ")
    # Somebody else's reply, under one's own name and key, is to a request that one was not sent.
    theirs = envelope.look(federation.answered(asked[1]), offline.own_public(federation.kit / "hospital-b"))
    assert refused(reply_to=theirs.head.reply_to).startswith("to request ")
    # Nothing of all that was kept, and the good reply still counts.
    assert not list((federation.folder / "inbox").rglob("*.umbel"))
    assert federation.take(reply) == [("taken", "")]


def test_a_reply_counts_once_and_the_first_one_counts(begun):
    federation, asked = begun
    reply = federation.answered(asked[0])
    assert federation.take(reply, reply) == [("taken", ""), ("here already", "")]
    ((state, reason),) = federation.take(signed(federation, "hospital-a", reply, b"x" * 10))
    assert state == "refused"
    assert reason.startswith("another reply to a request that is answered; imported was sha256 ")
    federation.bring(asked[1:])
    federation.go_on()
    ((state, reason),) = federation.take(reply)
    assert (state, reason) == ("refused", "for round 0 (open) of 'fedit', asked now is round 1 (train) of 'fedit'")


def test_who_is_not_of_the_federation_or_is_revoked_or_has_a_new_key_is_refused(begun, tmp_path):
    federation, asked = begun
    replies = [federation.answered(own) for own in asked]
    stranger = kit.init(tmp_path / "other", "fed.example.org", SITES)
    shutil.copy(tmp_path / "other" / "hospital-a" / "site.key", federation.kit / "hospital-a" / "site.key")
    ((state, reason),) = federation.take(federation.answered(asked[0]))
    assert state == "refused"
    assert reason.startswith(f"signed with the key {stranger.site('hospital-a').fingerprint}, accepted: SHA256:")
    kit.revoke(federation.kit, "hospital-b")
    assert federation.take(replies[1]) == [("refused", "signed by site 'hospital-b', which is revoked")]
    old = kit.read(federation.server).site("lab-c").fingerprint
    kit.rotate(federation.kit, "lab-c")
    ((state, reason),) = federation.take(replies[2])
    assert reason.startswith(f"signed with the key {old}, accepted: ")
    with pytest.raises(kit.KitError, match="is not the kit of"):
        offline.take(federation.folder, tmp_path / "other" / "server", [replies[0]])


def test_a_site_refuses_what_is_not_from_its_server_or_not_for_it(begun, tmp_path):
    federation, asked = begun
    mine, out = federation.kit / "hospital-a", tmp_path / "reply"
    with pytest.raises(EnvelopeError, match="for site 'hospital-b', this is 'hospital-a'"):
        offline.answer(mine, federation.folder / asked[1]["request"], out)
    with pytest.raises(EnvelopeError, match=r"signed with the key SHA256:.*, accepted: SHA256:"):
        offline.answer(mine, federation.answered(asked[1]), out)
    request = federation.folder / asked[0]["request"]
    with pytest.raises(EnvelopeError, match="is the request itself"):
        offline.answer(mine, request, request)
    kit.update_site(mine, data="")
    with pytest.raises(ConfigError, match="data is not set; give --data FILE"):
        offline.answer(mine, request, out)
    assert not out.exists()


def test_a_reply_larger_than_asked_for_is_refused_before_it_is_copied(begun):
    federation, asked = begun
    reply = federation.answered(asked[0])
    huge = reply.with_name("huge.umbel")
    good = envelope.look(reply, offline.own_public(federation.kit / "hospital-a"))
    key = kit.read_private_key(federation.kit / "hospital-a" / "site.key")
    envelope.write(huge, replace(good.head, length=2**41), b"", key)
    with huge.open("r+b") as file:
        file.truncate(huge.stat().st_size + 2**41)  # 2 TiB without a block of it on the disk
    assert federation.take(huge) == [("refused", f"its payload has {2**41} bytes, allowed: {MOST_OPENING_BYTES}")]
    assert not list((federation.folder / "inbox").rglob("*"))


def test_a_closed_round_goes_on_without_the_missing_who_catch_up_later(begun):
    federation, asked = begun
    federation.bring(asked)
    first = federation.go_on()
    federation.bring(first[:2])
    late = federation.answered(first[2])
    assert offline.close(federation.folder) == ["lab-c"]
    second = federation.go_on()
    assert [(own["round"], own["state"]) for own in second] == [(2, "missing")] * 3
    line = json.loads((federation.folder / "rounds.jsonl").read_text().splitlines()[-1])
    assert line["answered"] == [0, 1]
    assert line["refused"] == [{"client": 2, "reason": "brought no reply: closed without it"}]
    ((state, reason),) = federation.take(late)
    assert (state, reason) == ("refused", "for round 1 (train) of 'fedit', asked now is round 2 (train) of 'fedit'")
    assert federation.finish(second) == 1
    assert json.loads((federation.folder / "run.json").read_text())["state"] == "done"


def test_a_round_closed_below_its_quorum_stops_and_a_reply_brought_later_mends_it(begun):
    federation, asked = begun
    federation.bring(asked[:1])
    assert offline.close(federation.folder) == ["hospital-b", "lab-c"]
    with pytest.raises(
        ServerError, match=r"1 client is left of 3, wanted: 2 .*clients 1, 2: brought no reply: closed without it"
    ):
        offline.go_on(federation.folder)
    assert federation.take(federation.answered({**asked[1], "request": asked[1]["request"].replace(".umbel", ".closed")})) == [
        ("taken", "")
    ]
    asked = federation.go_on()
    assert [(own["site"], own["round"], own["kind"], own["state"]) for own in asked] == [
        ("hospital-a", 1, "train", "missing"),
        ("hospital-b", 1, "train", "missing"),
        ("lab-c", 1, "open", "may join"),
    ]
    # Whoever was not there at the opening joins in mid-run, with its answer to a later one; closing does not shut it out.
    federation.bring(asked[:1])
    assert federation.take(federation.answered(asked[2])) == [("taken", "")]
    assert offline.close(federation.folder) == ["hospital-b"]
    asked = federation.go_on()
    assert [(own["site"], own["round"], own["state"]) for own in asked] == [
        ("hospital-a", 1, "here"),
        ("hospital-b", 1, "closed without it"),
        ("lab-c", 1, "missing"),
    ]
    federation.finish(asked)
    lines = [json.loads(line) for line in (federation.folder / "rounds.jsonl").read_text().splitlines()]
    assert [line["answered"] for line in lines] == [[0, 1], [0, 2], [0, 1, 2]]


def test_a_site_whose_files_are_gone_is_asked_again_and_the_run_ends_with_the_same_bits(begun, tmp_path):
    federation, asked = begun
    running.run(federation.table, tmp_path / "local", baselines=False)
    federation.bring(asked)
    federation.bring(federation.go_on())
    asked = federation.go_on()
    for path in (federation.kit / "lab-c" / "state").rglob("*.safetensors"):
        path.unlink()
    federation.bring(asked)
    again = federation.go_on()
    assert [(own["site"], own["state"]) for own in again] == [("lab-c", "missing")]
    federation.finish(again)
    name = "adapter/adapter_model.safetensors"
    assert (federation.folder / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


def test_a_revoked_site_is_not_waited_for(begun):
    federation, asked = begun
    federation.bring(asked)
    federation.go_on()
    kit.revoke(federation.kit, "lab-c")
    asked = federation.go_on()
    assert [(own["site"], own["state"]) for own in asked][2] == ("lab-c", "site 'lab-c' is revoked")
    assert federation.finish(asked) == 2


def test_a_reply_that_is_damaged_in_the_inbox_is_waited_for_again(begun):
    federation, asked = begun
    federation.bring(asked)
    kept = federation.folder / "inbox" / "lab-c" / Path(asked[2]["request"]).name
    data = kept.read_bytes()
    kept.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(Waiting) as waiting:
        offline.go_on(federation.folder)
    assert waiting.value.asked[-1]["site"] == "lab-c"
    assert "damaged" in waiting.value.asked[-1]["reason"]
    kept.unlink()
    assert federation.take(federation.answered(asked[2])) == [("taken", "")]
    assert federation.go_on()[0]["round"] == 1


def test_no_private_key_and_no_row_is_in_any_file_that_travels(begun):
    federation, asked = begun
    federation.bring(asked)
    for own in federation.go_on():
        federation.answered(own)
    travelled = [path for place in ("run/outbox", "stick") for path in (federation.place / place).rglob("*.umbel")]
    assert len(travelled) == 9
    secrets = [path.read_bytes().splitlines()[2] for path in federation.kit.rglob("*.key")]
    secrets += [json.loads(line)["text"].encode() for line in (federation.place / "train.jsonl").read_text().splitlines()]
    for path in travelled:
        assert not [secret for secret in secrets if secret in path.read_bytes()]


def test_a_folder_without_such_a_run_is_refused(tmp_path):
    kit.init(tmp_path / "kit", "fed.example.org", SITES)
    with pytest.raises(RecordError, match="holds no run that began with --engine files"):
        offline.take(tmp_path, tmp_path / "kit" / "server", [])


# The command line, and kills


def umbel(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def killed_when(seen: Path, *arguments: object) -> bool:
    """Runs a command and kills it with signal 9 as soon as a file is there; True where it was killed before it ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "umbel.cli", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 60
    while process.poll() is None and not seen.exists() and time.monotonic() < until:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def test_commands_carry_a_run_to_its_end_through_kills_with_the_bytes_of_an_undisturbed_one(tmp_path):
    table = tiny.table(tmp_path, rounds=1)
    running.run(table, tmp_path / "local", baselines=False)
    federation = Federation(tmp_path, table)
    config, run, server = tmp_path / "job.toml", federation.folder, federation.server
    config.write_text(tomli_w.dumps(table), encoding="utf-8")
    done = umbel("run", config, "--engine", "files", "--federation", server, "--out", run)
    assert done.exit_code == 0, done.output
    assert "hospital-a  missing  0 fedit  " in done.stdout
    asked = offline.waiting(run)
    replies = [federation.answered(own) for own in asked]

    # Killed while it imports: as soon as the first reply is in the inbox.
    inbox = run / "inbox" / "hospital-a" / Path(asked[0]["request"]).name
    assert killed_when(inbox, "server", "import", server, run, *replies)
    taken = umbel("server", "import", server, run, *replies)
    assert taken.exit_code == 0, taken.output
    assert f"{replies[0]}: here already from hospital-a" in taken.stderr
    asked = offline.waiting(run)
    assert [(own["round"], own["state"]) for own in asked] == [(1, "missing")] * 3

    # Killed while it answers: as soon as the trained state is durable.
    request, reply = run / asked[0]["request"], tmp_path / "reply.umbel"
    folder = federation.kit / "hospital-a"
    identity = json.loads((run / "job.json").read_text())["id"]
    state = folder / "state" / identity / "fedit" / "0" / "0.safetensors"
    assert killed_when(state, "site", "export", folder, request, "--out", reply)
    made = umbel("site", "export", folder, request, "--out", reply)
    assert made.exit_code == 0, made.output
    assert "round 1 (train) of fedit" in made.stdout

    rest = [federation.answered(own) for own in asked[1:]]
    told = umbel("server", "import", server, run, reply, rest[0], write(tmp_path / "noise", b"PK\x03\x04 not ours"))
    assert told.exit_code == 2
    assert "noise: refused: no file of umbel's (it begins with b'PK" in told.stderr
    assert "lab-c       missing" in umbel("status", run).stdout
    done = umbel("server", "import", server, run, rest[1], "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["state"] == "done"
    assert told["files"] == [{"file": str(rest[1]), "site": "lab-c", "state": "taken", "reason": ""}]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run / "adapter" / name).read_bytes() == (tmp_path / "local" / "adapter" / name).read_bytes()
    assert umbel("run", "--resume", run).exit_code == 0


def test_resume_with_close_goes_on_without_the_missing_and_close_is_for_such_runs_alone(begun):
    federation, asked = begun
    federation.bring(asked[:2])
    told = umbel("run", "--resume", federation.folder, "--close")
    assert told.exit_code == 0, told.output
    assert "goes on without lab-c" in told.stderr
    assert [(own["site"], own["state"]) for own in offline.waiting(federation.folder)] == [
        ("hospital-a", "missing"),
        ("hospital-b", "missing"),
        ("lab-c", "may join"),
    ]
    assert "lab-c       may join  1 fedit  " in told.stdout
    config = federation.place / "job.toml"
    config.write_text(tomli_w.dumps(federation.table), encoding="utf-8")
    for wrong, reason in (
        (["run", config, "--close"], "--close is for --resume of a run that began with --engine files"),
        (["run", config, "--engine", "files"], "--engine files needs --federation DIR"),
        (["server", "import", federation.server, federation.place], "holds no run that began with --engine files"),
    ):
        told = umbel(*wrong)
        assert told.exit_code == 2
        assert reason in told.stderr
