"""kill -9 at random moments, resume, and end with the bytes of the run that nobody disturbed."""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w

import tiny

METHODS = [
    {"name": "fedit", "training": {"optimizer_state": "keep"}},
    {"name": "florist", "adopt": "merge", "energy": 0.9},
    {"name": "fed_sb", "server": {"clients_per_round": 2}},
    {"name": "fedsa_lora", "training": {"optimizer_state": "keep"}, "server": {"clients_per_round": 2}},
    {"name": "rolora", "training": {"optimizer_state": "keep"}},
    {"name": "hetlora", "gamma": 0.5, "lora": {"r": [2, 4, 8]}},
    {"name": "power", "iterations": 2, "lora": {"r": [2, 4, 8]}, "server": {"clients_per_round": 2}},
    {"name": "fedit", "label": "int8", "wire": {"dtype": "int8"}, "server": {"clients_per_round": 2}},
]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "umbel.cli", "run", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def finish(*arguments: object) -> None:
    done = subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def fingerprints(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("**/adapter/*")) + sorted(folder.glob("**/checkpoint.safetensors"))
    result = {}
    for file in files:
        data = file.read_bytes()
        if file.name == "checkpoint.safetensors":
            from umbel import wire

            tensors = wire.decode(data).tensors  # the header holds seconds, which differ
            data = b"".join(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))
        result[str(file.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return result


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(tmp_path: Path) -> None:
    table = tiny.table(tmp_path, METHODS, rounds=5, training={"max_steps": 6, "optimizer_state": "reset"})
    config = tmp_path / "job.toml"
    config.write_text(tomli_w.dumps(table), encoding="utf-8")
    finish(config, "--out", tmp_path / "whole")

    broken = tmp_path / "broken"
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    kills = 0
    for _ in range(8):
        arguments = ["--resume", broken] if (broken / "job.toml").exists() else [config, "--out", broken]
        process = subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = time.monotonic()
        # Moments count from the first sign of work, since most of the time goes into imports.
        before = _newest(broken)
        while process.poll() is None and _newest(broken) == before and time.monotonic() - started < 60:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.5))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    finish("--resume", broken)
    assert kills >= 4, f"seed {seed}: the run was too quick to be killed often"
    assert fingerprints(broken) == fingerprints(tmp_path / "whole"), f"seed {seed}, {kills} kills"


def _newest(folder: Path) -> float:
    """Returns the time of the latest write to a run's record; 0 before the first."""
    times = [0.0]
    for member in ("fedit", "florist", "fed_sb", "central", *(f"local/client-{k}" for k in range(3))):
        # By name and not by glob: folders come and go under the eyes of this loop.
        with contextlib.suppress(FileNotFoundError):
            times.append((folder / member / "rounds.jsonl").stat().st_mtime)
    return max(times)


def test_ctrl_c_keeps_finished_rounds_and_says_how_to_go_on(tmp_path: Path) -> None:
    config = tmp_path / "job.toml"
    config.write_text(tomli_w.dumps(tiny.table(tmp_path, rounds=200)), encoding="utf-8")
    process = subprocess.Popen(
        command(config, "--out", tmp_path / "run"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    rounds = tmp_path / "run" / "rounds.jsonl"
    deadline = time.monotonic() + 60
    while not (rounds.exists() and rounds.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert f"umbel run --resume {tmp_path / 'run'}" in errors
    assert "Traceback" not in errors
