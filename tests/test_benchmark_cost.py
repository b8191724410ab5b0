"""The benchmark of what a federation costs runs at small sizes, what it reports holds, and its page is made of it."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "network"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def measured(folder, *parts):
    options = [word for part in parts for word in ("--part", part)]
    command = [sys.executable, str(FOLDER / "cost.py"), "--quick", "--out", str(folder / "cost.json"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "cost.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    pytest.importorskip("ray", reason="Flower's simulation is not installed")
    folder = tmp_path_factory.mktemp("results")
    measured(folder, "memory")
    return measured(folder, "simulated", "flower")


def test_the_tables_of_the_page_are_those_of_the_result_file():
    text = (ROOT / "docs" / "network-cost.md").read_text(encoding="utf-8")
    assert text.count("<!-- table:") == len(load("cost_pages").KINDS) == 8
    assert load("cost_pages").rendered(text) == text, "run python benchmarks/network/cost_pages.py"
    assert "Not measured yet" not in text


@pytest.mark.network
def test_a_part_that_is_measured_later_leaves_the_others(results):
    assert list(results) == ["memory", "simulated", "flower"]
    assert all(part["provenance"]["versions"]["flwr"] for part in results.values())


@pytest.mark.network
def test_memory_is_measured_for_methods_of_both_kinds_and_uploads_are_as_large_as_their_factors(results):
    cases = results["memory"]["cases"]
    assert [(case["method"], case["error"], case["clients"]) for case in cases] == [
        (method, error, clients) for method in ("fedit", "florist") for error in (False, True) for clients in (5, 10)
    ]
    for case in cases:
        factors = 4 * case["layers"] * 2 * case["rank"] * case["size"]
        assert factors < case["upload"] < 1.1 * factors
        assert case["uploads"] >= 0.99 * case["clients"] * case["upload"]
        assert case["grown"] > 0


@pytest.mark.network
def test_both_engines_are_timed_over_the_same_rounds_with_the_same_losses(results):
    local, ray = results["simulated"]["cases"]
    assert (local["engine"], ray["engine"]) == ("local", "ray")
    assert local["loss"] == ray["loss"]
    for case in (local, ray):
        assert len(case["rounds"]) == 2
        assert 0 < sum(case["rounds"]) < case["seconds"]


@pytest.mark.network
def test_flowers_pattern_does_the_work_that_umbel_does(results):
    (case,) = results["flower"]["cases"]
    (turn,) = case["turns"]
    for by in ("umbel", "flower"):
        assert len(turn[by]["rounds"]) == 2
        assert 0 < sum(turn[by]["rounds"]) < turn[by]["seconds"]
    # The heads are drawn apart, so the numbers differ; both begin at the loss of a guess among three and stay near it.
    assert turn["umbel"]["loss"] == pytest.approx(turn["flower"]["loss"], abs=0.1)


@pytest.mark.network
def test_the_page_can_be_made_of_the_results(results, tmp_path):
    (tmp_path / "cost.json").write_text(json.dumps(results), encoding="utf-8")
    text = (ROOT / "docs" / "network-cost.md").read_text(encoding="utf-8")
    page = load("cost_pages").rendered(text, tmp_path)
    assert page.count("Not measured yet") == 4  # of the part "sites", which is a real federation
    grown = load("cost_pages").words.size(results["memory"]["cases"][0]["grown"])
    assert f"| `fedit` | not | 5 | 33.5 kB | 167 kB | 41.9 kB | {grown} |" in page


def test_memory_and_work_of_a_process_below_are_found_and_those_of_an_old_one_of_one_run_are_not(tmp_path):
    deployed = load("deployed")
    waits = "import sys; held = b'1' * 200_000_000; print(len(held), flush=True); sys.stdin.read()"

    def started(word):
        # Its command line says what it is; the word is not looked at otherwise.
        command = [sys.executable, "-c", waits, word]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stdout.readline()
        return process

    with started("flwr-clientapp") as old:
        with deployed.Watch([os.getpid()]) as watch, started("umbel.client.worker") as new:
            end = time.monotonic() + 20
            # It may have been seen before it had its memory.
            while watch.peaks.get("worker", 0) < 200e6 and time.monotonic() < end:
                time.sleep(0.05)
            new.stdin.close()
        old.stdin.close()
    assert set(watch.peaks) == set(watch.cpu) == {"worker"}
    assert 200e6 < watch.peaks["worker"] < 300e6
    assert 0 < watch.cpu["worker"] < 60


@pytest.mark.network
def test_five_sites_and_an_echo_exchange_the_same_bytes(tmp_path):
    case = measured(tmp_path, "sites")["sites"]["cases"][0]
    (turn,) = case["turns"]
    assert len(turn["umbel"]["rounds"]) == len(turn["echo"]["rounds"]) == 2
    assert len(turn["sizes"]) == 3  # the opening, too
    assert turn["sizes"][-1][1] > 4 * 4 * 2 * 32
    assert {"ServerApp", "SuperLink", "SuperNode", "worker", "ClientApp"} <= set(turn["umbel"]["memory"])
    assert turn["echo"]["memory"]["ServerApp"] < turn["umbel"]["memory"]["ServerApp"]
