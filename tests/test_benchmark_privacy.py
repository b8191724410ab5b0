"""The attacks of benchmarks/privacy do what they claim on models and scores made here; the pages show what was measured."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tiny
from umbel.config import configs

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "privacy"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))

    def loaded(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield loaded
    sys.modules.pop("setting", None)


def test_every_row_of_the_pool_is_in_half_of_the_runs_and_half_of_its_clients_rows_are_in_each(load: Any) -> None:
    membership = load("membership")
    inside = torch.tensor([membership.members(run) for run in range(6)])
    assert bool((inside.sum(0) == 3).all())
    for client in range(membership.CLIENTS):
        own = inside[:, client :: membership.CLIENTS]
        assert bool(((own.sum(1) - own.shape[1] / 2).abs() <= 1).all())


def test_shadow_runs_tell_members_whose_scores_overlap_with_those_of_other_rows(load: Any) -> None:
    membership = load("membership")
    draw = torch.Generator().manual_seed(0)
    inside = torch.tensor([membership.members(run) for run in range(8)])
    # Rows differ by far more than being in a run adds, so one threshold for all of them tells little.
    hardness = 5 * torch.randn(inside.shape[1], generator=draw)
    scores = hardness + 1.5 * inside + 0.5 * torch.randn(inside.shape, generator=draw)
    threshold = membership.success(scores, inside)["auc"]["mean"]
    shadows = membership.success(membership.likelihood_ratios(scores, inside), inside)["auc"]["mean"]
    assert threshold < 0.65 < 0.95 < shadows


@pytest.mark.parametrize("runs", [4, 6, 8])
def test_shadow_runs_tell_nothing_where_being_in_a_run_changes_nothing(load: Any, runs: int) -> None:
    membership = load("membership")
    inside = torch.tensor([membership.members(run) for run in range(runs)])
    draw = torch.Generator().manual_seed(1)
    areas = []
    for _ in range(8):
        scores = torch.randn(inside.shape, generator=draw)
        areas.append(membership.success(membership.likelihood_ratios(scores, inside), inside)["auc"]["mean"])
    # The standard error of their mean is below 0.005; shadows whose number tells who is in would show as 0.03 and more.
    assert abs(sum(areas) / len(areas) - 0.5) < 0.015


@pytest.mark.parametrize("method", ["fedit", "fed_sb"])
def test_the_words_of_a_row_are_read_from_one_step_without_noise_and_not_with_it(
    load: Any, tmp_path: Path, method: str
) -> None:
    inversion, setting = load("inversion"), load("setting")
    described = tiny.table(
        tmp_path,
        {"name": method},
        lora={"r": 12, "lora_alpha": 12, "target_modules": ["query", "value"]},
        training={"learning_rate": 0.1, "max_steps": 1, "max_grad_norm": 0.0},
    )
    (config,) = configs(described).values()
    attacked = inversion.Attacked(setting.Loaded.of(config), config)
    kinds = {x["defence"]: x for x in inversion.defences(1)}

    def share(defence: str) -> float:
        return sum(attacked.trial(1, kinds[defence], trial)["recovered"] for trial in range(4)) / 4

    assert share("none") == 1.0
    assert share("ε = 8") < 0.5


def test_the_released_recipe_has_less_noise_than_the_corrected_one(load: Any) -> None:
    comparison = load("comparison")
    from umbel.privacy import noise_multiplier

    rate = comparison.BATCH / 5000
    for epsilon in comparison.EPSILONS:
        corrected = noise_multiplier(epsilon, comparison.DELTA, ((rate, comparison.STEPS),))
        assert 0 < comparison.released_sigma(epsilon, rate) < 0.8 * corrected


@pytest.mark.parametrize(("page", "tables"), [("privacy", 4), ("results", 3)])
def test_the_measured_tables_of_a_page_are_those_of_the_result_files(load: Any, page: str, tables: int) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert text.count("<!-- measured:") >= tables
    assert load("pages").rendered(text) == text, "run python benchmarks/privacy/pages.py"
