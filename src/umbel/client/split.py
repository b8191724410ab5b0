"""Who owns which rows: the kinds of `[split]`.

A split depends on the seed and the rows alone. Labels and column values are taken in sorted order, never in the order of a
set, and every draw is from a generator whose seed is derived from the run's.

Test rows follow the training rows, so that a client is tested on the mixture on which it trains: by the same column for
"by", by file for "files" where each client has a test file, and otherwise those of one label go to clients in proportion to
the training rows of that label which each owns.
"""

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from umbel.algebra import seed_of
from umbel.config import Config, ConfigError

Row = dict[str, Any]
Owners = np.ndarray
"""One client number per row, int64."""

REDRAWS = 1000


def split(
    config: Config, train: list[Row], test: list[Row], train_files: Sequence[int], test_files: Sequence[int] | None
) -> tuple[int, list[int], list[int]]:
    """Decides who owns which rows.

    A Dirichlet draw that leaves a client without a training row (or without a test row, where there are as many as clients)
    is drawn again from the next derived seed, up to `REDRAWS` times.

    Args:
        config: Its `split` and `seed`, and the label column of its `data`.
        train: Training rows.
        test: Test rows.
        train_files: For "files": the file each training row came from.
        test_files: Likewise for test rows; None where they come from one file for all.

    Returns:
        The number of clients K, and for each training and each test row the client 0 … K−1 that owns it. Every client owns
        a training row; of test rows a client may own none.

    Raises:
        ConfigError: The rows do not allow this split.
    """
    labels, test_labels = _labels(config, train), _labels(config, test)
    for attempt in range(REDRAWS if config.split.kind == "dirichlet" else 1):
        generator = np.random.default_rng(seed_of(config.seed, "split", attempt))
        clients, owner = _train_owners(config, train, labels, train_files, generator)
        empty = np.flatnonzero(np.bincount(owner, minlength=clients) == 0)
        if len(empty):
            continue
        owner_test = _test_owners(config, train, test, test_files, clients)
        if owner_test is None:
            owner_test = follow(labels, owner, test_labels, clients, generator)
        untested = len(set(owner_test.tolist())) < clients <= len(test)
        if not untested or config.split.kind != "dirichlet":
            return clients, owner.tolist(), owner_test.tolist()
    if config.split.kind == "dirichlet":
        raise ConfigError(
            f"[split] kind = 'dirichlet', clients = {config.split.clients}, alpha = {config.split.alpha}: in {REDRAWS} draws "
            f"over {len(train)} training and {len(test)} test rows some client always had no row. "
            "Raise alpha, or take fewer clients or more rows"
        )
    raise ConfigError(
        f"[split] kind = {config.split.kind!r}: clients {empty.tolist()} of {clients} own no training row, of {len(train)} in "
        "all. Take fewer clients or more rows (data.max_train_rows, data.validation and data.labels take rows away)"
    )


def unseen_clients(config: Config, clients: int) -> list[int]:
    """Returns the clients that take no part: `split.unseen` of them, at least one where it is not 0, drawn by the seed.

    Raises:
        ConfigError: Nobody would be left.
    """
    share = config.split.unseen
    count = max(1, round(share * clients)) if share > 0 else 0
    if count >= clients:
        raise ConfigError(f"split.unseen: got {share}, which leaves none of {clients} clients to train")
    drawn = np.random.default_rng(seed_of(config.seed, "unseen")).permutation(clients)[:count]
    return sorted(drawn.tolist())


def deal(n: int, weights: Sequence[float] | np.ndarray, generator: np.random.Generator) -> Owners:
    """Deals n rows to clients in proportion to weights, by largest remainder; equal remainders and the order are random.

    Args:
        n: Number of rows.
        weights: One per client, ≥ 0, with a sum > 0.
        generator: Source of the draws.

    Returns:
        One client number per row. Client k gets ⌊n w_k / Σ w⌋ rows or one more.

    >>> sorted(deal(4, [2, 1, 1], np.random.default_rng(0)).tolist())
    [0, 0, 1, 2]
    """
    share = n * np.asarray(weights, dtype=np.float64) / np.sum(weights)
    counts = np.floor(share).astype(np.int64)
    rest = n - int(counts.sum())
    by_remainder = np.lexsort((generator.random(len(share)), -(share - counts)))
    counts[by_remainder[:rest]] += 1
    return generator.permutation(np.repeat(np.arange(len(share)), counts))


def follow(labels: list[str], owner: Owners, test_labels: list[str], clients: int, generator: np.random.Generator) -> Owners:
    """Deals test rows of each label in proportion to the training rows of that label that each client owns.

    A label without training rows, and rows of an unlabelled task, are dealt in proportion to all training rows.

    Returns:
        One client number per test row.
    """
    train_labels, wanted = np.asarray(labels), np.asarray(test_labels)
    result = np.zeros(len(test_labels), dtype=np.int64)
    for label in sorted(set(test_labels)):
        counts = np.bincount(owner[train_labels == label], minlength=clients)
        if not counts.sum():
            counts = np.bincount(owner, minlength=clients)
        rows = np.flatnonzero(wanted == label)
        result[rows] = deal(len(rows), counts, generator)
    return result


def _labels(config: Config, rows: list[Row]) -> list[str]:
    """Returns each row's label, or "" for all of them where some row has none."""
    column = config.data.label
    return [str(row[column]) for row in rows] if all(column in row for row in rows) else [""] * len(rows)


def _train_owners(
    config: Config, train: list[Row], labels: list[str], files: Sequence[int], generator: np.random.Generator
) -> tuple[int, Owners]:
    split, n = config.split, len(train)
    if split.kind == "files":
        clients = len(config.data.train)
        if split.clients not in (0, clients):
            raise ConfigError(
                f"split.clients: got {split.clients}, but data.train lists {clients} files and [split] kind = 'files' makes "
                "each a client. Leave split.clients out"
            )
        return clients, np.asarray(files, dtype=np.int64)
    if split.kind == "by":
        values = _column(train, split.column, "training")
        client_of = values_to_clients(values, split.clients)
        return max(client_of.values()) + 1, np.array([client_of[value] for value in values], dtype=np.int64)
    if split.kind == "iid":
        # A shuffle, then one row to each client in turn: sizes differ by one at most, and no client gets a contiguous block.
        owner = np.empty(n, dtype=np.int64)
        owner[generator.permutation(n)] = np.arange(n) % split.clients
        return split.clients, owner
    if n and not any(labels):
        raise ConfigError(
            f"[split] kind = {split.kind!r} splits by label, but the training rows have no column {config.data.label!r}. "
            f"Columns found: {', '.join(train[0])}. Set data.label to one of them, or take kind = 'iid'"
        )
    return split.clients, (_dirichlet if split.kind == "dirichlet" else _shards)(config, labels, generator)


def _dirichlet(config: Config, labels: list[str], generator: np.random.Generator) -> Owners:
    owner, array = np.empty(len(labels), dtype=np.int64), np.asarray(labels)
    for label in sorted(set(labels)):
        rows = np.flatnonzero(array == label)
        shares = generator.dirichlet(np.full(config.split.clients, config.split.alpha))
        owner[rows] = deal(len(rows), shares, generator)
    return owner


def _shards(config: Config, labels: list[str], generator: np.random.Generator) -> Owners:
    pieces = config.split.clients * config.split.shards_per_client
    if not 1 <= pieces <= len(labels):
        raise ConfigError(
            f"[split] kind = 'shards': clients × shards_per_client = {config.split.clients} × {config.split.shards_per_client} "
            f"pieces of {len(labels)} training rows; allowed: 1 to {len(labels)} pieces"
        )
    # Rows of one label are in random order, so that which of them fall into one piece does not depend on the file's order.
    shuffled = generator.permutation(len(labels))
    by_label = shuffled[np.argsort(np.asarray(labels)[shuffled], kind="stable")]
    dealt = generator.permutation(pieces) % config.split.clients
    owner = np.empty(len(labels), dtype=np.int64)
    for client, rows in zip(dealt, np.array_split(by_label, pieces), strict=True):
        owner[rows] = client
    return owner


def _test_owners(
    config: Config, train: list[Row], test: list[Row], test_files: Sequence[int] | None, clients: int
) -> Owners | None:
    """Returns the owners of test rows where a column or a file names them, else None."""
    if config.split.kind == "files" and test_files is not None:
        return np.asarray(test_files, dtype=np.int64)
    column = config.split.column
    if config.split.kind != "by" or not any(column in row for row in test):
        return None
    client_of = values_to_clients(_column(train, column, "training"), config.split.clients)
    values = _column(test, column, "test")
    unknown = sorted(set(values) - set(client_of))
    if unknown:
        raise ConfigError(
            f"[split] kind = 'by', column = {column!r}: test rows have {unknown[:5]}, which no training row has, so no client "
            f"owns them. Training rows have: {', '.join(sorted(client_of))}"
        )
    return np.array([client_of[value] for value in values], dtype=np.int64)


def values_to_clients(values: list[str], clients: int) -> dict[str, int]:
    """Gives each value of a column to a client: sorted (as numbers where all are), then dealt in turn.

    Args:
        values: One per row.
        clients: Their number K; 0 makes one per value.

    Raises:
        ConfigError: More clients than values.

    >>> values_to_clients(["10", "9", "9", "11"], 2)
    {'9': 0, '10': 1, '11': 0}
    """
    distinct = sorted(set(values))
    with contextlib.suppress(ValueError):
        distinct.sort(key=lambda value: (float(value), value))
    if clients > len(distinct):
        counts = Counter(values)
        raise ConfigError(
            f"split.clients: got {clients}, but the column has {len(distinct)} values "
            f"({', '.join(f'{value}: {counts[value]} rows' for value in distinct[:10])}). "
            f"Allowed: 1 to {len(distinct)}, or 0 for one client per value"
        )
    return {value: i % (clients or len(distinct)) for i, value in enumerate(distinct)}


def _column(rows: list[Row], column: str, which: str) -> list[str]:
    for number, row in enumerate(rows):
        if column not in row:
            raise ConfigError(
                f"split.column = {column!r}: {which} row {number} has no such column. Columns found: {', '.join(row)}"
            )
    return [str(row[column]) for row in rows]
