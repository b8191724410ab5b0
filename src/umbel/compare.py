"""Several methods over several seeds, something held equal between them, and nothing chosen on test rows.

A comparison is made of ordinary jobs: one per seed, with central and local baselines, and one, `choose`, that scores the
candidates for hyper-parameters on validation rows. What is written here is which jobs, and at which rank; `umbel.run` runs
them, `umbel.report` reads them back.
"""

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from umbel import config as configuration
from umbel import method as methods
from umbel import report, testing
from umbel import run as running
from umbel.config import Config, ConfigError
from umbel.method import HELD, Method
from umbel.record import RecordError, locked, write_file, write_json

Table = dict[str, Any]
Layers = Counter[tuple[int, int]]
"""How many adapted weights have the shape (d_out, d_in)."""

EQUAL = ("rank", "parameters", "bytes")
KEYS = ("methods", "seeds", "equal", "choose")
VALIDATION = 0.1
"""Share of the training rows on which is chosen where the file gives no `data.validation`."""

AHEAD = 8
"""Ranks looked at beyond the largest that fits."""

UNSAFE = r"[^\w.+-]"
"""What is not taken over from a value into a folder's name."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class Entry:
    """One method of a comparison.

    Args:
        label: Its name in tables.
        table: As in `[[method]]`.
        choose: Values to choose from, by key: an option of the method's, or `section.key`.
    """

    label: str
    table: Table
    choose: dict[str, list[Any]] = field(default_factory=dict[str, list[Any]])

    def candidates(self) -> list[Table]:
        """Returns every combination of the values to choose from; one that is empty where there is nothing to choose."""
        return [dict(zip(self.choose, values)) for values in itertools.product(*self.choose.values())]


@dataclass(frozen=True)
class Comparison:
    """What `[compare]` asks for, checked.

    Args:
        shared: The rest of the file.
        entries: The methods; the first is the reference: FedIT where it is among them.
        seeds: One job for each; hyper-parameters are chosen at the first.
        equal: "rank", "parameters" or "bytes".
    """

    shared: Table
    entries: list[Entry]
    seeds: list[int]
    equal: str

    @property
    def chooses(self) -> bool:
        return any(len(entry.candidates()) > 1 for entry in self.entries)

    @property
    def validation(self) -> float:
        """The share of the training rows on which is chosen."""
        return self.shared.get("data", {}).get("validation") or VALIDATION

    def job(self, seed: int, tables: list[Table], validation: float | None = None) -> Table:
        """Returns the job that runs these methods at a seed; `validation` replaces the file's where it is given."""
        data = self.shared.get("data", {})
        data = data if validation is None else {**data, "validation": validation}
        return {**self.shared, "seed": seed, "data": data, "method": tables}


def read(table: Table) -> Comparison:
    """Reads the table of a file with `[compare]`.

    Raises:
        ConfigError: Something in it cannot be compared; also what would only be found when its turn comes.
    """
    own = table.get("compare")
    if not isinstance(own, dict):
        raise ConfigError("[compare] is missing: a table with methods and seeds; a file without it is for `umbel run`")
    for key in own:
        if key not in KEYS:
            raise ConfigError(
                f"unknown key 'compare.{key}'. {configuration.nearest(key, list(KEYS))}Allowed here: {', '.join(KEYS)}"
            )
    for key, instead in (("method", "compare.methods"), ("seed", "compare.seeds")):
        if key in table:
            raise ConfigError(f"'{key}' beside [compare]: give {instead} in its place")
    seeds, equal = own.get("seeds", [1, 2, 3]), own.get("equal", "rank")
    if not isinstance(seeds, list) or not seeds or any(type(x) is not int or x < 0 for x in seeds) or _twice(seeds):
        raise ConfigError(f"'compare.seeds': got {seeds!r}, allowed: a list of different numbers, 0 or more each")
    if equal not in EQUAL:
        raise ConfigError(f"'compare.equal': got {equal!r}, allowed: {', '.join(map(repr, EQUAL))}")
    shared = {key: value for key, value in table.items() if key != "compare"}
    entries = _entries(own.get("methods"), _choose_lists(own.get("choose", {}), "compare"))
    comparison = Comparison(shared, _reference_first(entries), seeds, equal)
    _check(comparison)
    return comparison


def _twice(values: list[Any]) -> bool:
    return len(set(values)) < len(values)


def _entries(given: Any, common: dict[str, list[Any]]) -> list[Entry]:
    if not isinstance(given, list) or not given or not all(isinstance(x, (str, dict)) for x in given):
        raise ConfigError(
            f"'compare.methods': got {given!r}, allowed: a list of names, or [[compare.methods]] tables, each with a name"
        )
    for key in common:
        if "." not in key:
            raise ConfigError(
                f"'compare.choose': {key!r} is for every method, so it is section.key, such as training.learning_rate; "
                "give a method's own option in its own choose"
            )
    result: list[Entry] = []
    for entry in given:
        table = {"name": entry} if isinstance(entry, str) else {key: x for key, x in entry.items() if key != "choose"}
        name = table.get("name", "")
        label = str(table.get("label", name))
        for section in running.MAY_DIFFER - {"method"}:
            if not isinstance(table.get(section, {}), dict):
                raise ConfigError(f"compare.methods {label!r}: '{section}' is a table, got {table[section]!r}")
        own = _choose_lists(entry.get("choose", {}), f"compare.methods {label!r}") if isinstance(entry, dict) else {}
        # What a method says for itself counts more than what is said for all.
        of_all = {key: values for key, values in common.items() if not _says(table, key)}
        result.append(Entry(label, {**table, "label": label}, {**of_all, **own}))
    return result


def _says(table: Table, key: str) -> bool:
    section, _, name = key.partition(".")
    return isinstance(table.get(section), dict) and name in table[section]


def _choose_lists(given: Any, where: str) -> dict[str, list[Any]]:
    if not isinstance(given, dict):
        raise ConfigError(f"'{where}.choose': got {given!r}, allowed: a table of lists, such as {{ energy = [0.8, 0.9] }}")
    sections = sorted(running.MAY_DIFFER - {"method"})
    for key, values in given.items():
        if not isinstance(values, list) or not values:
            quoted = f' ("{key}" in quotes)' if isinstance(values, dict) else ""
            raise ConfigError(f"'{where}.choose': {key}: got {values!r}, allowed: a list of values{quoted}")
        if _twice(list(map(str, values))):
            raise ConfigError(f"'{where}.choose': {key}: got {values!r}, allowed: different values")
        if "." in key and key.partition(".")[0] not in sections:
            raise ConfigError(
                f"'{where}.choose': {key}: methods share that section; allowed: keys of {', '.join(sections)}, "
                "and the method's own options"
            )
    return dict(given)


def _reference_first(entries: list[Entry]) -> list[Entry]:
    """FedIT first where it is there: differences are to the first, and the baselines train with its options."""
    place = next((n for n, entry in enumerate(entries) if entry.table.get("name") == "fedit"), 0)
    return [entries[place], *entries[:place], *entries[place + 1 :]]


def _check(comparison: Comparison) -> None:
    """Builds every configuration that will be run, so that a mistake is found before the first is."""
    labels = [entry.label for entry in comparison.entries]
    if _twice(labels):
        label = next(label for label in labels if labels.count(label) > 1)
        raise ConfigError(f"'compare.methods': the label {label!r} comes twice; give each its own `label`")
    for entry in comparison.entries:
        for values in entry.candidates():
            table = set_values(entry.table, values)
            configuration.configs(comparison.job(comparison.seeds[0], [table]))
            if comparison.equal != "rank":
                _check_lora(comparison, entry, table)
    data = comparison.shared.get("data", {})
    if comparison.chooses and not data.get("test"):
        raise ConfigError("data.test is missing: what is chosen on validation rows is compared on test rows")


def _check_lora(comparison: Comparison, entry: Entry, table: Table) -> None:
    """Refuses ranks of one's own where ranks follow from what is held equal."""
    shared, own = comparison.shared.get("lora", {}), table.get("lora", {})
    lora = {**shared, **own}
    why = f"compare.equal = {comparison.equal!r} sets the ranks"
    for key in ("r", "lora_alpha"):
        if isinstance(lora.get(key), list):
            raise ConfigError(f"lora.{key}: got {lora[key]}, but {why}; give one number, or compare.equal = 'rank'")
    for key in ("rank_by", "rank_pattern", "alpha_pattern"):
        if lora.get(key):
            raise ConfigError(f"lora.{key}: got {lora[key]}, but {why}; leave it out, or compare.equal = 'rank'")
    if "r" in own:
        raise ConfigError(
            f"compare.methods {entry.label!r}: lora.r: got {own['r']}, but {why}; leave it out, or compare.equal = 'rank'"
        )


def set_values(table: Table, values: Mapping[str, Any]) -> Table:
    """Returns a method's table with options, and keys of sections, set.

    >>> set_values({"name": "florist", "lora": {"r": 4}}, {"energy": 0.8, "lora.lora_alpha": 8})
    {'name': 'florist', 'lora': {'r': 4, 'lora_alpha': 8}, 'energy': 0.8}
    """
    result = dict(table)
    for key, value in values.items():
        section, dot, name = key.partition(".")
        result[section] = {**result.get(section, {}), name: value} if dot else value
    return result


# What is held equal


@dataclass(frozen=True)
class _Counts:
    """Numbers of factors of one phase and client: trained, sent, received by name and as merges; and whether all began anew."""

    trained: int
    up: int
    factors: dict[str, int]
    merged: int
    afresh: bool


def _phases(method: Method, rounds: int, layers: Layers, r: int, asked: int) -> Iterator[tuple[Method, _Counts]]:
    """Yields every phase of a run with what a client of rank r trains, sends and receives in it.

    Counted by combining uploads of as many invented clients, once for each different phase and shape of layer.
    """
    known: dict[Any, _Counts] = {}
    shapes = {f"{d_out}x{d_in}": (d_out, d_in) for d_out, d_in in layers}
    held = {layer: {"A": _drawn(r, d_in), "B": _drawn(d_out, r)} for layer, (d_out, d_in) in shapes.items()}
    clients: list[testing.Client] = []
    for phase in method.plan(rounds):
        kind = type(phase), repr(getattr(phase, "__dict__", phase))
        if kind not in known:
            if "R" in phase.trains:
                held = {layer: {"R": _drawn(r, r), **own} for layer, own in held.items()}
            trial = testing.Trial(phase, held, shapes)
            clients = clients if phase.continues else trial.clients((1.0,) * asked, (r,) * asked)
            downloads, sent, own = trial.combined(clients), trial.upload(clients[0]), clients[0].factors
            trains = {layer: [own[layer][name] for name in phase.trains] for layer in shapes}
            factors = {layer: download.factors for layer, download in downloads.items()}
            names = sorted({name for own in factors.values() for name in own})

            def size(of: Mapping[str, Iterable[Any]]) -> int:
                return sum(layers[shape] * sum(x.numel() for x in of[layer]) for layer, shape in shapes.items())

            known[kind] = _Counts(
                trained=size(trains),
                up=size({layer: sent[layer].values() for layer in shapes}),
                factors={name: size({layer: [x[name]] if name in x else [] for layer, x in factors.items()}) for name in names},
                merged=size({layer: downloads[layer].merge or () for layer in shapes}),
                afresh=any(download.reset is not None for download in downloads.values()),
            )
            held = {layer: {**own, **_of_rank(downloads[layer].factors, own)} for layer, own in held.items()}
        yield phase, known[kind]


def trained(method: Method, rounds: int, layers: Layers, r: int) -> float:
    """Returns how many numbers of factors a client trains at rank r; the mean over rounds where they differ."""
    counts = [count.trained for phase, count in _phases(method, rounds, layers, r, asked=1) if phase.trains]
    return sum(counts) / len(counts)


def travelled(method: Method, rounds: int, layers: Layers, r: int, asked: int, clients: int | None = None) -> float:
    """Returns how many numbers of factors a client sends and receives in a whole run at rank r, all phases included.

    Every client gets what it is owed when it is asked: of each factor the last, of merges all. What the last phase leaves
    is sent to nobody.

    Args:
        asked: Clients of a round.
        clients: K; None where all are asked.
    """
    everyone = range(clients or asked)
    owed = [dict[str, int]() for _ in everyone]
    merged, total, took_part, last = [0 for _ in everyone], 0, set[int](), list[int]()
    for number, (phase, count) in enumerate(_phases(method, rounds, layers, r, asked)):
        chosen = random.Random(number).sample(everyone, asked) if phase.trains else list(everyone)
        if not phase.trains and phase.measures == "factors":
            chosen = sorted(took_part)
        chosen = last if phase.continues else chosen
        for k in chosen if phase.sends else []:
            total += count.up + sum(owed[k].values()) + merged[k]
            owed[k], merged[k] = {}, 0
        took_part |= set(chosen) if phase.trains else set()
        last = chosen
        for k in everyone:
            # What is given for the next phase goes to those who are in it, and is over then.
            before = {name: size for name, size in owed[k].items() if name in HELD and not count.afresh}
            owed[k] = before | {name: size for name, size in count.factors.items() if name in HELD or k in chosen}
            merged[k] += count.merged
    return total / len(everyone)


def _drawn(rows: int, columns: int) -> Any:
    """Factors to hold that are no zeros: what is counted should not be the special case."""
    import torch

    generator = torch.Generator().manual_seed(rows * 1_000_003 + columns)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def _of_rank(factors: Mapping[str, Any], held: Mapping[str, Any]) -> dict[str, Any]:
    """Those that keep the adapter's rank; a client cuts or pads the others."""
    return {name: x for name, x in factors.items() if name not in held or x.shape == held[name].shape}


def largest_rank(count: Callable[[int], float], budget: float, start: int, most: int) -> int:
    """Returns the largest rank whose count is within the budget, at least 1 and at most `most`.

    The count need not rise with every step (RAVAN's falls where its heads divide the rank): looked at are `AHEAD` ranks beyond.

    >>> largest_rank(lambda r: r * r, 50, start=2, most=100)
    7
    """
    low, high = 1, max(2, min(start, most))
    while high <= most and count(high) <= budget:
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= budget else (low, middle)
    while more := [r for r in range(low + 1, min(low + AHEAD, most) + 1) if count(r) <= budget]:
        low = more[-1]
    return low


@dataclass
class Ranks:
    """Chooses ranks such that methods train, or send and receive, no more than FedIT does at the file's rank.

    Args:
        equal: "parameters" or "bytes".
        reference: The file's own configuration.
        layers: What is adapted.
        clients: K, of those that take part.
    """

    equal: str
    reference: Config
    layers: Layers
    clients: int

    def __post_init__(self) -> None:
        self._known: dict[str, tuple[int, float]] = {}
        self.budget = self._count(methods.load("fedit"), self.reference, self.reference.lora.rank)

    def _count(self, method: Method, config: Config, r: int) -> float:
        if self.equal == "parameters":
            return trained(method, config.rounds, self.layers, r)
        asked = min(config.server.clients_per_round or self.clients, self.clients)
        numbers = travelled(method, config.rounds, self.layers, r, asked, self.clients)
        return numbers * ITEM_BYTES[config.wire.dtype]

    def of(self, config: Config) -> tuple[int, float]:
        """Returns a method's rank and what it counts at that rank; at rank 1 that may be more than the budget."""
        key = json.dumps([configuration.to_table(config)[name] for name in ("method", "server", "wire")], default=str)
        if key not in self._known:
            method = methods.load(config.method.name, **config.method.options)
            most = min(min(shape) for shape in self.layers)
            r = largest_rank(lambda r: self._count(method, config, r), self.budget, self.reference.lora.rank, most)
            self._known[key] = r, self._count(method, config, r)
        return self._known[key]


def _ranks(comparison: Comparison) -> Ranks | None:
    if comparison.equal == "rank":
        return None
    from umbel.client import data, model
    from umbel.client.adapter import Adapter

    plain = {"name": "fedit", "label": "fedit"}
    config = configuration.configs(comparison.job(comparison.seeds[0], [plain]))["fedit"]
    dataset = data.load(config)
    base = model.load(config, len(dataset.labels))
    adapter = Adapter(base.model, config.lora, base.heads, config.seed)
    layers = Counter((shape.d_out, shape.d_in) for shape in adapter.layers.values())
    return Ranks(comparison.equal, config, layers, dataset.clients - len(dataset.unseen))


def with_rank(table: Table, config: Config, r: int) -> Table:
    """Returns a method's table at rank r, and at the scale it had: lora_alpha follows, unless the method has its own."""
    own = table.get("lora", {})
    alpha = config.lora.scale * (r**0.5 if config.lora.use_rslora else r)
    return {**table, "lora": {"lora_alpha": alpha, **own, "r": r}}


# Running


def compare(table: Table, folder: Path, listen: running.Listener = lambda event: None) -> Path:
    """Runs a comparison to its end, or on from where its folder stops; what is finished is not repeated.

    Args:
        table: A configuration with `[compare]`, as TOML gives it.
        folder: Where everything goes: `choose/` and `seed-1/` …, each a job; `chosen.json`, `compare.json`,
            `comparison.csv` and `comparison.html`, which are written anew after each seed.
        listen: Called with the events of `umbel.run.run`, and with `{"event": "note", "text"}`.

    Returns:
        The folder.

    Raises:
        ConfigError: The comparison cannot be run.
        RecordError: The folder holds somebody else's files, or runs of another configuration.
    """
    comparison = read(table)
    with locked(folder):
        _check_ours(folder)
        begun = (folder / "compare.toml").is_file()
        if not begun:
            write_file(folder / "compare.toml", tomli_w.dumps(table).encode())
        ranks = _ranks(comparison)
        chosen = _choose(comparison, folder, ranks, listen)
        tables = [_candidate(comparison, entry, chosen[entry.label]["values"], ranks) for entry in comparison.entries]
        validation = 0.0 if comparison.chooses else None
        about = _about(comparison, chosen, tables, ranks)
        # What says how results came about is written only when they still come about so.
        for seed in comparison.seeds:
            running.check_begun(comparison.job(seed, tables, validation), folder / f"seed-{seed}")
        if begun:
            write_file(folder / "compare.toml", tomli_w.dumps(table).encode())
        if comparison.chooses:
            write_json(folder / "chosen.json", {**about["chosen_on"], "methods": chosen})
        write_json(folder / "compare.json", about)
        for text in report.rank_notes(about):
            listen({"event": "note", "text": text})
        for number, seed in enumerate(comparison.seeds, 1):
            where = f"seed {seed} ({number} of {len(comparison.seeds)})"
            job = comparison.job(seed, tables, validation)
            running.run(job, folder / f"seed-{seed}", _prefixed(listen, where), comparing=True)
            report.write_comparison(folder)
    return folder


def _check_ours(folder: Path) -> None:
    strange = sorted(path.name for path in folder.iterdir() if path.name not in (".lock", "compare.toml.partial"))
    if strange and not (folder / "compare.toml").is_file():
        raise RecordError(f"{folder} is not empty ({', '.join(strange[:3])}) and holds no comparison; give another folder")


def _prefixed(listen: running.Listener, where: str) -> running.Listener:
    """Says of every run which seed it belongs to; who owns which rows is in the job's folder."""

    def told(event: dict[str, Any]) -> None:
        if event["event"] == "member":
            event = {**event, "label": f"{event['label']}, {where}"}
        elif event["event"] == "stage":
            event = {**event, "text": f"{where}: {event['text']}"}
        if event["event"] != "split":
            listen(event)

    return told


def _candidate(comparison: Comparison, entry: Entry, values: Table, ranks: Ranks | None) -> Table:
    """Returns a method's table with values and rank set."""
    table = set_values(entry.table, values)
    if ranks is None:
        return table
    config = configuration.configs(comparison.job(comparison.seeds[0], [table]))[entry.label]
    return with_rank(table, config, ranks.of(config)[0])


def candidate_label(label: str, values: Table) -> str:
    """Returns the name, and folder, of one candidate.

    >>> candidate_label("florist", {"energy": 0.9, "training.learning_rate": 1e-3})
    'florist,energy=0.9,training.learning_rate=0.001'
    """
    return ",".join([label, *(f"{key}={re.sub(UNSAFE, '_', str(value))}" for key, value in values.items())])


def _choose(comparison: Comparison, folder: Path, ranks: Ranks | None, listen: running.Listener) -> dict[str, Table]:
    """Runs all candidates at the first seed on validation rows; returns by label `values` and the `candidates` with scores."""
    offered = {entry.label: entry.candidates() for entry in comparison.entries}
    chosen: dict[str, Table] = {
        label: {"values": values[0], "candidates": []} for label, values in offered.items() if len(values) == 1
    }
    if comparison.chooses:
        seed, tables = comparison.seeds[0], list[Table]()
        for entry in comparison.entries:
            for values in offered[entry.label] if entry.label not in chosen else []:
                table = _candidate(comparison, entry, values, ranks)
                tables.append({**table, "label": candidate_label(entry.label, values)})
        job = comparison.job(seed, tables, comparison.validation)
        running.check_begun(job, folder / "choose")
        running.run(job, folder / "choose", _prefixed(listen, "choosing"), baselines=False, comparing=True)
        told = {row["label"]: row for row in report.rows([report.read_job(folder / "choose")])}
        for label, candidates in offered.items():
            if label not in chosen:
                chosen[label] = _best([(values, told[candidate_label(label, values)]) for values in candidates])
    return chosen


def _best(scored: list[tuple[Table, dict[str, Any]]]) -> Table:
    """Returns the candidate with the best score, the first of equals and where all failed."""
    candidates = [
        {
            "values": values,
            "metric": row["metric"],
            "score": row["score"] if row["state"] == "done" else None,
            "state": row["state"],
            "error": row["error"],
        }
        for values, row in scored
    ]
    # Not a number is not itself.
    usable = [x for x in candidates if x["score"] is not None and x["score"] == x["score"]]
    if not usable:
        # It will fail again, and stand in the table so; the other methods go on.
        return {"values": candidates[0]["values"], "candidates": candidates}
    sign = -1 if scored[0][1]["lower_is_better"] else 1
    return {"values": max(usable, key=lambda x: sign * x["score"])["values"], "candidates": candidates}


def _about(comparison: Comparison, chosen: dict[str, Table], tables: list[Table], ranks: Ranks | None) -> dict[str, Any]:
    """Returns compare.json: what was compared, at which ranks, with what was chosen among what."""
    told: dict[str, Any] = {}
    for entry, table in zip(comparison.entries, tables):
        config = configuration.configs(comparison.job(comparison.seeds[0], [table]))[entry.label]
        count = None if ranks is None else ranks.of(config)[1]
        told[entry.label] = {
            "name": config.method.name,
            "rank": config.lora.r,
            "count": count,
            "over": ranks is not None and count is not None and count > ranks.budget,
            **chosen[entry.label],
        }
    data = comparison.shared.get("data", {})
    return {
        "seeds": comparison.seeds,
        "equal": comparison.equal,
        "budget": None if ranks is None else ranks.budget,
        "budget_rank": None if ranks is None else ranks.reference.lora.rank,
        "reference": comparison.entries[0].label,
        "scored_on": "validation" if data.get("validation") and not comparison.chooses else "test",
        "chosen_on": {"seed": comparison.seeds[0], "validation": comparison.validation} if comparison.chooses else None,
        "methods": told,
    }
