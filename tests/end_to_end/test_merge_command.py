"""The real `umbel merge` command: what it prints, what it refuses, and what a full disk or a kill leaves behind."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import sites
import umbel
from sites import KINDS, Sites
from umbel.cli import app

SETTINGS = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Sites:
    return sites.made(KINDS["mixed ranks"], tmp_path_factory.mktemp("sites") / "all")


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Sites:
    return sites.made(KINDS["linear"], tmp_path_factory.mktemp("sites") / "all")


def merge(*arguments: object, cwd: Path) -> tuple[int, str, str]:
    """Runs the command in this process, in a folder; returns (exit code, stdout, stderr). A bug's exception is raised."""
    with contextlib.chdir(cwd):
        result = CliRunner(env=SETTINGS).invoke(app, ["merge", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def installed(*arguments: object, cwd: Path, before: Callable[[], None] | None = None) -> tuple[int, str, str]:
    """Runs the installed command in a process of its own, as `merge` does in this one."""
    line = [str(Path(sys.executable).with_name("umbel")), "merge", *map(str, arguments)]
    own = {**os.environ, **SETTINGS}
    done = subprocess.run(line, cwd=cwd, env=own, capture_output=True, text=True, timeout=60, preexec_fn=before)
    return done.returncode, done.stdout, done.stderr


def mistake(*arguments: object, cwd: Path, run: Callable[..., tuple[int, str, str]] = merge) -> str:
    """The one line that a mistake gives; nothing may be left behind."""
    there = sorted(cwd.iterdir())
    code, out, err = run(*arguments, cwd=cwd)
    assert (code, out) == (2, ""), err
    (line,) = err.strip().splitlines()
    assert line.startswith("umbel: ")
    assert sorted(cwd.iterdir()) == there
    return line.removeprefix("umbel: ")


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "merge.json").read_text(encoding="utf-8"))


def same_tensors(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(x, second[name]) for name, x in first.items())


def test_the_table_has_every_layer_and_the_totals(own: Sites, tmp_path: Path) -> None:
    options = ["--method", "florist", "--set", "energy=0.9", "--weights", "1200,800,400"]
    code, out, err = installed(*own.folders, "--out", "merged", *options, cwd=tmp_path)
    assert code == 0, err
    report = told(tmp_path / "merged")
    for name, layer in report["layers"].items():
        (line,) = [line for line in out.splitlines() if name in line]
        assert str(layer["rank"]) in line.split()
        assert 0.9 <= layer["energy"] <= 1
        assert 0 < layer["error"] <= 0.1**0.5
    for word in ("error", "rank", "energy", "reading", "computing", "writing", "0.5, 0.333, 0.167"):
        assert word in out
    files = [folder / "adapter_model.safetensors" for folder in own.folders]
    assert report["bytes_in"] == sum(file.stat().st_size for file in files)
    assert report["bytes_out"] == (tmp_path / "merged" / "adapter_model.safetensors").stat().st_size
    assert {"reading", "computing", "writing", "total"} <= report["seconds"].keys()


def test_json_is_what_merge_json_says(own: Sites, tmp_path: Path) -> None:
    code, out, err = merge(*own.folders, "--out", "merged", "--json", cwd=tmp_path)
    assert (code, err) == (0, "")
    printed, written = json.loads(out), told(tmp_path / "merged")
    del printed["seconds"], written["seconds"]  # the rename comes after merge.json
    assert printed == written
    assert max(layer["error"] for layer in written["layers"].values()) <= 2e-6  # no method: the exact sum


def test_a_dry_run_says_what_would_happen_and_writes_nothing(own: Sites, tmp_path: Path) -> None:
    code, out, err = merge(*own.folders, "--dry-run", cwd=tmp_path)
    assert code == 0, err
    assert "32 × 32" in out
    assert "48 × 32" in out
    assert "2 to 7" in out
    code, out, _ = merge(*own.folders, "--dry-run", "--json", "--method", "flora", cwd=tmp_path)
    assert code == 0
    foreseen = json.loads(out)
    assert list(tmp_path.iterdir()) == []
    merge(*own.folders, "--out", "merged", "--method", "flora", cwd=tmp_path)
    report = told(tmp_path / "merged")
    assert foreseen["bytes_in"] == report["bytes_in"]
    assert sum(row["layers"] for row in foreseen["layers"]) == len(report["layers"])
    for row in foreseen["layers"]:
        assert row["rank"] == report["layers"][row["example"]]["rank"] == 2 + 4 + 7
    assert foreseen["clients"] == report["clients"]


def test_the_options_of_the_command_are_those_of_the_library(alike: Sites, tmp_path: Path) -> None:
    options = ["--method", "flora_na", "--set", "sweeps=3", "--weights", "3,1,1", "--rank", "3", "--dtype", "bfloat16"]
    code, _, err = merge(*alike.folders, "--out", "merged", *options, "--no-check", cwd=tmp_path)
    assert code == 0, err
    umbel.merge(
        [*alike.folders],
        tmp_path / "other",
        method="flora_na",
        options={"sweeps": 3},
        weights=[3, 1, 1],
        rank=3,
        dtype="bfloat16",
    )
    assert same_tensors(tmp_path / "merged", tmp_path / "other")
    unchecked, checked = (told(tmp_path / name)["layers"].values() for name in ("merged", "other"))
    assert {layer["rank"] for layer in unchecked} == {3}
    assert {layer["error"] for layer in unchecked} == {None}
    assert all(layer["error"] > 0 for layer in checked)


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
    ("rows", "given", "same_as", "source"),
    [
        ([5, 3, 2], [], "5,3,2", "num_examples"),
        ([5, 3, 2], ["--weights", "1,1,2.5"], "1,1,2.5", "given"),
        ([None, None, None], [], "1,1,1", "equal"),
        ([5, None, 2], [], "1,1,1", "equal"),
    ],
    ids=str,
)
def test_weights_are_the_given_ones_or_the_folders_or_equal(
    own: Sites, tmp_path: Path, rows: list[int | None], given: list[str], same_as: str, source: str
) -> None:
    copies = _with_rows(own, tmp_path, rows)
    assert merge(*copies, "--out", "merged", *given, cwd=tmp_path)[0] == 0
    assert merge(*copies, "--out", "same", "--weights", same_as, cwd=tmp_path)[0] == 0
    assert same_tensors(tmp_path / "merged", tmp_path / "same")
    report = told(tmp_path / "merged")
    numbers = [float(n) for n in same_as.split(",")]
    assert [client["weight"] for client in report["clients"]] == numbers
    assert [client["share"] for client in report["clients"]] == [n / sum(numbers) for n in numbers]
    assert report["weights_from"] == source


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
        ["--dtype", "int8"],
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line(own: Sites, tmp_path: Path, options: list[str]) -> None:
    assert mistake(*own.folders, "--out", "merged", *options, cwd=tmp_path)


def test_a_rank_that_is_none_is_a_mistake(own: Sites, tmp_path: Path) -> None:
    for rank in (0, -1):
        assert merge(*own.folders, "--out", "merged", "--rank", rank, cwd=tmp_path)[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_no_folder_no_out_and_a_file_that_is_not_there_are_mistakes(own: Sites, tmp_path: Path) -> None:
    assert merge("--out", "merged", cwd=tmp_path)[0] == 2
    assert merge(*own.folders, cwd=tmp_path)[0] == 2
    assert "nowhere" in mistake(*own.folders, "nowhere", "--out", "merged", cwd=tmp_path)


def test_what_stands_at_out_is_not_overwritten(own: Sites, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine", encoding="utf-8")
    assert "merged" in mistake(*own.folders, "--out", "merged", cwd=tmp_path)
    assert (tmp_path / "merged" / "mine.txt").read_text() == "mine"


def test_out_cannot_be_the_working_folder_nor_hold_what_is_merged(own: Sites, tmp_path: Path) -> None:
    assert mistake(*own.folders, "--out", ".", cwd=tmp_path)
    assert merge(*own.folders, "--out", "merged", cwd=tmp_path)[0] == 0
    (tmp_path / "new").mkdir()
    (copy, *_) = _with_rows(own, tmp_path / "new", [None] * 3)
    inner = copy.rename(tmp_path / "merged" / "inner")
    assert "inner" in mistake(inner, own.folders[1], "--out", "merged", cwd=tmp_path)
    assert {path.name for path in inner.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_folders_made_on_the_way_to_out_go_with_a_merge_that_failed(own: Sites, tmp_path: Path) -> None:
    copies = _with_rows(own, tmp_path, [None, None, None])
    file = copies[1] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    assert "copy-1" in mistake(*copies, "--out", "deep/down/merged", cwd=tmp_path)


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
    code, _, err = merge(*copies, "--out", "merged", "--force", cwd=tmp_path)
    assert code == 0, err
    assert any(str(*keys.values()) in note for note in told(tmp_path / "merged")["notes"])


def test_dora_is_refused(tmp_path: Path) -> None:
    kind = sites.Kind(KINDS["linear"].base, KINDS["linear"].loader, (sites.ATTENTION | {"use_dora": True},) * 2)
    own = sites.made(kind, tmp_path / "dora")
    assert "DoRA" in mistake(*own.folders, "--out", "merged", "--force", cwd=tmp_path)


@pytest.mark.parametrize("what", ["truncated", "NaN", "huge header", "pickle only", "a link out of the folder"])
def test_a_broken_folder_is_refused_by_name(own: Sites, tmp_path: Path, what: str) -> None:
    copies = _with_rows(own, tmp_path, [None, None, None])
    file = copies[1] / "adapter_model.safetensors"
    data = file.read_bytes()
    if what == "truncated":
        file.write_bytes(data[:-4])
    elif what == "NaN":
        # The last layer's: all others are written by then.
        file.write_bytes(data[:-4] + b"\x00\x00\xc0\x7f")
    elif what == "huge header":
        file.write_bytes(b"\xff" * 7 + b"\x7f" + data[8:])
    elif what == "pickle only":
        file.rename(file.with_name("adapter_model.bin"))
    else:
        file.unlink()
        file.symlink_to(own.folders[1] / file.name)
    assert "copy-1" in mistake(*copies, "--out", "merged", cwd=tmp_path)


# Full disks and kills


def _small_files() -> None:
    # A write beyond the limit fails with EFBIG as one on a full disk does with ENOSPC; Python ignores the signal.
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


def test_a_full_disk_leaves_nothing_behind(own: Sites, tmp_path: Path) -> None:
    def full(*arguments: object, cwd: Path) -> tuple[int, str, str]:
        return installed(*arguments, cwd=cwd, before=_small_files)

    assert merge(*own.folders, "--out", "whole", cwd=tmp_path)[0] == 0
    assert (tmp_path / "whole" / "adapter_model.safetensors").stat().st_size > 8192
    said = mistake(*own.folders, "--out", "merged", cwd=tmp_path, run=full)
    assert "too large" in said
    assert "merged" in said  # where
    # An older merge stands as it was.
    before = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    mistake(*own.folders, "--out", "whole", "--weights", "1,2,3", cwd=tmp_path, run=full)
    assert {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()} == before


STRUCK = """
import os, sys
signal, event, part = int(sys.argv.pop(1)), sys.argv.pop(1), sys.argv.pop(1)
def watch(name, arguments):
    global part
    if name == event and part and part in str(arguments):
        part = None
        os.kill(os.getpid(), signal)
sys.addaudithook(watch)
from umbel.cli import main
main()
"""


def struck(number: signal.Signals, event: str, part: str, *arguments: object, cwd: Path) -> int:
    """Runs the command and sends it a signal where it first does a thing to a path with `part` in it; returns its exit code."""
    line = [sys.executable, "-c", STRUCK, str(int(number)), event, part, "merge", *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env={**os.environ, **SETTINGS}, capture_output=True, timeout=60).returncode


KILLS = [("open", "merged.partial/adapter_model"), ("open", "merged.partial/merge.json"), ("os.rename", "merged.partial")]


@pytest.mark.parametrize(("event", "part"), KILLS)
def test_a_kill_leaves_no_folder_that_looks_whole_and_the_next_merge_is_right(
    own: Sites, tmp_path: Path, event: str, part: str
) -> None:
    copies = _with_rows(own, tmp_path, [1, 2, 3])
    there = set(tmp_path.iterdir())
    assert struck(signal.SIGKILL, event, part, *copies, "--out", "merged", cwd=tmp_path) == -signal.SIGKILL
    assert not (tmp_path / "merged").exists()
    assert merge(*copies, "--out", "merged", cwd=tmp_path)[0] == 0
    assert set(tmp_path.iterdir()) == {*there, tmp_path / "merged"}
    assert merge(*copies, "--out", "undisturbed", cwd=tmp_path)[0] == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_ctrl_c_leaves_nothing_behind(own: Sites, tmp_path: Path) -> None:
    assert struck(signal.SIGINT, "open", "merged.partial/merge.json", *own.folders, "--out", "merged", cwd=tmp_path) == 130
    assert list(tmp_path.iterdir()) == []
