"""Masked sums over TLS and node keys: the bits of one process, and a site whose power goes in each message of a round."""

import contextlib
import json
import os
import signal
import time

import pytest
from test_over_tls import adapter, process_of, steady

from test_deployment import family, until

pytestmark = [pytest.mark.network, pytest.mark.timeout(900)]

VICTIM = "hospital-b"
ROUND = 2


@pytest.fixture
def masked(table):
    return {**table, "privacy": {"secure_aggregation": True}}


def stage(network, site: str, run: str) -> tuple[int, str]:
    """How far a site is in the exchanges of a run: (round, "keys", "shares", "sent" or "opened")."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        job = json.loads((network.folder / run / "job.json").read_text())["id"]
        for path in (network.kit / site / "state" / job).glob("*/*/exchange.json"):
            state = json.loads(path.read_text())
            return state["round"], "opened" if "answer" in state else state["stage"]
    return 0, ""


def test_masked_runs_have_the_bits_of_one_process(network, masked):
    masked["method"] = [{"name": "fedit"}, {"name": "fedsa_lora"}, {"name": "fed_sb", "lora": {"r": 6, "lora_alpha": 6}}]
    network.local("masked-here", masked)
    run = network.run("masked-there", masked)
    assert run.process.wait(800) == 0, run.said
    for method in masked["method"]:
        name = method["name"]
        assert adapter(network.folder / "masked-here" / name) == adapter(network.folder / "masked-there" / name) != {}
        lines = network.lines(f"masked-there/{name}")
        assert [line["answered"] for line in lines] == [[0, 1, 2]] * len(lines)
        assert all(line["sum"]["clients"] == 3 and line["rows"] == {} for line in lines[1:])


@pytest.mark.parametrize("message", ["keys", "shares", "upload", "unmask"])
def test_a_site_killed_in_a_message_of_the_exchange_ends_no_round_and_takes_part_again(network, masked, message):
    name = f"killed-in-{message}"
    run = network.run(name, steady(masked, 5, 150))

    def reaches(site: str, wanted: str) -> None:
        until(lambda: stage(network, site, name) == (ROUND, wanted), 300, lambda: run.said)

    slow = None
    if message == "keys":
        until(lambda: len(network.lines(name)) >= ROUND, 300, lambda: run.said)
    elif message == "unmask":
        # Its upload has come to the server, which waits for another one.
        reaches("lab-c", "shares")
        slow = process_of(network.sites["lab-c"], "umbel.client.worker")
        time.sleep(0.5)
        os.kill(slow, signal.SIGSTOP)
        reaches(VICTIM, "sent")
        time.sleep(8)
    else:
        reaches(VICTIM, {"shares": "keys", "upload": "shares"}[message])
    for pid in [network.sites[VICTIM].process.pid, *family(network.sites[VICTIM].process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if slow is not None:
        os.kill(slow, signal.SIGCONT)
    until(lambda: len(network.lines(name)) > ROUND, 400, lambda: run.said)
    network.start_site(VICTIM)
    assert run.process.wait(800) == 0, run.said
    lines = network.lines(name)
    assert {refused["client"] for line in lines for refused in line["refused"]} == {1}
    assert [refused["client"] for refused in lines[ROUND]["refused"]] == [1]
    assert lines[ROUND]["answered"] == ([0, 1, 2] if message == "unmask" else [0, 2])
    assert lines[ROUND]["sum"]["clients"] == len(lines[ROUND]["answered"])
    assert lines[-1]["answered"] == [0, 1, 2], [line["refused"] for line in lines]
    assert adapter(network.folder / name) != {}
