"""run(): from a configuration table to a directory with every number out.

A job is one or several methods over the same clients, rows, seeds and steps, with two baselines beside them, always:
`central` (all rows in one place) and `local` (every client on its own). Both are federations of one client.
"""

import importlib.metadata
import itertools
import json
import os
import platform
import secrets
import shutil
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w

from umbel import __version__
from umbel import config as configuration
from umbel import method as methods
from umbel.config import Config, ConfigError, MethodChoice
from umbel.engine import Ask, Engine, Reply, Waiting
from umbel.engine.local import Local
from umbel.loop import Plan, federate
from umbel.record import Record, RecordError, locked, now, write_file, write_json, write_lines
from umbel.server import OBSERVER, ServerError

Listener = Callable[[dict[str, Any]], None]
Progress = Callable[[int, int], None]

MAY_DIFFER = {"method", "lora", "training", "server", "privacy", "wire"}
"""What the methods of one job may set for themselves; all else is shared, or they could not be compared."""

PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "datasets", "numpy")


@dataclass(frozen=True)
class Network:
    """Clients that are elsewhere.

    Args:
        clients: Their numbers, there now or not; None where the run's own file says who the clients are.
        engine: Makes the engine of one run from the job that its sites must know (see `umbel.client.site.Job`) and the seconds
            that a round may take.
    """

    clients: list[int] | None
    engine: Callable[[dict[str, Any], float], Engine]


@dataclass(frozen=True)
class Member:
    """One run of a job: a method, the central baseline, or one client on its own.

    Args:
        label: Its name in tables.
        folder: Relative to the job's.
        config: Resolved.
        clients: Their numbers.
        role: "method", "central" or "local".
    """

    label: str
    folder: str
    config: Config
    clients: list[int]
    role: str


def run(
    table: dict[str, Any],
    folder: Path,
    listen: Listener = lambda event: None,
    *,
    baselines: bool = True,
    comparing: bool = False,
    network: Network | None = None,
) -> Path:
    """Runs a job to its end, or on from where its folder stops; what is finished is not repeated.

    Args:
        table: A configuration as TOML gives it (see `umbel.config`).
        folder: Where everything goes.
        listen: Called with events, for progress.
        baselines: Train central and local, too.
        comparing: The job is part of a comparison: methods may join it later, each has its own folder, and one that fails
            does not stop the others.
        network: Clients that are elsewhere; None has them all in this process. Over a network there are no baselines: nobody
            has everyone's rows.

    Returns:
        The folder.

    Raises:
        ConfigError: The configuration cannot be run.
        ServerError: A round had nobody left.
        Waiting: Somebody has to bring replies before it can go on; every method got as far as it could.
        RecordError: Another process is at work in the folder, it holds somebody else's files, or a job that began with
            another configuration, other rows or another model.
    """
    from umbel.client import client, data, model, publish

    configs = configuration.configs(table)
    shared = _shared(configs)
    with locked(folder):
        _check_empty(folder)
        listen({"event": "stage", "text": "reading data"})
        dataset = data.load(shared) if network is None else _server_rows(shared, network)
        baselines = baselines and network is None
        manifest = dataset.manifest()
        fingerprint = model.fingerprint(shared)
        members = _members(configs, shared, dataset, baselines, comparing)
        _check_same(folder, None if comparing else table, manifest, fingerprint)
        if comparing:
            _check_members(folder, members)
        # Only now is there something to resume; what a job began with is written again only where methods may join.
        if not is_job(folder):
            write_json(folder / "split.json", manifest)
        if comparing or not is_job(folder):
            write_file(folder / "job.toml", tomli_w.dumps(table).encode())
        if dataset.train:
            listen({"event": "split", "manifest": manifest})
        contents = _contents(members) | ({"comparing": True} if comparing else {})
        job = _known_job(folder, dataset.clients)
        write_json(folder / "job.json", {**contents, "id": job["run"], "clients": job["clients"]})
        if all(Record(folder / member.folder).info.get("state") == "done" for member in members):
            return folder
        listen({"event": "stage", "text": "loading the model"})
        base = model.load(shared, len(dataset.labels))
        if network is not None:
            dataset = replace(dataset, train=[], owner_train=[], row_train=[])  # clients have theirs
        train, test = client.tokens(shared, base, dataset)
        stock = publish.Stock(shared, len(dataset.labels))
        facts = provenance(manifest, fingerprint, shared)
        asked: list[dict[str, Any]] = []
        for index, member in enumerate(members):
            listen({"event": "member", "label": member.label, "role": member.role, "index": index, "members": len(members)})
            own = _pooled(dataset) if member.role == "central" else dataset
            try:
                loaded = _Loaded(base, stock, own, train, test)
                _run_member(folder / member.folder, member, loaded, facts, listen, network, job)
            except (ServerError, publish.PublishError):
                if not comparing:
                    raise  # else it is in the run's record, and the table shows it
            except Waiting as waiting:
                asked += waiting.asked  # the next method's requests can be carried on the same way
        if asked:
            raise Waiting(asked)
    return folder


def resume(folder: Path, listen: Listener = lambda event: None) -> Path:
    """Goes on with a job that stopped, by its own configuration.

    Raises:
        RecordError: The folder holds no job.
    """
    place = folder
    if not is_job(folder) and (folder / "run.toml").exists():
        # A member's folder, such as runs/quickstart/florist or runs/quickstart/local/client-0.
        place = next((above for above in folder.resolve().parents[:2] if is_job(above)), folder)
    if not is_job(place):
        raise RecordError(f"{folder} is no folder that `umbel run` made, so there is nothing to resume")
    contents = json.loads((place / "job.json").read_text(encoding="utf-8")) if (place / "job.json").exists() else {}
    part = {"comparing": contents.get("comparing", False), "baselines": contents.get("central", True) is not None}
    return run(configuration.read(place / "job.toml"), place, listen, **part)


def adjust(folder: Path, assignments: list[str]) -> None:
    """Changes what a job that stopped waits for.

    Raises:
        ConfigError: Another key, or a value that is not allowed.
        RecordError: The folder holds no job.
    """
    for assignment in assignments:
        if assignment.partition("=")[0].strip() not in configuration.ADJUSTABLE:
            allowed = ", ".join(configuration.ADJUSTABLE)
            raise ConfigError(f"--resume goes on with the run's own configuration; --set changes only {allowed} of it")
    if not is_job(folder):
        raise RecordError(f"{folder} is no folder that `umbel run` made, so there is nothing to resume")
    with locked(folder):
        table = configuration.read(folder / "job.toml", assignments)
        configuration.configs(table)
        write_file(folder / "job.toml", tomli_w.dumps(table).encode())


def is_job(folder: Path) -> bool:
    """True where a job has begun: its configuration and its split are there."""
    return (folder / "job.toml").is_file() and (folder / "split.json").is_file()


def _check_empty(folder: Path) -> None:
    """Refuses a folder with anything of somebody else's in it, since a run writes and replaces folders there."""
    begun = {".lock", "split.json", "split.json.partial", "job.toml.partial", "federation.json", "events.jsonl"}
    begun |= {"offline.json", "offline.json.partial"}
    strange = sorted(path.name for path in folder.iterdir() if path.name not in begun)
    if strange and not is_job(folder):
        raise RecordError(f"{folder} is not empty ({', '.join(strange[:3])}) and holds no run; give another folder")


def _check_same(folder: Path, table: dict[str, Any] | None, manifest: dict[str, Any], fingerprint: str) -> None:
    """Refuses to go on in a folder whose job had another configuration (unless None), other rows or another model."""
    if not is_job(folder):
        return
    if table is not None and configuration.read(folder / "job.toml") != tomllib.loads(tomli_w.dumps(table)):
        raise RecordError(f"{folder} holds a job with another configuration; give another folder, or resume it as it is")
    hashes = json.loads((folder / "split.json").read_text(encoding="utf-8"))["hashes"]
    for name, value in hashes.items():
        if manifest["hashes"].get(name) != value:
            got = str(manifest["hashes"].get(name))
            raise RecordError(
                f"{folder}: the {name} rows have changed (sha256 {value[:12]}… then, {got[:12]}… now); start a new job"
            )
    for info in folder.glob("**/run.json"):
        known = json.loads(info.read_text(encoding="utf-8"))["model"]["sha256"]
        if known != fingerprint:
            raise RecordError(
                f"{folder}: the base model has changed ({known[:12]}… then, {fingerprint[:12]}… now); start a new job"
            )


def check_begun(table: dict[str, Any], folder: Path) -> None:
    """Refuses a comparison's job where a method's run has begun with another configuration than it would have now.

    Raises:
        RecordError: It names all such runs.
    """
    _check_members(
        folder, [Member(label, label, config, [], "method") for label, config in configuration.configs(table).items()]
    )


def _check_members(folder: Path, members: list[Member]) -> None:
    """Refuses to go on where runs have begun with another configuration; one that failed before its first round begins anew."""
    changed: dict[str, str] = {}
    anew: list[Path] = []
    for member in members:
        place = folder / member.folder
        if not (place / "run.toml").exists():
            continue
        before = configuration.from_table(configuration.read(place / "run.toml"))
        if before == member.config:
            continue
        record = Record(place)
        if record.info.get("state") == "failed" and not any(line.get("phase") == "train" for line in record.lines()):
            anew.append(place)
        else:
            changed[str(place)] = _change(before, member.config)
    if changed:
        raise RecordError(
            f"{', '.join(changed)} began with another configuration ({next(iter(changed.values()))}); give another folder, or "
            "delete what is to be run anew"
        )
    for place in anew:
        shutil.rmtree(place)


def _change(before: Config, after: Config) -> str:
    old, new = (configuration.to_table(config) for config in (before, after))
    section = next(key for key in new if old[key] != new[key])
    if not isinstance(new[section], dict):
        return f"{section} = {old[section]}, now {new[section]}"
    key = next(key for key in {**old[section], **new[section]} if old[section].get(key) != new[section].get(key))
    return f"{section}.{key} = {old[section].get(key)}, now {new[section].get(key)}"


def _shared(configs: dict[str, Config]) -> Config:
    """Returns the first configuration, after checking that the others share all that must be shared."""
    first, *others = configs.values()
    for other in others:
        for name in configuration.SECTIONS:
            if name not in MAY_DIFFER and getattr(first, name) != getattr(other, name):
                raise ConfigError(
                    f"[[method]] {other.method.name}: '{name}' differs from {first.method.name}'s. Methods of one job share "
                    f"all but {', '.join(sorted(MAY_DIFFER - {'method'}))}; run them as two jobs"
                )
    return first


def _known_job(folder: Path, clients: int) -> dict[str, Any]:
    """Returns the job's id, under which its sites keep what is theirs, and K, which never shrinks: the revoked still count."""
    known = json.loads((folder / "job.json").read_text(encoding="utf-8")) if (folder / "job.json").exists() else {}
    return {"run": known.get("id") or secrets.token_hex(8), "clients": max(known.get("clients") or 0, clients)}


def _server_rows(config: Config, network: Network) -> Any:
    """Returns what the server has of the rows: those that the run's file names where they are here too, else only test rows.

    Raises:
        ConfigError: The labels are nowhere to be had.
    """
    from umbel.client import data

    sources = config.data.train if isinstance(config.data.train, list) else [config.data.train]
    try:
        for source in sources:
            data.locate(source)
        here = True
    except ConfigError:
        here = False
    if here or network.clients is None:
        dataset = data.load(config)
    else:
        dataset = data.load_server(config, len(network.clients))
    if network.clients is None:
        return dataset
    # A revoked client's number is not given again.
    return replace(dataset, clients=max(network.clients, default=-1) + 1, unseen=_missing(network.clients))


def _missing(clients: list[int]) -> list[int]:
    return sorted(set(range(max(clients, default=-1) + 1)) - set(clients))


class _WithObserver:
    """An engine for everybody, and one in this process for the observer."""

    def __init__(self, clients: Engine, observer: Engine) -> None:
        self._clients, self._observer = clients, observer

    def ask(self, asks: Iterable[Ask]) -> Iterator[Reply]:
        first = next(iterator := iter(asks), None)
        if first is None:
            return
        engine = self._observer if first.client == OBSERVER else self._clients
        yield from engine.ask(itertools.chain([first], iterator))


def _members(configs: dict[str, Config], shared: Config, dataset: Any, baselines: bool, comparing: bool) -> list[Member]:
    everyone = [k for k in range(dataset.clients) if k not in dataset.unseen]
    clients = len(everyone)
    single = len(configs) == 1 and not comparing
    result = [Member(label, "." if single else label, config, everyone, "method") for label, config in configs.items()]
    if not baselines:
        return result
    # The baselines train the usual A and B, with the first method's options of LoRA and training.
    server = replace(shared.server, clients_per_round=0)
    plain = replace(shared, method=MethodChoice("fedit"), server=server, wire=configuration.Wire(), privacy=_alone(shared))
    training = shared.training
    if training.max_steps > 0:
        # As many rows as all the clients of a round together see.
        training = replace(training, max_steps=training.max_steps * min(shared.server.clients_per_round or clients, clients))
    from umbel.client import client

    for label, config in configs.items():
        try:
            client.ranks(config, dataset)  # what is wrong with a later method's is said before the first one trains
        except ConfigError as error:
            raise ConfigError(f"{label}: {error}") from None
    ranks = {k: rank for k, rank in client.ranks(shared, dataset).items() if k in everyone}
    lora = shared.lora
    largest = lora.of(max(ranks, key=lambda k: ranks[k]), max(ranks.values())) if ranks else lora
    pooled = sum(owner in everyone for owner in dataset.owner_train)
    hidden = replace(plain.privacy, target_delta=min(plain.privacy.target_delta, 1 / max(1, pooled)))
    central = replace(plain, lora=largest, training=replace(training, optimizer_state="keep"), privacy=hidden)
    result.append(Member("central", "central", central, [0], "central"))
    for k in everyone:
        own = replace(plain, lora=lora.of(k, ranks[k]) if ranks else lora)
        result.append(Member(f"local {k}", f"local/client-{k}", own, [k], "local"))
    return result


def _alone(config: Config) -> configuration.Privacy:
    """Returns a baseline's privacy: its rows are protected as in the methods' runs; there are no others to hide among."""
    noisy = config.privacy.unit == "example"
    # No federation would train them, so they spend nothing of the rows' budget: their ledgers are in their own folders.
    alone = replace(config.privacy, secure_aggregation=False, ledger="", total_epsilon=0.0)
    return alone if noisy else configuration.Privacy()


def _pooled(dataset: Any) -> Any:
    """Returns the same rows, those of clients that take part all client 0's."""
    owner_train = [-2 if owner in dataset.unseen else 0 for owner in dataset.owner_train]
    return replace(dataset, owner_train=owner_train, clients=1)


def _contents(members: list[Member]) -> dict[str, Any]:
    return {
        "members": {member.label: member.folder for member in members},
        "methods": [member.label for member in members if member.role == "method"],
        "central": next((member.folder for member in members if member.role == "central"), None),
        "local": [member.folder for member in members if member.role == "local"],
    }


@dataclass(frozen=True)
class _Loaded:
    """What is loaded once for all runs of a job: base model, a stock one to read adapters back, rows and their tokens."""

    base: Any
    stock: Any
    dataset: Any
    train: list[Any]
    test: list[Any]


def _run_member(
    folder: Path,
    member: Member,
    loaded: _Loaded,
    facts: dict[str, Any],
    listen: Listener,
    network: Network | None,
    job: dict[str, Any],
) -> None:
    from umbel.client import client, model, preflight, publish
    from umbel.client.adapter import Adapter

    record = Record(folder)
    if record.info.get("state") == "done":
        return
    config = member.config
    info = {"label": member.label, "role": member.role, "clients": len(member.clients), **facts}
    record.start(configuration.to_table(config), {**info, **_identity(config)})
    began, before = time.perf_counter(), len(record.lines())
    base, dataset = loaded.base, loaded.dataset
    adapter = Adapter(base.model, config.lora, base.heads, config.seed)
    heads = adapter.read_plain()
    try:
        ranks = client.ranks(config, dataset) if member.role == "method" and network is None else {}
        resident = client.Resident(config, base, adapter, dataset, loaded.train, loaded.test, ranks=ranks)
        resident.on_step = lambda number, step, steps: listen({"event": "step", "client": number, "step": step, "steps": steps})
        here = [OBSERVER] if network else [*member.clients, OBSERVER]
        name = f"{job['run']}/{member.label}"
        engine: Engine = Local({k: client.Client(k, resident, folder / "clients" / str(k), name).answer for k in here})
        plan = replace(_plan(member), plain=heads)
        if network is not None:
            whole = {**job, "member": member.label, "config": configuration.to_table(config)}
            engine = _WithObserver(network.engine(whole, config.server.round_deadline), engine)
            plan = replace(
                plan,
                run=job["run"],
                rejoin=True,
                observe_by="observer" if dataset.test else "clients",
                expected=preflight.identity(config, base.tokenizer),
            )
        server = federate(engine, plan, record, lambda event: listen({"event": "round", **event}))
        published = None
        if member.role != "local":
            listen({"event": "stage", "text": f"{member.label}: writing the adapter and reading it back"})
            adapter.restart(config.seed)
            adapter.apply(server.owed[-1], server.plain, own_rank=False)
            rows = record.rows()
            result = publish.Result(server.model(), server.plain, dataset.labels, rows)
            own = model.Base(adapter.model, base.tokenizer, base.path, base.heads)
            published = publish.publish(folder / "adapter", config, result, own, loaded.stock, loaded.test[:8])
        totals = [line["seconds"]["total"] for line in record.lines()]
        # Wrapping the model, writing the adapter and reading it back belong to the run, too.
        outside = max(0.0, time.perf_counter() - began - sum(totals[before:]))
        record.update(state="done", finished=now(), adapter=published, seconds=sum(totals) + outside)
    except Waiting as waiting:
        record.update(state="waiting", waiting=waiting.asked)
        raise
    except BaseException as error:
        state = "interrupted" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed"
        record.update(state=state, error=f"{type(error).__name__}: {error}")
        if isinstance(error, ServerError):
            raise ServerError(f"run {member.label!r}: {error}") from error
        raise
    finally:
        adapter.remove()


def _plan(member: Member) -> Plan:
    config = member.config
    least = config.server.min_clients if member.role == "method" else 0
    if least > len(member.clients):
        raise ConfigError(f"server.min_clients: got {least}, allowed: at most the {len(member.clients)} clients that take part")
    return Plan(
        method=methods.load(config.method.name, **config.method.options),
        rounds=config.rounds,
        clients=member.clients,
        seed=config.seed,
        dtype=config.wire.dtype,
        clients_per_round=config.server.clients_per_round,
        measure_error=config.server.aggregation_error and member.role == "method",
        observe="end" if member.role == "local" else "rounds",
        observe_start=config.task.kind != "classification" and member.role != "local",
        score_clients=member.role == "method",
        most_rank=max([config.lora.rank, *config.lora.rank_pattern.values()]),
        min_clients=least,
        norm_limit=config.server.norm_limit,
        privacy=config.privacy,
    )


def _identity(config: Config) -> dict[str, Any]:
    return {
        "method": {"name": config.method.name, **config.method.options},
        "config": configuration.to_table(config),
    }


def provenance(manifest: dict[str, Any], fingerprint: str, config: Config) -> dict[str, Any]:
    """Returns the provenance that all runs of a job share."""
    from umbel.client.evaluate import metric

    return {
        "umbel": __version__,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": _machine(),
        "model": {"name": config.model.name, "sha256": fingerprint},
        "data": manifest["hashes"],
        "metric": metric(config),
        "adapter": None,
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> dict[str, Any]:
    import torch

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = named[0].partition(":")[2].strip() if named else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
        "platform": platform.platform(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def free_folder(wanted: Path) -> Path:
    """Returns `wanted`, or with -2, -3 … where it holds a job."""
    folder, number = wanted, 1
    while is_job(folder):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def evaluate_again(folder: Path, out: Path | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Scores a finished run's adapter, loaded from disk with stock PEFT, on the run's test rows.

    Args:
        folder: A run's folder.
        out: A file for the scores of every row, as `scores.jsonl` of a run.
        progress: Called with the rows done and the rows in all.

    Returns:
        The metrics.

    Raises:
        RecordError: There is no adapter, or the rows have changed.
    """
    config = _finished(folder)
    from umbel.client import data, publish

    then = json.loads((folder / "run.json").read_text(encoding="utf-8"))["data"]
    # A server that never had the sites' rows has test rows of its own, or none.
    dataset = data.load(config) if "train" in then else data.load_server(config, 1)
    if not dataset.test:
        raise RecordError(f"{folder}: the rows that this was scored on are the sites'; give a task of yours with --config")
    for name in ("train", "test"):
        if then.get(name) != dataset.hashes.get(name):
            raise RecordError(f"{folder}: the {name} rows have changed since the run, so its score cannot be repeated")
    with publish.Stock(config, len(dataset.labels)).loaded(folder / "adapter") as base:
        return _scored(base, dataset, config, out, progress)


def evaluate_on(
    folder: Path,
    tables: dict[str, dict[str, Any]],
    out: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> dict[str, dict[str, Any]]:
    """Scores a finished run's adapter, loaded from disk with stock PEFT, on the test rows of other tasks.

    Args:
        folder: A run's folder.
        tables: By name, `[data]` and `[task]` (see `umbel.config.for_task`).
        out: A folder for the scores of every row, one file `<name>.jsonl` per task.
        progress: Called with the task, its rows done and its rows in all.

    Returns:
        The metrics of each task.

    Raises:
        RecordError: There is no adapter.
        ConfigError: A task cannot be scored.
    """
    own = _finished(folder)
    from umbel.client import data, publish

    tasks = {name: configuration.for_task(own, table) for name, table in tables.items()}
    sets = {name: data.load_test(config) for name, config in tasks.items()}
    # The model is loaded once; whether it can take so many tokens is asked for the longest.
    longest = max(config.data.max_length for config in tasks.values())
    with publish.Stock(replace(own, data=replace(own.data, max_length=longest)), 0).loaded(folder / "adapter") as base:
        return {
            name: _scored(base, sets[name], config, out and out / f"{name}.jsonl", partial(progress, name))
            for name, config in tasks.items()
        }


def _finished(folder: Path) -> Config:
    if not (folder / "adapter" / "adapter_config.json").exists():
        raise RecordError(f"{folder} has no adapter/; give a finished run's folder (of a method or the central baseline)")
    return configuration.from_table(configuration.read(folder / "run.toml"))


def _scored(base: Any, dataset: Any, config: Config, out: Path | None, progress: Progress | None) -> dict[str, Any]:
    from umbel.client import evaluate

    scored = evaluate.score(base.model, base.tokenizer, dataset.test, dataset.labels, config, progress=progress)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        owners = zip(dataset.owner_test, scored, strict=True)
        write_lines(out, [{"row": i, "client": k, **evaluate.as_json(own)} for i, (k, own) in enumerate(owners)])
    return evaluate.summary(scored, config)
