"""umbel as a Flower app: the thin folder, and runs in Flower's simulation with the bits of the local engine."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, cast

import pytest
import tomli_w
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

import tiny
from recorded import lines
from umbel import __version__, app, federation, kit
from umbel.config import ConfigError

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "flower-strategy"


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_folder_for_flwr_run_is_the_app_that_umbel_submits() -> None:
    folder = project(ROOT / "app")
    assert folder["tool"]["flwr"]["app"] == federation.APP["tool"]["flwr"]["app"]
    assert folder["project"]["name"] == federation.APP["project"]["name"]
    assert folder["project"]["version"] == federation.APP["project"]["version"] == __version__


@pytest.mark.parametrize(("component", "kind"), [("serverapp", ServerApp), ("clientapp", ClientApp)])
def test_its_components_exist(component: str, kind: type) -> None:
    module, name = project(ROOT / "app")["tool"]["flwr"]["app"]["components"][component].split(":")
    assert isinstance(getattr(importlib.import_module(module), name), kind)


@pytest.mark.parametrize("component", ["serverapp", "clientapp"])
def test_the_components_of_the_example_are_in_its_folder(component: str) -> None:
    module, name = project(EXAMPLE)["tool"]["flwr"]["app"]["components"][component].split(":")
    source = (EXAMPLE / f"{module}.py").read_text(encoding="utf-8")
    assert f"\n{name} = {'ServerApp' if component == 'serverapp' else 'ClientApp'}()\n" in source


def test_results_lie_beside_the_run_file_where_no_other_place_is_given() -> None:
    assert app._own_paths({"config": "/data/mine.toml", "out": ""}) == (Path("/data/mine.toml"), Path("/data/runs/mine"))
    assert app._own_paths({"config": "/data/mine.toml", "out": "/results"})[1] == Path("/results")


@pytest.mark.parametrize("given", [{"config": "run.toml"}, {"config": "/data/run.toml", "out": "runs/x"}, {}])
def test_paths_that_depend_on_the_working_folder_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="wanted a whole path"):
        app._own_paths(given)


def test_a_simulation_with_fewer_nodes_than_clients_is_refused_with_the_option_to_give() -> None:
    app._check_partitions(3, 3)
    with pytest.raises(ConfigError, match="3 clients, the simulation 2 nodes; add: --federation-config 'num-supernodes=3'"):
        app._check_partitions(3, 2)


def test_a_list_of_sites_that_is_no_good_ends_no_run(tmp_path: Path) -> None:
    federation = kit.init(tmp_path / "kit", "fed.example.org", ["a", "b"])
    nodes = app.Sites(cast(Any, None), federation)
    assert nodes.clients == [0, 1]
    kit.revoke(tmp_path / "kit", "a")
    assert nodes.clients == [1]
    good = (federation.folder / "sites.json").read_bytes()
    for bad in (b"", b"[{}]", good.replace(b'"active"', b'"activ"')):
        (federation.folder / "sites.json").write_bytes(bad)
        assert nodes.clients == [1]
    (federation.folder / "sites.json").write_bytes(good)
    kit.join(tmp_path / "kit", "c")
    assert nodes.clients == [1, 2]


def run(folder: Path, table: dict[str, Any], engine: str) -> tuple[Path, str]:
    """Runs the command, and returns the job's folder and what it printed."""
    (folder / "run.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
    arguments = ["run", "run.toml", "--engine", engine, "--out", engine]
    code = "from umbel.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / engine, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_flowers_simulation_gives_the_bytes_of_the_local_engine_and_is_quiet(tmp_path: Path) -> None:
    labels = ("fedit", "fedsa_lora", "power")
    table = tiny.table(tmp_path, [{"name": label} for label in labels])
    local, _ = run(tmp_path, table, "local")
    simulated, said = run(tmp_path, table, "ray")
    for label in labels:
        ours, theirs = (folder / label / "adapter" / "adapter_model.safetensors" for folder in (local, simulated))
        assert ours.read_bytes() == theirs.read_bytes()
        for one, other in zip(lines(local / label), lines(simulated / label), strict=True):
            assert other["refused"] == []
            for key in ("phase", "answered", "local", "global", "aggregation_error", "rank"):
                assert one[key] == other[key], key
    assert "DEPRECATED" not in said
    assert "INFO" not in said


ONCE = '''
"""FedIT, at which the first client to train fails."""

import os
from dataclasses import dataclass

from umbel.method import Download, Method


@dataclass(frozen=True)
class Once(Method):
    marker: str = ""

    def combine(self, got, held):
        return Download(factors=got)

    def trained(self, before, after):
        try:
            os.mkdir(self.marker)
        except FileExistsError:
            return after
        raise RuntimeError("no disk, patient 'Jane Doe'")
'''


@pytest.mark.slow
def test_a_client_that_fails_is_refused_with_the_reason_and_the_round_goes_on(tmp_path: Path) -> None:
    (tmp_path / "ones_own").mkdir()
    (tmp_path / "ones_own" / "__init__.py").touch()
    (tmp_path / "ones_own" / "once.py").write_text(ONCE, encoding="utf-8")
    method = {"name": "ones_own.once", "label": "once", "marker": str(tmp_path / "failed")}
    folder, _ = run(tmp_path, tiny.table(tmp_path, method, server={"min_clients": 1}), "ray")
    trained = [line for line in lines(folder) if line["phase"] == "train"]
    assert [len(line["answered"]) for line in trained] == [2, 3]
    (refused,) = trained[0]["refused"]
    reason = refused["reason"]
    assert refused["client"] not in trained[0]["answered"]
    assert reason.startswith("RuntimeError: no disk, patient …")
    assert "once.py:" in reason
    assert "Jane" not in reason
