"""A whole federation on one computer: a server, three sites and an outsider, each a machine with an address of its own.

    sudo .venv/bin/python examples/deployment/deploy.py

Makes a kit, hands its folders over, starts the server and the sites, trains run.toml on newsgroup posts that only their sites
have, compares the adapter with that of one process on the same files, shows that an outsider gets nowhere, and takes everything
down, also on Ctrl-C and on failure. Needs root, iproute2 and nginx; without network namespaces all is on 127.0.0.1,
and it says so. Exits 1 if anything was not as it should be. What each command does and says is in docs/deploy.md.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machines
from machines import Machines, MachinesError
from umbel import config
from umbel import run as running

HERE = Path(__file__).parent
UMBEL = str(Path(sys.executable).with_name("umbel"))
SITES = ("hospital-a", "hospital-b", "lab-c")
PORT = 9092
ROWS, TEST_ROWS = 300, 200


def main(folder: Path, apart: bool) -> bool:
    """Runs the whole; returns whether everything was as it should be."""
    with Machines(["server", *SITES, "outsider"], apart=apart) as net:
        show = Shown(net, folder)
        write_rows(folder, ROWS, TEST_ROWS)
        shutil.copy(HERE / "run.toml", folder / "server" / "run.toml")
        server = start_all(show, folder)
        show("server", "run", "run.toml", "--engine", "flower", "--federation", "kit/server", "--out", "federated", "--detach")
        show("server", "status", "federated")
        show("server", "run", "--resume", "federated")
        show("server", "status", "federated")
        show("server", "log", "federated")
        return all([_same(show, folder), _stranger(show, folder, server), _outsider(show, folder)])


def start_all(show: "Shown", folder: Path) -> str:
    """Makes a kit, hands its folders over, starts the server and the sites; returns the server's address."""
    server = f"{show.net.address('server')}:{PORT}"
    show("server", "kit", "init", "--server", server, "--sites", ",".join(SITES), "--out", "kit")
    for site in SITES:
        # In life: over a channel that you trust, to the person whom you trust; the server keeps no copy.
        shutil.move(folder / "server" / "kit" / site, folder / site / "kit")
    show.start("server", "kit/server/start", until="ready:")
    for site in SITES:
        show.start(site, "kit/start", "--data", "rows.jsonl", until="online:")
    return server


class Shown:
    """Runs umbel's commands on machines and prints them with what they say, as somebody in front of each would see it."""

    def __init__(self, net: Machines, folder: Path) -> None:
        self.net, self.folder = net, folder
        self.env = os.environ | {"UMBEL": UMBEL, "COLUMNS": "110", "HF_HUB_OFFLINE": "1"}

    def __call__(self, machine: str, *arguments: str, allowed: Sequence[int] = (0,)) -> str:
        """Runs `umbel …` on a machine; MachinesError where its exit code is not among those allowed."""
        print(f"\n{machine}$ umbel {shlex.join(arguments)}", flush=True)
        done = self.net.run(machine, [UMBEL, *arguments], cwd=self.folder / machine, env=self.env)
        print(done.stdout, end="", flush=True)
        if done.returncode not in allowed:
            raise MachinesError(f"{machine}: umbel {arguments[0]} ended with {done.returncode}")
        return done.stdout

    def start(self, machine: str, script: str, *arguments: str, until: str) -> subprocess.Popen[str]:
        """Starts what stays, and waits for a word of its output."""
        print(f"\n{machine}$ {shlex.join([script, *arguments])}", flush=True)
        log = self.folder / machine / "output.log"
        with log.open("w", encoding="utf-8") as file:
            process = self.net.start(
                machine, [script, *arguments], cwd=self.folder / machine, env=self.env, stdout=file, stderr=file
            )
        machines.wait_for(log, until, process)
        print(log.read_text(encoding="utf-8"), end="", flush=True)
        return process


def write_rows(folder: Path, rows: int, test_rows: int) -> None:
    """Writes each site's posts, which differ in topics, into its own folder, and the server's test rows into the server's."""
    labels = tomllib.loads((HERE / "run.toml").read_text(encoding="utf-8"))["data"]["labels"]
    posts = {part: _posts(part, labels) for part in ("train", "test")}
    draw = random.Random(1)
    for number, site in enumerate(SITES):
        weights = {label: 4 if (place - number) % len(SITES) == 0 else 1 for place, label in enumerate(labels)}
        pool = sorted(posts["train"], key=lambda row: draw.random() ** (1 / weights[row["label"]]), reverse=True)
        _write(folder / site / "rows.jsonl", pool[:rows])
        posts["train"] = pool[rows:]
    _write(folder / "server" / "test.jsonl", draw.sample(posts["test"], test_rows))


def _posts(part: str, labels: list[str]) -> list[dict[str, str]]:
    import orangecontrib

    file = Path(orangecontrib.__path__[0]) / "text" / "datasets" / f"20newsgroups-{part}.tab"
    with file.open(encoding="utf-8", newline="") as lines:
        header, _, _, *rows = csv.reader(lines, delimiter="\t")
    label, text = header.index("Category"), header.index("Text")
    whole = (row for row in rows if len(row) == len(header))
    return [{"label": row[label], "text": row[text]} for row in whole if row[label] in labels and row[text].strip()]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _same(show: Shown, folder: Path) -> bool:
    """Trains the same file in one process, with all sites' rows in one folder, and compares the adapters."""
    together = folder / "together"
    together.mkdir()
    for site in SITES:
        shutil.copy(folder / site / "rows.jsonl", together / f"{site}.jsonl")
    for name in ("run.toml", "test.jsonl"):
        shutil.copy(folder / "server" / name, together / name)
    print("\n# The same run file in one process, with all rows in one place", flush=True)
    os.chdir(together)
    # What `umbel run run.toml --out local` does, without the baselines that it would train beside.
    running.run(config.read(together / "run.toml"), together / "local", baselines=False)
    hashes = {
        "federation": _adapter(folder / "server" / "federated"),
        "one process": _adapter(together / "local"),
    }
    for where, digest in hashes.items():
        print(f"  adapter of {where:<12} {digest}")
    return _said("the same bytes", hashes["federation"] == hashes["one process"])


def _adapter(folder: Path) -> str:
    files = sorted((folder / "adapter").glob("*.safetensors"))  # the adapter, and the head that was averaged beside it
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _stranger(show: Shown, folder: Path, server: str) -> bool:
    """Starts sites that are no part of the federation: with a key of its own, and with a CA of its own."""
    strange = folder / "outsider"
    shutil.copytree(
        folder / SITES[0] / "kit", strange / "kit", ignore=shutil.ignore_patterns("site.*", "state", "logs", "flower")
    )
    shutil.copy(folder / SITES[0] / "kit" / "site.toml", strange / "kit" / "site.toml")
    shutil.copy(folder / SITES[0] / "rows.jsonl", strange / "rows.jsonl")
    show("outsider", "site", "key", "--out", "kit")
    key = show("outsider", "site", "start", "kit", "--data", "rows.jsonl", allowed=(1,))
    show("outsider", "kit", "init", "--server", server, "--sites", SITES[0], "--out", "other")
    ca = show("outsider", "site", "start", f"other/{SITES[0]}", "--data", "rows.jsonl", allowed=(1,))
    return all(
        [_said("an unknown key is refused", "does not know" in key), _said("another CA is refused", "not the server" in ca)]
    )


def _outsider(show: Shown, folder: Path) -> bool:
    """Tries the server's port without a key, and what only the operator may."""
    config = tomllib.loads((folder / "server" / "kit" / "server" / "flower" / "config.toml").read_text(encoding="utf-8"))
    superlink = config["superlink"]["umbel"]["address"].rpartition(":")[2]
    shutil.copy(folder / SITES[0] / "kit" / "ca.crt", folder / "outsider" / "ca.crt")
    told = [show.net.address("server"), str(PORT), "ca.crt", superlink]
    print(f"\noutsider$ python outsider.py {' '.join(told)}", flush=True)
    done = show.net.run("outsider", [sys.executable, str(HERE / "outsider.py"), *told], cwd=folder / "outsider")
    print(done.stdout, end="", flush=True)
    if not show.net.apart:
        print("  (all machines are this one, so its loopback interface is not outside)")
        return True
    return _said("an outsider gets nowhere", done.returncode == 0)


def _said(what: str, holds: bool) -> bool:
    print(f"{'ok' if holds else 'NOT'}: {what}", flush=True)
    return holds


def _terminated(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep all folders here; a temporary folder, deleted at the end, if not given")
    parser.add_argument("--loopback", action="store_true", help="no namespaces: everything on 127.0.0.1")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, _terminated)
    why_not = "as asked by --loopback" if given.loopback else machines.allowed()
    if why_not:
        print(f"No network namespaces ({why_not}): all machines are this one, at 127.0.0.1.")
    with tempfile.TemporaryDirectory() as temporary:
        place = (given.out or Path(temporary)).resolve()
        if place.exists() and any(place.iterdir()):
            sys.exit(f"{place} is not empty; give another --out")
        for machine in ("server", *SITES, "outsider"):
            (place / machine).mkdir(parents=True)
        try:
            sys.exit(0 if main(place, apart=not why_not) else 1)
        except MachinesError as error:
            sys.exit(f"deploy: {error}")
        except KeyboardInterrupt:
            sys.exit("deploy: stopped; everything is taken down")
