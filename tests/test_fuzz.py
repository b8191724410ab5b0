"""A short run of the fuzzer; `python tests/fuzz.py --seconds 300` is the long one."""

import re
import subprocess
import sys
from pathlib import Path


def test_ten_seconds_of_bent_messages_bring_nothing_but_refusals() -> None:
    """In a process of its own, since it holds the process's memory to a bound."""
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "--seconds", "10", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=85)
    assert done.returncode == 0, done.stderr
    found = re.search(r"^(\d+) bent messages: (\d+) refused for (\d+) reasons, (\d+) accepted", done.stdout, re.MULTILINE)
    assert found, done.stdout
    bent, refused, reasons, accepted = map(int, found.groups())
    assert bent == refused + accepted
    assert refused > bent / 2
    assert reasons >= 12
