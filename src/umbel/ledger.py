"""A client's ledger: what its rows have paid, in a file that is written before anything is trained, and never changed.

    <folder>/
        ledger.jsonl   one line per spending: a checksum, and what was spent as JSON; each checksum covers the line before
        secret.key     32 random bytes (mode 0600), from which noise and sampling come, and under which rows are named
        data/<name>    which rows a spending was for: 12 bytes of each row's keyed hash, so that two sets can be compared

A line is flushed to disk before training begins, so no upload can leave that is not in the ledger. A line that a kill tore was
never in force, since nothing had left, and is cut; any other change is an error.
"""

import hashlib
import hmac
import json
import os
import secrets
import stat
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from umbel import privacy
from umbel.privacy import Spent
from umbel.record import flush_folder, locked, now, write_file

LINES, SECRET, DATA = "ledger.jsonl", "secret.key", "data"
ROW_BYTES = 12
"""Of a row's keyed hash: among 10⁹ rows two agree with a chance of 10⁻¹¹, and then count as the same, which spends too much."""

WAIT_SECONDS = 120
"""For another process that is writing to the same ledger."""

MOST_ROUNDS = 100_000
"""That are counted as left."""


class LedgerError(RuntimeError):
    """A ledger that cannot be believed or read; says what to do."""


class BudgetError(RuntimeError):
    """A round that would cost more than may be spent. Its message is made of numbers only."""


@dataclass(frozen=True)
class Entry:
    """One spending.

    Args:
        run: Of which run and method it was.
        client: The client's number in that run.
        round: Training round, from 1; of a measurement, 0.
        kind: "train" or "measure".
        sigma: σ, the noise multiplier.
        sample_rate: q.
        steps: Steps taken.
        max_grad_norm: C.
        delta: δ of the run.
        target: ε that the run may spend.
        budget: ε that all runs on these rows may spend, when this was spent.
        request: Hash of everything that decides what is answered; the same again is the same answer, and costs nothing.
        data: Names the rows, in `data/`; of a client as a whole, the client.
        unit: What is hidden: "example" or "client".
        time: When, in UTC.
    """

    run: str
    client: int
    round: int
    kind: str
    sigma: float
    sample_rate: float
    steps: int
    max_grad_norm: float
    delta: float
    target: float
    budget: float
    request: str
    data: str
    unit: str = "example"
    time: str = ""

    @property
    def spent(self) -> Spent:
        """(σ, q, steps)."""
        return self.sigma, self.sample_rate, self.steps


@dataclass(frozen=True)
class Standing:
    """What is spent where a round is asked for: ε of the run, and of all runs on the same rows, without the round and with it.

    Args:
        run: ε of the run.
        run_after: With the round.
        all: ε of all runs.
        all_after: With the round.
        delta_run: δ of both of the run: the smallest of its spendings.
        delta_all: Likewise.
    """

    run: float
    run_after: float
    all: float
    all_after: float
    delta_run: float
    delta_all: float


class Ledger:
    """The ledger in a folder, which is made when it is first written to.

    Args:
        folder: Its own, of one client.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # Reading

    @property
    def exists(self) -> bool:
        """Whether there is a ledger here."""
        return (self.folder / SECRET).exists()

    def entries(self) -> list[Entry]:
        """Returns what was spent, in order; a torn last line is not in force.

        Raises:
            LedgerError: A line was changed, or one is missing from between the others.
        """
        return self._read()[0]

    def overlapping(self, data: str) -> list[Entry]:
        """Returns the spendings for rows of which at least one is among those of `data`."""
        entries = self.entries()
        mine = self._rows(data)
        same = {name: name == data or not mine.isdisjoint(self._rows(name)) for name in {entry.data for entry in entries}}
        return [entry for entry in entries if same[entry.data]]

    def other_runs(self, rows: Iterable[Mapping[str, Any]], run: str) -> list[Entry]:
        """Returns what other runs spent here for rows of which at least one is among these, which another ledger names."""
        entries = [entry for entry in self.entries() if entry.run != run] if self.exists else []
        mine = self._marks(rows) if entries else set[bytes]()
        same = {name: not mine.isdisjoint(self._rows(name)) for name in {entry.data for entry in entries}}
        return [entry for entry in entries if same[entry.data]]

    def known(self, request: str) -> Entry | None:
        """Returns the spending for a request that was answered before, or at least paid for."""
        return next((entry for entry in self.entries() if entry.request == request), None)

    def seed(self, request: str) -> int:
        """Returns the 256 bits from which sampling and noise of an answer come; nobody without the secret knows them."""
        return int.from_bytes(self._keyed(b"noise", request.encode()), "big")

    def standing(self, entry: Entry, elsewhere: Iterable[Entry] = ()) -> Standing:
        """Returns what was spent on the rows of an entry, and what it would be with it; `elsewhere` as in `spend`."""
        same = _for_one_row([*self.overlapping(entry.data), *elsewhere], entry)
        own = [other for other in same if other.run == entry.run]
        at_run, at_all = (min(other.delta for other in (entry, *some)) for some in (own, same))
        run, every = epsilon_of(own, at_run), epsilon_of(same, at_all)
        return Standing(run, epsilon_of([*own, entry], at_run), every, epsilon_of([*same, entry], at_all), at_run, at_all)

    # Writing

    def name_data(self, rows: Iterable[Mapping[str, Any]]) -> str:
        """Notes which rows these are, and returns the name of their set: the same for the same rows in any order.

        A row is known by the longest text among its values: another label, column or number of spaces is the same row.
        """
        with self._held():
            content = b"".join(sorted(self._marks(rows)))
            name = self._keyed(b"data", content).hex()[:32]
            place = self.folder / DATA / name
            if not place.exists():
                place.parent.mkdir(exist_ok=True)
                write_file(place, content)
        return name

    def spend(self, entry: Entry, elsewhere: Sequence[Entry] = ()) -> Standing:
        """Writes a spending and flushes it to disk, unless it is there already.

        Args:
            entry: What is to be spent.
            elsewhere: What other ledgers have of other runs on the same rows; it counts as if it were here.

        Returns:
            What was spent, `run_after` and `all_after` with this entry.

        Raises:
            BudgetError: It would be more than the run or all runs may spend; nothing is written.
            LedgerError: The ledger cannot be believed.
            RecordError: Another process has held the ledger for too long.
        """
        with self._held():
            if self.known(entry.request) is not None:
                standing = self.standing(entry, elsewhere)
                return replace(standing, run_after=standing.run, all_after=standing.all)
            standing = self.standing(entry, elsewhere)
            _check_budget(entry, standing)
            self._append(entry)
        return standing

    def spend_all(self, entries: Sequence[Entry], check: Callable[[list[Entry]], None]) -> None:
        """Writes several clients' spendings at once, without those that are there already: one reading and one flush for all.

        Args:
            entries: What is to be spent.
            check: Called with what the ledger has; raises where the entries would be too much, and then nothing is written.
        """
        with self._held():
            written = self.entries()
            check(written)
            known = {entry.request for entry in written}
            self._append(*(entry for entry in entries if entry.request not in known))

    def _append(self, *entries: Entry) -> None:
        _, before, whole = self._read()
        lines = list[bytes]()
        for entry in entries:
            lines.append(self._line(before, entry))
            before = lines[-1].partition(b" ")[0]
        with (self.folder / LINES).open("r+b" if (self.folder / LINES).exists() else "w+b") as file:
            file.truncate(whole)
            file.seek(whole)
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
        flush_folder(self.folder)

    def _line(self, before: bytes, entry: Entry) -> bytes:
        text = json.dumps({**asdict(entry), "time": entry.time or now()}, ensure_ascii=True).encode()
        return self._keyed(b"line", before, text).hex().encode() + b" " + text + b"\n"

    @contextmanager
    def _held(self) -> Iterator[None]:
        with locked(self.folder, WAIT_SECONDS):
            if not (self.folder / SECRET).exists():
                self._make_secret()
            yield

    def _make_secret(self) -> None:
        if (self.folder / LINES).exists():
            raise LedgerError(f"{str(self.folder)!r}: {SECRET} is missing and {LINES} is there; bring the key back")
        temporary = self.folder / f"{SECRET}.partial"
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / SECRET)
        flush_folder(self.folder)

    # The secret, and what is under it

    @cached_property
    def _secret(self) -> bytes:
        path = self.folder / SECRET
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise LedgerError(f"{str(self.folder)!r} holds no ledger: {SECRET} is missing") from None
        if len(content) != 32 or stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise LedgerError(
                f"{str(path)!r}: allowed: 32 bytes that only their owner can read; chmod 600, or bring the key back"
            )
        return content

    def _keyed(self, purpose: bytes, *parts: bytes) -> bytes:
        mac = hmac.new(self._secret, digestmod=hashlib.sha256)
        for part in (purpose, *parts):
            mac.update(len(part).to_bytes(8, "big") + part)
        return mac.digest()

    def _read(self) -> tuple[list[Entry], bytes, int]:
        """Returns the entries, the last one's checksum, and the bytes up to the end of its line."""
        path = self.folder / LINES
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        entries, before = list[Entry](), b""
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            checksum, _, text = line.partition(b" ")
            if not hmac.compare_digest(checksum, self._keyed(b"line", before, text).hex().encode()):
                raise LedgerError(
                    f"{str(path)!r}, line {number}: changed, or not the one that followed; nothing is trained with a ledger "
                    "that cannot be believed. Bring back the file as it was"
                )
            entries.append(_entry(json.loads(text), path, number))
            before = checksum
        return entries, before, whole

    def _marks(self, rows: Iterable[Mapping[str, Any]]) -> set[bytes]:
        return {self._keyed(b"row", _mark(row))[:ROW_BYTES] for row in rows}

    def _rows(self, data: str) -> set[bytes]:
        path = self.folder / DATA / data
        content = path.read_bytes() if path.exists() else b""
        if self._keyed(b"data", content).hex()[:32] != data:
            raise LedgerError(
                f"{str(path)!r}: changed or missing, so it is not known which rows were paid for; bring the file back"
            )
        return {content[i : i + ROW_BYTES] for i in range(0, len(content), ROW_BYTES)}


def epsilon_of(entries: Iterable[Entry], delta: float) -> float:
    """Returns ε of spendings together, at δ."""
    return privacy.epsilon([entry.spent for entry in entries], delta)


def _for_one_row(entries: Iterable[Entry], entry: Entry) -> list[Entry]:
    """Returns what one row of an entry's data may have paid: within a run a row is one client's, who has paid the most."""
    runs: dict[str, dict[int, list[Entry]]] = {}
    for other in entries:
        runs.setdefault(other.run, {}).setdefault(other.client, []).append(other)
    if entry.run in runs:
        runs[entry.run] = {entry.client: runs[entry.run].get(entry.client, [])}
    return [own for of in runs.values() for own in max(of.values(), key=lambda mine: epsilon_of(mine, entry.delta))]


def request_hash(payload: bytes, state: bytes, context: Mapping[str, Any]) -> str:
    """Returns the hash of everything that an answer depends on, besides the rows' order and the machine.

    Two answers with the same noise and anything else that differs would tell the difference without noise; so whatever
    changes the answer must change this.

    Args:
        payload: The request.
        state: The client's own file as it was when the request came; b"" where it starts afresh.
        context: What else: configuration, versions, mechanism, rows. Plain JSON.
    """
    said = json.dumps(context, sort_keys=True, ensure_ascii=True).encode()
    digest = hashlib.sha256()
    for part in (payload, state, said):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def rounds_left(entries: Sequence[Entry], more: Entry, delta: float, budget: float) -> int:
    """Returns how often `more` can still be spent within a budget, at most MOST_ROUNDS."""
    history = [entry.spent for entry in entries]
    sigma, rate, steps = more.spent

    def fits(times: int) -> bool:
        return privacy.epsilon([*history, (sigma, rate, steps * times)], delta) <= budget

    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= MOST_ROUNDS and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return min(low, MOST_ROUNDS)


def find(folder: Path) -> list[Path]:
    """Returns the ledgers in a folder: of a ledger itself, of a site, or of a run, whose `privacy.ledger` may be elsewhere.

    One whose key is lost is among them, so that it is missed.

    Raises:
        LedgerError: There is none.
    """
    places = [folder, *(place for place in _named_by(folder) if not place.resolve().is_relative_to(folder.resolve()))]
    found = {path.parent: None for place in places for name in (SECRET, LINES) for path in place.rglob(name)}
    if not found:
        raise LedgerError(
            f"{str(folder)!r} holds no ledger; give a ledger, a site's folder, or that of a run with privacy.unit = 'example' "
            "or 'client' (of a federation's run, with 'example', each site has its own)"
        )
    return sorted(found)


def _named_by(run: Path) -> list[Path]:
    """Returns the `privacy.ledger` of a run's folder, relative to the working directory as it was for the run."""
    try:
        named = tomllib.loads((run / "run.toml").read_text(encoding="utf-8")).get("privacy", {}).get("ledger")
    except (OSError, ValueError):
        return []
    return [Path(named).expanduser()] if named else []


def summary(ledger: Ledger) -> dict[str, Any]:
    """Returns what a ledger says, as plain JSON.

    Returns:
        "runs": per run and client "epsilon" at "delta", "target", "rounds", "spent" (kind, σ, q and steps of what was done) and
        when it was; "epsilon", "delta" and "budget": of all runs on the same rows, the most for any set of them; "next": what
        another round of the last run costs ("epsilon" after it) and how many are "left", None where nothing was trained.
    """
    entries = ledger.entries()
    runs: dict[tuple[str, int], list[Entry]] = {}
    for entry in entries:
        runs.setdefault((entry.run, entry.client), []).append(entry)
    same = {data: ledger.overlapping(data) for data in {entry.data for entry in entries}}
    totals = {data: epsilon_of(own, min(x.delta for x in own)) for data, own in same.items()}
    worst = max(totals, key=lambda data: totals[data], default=None)
    result: dict[str, Any] = {"ledger": str(ledger.folder), **ASSUMPTIONS[entries[-1].unit if entries else "example"]}
    result["epsilon"] = totals[worst] if worst else 0.0
    result["delta"] = min(x.delta for x in same[worst]) if worst else None
    result["budget"] = entries[-1].budget if entries else None
    result["runs"] = [_summary_of(run, client, own) for (run, client), own in runs.items()]
    last = next((entry for entry in reversed(entries) if entry.kind == "train"), None)
    return result | {"next": None if last is None else _next(last, runs[last.run, last.client], same[last.data])}


ASSUMPTIONS = {
    "example": {
        "unit": "example: one training row",
        "neighbours": "one row more or less",
        "sampling": "Poisson: each row is in a batch with probability q, by itself",
    },
    "client": {
        "unit": "client: all that one client sends",
        "neighbours": "one client's uploads more or less",
        "sampling": "none: who is asked follows from the run's public seed, so every round of a client counts as it is",
    },
}
"""By unit, what ε holds for."""


def _summary_of(run: str, client: int, entries: list[Entry]) -> dict[str, Any]:
    delta, last = min(entry.delta for entry in entries), entries[-1]
    counted: dict[tuple[str, float, float], int] = {}
    for entry in entries:
        key = entry.kind, entry.sigma, entry.sample_rate
        counted[key] = counted.get(key, 0) + entry.steps
    return {
        "run": run,
        "client": client,
        "epsilon": epsilon_of(entries, delta),
        "delta": delta,
        "target": last.target,
        "rounds": sum(entry.kind == "train" for entry in entries),
        "max_grad_norm": last.max_grad_norm,
        "spent": [
            {"kind": kind, "sigma": sigma, "sample_rate": rate, "steps": steps}
            for (kind, sigma, rate), steps in counted.items()
        ],
        "first": entries[0].time,
        "last": last.time,
    }


def _next(last: Entry, own: list[Entry], same: list[Entry]) -> dict[str, Any]:
    delta = min(entry.delta for entry in same)
    left = [rounds_left(own, last, min(entry.delta for entry in own), last.target), rounds_left(same, last, delta, last.budget)]
    return {"run": last.run, "client": last.client, "epsilon": epsilon_of([*same, last], delta), "left": min(left)}


def _check_budget(entry: Entry, standing: Standing) -> None:
    what = "this measurement" if entry.kind == "measure" else f"round {entry.round}"
    run, every = (standing.run, standing.run_after), (standing.all, standing.all_after)
    spendings = (
        ("this run", *run, standing.delta_run, entry.target, "privacy.target_epsilon"),
        ("all runs on these rows", *every, standing.delta_all, entry.budget, "total_epsilon"),
    )
    for who, before, after, delta, budget, key in spendings:
        # Sums are composed anew each time, and in another grouping.
        if after > budget * (1 + 1e-9):
            raise BudgetError(
                f"{what} is refused: {who} spent ε {before:.4g} at δ {delta:.2g}, with it {after:.4g}, "
                f"allowed {budget:g}; stop here, or raise {key}"
            )


def _mark(row: Mapping[str, Any]) -> bytes:
    texts = [" ".join((x if isinstance(x, str) else json.dumps(x, sort_keys=True, default=str)).split()) for x in row.values()]
    return max(texts, key=lambda text: (len(text), text), default="").encode(errors="backslashreplace")


def _entry(table: Any, path: Path, number: int) -> Entry:
    names = [f.name for f in fields(Entry)]
    if not isinstance(table, dict) or sorted(table) != sorted(names):
        raise LedgerError(f"{str(path)!r}, line {number}: written by another version of umbel; allowed: {', '.join(names)}")
    return Entry(**table)
