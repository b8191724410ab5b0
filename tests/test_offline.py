"""Runs by carried files: the bits of a local run, what is refused and why, and kills in mid-work."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import tiny
from umbel import envelope, kit, offline
from umbel import run as running
from umbel.config import ConfigError
from umbel.engine import Waiting
from umbel.envelope import EnvelopeError
from umbel.record import RecordError
from umbel.server import ServerError

SITES = ["hospital-a", "hospital-b", "lab-c"]
METHODS = [{"name": "fedit"}, {"name": "fedsa_lora"}]


class Federation:
    """A kit, a run in `folder`, and somebody who carries."""

    def __init__(self, place: Path, table: dict[str, Any], own: dict[str, Path] | None = None) -> None:
        kit.init(place / "kit", "fed.example.org", SITES)
        for name in SITES:
            kit.update_site(place / "kit" / name, data=str(own[name]) if own else "run")
        self.place, self.kit, self.server, self.folder = place, place / "kit", place / "kit" / "server", place / "run"
        self.table = table

    def begin(self) -> list[dict[str, Any]]:
        with pytest.raises(Waiting) as waiting:
            offline.begin(self.table, self.folder, self.server)
        return waiting.value.asked

    def go_on(self) -> list[dict[str, Any]]:
        """Goes on; returns what is waited for, nothing where all is done."""
        try:
            offline.go_on(self.folder)
        except Waiting as waiting:
            return waiting.asked
        return []

    def answered(self, asked: dict[str, Any]) -> Path:
        """Has a site answer a request; returns the reply."""
        out = self.place / "stick" / asked["site"] / Path(asked["request"]).name
        offline.answer(self.kit / asked["site"], self.folder / asked["request"], out)
        return out

    def bring(self, asked: list[dict[str, Any]]) -> None:
        files = [self.answered(own) for own in asked if own["state"] == "missing"]
        states = [(own.state, own.reason) for own in offline.take(self.folder, self.server, files)]
        assert states == [("taken", "")] * len(files)

    def take(self, *files: Path) -> list[tuple[str, str]]:
        return [(own.state, own.reason) for own in offline.take(self.folder, self.server, list(files))]

    def finish(self, asked: list[dict[str, Any]]) -> int:
        """Carries until nobody is waited for; returns the number of trips."""
        trips = 0
        while asked:
            self.bring(asked)
            asked, trips = self.go_on(), trips + 1
        return trips


def adapters(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("*/adapter/*.safetensors"))}


def test_carried_files_give_the_bits_of_a_local_run_for_all_methods_of_a_job(tmp_path):
    table = tiny.table(tmp_path, METHODS)
    running.run(table, tmp_path / "local", baselines=False)
    federation = Federation(tmp_path, table)
    asked = federation.begin()
    assert [own["run"] for own in asked] == ["fedit"] * 3 + ["fedsa_lora"] * 3  # one trip serves both
    trips = federation.finish(asked)
    assert trips == 4  # opening, two rounds, and FedSA-LoRA's last gathering
    assert adapters(federation.folder) == adapters(tmp_path / "local")
    assert len(adapters(federation.folder)) == 4  # factors and head of two methods
    assert not (federation.folder / "outbox").exists()
    assert offline.waiting(federation.folder) == []
