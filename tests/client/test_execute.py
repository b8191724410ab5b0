"""Programs that work, that do not, and that would do harm, each run for real."""

import os
import socket
import time

import pytest

from umbel.client.execute import Limits, code_of, failure

QUICK = Limits(seconds=2, memory=1 << 28, file_size=1 << 16)
TESTS = "\nassert add(1, 2) == 3\nassert add(-1, 1) == 0\n"
RIGHT = "def add(a, b):\n    return a + b\n"


def test_a_right_solution_passes_and_a_wrong_one_says_why():
    assert failure(RIGHT + TESTS) is None
    assert failure("def add(a, b):\n    return a - b\n" + TESTS) == "AssertionError: "
    assert failure("def add(a, b) return" + TESTS).startswith("SyntaxError")
    assert failure("def plus(a, b):\n    return a + b\n" + TESTS) == "NameError: name 'add' is not defined"


@pytest.mark.parametrize(
    "leave",
    ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "exit()", "quit()", "raise KeyboardInterrupt"],
)
def test_who_leaves_before_the_tests_has_failed(leave):
    assert failure(f"{leave}\n{RIGHT}{TESTS}", QUICK)
    assert failure(f"def add(a, b):\n    {leave}\n{TESTS}", QUICK)


def test_printing_is_no_way_to_pass():
    assert failure("print('passed')\nimport sys\nsys.stdout.flush()\nassert False", QUICK) == "AssertionError: "
    loud = """
import os
for fd in range(20):
    try:
        os.write(fd, b"0" * 32)
    except OSError:
        pass
os._exit(0)
"""
    assert failure(loud, QUICK) == "0" * 32


def test_an_endless_loop_ends_within_its_time():
    began = time.monotonic()
    assert failure("while True: pass" + TESTS, QUICK) in ("more than 2 seconds", "killed by SIGXCPU", "killed by SIGKILL")
    assert failure("import time\ntime.sleep(60)" + TESTS, QUICK) == "more than 2 seconds"
    assert time.monotonic() - began < 8


def test_an_endless_loop_that_catches_everything_ends_too():
    stubborn = """
import signal
signal.signal(signal.SIGXCPU, signal.SIG_IGN)
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
"""
    assert failure(stubborn, QUICK)


def test_memory_is_bounded():
    assert failure("x = bytearray(1 << 29)" + TESTS, QUICK).startswith("MemoryError")
    assert failure("x = []\nwhile True: x.append('a' * 100_000)", QUICK)


def test_no_process_and_no_thread_is_begun():
    for code in (
        "import os\nwhile True: os.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nassert os.system('true') == 0",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print).start()",
        "import ctypes\nctypes.CDLL(None).fork()",
    ):
        assert "is not for a candidate" in failure(code + "\n" + RIGHT + TESTS, QUICK), code


def test_files_stay_small_and_in_the_folder(tmp_path):
    assert failure("open('note', 'w').write('x' * 1000)\nassert open('note').read() == 'x' * 1000", QUICK) is None
    assert failure("open('big', 'wb').write(b'x' * 1_000_000)", QUICK)
    mine = tmp_path / "mine"
    mine.write_text("kept")
    for code in (
        f"open({str(mine)!r}, 'w')",
        f"import os\nos.open({str(mine)!r}, os.O_WRONLY)",
        f"import os\nos.remove({str(mine)!r})",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        f"import os\nos.chdir({str(tmp_path)!r})",
    ):
        assert failure(code, QUICK).startswith("PermissionError"), code
    assert mine.read_text() == "kept"


def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert failure(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))", QUICK).startswith("PermissionError")
        assert failure(f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')", QUICK)
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


def test_nothing_of_ours_is_passed_on(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_OF_OURS", "x")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ours.py").write_text("")
    assert failure("import os\nassert 'SECRET_OF_OURS' not in os.environ\nassert os.listdir('.') == []", QUICK) is None
    assert failure("import ours", QUICK) == "ModuleNotFoundError: No module named 'ours'"
    assert failure("input()", QUICK).startswith("EOFError")
    assert os.listdir(tmp_path) == ["ours.py"]


def test_dataclasses_and_main_blocks_work_as_in_a_module():
    code = """
from dataclasses import dataclass
@dataclass
class Point:
    x: int
if __name__ == "__main__":
    1 / 0
assert Point(1).x == 1
"""
    assert failure(code, QUICK) is None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1\n", "x = 1\n"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("So:\n```\nx = 1\n```\nand\n```python\nx = 2\n```", "x = 1\n"),
        ("```py\nx = 1", "x = 1"),
        ("```python\n    return 1\n```", "    return 1\n"),
    ],
)
def test_code_is_the_first_block(text, code):
    assert code_of(text) == code
