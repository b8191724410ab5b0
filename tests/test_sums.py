"""Whole federations whose uploads are masked: the plain run's result, whoever dies in it, and what the server gets to see."""

import json

import pytest
import torch

import tiny
from federation import Site
from umbel import masking, wire
from umbel.config import Privacy
from umbel.ledger import Ledger
from umbel.record import CHECKPOINT, Record
from umbel.server import ServerError

METHODS = ("fedit", "ffa_lora", "fedsa_lora", "fed_sb", "power")
KINDS = ("keys", "shares", "train", "unmask")
SPLIT = {"kind": "dirichlet", "clients": 4, "alpha": 5.0}


def table(folder, name="fedit", **sections):
    split = {**SPLIT, **sections.pop("split", {})}
    return tiny.table(folder, {"name": name}, split=split, **sections)


def run(folder, own, masked, change=None, **options):
    """Runs a table in a folder of its own, or on in it; returns the site and the record's lines."""
    folder.mkdir(exist_ok=True)
    site = Site(folder, {**own, "privacy": {"secure_aggregation": masked}})
    lines = site.run(change, privacy=Privacy(secure_aggregation=masked), **options)
    return site, lines


def tensors(folder):
    return wire.decode((folder / CHECKPOINT).read_bytes()).tensors


def difference(a, b):
    assert a.keys() == b.keys()
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)


def failing(kind, clients, number=2, act=None):
    """Has clients die, or do something else, when a message of one kind and round comes."""

    def change(answers):
        def wrap(k, answer):
            def wrapped(payload):
                header = wire.decode(payload).header
                if (header["kind"], header["round"]) == (kind, number):
                    return dead() if act is None else act(answer, payload)
                return answer(payload)

            return wrapped

        return {k: wrap(k, answers[k]) for k in clients}

    return change


def dead():
    raise OSError("the power is gone")


@pytest.mark.parametrize("name", [*METHODS, "rolora", "fedsvd"])
def test_one_round_is_the_plain_one_within_the_stated_error(tmp_path, name):
    own = table(tmp_path, name, rounds=1, split={"kind": "iid"}, data={"max_train_rows": 88})
    run(tmp_path / "plain", own, False)
    _, lines = run(tmp_path / "masked", own, True)
    before, after = tensors(tmp_path / "plain"), tensors(tmp_path / "masked")
    assert any(key.startswith("plain/") for key in after)  # a head is trained with it
    assert lines[-1]["sum"]["rows"] == 88
    bound = masking.rounding_error(4, 88)
    for key, x in after.items():
        # Float32 of the mean, and a method's arithmetic on it.
        assert float((x.double() - before[key].double()).abs().max()) <= bound + 2e-6 * float(before[key].abs().max()), key


@pytest.mark.parametrize("name", METHODS)
def test_rounds_of_masked_sums_stay_with_the_plain_run(tmp_path, name):
    own = table(tmp_path, name, rounds=3, split={"kind": "iid"}, data={"max_train_rows": 88})
    _, plain = run(tmp_path / "plain", own, False)
    _, lines = run(tmp_path / "masked", own, True)
    assert difference(tensors(tmp_path / "plain"), tensors(tmp_path / "masked")) < 2e-5
    for line, other in zip(lines, plain, strict=True):
        assert (line["asked"], line["answered"], line["refused"]) == (other["asked"], other["answered"], [])
        if line["phase"] == "train":
            n, losses = other["rows"], other["loss"]
            mean = sum(n[k] * losses[k] for k in n) / sum(n.values())
            assert line["sum"]["loss"] == pytest.approx(mean, rel=1e-4)
            assert line["sum"]["rows"] == sum(n.values())
        if line["phase"] != "open":
            assert line["sum"]["clients"] == 4
            assert line["sum"]["threshold"] == 3


def test_rows_that_differ_weigh_as_in_the_plain_run(tmp_path):
    own = table(tmp_path, rounds=1)
    _, plain = run(tmp_path / "plain", own, False)
    assert len(set(plain[-1]["rows"].values())) > 1
    run(tmp_path / "masked", own, True)
    assert difference(tensors(tmp_path / "plain"), tensors(tmp_path / "masked")) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_who_dies_in_any_message_of_a_round_is_left_out_of_it_and_catches_up(tmp_path, kind):
    own = table(tmp_path, rounds=3)
    _, lines = run(tmp_path / "masked", own, True, failing(kind, [3]))
    counts = kind == "unmask"  # its upload had come
    _, plain = run(tmp_path / "plain", own, False, None if counts else failing("train", [3]))
    assert difference(tensors(tmp_path / "plain"), tensors(tmp_path / "masked")) < 2e-5
    assert [line["answered"] for line in lines] == [line["answered"] for line in plain]
    assert lines[2]["answered"] == ([0, 1, 2, 3] if counts else [0, 1, 2])
    assert lines[3]["answered"] == [0, 1, 2, 3]
    assert [refused["client"] for refused in lines[2]["refused"]] == [3]
    assert "the power is gone" in lines[2]["refused"][0]["reason"]


@pytest.mark.parametrize(("kind", "iterations"), [("keys", 1), ("update", 1), ("update", 2)])
def test_two_sums_of_one_training_are_of_the_same_clients_or_the_round_is_given_up(tmp_path, kind, iterations):
    own = table(tmp_path, "power", rounds=3)
    own["method"]["iterations"] = iterations
    each, held = 2 * iterations, {}
    second = each + 2  # the second message of the second round

    def watch(answers):
        def wrap(answer):
            def wrapped(payload):
                message = wire.decode(payload)
                if message.header["kind"] == "train":
                    held[message.header["round"]] = {key: x for key, x in message.tensors.items() if "plain" not in key}
                return answer(payload)

            return wrapped

        return {k: wrap(answer) for k, answer in (answers | failing(kind, [3], second)(answers)).items()}

    _, lines = run(tmp_path / "masked", own, True, watch)
    assert [i for i, line in enumerate(lines) if "given_up" in line.get("sum", {})] == list(range(second, 2 * each + 1))
    assert lines[second]["answered"] == []
    assert "rows" not in lines[second]["sum"]
    third = held[2 * each + 1]
    assert third.keys() == held[each + 1].keys() != set()
    assert all(torch.equal(x, third[key]) for key, x in held[each + 1].items())  # what was sent when the second round began
    assert lines[-1]["answered"] == [0, 1, 2, 3]
    assert lines[-1]["global"]["accuracy"] >= 0


def test_who_is_silent_when_the_second_sum_is_opened_is_in_it(tmp_path):
    _, lines = run(tmp_path / "masked", table(tmp_path, "power", rounds=2), True, failing("unmask", [3], 2))
    assert lines[2]["sum"]["clients"] == 4
    assert lines[2]["refused"][0]["reason"].startswith("its upload is in the sum, its help to open it was not there: ")


def test_a_third_may_die_each_in_another_message(tmp_path):
    own = table(tmp_path, rounds=2, split={"kind": "iid", "clients": 12})

    def change(answers):
        result = {}
        for k, kind in ((11, "keys"), (2, "shares"), (5, "train"), (1, "unmask")):
            result |= failing(kind, [k])(answers)
        return result

    _, lines = run(tmp_path / "masked", own, True, change)
    run(tmp_path / "plain", own, False, failing("train", [2, 5, 11]))
    assert lines[2]["answered"] == [0, 1, 3, 4, 6, 7, 8, 9, 10]
    assert lines[2]["sum"]["threshold"] == 8
    assert sorted(refused["client"] for refused in lines[2]["refused"]) == [1, 2, 5, 11]
    assert difference(tensors(tmp_path / "plain"), tensors(tmp_path / "masked")) < 2e-5


@pytest.mark.parametrize(("kind", "what"), zip(KINDS, ("its keys", "its shares", "its upload", "its part in the opening")))
def test_one_more_ends_the_round_and_says_who_and_why(tmp_path, kind, what):
    own = table(tmp_path, rounds=2)
    expected = rf"round 2: 2 of 4 clients sent {what}, needed: 3.*clients 1, 3: .*OSError: the power is gone"
    with pytest.raises(ServerError, match=expected):
        run(tmp_path / "masked", own, True, failing(kind, [1, 3]))
    _, lines = run(tmp_path / "masked", own, True)
    assert [line["answered"] for line in lines] == [[0, 1, 2, 3]] * 3
    run(tmp_path / "undisturbed", own, True)
    assert tensors(tmp_path / "masked").keys() == tensors(tmp_path / "undisturbed").keys()
    assert difference(tensors(tmp_path / "masked"), tensors(tmp_path / "undisturbed")) == 0


class Killed(BaseException):
    """The server's process ends here."""


def killed(*_):
    raise Killed


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_kill_in_any_message_a_round_begins_anew_and_ends_with_the_same_bits(tmp_path, kind):
    own = table(tmp_path, rounds=3, server={"clients_per_round": 3})
    options = {"clients_per_round": 3}
    whole, lines = run(tmp_path / "undisturbed", own, True, **options)
    last = lines[2]["asked"][-1]
    with pytest.raises(Killed):
        run(tmp_path / "killed", own, True, failing(kind, [last], act=killed), **options)
    assert len(Record(tmp_path / "killed").lines()) == 2
    site, again = run(tmp_path / "killed", own, True, **options)
    assert site.ending() == whole.ending()
    assert [line["sum"] for line in again[1:]] == [line["sum"] for line in lines[1:]]


def test_a_round_that_was_opened_is_not_opened_again_for_others(tmp_path):
    """Killed when the sum was open and not yet durable; with one client less the two sums would tell what it sent."""
    own = table(tmp_path, rounds=2)
    with pytest.raises(Killed):
        run(tmp_path / "run", own, True, failing("observe", [-1], act=killed))
    with pytest.raises(ServerError, match="their difference would be what single clients sent"):
        run(tmp_path / "run", own, True, failing("train", [3]))
    _, lines = run(tmp_path / "run", own, True)
    assert lines[-1]["answered"] == [0, 1, 2, 3]


def test_a_round_with_too_few_to_count_is_not_opened_and_goes_on_when_the_others_are_back(tmp_path):
    own = table(tmp_path, rounds=2)
    with pytest.raises(ServerError, match=r"round 2: 3 clients are left of 4, wanted: 4 \(server.min_clients = 4\)"):
        run(tmp_path / "run", own, True, failing("train", [3]), min_clients=4)
    _, lines = run(tmp_path / "run", own, True, min_clients=4)
    assert lines[-1]["answered"] == [0, 1, 2, 3]


def test_clients_that_sit_out_catch_up(tmp_path):
    own = table(tmp_path, rounds=4, split={"kind": "iid", "clients": 5})
    for name, masked in (("plain", False), ("masked", True)):
        run(tmp_path / name, own, masked, clients_per_round=3)
    assert difference(tensors(tmp_path / "plain"), tensors(tmp_path / "masked")) < 5e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_downloads_are_rounded_and_uploads_are_not(tmp_path, dtype):
    seen = []
    own = table(tmp_path, rounds=2, wire={"dtype": dtype})
    _, lines = run(tmp_path / "masked", own, True, listening(seen), dtype=dtype)
    assert lines[-1]["rounding"] == {}
    uploads = [reply for kind, _, _, reply in seen if kind == "train"]
    assert {x.dtype for reply in uploads for x in wire.decode(reply, masked=True).tensors.values()} == {torch.int64}
    assert lines[-1]["global"]["loss"] < 1.2


def test_a_client_whose_state_is_gone_is_sent_everything_in_the_same_round(tmp_path):
    def forget(answer, payload):
        for path in (tmp_path / "masked" / "clients" / "2").glob("*.safetensors"):
            path.unlink()
        return answer(payload)

    own = table(tmp_path, rounds=2)
    _, lines = run(tmp_path / "masked", own, True, failing("train", [2], act=forget))
    assert lines[2]["lost"] == {"2": "lost its state after round 0"}
    assert lines[2]["answered"] == [0, 1, 2, 3]


def test_where_a_clients_secrets_are_gone_it_sits_the_round_out(tmp_path):
    def forget(answer, payload):
        (tmp_path / "masked" / "clients" / "2" / "exchange.json").unlink()
        return answer(payload)

    own = table(tmp_path, rounds=2)
    _, lines = run(tmp_path / "masked", own, True, failing("train", [2], 1, forget))
    assert lines[1]["answered"] == [0, 1, 3]
    assert "has no keys for this exchange" in lines[1]["refused"][0]["reason"]
    assert lines[2]["answered"] == [0, 1, 2, 3]


def test_one_client_is_no_sum(tmp_path):
    own = table(tmp_path, split={"kind": "iid", "clients": 1})
    with pytest.raises(ServerError, match=r"needs 2 clients or more, asked: \[0\]; a sum over one is its upload"):
        run(tmp_path / "masked", own, True)


def test_a_client_masks_whatever_the_server_asks(tmp_path):
    own = {**table(tmp_path), "privacy": {"secure_aggregation": True}}
    site, steps = Site(tmp_path, own), []
    site.resident.on_step = lambda *step: steps.append(step)
    with pytest.raises(ServerError, match="has no keys for this exchange"):
        site.run()
    assert steps == []  # not a step for what it will not send


def test_a_client_that_cannot_train_drops_out_by_itself(tmp_path):
    own = table(tmp_path, training={"max_steps": 1, "warmup_ratio": 1.0})
    with pytest.raises(ServerError, match="has not trained"):
        run(tmp_path / "masked", own, True)


def test_hidden_rows_are_masked_too_and_pay_once_for_a_round_that_is_asked_again_with_other_keys(tmp_path):
    seen, own = [], table(tmp_path, rounds=2)
    own["privacy"] = {"unit": "example", "target_epsilon": 8.0, "target_delta": 1e-2, "secure_aggregation": True}
    site = Site(tmp_path, own)
    with pytest.raises(Killed):
        site.run(failing("unmask", [0], act=killed), privacy=site.config.privacy)
    lines = site.run(listening(seen), privacy=site.config.privacy)
    for k in range(4):
        entries = Ledger(tmp_path / "clients" / str(k) / "ledger").entries()
        assert [(entry.kind, entry.round) for entry in entries] == [("train", 1), ("train", 2)]
    for kind, _, k, reply in seen:
        message = wire.decode(reply, masked=kind == "train")
        # No ε, from which rows would follow, and no loss of theirs, not even in the sum.
        assert not {"epsilon", "loss", "steps", "scores"} & message.header.keys(), (kind, k)
        assert kind == "open" or "rows" not in message.header
        assert "loss" not in message.tensors
    assert all("loss" not in line["sum"] for line in lines[1:])
    assert lines[-1]["sum"]["rows"] == len(site.dataset.train)


# What the server sees


def listening(seen, clients=range(4)):
    """Notes (kind, round, client, reply) of every message as it comes to the server."""

    def change(answers):
        def wrap(k, answer):
            def wrapped(payload):
                reply, header = answer(payload), wire.decode(payload).header
                seen.append((header["kind"], header["round"], k, reply))
                return reply

            return wrapped

        return {k: wrap(k, answers[k]) for k in clients}

    return change


@pytest.mark.parametrize("name", ["fedit", "fedsa_lora", "fed_sb"])
def test_nothing_that_comes_to_the_server_holds_a_clients_update(tmp_path, name):
    own = table(tmp_path, name, rounds=2)
    plain, masked = [], []
    run(tmp_path / "plain", own, False, listening(plain))
    run(tmp_path / "masked", own, True, listening(masked))
    kept = [path.read_bytes() for path in (tmp_path / "masked" / CHECKPOINT, tmp_path / "masked" / "rounds.jsonl")]
    everything = [reply for *_, reply in masked] + kept
    first = next(number for kind, number, _, _ in plain if kind == "train")
    uploads = [wire.decode(reply) for kind, number, _, reply in plain if (kind, number) == ("train", first)]
    assert len(uploads) == 4
    searched = 0
    for message in uploads:
        rows = message.header["rows"]
        for x in message.tensors.values():
            single = x.reshape(-1).numpy().tobytes()
            fixed = masking.to_fixed(x, rows, 4).numpy().tobytes()
            for true in (single, fixed):
                # Two float32 or one whole number, at any alignment; zeros are everywhere.
                windows = {true[i : i + 8] for i in range(0, len(true) - 7, 8)} - {bytes(8)}
                windows = {window for window in windows if len(set(window)) > 3}
                searched += len(windows)
                found = [window for window in windows for place in everything if window in place]
                assert not found
    assert searched > 500
    # The search finds what is there: the plain run's messages hold all of it.
    x = next(iter(uploads[0].tensors.values())).reshape(-1).numpy().tobytes()
    assert any(x[:8] in reply for *_, reply in plain)


def test_an_upload_alone_is_noise_and_another_one_in_every_run(tmp_path):
    own, numbers = table(tmp_path, rounds=1), []
    for again in ("a", "b"):
        seen = []
        run(tmp_path / again, own, True, listening(seen))
        uploads = [wire.decode(reply, masked=True).tensors for kind, _, k, reply in seen if (kind, k) == ("train", 0)]
        numbers.append(torch.cat([x.reshape(-1) for x in uploads[0].values()]))
    assert difference(tensors(tmp_path / "a"), tensors(tmp_path / "b")) == 0  # what it hides is the same
    assert not bool((numbers[0] == numbers[1]).any())
    for x in numbers:
        counts = torch.bincount(x.view(torch.uint8).to(torch.int64), minlength=256).double()
        expected = counts.sum() / 256
        assert float(((counts - expected) ** 2 / expected).sum()) < 400


def test_rows_steps_loss_and_scores_of_one_client_are_nowhere_at_the_server(tmp_path):
    seen, own = [], table(tmp_path, rounds=2)
    site, lines = run(tmp_path / "masked", own, True, listening(seen))
    rows = [len(site.clients[k]._mine()) for k in range(4)]
    assert max(rows) > 1
    for kind, _, _, reply in seen:
        header = wire.decode(reply, masked=kind == "train").header
        assert not {"steps", "loss", "scores"} & header.keys()
        assert header.get("rows") == (1 if kind == "open" else None)
    for line in lines[1:]:
        assert [line[key] for key in ("rows", "steps", "loss", "norm", "local", "rounding")] == [{}] * 6
        assert line["aggregation_error"] is None
        assert line["sum"]["rows"] == sum(rows)
    record = Record(tmp_path / "masked")
    restored = record.restore()
    assert restored is not None
    assert restored[0]["rows"] == {str(k): 1 for k in range(4)}
    assert record.rows() == sum(rows)


def test_what_is_said_of_the_others_costs_the_stated_bytes(tmp_path):
    own = table(tmp_path, rounds=1)
    _, plain = run(tmp_path / "plain", own, False)
    seen = []
    run(tmp_path / "masked", own, True, listening(seen))
    numbers = dict.fromkeys(range(4), 0)
    for kind, _, k, reply in seen:
        if kind == "train":
            numbers[k] = sum(x.numel() for x in wire.decode(reply, masked=True).tensors.values())
            assert 8 * numbers[k] <= len(reply) <= 8 * numbers[k] + 4000
    assert plain[1]["bytes_up"]["0"] >= 4 * (numbers[0] - 2)


# Wrong messages


def changed(make):
    """Answers honestly, then changes the reply: `make` gets its header and tensors."""

    def act(answer, payload):
        kind = wire.decode(payload).header["kind"]
        message = wire.decode(answer(payload), masked=kind == "train")
        return wire.encode(wire.Message(*make(message.header, message.tensors)))

    return act


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda header, own: (header, {key: x.float() for key, x in own.items()}), "dtype 'F32', allowed: I64"),
        (
            lambda header, own: (header, {key: x for key, x in own.items() if key != "rows"}),
            "its rows and loss have shapes None",
        ),
        (lambda header, own: (header, {key: x for key, x in own.items() if key != "loss"}), "other names or shapes"),
        (lambda header, own: (header, {key: x[:1] if key[-1] == "A" else x for key, x in own.items()}), "rank 1, allowed: 4"),
        (lambda header, own: (header, {**own, "extra|A": own["rows"]}), "unknown"),
        (lambda header, own: (header, {**own, "bare": own["rows"]}), "its name is not"),
        (lambda header, own: ({**header, "round": 1}, own), "answered for round 1"),
    ],
)
def test_an_upload_that_does_not_fit_is_left_out_of_the_sum(tmp_path, make, reason):
    own = table(tmp_path, rounds=2)
    _, lines = run(tmp_path / "masked", own, True, failing("train", [3], act=changed(make)))
    run(tmp_path / "plain", own, False, failing("train", [3]))
    assert lines[2]["answered"] == [0, 1, 2]
    assert reason in lines[2]["refused"][0]["reason"]
    assert difference(tensors(tmp_path / "plain"), tensors(tmp_path / "masked")) < 2e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda header, own: (header, {key: x + 2**61 for key, x in own.items()}),
        lambda header, own: (header, {**own, "rows": own["rows"] + 10**13}),
        lambda header, own: (header, {**own, "rows": own["rows"] - 10**6}),
        lambda header, own: (header, {key: torch.randint(-(2**62), 2**62, x.shape) for key, x in own.items()}),
    ],
)
def test_a_sum_that_cannot_be_is_no_model(tmp_path, make):
    own = table(tmp_path, rounds=2)
    with pytest.raises(ServerError, match=r"round 2: the sum over clients .* cannot be opened: .*masks hide whose"):
        run(tmp_path / "masked", own, True, failing("train", [3], act=changed(make)))
    _, lines = run(tmp_path / "masked", own, True)
    assert lines[2]["answered"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("kind", "make", "reason"),
    [
        ("keys", lambda header, own: ({**header, "public": header["public"][:1]}, own), "wanted: two"),
        ("keys", lambda header, own: ({**header, "public": ["?", "?"]}, own), "wanted: base64"),
        ("shares", lambda header, own: ({**header, "sealed": {}}, own), "an entry for each of clients"),
        ("shares", lambda header, own: ({**header, "commitment": 7}, own), "commitment"),
        ("unmask", lambda header, own: ({**header, "own": {}}, own), "an entry for each of clients"),
        ("unmask", lambda header, own: ({**header, "own": dict.fromkeys(header["own"], "AAAA")}, own), "wanted: 48"),
    ],
)
def test_a_message_of_the_exchange_that_does_not_fit_counts_as_none(tmp_path, kind, make, reason):
    _, lines = run(tmp_path / "masked", table(tmp_path, rounds=2), True, failing(kind, [3], act=changed(make)))
    assert lines[2]["answered"] == ([0, 1, 2, 3] if kind == "unmask" else [0, 1, 2])
    assert reason in lines[2]["refused"][0]["reason"]


def test_wrong_shares_are_passed_over_where_others_are_enough(tmp_path):
    def wrong(header, own):
        shares = {k: masking.to_text(bytes(masking.SHARE_BYTES)) for k in header["own"]}
        return {**header, "own": shares}, own

    own = table(tmp_path, rounds=2)
    whole, _ = run(tmp_path / "undisturbed", own, True)
    site, lines = run(tmp_path / "masked", own, True, failing("unmask", [1], act=changed(wrong)))
    assert lines[2]["answered"] == [0, 1, 2, 3]
    assert site.ending() == whole.ending()
    with pytest.raises(ServerError, match="3 right ones are needed"):
        run(tmp_path / "two", own, True, failing("unmask", [1, 2], act=changed(wrong)))


def test_two_clients_with_one_key_are_both_left_out(tmp_path):
    taken = {}

    def note(header, own):
        return {**header, "public": taken.setdefault("public", header["public"])}, own

    with pytest.raises(ServerError, match="has a key of somebody else's"):
        run(tmp_path / "masked", table(tmp_path, rounds=1), True, failing("keys", [1, 2], 1, changed(note)))


def test_a_job_by_its_configuration_masks_its_methods_and_not_its_baselines(tmp_path):
    from umbel.run import run as run_job

    own = table(tmp_path, rounds=1, privacy={"secure_aggregation": True}, split={"clients": 3})
    run_job(own, tmp_path / "job")
    folder = tmp_path / "job"
    job = json.loads((folder / "job.json").read_text())
    (masked,) = (Record(folder / job["members"][label]).lines() for label in job["methods"])
    assert masked[1]["sum"]["rows"] == 90
    assert "sum" not in Record(folder / job["central"]).lines()[1]
