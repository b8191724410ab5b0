"""What a site lets a run spend: its own ledger and its own word for it, whatever the run's file says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from umbel import config as configuration
from umbel import kit, wire
from umbel.client.site import Site, Worker
from umbel.config import ConfigError
from umbel.ledger import BudgetError, Ledger

RUN, LABELS = "0123456789abcdef", sorted(tiny.TOPICS)


def a_job(folder: Path, run: str = RUN, method: Any = None, **privacy: Any) -> dict[str, Any]:
    own = {"unit": "example", "target_epsilon": 8.0, "target_delta": 1e-3, **privacy}
    table = tiny.table(folder, method, split={"kind": "iid", "clients": 2}, privacy=own, data={"labels": LABELS})
    config = configuration.to_table(next(iter(configuration.configs(table).values())))
    return {"run": run, "member": "fedit", "clients": 2, "config": config}


def a_site(folder: Path, **other: Any) -> Site:
    place = folder / "site"
    told = kit.SiteConfig("a", 1, "host", str(folder / "train.jsonl"), **other)
    return Site.of(place, told)


def a_request(kind: str, number: int, **other: Any) -> bytes:
    header = {"run": RUN, "round": number, "client": 1, "kind": kind, "has": -1, "keep": number, "layers": {}, "plain": {}}
    header |= {"trains": ["A", "B"], "sends": ["A", "B"], "keeps": [], "train_round": number, "rounds": 2}
    return wire.encode(wire.Message(header | {"score": False, "samples": 10, "downloads": {}} | other), "float32")


def test_the_ledger_of_a_site_is_in_its_own_folder_whatever_the_run_says(tmp_path: Path) -> None:
    job = a_job(tmp_path, ledger=str(tmp_path / "elsewhere"))
    Worker(a_site(tmp_path)).answer(job, a_request("train", 1))
    assert [entry.run for entry in Ledger(tmp_path / "site" / "ledger").entries()] == [f"{RUN}/fedit"]
    assert not (tmp_path / "elsewhere").exists()


def test_a_site_refuses_what_is_beyond_its_own_budget_in_every_later_run(tmp_path: Path) -> None:
    site = a_site(tmp_path, total_epsilon=8.5)
    for number in (1, 2):
        Worker(site).answer(a_job(tmp_path, total_epsilon=1e6), a_request("train", number))
    later = a_job(tmp_path, "fedcba9876543210", total_epsilon=1e6)
    with pytest.raises(BudgetError, match=r"all runs on these rows spent ε 7\.9.*allowed 8\.5; stop here, or raise total"):
        Worker(site).answer(later, a_request("train", 1))
    Worker(replace(site, total_epsilon=30.0)).answer(later, a_request("train", 1))


def test_a_site_with_a_budget_answers_no_run_that_does_not_hide_its_rows(tmp_path: Path) -> None:
    job = a_job(tmp_path, unit="none", target_epsilon=0.0, target_delta=0.0)
    with pytest.raises(ConfigError, match=r"only runs with privacy\.unit = example \(total_epsilon, in site\.toml\)"):
        Worker(a_site(tmp_path, total_epsilon=10.0)).answer(job, a_request("train", 1))
    Worker(a_site(tmp_path)).answer(job, a_request("train", 1))


def test_a_site_may_insist_on_masks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"only runs with masked uploads \(secure_aggregation, in site\.toml\)"):
        Worker(a_site(tmp_path, secure_aggregation=True)).answer(a_job(tmp_path), a_request("train", 1))
    assert not Ledger(tmp_path / "site" / "ledger").exists


def test_a_run_that_may_spend_more_or_wait_longer_is_the_same_run(tmp_path: Path) -> None:
    first = a_job(tmp_path, total_epsilon=9.0)
    later = a_job(tmp_path, total_epsilon=20.0)
    later["config"]["server"] = {**later["config"]["server"], "min_clients": 2, "round_deadline": 7.0}
    one, two = (wire.decode(Worker(a_site(tmp_path)).answer(job, a_request("train", 1))) for job in (first, later))
    assert len(Ledger(tmp_path / "site" / "ledger").entries()) == 1
    assert all(x.equal(two.tensors[key]) for key, x in one.tensors.items())


def test_a_site_with_a_budget_scores_none_of_its_training_rows(tmp_path: Path) -> None:
    """Which rows `data.validation` sets aside follows from the run's seed, and scores of them are exact."""
    job = a_job(tmp_path)
    job["config"]["data"]["validation"] = 0.5
    request = a_request("train", 1, score=True)
    with pytest.raises(ConfigError, match=r"data\.validation would have this site score its training rows, with no noise"):
        Worker(a_site(tmp_path, total_epsilon=10.0)).answer(job, request)
    own = a_site(tmp_path, total_epsilon=10.0, test=str(tmp_path / "test.jsonl"))
    scores = wire.decode(Worker(own).answer(job, request)).header["scores"]
    assert scores["rows"] == 45  # all of its test file


def test_which_rows_are_public_at_a_site_is_not_for_the_run_to_say(tmp_path: Path) -> None:
    job = a_job(tmp_path, method={"name": "fed_sb"})
    (tmp_path / "private.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes())
    job["config"]["data"]["public"] = str(tmp_path / "private.jsonl")
    measure = a_request("measure", 1, trains=[], sends=["G"])
    with pytest.raises(ConfigError, match=r"this site has no public rows \(public, in site\.toml\)"):
        Worker(a_site(tmp_path)).answer(job, measure)
    Worker(a_site(tmp_path, public=str(tmp_path / "test.jsonl"))).answer(job, measure)
    assert not Ledger(tmp_path / "site" / "ledger").exists


def test_site_toml_says_what_may_be_spent(tmp_path: Path) -> None:
    def written(text: str) -> kit.SiteConfig:
        (tmp_path / "site.toml").write_text(f'name = "a"\nnumber = 0\nserver = "host:1"\n{text}\n')
        return kit.read_site(tmp_path)

    assert (written("").total_epsilon, written("").secure_aggregation) == (0, False)
    assert written("secure_aggregation = true").secure_aggregation
    own = written('total_epsilon = 3\npublic = "open.jsonl"')
    assert (own.total_epsilon, own.public) == (3.0, str(tmp_path / "open.jsonl"))
    for wrong in ("-1.0", "inf", "nan", '"3"', "true"):
        with pytest.raises(kit.KitError, match="total_epsilon must be"):
            written(f"total_epsilon = {wrong}")
