"""Client-level privacy at the server: what one client can move, what noise there is, what it costs, what survives a kill."""

import math
import shutil

import pytest
import torch

from test_loop import clients, ending, engine
from umbel import central, wire
from umbel.central import Changes
from umbel.config import Privacy
from umbel.ledger import Ledger
from umbel.loop import federate
from umbel.method import load
from umbel.privacy import PrivacyError, chosen
from umbel.record import Record
from umbel.server import ServerError

C = 0.5


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BEFORE = {
    "wide": {"A": draw(1, 3, 11), "B": draw(2, 7, 3)},
    "tall": {"A": draw(3, 3, 6), "B": draw(4, 10, 3)},
    "plain": {"head": draw(5, 4)},
}


def upload(path, seed, size):
    """An upload in its file, whose change of everything together has this norm."""
    steps = {
        part: {name: draw(100 * seed + 7 * i + j, *x.shape) for j, (name, x) in enumerate(own.items())}
        for i, (part, own) in enumerate(BEFORE.items())
    }
    norm = math.sqrt(sum(float(x.square().sum()) for own in steps.values() for x in own.values()))
    moved = {part: {name: BEFORE[part][name] + size / norm * x for name, x in own.items()} for part, own in steps.items()}
    tensors = wire.pack_factors({part: own for part, own in moved.items() if part != "plain"}) | wire.pack_plain(moved["plain"])
    return wire.Spooled(wire.encode(wire.Message({}, tensors)), path / f"{seed}.safetensors")


def whole(changes, **noise):
    """The mean of all parts as one vector."""
    return torch.cat([x.flatten() for part in changes.parts for x in changes.mean(part, **noise).values()]).double()


@pytest.fixture
def uploads(tmp_path):
    """Two clients within the bound, one at 40 times the bound."""
    return {k: upload(tmp_path, k, size) for k, size in ((0, 0.2), (1, 0.4), (2, 40 * C))}


# The mean


def test_one_client_moves_the_mean_by_no_more_than_the_bound_over_the_clients_asked(uploads):
    everybody = whole(Changes(uploads, BEFORE, C, 4))
    for left_out, moved in ((0, 0.2), (1, 0.4), (2, C)):
        others = whole(Changes({k: own for k, own in uploads.items() if k != left_out}, BEFORE, C, 4))
        assert (everybody - others).norm().item() == pytest.approx(moved / 4, rel=1e-4)


def test_the_clip_is_over_all_layers_and_other_parameters_together_and_keeps_the_direction(uploads):
    changes = Changes({2: uploads[2]}, BEFORE, C, 1)
    assert changes.norms[2] == pytest.approx(40 * C, rel=1e-6)
    for part, own in BEFORE.items():
        sent = uploads[2].plain() if part == "plain" else uploads[2][part]
        for name, x in changes.mean(part).items():
            assert torch.allclose(x - own[name], (sent[name] - own[name]) / 40, atol=1e-6)


def test_clients_within_the_bound_get_the_plain_mean_with_equal_weights(uploads):
    near = {k: uploads[k] for k in (0, 1)}
    changes = Changes(near, BEFORE, C, 2)
    for layer in ("wide", "tall"):
        for name, x in changes.mean(layer).items():
            assert torch.allclose(x, (near[0][layer][name] + near[1][layer][name]) / 2, atol=1e-6)
    assert torch.allclose(changes.mean("plain")["head"], (near[0].plain()["head"] + near[1].plain()["head"]) / 2, atol=1e-6)


def test_a_client_that_did_not_answer_leaves_the_others_parts_as_they_are(uploads):
    two_of_two, two_of_four = (Changes({k: uploads[k] for k in (0, 1)}, BEFORE, C, asked) for asked in (2, 4))
    start = torch.cat([x.flatten() for part in two_of_two.parts for x in BEFORE[part].values()]).double()
    assert torch.allclose(whole(two_of_four) - start, (whole(two_of_two) - start) / 2, atol=1e-6)


def test_noise_has_the_standard_deviation_that_is_accounted_for_in_every_part(tmp_path):
    sigma, asked = 1.7, 5
    held = {"big": {"A": torch.zeros(64, 300), "B": torch.zeros(400, 64)}, "plain": {"head": torch.zeros(9000)}}
    tensors = wire.pack_factors({"big": held["big"]}) | wire.pack_plain(held["plain"])
    still = {0: wire.Spooled(wire.encode(wire.Message({}, tensors)), tmp_path / "still")}
    changes = Changes(still, held, C, asked)
    for part in held:
        for name, x in changes.mean(part, sigma, 7).items():
            z = x.double().flatten() / (sigma * C / asked)
            n = len(z)
            # Chi-square with n degrees of freedom has standard deviation √(2 n); five of them either way.
            assert abs(z.square().sum().item() - n) < 5 * math.sqrt(2 * n), (part, name)
            assert abs(z.mean().item()) < 5 / math.sqrt(n)


def test_every_tensor_has_noise_of_its_own_and_another_seed_makes_another(uploads):
    quiet, changes = Changes(uploads, BEFORE, C, 3), Changes(uploads, BEFORE, C, 3)
    noise = {part: {n: x - quiet.mean(part)[n] for n, x in changes.mean(part, 1.0, 11).items()} for part in changes.parts}
    flat = [x.flatten()[:18] for part in ("wide", "tall") for x in noise[part].values()]
    assert all(not torch.allclose(a, b) for i, a in enumerate(flat) for b in flat[:i])
    assert torch.equal(whole(changes, sigma=1.0, seed=11), whole(changes, sigma=1.0, seed=11))
    assert not torch.equal(whole(changes, sigma=1.0, seed=11), whole(changes, sigma=1.0, seed=12))


def test_the_hash_of_a_round_follows_everything_that_its_mean_is_made_of(uploads, tmp_path):
    def digest(own=uploads, bound=C, asked=3, said=("run", 1)):
        return Changes(own, BEFORE, bound, asked).digest(*said)

    swapped = {0: uploads[1], 1: uploads[0], 2: uploads[2]}
    others = [digest(bound=2 * C), digest(asked=4), digest(said=("run", 2)), digest(swapped), digest({0: uploads[0]})]
    assert len({digest(), *others}) == 6
    again = {k: upload(tmp_path, k, size) for k, size in ((2, 40 * C), (0, 0.2), (1, 0.4))}
    assert digest(again) == digest()
    assert Changes(uploads, BEFORE, C, 3).without([2]).digest("run", 1) == digest({0: uploads[0], 1: uploads[1]})


# Whole runs, by the real loop, engine and ledger; clients speak the real wire


def private(**changed):
    return Privacy(**{"unit": "client", "target_epsilon": 4.0, "target_delta": 0.1, "max_grad_norm": 1.0, **changed})


def plan(method="fedit", options=None, **given):
    own = {"rounds": 3, "clients": [0, 1, 2], "seed": 4, "observe": "never", "privacy": private()}
    return central.Plan(load(method, **(options or {})), **{**own, **given})


def noises(folder):
    return [line["noise"] for line in Record(folder).lines() if "noise" in line]


class AllAlike:
    """Clients that say the same number of rows, so that a plain run has equal weights."""

    def __init__(self, count=3):
        self.people = clients(count)
        for person in self.people.values():
            person.rows = 5

    @property
    def engine(self):
        return engine(self.people)


RUNNABLE = [
    ("fedit", {}),
    ("ffa_lora", {}),
    ("fedsvd", {}),
    ("rolora", {}),
    ("fedsa_lora", {}),
    ("fed_sb", {"init": "random"}),
    ("ravan", {"heads": 1}),
]


@pytest.mark.parametrize(("method", "options"), RUNNABLE)
def test_a_wide_bound_and_hardly_any_noise_is_the_plain_run_with_equal_weights(tmp_path, method, options):
    # After FedSVD's decomposition these clients train in other directions, as its signs fall.
    given = {"rounds": 1 if method == "fedsvd" else 2}
    terms = private(max_grad_norm=3.0, target_epsilon=1e7)
    hidden = federate(engine(clients()), plan(method, options, privacy=terms, **given), Record(tmp_path / "hidden"))
    alike = AllAlike().engine
    plain = federate(alike, plan(method, options, privacy=Privacy(), **given), Record(tmp_path / "plain"))
    assert not noises(tmp_path / "plain")
    for told in noises(tmp_path / "hidden"):
        assert told["deviation"] < 2e-3
        assert max(told["change"].values()) < 3.0
    for layer, (B, A) in plain.model().items():
        got = hidden.model()[layer]
        assert (got[0] @ got[1] - B @ A).norm() < 0.1 * (B @ A).norm()
    assert (hidden.plain["head"] - plain.plain["head"]).norm() < 0.01 * plain.plain["head"].norm()


def test_rows_weigh_nothing_and_an_upload_a_thousand_times_as_large_as_others_moves_no_more_than_the_bound(tmp_path):
    def with_loud_one(loud):
        people = clients(5)
        own = people[4]
        if loud:
            own.rows = 10**6
            plain = own.answer
            own.answer = lambda payload: louder(plain(payload))
        return federate(engine(people), plan(rounds=1, clients=list(range(5))), Record(tmp_path / str(loud)))

    for loud in (True, False):
        with_loud_one(loud)
    (line,) = [line for line in Record(tmp_path / "True").lines() if "noise" in line]
    assert line["answered"] == [0, 1, 2, 3, 4]
    assert line["norm"]["4"] > 100 * max(norm for client, norm in line["norm"].items() if client != "4")
    states = [ending(tmp_path / str(loud))[1] for loud in (True, False)]
    # The noise of the two differs; without it, the clip bounds what the loud one does.
    deviation = line["noise"]["deviation"]
    for name in ("held/wide|A", "held/tall|B", "plain/head"):
        moved = [torch.frombuffer(bytearray(state[name]), dtype=torch.float32) for state in states]
        noise = 2 * deviation * math.sqrt(2 * len(moved[0]))
        assert (moved[0] - moved[1]).norm() < 2 * 1.0 / 5 + noise


def louder(payload):
    message = wire.decode(payload)
    tensors = {name: 1e3 * x for name, x in message.tensors.items()}
    return wire.encode(wire.Message(message.header, tensors))


def test_the_head_that_nobody_trained_yet_is_what_its_change_is_measured_from(tmp_path):
    head = torch.tensor([30.0, -20.0, 10.0, 5.0])

    def from_head(answer):
        def changed(payload):
            message = wire.decode(answer(payload))
            first = wire.decode(payload).header.get("train_round") == 1
            tensors = {k: x + head if k == "plain|head" and first else x for k, x in message.tensors.items()}
            return wire.encode(wire.Message(message.header, tensors))

        return changed

    people = engine(clients(), **{f"client_{k}": from_head for k in range(3)})
    terms = private(max_grad_norm=10.0, target_epsilon=1e7)
    federate(people, plan(rounds=1, privacy=terms, plain={"head": head}), Record(tmp_path))
    (told,) = noises(tmp_path)
    assert max(told["change"].values()) < 4


# What it costs


def test_the_noise_of_a_run_meets_the_target_for_the_client_that_is_asked_most_often(tmp_path):
    dp_event = pytest.importorskip("dp_accounting")
    pld = pytest.importorskip("dp_accounting.pld")
    options = {"rounds": 7, "clients": list(range(6)), "clients_per_round": 3}
    federate(engine(clients(6)), plan(**options), Record(tmp_path))
    lines = [line for line in Record(tmp_path).lines() if "noise" in line]
    asked = {k: sum(k in line["asked"] for line in lines) for k in range(6)}
    drawn = {k: sum(k in chosen(4, range(6), 3, turn) for turn in range(1, 8)) for k in range(6)}
    assert asked == drawn
    assert len(set(asked.values())) > 1
    (sigma,) = {line["noise"]["sigma"] for line in lines}
    last = {client: spent for line in lines for client, spent in line["epsilon"].items()}
    for client, times in asked.items():
        accountant = pld.PLDAccountant()
        accountant.compose(dp_event.GaussianDpEvent(sigma), times)
        assert last[str(client)] == pytest.approx(accountant.get_epsilon(0.1), rel=0.01)
    assert 0.98 * 4.0 <= max(last.values()) <= 4.0
    entries = Ledger(tmp_path / "ledger").entries()
    assert sorted((entry.client, entry.round) for entry in entries) == sorted(
        (client, line["train_round"]) for line in lines for client in line["answered"]
    )
    assert {(entry.sample_rate, entry.steps, entry.max_grad_norm) for entry in entries} == {(1.0, 1, 1.0)}


def test_what_is_gathered_at_the_end_is_one_more_upload_of_everybody_who_took_part():
    assert central.most_rounds(plan("fedsa_lora", rounds=5), [0, 1, 2]) == 6
    assert central.most_rounds(plan("fedit", rounds=5), [0, 1, 2]) == 5
    assert central.most_rounds(plan("fed_sb", rounds=5), [0, 1, 2]) == 5
    assert central.most_rounds(plan("fedit", rounds=5, clients_per_round=1), [0]) == 5


def test_delta_above_one_over_the_clients_that_opened_the_run_is_refused(tmp_path):
    with pytest.raises(PrivacyError, match=r"got 0\.4, allowed: at most 1/n = 0\.333 for 3 clients"):
        federate(engine(clients()), plan(privacy=private(target_delta=0.4)), Record(tmp_path))


def test_the_aggregation_error_has_clip_and_noise_in_it(tmp_path):
    for name, terms in (("noisy", private()), ("quiet", private(max_grad_norm=10.0, target_epsilon=1e7))):
        federate(engine(clients()), plan("ffa_lora", rounds=1, privacy=terms), Record(tmp_path / name))
    noisy, quiet = (max(Record(tmp_path / name).lines()[-1]["aggregation_error"].values()) for name in ("noisy", "quiet"))
    assert noisy > 1
    assert quiet < 0.5


# Budgets, kills, and other runs with the same ledger


def silent(answer):
    def dead(payload):
        raise OSError("gone")

    return dead


def test_a_client_without_budget_is_not_asked_and_the_record_says_why(tmp_path):
    shared = private(ledger=str(tmp_path / "ledger"), total_epsilon=6.0)
    first = plan(rounds=2, clients=[0, 1], run="first", privacy=shared)
    federate(engine(clients(2)), first, Record(tmp_path / "first"))
    record = Record(tmp_path / "second")
    with pytest.raises(ServerError, match=r"round [2-9]: no client can be asked: .*all runs would have spent ε = .*allowed 6"):
        federate(engine(clients(2)), plan(rounds=9, clients=[0, 1], seed=5, run="second", privacy=shared), record)
    assert 0 < max(record.lines()[1]["epsilon"].values()) <= 4


def test_a_newcomer_with_budget_goes_on_where_others_have_none(tmp_path):
    shared = private(ledger=str(tmp_path / "ledger"), total_epsilon=4.0)
    federate(engine(clients(2)), plan(rounds=2, clients=[0, 1], run="first", privacy=shared), Record(tmp_path / "first"))
    record = Record(tmp_path / "second")
    federate(engine(clients(3)), plan(rounds=2, seed=5, run="second", min_clients=1, privacy=shared), record)
    for line in record.lines()[1:]:
        assert line["asked"] == line["answered"] == [2]
        assert [refused["client"] for refused in line["refused"]] == [0, 1]
        assert "no budget left for this round" in line["refused"][0]["reason"]
        assert line["noise"]["deviation"] == pytest.approx(line["noise"]["sigma"])


class Killed(BaseException):
    """As kill -9 would end it: nothing behind it runs."""


@pytest.mark.parametrize("moment", ["before the ledger", "amid the ledger's lines", "before the commit"])
def test_a_round_that_a_kill_ended_has_the_same_bits_afterwards_and_is_charged_once(tmp_path, monkeypatch, moment):
    secret = tmp_path / "straight" / "ledger" / "secret.key"
    federate(engine(clients()), plan(), Record(tmp_path / "straight"))
    people, record = clients(), Record(tmp_path / "killed")
    # The noise is the ledger's secret's: the second run gets the first one's.
    (record.folder / "ledger").mkdir()
    shutil.copy(secret, record.folder / "ledger")
    owner, name, turn = (Ledger, "spend_all", 2) if moment == "before the ledger" else (Record, "commit", 3)
    calls, real = [], getattr(owner, name)

    def killing(*arguments):
        calls.append(1)
        if len(calls) == turn:
            raise Killed
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, killing)
        with pytest.raises(Killed):
            federate(engine(people), plan(), record)
    written = record.folder / "ledger" / "ledger.jsonl"
    if moment == "amid the ledger's lines":
        lines = written.read_bytes().splitlines(keepends=True)
        written.write_bytes(b"".join(lines[:4]) + lines[4][:99])
    federate(engine(people), plan(), record)
    assert ending(record.folder) == ending(tmp_path / "straight")
    assert len(Ledger(record.folder / "ledger").entries()) == 9


def test_a_repeated_round_with_other_uploads_has_other_noise_and_is_charged_again(tmp_path, monkeypatch):
    terms = private(total_epsilon=40.0)
    people, record = clients(), Record(tmp_path)
    real = Record.commit

    def killing(self, header, tensors, line):
        if line["round"] == 2:
            raise Killed
        real(self, header, tensors, line)

    with monkeypatch.context() as patched:
        patched.setattr(Record, "commit", killing)
        with pytest.raises(Killed):
            federate(engine(people), plan(privacy=terms), record)
    with pytest.raises(ServerError, match=r"round 3: .*client 0 has no budget left for this round: with it this run"):
        federate(engine(people, client_2=silent), plan(privacy=terms), record)
    charged = [(entry.client, entry.round) for entry in Ledger(tmp_path / "ledger").entries()]
    assert charged.count((0, 2)) == charged.count((1, 2)) == 2
    # The second charge of round 2 was more than the run may spend in its third.
    assert [line["answered"] for line in record.lines()[1:]] == [[0, 1, 2], [0, 1]]
