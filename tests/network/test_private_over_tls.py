"""DP-SGD at sites over TLS: each site's own ledger pays once, whoever is killed, and refuses what the operator may not have."""

import json
import os
import signal

import pytest
from test_over_tls import process_of, steady

from test_deployment import until

pytestmark = [pytest.mark.network, pytest.mark.timeout(900)]

PRIVACY = {"unit": "example", "target_epsilon": 4.0, "target_delta": 0.01}


def ledger(network, site):
    (told,) = json.loads(network.umbel("privacy", str(network.kit / site), "--json"))
    return told


def test_a_site_pays_once_through_a_killed_server_and_refuses_another_run_on_its_rows(network, table):
    own = {**steady(table, 3, 40), "privacy": PRIVACY}
    run = network.run("private", own)
    until(lambda: len(network.lines("private")) >= 2, 300, lambda: run.said)
    os.kill(process_of(network.server, "flwr-serverapp"), signal.SIGKILL)
    assert run.process.wait(200) != 0
    network.start_sites()
    assert "Adapter of fedit" in network.umbel("run", "--resume", "private")
    lines = network.lines("private")
    assert len(lines) == 4
    assert all(line["loss"] == {} for line in lines)
    for number, site in enumerate(network.sites):
        (spent,) = ledger(network, site)["runs"]
        assert spent["rounds"] == 3
        assert 0.97 * 4 < spent["epsilon"] <= 4
        assert lines[-1]["epsilon"][str(number)] == pytest.approx(spent["epsilon"])
    again = network.run("again", {**own, "seed": 7, "privacy": {**PRIVACY, "target_epsilon": 1.0}})
    assert again.process.wait(300) != 0
    assert "all runs on these rows spent ε" in again.said
    assert "allowed 1" in again.said
    assert [len(ledger(network, site)["runs"]) for site in network.sites] == [1, 1, 1]


def test_a_site_with_a_budget_of_its_own_trains_nothing_unprotected(network, table):
    config = network.kit / "hospital-a" / "site.toml"
    before = config.read_text()
    config.write_text(
        before + "total_epsilon = 2.0\n"
        if "total_epsilon" not in before
        else before.replace("total_epsilon = 0.0", "total_epsilon = 2.0")
    )
    try:
        network.start_site("hospital-a")
        run = network.run("unprotected", table)
        assert run.process.wait(300) == 0, run.said
        lines = network.lines("unprotected")
        assert all(0 not in line["answered"] for line in lines)
        assert "answers only runs with privacy.unit = example" in lines[0]["refused"][0]["reason"]
    finally:
        config.write_text(before)
        network.start_site("hospital-a")
