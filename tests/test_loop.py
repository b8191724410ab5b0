"""federate() with the real engine and clients that speak the real wire; only their training is invented."""

import json
import math
import random

import pytest
import safetensors.torch
import torch

from umbel import algebra, wire
from umbel.engine import Reply
from umbel.engine.local import Local
from umbel.loop import Plan, federate
from umbel.method import Download, Method, load
from umbel.record import CHECKPOINT, Record
from umbel.server import OBSERVER, LayerShape, ServerError, fresh_factors

LAYERS = {"wide": [7, 11, 3], "tall": [10, 6, 3]}
SHAPES = {layer: LayerShape(*shape) for layer, shape in LAYERS.items()}
FROZEN = {
    layer: torch.randn(s.d_out, s.d_in, generator=torch.Generator().manual_seed(1)) for layer, s in sorted(SHAPES.items())
}


def noise(*seed):
    return lambda x: torch.randn(x.shape, generator=torch.Generator().manual_seed(algebra.seed_of(*seed)))


class Client:
    """Keeps what a client must keep, by the rules of the wire; its "training" moves factors by noise and by its weights."""

    def __init__(self, number, dtype="float32"):
        self.number, self.dtype, self.rows = number, dtype, 3 + 2 * number
        self.states = {}
        self.facts = {}
        self.started = {}  # per training round what this client started from

    def answer(self, payload):
        request = wire.decode(payload)
        header, kind = request.header, request.header["kind"]
        echo = {key: header[key] for key in wire.ECHO}
        if kind == "open":
            own = {"preflight": self.facts} if header.get("preflight") else {}
            return wire.encode(wire.Message({**echo, "layers": LAYERS, "plain": {"head": [4]}, "rows": self.rows, **own}))
        if header["has"] >= 0 and header["has"] not in self.states:
            return wire.encode(wire.Message({**echo, "lost": "state"}))
        factors, merged, plain = self.take(request)
        weights = self.weights(factors, merged)
        reply, tensors = {"rows": self.rows, "seconds": {"fit": 0.25}}, {}
        if kind == "observe":
            reply = {"scores": {"loss": sum(float(x.norm()) for x in weights.values()), "rows": 9 + self.number}}
        elif kind == "measure":
            G = {layer: x + noise(self.number, layer)(x) for layer, x in weights.items()}
            if "G" in header["sends"]:
                tensors = {f"{layer}|G": x for layer, x in G.items()}
            else:
                for layer, x in G.items():
                    U, s, Vh = algebra.dense_svd(x, 3)
                    tensors |= {f"{layer}|B": U * s, f"{layer}|A": Vh}
            reply["rows"] = max(1, min(self.rows, header["samples"]))
        else:
            turn = header["train_round"]
            if kind == "train":
                self.started[turn] = (factors, merged, plain)
            for layer, own in factors.items():
                pull = weights[layer].norm() * 1e-2
                factors = {**factors, layer: dict(own)}
                for name in header["trains"]:
                    factors[layer][name] = own[name] + pull * noise(self.number, turn, layer, name)(own[name])
            if kind == "train":
                plain = {"head": plain.get("head", torch.zeros(4)) + noise(self.number, turn)(torch.zeros(4))}
            tensors = {f"{layer}|{name}": factors[layer][name] for layer in factors for name in header["sends"]}
            tensors |= {} if header["keeps"] else wire.pack_plain(plain)
            reply |= {"loss": 1.0 / turn, "steps": 4, "scores": {"accuracy": 0.5, "loss": 0.7, "rows": 2}}
        scores_end = kind == "observe" and self.number != OBSERVER
        kept = {has: state for has, state in self.states.items() if has == header["has"] or scores_end}
        self.states = {**kept, header["keep"]: (factors, merged, plain)}
        return wire.encode(wire.Message({**reply, **echo}, tensors), self.dtype)

    def take(self, request):
        factors, merged, plain = self.states[request.header["has"]] if request.header["has"] >= 0 else ({}, {}, {})
        for layer, download in wire.unpack(request.header, request.tensors).items():
            own = factors.get(layer, {})
            if download.reset is not None:
                own = fresh_factors(layer, SHAPES[layer], download.reset)
            given = download.factors if self.number == OBSERVER else fitted(download.factors)
            factors = {**factors, layer: {**own, **given}}
            total = algebra.add_products(merged.get(layer), download.merge)
            merged = merged if total is None else {**merged, layer: total}
        return factors, merged, {**plain, **wire.unpack_plain(request.tensors)}

    def weights(self, factors, merged):
        result = {}
        for layer, own in factors.items():
            result[layer] = FROZEN[layer] + own["B"] @ (own["R"] @ own["A"] if "R" in own else own["A"])
            if layer in merged:
                result[layer] = result[layer] + merged[layer][0] @ merged[layer][1]
        return result


def fitted(factors):
    """A pair of another rank, cut or padded to rank 3."""
    if set(factors) != {"A", "B"}:
        return factors
    A, B = factors["A"][:3], factors["B"][:, :3]
    short = 3 - len(A)
    return {"A": torch.cat([A, algebra.fresh_A(short, A.shape[1], 0)]), "B": torch.cat([B, B.new_zeros(len(B), short)], 1)}


def clients(count=3, dtype="float32"):
    return {k: Client(k, dtype) for k in [*range(count), OBSERVER]}


def engine(people, **changed):
    """The local engine over clients, some of whom are changed: `changed` maps "client_1" to a function of its answer."""
    answers = {k: client.answer for k, client in people.items()}
    for name, change in changed.items():
        k = int(name.removeprefix("client_"))
        answers[k] = change(answers[k])
    return Local(answers)


METHODS = {
    "fedit": {},
    "florist": {"energy": 0.8},
    "florist merge": {"rank": 1, "adopt": "merge"},
    "flora_na": {},
    "fed_sb": {"eta": 1e-2},
    "fed_sb random": {"init": "random"},
    "fed_sb gradient": {"init": "gradient"},
}


def plan(method="fedit", **options):
    own = {"rounds": 3, "clients": [0, 1, 2], "seed": 4} | options
    return Plan(load(method.partition(" ")[0], **METHODS[method]), **own)


def ending(folder):
    """All that a run leaves which must not depend on when and where: the server's state and the lines without times."""
    message = wire.decode((folder / CHECKPOINT).read_bytes())
    state = {name: x.numpy().tobytes() for name, x in message.tensors.items()}
    lines = [{key: x for key, x in line.items() if key != "seconds"} for line in Record(folder).lines()]
    return message.header["server"], state, lines


def lines_of(folder):
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


# Order and engines


class Shuffled:
    """Yields replies in another order than the clients were asked in."""

    def __init__(self, inner, shuffle):
        self.inner, self.shuffle = inner, shuffle

    def ask(self, asks):
        replies = list(self.inner.ask(asks))
        self.shuffle(replies)
        yield from replies


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shuffle", [list.reverse, random.Random(3).shuffle], ids=["reversed", "shuffled"])
def test_order_of_arrival_changes_nothing(tmp_path, method, shuffle):
    federate(engine(clients()), plan(method), Record(tmp_path / "straight"))
    federate(Shuffled(engine(clients()), shuffle), plan(method), Record(tmp_path / "shuffled"))
    assert ending(tmp_path / "straight") == ending(tmp_path / "shuffled")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_repeats_to_the_last_bit(tmp_path, method):
    for name in ("one", "two"):
        federate(engine(clients()), plan(method), Record(tmp_path / name))
    assert ending(tmp_path / "one") == ending(tmp_path / "two")


@pytest.mark.parametrize("method", ["fedit", "florist merge", "fed_sb random"])
def test_another_seed_is_another_run(tmp_path, method):
    for seed in (4, 5):
        federate(engine(clients()), plan(method, seed=seed), Record(tmp_path / str(seed)))
    one, other = ending(tmp_path / "4")[1], ending(tmp_path / "5")[1]
    assert one["held/wide|A"] != other["held/wide|A"]


class Chatty:
    """Repeats replies and adds some that nobody asked for."""

    def __init__(self, inner):
        self.inner = inner

    def ask(self, asks):
        for reply in self.inner.ask(asks):
            yield reply
            yield reply
            if reply.client != OBSERVER:
                yield Reply(7, reply.payload)


def test_replies_that_nobody_asked_for_and_second_ones_change_nothing_but_are_noted_once_each(tmp_path):
    federate(engine(clients()), plan(), Record(tmp_path / "quiet"))
    federate(Chatty(engine(clients())), plan(), Record(tmp_path / "chatty"))
    quiet, chatty = ending(tmp_path / "quiet"), ending(tmp_path / "chatty")
    assert quiet[:2] == chatty[:2]
    for told, line in zip(quiet[2], chatty[2]):
        assert {**told, "refused": []} == {**line, "refused": []}
        twice = [{"client": k, "reason": f"client {k} answered more than once; its first answer counts"} for k in range(3)]
        strange = {"client": 7, "reason": "client 7 was not asked in this round"}
        assert line["refused"] == ([*twice, strange] if line["phase"] == "train" else [])


class Waits:
    """Notes, as each client is asked, whose uploads wait in files."""

    def __init__(self, inner, folder):
        self.inner, self.folder, self.seen = inner, folder / "uploads", []

    def ask(self, asks):
        for ask in asks:
            self.seen.append(sorted(path.name for path in self.folder.glob("*")))
            yield from self.inner.ask([ask])


def test_uploads_wait_in_files_until_the_round_is_committed(tmp_path):
    waits = Waits(engine(clients(), client_1=after_the_opening(saying(rows=0))), tmp_path)
    federate(waits, plan(rounds=1), Record(tmp_path))
    first, third = "0.safetensors", "2.safetensors"
    assert waits.seen == [[], [], [], [], [first], [first], [first, third]]
    assert not (tmp_path / "uploads").exists()


def test_uploads_of_a_round_that_was_killed_are_gone_when_it_begins_anew(tmp_path):
    with pytest.raises(Killed):
        federate(Dying(engine(clients()), last=4, heard=True), plan(), Record(tmp_path))
    assert (tmp_path / "uploads" / "0.safetensors").exists()
    (tmp_path / "uploads" / "9.safetensors").write_bytes(b"of another round")
    waits = Waits(engine(clients()), tmp_path)
    federate(waits, plan(), Record(tmp_path))
    assert waits.seen[0] == []
    assert not (tmp_path / "uploads").exists()


class Silent:
    """Never says anything of client 1."""

    def __init__(self, inner):
        self.inner = inner

    def ask(self, asks):
        return (reply for reply in self.inner.ask(asks) if reply.client != 1)


def test_a_client_of_whom_the_engine_says_nothing_is_refused_and_the_others_go_on(tmp_path):
    federate(Silent(engine(clients())), plan(), Record(tmp_path))
    first, *later = lines_of(tmp_path)
    assert first["refused"] == [{"client": 1, "reason": "no reply"}]
    assert all(line["asked"] == line["answered"] == [0, 2] for line in later)


# Failures and lies


def after_the_opening(change):
    """A client that answers as `change` has it, except at the opening."""

    def changed(answer):
        def own(payload):
            return answer(payload) if wire.decode(payload).header["kind"] == "open" else change(answer, payload)

        return own

    return changed


def at_the_opening(change):
    def changed(answer):
        def own(payload):
            return change(answer, payload) if wire.decode(payload).header["kind"] == "open" else answer(payload)

        return own

    return changed


def raw(fields, tensors, text=None):
    return safetensors.torch.save(tensors, {"umbel": text or json.dumps({"version": wire.VERSION, **fields})})


def saying(**changes):
    """Changes entries of a reply's header; None takes one away."""

    def change(answer, payload):
        message = wire.decode(answer(payload))
        fields = {key: value for key, value in {**message.header, **changes}.items() if value is not None}
        return raw(fields, message.tensors)

    return change


def literally(key, text):
    """Puts JSON text in a reply's header that no encoder writes."""

    def change(answer, payload):
        message = wire.decode(answer(payload))
        fields = {**message.header, "version": wire.VERSION, key: "HERE"}
        return raw({}, message.tensors, json.dumps(fields).replace('"HERE"', text))

    return change


def sending(**changes):
    """Changes tensors of a reply; None takes one away. `__` stands for `|`."""

    def change(answer, payload):
        message = wire.decode(answer(payload))
        named = {name.replace("__", "|"): x for name, x in changes.items()}
        tensors = {name: x for name, x in {**message.tensors, **named}.items() if x is not None}
        return raw(message.header, tensors)

    return change


def failing(answer, payload):
    raise RuntimeError("out of memory")


REFUSED = {
    "fails": (failing, "RuntimeError: out of memory (test_loop.py:"),
    "sends nothing": (lambda answer, payload: b"", "message of 0 bytes is truncated"),
    "sends half": (lambda answer, payload: answer(payload)[:-50], "not a valid message"),
    "sends a pickle": (lambda answer, payload: b"\x80\x04\x95" + b"\0" * 100, "header says"),
    "speaks another version": (saying(version=2), "wire version 2, this side speaks 1"),
    "says no rows": (saying(rows=None), "client 1 says it has None rows"),
    "says zero rows": (saying(rows=0), "client 1 says it has 0 rows, allowed: 1 to"),
    "says fewer than zero rows": (saying(rows=-3), "client 1 says it has -3 rows"),
    "says many rows": (saying(rows="many"), "client 1 says it has 'many' rows"),
    "says a list of rows": (saying(rows=[1]), "client 1 says it has [1] rows"),
    "says true rows": (saying(rows=True), "client 1 says it has True rows"),
    "says half a row": (saying(rows=0.5), "client 1 says it has 0.5 rows"),
    "says more rows than there are": (saying(rows=10**400), "client 1 says it has 1000000"),
    "says infinite rows": (literally("rows", "1e999"), "1e999 is not a finite number"),
    "says NaN rows": (literally("rows", "NaN"), "NaN is not a finite number"),
    "says NaN loss": (literally("loss", "NaN"), "NaN is not a finite number"),
    "sends NaN": (sending(tall__B=torch.full((10, 3), float("nan"))), "layer 'tall': client 1 sent B with NaN"),
    "sends huge numbers": (sending(tall__B=torch.full((10, 3), 1e38)), "layer 'tall': client 1 sent B with NaN, infinity or"),
    "sends another shape": (
        sending(tall__B=torch.ones(3, 10)),
        "layer 'tall': client 1 sent B of shape (3, 10), wanted (10, 3)",
    ),
    "sends a layer less": (sending(tall__A=None, tall__B=None), "client 1: layers missing ['tall'], unknown []"),
    "sends a layer more": (sending(more__A=torch.ones(2, 2)), "client 1: layers missing [], unknown ['more']"),
    "sends a tensor without a layer": (sending(A=torch.ones(2, 2)), "tensor 'A': its name is not '<layer>|<factor>'"),
    "sends names without end": (
        sending(**{"x" * 5000 + "__A": torch.ones(2, 2)}),
        "client 1: layers missing [], unknown ['xxx",
    ),
    "sends no head": (sending(plain__head=None), "client 1: parameters that are not factors differ"),
    "sends another head": (sending(plain__head=torch.ones(5)), "client 1: parameters that are not factors differ"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_reply_that_cannot_be_used_is_refused_with_its_reason_and_the_round_goes_on(tmp_path, change, reason):
    federate(engine(clients(), client_1=after_the_opening(change)), plan(), Record(tmp_path))
    first, *later = lines_of(tmp_path)
    assert first["answered"] == [0, 1, 2]
    for line in later:
        assert line["asked"] == [0, 1, 2]
        assert line["answered"] == [0, 2]
        assert [refused["client"] for refused in line["refused"]] == [1]
        assert line["refused"][0]["reason"].startswith(reason) or reason in line["refused"][0]["reason"]
        assert len(line["refused"][0]["reason"]) <= 1000
        assert set(line["rows"]) == set(line["loss"]) == set(line["local"]) == {"0", "2"}

    # What is left is what the others alone would have made.
    federate(engine(clients()), plan(clients=[0, 2]), Record(tmp_path / "without"))
    assert ending(tmp_path)[1] == ending(tmp_path / "without")[1]


ECHOES = {
    "of an earlier round": (saying(round=0), "client 1 answered for round 0, asked was round "),
    "of a later round": (saying(round=9), "client 1 answered for round 9, asked was round "),
    "of a round that is true": (saying(round=True), "client 1 answered for round True, asked was round "),
    "of no round": (saying(round=None), "client 1 answered for round None, asked was round "),
    "of another run": (saying(run="lung"), "client 1 answered for run 'lung', asked was run 'heart'"),
    "of no run": (saying(run=None), "client 1 answered for run None, asked was run 'heart'"),
    "of another client": (saying(client=2), "client 1 answered for client 2, asked was client 1"),
    "of another kind": (saying(kind="open"), "client 1 answered for kind 'open', asked was kind 'train'"),
    "of a kind that is a list": (saying(kind=[None]), "client 1 answered for kind [None], asked was kind 'train'"),
    "of a run without end": (saying(run="x" * 10**5), "client 1 answered for run 'xxx"),
}


@pytest.mark.parametrize(("change", "reason"), ECHOES.values(), ids=ECHOES)
def test_an_answer_to_another_request_is_refused_with_both_named(tmp_path, change, reason):
    federate(engine(clients(), client_1=after_the_opening(change)), plan(run="heart"), Record(tmp_path))
    for line in lines_of(tmp_path)[1:]:
        assert line["answered"] == [0, 2]
        assert line["refused"][0]["reason"].startswith(reason)
        assert len(line["refused"][0]["reason"]) < 250


def test_a_reply_that_comes_again_in_the_next_round_is_refused_and_its_client_gets_what_it_missed(tmp_path):
    people, kept = clients(), {}

    def again(answer, payload):
        turn = wire.decode(payload).header["train_round"]
        kept[turn] = kept[1] if turn == 2 else answer(payload)
        return kept[turn]

    federate(engine(people, client_1=after_the_opening(again)), plan(), Record(tmp_path))
    lines = lines_of(tmp_path)
    assert [line["answered"] for line in lines] == [[0, 1, 2], [0, 1, 2], [0, 2], [0, 1, 2]]
    assert lines[2]["refused"] == [{"client": 1, "reason": "client 1 answered for round 1, asked was round 2"}]
    assert same(people[0].started[3], people[1].started[3])


@pytest.mark.parametrize("changes", [{"round": 4}, {"kind": "train"}, {"run": "another"}, {"client": 0}])
def test_an_answer_to_another_request_at_the_opening_leaves_that_client_out(tmp_path, changes):
    federate(engine(clients(), client_1=at_the_opening(saying(**changes))), plan(), Record(tmp_path))
    assert [line["answered"] for line in lines_of(tmp_path)] == [[0, 2]] * 4
    assert "client 1 answered for " in lines_of(tmp_path)[0]["refused"][0]["reason"]


def test_an_observer_that_answers_for_another_round_stops_the_run(tmp_path):
    people = clients()
    answers = {k: client.answer for k, client in people.items()} | {
        OBSERVER: lambda payload: saying(round=7)(people[OBSERVER].answer, payload)
    }
    with pytest.raises(ServerError, match="scoring the common model failed: client -1 answered for round 7, asked was round 1"):
        federate(Local(answers), plan(), Record(tmp_path))


IGNORED = {
    "seconds that are a list": saying(seconds=[1]),
    "seconds that are text": saying(seconds={"fit": "long"}),
    "seconds before the start": saying(seconds={"fit": -5}),
    "seconds beyond floats": saying(seconds={"fit": 10**400}),
    "seconds of an unknown stage": saying(seconds={"sleep": 1}),
    "scores that are text": saying(scores="x"),
    "scores that are a list": saying(scores=[1]),
    "scores that are text inside": saying(scores={"accuracy": "high"}),
    "scores that nest": saying(scores={"accuracy": {"accuracy": 1}}),
    "scores beyond floats": saying(scores={"accuracy": 10**400}),
    "scores by a name that is no text": saying(scores={"\ud800": 1}),
    "loss that is text": saying(loss="NaN"),
    "loss that is no text": saying(loss="\ud800"),
    "loss that is a list": saying(loss=[1.0]),
    "loss that is an object": saying(loss={"a": 1}),
    "loss that is true": saying(loss=True),
    "loss beyond floats": saying(loss=-(10**400)),
    "things nobody asked for": saying(reset={"wide": 3}, layers="x", has={}, surprise="\ud800"),
}


@pytest.mark.parametrize("change", IGNORED.values(), ids=IGNORED)
def test_what_a_reply_says_beside_its_factors_cannot_hurt(tmp_path, change):
    federate(engine(clients(), client_1=after_the_opening(change)), plan(), Record(tmp_path / "lied"))
    federate(engine(clients()), plan(), Record(tmp_path / "said"))
    assert ending(tmp_path / "lied")[1] == ending(tmp_path / "said")[1]
    for line in lines_of(tmp_path / "lied")[1:]:
        assert line["answered"] == [0, 1, 2]
        assert line["refused"] == []
        assert line["seconds"]["fit"] in (0.5, 0.75)
        values = [x for key in ("rows", "steps", "loss") for x in line[key].values()]
        values += [x for scores in line["local"].values() for x in scores.values()]
        assert all(type(x) in (int, float) and math.isfinite(x) for x in values)
        json.dumps(line, ensure_ascii=False).encode()  # can be printed


OPENING = {
    "fails": (failing, "RuntimeError: out of memory"),
    "sends nothing": (lambda answer, payload: b"", "truncated"),
    "says no rows": (saying(rows=None), "client 1 says it has None rows"),
    "says zero rows": (saying(rows=0), "client 1 says it has 0 rows"),
    "says text rows": (saying(rows="5"), "client 1 says it has '5' rows"),
    "says true rows": (saying(rows=True), "client 1 says it has True rows"),
    "says no layers": (saying(layers=None), "client 1 says its layers are None"),
    "says zero layers": (saying(layers={}), "client 1 says its layers are {}"),
    "says a list of layers": (saying(layers=["wide"]), "client 1 says its layers are ['wide']"),
    "says a layer without a shape": (saying(layers={**LAYERS, "tall": "x"}), "layer 'tall': client 1 says 'x'"),
    "says a shape of two": (saying(layers={**LAYERS, "tall": [10, 6]}), "layer 'tall': client 1 says [10, 6]"),
    "says a negative shape": (saying(layers={**LAYERS, "tall": [10, -6, 3]}), "layer 'tall': client 1 says [10, -6, 3]"),
    "says a true shape": (saying(layers={**LAYERS, "tall": [10, 6, True]}), "layer 'tall': client 1 says [10, 6, True]"),
    "says a float shape": (saying(layers={**LAYERS, "tall": [10, 6, 3.0]}), "layer 'tall': client 1 says [10, 6, 3.0]"),
    "says a shape beyond memory": (saying(layers={**LAYERS, "tall": [2**40, 6, 3]}), "layer 'tall': client 1 says [1099"),
    "has another shape": (
        saying(layers={**LAYERS, "tall": [10, 7, 3]}),
        "layer 'tall': client 1 has LayerShape(d_out=10, d_in=7",
    ),
    "has another rank": (
        saying(layers={**LAYERS, "tall": [10, 6, 4]}),
        "layer 'tall': client 1 has rank 4, others 3; mixed ranks are for ",
    ),
    "has a rank beyond the layer": (
        saying(layers={**LAYERS, "tall": [10, 6, 11]}),
        "layer 'tall': client 1 says rank 11, allowed: 1 to 10",
    ),
    "has a layer more": (saying(layers={**LAYERS, "more": [1, 1, 1]}), "layer 'more': client 1 has LayerShape(d_out=1"),
    "has a layer less": (saying(layers={"wide": [7, 11, 3]}), "layer 'tall': client 1 has None"),
    "has layers by names that are no text": (saying(layers={"\ud800": [7, 11, 3]}), "client 1 has None"),
}


def test_nobody_can_say_a_larger_rank_than_the_run_has(tmp_path):
    larger = at_the_opening(saying(layers={name: [*shape[:2], 4] for name, shape in LAYERS.items()}))
    own = plan("florist", most_rank=3)
    server = federate(engine(clients(), client_1=larger), own, Record(tmp_path))
    assert lines_of(tmp_path)[0]["refused"] == [
        {"client": 1, "reason": f"layer {next(iter(LAYERS))!r}: client 1 says rank 4, allowed: 1 to 3"}
    ]
    assert {shape.rank for shape in server.layers.values()} == {3}


@pytest.mark.parametrize(("change", "reason"), OPENING.values(), ids=OPENING)
@pytest.mark.parametrize("liar", [0, 1])
def test_a_client_that_cannot_be_used_at_the_opening_is_refused_with_its_reason_and_left_out(tmp_path, liar, change, reason):
    federate(engine(clients(), **{f"client_{liar}": at_the_opening(change)}), plan(), Record(tmp_path))
    first, *later = lines_of(tmp_path)
    others = [k for k in (0, 1, 2) if k != liar]
    assert first["asked"] == [0, 1, 2]
    assert first["answered"] == others
    assert [refused["client"] for refused in first["refused"]] == [liar]
    assert reason.replace("client 1", f"client {liar}") in first["refused"][0]["reason"]
    assert len(later) == 3
    assert all(line["asked"] == line["answered"] == others for line in later)


def test_where_no_majority_agrees_on_the_layers_the_run_stops_and_names_one_that_differs(tmp_path):
    change = at_the_opening(saying(layers={**LAYERS, "tall": [10, 7, 3]}))
    with pytest.raises(ServerError, match=r"layer 'tall': client 1 has .*d_in=7.*All clients need the same base model"):
        federate(engine(clients(2), client_1=change), plan(clients=[0, 1]), Record(tmp_path))
    assert not (tmp_path / CHECKPOINT).exists()


def test_an_opening_that_nobody_answers_ends_with_all_reasons(tmp_path):
    people = engine(clients(2), client_0=lambda answer: lambda payload: b"", client_1=at_the_opening(failing))
    with pytest.raises(ServerError, match=r"no client answered the opening .*client 0: .*truncated; client 1: .*out of memory"):
        federate(people, plan(clients=[0, 1]), Record(tmp_path))


def test_a_round_with_nobody_left_ends_the_run_with_all_reasons_and_a_later_start_goes_on(tmp_path):
    people = clients(2)
    bad = {"client_0": after_the_opening(failing), "client_1": after_the_opening(saying(rows=0))}
    with pytest.raises(ServerError, match=r"round 1: no client is left .*client 0: .*out of memory.*; client 1: .* 0 rows"):
        federate(engine(people, **bad), plan(clients=[0, 1]), Record(tmp_path))
    assert [line["phase"] for line in lines_of(tmp_path)] == ["open"]
    federate(engine(people), plan(clients=[0, 1]), Record(tmp_path))
    federate(engine(clients(2)), plan(clients=[0, 1]), Record(tmp_path / "undisturbed"))
    assert ending(tmp_path) == ending(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("least", "failing_ones", "left"),
    [(0, [1], 2), (0, [1, 2], 0), (3, [1], 0), (1, [1, 2], 2), (2, [1], 2), (2, [0, 2], 0)],
    ids=lambda value: str(value),
)
def test_a_round_of_fewer_than_the_quorum_is_not_committed_and_says_who_is_missing_and_why(tmp_path, least, failing_ones, left):
    people = clients()
    lost = engine(people, **{f"client_{k}": after_the_opening(failing) for k in failing_ones})
    own = plan(min_clients=least, rounds=2)
    if left:
        federate(lost, own, Record(tmp_path))
    else:
        with pytest.raises(ServerError, match=r"^round 1: .* left of 3, wanted: ") as error:
            federate(lost, own, Record(tmp_path))
        who = f"client{'s' if len(failing_ones) > 1 else ''} {', '.join(map(str, failing_ones))}"
        assert f"Left out: {who}: RuntimeError: out of memory" in str(error.value)
        assert "umbel run --resume" in str(error.value)
        assert [line["phase"] for line in lines_of(tmp_path)] == ["open"]
        # With everybody back it ends as if nothing had been.
        federate(engine(people), own, Record(tmp_path))
        federate(engine(clients()), own, Record(tmp_path / "undisturbed"))
        assert ending(tmp_path) == ending(tmp_path / "undisturbed")


def test_an_opening_of_fewer_than_the_quorum_begins_nothing(tmp_path):
    bad = {f"client_{k}": at_the_opening(failing) for k in (1, 2)}
    with pytest.raises(ServerError, match=r"the opening: 1 client is left of 3, wanted: 2 .*clients 1, 2: "):
        federate(engine(clients(), **bad), plan(), Record(tmp_path))
    assert not (tmp_path / CHECKPOINT).exists()
    federate(engine(clients(), **bad), plan(min_clients=1), Record(tmp_path))
    assert [line["answered"] for line in lines_of(tmp_path)] == [[0]] * 4


def test_half_of_those_drawn_for_a_round_are_its_quorum(tmp_path):
    own = plan(clients=list(range(6)), clients_per_round=2, rounds=5)
    bad = {f"client_{k}": after_the_opening(failing) for k in (3,)}
    federate(engine(clients(6), **bad), own, Record(tmp_path))
    assert {len(line["answered"]) for line in lines_of(tmp_path)[1:]} == {1, 2}


def test_a_federation_of_one_has_a_quorum_of_one(tmp_path):
    federate(engine(clients(1)), plan(clients=[0]), Record(tmp_path))
    assert [line["answered"] for line in lines_of(tmp_path)] == [[0]] * 4


def fails_once(turn, after):
    """Fails in one training round, before it did anything or after it kept its state and answered."""

    def change(answer, payload):
        now = wire.decode(payload).header.get("train_round") == turn
        reply = answer(payload) if after or not now else b""
        return failing(answer, payload) if now else reply

    return after_the_opening(change)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after", [False, True], ids=["before it trained", "on the way back"])
def test_a_client_that_failed_in_a_round_starts_the_next_from_what_the_others_start_from(tmp_path, method, after):
    people = clients()
    federate(engine(people, client_1=fails_once(2, after)), plan(method), Record(tmp_path))
    assert [line["answered"] for line in lines_of(tmp_path) if line["train_round"]] == [[0, 1, 2], [0, 2], [0, 1, 2]]
    assert same(people[0].started[3], people[1].started[3])


def test_a_client_whose_upload_is_refused_goes_on_from_what_it_had_before_that_round(tmp_path):
    people, has = clients(), []

    def change(answer, payload):
        header = wire.decode(payload).header
        has.append(header["has"])
        reply = wire.decode(answer(payload))
        spoilt = {name: x * math.nan if header["train_round"] == 2 else x for name, x in reply.tensors.items()}
        return wire.encode(wire.Message(reply.header, spoilt))

    federate(engine(people, client_1=after_the_opening(change)), plan(), Record(tmp_path))
    assert [line["answered"] for line in lines_of(tmp_path)[1:]] == [[0, 1, 2], [0, 2], [0, 1, 2]]
    assert has == [-1, 0, 0]  # a state that diverged, kept factors and optimizer included, must not be where it goes on
    assert same(people[0].started[3], people[1].started[3])


@pytest.mark.parametrize(
    "reply",
    [lambda answer, payload: b"", failing],
)
def test_when_the_common_model_cannot_be_scored_the_run_stops_and_says_why(tmp_path, reply):
    answers = {k: client.answer for k, client in clients().items()}
    answers[OBSERVER] = lambda payload: reply(None, payload)
    with pytest.raises(ServerError, match="scoring the common model failed: "):
        federate(Local(answers), plan(), Record(tmp_path))


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(x, second[key]) for key, x in first.items())
    return len(first) == len(second) and all(map(same, first, second))


# Who takes part


@pytest.mark.parametrize("method", ["fedit", "fed_sb"])
def test_who_is_asked_is_drawn_by_the_seed_and_the_round_alone(tmp_path, method):
    def asked(name, **options):
        changed = {"client_3": after_the_opening(failing)} if name == "one fails" else {}
        own = plan(method, clients=list(range(6)), clients_per_round=2, rounds=5, **options)
        federate(engine(clients(6), **changed), own, Record(tmp_path / name))
        return [line["asked"] for line in lines_of(tmp_path / name) if line["phase"] == "train"]

    drawn = asked("straight")
    assert drawn == asked("one fails") == asked("bfloat16", dtype="bfloat16")
    assert all(len(own) == 2 and own == sorted(own) for own in drawn)
    assert len({tuple(own) for own in drawn}) > 1
    assert drawn != asked("another seed", seed=5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_clients_that_sat_out_start_from_what_the_others_start_from(tmp_path, method, dtype):
    people = clients(5, dtype)
    own = plan(method, clients=list(range(5)), clients_per_round=3, rounds=6, dtype=dtype)
    federate(engine(people), own, Record(tmp_path))
    caught_up = 0
    for line in lines_of(tmp_path):
        if line["phase"] == "train":
            starts = [people[k].started[line["train_round"]] for k in line["asked"]]
            assert all(same(starts[0], start) for start in starts)
            caught_up += any(line["train_round"] - 1 not in people[k].started for k in line["asked"])
    assert caught_up >= 2


def test_the_measurement_asks_everybody_and_does_not_count_as_a_training_round(tmp_path):
    own = plan("fed_sb", clients=list(range(4)), clients_per_round=2)
    federate(engine(clients(4)), own, Record(tmp_path))
    lines = lines_of(tmp_path)
    assert [line["phase"] for line in lines] == ["open", "measure", "train", "train", "train"]
    assert [line["train_round"] for line in lines] == [0, 0, 1, 2, 3]
    assert lines[1]["asked"] == lines[1]["answered"] == [0, 1, 2, 3]
    assert lines[1]["aggregation_error"] is None
    assert sum(lines[1]["rows"].values()) >= 20  # 24 rows there are, 32 are wished for


def test_a_start_that_is_the_servers_alone_asks_nobody(tmp_path):
    federate(engine(clients()), plan("fed_sb random"), Record(tmp_path))
    line = lines_of(tmp_path)[1]
    assert (line["phase"], line["asked"], line["answered"], line["bytes_up"]) == ("measure", [], [], {})


# Who comes late, comes back, or has lost its disk


class Away:
    """Says nothing of one client for as many asks as it is away, or fails for it."""

    def __init__(self, inner, client, turns, silent=True):
        self.inner, self.client, self.turns, self.silent = inner, client, turns, silent
        self.asked = 0

    def ask(self, asks):
        for ask in asks:
            if ask.client == self.client:
                self.asked += 1
                if self.asked <= self.turns:
                    if not self.silent:
                        yield Reply(ask.client, None, "the node is not there")
                    continue
            yield from self.inner.ask([ask])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("silent", [True, False])
def test_a_client_that_was_not_there_at_the_opening_joins_with_what_the_others_have(tmp_path, method, silent):
    people = clients()
    federate(Away(engine(people), 1, 2, silent), plan(method, rounds=4, rejoin=True), Record(tmp_path))
    lines = lines_of(tmp_path)
    reason = "no reply" if silent else "the node is not there"
    assert lines[0]["refused"] == [{"client": 1, "reason": reason}]
    turns = [line for line in lines if line["phase"] == "train"]
    assert [line["answered"] for line in turns] == [[0, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert turns[0]["refused"] == [{"client": 1, "reason": reason}]
    assert [line.get("joined") for line in turns] == [None, [1], None, None]
    assert [set(line["rows"]) for line in turns][1] == {"0", "1", "2"}
    for turn in (2, 3, 4):
        assert same(people[0].started[turn], people[1].started[turn])


def test_a_client_that_joins_is_counted_with_the_bytes_of_its_opening(tmp_path):
    counting = Counting(Away(engine(clients()), 1, 2))
    federate(counting, plan(rounds=2, rejoin=True, observe="never"), Record(tmp_path))
    opening, first, join, *_ = [call for call in counting.calls if "1" in call]
    line = lines_of(tmp_path)[2]
    round_two = counting.calls[-1]
    assert line["bytes_down"]["1"] == join["1"][0] + round_two["1"][0]
    assert line["bytes_up"]["1"] == join["1"][1] + round_two["1"][1]
    assert (opening["1"][1], first["1"][1]) == (None, None)


def test_without_rejoin_nobody_who_missed_the_opening_is_asked_again(tmp_path):
    away = Away(engine(clients()), 1, 1)
    federate(away, plan(), Record(tmp_path))
    assert away.asked == 1
    assert [line["answered"] for line in lines_of(tmp_path)] == [[0, 2]] * 4


def wrong_layers(answer, payload):
    return saying(layers={**LAYERS, "tall": [10, 7, 3]})(answer, payload)


@pytest.mark.parametrize("comes", [0, 2], ids=["at the opening", "late"])
def test_a_client_that_does_not_fit_is_asked_again_only_after_a_restart(tmp_path, comes):
    people = clients()
    away = Away(engine(people, client_1=at_the_opening(wrong_layers)), 1, comes)
    dying = Dying(away, last=10, heard=True)
    own = plan(rounds=4, rejoin=True, observe="never")
    with pytest.raises(Killed):
        federate(dying, own, Record(tmp_path))
    assert away.asked == comes + 1
    federate(engine(people), own, Record(tmp_path))  # somebody has mended it
    lines = lines_of(tmp_path)
    refused = [
        line["round"]
        for line in lines
        for own in line["refused"]
        if "client 1 has LayerShape(d_out=10, d_in=7" in own["reason"]
    ]
    assert refused == [comes]
    assert sum(line.get("joined", []) == [1] for line in lines) == 1
    assert lines[-1]["answered"] == [0, 1, 2]
    assert same(people[0].started[4], people[1].started[4])


def test_a_run_that_somebody_joins_and_that_is_killed_at_any_ask_ends_the_same(tmp_path):
    own = plan("florist merge", rejoin=True)

    class Opens(Away):
        """Client 1 is not there for the opening alone, whoever asks how often."""

        def ask(self, asks):
            for ask in asks:
                header = wire.decode(ask.payload).header
                if ask.client != 1 or (header["kind"], header["round"]) not in (("open", 0), ("open", 1)):
                    yield from self.inner.ask([ask])

    federate(Opens(engine(clients()), 1, 0), own, Record(tmp_path / "whole"))
    assert [line.get("joined") for line in lines_of(tmp_path / "whole")] == [None, None, [1], None]
    for last in range(15):
        people, folder = clients(), tmp_path / str(last)
        with pytest.raises(Killed):
            federate(Dying(Opens(engine(people), 1, 0), last, heard=last % 2 == 0), own, Record(folder))
        federate(Opens(engine(people), 1, 0), own, Record(folder))
        assert ending(folder) == ending(tmp_path / "whole")


def test_a_late_client_of_a_larger_rank_than_the_runs_is_refused_and_one_of_a_smaller_joins(tmp_path):
    def of_rank(rank):
        return at_the_opening(saying(layers={name: [*shape[:2], rank] for name, shape in LAYERS.items()}))

    for rank, joined in ((4, None), (2, [1])):
        away = Away(engine(clients(), client_1=of_rank(rank)), 1, 2)
        federate(away, plan("florist", rejoin=True, observe="never"), Record(tmp_path / str(rank)))
        line = lines_of(tmp_path / str(rank))[2]
        assert line.get("joined") == joined
    line = lines_of(tmp_path / "4")[2]
    assert line["refused"][0]["reason"] == "layer 'wide': client 1 has rank 4, the run's largest is 3"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("missed", [1, 2])
def test_a_client_that_comes_back_after_rounds_away_starts_from_what_the_others_start_from(tmp_path, method, missed):
    def away(answer, payload):
        if 2 <= wire.decode(payload).header.get("train_round", 0) < 2 + missed:
            raise ConnectionError("gone")
        return answer(payload)

    people = clients()
    federate(engine(people, client_1=after_the_opening(away)), plan(method, rounds=4), Record(tmp_path))
    turns = [line["answered"] for line in lines_of(tmp_path) if line["phase"] == "train"]
    assert turns == [[0, 1, 2], *[[0, 2]] * missed, *[[0, 1, 2]] * (3 - missed)]
    assert same(people[0].started[4], people[1].started[4])


def on_a_new_disk(client, turn):
    """Takes all that a client kept away before one training round."""

    def change(answer, payload):
        if wire.decode(payload).header.get("train_round") == turn and turn not in client.started:
            client.states.clear()
        return answer(payload)

    return after_the_opening(change)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("turn", [1, 2, 3])
def test_a_client_on_a_new_disk_is_sent_everything_afresh_and_the_run_ends_with_the_same_bits(tmp_path, method, turn):
    people = clients()
    federate(engine(people, client_1=on_a_new_disk(people[1], turn)), plan(method), Record(tmp_path / "lost"))
    federate(engine(clients()), plan(method), Record(tmp_path / "whole"))
    lines = lines_of(tmp_path / "lost")
    assert all(line["answered"] == line["asked"] for line in lines)
    assert ending(tmp_path / "lost")[1] == ending(tmp_path / "whole")[1]
    told = [line["lost"] for line in lines if "lost" in line]
    measured = len(lines) - 4 and lines[1]["asked"] != []
    if turn == 1 and not measured:
        assert told == []  # it had nothing yet
    else:
        (own,) = told
        assert set(own) == {"1"}
        assert own["1"].startswith("lost its state after round ")


def test_what_a_client_kept_at_home_is_named_when_it_is_lost(tmp_path):
    people = clients()
    method = Plan(load("fedsa_lora"), rounds=3, clients=[0, 1, 2], seed=4)
    federate(engine(people, client_1=on_a_new_disk(people[1], 2)), method, Record(tmp_path))
    assert [line.get("lost") for line in lines_of(tmp_path)] == [
        None,
        None,
        {"1": "lost its state after round 0 and with it its own B, kept at home until now"},
        None,
        None,
    ]


def test_a_client_that_lost_what_is_to_be_gathered_is_left_out_of_it(tmp_path):
    people = clients()

    def change(answer, payload):
        if wire.decode(payload).header["kind"] == "gather":
            people[1].states.clear()
        return answer(payload)

    method = Plan(load("fedsa_lora"), rounds=2, clients=[0, 1, 2], seed=4)
    federate(engine(people, client_1=after_the_opening(change)), method, Record(tmp_path))
    line = lines_of(tmp_path)[-1]
    assert line["answered"] == [0, 2]
    assert line["refused"] == [{"client": 1, "reason": "lost its state after round 1 and with it its B, which nobody else has"}]


def test_a_client_that_says_it_lost_what_it_never_had_is_refused(tmp_path):
    def change(answer, payload):
        header = wire.decode(payload).header
        return wire.encode(wire.Message({**{key: header[key] for key in wire.ECHO}, "lost": "state"}))

    counting = Counting(engine(clients(), client_1=after_the_opening(change)))
    federate(counting, plan(), Record(tmp_path))
    lines = lines_of(tmp_path)
    assert [line["answered"] for line in lines[1:]] == [[0, 2]] * 3
    assert lines[2]["refused"] == [{"client": 1, "reason": "says its files are gone, which the request did not need"}]
    assert all("lost" not in line for line in lines)  # it had nothing that the server knows of
    asked = [sum("1" in call for call in counting.calls), sum("1" in line["bytes_down"] for line in lines)]
    assert asked == [4, 4]


def test_a_client_that_loses_its_state_again_and_again_is_asked_twice_a_round(tmp_path):
    people, lies = clients(), []

    def change(answer, payload):
        header = wire.decode(payload).header
        lies.append(header["round"])
        if header["round"] < 2:
            return answer(payload)
        return wire.encode(wire.Message({**{key: header[key] for key in wire.ECHO}, "lost": "state"}))

    federate(engine(people, client_1=after_the_opening(change)), plan(), Record(tmp_path))
    lines = lines_of(tmp_path)
    assert [line["answered"] for line in lines[1:]] == [[0, 1, 2], [0, 2], [0, 2]]
    assert [set(line.get("lost", {})) for line in lines] == [set(), set(), {"1"}, set()]
    assert lies == [1, 2, 2, 3]


@pytest.mark.parametrize("said", ["everything", ["state"], {"state": 1}, 3, "state and optimizer of Jane Doe"])
def test_only_known_words_for_a_loss_are_believed(tmp_path, said):
    federate(engine(clients(), client_1=after_the_opening(saying(lost=said))), plan(), Record(tmp_path))
    assert [line["answered"] for line in lines_of(tmp_path)] == [[0, 1, 2]] * 4
    assert all("lost" not in line for line in lines_of(tmp_path))


def test_an_observer_on_a_new_disk_sees_the_same_model(tmp_path):
    people = clients()

    def forgetful(payload):
        if wire.decode(payload).header["keep"] == 2:
            people[OBSERVER].states.clear()
        return people[OBSERVER].answer(payload)

    answers = {k: client.answer for k, client in people.items()} | {OBSERVER: forgetful}
    federate(Local(answers), plan("florist merge"), Record(tmp_path / "lost"))
    federate(engine(clients()), plan("florist merge"), Record(tmp_path / "whole"))
    scores = [[line["global"] for line in lines_of(tmp_path / name)] for name in ("lost", "whole")]
    assert scores[0] == scores[1]


# Where the server has no test rows


def by_clients(people):
    return Local({k: client.answer for k, client in people.items() if k != OBSERVER})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("observe", ["rounds", "end"])
def test_clients_score_the_common_model_after_the_last_round_and_hold_it_then(tmp_path, method, observe):
    people = clients()
    own = plan(method, observe=observe, observe_by="clients", observe_start=True)
    result = federate(by_clients(people), own, Record(tmp_path))
    *before, last = lines_of(tmp_path)
    assert all(line["global"] is None for line in before)
    seen = [people[k].states[result.round] for k in range(3)]
    assert all(same(seen[0], one) for one in seen)
    loss = sum(float(x.norm()) for x in people[0].weights(*seen[0][:2]).values())
    assert last["global"] == {"loss": pytest.approx(loss), "rows": 9 + 10 + 11}
    assert set(last["bytes_down"]) == {"0", "1", "2"}
    assert result.has == dict.fromkeys(range(3), result.round)


def test_the_scores_of_clients_count_by_their_test_rows_and_a_silent_one_is_skipped_and_said(tmp_path):
    said = {0: {"accuracy": 1.0, "rows": 1}, 1: {"accuracy": 0.5, "rows": 3}, 2: {"accuracy": "x", "rows": 10**400}}

    def change(k):
        def own(answer, payload):
            if wire.decode(payload).header["kind"] != "observe":
                return answer(payload)
            return failing(answer, payload) if k == 3 else saying(scores=said[k])(answer, payload)

        return after_the_opening(own)

    people = {k: Client(k) for k in range(4)}
    answers = {k: change(k)(client.answer) for k, client in people.items()}
    federate(Local(answers), plan(clients=[0, 1, 2, 3], observe_by="clients"), Record(tmp_path))
    line = lines_of(tmp_path)[-1]
    assert line["global"] == {"accuracy": 0.625, "rows": 4}
    assert line["answered"] == [0, 1, 2, 3]
    (refused,) = line["refused"]
    assert refused["client"] == 3
    assert refused["reason"].startswith("scoring the common model: RuntimeError: out of memory")


HOSTILE = {
    "infinite sums": {"accuracy": 1.7e308, "loss": -1.7e308, "rows": 5},
    "sums of rows without end": {"accuracy_rows": 1.7e308, "accuracy": 1.0, "rows": 5},
    "rows before the start": {"accuracy": 1.0, "rows": -5},
    "half a row": {"accuracy": 1.0, "rows": 0.5},
    "true rows": {"accuracy": 1.0, "rows": True},
    "rows without end": {"accuracy": 1.0, "rows": 10**13},
    "no rows": {"accuracy": 1.0},
    "names without number": {**{f"score {i}": 1.0 for i in range(10**4)}, "rows": 5},
    "a name without end": {"x" * 10**6: 1.0, "rows": 5},
}


@pytest.mark.parametrize("scores", HOSTILE.values(), ids=HOSTILE)
def test_the_scores_of_a_client_cannot_hurt_the_run_that_it_scores(tmp_path, scores):
    def change(answer, payload):
        kind = wire.decode(payload).header["kind"]
        return saying(scores=scores)(answer, payload) if kind == "observe" else answer(payload)

    people = clients()
    answers = {k: (after_the_opening(change) if k != 1 else lambda own: own)(people[k].answer) for k in range(3)}
    federate(Local(answers), plan(observe_by="clients"), Record(tmp_path))
    line = lines_of(tmp_path)[-1]
    assert line["answered"] == [0, 1, 2]
    assert len(json.dumps(line, allow_nan=False)) < 5000
    assert 10 <= line["global"]["rows"] <= 20
    assert math.isfinite(line["global"]["loss"])


def test_clients_are_not_asked_to_score_where_nothing_is_to_be_scored(tmp_path):
    federate(by_clients(clients()), plan(observe="never", observe_by="clients"), Record(tmp_path))
    assert [line["global"] for line in lines_of(tmp_path)] == [None] * 4


@pytest.mark.parametrize("method", ["fedit", "florist merge", "fedsa_lora"])
@pytest.mark.parametrize("heard", [False, True])
def test_a_run_scored_by_clients_and_killed_at_any_ask_ends_the_same(tmp_path, method, heard):
    own = Plan(load(method.partition(" ")[0], **METHODS.get(method, {})), 2, [0, 1, 2], seed=4, observe_by="clients")
    federate(by_clients(clients()), own, Record(tmp_path / "whole"))
    for last in range(12 if method != "fedsa_lora" else 15):
        people, folder = clients(), tmp_path / str(last)
        with pytest.raises(Killed):
            federate(Dying(by_clients(people), last, heard), own, Record(folder))
        federate(by_clients(people), own, Record(folder))
        assert ending(folder) == ending(tmp_path / "whole")


# Preflight


EXPECTED = {
    "versions": {"umbel": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.1", "peft": "0.21.2"},
    "model": "cd34" * 16,
    "tokenizer": "ef56" * 16,
    "chat_template": "0a1b" * 16,
}
FACTS = {**EXPECTED, "disk_bytes": 5 * 10**9, "needs_bytes": 3 * 10**6, "memory_bytes": 8 * 10**9, "step_seconds": 0.25}


def versions(**changes):
    return {"versions": {**EXPECTED["versions"], **changes}}


MISFITS = {
    "another model": ({"model": "ab12" * 16}, "client 1: base model sha256 ab12ab12ab12…, server cd34cd34cd34…"),
    "a model of a hub": ({"model": "hub:tiny@main"}, "client 1: base model sha256 hub:tiny@main, server cd34cd34cd34…"),
    "another tokenizer": ({"tokenizer": "ab12" * 16}, "client 1: tokenizer sha256 ab12ab12ab12…, server ef56ef56ef56…"),
    "another chat template": (
        {"chat_template": "ab12" * 16},
        "client 1: chat template sha256 ab12ab12ab12…, server 0a1b0a1b0a1b…",
    ),
    "no model": ({"model": None}, "client 1: base model sha256 not said, server cd34cd34cd34…"),
    "another torch": (versions(torch="2.9.0"), "client 1: torch 2.9.0, server 2.13.0+cpu; install the same"),
    "another umbel": (versions(umbel="0.2.0"), "client 1: umbel 0.2.0, server 0.1.0; install the same"),
    "another transformers": (versions(transformers="4.57.1"), "client 1: transformers 4.57.1, server 5.23.1; install"),
    "a peft that is a number": (versions(peft=0.21), "client 1: peft not said, server 0.21.2; install the same"),
    "versions that are a list": ({"versions": []}, "client 1: umbel not said, server 0.1.0"),
    "too little disk": ({"disk_bytes": 2 * 10**6}, "client 1: 2.0 MB free on the disk of its state, needed: at least 3.0 MB"),
    "a hash without end": ({"model": "x" * 10**6}, "client 1: base model sha256 not said, server cd34cd34cd34…"),
}


@pytest.mark.parametrize(("changes", "reason"), MISFITS.values(), ids=MISFITS)
def test_a_client_that_does_not_pass_the_preflight_is_refused_with_both_values(tmp_path, changes, reason):
    people = clients()
    for k in range(3):
        people[k].facts = dict(FACTS)
    people[1].facts |= changes
    federate(engine(people), plan(expected=EXPECTED), Record(tmp_path))
    first, *later = lines_of(tmp_path)
    assert [refused["client"] for refused in first["refused"]] == [1]
    assert first["refused"][0]["reason"].startswith(reason)
    assert [line["answered"] for line in later] == [[0, 2]] * 3
    assert set(first["preflight"]) == {"0", "1", "2"}
    assert len(json.dumps(first["preflight"])) < 3000


@pytest.mark.parametrize(
    "changes",
    [
        versions(torch="2.13.1"),
        versions(python="3.12.0"),
        versions(peft="0.21.9", extra="1.0"),
        {"disk_bytes": None},
        {"disk_bytes": -5, "memory_bytes": True, "step_seconds": "soon"},
        {"memory_bytes": 10**400, "surprise": ["Jane Doe"]},
    ],
)
def test_what_does_not_matter_is_let_pass_and_what_is_no_fact_is_not_recorded(tmp_path, changes):
    people = clients()
    for k in range(3):
        people[k].facts = {**FACTS, **(changes if k == 1 else {})}
    federate(engine(people), plan(expected=EXPECTED), Record(tmp_path))
    first = lines_of(tmp_path)[0]
    assert first["answered"] == [0, 1, 2]
    assert first["preflight"]["0"] == {**FACTS, "layers": 2}
    own = first["preflight"]["1"]
    assert set(own) <= {*FACTS, "layers"}
    assert set(own["versions"]) == set(EXPECTED["versions"])
    assert all(type(own[key]) is int and 0 <= own[key] < 2**63 for key in own if key.endswith("bytes"))


@pytest.mark.parametrize("facts", [None, 3, "x", [], {}, {"versions": {"umbel": {}}}])
def test_a_client_that_says_no_facts_is_refused(tmp_path, facts):
    people = clients()
    for k in range(3):
        people[k].facts = FACTS if k != 1 else facts
    federate(engine(people), plan(expected=EXPECTED), Record(tmp_path))
    assert lines_of(tmp_path)[0]["refused"] == [
        {"client": 1, "reason": "client 1: umbel not said, server 0.1.0; install the same minor version on both sides"}
    ]


def test_who_joins_late_passes_the_preflight_too(tmp_path):
    people = clients()
    for k in range(3):
        people[k].facts = dict(FACTS)
    people[1].facts["model"] = "ab12" * 16
    away = Away(engine(people), 1, 1)
    federate(away, plan(expected=EXPECTED, rejoin=True), Record(tmp_path))
    first, second, *later = lines_of(tmp_path)
    assert set(first["preflight"]) == {"0", "2"}
    assert second["preflight"] == {"1": people[1].facts}
    assert second["refused"][0]["reason"].startswith("client 1: base model sha256 ab12")
    assert all("preflight" not in line for line in later)
    assert away.asked == 2


# The record


class Counting:
    """Notes the length of all that passes."""

    def __init__(self, inner):
        self.inner, self.calls = inner, []

    def ask(self, asks):
        own = {}
        self.calls.append(own)

        def noted():
            for ask in asks:
                own[str(ask.client)] = [len(ask.payload), None]
                yield ask

        for reply in self.inner.ask(noted()):
            own[str(reply.client)][1] = len(reply.payload)
            yield reply


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_the_lengths_of_what_was_sent_and_the_observers_are_not_counted(tmp_path, method):
    counting = Counting(engine(clients(4)))
    own = plan(method, clients=list(range(4)), clients_per_round=3)
    federate(counting, own, Record(tmp_path))
    calls = [call for call in counting.calls if str(OBSERVER) not in call]
    lines = [line for line in lines_of(tmp_path) if line["asked"]]
    assert len(calls) == len(lines)
    for call, line in zip(calls, lines):
        assert line["bytes_down"] == {client: down for client, (down, _) in call.items()}
        assert line["bytes_up"] == {client: up for client, (_, up) in call.items()}


def test_every_line_has_the_fields_that_the_report_reads(tmp_path):
    federate(engine(clients()), plan("fed_sb"), Record(tmp_path))
    for number, line in enumerate(lines_of(tmp_path)):
        assert list(line) == [
            "round",
            "phase",
            "train_round",
            "asked",
            "answered",
            "refused",
            "rows",
            "steps",
            "loss",
            "rounding",
            "norm",
            "bytes_down",
            "bytes_up",
            "seconds",
            "local",
            "global",
            "aggregation_error",
            "aggregation_error_of_sum",
            "rank",
        ]
        assert line["round"] == number
        assert set(line["seconds"]) == {"fit", "evaluate", "adapter", "wire", "server", "record", "total"}
        assert all(seconds >= 0 for seconds in line["seconds"].values())
        if line["phase"] == "train":
            assert line["rows"] == {"0": 3, "1": 5, "2": 7}
            assert line["steps"] == {"0": 4, "1": 4, "2": 4}
            assert line["loss"]["1"] == 1.0 / line["train_round"]
            assert line["local"]["2"] == {"accuracy": 0.5, "loss": 0.7, "rows": 2}
            assert line["global"]["rows"] == 8
            assert line["seconds"]["fit"] == 0.75
            assert set(line["aggregation_error"]) == set(LAYERS)
            assert line["rank"] == {"wide": 3, "tall": 3}


@pytest.mark.parametrize(
    ("options", "scored"),
    [
        ({"observe": "rounds"}, [False, True, True, True]),
        ({"observe": "end"}, [False, False, False, True]),
        ({"observe": "never"}, [False, False, False, False]),
        ({"observe": "rounds", "observe_start": True}, [True, True, True, True]),
    ],
)
def test_the_common_model_is_scored_when_the_plan_says(tmp_path, options, scored):
    federate(engine(clients()), plan(**options), Record(tmp_path))
    assert [line["global"] is not None for line in lines_of(tmp_path)] == scored


class Adds(Method):
    """Gives clients something that none of them sent."""

    def combine(self, got, held):
        return Download(factors={"A": got["A"], "B": got["B"] + 1})


def test_a_layer_whose_mean_is_zero_has_no_relative_error_and_the_run_goes_on(tmp_path):
    nothing = after_the_opening(sending(tall__B=torch.zeros(10, 3)))
    people = engine(clients(2), client_0=nothing, client_1=nothing)
    federate(people, Plan(Adds(), rounds=2, clients=[0, 1]), Record(tmp_path))
    assert [list(line["aggregation_error"]) for line in lines_of(tmp_path)[1:]] == [["wide"], ["wide"]]


@pytest.mark.parametrize("method", ["fedit", "florist merge", "fed_sb"])
def test_the_observer_is_sent_only_what_is_new(tmp_path, method):
    counting = Counting(engine(clients()))
    federate(counting, plan(method, rounds=5), Record(tmp_path))
    sizes = [call[str(OBSERVER)][0] for call in counting.calls if str(OBSERVER) in call]
    assert len(sizes) == 5
    assert max(sizes[1:]) - min(sizes[1:]) < 100


def test_the_observer_sees_the_model_that_the_server_returns(tmp_path):
    people = clients()
    result = federate(engine(people), plan("florist merge"), Record(tmp_path))
    factors, merged, plain = people[OBSERVER].states[result.round]
    for layer, (B, A) in result.model().items():
        seen = people[OBSERVER].weights(factors, merged)[layer]
        assert torch.allclose(seen, FROZEN[layer] + B @ A, atol=1e-5)
    assert same(plain, result.plain)


def test_progress_tells_of_every_reply(tmp_path):
    events = []
    federate(engine(clients()), plan("fed_sb", rounds=2), Record(tmp_path), events.append)
    assert [(event["phase"], event["round"], event["client"]) for event in events] == [
        *(("measure", 1, k) for k in range(3)),
        *(("train", turn, k) for turn in (1, 2) for k in range(3)),
    ]
    assert all(event["rounds"] == 2 and event["clients"] == 3 for event in events)


def test_an_error_message_that_is_no_text_is_recorded_all_the_same(tmp_path):
    def change(answer, payload):
        raise OSError("no file rows-\udcff.jsonl")

    federate(engine(clients(), client_1=after_the_opening(change)), plan(rounds=1), Record(tmp_path))
    assert "no file rows- .jsonl" in lines_of(tmp_path)[1]["refused"][0]["reason"]


# Interruption


class Killed(BaseException):
    """The process ended here."""


class Dying:
    """Ends the run at the n-th ask of all, before the client hears of it or after it answered."""

    def __init__(self, inner, last, heard):
        self.inner, self.left, self.heard = inner, last, heard

    def ask(self, asks):
        for ask in asks:
            if self.left == 0 and not self.heard:
                raise Killed
            replies = list(self.inner.ask([ask]))
            if self.left == 0:
                raise Killed
            self.left -= 1
            yield from replies


INTERRUPTED = {"fedit": 15, "florist merge": 15, "fed_sb": 18}
"""Asks of a run of three clients and rounds: the opening, the measurement, and per round three clients and the observer."""


@pytest.fixture(scope="module", params=INTERRUPTED)
def undisturbed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    own = plan(request.param, clients=[0, 1, 2])
    counting = Counting(engine(clients()))
    federate(counting, own, Record(folder))
    assert sum(map(len, counting.calls)) == INTERRUPTED[request.param]
    return own, ending(folder)


@pytest.mark.parametrize("heard", [False, True], ids=["before the client hears", "after it answered"])
@pytest.mark.parametrize("last", range(max(INTERRUPTED.values())))
def test_a_run_that_was_killed_at_any_ask_goes_on_to_the_same_end(tmp_path, undisturbed, last, heard):
    own, wanted = undisturbed
    people = clients()
    dying = Dying(engine(people), last, heard)
    try:
        federate(dying, own, Record(tmp_path))
        assert dying.left >= 0  # this method asks less often than the others
    except Killed:
        lines = tmp_path / "rounds.jsonl"
        if last % 2 and lines.exists():  # the line of the last round did not reach the disk whole
            lines.write_bytes(lines.read_bytes()[:-7])
    federate(engine(people), own, Record(tmp_path))
    assert ending(tmp_path) == wanted


def test_a_run_that_is_killed_again_and_again_goes_on_to_the_same_end(tmp_path):
    own = plan("florist merge", clients=list(range(4)), clients_per_round=2, rounds=4)
    federate(engine(clients(4)), own, Record(tmp_path / "undisturbed"))
    people, kills = clients(4), 0
    while kills < 50:
        try:
            federate(Dying(engine(people), last=4, heard=kills % 2 == 0), own, Record(tmp_path / "killed"))
            break
        except Killed:
            kills += 1
    assert 1 < kills < 50
    assert ending(tmp_path / "killed") == ending(tmp_path / "undisturbed")


def test_a_run_that_is_done_asks_nobody_when_it_is_called_again(tmp_path):
    federate(engine(clients()), plan(), Record(tmp_path))
    before = ending(tmp_path)
    counting = Counting(engine(clients()))
    result = federate(counting, plan(), Record(tmp_path))
    assert counting.calls == []
    assert ending(tmp_path) == before
    assert result.round == 3


@pytest.mark.parametrize("said", [7, {"head": "4"}, {"head": [-1]}, {"head": [4, True]}])
def test_nonsense_about_other_parameters_at_the_opening_refuses_that_client(said, tmp_path):
    def lying(payload, inner):
        message = wire.decode(inner(payload))
        if wire.decode(payload).header["kind"] == "open":
            message = wire.Message({**message.header, "plain": said}, message.tensors)
        return wire.encode(message)

    honest = {k: Client(k).answer for k in range(3)}
    people = {**honest, 1: lambda payload: lying(payload, honest[1])}
    record = Record(tmp_path)
    federate(Local(people), Plan(load("fedit"), 1, [0, 1, 2], observe="never"), record)
    assert [line["answered"] for line in record.lines()] == [[0, 2], [0, 2]]
    assert record.lines()[0]["refused"][0]["client"] == 1


def test_methods_of_one_job_ask_the_same_clients_in_the_same_training_round(tmp_path):
    asked = {}
    for name in ("fedit", "fed_sb"):
        record = Record(tmp_path / name)
        people = {k: Client(k).answer for k in range(5)}
        federate(Local(people), Plan(load(name), 3, list(range(5)), seed=1, clients_per_round=2, observe="never"), record)
        asked[name] = [line["asked"] for line in record.lines() if line["phase"] == "train"]
    assert asked["fedit"] == asked["fed_sb"]
    assert len({tuple(own) for own in asked["fedit"]}) > 1


def test_a_client_cannot_gain_weight_after_the_opening(tmp_path):
    def grown(payload, inner):
        message = wire.decode(inner(payload))
        if wire.decode(payload).header["kind"] == "train":
            message = wire.Message({**message.header, "rows": message.header["rows"] * 10}, message.tensors)
        return wire.encode(message)

    honest = {k: Client(k).answer for k in range(3)}
    people = {**honest, 2: lambda payload: grown(payload, honest[2])}
    record = Record(tmp_path)
    federate(Local(people), Plan(load("fedit"), 1, [0, 1, 2], observe="never"), record)
    assert record.lines()[-1]["answered"] == [0, 1]
    assert "at the opening it had" in record.lines()[-1]["refused"][0]["reason"]
