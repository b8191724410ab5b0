"""What a client says in an exchange, and everything that it refuses to open, whoever asks."""

import json
import stat

import pytest
import torch

from umbel import masking, wire
from umbel.client.masked import FILE, Exchange, check_trained
from umbel.masking import MaskError

X = {"q|B": torch.tensor([[0.5, -1.0], [2.0, 0.25]]), "plain|head": torch.tensor([3.0])}


class Federation:
    """Clients at one exchange, and what a server that passes messages on has of it."""

    def __init__(self, folder, clients=3, number=1):
        self.folder, self.number = folder, number
        self.clients = [Exchange(k, folder / str(k)) for k in range(clients)]
        self.public, self.sealed = {}, {}

    def ask(self, k, kind, **more):
        return self.clients[k].answer({"run": "r", "round": self.number, "client": k, "kind": kind, **more})

    def keys(self):
        everybody = list(range(len(self.clients)))
        self.public = {str(k): self.ask(k, "keys", clients=everybody)["public"] for k in everybody}
        return self

    def shares(self):
        self.sealed = {k: self.ask(k, "shares", public=self.public)["sealed"] for k in range(len(self.clients))}
        return self

    def sealed_for(self, k):
        return {str(j): own[str(k)] for j, own in self.sealed.items() if j != k}

    def upload(self, k, sealed=None, rows=10, x=X):
        header = {"run": "r", "round": self.number, "sealed": self.sealed_for(k) if sealed is None else sealed}
        return self.clients[k].mask(header, rows, 0.7, x)

    def uploads(self):
        return [self.upload(k) for k in range(len(self.clients))]

    def state(self, k=0):
        return json.loads((self.folder / str(k) / FILE).read_text())


@pytest.fixture
def three(tmp_path):
    return Federation(tmp_path)


def test_secrets_are_readable_by_their_user_alone_and_gone_when_the_sum_is_open(three):
    three.keys().shares()
    assert stat.S_IMODE((three.folder / "0" / FILE).stat().st_mode) == 0o600
    secrets = {key: three.state()[key] for key in ("seal", "mask", "secret")}
    three.uploads()
    three.ask(0, "unmask", survivors=[0, 1, 2])
    kept = (three.folder / "0" / FILE).read_text()
    assert all(secret not in kept for secret in secrets.values())
    assert {"seal", "mask", "secret", "held"} & three.state().keys() == set()


def test_an_upload_is_int64_under_the_same_names_with_rows_and_loss_beside(three):
    masked = three.keys().shares().upload(0)
    assert {key: (x.dtype, tuple(x.shape)) for key, x in masked.items()} == {
        "plain|head": (torch.int64, (1,)),
        "q|B": (torch.int64, (2, 2)),
        "rows": (torch.int64, (1,)),
        "loss": (torch.int64, (1,)),
    }
    assert int(masked["rows"]) != 10


def test_keys_are_fresh_in_every_exchange(three):
    three.keys()
    before = three.public
    three.keys()
    assert not {key for both in before.values() for key in both} & {key for both in three.public.values() for key in both}


@pytest.mark.parametrize("asked", [[0], [1, 2], [0, 0, 1], [], None, [0, True], [0, -1]])
def test_an_exchange_of_one_or_of_others_is_refused(three, asked):
    with pytest.raises((MaskError, wire.WireError)):
        three.ask(0, "keys", clients=asked)


def test_keys_of_too_few_are_refused(tmp_path):
    six = Federation(tmp_path, 6).keys()
    enough = {str(k): six.public[str(k)] for k in range(4)}
    few = {str(k): six.public[str(k)] for k in range(3)}
    with pytest.raises(MaskError, match="keys of 3 clients, needed: 4 of the 6"):
        six.ask(0, "shares", public=few)
    assert six.ask(0, "shares", public=enough)["sealed"].keys() == {"1", "2", "3"}


@pytest.mark.parametrize(
    "change",
    [
        lambda public: {**public, "0": public["1"]},  # not my own keys
        lambda public: {**public, "2": public["1"]},  # one key twice
        lambda public: {**public, "7": public["2"]},  # somebody who was not asked
        lambda public: {**public, "2": public["2"][:1]},
        lambda public: {**public, "2": ["AAAA", "AAAA"]},
        lambda public: {**public, "2": [masking.to_text(bytes(32)), public["2"][1]]},
        lambda public: {"1": public["1"], "2": public["2"]},
        lambda public: [],
    ],
)
def test_a_list_of_keys_that_does_not_fit_is_refused(three, change):
    three.keys()
    with pytest.raises((MaskError, wire.WireError)):
        three.ask(0, "shares", public=change(three.public))


def test_shares_of_too_few_or_of_strangers_are_refused(three):
    three.keys().shares()
    with pytest.raises(MaskError, match="shares of 1 clients, needed: 2"):
        three.upload(0, sealed={})
    with pytest.raises(MaskError, match="whose keys were of"):
        three.upload(0, sealed={**three.sealed_for(0), "5": three.sealed_for(0)["1"]})
    with pytest.raises(MaskError, match="cannot be opened"):
        three.upload(0, sealed={"1": three.sealed_for(0)["2"], "2": three.sealed_for(0)["1"]})
    with pytest.raises(MaskError, match="cannot be opened"):
        three.upload(0, sealed={**three.sealed_for(0), "2": three.sealed_for(1)["2"]})
    three.upload(0)  # none of that has spoiled it


def test_there_is_one_upload_in_an_exchange(three):
    three.keys().shares().upload(0)
    with pytest.raises(MaskError, match="its exchange is at"):
        three.upload(0, x={**X, "plain|head": torch.tensor([4.0])})


def test_numbers_that_a_sum_cannot_take_are_refused_and_may_be_sent_in_the_next_round(three):
    three.keys().shares()
    with pytest.raises(MaskError, match="diverged"):
        three.upload(0, x={**X, "plain|head": torch.tensor([float("nan")])})


def test_shares_of_each_client_are_of_one_kind(three):
    three.keys().shares().uploads()
    answer = three.ask(0, "unmask", survivors=[0, 2])
    assert answer["own"].keys() == {"0", "2"}
    assert answer["key"].keys() == {"1"}


def test_a_sum_is_opened_once_and_the_same_request_has_the_same_answer(three):
    three.keys().shares().uploads()
    answer = three.ask(0, "unmask", survivors=[0, 1, 2])
    assert three.ask(0, "unmask", survivors=[0, 1, 2]) == answer
    with pytest.raises(MaskError, match="a second one, of"):
        three.ask(0, "unmask", survivors=[0, 1])


@pytest.mark.parametrize("survivors", [[0], [1, 2], [0, 1, 7], [0, 0], None])
def test_sums_of_too_few_of_others_or_of_strangers_are_not_opened(three, survivors):
    three.keys().shares().uploads()
    with pytest.raises((MaskError, wire.WireError)):
        three.ask(0, "unmask", survivors=survivors)
    assert three.ask(0, "unmask", survivors=[0, 1])["key"].keys() == {"2"}


def test_who_sent_no_shares_is_no_survivor(tmp_path):
    six = Federation(tmp_path, 6).keys().shares()
    for k in range(5):
        six.upload(k, sealed={str(j): own[str(k)] for j, own in six.sealed.items() if j not in (k, 5)})
    with pytest.raises(MaskError, match="survivors"):
        six.ask(0, "unmask", survivors=[0, 1, 2, 3, 5])


def test_a_round_that_is_repeated_is_opened_for_the_same_clients_only(three):
    three.keys().shares().uploads()
    three.ask(0, "unmask", survivors=[0, 1, 2])
    for survivors in ([0, 1], [0, 1, 2]):
        three.keys().shares().uploads()
        if survivors == [0, 1]:
            with pytest.raises(MaskError, match="their difference would be what single clients sent"):
                three.ask(0, "unmask", survivors=survivors)
        else:
            assert three.ask(0, "unmask", survivors=survivors)["own"].keys() == {"0", "1", "2"}
    three.number = 2
    three.keys().shares().uploads()
    assert three.ask(0, "unmask", survivors=[0, 1])["key"].keys() == {"2"}


def test_a_round_that_was_opened_is_not_forgotten_for_a_later_one(three):
    """A server that was set back to an older record would ask so, and one that lies."""
    three.keys().shares().uploads()
    three.ask(0, "unmask", survivors=[0, 1, 2])
    three.number = 2
    three.keys()
    three.number = 1
    three.keys().shares().uploads()
    with pytest.raises(MaskError, match="their difference would be what single clients sent"):
        three.ask(0, "unmask", survivors=[0, 1])
    three.number = 2
    three.keys().shares().uploads()
    three.ask(0, "unmask", survivors=[0, 1, 2])
    three.number = 1
    with pytest.raises(MaskError, match="the sum of round 2 is open, so that one of round 1 would be another of the same"):
        three.ask(0, "keys", clients=[0, 1, 2])


def test_messages_out_of_turn_or_of_another_round_are_refused(three):
    with pytest.raises(MaskError, match="has no keys for this exchange"):
        three.ask(0, "shares", public={})
    with pytest.raises(MaskError, match="has no keys for this exchange"):
        three.upload(0, sealed={})
    three.keys()
    with pytest.raises(MaskError, match="its exchange is at"):
        three.ask(0, "unmask", survivors=[0, 1, 2])
    three.shares()
    with pytest.raises(MaskError, match="its exchange is at"):
        three.ask(0, "shares", public=three.public)
    three.number = 2
    with pytest.raises(MaskError, match="its exchange is at"):
        three.upload(0)


def test_a_client_that_has_not_trained_says_so_itself():
    before = {"q": {"A": torch.ones(1, 2), "B": torch.zeros(2, 1)}}
    with pytest.raises(MaskError, match="learning rate 0"):
        check_trained(0, before, before)
    with pytest.raises(MaskError, match="B = 0 in every layer"):
        check_trained(0, before, {"q": {"A": 2 * torch.ones(1, 2), "B": torch.zeros(2, 1)}})
    check_trained(0, before, {"q": {"A": torch.ones(1, 2), "B": torch.ones(2, 1)}})
    check_trained(0, {"q": {"A": torch.ones(1, 2)}}, {"q": {"A": 2 * torch.ones(1, 2)}})
