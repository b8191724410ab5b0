"""Bent messages through decoding and admission of real rounds: `python tests/fuzz.py --seconds 300 [--seed 1]`.

In every round three clients are honest and the others' honest replies are bent: bits, lengths, JSON, shapes, numbers. Nothing
but the server's own refusals may come of it, every round must end, and memory must stay below a bound that follows from what an
honest upload can have. Prints what was refused, by reason; exits with an error where one of these does not hold.
"""

import argparse
import json
import pickle
import random
import re
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from test_loop import LAYERS, SHAPES, Client
from umbel import wire
from umbel.engine import Ask, Reply
from umbel.loop import Plan, federate
from umbel.method import load
from umbel.record import Record
from umbel.server import Aggregator, Server

HONEST, BENT = 3, 60
METHODS: list[dict[str, Any]] = [
    {"name": "fedit"},
    {"name": "florist", "energy": 0.9},
    {"name": "flora_na"},
    {"name": "fed_sb", "init": "gradient"},
    {"name": "fed_sb"},
    {"name": "ffa_lora"},
]
DTYPES = ["float32", "bfloat16", "int8"]
JSON_TIMES = 64
"""How many times its length JSON may take when it is parsed: empty lists and objects take some 30 times, in keys twice that."""

NUMBERS: list[Any] = [
    0,
    -1,
    1,
    2,
    3,
    7,
    11,
    2**31,
    2**53,
    2**63,
    2**64,
    10**40,
    10**5000,
    0.5,
    1e308,
    True,
    None,
    "3",
    [],
    {},
    [[]],
]
FLOATS = [float("nan"), float("inf"), -float("inf"), 1e15, 1.1e15, -1e15, 3e38, 1e-45, -0.0, 0.0]

Bend = Callable[[bytes, bytes, random.Random], bytes]


def bits(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Turns a few bits, half the time only in the header."""
    bent, end = bytearray(data), len(data)
    if draw.random() < 0.5:
        end = min(end, 8 + _header_size(data))
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        bent[draw.randrange(end)] ^= 1 << draw.randrange(8)
    return bytes(bent)


def length(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Cuts, repeats, takes out or adds bytes, up to far more than is allowed."""
    a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    added = draw.choice([1, 8, 1000, 2**20, 2**21])
    return draw.choice(
        [data[:a], data[:b] + data[a:], data[:a] + data[b:], data + bytes(added), data[:a] + b"\xff" * added, b""]
    )


def splice(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """One message's header before another's numbers, or a header that says another length."""
    ours, theirs = 8 + _header_size(data), 8 + _header_size(other)
    said = draw.choice([0, 1, 7, ours, ours - 7, len(data), 2**20, 2**32, 2**63, 2**64 - 1])
    return draw.choice([data[:ours] + other[theirs:], other[:theirs] + data[ours:], struct.pack("<Q", said) + data[8:]])


def table(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Changes entries of the tensor header: shapes, dtypes, offsets, names."""
    header, body = _parts(data)
    names = [name for name in header if name != "__metadata__"]
    for _ in range(draw.choice([1, 1, 2, 4])):
        name = draw.choice(names)
        entry = header.get(name)
        what = draw.choice(
            ["shape", "data_offsets", "one of shape", "one of data_offsets", "dtype", "gone", "name", "copy", "all"]
        )
        own = entry if isinstance(entry, dict) else {}
        if what in ("shape", "data_offsets"):
            some = [draw.choice(NUMBERS) for _ in range(draw.choice([1, 2, 3, 9]))]
            own[what] = draw.choice([[], some, "x", None])
        elif what.startswith("one of "):
            numbers = own.get(what.removeprefix("one of "))
            if isinstance(numbers, list) and numbers:
                numbers[draw.randrange(len(numbers))] = draw.choice(NUMBERS)
        elif what == "dtype":
            own["dtype"] = draw.choice(["F32", "BF16", "I8", "F64", "F16", "I64", "BOOL", "U8", "", None, 3, ["F32"]])
        elif what == "gone":
            header.pop(name, None)
        elif what == "name":
            odd = ["", "|", "A", "plain|", "wide|A|scale", "x" * 5000, "\ud800|A", "tall|R", "__proto__|A"]
            header[draw.choice(odd)] = header.pop(name, {})
        elif what == "copy":
            header[name + draw.choice(["2", "|scale", " "])] = entry
        elif what == "all":
            header[name] = draw.choice(NUMBERS)
    return _whole(header, body)


def said(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Changes what the reply says beside its tensors."""
    header, body = _parts(data)
    fields = json.loads(header["__metadata__"]["umbel"])
    for _ in range(draw.choice([1, 1, 3])):
        key = draw.choice([*fields, "rows", "steps", "version", "round", "client", "rounding", "seconds", "surprise"])
        fields[key] = draw.choice([*NUMBERS, [[]] * draw.choice([10, 1000, 300_000])])
    text = _json(fields)
    header["__metadata__"] = draw.choice(
        [{"umbel": text}] * 4 + [{"umbel": text[:-2]}, {"umbel": 3}, {}, [], None, {"umbel": "[]"}]
    )
    return _whole(header, body)


def twice(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Gives an object a key twice."""
    header, body = _parts(data)
    name = draw.choice(list(header))
    text = _json(header)
    return _raw((text[:-1] + "," + _json({name: header[name]})[1:]).encode(), body)


def numbers(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Changes numbers of the tensors, few or many, in place."""
    header, body = _parts(data)
    bent = bytearray(body)
    for _ in range(draw.choice([1, 2, 50])):
        if len(bent) >= 4:
            at = draw.randrange(len(bent) // 4) * 4
            bent[at : at + 4] = struct.pack("<f", draw.choice(FLOATS))
    if draw.random() < 0.1:
        bent = bytearray(draw.choice([bytes(len(body)), b"\x7f" * len(body), draw.randbytes(len(body))]))
    return _whole(header, bytes(bent))


def bomb(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """JSON that is small and becomes large, deep JSON, and shapes of few bytes that say many."""
    size = draw.choice([500, 1000, 2000, 5000, 10_000, 100_000, 2**20 - 100])
    unit = draw.choice(['"a%d":{},', '"a%d":[[],[],[],[]],', '"a%d":[{},{},{},{},{},{}],', '"a%d":1e5,', '"%d":"",'])
    many = "{" + "".join(unit % i for i in range(size // len(unit)))[: size - 10].rpartition(",")[0] + "}"
    deep = draw.choice(['{"a":', "["])
    close = {"[": "]", '{"a":': "}"}[deep]
    count = draw.choice([50, 900, 1100, size // 8])
    texts = [many, deep * count + "1" + close * count, deep * count, "[" * size, "9" * size, '"' + "a" * size]
    text = draw.choice([*texts, many, '{"a":"' + "\\u0000" * (size // 6) + '"}'])
    if draw.random() < 0.3:  # inside the header of an otherwise honest message
        header, body = _parts(data)
        header["__metadata__"]["umbel"] = text
        return _whole(header, body)
    return _raw(text.encode(), draw.choice([b"", bytes(100)]))


def foreign(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """What is no message at all, or the message of somebody else."""
    pickled = pickle.dumps({"tall|A": [0.5] * draw.choice([1, 1000]), "os": print})
    return draw.choice(
        [pickled, struct.pack("<Q", len(pickled)) + pickled, draw.randbytes(draw.choice([7, 8, 9, 5000])), other]
    )


BENDS: list[Bend] = [bits, length, splice, table, said, twice, numbers, bomb, foreign]


def _header_size(data: bytes) -> int:
    return struct.unpack("<Q", data[:8])[0]


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = 8 + _header_size(data)
    return json.loads(data[8:end]), data[end:]


def _json(value: Any) -> str:
    sys.set_int_max_str_digits(0)  # to write what the reader must not take
    try:
        return json.dumps(value)
    finally:
        sys.set_int_max_str_digits(4300)


def _whole(header: dict[str, Any], body: bytes) -> bytes:
    return _raw(_json(header).encode(), body)


def _raw(text: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + body


class Bending:
    """Asks honest clients, and bends the replies of all but the first few.

    Args:
        draw: Chooses how.
        dtype: The wire's.
        count: How many clients' replies are bent.
    """

    def __init__(self, draw: random.Random, dtype: str, count: int) -> None:
        self.draw, self.bent = draw, 0
        self.people = {k: Client(k, dtype) for k in range(HONEST + count)}

    def ask(self, asks: Iterable[Ask]) -> Iterator[Reply]:
        other = b""
        for ask in asks:
            kind = wire.decode(ask.payload).header["kind"]
            data = self.people[ask.client].answer(ask.payload)
            if ask.client >= HONEST and kind != "open":
                bent = self.draw.choice(BENDS)(data, other, self.draw)
                self.bent += 1
                yield Reply(ask.client, bent)
            else:
                other = data
                yield Reply(ask.client, data)


def short(reason: str) -> str:
    """A reason without what differs from message to message."""
    rest = "is not JSON|not a valid message|sent|wire version|it has|it took|shape|dtype|says|missing|scales"
    reason = re.sub(rf"({rest}).*", r"\1", re.sub(r"client -?\d+", "client", reason))
    reason = re.sub(r"^(tensor|layer|parameter) '.*'", r"\1", reason)
    return re.sub(r"^(tensor) '.*", r"\1 of a long name", re.sub(r"[-+]?\d[\d.e+]*", "n", reason))[:60]


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bound() -> int:
    """Returns how much a message may add to the server's memory: itself, its tensors, these as float32, its header parsed."""
    worst = 0
    for options in METHODS:
        for phase in load(**options).plan(1):
            aggregator = Aggregator(phase, Server(SHAPES, 0, "float32", {"head": (4,)}))
            worst = max(worst, 3 * aggregator.most_bytes() + JSON_TIMES * aggregator.most_header())
    return worst


def fuzz(seconds: float, seed: int) -> tuple[Counter[str], int, int, int]:
    """Returns (refusals by reason, bent messages, accepted ones, bytes by which memory grew)."""
    draw, refused, bent, accepted = random.Random(seed), Counter[str](), 0, 0
    for options in METHODS:  # what honest rounds take is not counted
        for dtype in DTYPES:
            run_round(Bending(draw, dtype, 0), options, dtype, HONEST)
    before, until = peak(), time.monotonic() + seconds
    while time.monotonic() < until:
        options, dtype = draw.choice(METHODS), draw.choice(DTYPES)
        engine = Bending(draw, dtype, BENT)
        for line in run_round(engine, options, dtype, HONEST + BENT):
            if not line["asked"] or line["phase"] == "open":
                continue
            missing = {*line["asked"]} - {*line["answered"]} - {own["client"] for own in line["refused"]}
            assert not missing, f"clients {missing} have neither answered nor a reason"
            assert {*range(HONEST)} <= {*line["answered"]}, f"an honest client was refused: {line['refused']}"
            accepted += len(line["answered"]) - HONEST
            refused.update(short(own["reason"]) for own in line["refused"])
        bent += engine.bent
    return refused, bent, accepted, peak() - before


def run_round(engine: Bending, options: dict[str, Any], dtype: str, count: int) -> list[dict[str, Any]]:
    """Runs a federation of one training round and returns its record."""
    with tempfile.TemporaryDirectory() as folder:
        record = Record(Path(folder))
        plan = Plan(load(**options), 1, list(range(count)), dtype=dtype, observe="never", min_clients=1)
        server = federate(engine, plan, record)
        assert set(server.held) == set(LAYERS)
        assert all(torch.isfinite(x).all() for own in server.held.values() for x in own.values())
        return record.lines()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    refused, bent, accepted, grown = fuzz(arguments.seconds, arguments.seed)
    for reason, count in refused.most_common():
        print(f"{count:9}  {reason}")
    print(f"{bent} bent messages: {refused.total()} refused for {len(refused)} reasons, {accepted} accepted as sound")
    print(f"memory grew by {grown / 2**20:.1f} MiB, allowed: {bound() / 2**20:.1f}")
    assert refused.total() + accepted == bent
    assert grown <= bound()
    return 0


if __name__ == "__main__":
    sys.exit(main())
