"""The real `umbel merge` command: what it prints, what it refuses, and what a full disk or a kill leaves behind."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import sites
from sites import KINDS, Sites

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Sites:
    return sites.made(KINDS["mixed ranks"], tmp_path_factory.mktemp("sites") / "all")


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Sites:
    return sites.made(KINDS["linear"], tmp_path_factory.mktemp("sites") / "all")


def command(*arguments: object, cwd: Path, before: Callable[[], None] | None = None) -> tuple[int, str, str]:
    """Runs the installed command; returns (exit code, stdout, stderr)."""
    line = [str(Path(sys.executable).with_name("umbel")), "merge", *map(str, arguments)]
    done = subprocess.run(line, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, preexec_fn=before)
    return done.returncode, done.stdout, done.stderr


def mistake(*arguments: object, cwd: Path, before: Callable[[], None] | None = None) -> str:
    """The one line that a mistake gives; nothing may be left behind."""
    there = sorted(cwd.iterdir())
    code, out, err = command(*arguments, cwd=cwd, before=before)
    assert (code, out) == (2, ""), err
    (line,) = err.strip().splitlines()
    assert line.startswith("umbel: ")
    assert sorted(cwd.iterdir()) == there
    return line.removeprefix("umbel: ")


def test_the_table_has_every_layer_and_the_totals(own: Sites, tmp_path: Path) -> None:
    options = ["--method", "florist", "--set", "energy=0.9", "--weights", "1200,800,400"]
    code, out, err = command(*own.folders, "--out", "merged", *options, cwd=tmp_path)
    assert code == 0, err
    told = json.loads((tmp_path / "merged" / "merge.json").read_text())
    for name, layer in told["layers"].items():
        (line,) = [line for line in out.splitlines() if name in line]
        assert str(layer["rank"]) in line.split()
    for word in ("error", "rank", "energy", "read", "comput", "writ"):
        assert word in out
    assert {"error", "rank", "energy"} <= set(next(iter(told["layers"].values())))
    files = [folder / "adapter_model.safetensors" for folder in own.folders]
    assert told["bytes_in"] == sum(file.stat().st_size for file in files)
    assert told["bytes_out"] == (tmp_path / "merged" / "adapter_model.safetensors").stat().st_size
    assert len(told["seconds"]) >= 3


def test_json_is_what_merge_json_says(own: Sites, tmp_path: Path) -> None:
    code, out, err = command(*own.folders, "--out", "merged", "--json", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert max(layer["error"] for layer in json.loads(out)["layers"].values()) <= 2e-6  # no method: the exact sum


def test_a_dry_run_says_what_would_happen_and_writes_nothing(own: Sites, tmp_path: Path) -> None:
    code, out, err = command(*own.folders, "--dry-run", cwd=tmp_path)
    assert code == 0, err
    assert list(tmp_path.iterdir()) == []
    for name in sites.adapted(own.loaded(own.folders[0])):
        assert name in out
    code, out, _ = command(*own.folders, "--dry-run", "--json", "--method", "flora", cwd=tmp_path)
    assert code == 0
    assert list(tmp_path.iterdir()) == []
    foreseen = json.loads(out)
    command(*own.folders, "--out", "merged", "--method", "flora", cwd=tmp_path)
    told = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert foreseen["bytes_in"] == told["bytes_in"]
    assert foreseen["layers"].keys() == told["layers"].keys()


def test_the_options_of_the_command_are_those_of_the_library(alike: Sites, tmp_path: Path) -> None:
    import umbel

    options = ["--method", "flora_na", "--weights", "3,1,1", "--rank", "3", "--dtype", "bfloat16"]
    code, _, err = command(*alike.folders, "--out", "merged", *options, cwd=tmp_path)
    assert code == 0, err
    umbel.merge([*alike.folders], tmp_path / "other", method="flora_na", weights=[3, 1, 1], rank=3, dtype="bfloat16")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("merged", "other"))
    assert first.keys() == second.keys()
    assert all(x.equal(second[name]) for name, x in first.items())
    told = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert {layer["rank"] for layer in told["layers"].values()} == {3}


# Where the weights come from


def _with_rows(own: Sites, folder: Path, rows: list[int | None]) -> list[Path]:
    """Copies of the sites' folders, with an umbel.json where there is a number."""
    copies: list[Path] = []
    for k, (place, n) in enumerate(zip(own.folders, rows)):
        copy = folder / f"copy-{k}"
        copy.mkdir()
        for file in place.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        if n is not None:
            (copy / "umbel.json").write_text(json.dumps({"umbel": "0.1.0", "num_examples": n}), encoding="utf-8")
        copies.append(copy)
    return copies


@pytest.mark.parametrize(
    ("rows", "given", "same_as"),
    [([5, 3, 2], [], "5,3,2"), ([5, 3, 2], ["--weights", "1,1,2"], "1,1,2"), ([None, None, None], [], "1,1,1")],
    ids=str,
)
def test_weights_are_the_given_ones_or_the_folders_or_equal(
    own: Sites, tmp_path: Path, rows: list[int | None], given: list[str], same_as: str
) -> None:
    copies = _with_rows(own, tmp_path, rows)
    assert command(*copies, "--out", "merged", *given, cwd=tmp_path)[0] == 0
    assert command(*copies, "--out", "same", "--weights", same_as, cwd=tmp_path)[0] == 0
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("merged", "same"))
    assert all(x.equal(second[name]) for name, x in first.items())
    told = json.loads((tmp_path / "merged" / "merge.json").read_text())
    numbers = [float(n) for n in same_as.split(",")]
    assert _numbers_in(told["weights"]) >= {n / sum(numbers) for n in numbers} or _numbers_in(told["weights"]) >= set(numbers)


def _numbers_in(value: object) -> set[float]:
    if isinstance(value, dict):
        return set().union(*map(_numbers_in, value.values()))
    if isinstance(value, list):
        return set().union(*map(_numbers_in, value))
    return {value} if isinstance(value, int | float) else set()


# Mistakes: one line, exit code 2, nothing written


@pytest.mark.parametrize(
    "options",
    [
        ["--weights", "1,2"],
        ["--weights", "1,0,1"],
        ["--weights", "1,-1,1"],
        ["--weights", "1,nan,1"],
        ["--weights", "1,inf,1"],
        ["--weights", "1,two,1"],
        ["--method", "florst"],
        ["--method", "fedit"],  # mixed ranks
        ["--method", "fed_sb"],
        ["--method", "florist", "--set", "energy=2"],
        ["--method", "florist", "--set", "enrgy=0.9"],
        ["--rank", "0"],
        ["--rank", "-1"],
        ["--dtype", "int8"],
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line(own: Sites, tmp_path: Path, options: list[str]) -> None:
    assert mistake(*own.folders, "--out", "merged", *options, cwd=tmp_path)


def test_no_folder_no_out_and_a_file_that_is_not_there_are_mistakes(own: Sites, tmp_path: Path) -> None:
    assert command("--out", "merged", cwd=tmp_path)[0] == 2
    assert command(*own.folders, cwd=tmp_path)[0] == 2
    assert "nowhere" in mistake(*own.folders, "nowhere", "--out", "merged", cwd=tmp_path)


def test_what_stands_at_out_is_not_overwritten(own: Sites, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine", encoding="utf-8")
    assert "merged" in mistake(*own.folders, "--out", "merged", cwd=tmp_path)
    assert (tmp_path / "merged" / "mine.txt").read_text() == "mine"


def _changed(own: Sites, folder: Path, **keys: object) -> list[Path]:
    """Copies of the sites, where the last site's configuration says something else."""
    copies = _with_rows(own, folder, [None] * len(own.folders))
    file = copies[-1] / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}), encoding="utf-8")
    return copies


@pytest.mark.parametrize("keys", [{"base_model_name_or_path": "another/base"}, {"revision": "v2"}], ids=str)
def test_another_base_is_refused_unless_forced(own: Sites, tmp_path: Path, keys: dict[str, str]) -> None:
    copies = _changed(own, tmp_path, **keys)
    assert str(*keys.values()) in mistake(*copies, "--out", "merged", cwd=tmp_path)
    code, _, err = command(*copies, "--out", "merged", "--force", cwd=tmp_path)
    assert code == 0, err
    notes = json.loads((tmp_path / "merged" / "merge.json").read_text())["notes"]
    assert any(str(*keys.values()) in note for note in notes)


def test_dora_is_refused(tmp_path: Path) -> None:
    kind = sites.Kind(KINDS["linear"].base, KINDS["linear"].loader, (sites.ATTENTION | {"use_dora": True},) * 2)
    own = sites.made(kind, tmp_path / "dora")
    assert "DoRA" in mistake(*own.folders, "--out", "merged", "--force", cwd=tmp_path)


# Full disks and kills


def _small_files() -> None:
    # A write beyond the limit fails with EFBIG as one on a full disk does with ENOSPC; Python ignores the signal.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.parametrize("before", [False, True], ids=["nothing there", "a half-written one there"])
def test_a_full_disk_leaves_nothing_behind(own: Sites, tmp_path: Path, before: bool) -> None:
    assert command(*own.folders, "--out", "whole", cwd=tmp_path)[0] == 0
    assert (tmp_path / "whole" / "adapter_model.safetensors").stat().st_size > 4096
    if before:
        assert _killed_at("os.rename", own, tmp_path) == -signal.SIGKILL
        assert command(*own.folders, "--out", "merged", cwd=tmp_path, before=_small_files)[0] == 2
        assert not (tmp_path / "merged").exists()
    else:
        assert "merged" in mistake(*own.folders, "--out", "merged", cwd=tmp_path, before=_small_files)


KILLED = """
import os, signal, sys
event, part = sys.argv.pop(1), sys.argv.pop(1)
def watch(name, arguments):
    if name == event and part in str(arguments):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
from umbel.cli import main
main()
"""


def _killed_at(event: str, own: Sites, folder: Path, part: str = "merged") -> int:
    """Merges into `merged`, in a process that is killed where it first does a thing to a path with `part` in it."""
    line = [sys.executable, "-c", KILLED, event, part, "merge", *map(str, own.folders), "--out", "merged"]
    return subprocess.run(line, cwd=folder, env=ENVIRONMENT, capture_output=True, timeout=60).returncode


@pytest.mark.parametrize(("event", "part"), [("open", "merged"), ("open", "merge.json"), ("os.rename", "merged")])
def test_a_kill_leaves_no_folder_that_looks_whole_and_the_next_merge_is_right(
    own: Sites, tmp_path: Path, event: str, part: str
) -> None:
    assert _killed_at(event, own, tmp_path, part) == -signal.SIGKILL
    assert not (tmp_path / "merged").exists()
    assert command(*own.folders, "--out", "merged", cwd=tmp_path)[0] == 0
    assert command(*own.folders, "--out", "undisturbed", cwd=tmp_path)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "undisturbed"}
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
