"""Rounds of more than one exchange, with real clients: the second message, who is asked for it, what a kill leaves of it."""

import shutil

import pytest
import torch

import tiny
from federation import Site
from umbel import wire
from umbel.record import Record
from umbel.server import ServerError


def site(folder, method=None, clients=3, **sections):
    folder.mkdir(exist_ok=True)
    split = {"kind": "iid", "clients": clients}
    sections = {"split": split, "training": {"max_steps": 3}, "rounds": 2, **sections}
    return Site(folder, tiny.table(folder, {"name": "power", **(method or {})}, **sections))


def state(client, round_):
    """A client's file: per layer its own factors in units of ΔW, and what was held in common."""
    tensors = wire.decode((client.folder / f"{round_}.safetensors").read_bytes()).tensors
    own = wire.unpack_factors({key: x for key, x in tensors.items() if not key.startswith(("common|", "plain|", "lost|"))})
    common = wire.unpack_factors({k.removeprefix("common|"): x for k, x in tensors.items() if k.startswith("common|")})
    lora = client.resident.lora(client.number)
    scale = client.resident.config.lora.scale if lora is None else lora.scale
    return {layer: {"A": x["A"], "B": x["B"] * scale} for layer, x in own.items()}, common


def watching(kept):
    """Wraps every client's answer: keeps what it was asked (as a message) and what it held when it had answered."""

    def change(answers):
        def wrap(k, answer):
            def watched(payload):
                request = wire.decode(payload)
                reply = answer(payload)
                kept.append((k, request))
                return reply

            return watched

        return {k: wrap(k, answer) for k, answer in answers.items()}

    return change


def dense(parts):
    """The rule, densely in float64, from (n_k, B_k, A_k) and A_0: Q = orth(M A_0ᵀ), M ≈ Q Qᵀ M."""
    rows, pairs, A_0 = parts
    M = sum(n / sum(rows) * B.double() @ A.double() for n, (B, A) in zip(rows, pairs))
    Q, _ = torch.linalg.qr(M @ A_0.double().T)
    return Q @ Q.T @ M


def ending(lines):
    return [{key: x for key, x in line.items() if key != "seconds"} for line in lines]


def expected(home, who, asked_in):
    """What the second message of a phase must have come to, from the files of those who sent it."""
    states = {k: state(home.clients[k], asked_in) for k in who}
    rows = [len(home.resident.rows_of(k)) for k in who]
    layers = states[who[0]][0]
    pairs = {layer: [(own[layer]["B"], own[layer]["A"]) for own, _ in states.values()] for layer in layers}
    return {layer: dense((rows, pairs[layer], states[who[0]][1][layer]["A"])) for layer in layers}


def held(home):
    tensors = wire.decode((home.folder / "checkpoint.safetensors").read_bytes()).tensors
    return wire.unpack_factors({k.removeprefix("held/"): x for k, x in tensors.items() if k.startswith("held/")})


def assert_held(home, who, asked_in, tolerance=1e-5):
    for layer, wanted in expected(home, who, asked_in).items():
        got = held(home)[layer]
        assert set(got) == {"A", "B"}
        error = float((got["B"].double() @ got["A"].double() - wanted).norm() / wanted.norm())
        assert error < tolerance, (layer, error)


def test_the_second_message_makes_the_pair_that_the_rule_says_in_every_round(tmp_path):
    home = site(tmp_path)
    lines = home.run()
    assert [line["phase"] for line in lines] == ["open", "train", "update", "train", "update"]
    assert [line["train_round"] for line in lines] == [0, 1, 1, 2, 2]
    assert all(line["refused"] == [] for line in lines)
    assert_held(home, [0, 1, 2], 3)


def test_the_common_model_is_scored_when_the_round_is_over_and_clients_when_they_have_trained(tmp_path):
    lines = site(tmp_path).run()
    assert [line["global"] is None for line in lines[1:]] == [True, False, True, False]
    assert [bool(line["local"]) for line in lines[1:]] == [True, False, True, False]
    assert all(line["aggregation_error"] is None for line in lines)


def test_two_iterations_are_four_exchanges_and_come_no_farther_from_the_mean_of_products(tmp_path):
    def distance(home, last):
        got = held(home)
        states = [state(home.clients[k], last)[0] for k in range(3)]
        rows = [len(home.resident.rows_of(k)) for k in range(3)]
        total = 0.0
        for layer in got:
            products = [n / sum(rows) * own[layer]["B"].double() @ own[layer]["A"].double() for n, own in zip(rows, states)]
            M = torch.stack(products).sum(0)
            total += float((got[layer]["B"].double() @ got[layer]["A"].double() - M).norm() / M.norm())
        return total

    one, two = site(tmp_path / "one", rounds=1), site(tmp_path / "two", {"iterations": 2}, rounds=1)
    one.run()
    assert [line["phase"] for line in two.run()] == ["open", "train", "update", "update", "update"]
    assert 0 < distance(two, 3) <= distance(one, 1) * (1 + 1e-6)


def test_only_those_whose_first_message_was_folded_are_asked_for_the_second(tmp_path):
    home = site(tmp_path, clients=5, rounds=3)
    lines = home.run(clients_per_round=2)
    for train, update in zip(lines[1::2], lines[2::2]):
        assert len(train["asked"]) == 2
        assert update["asked"] == train["answered"] == update["answered"]
    assert_held(home, lines[-1]["answered"], 5)


def test_what_is_given_for_one_phase_never_reaches_those_who_were_away(tmp_path):
    kept = []
    home = site(tmp_path, clients=4, rounds=4)
    lines = home.run(watching(kept), clients_per_round=2)
    folded = {line["round"]: line["answered"] for line in lines}
    for k, request in kept:
        names = {key.rpartition("|")[2] for key in request.tensors}
        assert ("Q" in names) == (request.header["kind"] == "update")
        if request.header["kind"] == "update":
            # A and B stay where they are, and heads with them.
            assert names == {"Q"}
            assert k in folded[request.header["round"] - 1]


def silent(who, kind, rounds):
    def change(answers):
        def quiet(payload):
            header = wire.decode(payload).header
            if header["kind"] == kind and header["round"] in rounds:
                raise RuntimeError("the line is dead")
            return answers[who](payload)

        return {who: quiet}

    return change


def test_who_drops_between_the_messages_counts_in_neither_sum_of_the_second_and_comes_back(tmp_path):
    home = site(tmp_path, rounds=2)
    lines = home.run(silent(1, "update", {2, 4}))
    assert lines[2]["asked"] == [0, 1, 2]
    assert lines[2]["answered"] == [0, 2]
    assert lines[3]["answered"] == [0, 1, 2]
    # The space is that of all three, what is put into it the weighted mean of two.
    rows = {k: len(home.resident.rows_of(k)) for k in range(3)}
    states = {k: state(home.clients[k], 3 if k != 1 else 2) for k in range(3)}
    for layer, got in held(home).items():
        A_0 = states[0][1][layer]["A"].double()
        products = {k: own[layer]["B"].double() @ own[layer]["A"].double() for k, (own, _) in states.items()}
        Q, _ = torch.linalg.qr(sum(n / sum(rows.values()) * products[k] @ A_0.T for k, n in rows.items()))
        M = (rows[0] * products[0] + rows[2] * products[2]) / (rows[0] + rows[2])
        sent = got["B"].double() @ got["A"].double()
        assert float((sent - Q @ Q.T @ M).norm() / M.norm()) < 1e-5


def test_a_file_that_is_lost_between_the_messages_costs_that_clients_part_of_the_round(tmp_path):
    home = site(tmp_path, rounds=2)

    def change(answers):
        def forgetful(payload):
            if wire.decode(payload).header["round"] == 2:
                shutil.rmtree(home.clients[1].folder, ignore_errors=True)
            return answers[1](payload)

        return {1: forgetful}

    lines = home.run(change)
    assert lines[2]["answered"] == [0, 2]
    assert "nobody else has" in lines[2]["lost"]["1"]
    assert lines[3]["answered"] == [0, 1, 2]
    assert_held(home, [0, 1, 2], 3)


def test_a_run_that_ends_between_the_messages_goes_on_with_the_same_bits(tmp_path):
    whole = site(tmp_path / "whole")
    lines = whole.run()
    torn = site(tmp_path / "torn")

    def killed(answers):
        def dead(payload):
            if wire.decode(payload).header["kind"] == "update":
                raise KeyboardInterrupt
            return answers[1](payload)

        return {1: dead}

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            torn.run(killed)
        assert len(Record(torn.folder).lines()) == 2
    again = site(tmp_path / "torn").run()
    assert ending(again) == ending(lines)
    assert torn.ending() == whole.ending()


@pytest.mark.parametrize("ranks", [[2, 4, 8], [8, 2, 2]])
def test_clients_of_any_rank_answer_about_the_same_directions(tmp_path, ranks):
    home = site(tmp_path, lora={"r": ranks, "lora_alpha": 16})
    home.resident.ranks = dict(enumerate(ranks))
    lines = home.run()
    assert all(line["refused"] == [] for line in lines)
    for k, rank in enumerate(ranks):
        own, common = state(home.clients[k], 3)
        assert {x["A"].shape[0] for x in own.values()} == {rank}
        assert {x["A"].shape[0] for x in common.values()} == {8}
    assert len({line for train in lines[1:] for line in train["bytes_up"].values() if train["phase"] == "update"}) == 1
    assert_held(home, [0, 1, 2], 3)


def test_the_largest_rank_is_that_of_those_who_came(tmp_path):
    home = site(tmp_path, lora={"r": [2, 4, 8], "lora_alpha": 16})
    home.resident.ranks = {0: 2, 1: 4, 2: 8}
    lines = home.run(lambda answers: {2: lambda payload: (_ for _ in ()).throw(RuntimeError("never there"))})
    assert lines[-1]["answered"] == [0, 1]
    assert {x["A"].shape[0] for x in held(home).values()} == {4}
    assert_held(home, [0, 1], 3)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.02), ("int8", 0.05)])
def test_rounded_messages_give_the_pair_up_to_their_rounding(tmp_path, dtype, tolerance):
    home = site(tmp_path, wire={"dtype": dtype})
    lines = home.run(dtype=dtype)
    assert all(line["refused"] == [] for line in lines)
    assert_held(home, [0, 1, 2], 3, tolerance)
    tensors = wire.decode((home.clients[0].folder / "3.safetensors").read_bytes()).tensors
    lost = [key for key in tensors if key.startswith("lost|") and key.rpartition("|")[2] in "YZ"]
    assert lost == []


def sending(kind, change_of):
    """Changes the tensors of client 1's messages of one kind."""

    def change(answers):
        def bent(payload):
            kind_of = wire.decode(payload).header["kind"]
            reply = answers[1](payload)
            if kind_of != kind:
                return reply
            message = wire.decode(reply)
            tensors = {key: change_of(key, x) for key, x in message.tensors.items()}
            return wire.encode(wire.Message(message.header, tensors))

        return {1: bent}

    return change


@pytest.mark.parametrize(("kind", "name"), [("train", "Y"), ("update", "Z")])
@pytest.mark.parametrize(
    ("change_of", "said"),
    [
        (lambda x: x[:, :-1].contiguous(), "of shape"),
        (lambda x: torch.cat([x, x]), "of shape"),
        (lambda x: x * float("nan"), "NaN"),
        (lambda x: x * 1e6, "norm_limit"),
    ],
    ids=["narrow", "long", "nan", "loud"],
)
def test_a_bent_message_is_refused_with_its_layer_and_name(tmp_path, kind, name, change_of, said):
    home = site(tmp_path, rounds=1)
    lines = home.run(sending(kind, lambda key, x: change_of(x) if key.endswith(f"|{name}") else x))
    [refused] = next(line for line in lines if line["phase"] == kind)["refused"]
    assert refused["client"] == 1
    assert said in refused["reason"]
    assert lines[-1]["answered"] == [0, 2]


def test_who_has_not_trained_is_refused(tmp_path):
    home = site(tmp_path, rounds=1)

    def idle(key, x):
        return torch.zeros_like(x) if key.endswith("|Y") else x

    lines = home.run(sending("train", idle))
    assert lines[1]["refused"] == [
        {"client": 1, "reason": "client 1 sent what follows from the factors that it was sent: it has not trained"}
    ]
    later = site(tmp_path / "later", training={"max_steps": 3}, rounds=2)
    asked = []

    def says_what_it_was_sent(answers):
        def lazy(payload):
            request = wire.decode(payload)
            reply = wire.decode(answers[1](payload))
            if request.header["round"] == 3:
                asked.append(1)
                got = wire.unpack_factors(request.tensors)
                said = {f"{layer}|Y": x["B"] @ (x["A"] @ x["A"].T) for layer, x in got.items()}
                return wire.encode(wire.Message(reply.header, {**reply.tensors, **said}))
            return wire.encode(reply)

        return {1: lazy}

    lines = later.run(says_what_it_was_sent)
    assert asked
    assert [x["client"] for x in lines[3]["refused"]] == [1]
    assert "has not trained" in lines[3]["refused"][0]["reason"]


def test_who_says_another_number_of_rows_with_the_second_message_is_refused(tmp_path):
    home = site(tmp_path, rounds=1)

    def change(answers):
        def greedy(payload):
            reply = wire.decode(answers[1](payload))
            if wire.decode(payload).header["kind"] == "update":
                reply = wire.Message({**reply.header, "rows": 1}, reply.tensors)
            return wire.encode(reply)

        return {1: greedy}

    [refused] = home.run(change)[2]["refused"]
    assert "says it has 1 rows" in refused["reason"]


def test_too_few_second_messages_end_the_run_with_who_is_missing(tmp_path):
    home = site(tmp_path, rounds=1)
    with pytest.raises(ServerError, match=r"round 2: 2 clients are left of 3, wanted: 3"):
        home.run(silent(1, "update", {2}), min_clients=3)
