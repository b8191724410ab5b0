"""`umbel privacy`: what was spent, for people and as JSON."""

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from umbel import privacy
from umbel.cli import app
from umbel.ledger import Entry, Ledger


def umbel(*arguments):
    return CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"}).invoke(app, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture
def site(tmp_path):
    """A site whose ledger has a start and three rounds of one run, one round of another on other rows."""
    ledger = Ledger(tmp_path / "site" / "ledger")
    rows, others = ledger.name_data([{"text": "a"}, {"text": "b"}]), ledger.name_data([{"text": "c"}])

    def spend(run, number, kind, spent, data):
        sigma, rate, steps = spent
        name = f"{run} {number} {kind}"
        ledger.spend(Entry(run, 4, number, kind, sigma, rate, steps, 1.0, 1e-3, 5.0, 8.0, name, data))

    spend("r1/fed_sb", 0, "measure", (4.0, 0.5, 1), rows)
    for number in (1, 2, 3):
        spend("r1/fed_sb", number, "train", (2.0, 0.2, 5), rows)
    spend("r2/fedit", 1, "train", (3.0, 0.1, 7), others)
    return tmp_path / "site"


def test_a_sites_ledger_is_told_as_json(site):
    (told,) = json.loads(umbel("privacy", site, "--json").stdout)
    first, second = told["runs"]
    assert first["epsilon"] == privacy.epsilon([(4.0, 0.5, 1), (2.0, 0.2, 15)], 1e-3) == told["epsilon"]
    assert second["epsilon"] == privacy.epsilon([(3.0, 0.1, 7)], 1e-3)
    assert (first["run"], first["client"], first["rounds"], first["target"]) == ("r1/fed_sb", 4, 3, 5.0)
    assert first["spent"] == [
        {"kind": "measure", "sigma": 4.0, "sample_rate": 0.5, "steps": 1},
        {"kind": "train", "sigma": 2.0, "sample_rate": 0.2, "steps": 15},
    ]
    assert (told["delta"], told["budget"], told["unit"]) == (1e-3, 8.0, "example: one training row")
    assert "Poisson" in told["sampling"]
    assert told["next"]["run"] == "r2/fedit"
    assert told["next"]["epsilon"] == privacy.epsilon([(3.0, 0.1, 14)], 1e-3)
    left = told["next"]["left"]
    assert privacy.epsilon([(3.0, 0.1, 7 * (1 + left))], 1e-3) <= 5 < privacy.epsilon([(3.0, 0.1, 7 * (2 + left))], 1e-3)


def test_a_sites_ledger_is_told_as_a_table(site):
    for folder in (site, site / "ledger"):
        text = umbel("privacy", folder).stdout
        assert "r1/fed_sb" in text
        assert f"{privacy.epsilon([(4.0, 0.5, 1), (2.0, 0.2, 15)], 1e-3):.4g}" in text
        assert re.search(r"^one more \(\d+ left\)", text, re.MULTILINE)
        assert "one row more or less" in " ".join(text.split())


def test_the_table_fits_a_terminal_of_80_columns(tmp_path):
    ledger = Ledger(tmp_path / "run" / "clients" / "0" / "ledger")
    rows = ledger.name_data([{"text": "a"}])
    run = "0123456789abcdef/fedit"
    ledger.spend(Entry(run, 10, 1, "train", 1.65194, 0.033333, 120, 1.0, 1e-3, 9.0, 9.0, "x", rows))
    environment = {"COLUMNS": "80", "NO_COLOR": "1"}
    text = CliRunner(env=environment).invoke(app, ["privacy", str(tmp_path / "run")], catch_exceptions=False).stdout
    assert re.search(r"^012345…/fedit +10 +1 +1.652 0.03333 +120 ", text, re.MULTILINE)
    assert re.search(r"^clients/0 *$", text, re.MULTILINE)


def test_the_table_of_a_servers_ledger_speaks_of_clients(tmp_path):
    ledger = Ledger(tmp_path)
    data = ledger.name_data([{"text": "a"}])
    ledger.spend(Entry("r/fedit", 0, 1, "train", 2.0, 1.0, 1, 1.0, 1e-3, 3.0, 3.0, "x", data, unit="client"))
    text = " ".join(umbel("privacy", tmp_path).stdout.split())
    assert "one client's uploads more or less" in text
    assert "row more" not in text


def test_a_folder_without_a_ledger_is_the_users_mistake(tmp_path):
    done = umbel("privacy", tmp_path)
    assert done.exit_code == 2
    assert "holds no ledger; give a ledger, a site's folder, or that of a run" in done.stderr


def test_a_changed_ledger_is_said_in_one_line(site):
    path = site / "ledger" / "ledger.jsonl"
    path.write_text(path.read_text().replace('"sigma": 2.0', '"sigma": 9.0', 1))
    done = umbel("privacy", site)
    assert done.exit_code == 2
    assert "line 2: changed" in done.stderr


def test_without_opacus_it_says_what_to_install(site):
    code = f"""
import sys
sys.modules["opacus"] = None
from typer.testing import CliRunner
from umbel.cli import app
done = CliRunner().invoke(app, ["privacy", {str(site)!r}])
print(done.exit_code, done.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2 umbel: the accountant of differential privacy is Opacus': pip install 'umbel[privacy]'")


def test_of_a_run_whose_ledger_is_elsewhere_that_one_is_told(tmp_path, site, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.toml").write_text('[privacy]\nunit = "example"\nledger = "site"\n')
    (told,) = json.loads(umbel("privacy", "run", "--json").stdout)
    assert told["ledger"] == "site/ledger"


def test_a_ledger_without_its_key_is_missed(site):
    (site / "ledger" / "secret.key").unlink()
    done = umbel("privacy", site)
    assert done.exit_code == 2
    assert "secret.key is missing" in done.stderr
