"""A job over TLS and node keys: the bits of one process, whoever is killed; and what a hostile site achieves."""

import json
import os
import signal
from pathlib import Path

import pytest

import tiny
from test_deployment import family, until

pytestmark = [pytest.mark.network, pytest.mark.timeout(900)]

METHODS = [
    *({"name": name} for name in ("fedit", "fedsa_lora", "power")),
    {"name": "fed_sb", "lora": {"r": 6, "lora_alpha": 6}},
]


def adapter(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("adapter/*.safetensors"))}


def process_of(started, words: str) -> int:
    """A process of those that a command started, by what its command line says."""
    for pid in family(started.process.pid):
        path = Path(f"/proc/{pid}/cmdline")
        if path.exists() and words in path.read_bytes().replace(b"\0", b" ").decode():
            return pid
    raise AssertionError(f"no process says {words!r}")


def steady(table: dict, rounds: int, steps: int) -> dict:
    """The same run, with rounds long enough to kill somebody in them."""
    return {**table, "rounds": rounds, "training": {**table["training"], "max_steps": steps}}


def test_a_job_of_several_methods_has_the_bits_of_one_process(network, table):
    table["method"] = METHODS
    network.local("here", table)
    run = network.run("there", table)
    assert run.process.wait(600) == 0, run.said
    for method in METHODS:
        name = method["name"]
        assert adapter(network.folder / "here" / name) == adapter(network.folder / "there" / name) != {}
        assert network.lines(f"there/{name}")[-1]["answered"] == [0, 1, 2]
    opening = network.lines("there/fedit")[0]
    assert opening["preflight"]["1"]["versions"]["umbel"]
    status = json.loads(network.umbel("status", "there", "--json"))
    assert status["members"]["fedit"]["state"] == "done"
    assert [site["status"] for site in status["sites"]] == ["online"] * 3
    assert "round 2 of 2" in network.umbel("log", "there")


def test_sites_with_files_of_their_own_have_the_bits_of_one_process_with_a_file_for_each(network, table):
    rows = tiny.texts(90, 5)
    files = []
    for k, name in enumerate(network.sites):
        file = network.folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[k::3]))
        files.append(str(file))
    table["data"] = {**table["data"], "train": files}
    table["split"] = {"kind": "files"}
    network.local("own-here", table)
    for name, file in zip(list(network.sites), files):
        network.start_site(name, "--data", file)
    table["data"]["train"] = "not-at-the-server.jsonl"
    table["split"] = {}
    try:
        run = network.run("own-there", {**table, "split": {"kind": "iid", "clients": 3}})
        assert run.process.wait(600) == 0, run.said
    finally:
        for name in list(network.sites):
            network.start_site(name)
    assert adapter(network.folder / "own-here") == adapter(network.folder / "own-there") != {}


def test_a_killed_site_ends_no_round_and_catches_up(network, table):
    table = steady(table, 5, 150)
    run = network.run("lost-site", table)
    until(lambda: len(network.lines("lost-site")) >= 2, 200, lambda: run.said)
    os.kill(process_of(network.sites["hospital-b"], "flower-supernode"), signal.SIGKILL)
    assert run.process.wait(600) == 0, run.said
    lines = network.lines("lost-site")
    left_out = [refused for line in lines for refused in line["refused"]]
    assert left_out
    assert {refused["client"] for refused in left_out} == {1}
    assert all(len(line["answered"]) >= 2 for line in lines)
    assert "Node Unavailable" in left_out[0]["reason"] or "not connected" in left_out[0]["reason"]
    assert lines[-1]["answered"] == [0, 1, 2], [line["refused"] for line in lines]


@pytest.mark.parametrize("victim", ["flower-superlink", "flwr-serverapp"])
def test_after_a_killed_server_resume_ends_with_the_bytes_of_an_undisturbed_run(network, table, victim):
    table = steady(table, 4, 150)
    if not (network.folder / "undisturbed").exists():
        network.local("undisturbed", table)
    name = f"killed-{victim}"
    run = network.run(name, table)
    until(lambda: len(network.lines(name)) >= 3, 300, lambda: run.said)
    os.kill(process_of(network.server, victim), signal.SIGKILL)
    assert run.process.wait(200) != 0
    assert "umbel run --resume" in run.said or "start" in run.said
    done = len(network.lines(name))
    assert done < 5
    if victim == "flower-superlink":
        assert network.server.process.wait(60) != 0
        network.start_server()
    network.start_sites()
    said = network.umbel("run", "--resume", name)
    assert "Adapter of fedit" in said
    assert adapter(network.folder / name) == adapter(network.folder / "undisturbed") != {}
    assert len(network.lines(name)) == 5


ATTACKS = {
    "old": "client 2 answered for round 1, asked was round 2",
    "truncated": "message",
    "pickle": "header",
    "oversized": "allowed: ",
    "nan": "NaN",
    "rank": "sent factors of rank",
    "huge": "median",
    "zero": "has not trained",
    "run": "answered for run",
    "client": "answered for client 0, asked was client 2",
    "rows": "says it has 1000000000 rows",
    "raises": "ValueError: could not convert string to float: …",
    "flower-empty": "holds no payload",
    "flower-other": "message",
    "flower-bomb": "allowed: ",
}
"""What a site with a valid key can try, a round each, from the second on; and what the record says of it."""


def test_whatever_a_site_with_a_key_sends_is_a_line_in_the_record_and_stops_no_round(network, table):
    folder = network.kit / "lab-c"
    names = list(ATTACKS)
    (folder / "attack.json").write_text(json.dumps({str(i + 2): name for i, name in enumerate(names)}))
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent / "hostile"), before.get("PYTHONPATH", "")])
    os.environ["HOSTILE_SITE"] = str(folder)
    try:
        network.start_site("lab-c")
        os.environ.clear()
        os.environ.update(before)
        run = network.run("hostile", {**table, "rounds": len(names) + 1})
        assert run.process.wait(900) == 0, run.said
    finally:
        os.environ.clear()
        os.environ.update(before)
        network.start_site("lab-c")
    lines = network.lines("hostile")[1:]
    assert lines[0]["answered"] == [0, 1, 2]
    for line, name in zip(lines[1:], names, strict=True):
        assert line["answered"] == [0, 1], (name, line["answered"])
        (refused,) = line["refused"]
        assert refused["client"] == 2
        assert ATTACKS[name] in refused["reason"], (name, refused["reason"])
        assert "Jane" not in refused["reason"]
    everything = network.umbel("log", "hostile")
    assert "Jane" not in everything
