"""A server and three sites on loopback addresses, as a user would start them."""

import json
from pathlib import Path

import tomli_w

from test_deployment import Place, Started, until

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
