"""The benchmark of merging runs at small shapes, what it reports holds, and its page can be made of it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "merge"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, str(FOLDER / "bench.py"), "--quick", "--repeats", "1", "--threads", "1"]
    subprocess.run([*command, "--results", str(folder)], check=True, capture_output=True, text=True)
    return folder


@pytest.fixture(scope="module")
def cases(results):
    return json.loads((results / "kernels.json").read_text(encoding="utf-8"))["cases"]


def rows(case):
    return {row["name"]: row for row in case["rows"]}


def test_exact_ways_are_exact_and_the_papers_route_finds_the_same_rank(cases):
    for case in cases:
        found = rows(case)
        assert found["florist τ 1"]["error"] < 2e-6
        assert found["florist τ 0.9"]["rank"] == found["two SVDs, τ 0.9"]["rank"]
        assert found["florist τ 0.9"]["error"] == pytest.approx(found["two SVDs, τ 0.9"]["error"], rel=1e-3)
        assert 0.05 < found["florist τ 0.9"]["error"] <= 0.1**0.5


def test_ways_to_the_best_pair_of_one_rank_agree(cases):
    for case in cases:
        found = rows(case)
        for name in {"FlexLoRA, dense", "PEFT svd"} & found.keys():
            assert found[name]["error"] == pytest.approx(found["best_rank"]["error"], rel=1e-4)


def test_adam_comes_close_to_flora_na_and_not_below_it(cases):
    for case in cases:
        found = rows(case)
        if "Adam, dense" in found:
            own, adam, fedit = (found[name]["error"] for name in ("flora_na", "Adam, dense", "fedit"))
            assert own <= adam * (1 + 1e-5)
            assert adam == pytest.approx(own, rel=1e-3)
            assert adam < fedit


def test_every_row_is_timed_and_says_beside_which_of_umbels_it_stands(cases):
    assert {case["clients"] for case in cases} == {5, 10, 60}
    for case in cases:
        assert all(row["seconds"] > 0 and row["beside"] in rows(case) for row in case["rows"])


def test_the_whole_command_is_timed_beside_reading_and_writing(results):
    told = json.loads((results / "commands.json").read_text(encoding="utf-8"))
    [case] = told["cases"]
    found = {(row["method"], row["checked"]): row for row in case["rows"]}
    assert found.keys() == {(method, checked) for method in ("florist τ 1", "fedit") for checked in (True, False)}
    for row in found.values():
        assert row["seconds"] > row["stages"]["total"] > 0
        assert row["peak_bytes"] > case["start"]["peak_bytes"] / 2
        assert row["write_seconds"] > 0
    assert found["florist τ 1", True]["error_worst"] < 2e-6 < found["fedit", True]["error_worst"]
    # Three of the five differ, so their sum has three times their rank.
    assert (found["florist τ 1", True]["rank"], found["fedit", True]["rank"]) == (12, 4)
    assert case["bytes_in"] > 5 * 4 * 4 * 4 * (256 + 192) > case["bytes_in"] / 2
    assert "/" not in json.dumps(found["fedit", True]["command"])


def test_the_page_is_made_of_the_results(results, cases):
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    page = load("pages").rendered(text, results)
    first = rows(cases[0])
    lines = [line for line in page.splitlines() if line.startswith("| 256 × 192 | 5 | alike | 0.9 |")]
    assert len(lines) == 1
    assert f"| {first['two SVDs, τ 0.9']['seconds'] / first['florist τ 0.9']['seconds']:.1f} |" in lines[0]
    assert "| 5 | two SVDs, τ 1 |" in page
    assert "Not measured yet" not in page


def test_invented_adapters_are_peft_folders_with_the_factors_that_are_timed_in_memory(tmp_path):
    import safetensors.torch
    import torch
    from peft import LoraConfig

    adapters = load("adapters")
    made = adapters.write(tmp_path / "clients", "alike", adapters.SMALL, clients=3, distinct=2)
    assert [path.name for path in made] == ["0000", "0001", "0002"]
    assert os.path.samefile(made[0] / "adapter_model.safetensors", made[2] / "adapter_model.safetensors")
    assert LoraConfig.from_pretrained(str(made[1])).r == adapters.SMALL.rank
    layer, shape = "model.layers.1.self_attn.v_proj", (192, 256)
    stored = safetensors.torch.load_file(made[1] / "adapter_model.safetensors")
    own = adapters.factors("alike", shape, adapters.SMALL.rank, 1, layer)
    assert len(stored) == 2 * len(adapters.SMALL.layers)
    assert torch.equal(stored[f"base_model.model.{layer}.lora_A.weight"], own["A"])
    assert torch.equal(stored[f"base_model.model.{layer}.lora_B.weight"], own["B"])
    assert own["B"].shape == (192, 4)


def test_adapters_that_would_fill_the_disk_are_refused(tmp_path):
    adapters = load("adapters")
    with pytest.raises(OSError, match="take fewer"):
        adapters.write(tmp_path, "alike", adapters.ALL, clients=1000, distinct=1000)
    assert list(tmp_path.iterdir()) == []


def test_the_peak_memory_of_a_command_is_its_own(tmp_path):
    held = bytearray(os.urandom(1) * 400_000_000)  # here, and not in the command
    watched = [sys.executable, "-I", "-S", str(FOLDER / "peak.py"), str(tmp_path / "output")]
    command = [sys.executable, "-c", "print(len(bytearray(b'1') * 100_000_000))"]
    done = subprocess.run([*watched, *command], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert (told["code"], (tmp_path / "output").read_text()) == (0, "100000000\n")
    assert 100e6 < told["peak_bytes"] < 200e6 < len(held)


def test_on_the_same_uploads_no_rule_beats_the_best_pair_and_a_further_iteration_does_no_harm():
    told = json.loads((ROOT / "benchmarks" / "methods" / "results" / "power.json").read_text(encoding="utf-8"))
    rounds = [found for own in told["scenarios"].values() for found in own["rounds"]]
    assert len(rounds) == 20
    for found in rounds:
        errors = {name: x["mean"] for name, x in found.items() if isinstance(x, dict)}
        assert errors["best pair"] <= min(errors.values()) * (1 + 1e-4)
        assert errors["power, 2 iterations"] <= errors["power"] * (1 + 1e-6)
        assert errors["power"] < errors.get("fedit", float("inf"))
