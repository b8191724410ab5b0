"""Runs a candidate program with its tests in a process of its own, within limits.

This is a guard against accidents of a model that writes code, no jail for code that wants to break out: it runs as the same
user, may read what that user may read, and a program that looks through the interpreter's frames finds the token by which
success is told. Run strangers' models in a container or a virtual machine.
"""

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a program may use: seconds on the clock and of the processor, bytes of memory, bytes of one file."""

    seconds: float = 10.0
    memory: int = 1 << 30
    file_size: int = 1 << 20


GUARD = r"""
import json, os, sys, types
import ctypes, resource

given = json.loads(sys.stdin.read())
home, out = os.getcwd(), os.dup(1)
nothing = os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(nothing, stream)

# An empty network namespace, where the kernel lets a plain user have one.
try:
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)  # CLONE_NEWUSER | CLONE_NEWNET
except (OSError, AttributeError):
    pass

for name, most in given["limits"].items():
    try:
        resource.setrlimit(getattr(resource, name), (most, most))
    except (AttributeError, ValueError, OSError):  # not every system has every limit
        pass

FORBIDDEN = ("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "os.killpg", "os.remove",
             "os.rmdir", "os.rename", "os.truncate", "os.chmod", "os.chown", "os.link", "os.symlink", "os.chdir", "os.fchdir",
             "subprocess.", "_posixsubprocess.", "pty.", "socket.", "ctypes.", "signal.pthread_kill", "shutil.rmtree",
             "resource.setrlimit", "_thread.start_new_thread")

def refuse(event, arguments):
    if event.startswith(FORBIDDEN):
        raise PermissionError(event + " is not for a candidate")
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        path = arguments[0]
        if isinstance(path, int):
            return
        place = os.path.realpath(os.fsdecode(path))
        if place != os.devnull and not place.startswith(home + os.sep):
            raise PermissionError("writing outside the candidate's folder")

sys.addaudithook(refuse)
module = types.ModuleType("candidate")  # not __main__: code under `if __name__ == "__main__"` is no part of the answer
sys.modules["candidate"] = module
try:
    exec(compile(given["program"], "candidate", "exec"), module.__dict__)
    said = given["token"]
except BaseException as error:
    said = (type(error).__name__ + ": " + str(error))[:200]
os.write(out, said.encode(errors="replace"))
os._exit(0)
"""
"""What the other process runs: it puts itself within the limits, runs the program, and only then says the token."""


def failure(program: str, limits: Limits = Limits()) -> str | None:
    """Runs a program (a candidate and its tests) to its end.

    It runs in `python -I`, in an empty temporary folder, without input, environment and network, and with limits on
    processor, clock, memory, file size, open files and processes; its process group is killed at the end. It has passed when
    its last line was reached: leaving early, by whatever exit code, is a failure.

    Args:
        program: Python.
        limits: What it may use.

    Returns:
        None where it passed, else why not, in a few words.
    """
    token = secrets.token_hex(16)
    seconds = max(1, round(limits.seconds))
    bounds = {
        "RLIMIT_CPU": seconds,
        "RLIMIT_AS": limits.memory,
        "RLIMIT_FSIZE": limits.file_size,
        "RLIMIT_NOFILE": 32,
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
    }
    given = json.dumps({"program": program, "token": token, "limits": bounds}).encode()
    with tempfile.TemporaryDirectory(prefix="umbel-candidate-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", GUARD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=os.path.realpath(folder),
            env={},
            start_new_session=True,
        )
        try:
            said = process.communicate(given, timeout=limits.seconds)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            return f"more than {limits.seconds:g} seconds"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.communicate()
    if said == token:
        return None
    if process.returncode < 0:
        return f"killed by {signal.Signals(-process.returncode).name}"
    return said.replace(token, "")[:200] or f"left before its tests were done, with exit code {process.returncode}"


def code_of(text: str) -> str:
    r"""Returns the code in a model's reply: its first fenced block, to the end where the fence is not closed, else all of it.

    >>> code_of("Here it is:\n```python\nx = 1\n```\nIt sets x.")
    'x = 1\n'
    """
    block = re.search(r"```[^\n]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return block[1] if block else text
