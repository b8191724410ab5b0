"""One federation of three sites on loopback addresses, as a user would start it, for all tests of this folder."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

import tiny
from test_deployment import Place, Started, until

pytest.importorskip("flwr", reason="flwr is not installed")
if shutil.which("nginx", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])) is None:
    pytest.skip("nginx is not installed: apt install nginx", allow_module_level=True)

SITES = ("hospital-a", "hospital-b", "lab-c")


class Network(Place):
    """A server and three sites that run."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self.sites: dict[str, Started] = {}
        self.hostile = ""

    def start_site(self, name: str, *options: str) -> None:
        """Starts a site, or starts it again with other options."""
        if name in self.sites:
            self.sites[name].stop()
        started = Started(self.kit.parent, "site", "start", str(self.kit / name), *(options or ("--data", "run")))
        self.all.append(started)
        self.sites[name] = started
        started.wait_for("online: ", 120)

    def start_sites(self) -> None:
        """Starts all that do not run."""
        for name in SITES:
            if name not in self.sites or self.sites[name].process.poll() is not None:
                self.start_site(name)
        until(lambda: all(self.status(name) == "online" for name in SITES), 120)

    def run(self, name: str, table: dict, *arguments: str) -> Started:
        """Starts `umbel run --engine flower` and does not wait for it."""
        (self.folder / f"{name}.toml").write_text(tomli_w.dumps(table))
        started = Started(
            self.folder, "run", f"{name}.toml", "--engine", "flower", "--federation", str(self.kit / "server"),
            "--out", name, *arguments,
        )  # fmt: skip
        self.all.append(started)
        return started

    def lines(self, name: str) -> list[dict]:
        path = self.folder / name / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def local(self, name: str, table: dict) -> None:
        """Runs the same in one process."""
        from umbel.run import run

        run(table, self.folder / name, baselines=False)


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    os.environ["OMP_NUM_THREADS"] = "1"
    made = Network(tmp_path_factory.mktemp("network"))
    try:
        made.start_sites()
        yield made
    finally:
        for started in reversed(made.all):
            started.stop()


@pytest.fixture
def table(network: Network) -> dict:
    """A tiny run that all three sites can read the rows of."""
    place = network.folder / "tiny"
    place.mkdir(exist_ok=True)
    return tiny.table(place, data={"labels": list(tiny.TOPICS)}, server={"round_deadline": 120.0})
