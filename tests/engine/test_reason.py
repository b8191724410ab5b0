"""What a client's failure tells the operator of the server: type, message and place, and no row."""

import json
import re
import tempfile
from pathlib import Path

import pytest

from umbel.client import data
from umbel.client.split import split
from umbel.config import ConfigError, configs
from umbel.engine.reasons import MOST_REASON, reason
from umbel.method import MethodError
from umbel.server import Refused
from umbel.wire import WireError

NAME = "Jane O'Neil"
BOTH = NAME + ' "J"'


def config(sections):
    """The configuration of a run with these sections."""
    given = {"model": {"name": "m"}, "data": {"train": "a", "test": "b"}, "split": {"clients": 2}}
    return configs({**given, "lora": {"target_modules": ["q"]}, **sections})["fedit"]


def caught(make):
    try:
        make()
    except Exception as error:
        return reason(error)
    raise AssertionError("nothing was raised")


def raising(error):
    def make():
        raise error

    return make


def unreadable():
    json.loads('{"patient": "Jane Doe", }')


def key():
    {"age": 3}["Jane Doe"]


def number():
    float("Jane Doe")


def undecodable():
    b"Jane Doe \xe9".decode()


def missing_file():
    Path("/records/jane-doe/rows.jsonl").read_text()


def values_of_a_column():
    rows = [{"text": "ship", "label": "sea", "patient": name} for name in ("Jane", "Doe")]
    own = {"split": {"kind": "by", "column": "patient", "clients": 3}}
    split(config(own), rows, rows, [0, 0], None)


def no_header():
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "rows.csv"
        place.write_text("Jane,4711\nDoe,4712\n")
        data.load(config({"data": {"train": str(place), "test": str(place)}}))


HELD = {
    "a key": (key, "KeyError: … (test_reason.py:"),
    "a key that is a number": (raising(KeyError(4711001)), "KeyError: … (test_reason.py:"),
    "a key that is a pair": (raising(KeyError(("Jane Doe", 4711001))), "KeyError: … ("),
    "a number that is none": (number, "ValueError: could not convert string to float: … ("),
    "a line that is no JSON": (unreadable, "JSONDecodeError: "),
    "bytes that are no text": (undecodable, "UnicodeDecodeError: … codec can't decode byte 0xe9 in position 9: "),
    "a file": (missing_file, "FileNotFoundError: [Errno 2] No such file or directory: … (pathlib.py:"),
    "single quotes": (raising(ValueError("row 'Jane Doe' is odd")), "ValueError: row … is odd ("),
    "double quotes": (raising(ValueError('row "Jane Doe" is odd')), "ValueError: row … is odd ("),
    "back quotes": (raising(ValueError("row `Jane Doe` is odd")), "ValueError: row … is odd ("),
    "curly quotes": (raising(ValueError("row ‘Jane Doe’ or “Jane Doe” is odd")), "ValueError: row … or … is odd ("),
    "angle quotes": (raising(ValueError("row «Jane Doe» is odd")), "ValueError: row … is odd ("),
    "bytes": (raising(ValueError(f"got {b'Jane Doe'!r}, allowed: text")), "ValueError: got …, allowed: text ("),
    "a repr with an apostrophe": (
        raising(ValueError(f"got {NAME!r}, allowed: a label")),
        "ValueError: got …, allowed: a label (",
    ),
    "a repr with both quotes": (raising(ValueError(f"got {BOTH!r}, allowed: x")), "ValueError: got …, allowed: x ("),
    "a repr that was cut": (raising(ValueError(f"got {'Jane Doe'!r:.5}, allowed: x")), "ValueError: got … ("),
    "an apostrophe in single quotes": (raising(ValueError(f"got '{NAME}', allowed: x")), "ValueError: got … ("),
    "quotes inside quotes": (raising(ValueError("bad 'he said 'no' Jane Doe 'x''")), "ValueError: bad … ("),
    "two names": (raising(ValueError("'Jane' and 'Doe' differ")), "ValueError: … and … differ ("),
    "an apostrophe of ours": (raising(ValueError("this can't be 'Jane Doe'")), "ValueError: this can't be … ("),
    "a row over several lines": (raising(ValueError("bad:\n  'Jane\nDoe'\n")), "ValueError: bad: … ("),
    "a configuration that quotes a row": (
        raising(ConfigError("data.train: no column 'x' in {'name': 'Jane Doe'}")),
        "ConfigError: data.train: no column … (",
    ),
    "a configuration that shows columns without quotes": (
        raising(ConfigError("data.max_length: got 4, of the columns ['age']. Columns found: Jane, Doe")),
        "ConfigError: data.max_length: got 4, of the columns … (",
    ),
    "values of a column": (values_of_a_column, "ConfigError: split.clients: got 3, but the column has 2 values … (split.py:"),
    "a table whose header is a row": (no_header, "ConfigError: data.train = … (data.py:"),
    "a list of names": (raising(ValueError(["Jane", "Doe"])), "ValueError: […, …] ("),
}


@pytest.mark.parametrize(("make", "says"), HELD.values(), ids=HELD)
def test_a_failure_is_told_without_what_it_quotes(make, says):
    told = caught(make)
    assert told.startswith(says)
    for word in ("Jane", "jane", "Doe", "Neil", "471", "records"):
        assert word not in told


@pytest.mark.parametrize("kind", [WireError, MethodError, Refused])
def test_errors_of_ours_that_carry_no_rows_are_told_whole(kind):
    assert caught(raising(kind("layer 'wide': got rank 3"))).startswith(
        f"{kind.__name__}: layer 'wide': got rank 3 (test_reason.py:"
    )


@pytest.mark.parametrize("length", [10, 200, 299, 300, 10**5])
@pytest.mark.parametrize("kind", [ValueError, WireError])
def test_a_reason_is_bounded_and_keeps_its_place(kind, length):
    told = caught(raising(kind("x" * length)))
    assert len(told) <= MOST_REASON
    assert told.startswith(f"{kind.__name__}: xxx")
    assert "(test_reason.py:" in told


def test_the_place_is_a_file_and_a_line_without_directories():
    told = caught(missing_file)
    assert "/" not in told
    assert re.search(r" \(pathlib\.py:\d+\)$", told)


def test_an_error_that_was_never_raised_has_no_place():
    assert reason(RuntimeError("out of memory")) == "RuntimeError: out of memory (place unknown)"
