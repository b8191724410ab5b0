"""The command line as its user meets it: exit codes, and one line for each mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from umbel import method, testing
from umbel.cli import app

RUNNABLE = """
[model]
name = "{model}"
[data]
train = "train.csv"
test = "train.csv"
[split]
clients = 2
[lora]
target_modules = ["query"]
"""

BROKEN = '''
"""A method that forgets the weights."""

from umbel.method import Download, Each, Method


class MyMethod(Method):
    collect = Each

    def combine(self, got, held):
        return Download(factors={name: sum(own[name] for own, _ in got) / len(got) for name in "AB"})
'''


def installed(*arguments, cwd):
    """Runs the installed command; returns (exit code, stdout, stderr)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    command = [str(Path(sys.executable).with_name("umbel")), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def umbel(*arguments):
    """Runs the command in this process; returns (exit code, stdout, stderr). An exception that it lets through is raised."""
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, list(arguments), catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def mistake(*arguments):
    """The one line that a mistake of the user gives."""
    code, out, err = umbel(*arguments)
    assert (code, out) == (2, "")
    (line,) = err.strip().splitlines()
    assert line.startswith("umbel: ")
    return line.removeprefix("umbel: ")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_help_lists_the_commands(tmp_path):
    code, out, _ = installed("--help", cwd=tmp_path)
    assert code == 0
    for command in ("run", "compare", "report", "eval", "methods", "privacy", "check"):
        assert f" {command} " in out
    assert umbel()[1].strip() == umbel("--help")[1].strip()  # and so does the bare command


@pytest.mark.parametrize("command", ["run", "compare", "report", "eval", "methods", "privacy", "check"])
def test_every_command_explains_itself_and_offers_json(tmp_path, command):
    code, out, _ = umbel(command, "--help")
    assert code == 0
    assert "--json" in out


@pytest.mark.parametrize("arguments", [["--bad"], ["fly"], ["run", "--bad"], ["check"], ["eval"]])
def test_what_the_command_line_does_not_know_is_exit_code_two(tmp_path, arguments):
    code, out, err = umbel(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: umbel" in err


def test_run_without_a_file_says_what_it_needs(tmp_path):
    assert mistake("run") == "give a TOML file, or --resume DIR; one of the two"


def test_run_of_a_file_that_is_not_there_names_it(tmp_path):
    assert mistake("run", "missing.toml") == "no configuration file 'missing.toml'"
    code, out, err = installed("run", "missing.toml", cwd=tmp_path)
    assert (code, out, err.strip()) == (2, "", "umbel: no configuration file 'missing.toml'")
    assert os.listdir(tmp_path) == []


def test_run_of_a_file_with_a_mistake_says_where_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "run.toml").write_text(RUNNABLE.format(model="x") + "rang = 4\n")
    assert mistake("run", "run.toml").startswith("unknown key 'lora.rang'. Did you mean")
    assert mistake("run", "run.toml", "--set", "rounds") == "--set takes key=value, got 'rounds'"
    (tmp_path / "run.toml").write_text("[[[")
    assert mistake("run", "run.toml").startswith("run.toml: not TOML: ")
    assert os.listdir(tmp_path) == ["run.toml"]


def test_set_is_checked_like_the_file(tmp_path):
    (tmp_path / "run.toml").write_text(RUNNABLE.format(model="x"))
    said = mistake("run", "run.toml", "--set", "method.name=fedlt")
    assert said.startswith("[method]: no method 'fedlt'. Did you mean 'fedit'?")
    assert mistake("run", "run.toml", "--set", "rounds=0") == "rounds: got 0, allowed: 1 or more"


def test_data_that_is_not_there_is_the_users_mistake(tmp_path):
    (tmp_path / "run.toml").write_text(RUNNABLE.format(model=tmp_path / "model"))
    assert "train.csv" in mistake("run", "run.toml")


def test_resume_goes_with_nothing_else(tmp_path):
    (tmp_path / "run.toml").write_text(RUNNABLE.format(model="x"))
    assert "one of the two" in mistake("run", "run.toml", "--resume", ".")
    assert "own configuration" in mistake("run", "--resume", ".", "--set", "rounds=3")
    assert "nothing to resume" in mistake("run", "--resume", "elsewhere")


def test_a_folder_that_holds_a_run_is_not_run_over(tmp_path):
    (tmp_path / "run.toml").write_text(RUNNABLE.format(model="x"))
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "job.toml").write_text("")
    (tmp_path / "done" / "split.json").write_text("{}")
    assert "done holds a run already" in mistake("run", "run.toml", "--out", "done")


@pytest.mark.parametrize("command", ["report", "eval"])
def test_a_folder_without_a_run_is_the_users_mistake(tmp_path, command):
    assert "elsewhere" in mistake(command, "elsewhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in mistake(command, "empty")


def test_eval_on_other_tasks_says_what_it_needs(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "task.toml").write_text("")
    assert (
        mistake("eval", "a", "--set", "data.test=x")
        == "--set changes keys of the files that --config names; give --config, too"
    )
    assert mistake("eval", "a", "--config", "missing.toml") == "no configuration file 'missing.toml'"
    assert "called 'task'" in mistake("eval", "a", "--config", "a/task.toml", "--config", "b/task.toml")
    assert "a has no adapter/" in mistake("eval", "a", "--config", "a/task.toml")


def test_methods_prints_every_method_as_a_table_and_as_json(tmp_path):
    code, out, err = umbel("methods", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert sorted(found) == method.names()
    assert {"exact", "error", "bytes_up", "bytes_down", "mixed_ranks", "maskable"} <= found["fedit"].keys()
    assert found["fedit"]["exact"] is False
    code, out, err = umbel("methods")
    assert (code, err) == (0, "")
    assert all(name in out for name in method.names())


def test_methods_with_privacy_prints_who_can_read_what_and_the_page_has_the_same_table():
    code, out, err = umbel("methods", "--privacy", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert sorted(found) == method.names()
    page = (Path(__file__).parents[1] / "docs" / "privacy.md").read_text(encoding="utf-8")
    for row in testing.privacy_table(found):
        assert f"| {' | '.join(row)} |" in page
    code, out, err = umbel("methods", "--privacy")
    assert (code, err) == (0, "")
    assert all(name in out for name in method.names())


def test_check_of_a_sound_method_passes(tmp_path):
    code, out, err = umbel("check", "fedit")
    assert (code, err) == (0, "")
    assert "inputs are not modified" in out
    assert " NO " not in out
    code, out, _ = umbel("check", "fedit", "--json")
    results = json.loads(out)
    assert code == 0
    assert all(result["holds"] is not False for result in results)
    assert {"phase", "claim", "holds", "detail"} == results[0].keys()


def test_check_of_a_broken_method_of_ones_own_fails_and_names_what_is_broken(tmp_path):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_method.py").write_text(BROKEN)
    code, out, err = installed("check", "my_package.my_method", cwd=tmp_path)
    assert (code, err) == (1, "")
    broken = [line for line in out.splitlines() if line.strip().startswith("NO")]
    assert any("n_k = 2 counts as the client sent twice" in line for line in broken)
    assert not any("inputs are not modified" in line for line in broken)
    code, out, _ = installed("check", "my_package.my_method", "--json", cwd=tmp_path)
    assert code == 1
    assert "n_k = 2 counts as the client sent twice" in {r["claim"] for r in json.loads(out) if r["holds"] is False}


def test_check_of_an_unknown_method_names_the_nearest(tmp_path):
    assert mistake("check", "florits").startswith("no method 'florits'. Did you mean 'florist'?")
    assert mistake("check", "nowhere.my_method").startswith("no method 'nowhere.my_method'")
