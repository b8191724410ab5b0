"""Admission: a hostile client's upload is one line in the record, and the round is what the others alone would have made."""

import json
import pickle
import struct

import pytest
import torch

from test_loop import (
    METHODS,
    Client,
    after_the_opening,
    clients,
    ending,
    engine,
    lines_of,
    literally,
    plan,
    raw,
    saying,
    sending,
)
from umbel import method, wire
from umbel.engine import Reply
from umbel.engine.local import Local
from umbel.loop import federate
from umbel.method import load
from umbel.record import Record
from umbel.server import OBSERVER, Aggregator, LayerShape, Refused, Server, ServerError, fresh_factors


def scaled(by):
    """Multiplies every B, or R, of a reply."""

    def change(answer, payload):
        message = wire.decode(answer(payload))
        tensors = {name: x * by if name.endswith(("|B", "|R")) else x for name, x in message.tensors.items()}
        return wire.encode(wire.Message(message.header, tensors))

    return change


def in_int8(shape, names=("wide|A",)):
    """A message of 1 byte per number that is 4 bytes per number when it is decoded."""

    def change(answer, payload):
        count = shape[0] * shape[1]
        entries, at = {}, 0
        for name in names:
            entries[name] = {"dtype": "I8", "shape": list(shape), "data_offsets": [at, at + count]}
            entries[name + "|scale"] = {
                "dtype": "F32",
                "shape": [shape[0]],
                "data_offsets": [at + count, at + count + 4 * shape[0]],
            }
            at += count + 4 * shape[0]
        metadata = {"umbel": json.dumps({"version": wire.VERSION, **wire.decode(answer(payload)).header})}
        text = json.dumps({"__metadata__": metadata, **entries}).encode()
        return struct.pack("<Q", len(text)) + text + bytes(at)

    return change


def with_header(text):
    return lambda answer, payload: struct.pack("<Q", len(text)) + text


def spliced(answer, payload):
    """The tensor header of one reply before the numbers of another."""
    data = answer(payload)
    (size,) = struct.unpack("<Q", data[:8])
    return data[: 8 + size].replace(b'"wide|A"', b'"wide|a"') + data[8 + size :]


def beyond_memory(answer, payload):
    data = answer(payload)
    (size,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + size].replace(b'"shape":[3,11]', b'"shape":[3000000,1100000]')
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


ZEROS = {"wide__B": torch.zeros(7, 3), "tall__B": torch.zeros(10, 3)}

HOSTILE = {
    "took no steps": (saying(steps=0), "client 1 says it took 0 training steps, allowed: 1 or more"),
    "does not say its steps": (saying(steps=None), "client 1 says it took None training steps"),
    "says text steps": (saying(steps="many"), "client 1 says it took 'many' training steps"),
    "says fewer than no steps": (saying(steps=-4), "client 1 says it took -4 training steps"),
    "says true steps": (saying(steps=True), "client 1 says it took True training steps"),
    "says steps beyond numbers": (saying(steps=10**400), "client 1 says it took 1000"),
    "sends B = 0": (sending(**ZEROS), "client 1 sent B = 0 in every layer, so its update is zero: it has not trained"),
    "sends a huge update": (scaled(1e5), "allowed: 100 (server.norm_limit) times"),
    "sends another rank": (
        sending(wide__A=torch.ones(2, 11), wide__B=torch.ones(7, 2)),
        "layer 'wide': client 1 sent factors of rank 2, allowed: 3",
    ),
    "sends a larger rank": (
        sending(wide__A=torch.ones(5, 11), wide__B=torch.ones(7, 5)),
        "layer 'wide': client 1 sent factors of rank 5, allowed: 3",
    ),
    "sends NaN": (sending(wide__A=torch.full((3, 11), float("nan"))), "layer 'wide': client 1 sent A with NaN"),
    "sends infinity": (sending(plain__head=torch.full((4,), float("inf"))), "parameter 'head': client 1 sent NaN, infinity"),
    "sends a message that is too long": (
        lambda answer, payload: answer(payload) + bytes(2**21),
        "bytes, allowed: 10",
    ),
    "sends a matrix beyond all layers": (sending(wide__A=torch.ones(600, 600)), "bytes, allowed: 10"),
    "sends few bytes that become many": (in_int8((700, 700)), "tensors of 1962800 bytes as float32, allowed: 10"),
    "sends half a message": (lambda answer, payload: answer(payload)[: len(answer(payload)) // 2], "header says"),
    "sends all but the last numbers": (lambda answer, payload: answer(payload)[:-4], "not a valid message"),
    "sends a pickle": (lambda answer, payload: pickle.dumps({"wide|A": [1.0] * 500}), "header says"),
    "sends a pickle as header": (with_header(pickle.dumps([1, 2, 3])), "tensor header is not JSON"),
    "sends deep JSON": (with_header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "tensor header is not JSON"),
    "says rows that nest": (literally("rows", "[" * 900 + "]" * 900), "umbel header is not JSON: nested more than 32 times"),
    "says steps that nest": (literally("steps", "[" * 25 + "]" * 25), "client 1 says it took [[[[[[[["),
    "sends a header that is a list": (with_header(b"[]"), "tensor header is not an object"),
    "sends a header without end": (lambda answer, payload: b"\xff" * 200, "header says 18446744073709551615 bytes"),
    "says a name twice": (
        lambda answer, payload: answer(payload).replace(b'"tall|B"', b'"tall|A"'),
        "tensor header is not JSON: an object has a key twice",
    ),
    "splices two messages": (spliced, "layer 'wide': client 1 sent ['B', 'a'], wanted ['A', 'B']"),
    "sends a shape beyond memory": (beyond_memory, "tensor 'wide|A': shape [3000000, 1100000] does not fit a message of"),
    "sends text for a payload header": (
        lambda answer, payload: raw({}, {}, '"rows"'),
        "umbel header is not an object",
    ),
}


@pytest.mark.parametrize(("change", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_upload_is_one_line_and_the_round_is_that_of_the_others(tmp_path, change, reason):
    own = plan(clients=[0, 1, 2, 3])
    federate(engine(clients(4), client_1=after_the_opening(change)), own, Record(tmp_path / "attacked"))
    first, *later = lines_of(tmp_path / "attacked")
    assert first["answered"] == [0, 1, 2, 3]
    for line in later:
        assert line["answered"] == [0, 2, 3]
        assert [refused["client"] for refused in line["refused"]] == [1]
        assert reason in line["refused"][0]["reason"]
        assert "\n" not in line["refused"][0]["reason"]
    federate(engine(clients(4)), plan(clients=[0, 2, 3]), Record(tmp_path / "without"))
    assert ending(tmp_path / "attacked")[1] == ending(tmp_path / "without")[1]


@pytest.mark.parametrize(
    "said",
    [
        {"surprise": [[]] * 100_000},
        {"scores": {f"score {i}": i for i in range(20_000)}},
        {f"key {i}": i for i in range(40_000)},
        {"loss": "x" * 500_000},
    ],
    ids=["lists", "scores", "keys", "text"],
)
def test_what_a_client_says_at_length_is_neither_kept_nor_recorded(tmp_path, said):
    federate(engine(clients(), client_1=after_the_opening(saying(**said))), plan(rounds=1), Record(tmp_path))
    line = lines_of(tmp_path)[-1]
    assert line["answered"] == [0, 1, 2]
    assert line["steps"] == {"0": 4, "1": 4, "2": 4}
    assert len(json.dumps(line)) < 5000


# Trained at all


class Idle(Client):
    """Takes what it is sent, and sends it back as if it had trained; its scale costs a factor's last bit."""

    def answer(self, payload):
        request = wire.decode(payload)
        if request.header["kind"] != "train":
            return super().answer(payload)
        factors, merged, plain = self.take(request)
        self.states |= {request.header["keep"]: (factors, merged, plain)}
        tensors = {f"{layer}|{name}": factors[layer][name] / 1.3 * 1.3 for layer in factors for name in request.header["sends"]}
        said = {"rows": self.rows, "steps": 4, "loss": 0.1, **{key: request.header[key] for key in wire.ECHO}}
        return wire.encode(wire.Message(said, tensors | wire.pack_plain(plain or {"head": torch.ones(4)})), self.dtype)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_an_update_that_is_what_was_sent_down_is_refused_by_name(tmp_path, name, dtype):
    people = {**clients(3, dtype), 2: Idle(2, dtype)}
    federate(engine(people), plan(name, dtype=dtype), Record(tmp_path))
    trained = [line for line in lines_of(tmp_path) if line["phase"] == "train"]
    assert len(trained) == 3
    for line in trained:
        assert line["answered"] == [0, 1]
        reason = "client 2 sent back the factors that it was sent: it has not trained (learning rate 0?)"
        assert line["refused"] == [{"client": 2, "reason": reason}]


SHAPES = {"wide": LayerShape(7, 11, 3), "tall": LayerShape(10, 6, 3)}


def uploaded(seed, sends, rank=3):
    draw = torch.Generator().manual_seed(seed)
    result = {}
    for layer, shape in SHAPES.items():
        sizes = {"A": (rank, shape.d_in), "B": (shape.d_out, rank), "R": (rank, rank), "G": (shape.d_out, shape.d_in)}
        result[layer] = {name: torch.randn(*sizes[name], generator=draw) for name in sends}
    return result


def test_one_number_that_changed_is_training():
    server = Server(SHAPES, seed=1)
    aggregator = Aggregator(load("ffa_lora"), server)
    back = {layer: {"B": own["B"].clone()} for layer, own in server.held.items()}
    with pytest.raises(Refused, match="client 5 sent back the factors"):
        aggregator.check_trained(5, back)
    back["tall"]["B"][9, 2] = 1e-30
    aggregator.check_trained(5, back)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_client_of_another_rank_that_sends_back_what_it_was_sent_is_refused_too(rank):
    """What is held has rank 2: a smaller client was sent its first directions, a larger one filled up with B = 0."""
    server = Server({"q": LayerShape(7, 11, 5)}, seed=1)
    draw = torch.Generator().manual_seed(0)
    held = {"A": torch.randn(2, 11, generator=draw), "B": torch.randn(7, 2, generator=draw)}
    server.held["q"] = held
    more = max(0, rank - 2)
    A = torch.cat([held["A"][:rank], torch.randn(more, 11, generator=draw)])
    B = torch.cat([held["B"][:, :rank], torch.zeros(7, more)], dim=1)
    aggregator = Aggregator(load("florist"), server)
    with pytest.raises(Refused, match="it has not trained"):
        aggregator.check_trained(0, {"q": {"A": A, "B": B}})
    B[0, rank - 1] += 0.01
    aggregator.check_trained(0, {"q": {"A": A, "B": B}})


def test_a_measurement_is_not_asked_whether_it_trained():
    phase = next(iter(load("fed_sb", init="gradient").plan(1)))
    server = Server(SHAPES, seed=1)
    Aggregator(phase, server).check_trained(0, {layer: fresh_factors(layer, shape, 1) for layer, shape in SHAPES.items()})


# Norms


@pytest.mark.parametrize(
    ("name", "rank"), [("fedit", 3), ("ffa_lora", 3), ("fed_sb", 3), ("fedsvd", 3), ("florist", 3), ("florist", 2)]
)
def test_the_norm_of_an_upload_is_that_of_its_dense_update(name, rank):
    *_, phase = load(name).plan(2)
    server = Server(SHAPES, seed=1)
    for layer, own in server.held.items():
        more = {"R": torch.eye(3)} if "R" in phase.sends else {}
        server.held[layer] = {**own, "B": torch.randn(own["B"].shape, generator=torch.Generator().manual_seed(4)), **more}
    aggregator = Aggregator(phase, server)
    factors = uploaded(2, phase.sends, rank)
    dense = 0.0
    for layer, own in factors.items():
        B, A = method.product({**server.held[layer], **own})
        dense += float((B.double() @ A.double()).square().sum())
    assert aggregator.norm(0, factors) == pytest.approx(dense**0.5, rel=1e-6)


@pytest.mark.parametrize("name", ["fed_sb", "fedsa_lora"])
def test_where_the_server_does_not_know_the_update_the_norm_is_that_of_what_was_sent(name):
    phase = next(iter(load(name).plan(2)))
    aggregator = Aggregator(phase, Server(SHAPES, seed=1))
    factors = uploaded(2, phase.sends)
    numbers = torch.cat([x.flatten() for own in factors.values() for x in own.values()])
    assert aggregator.norm(0, factors) == pytest.approx(float(numbers.norm()), rel=1e-6)


def test_a_factor_alone_of_a_client_of_smaller_rank_is_measured_with_its_share_of_the_common_ones():
    class Alone(method.Method):
        trains = sends = ("B",)
        mixed_ranks = True

        def combine(self, got, held):
            return method.Download(factors=got)

    server = Server(SHAPES, seed=1)
    server.note_rank(4, "wide", 2)
    server.note_rank(4, "tall", 2)
    aggregator = Aggregator(Alone(), server)
    factors = uploaded(3, ("B",), rank=2)
    dense = sum(float((own["B"] @ server.held[layer]["A"][:2]).double().square().sum()) for layer, own in factors.items())
    assert aggregator.norm(4, factors) == pytest.approx(dense**0.5, rel=1e-5)


def test_every_accepted_clients_norm_is_in_the_line_and_that_of_one_out_of_line_too(tmp_path):
    people = engine(clients(4), client_3=after_the_opening(scaled(1e5)))
    federate(people, plan(clients=[0, 1, 2, 3], rounds=1), Record(tmp_path))
    first, line = lines_of(tmp_path)
    assert first["norm"] == {}
    assert list(line["norm"]) == ["0", "1", "2", "3"]
    others = sorted(line["norm"][k] for k in "012")
    assert line["norm"]["3"] > 100 * others[2] > 0
    assert line["answered"] == [0, 1, 2]
    median = f"{others[1]:.4g}, the median of the round's 4 uploads"  # the lower one of the two in the middle
    assert median in line["refused"][0]["reason"]


@pytest.mark.parametrize(("count", "limit"), [(2, 100.0), (3, 0.0), (3, 1e9)])
def test_among_fewer_than_three_or_without_a_limit_every_norm_is_accepted(tmp_path, count, limit):
    people = engine(clients(count), client_1=after_the_opening(scaled(1e5)))
    federate(people, plan(clients=list(range(count)), rounds=1, norm_limit=limit), Record(tmp_path))
    assert lines_of(tmp_path)[1]["refused"] == []
    assert lines_of(tmp_path)[1]["answered"] == list(range(count))


def test_two_large_ones_of_four_do_not_move_the_measure(tmp_path):
    huge = after_the_opening(scaled(1e5))
    federate(engine(clients(4), client_0=huge, client_2=huge), plan(clients=[0, 1, 2, 3], rounds=1), Record(tmp_path))
    assert lines_of(tmp_path)[1]["answered"] == [1, 3]


# What is said of it


def test_a_clients_own_words_give_the_operators_terminal_no_commands(tmp_path):
    gone = Reply(1, None, "gone \x1b]52;c;cm0=\x07\r\nround 2: all is well\u202e")
    talking = Talks(engine(clients()), lambda replies: [gone if reply.client == 1 else reply for reply in replies])
    told = []
    federate(talking, plan(), Record(tmp_path), told.append)
    recorded = [line["refused"][0]["reason"] for line in lines_of(tmp_path)[1:]]
    assert recorded == [event["reason"] for event in told if event.get("event") == "refused"]
    assert all(reason.startswith("gone  ]52;c;cm0=") and reason.isprintable() for reason in recorded)


# Who answers


class Talks:
    """Yields other replies than those of the clients who were asked: `change` maps a list of replies to another."""

    def __init__(self, inner, change):
        self.inner, self.change = inner, change

    def ask(self, asks):
        replies = list(self.inner.ask(asks))
        train = [reply for reply in replies if reply.client != OBSERVER and b"steps" in (reply.payload or b"")]
        yield from self.change(replies) if train else replies


SECOND = "client 0 answered more than once; its first answer counts"
TALK = {
    "a client twice, unlike": (
        lambda replies: [replies[0], Reply(0, replies[1].payload), *replies[1:]],
        [{"client": 0, "reason": SECOND}],
    ),
    "a client twice, the second late": (lambda replies: [*replies, replies[0]], [{"client": 0, "reason": SECOND}]),
    "a client a thousand times": (lambda replies: replies * 1000, None),
    "somebody who was not asked": (
        lambda replies: [Reply(77, replies[0].payload), *replies],
        [{"client": 77, "reason": "client 77 was not asked in this round"}],
    ),
    "the observer": (
        lambda replies: [*replies, Reply(OBSERVER, replies[0].payload)],
        [{"client": OBSERVER, "reason": "client -1 was not asked in this round"}],
    ),
}


@pytest.mark.parametrize(("change", "refused"), TALK.values(), ids=TALK)
def test_second_answers_and_strangers_are_noted_and_change_nothing(tmp_path, change, refused):
    federate(Talks(engine(clients()), change), plan(), Record(tmp_path / "attacked"))
    federate(engine(clients()), plan(), Record(tmp_path / "quiet"))
    assert ending(tmp_path / "attacked")[1] == ending(tmp_path / "quiet")[1]
    for line in lines_of(tmp_path / "attacked")[1:]:
        assert line["answered"] == [0, 1, 2]
        if refused is not None:
            assert line["refused"] == refused
        else:
            assert [own["client"] for own in line["refused"]] == [0, 1, 2]


def test_a_round_of_nobody_but_hostile_clients_ends_with_all_reasons(tmp_path):
    answers = {k: after_the_opening(saying(steps=0))(client.answer) for k, client in clients(2).items() if k >= 0}
    with pytest.raises(ServerError, match=r"no client is left .*client 0 says it took 0 .*client 1 says it took 0"):
        federate(Local(answers), plan(clients=[0, 1], observe="never"), Record(tmp_path))
