"""Who owns which rows."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel.client.split import deal, follow, split, values_to_clients
from umbel.config import Config, ConfigError, Data, Split

ROWS = [{"text": str(i), "label": "abc"[i // 40], "site": str(i % 5)} for i in range(120)]
TEST = [{"text": str(i), "label": "abc"[i // 20], "site": str(i % 5)} for i in range(60)]


def owners(seed=0, train=ROWS, test=TEST, **options):
    config = Config(data=Data(train="x"), split=Split(**options), seed=seed)
    return split(config, train, test, [0] * len(train), None)


def shares(rows, owner, clients):
    """Rows per client and label."""
    counts = Counter((k, row["label"]) for row, k in zip(rows, owner, strict=True))
    return [[counts[k, label] for label in "abc"] for k in range(clients)]


KINDS = [
    {"kind": "iid", "clients": 4},
    {"kind": "dirichlet", "clients": 4, "alpha": 0.3},
    {"kind": "by", "clients": 3, "column": "site"},
    {"kind": "shards", "clients": 4, "shards_per_client": 2},
]


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["kind"])
def test_every_row_has_one_owner_and_every_client_a_row(options):
    clients, train, test = owners(**options)
    assert (len(train), len(test)) == (120, 60)
    assert set(train) == set(range(clients)) >= set(test)


@pytest.mark.parametrize("options", [KINDS[0], KINDS[1], KINDS[3]], ids=lambda options: options["kind"])
def test_a_split_depends_on_the_seed(options):
    assert owners(seed=1, **options) == owners(seed=1, **options)
    assert owners(seed=1, **options) != owners(seed=2, **options)


def test_a_split_is_the_same_on_every_python_and_machine():
    _, train, test = owners(kind="dirichlet", clients=3, alpha=0.5)
    assert shares(ROWS, train, 3) == [[24, 12, 2], [8, 5, 26], [8, 23, 12]]
    assert train[:12] == [0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    assert test[:12] == [0, 1, 0, 0, 1, 2, 0, 0, 2, 2, 0, 0]


def test_iid_is_a_shuffle_and_not_contiguous_blocks():
    _, train, _ = owners(kind="iid", clients=4)
    assert set(Counter(train).values()) == {30}
    for counts in shares(ROWS, train, 4):
        assert min(counts) >= 4, "a client with one contiguous quarter of a sorted file would lack a label"
    assert train != [i % 4 for i in range(120)]


def test_iid_sizes_differ_by_one_at_most():
    _, train, _ = owners(train=ROWS[:10], kind="iid", clients=4)
    assert sorted(Counter(train).values()) == [2, 2, 3, 3]


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["kind"])
def test_a_client_is_tested_on_the_mixture_on_which_it_trains(options):
    clients, train, test = owners(**options)
    for trained, tested in zip(shares(ROWS, train, clients), shares(TEST, test, clients), strict=True):
        # 40 training and 20 test rows per label
        assert all(abs(n / 2 - m) <= 1 for n, m in zip(trained, tested, strict=True)), (trained, tested)


def test_small_alpha_is_skewed_and_large_alpha_is_even():
    def largest_share(alpha):
        _, train, _ = owners(kind="dirichlet", clients=4, alpha=alpha)
        return np.mean([max(column) / 40 for column in zip(*shares(ROWS, train, 4), strict=True)])

    assert largest_share(1000) < 0.3 < 0.6 < largest_share(0.1)


def test_dirichlet_draws_each_label_on_its_own():
    _, train, _ = owners(kind="dirichlet", clients=4, alpha=0.3)
    a, b, c = zip(*shares(ROWS, train, 4), strict=True)
    assert a != b != c != a


def test_dirichlet_draws_again_until_everyone_has_a_row():
    for seed in range(20):
        _, train, test = owners(seed=seed, kind="dirichlet", clients=6, alpha=0.1)
        assert set(train) == set(test) == set(range(6))


def test_dirichlet_gives_up_with_advice():
    with pytest.raises(ConfigError, match=r"clients = 200.*Raise alpha, or take fewer clients"):
        owners(kind="dirichlet", clients=200, alpha=0.3)


def test_a_label_without_training_rows_is_dealt_like_all_rows():
    owner = np.array([0] * 30 + [1] * 10)
    dealt = follow(["a"] * 40, owner, ["new"] * 8, 2, np.random.default_rng(0))
    assert Counter(dealt.tolist()) == {0: 6, 1: 2}


def test_rows_without_labels_can_be_shuffled_but_not_split_by_label():
    bare = [{"question": str(i)} for i in range(20)]
    clients, train, test = owners(train=bare, test=bare[:8], kind="iid", clients=4)
    assert Counter(train) == dict.fromkeys(range(clients), 5)
    assert Counter(test) == dict.fromkeys(range(clients), 2)
    for kind in ("dirichlet", "shards"):
        with pytest.raises(ConfigError, match=r"no column 'label'. Columns found: question"):
            owners(train=bare, test=bare, kind=kind, clients=2)


def test_by_makes_one_client_per_value_in_sorted_order():
    clients, train, test = owners(kind="by", column="site")
    assert clients == 5
    assert train == [i % 5 for i in range(120)]
    assert test == [i % 5 for i in range(60)]


def test_by_sorts_numbers_as_numbers():
    assert values_to_clients(["10", "9", "2"], 0) == {"2": 0, "9": 1, "10": 2}
    assert values_to_clients(["b10", "b9"], 0) == {"b10": 0, "b9": 1}


def test_by_deals_values_in_turn_to_fewer_clients():
    assert values_to_clients(list("edcba"), 2) == {"a": 0, "b": 1, "c": 0, "d": 1, "e": 0}


def test_by_refuses_more_clients_than_values():
    with pytest.raises(ConfigError, match=r"got 6, but the column has 5 values.*Allowed: 1 to 5"):
        owners(kind="by", column="site", clients=6)


def test_by_names_the_columns_found_where_its_own_is_missing():
    with pytest.raises(ConfigError, match=r"'hospital'.*Columns found: text, label, site"):
        owners(kind="by", column="hospital")


def test_by_refuses_test_rows_that_no_client_owns():
    with pytest.raises(ConfigError, match=r"\['Mars'\], which no training row has"):
        owners(test=[{"label": "a", "site": "Mars"}], kind="by", column="site")


def test_by_deals_a_common_test_file_without_the_column_by_label():
    common = [{"label": row["label"]} for row in TEST]
    _, _, test = owners(test=common, kind="by", column="site")
    assert Counter(test) == dict.fromkeys(range(5), 12)


def test_shards_give_each_client_few_labels():
    _, train, _ = owners(kind="shards", clients=6, shards_per_client=1)
    assert all(sum(n > 0 for n in counts) == 1 for counts in shares(ROWS, train, 6))
    assert set(Counter(train).values()) == {20}


def test_shards_of_one_label_are_not_contiguous_blocks():
    _, train, _ = owners(train=ROWS[:40], kind="shards", clients=2, shards_per_client=1)
    assert Counter(train) == {0: 20, 1: 20}
    assert 5 < sum(train[:20]) < 15


def test_shards_refuses_more_pieces_than_rows():
    with pytest.raises(ConfigError, match=r"4 × 40 pieces of 120"):
        owners(kind="shards", clients=4, shards_per_client=40)


def test_a_client_without_rows_is_an_error_with_advice():
    with pytest.raises(ConfigError, match=r"clients \[2, 3\] of 4 own no training row.*Take fewer clients or more rows"):
        owners(train=ROWS[:2], kind="iid", clients=4)


@given(st.integers(0, 60), st.lists(st.floats(0.001, 100), min_size=1, max_size=8), st.integers(0, 9))
def test_dealing_hands_out_every_row_within_one_of_its_share(n, weights, seed):
    dealt = deal(n, weights, np.random.default_rng(seed))
    counts = np.bincount(dealt, minlength=len(weights))
    assert counts.sum() == n
    assert np.all(np.abs(counts - n * np.array(weights) / np.sum(weights)) < 1 + 1e-9)


def test_equal_remainders_favour_no_client():
    generator = np.random.default_rng(0)
    got = sum(np.bincount(deal(1, [1, 1, 1, 1], generator), minlength=4) for _ in range(400))
    assert min(got) > 70
