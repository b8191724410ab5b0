"""Masks cancel in the sum of whoever is left, look like noise before that, and what does not fit is refused."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel import masking
from umbel.masking import MaskError

EXCHANGE = bytes(range(32))


def draw(size, seed, scale=1.0):
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


class Group:
    """Clients 0 … K−1 with their keys and secrets, as one exchange has them."""

    def __init__(self, clients):
        self.clients = list(range(clients))
        self.private = {k: masking.fresh() for k in self.clients}
        self.secret = {k: masking.fresh() for k in self.clients}
        self.public = {k: masking.public(x) for k, x in self.private.items()}

    def masked(self, k, numbers, among=None):
        others = {v: self.public[v] for v in among or self.clients if v != k}
        result = numbers.clone()
        masking.mask(result, k, self.secret[k], self.private[k], others, EXCHANGE)
        return result

    def opened(self, total, there, among):
        """Takes the masks off with secrets from shares of as few clients as may be."""
        needed = masking.threshold(len(self.clients))
        holders = sorted(there)[:needed]

        def shared(secret):
            shares = masking.split(secret, needed, len(self.clients))
            return masking.joined({k: shares[k] for k in holders}, needed, lambda got: got == secret)

        total = total.clone()
        own = {k: shared(self.secret[k]) for k in there}
        gone = {k: shared(self.private[k]) for k in among if k not in there}
        masking.unmask(total, own, gone, self.public, EXCHANGE)
        return total


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(1, 40), st.randoms(use_true_random=False))
def test_the_sum_of_whoever_is_left_opens_to_its_bits(clients, size, random):
    group = Group(clients)
    spare = clients - masking.threshold(clients)
    lost = random.sample(group.clients, random.randint(0, spare))
    before = lost[: random.randint(0, len(lost))]  # these never sent their shares, the rest of the lost no upload
    among = [k for k in group.clients if k not in before]
    there = [k for k in group.clients if k not in lost]
    whole = {k: torch.tensor([random.randint(-(2**63), 2**63 - 1) for _ in range(size)]) for k in group.clients}
    total = sum(group.masked(k, whole[k], among) for k in there)
    assert torch.equal(group.opened(total, there, among), sum(whole[k] for k in there))


def test_with_one_secret_missing_the_sum_stays_noise():
    group = Group(4)
    whole = {k: torch.full((1000,), k + 1) for k in group.clients}
    total = sum(group.masked(k, whole[k]) for k in group.clients)
    masking.unmask(total, {k: group.secret[k] for k in (0, 1, 2)}, {}, group.public, EXCHANGE)
    assert int((total.abs() < 2**32).sum()) < 5
    assert_uniform(total)


def assert_uniform(numbers):
    """Chi-square of the 256 values of all bytes: beyond 400 with a probability below 1e-8."""
    counts = torch.bincount(numbers.view(torch.uint8).to(torch.int64), minlength=256).double()
    expected = counts.sum() / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < 400


def test_a_masked_upload_is_uniform_and_says_nothing_of_the_plain_one():
    group, size = Group(3), 2**15
    plain = masking.to_fixed(draw(size, 1), 40, 3)
    masked = group.masked(0, plain)
    assert_uniform(masked)
    pair = torch.stack([plain.double(), masked.double()])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 * size**-0.5
    # Two uploads under keys of their own differ by noise, too, even if what they hide is alike.
    assert_uniform(masked - Group(3).masked(0, plain))
    with pytest.raises(AssertionError):
        assert_uniform(plain)


def test_every_client_and_every_exchange_has_its_own_stream():
    group, nothing = Group(3), torch.zeros(64, dtype=torch.int64)
    streams = [group.masked(k, nothing) for k in group.clients]
    other = nothing.clone()
    masking.mask(other, 0, group.secret[0], group.private[0], {k: group.public[k] for k in (1, 2)}, bytes(32))
    streams.append(other)
    assert len({x.numpy().tobytes() for x in streams}) == 4


def test_a_stream_goes_on_where_its_chunk_ends():
    size, key = 2**17 + 5, masking.fresh()
    numbers = torch.zeros(size, dtype=torch.int64)
    masking.add_stream(numbers, key, 1)
    assert len(set(numbers.tolist())) == size
    masking.add_stream(numbers, key, -1)
    assert not numbers.any()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**31), st.integers(1, 10**6), st.floats(1e-6, 1.0))
def test_a_mean_is_within_the_stated_error(clients, seed, most, scale):
    weights = [1 + (seed * (k + 1)) % most for k in range(clients)]
    uploads = [draw(30, seed + k, scale) for k in range(clients)]
    total = sum(masking.to_fixed(x, n, clients) for x, n in zip(uploads, weights, strict=True))
    exact = sum(x.double() * n for x, n in zip(uploads, weights, strict=True)) / sum(weights)
    mean = masking.from_fixed(total, sum(weights)).double()
    bound = masking.rounding_error(clients, sum(weights)) + 2.0**-23 * exact.abs()
    assert bool(((mean - exact).abs() <= bound).all())


def test_the_largest_numbers_of_all_clients_still_add_up():
    for clients in (2, 3, 1000):
        most = 2.0**masking.WHOLE_BITS / clients * (1 - 1e-12)
        whole = masking.to_fixed(torch.tensor([most, -most], dtype=torch.float64), 1, clients)
        total = whole * clients
        assert masking.from_fixed(total, clients).tolist() == pytest.approx([most, -most], rel=1e-6)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 2.0**masking.WHOLE_BITS / 3 + 1e7])
def test_a_number_out_of_range_is_refused_before_it_is_masked(number):
    with pytest.raises(MaskError, match="has the training diverged"):
        masking.to_fixed(torch.tensor([1.0, number], dtype=torch.float64), 1, 3)


def test_the_range_is_that_of_rows_times_number():
    assert masking.to_fixed(torch.tensor([1e3]), 10**6, 3).tolist() == [10**9 * 2**masking.FRACTION_BITS]
    with pytest.raises(MaskError, match="beyond"):
        masking.to_fixed(torch.tensor([1e4]), 10**6, 3)


@pytest.mark.parametrize("number", [2**62 + 1, -(2**62) - 1, -(2**63)])
def test_a_sum_that_no_uploads_add_up_to_is_refused(number):
    with pytest.raises(MaskError, match="beyond what its uploads can add up to"):
        masking.from_fixed(torch.tensor([0, number]), 5)


# Shares


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 12), st.randoms(use_true_random=False))
def test_any_holders_that_are_enough_give_the_secret_and_fewer_do_not(clients, random):
    needed, secret = masking.threshold(clients), masking.fresh()
    shares = dict(enumerate(masking.split(secret, needed, clients)))
    assert {len(share) for share in shares.values()} == {masking.SHARE_BYTES}
    some = {k: shares[k] for k in random.sample(range(clients), needed)}
    assert masking.joined(some, needed, lambda got: got == secret) == secret
    some.popitem()
    with pytest.raises(MaskError, match=f"{needed} right ones are needed"):
        masking.joined(some, needed, lambda got: True)
    with pytest.raises(MaskError, match="do not give the secret"):
        masking.joined(some, needed - 1, lambda got: got == secret)


def test_a_wrong_share_is_passed_over_where_others_are_enough_and_refused_where_not():
    needed, secret = masking.threshold(6), masking.fresh()
    for wrong in range(6):
        shares = dict(enumerate(masking.split(secret, needed, 6)))
        shares[wrong] = bytes(masking.SHARE_BYTES)
        assert masking.joined(shares, needed, lambda got: got == secret) == secret
        few = {k: shares[k] for k in [wrong, *(k for k in range(6) if k != wrong)][:needed]}
        with pytest.raises(MaskError, match="do not give the secret"):
            masking.joined(few, needed, lambda got: got == secret)


def test_a_seal_opens_only_for_its_receiver_in_its_exchange():
    a, b, c = (masking.fresh() for _ in range(3))
    text = b"x" * (2 * masking.SHARE_BYTES)
    sealed = masking.seal(a, masking.public(b), EXCHANGE, 0, 1, text)
    assert len(sealed) == masking.SEALED_BYTES
    assert text[:8] not in sealed
    assert masking.unseal(b, masking.public(a), EXCHANGE, 0, 1, sealed) == text
    changed = sealed[:-1] + bytes([sealed[-1] ^ 1])
    for key, other, exchange, sender, receiver, what in [
        (c, masking.public(a), EXCHANGE, 0, 1, sealed),
        (b, masking.public(c), EXCHANGE, 0, 1, sealed),
        (b, masking.public(a), bytes(32), 0, 1, sealed),
        (b, masking.public(a), EXCHANGE, 2, 1, sealed),
        (b, masking.public(a), EXCHANGE, 0, 2, sealed),
        (b, masking.public(a), EXCHANGE, 0, 1, changed),
        (b, masking.public(a), EXCHANGE, 0, 1, b""),
    ]:
        with pytest.raises(MaskError, match="cannot be opened"):
            masking.unseal(key, other, exchange, sender, receiver, what)


@pytest.mark.parametrize("key", [bytes(32), b"short"])
def test_a_public_key_that_is_none_is_refused(key):
    with pytest.raises(MaskError, match="a public key that is none"):
        masking.pair_stream(masking.fresh(), key, EXCHANGE)


def test_both_ends_of_a_pair_have_the_same_stream():
    a, b = masking.fresh(), masking.fresh()
    assert masking.pair_stream(a, masking.public(b), EXCHANGE) == masking.pair_stream(b, masking.public(a), EXCHANGE)


def test_an_exchange_is_known_by_its_run_round_and_keys():
    keys = {0: (b"a" * 32, b"b" * 32), 1: (b"c" * 32, b"d" * 32)}
    other = {**keys, 1: (b"c" * 32, b"e" * 32)}
    made = [masking.exchange_of(*own) for own in (("run", 1, keys), ("run", 2, keys), ("ruN", 1, keys), ("run", 1, other))]
    assert len(set(made)) == 4
    assert masking.exchange_of("run", 1, dict(reversed(keys.items()))) == made[0]


@pytest.mark.parametrize("text", [None, 7, "?", "AAAA\n", ""])
def test_text_that_is_no_key_is_refused(text):
    with pytest.raises(MaskError, match="a key is "):
        masking.from_text(text, 32, "a key")


@pytest.mark.parametrize("package", ["cryptography.hazmat.primitives.ciphers", "flwr.common.secure_aggregation.crypto"])
def test_what_is_not_installed_is_said_with_the_extra_that_has_it(monkeypatch, package):
    masking.needs()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MaskError, match=r"pip install 'umbel\[federation\]'"):
        masking.needs()
