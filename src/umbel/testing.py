"""check_method(): holds a method to what it declares, whoever wrote it.

The suite knows no method by name. It walks the phases of `plan`, invents clients of two layers (one wide, one tall, neither
side equal to the rank), folds their factors through the phase's collector, applies what comes back as a client would, and
compares dense matrices in float64. Phases that go on with a round are taken with the one that began it. What
a method must satisfy follows from `trains`, `sends`, `collect` and `exact`.
"""

import gc
import itertools
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from umbel import method as methods
from umbel import wire
from umbel.method import Collector, Download, Factors, Mean, Method, MethodError, Stack, blind_sum, bounded_sum, product

Layers = dict[str, Factors]
Shapes = dict[str, tuple[int, int]]

SHAPES: Shapes = {"wide": (7, 11), "tall": (10, 6)}  # d_out, d_in
RANK = 3
ROWS = (1.0, 2.0, 3.0, 6.0)
TINY: Shapes = {"layer": (64, 48)}
"""The layer on which `capabilities` counts bytes, with rank `RANK`."""

TOLERANCE = 1e-6
"""Relative difference in float64 below which two results are the same; generous to iterative methods."""


@dataclass(frozen=True)
class Client:
    """One invented client: all its factors after local training, and its rows n_k."""

    factors: Layers
    rows: float


@dataclass(frozen=True)
class Result:
    """What came of one property.

    Args:
        phase: Which phase of the plan, e.g. "1 (train B)".
        claim: The property as a sentence.
        holds: None where the property does not apply to what the method declares.
        detail: What was measured, or what is wrong.
    """

    phase: str
    claim: str
    holds: bool | None
    detail: str


class NonConforming(AssertionError):
    """A method does not do what it declares; `results` has every property, the failed ones among them."""

    def __init__(self, name: str, results: list[Result]) -> None:
        failed = [f"phase {r.phase}: {r.claim}: NO, {r.detail}" for r in results if r.holds is False]
        super().__init__(f"{name} breaks {len(failed)} of {len(results)} properties\n" + "\n".join(failed))
        self.results = results


class _Broken(Exception):
    """A property does not hold; the message says what was found."""


def _draw(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _to(layers: Layers, dtype: torch.dtype) -> Layers:
    return {layer: {name: x.to(dtype, copy=True) for name, x in own.items()} for layer, own in layers.items()}


def difference(got: Tensor, wanted: Tensor) -> float:
    """Returns ‖got − wanted‖ / ‖wanted‖, without the division where `wanted` is zero."""
    size = wanted.norm().item()
    return (got - wanted).norm().item() / (size if size > 0 else 1.0)


@dataclass(frozen=True)
class Trial:
    """One phase of a method with invented clients, and those that go on with its round.

    Args:
        phase: The phase.
        held: Per layer the factors that all clients hold at the start.
        shapes: Per layer (d_out, d_in).
        rest: The phases of the same round that follow it.
    """

    phase: Method
    held: Layers
    shapes: Shapes
    rest: tuple[Method, ...] = ()

    def exchanges(self, clients: list[Client]) -> Iterator["Trial"]:
        """Yields this trial and those of the further phases of its round, each with what the one before gave."""
        trial = self
        yield trial
        for later, phase in enumerate(self.rest, 1):
            downloads = trial.combined(clients)
            held = {layer: {**own, **downloads[layer].factors} for layer, own in trial.held.items()}
            trial = replace(self, phase=phase, held=held, rest=self.rest[later:])
            yield trial

    def clients(self, rows: tuple[float, ...] = ROWS, ranks: tuple[int, ...] | None = None) -> list[Client]:
        """Clients that trained apart; with `ranks`, on the first so many directions of the common factors."""
        return [self._client(k, n, RANK if ranks is None else ranks[k]) for k, n in enumerate(rows)]

    def _client(self, k: int, rows: float, rank: int) -> Client:
        factors: Layers = {}
        for i, (layer, (d_out, d_in)) in enumerate(self.shapes.items()):
            held = _cut(self.held[layer], rank)
            R = held["R"].shape if "R" in held else (rank, rank)
            sizes = {"A": (rank, d_in), "B": (d_out, rank), "R": (R[0], R[1]), "G": (d_out, d_in)}
            gradient = not self.phase.trains and self.phase.measures == "gradient"
            common = {} if gradient else held
            seeds = {name: 1000 * i + 10 * k + 100 + "ABRG".index(name) for name in sizes}
            sends = [name for name in self.phase.sends if name in sizes]
            moved = {name: _draw(*sizes[name], seeds[name]) for name in self.phase.trains or sends}
            factors[layer] = common | {name: common.get(name, 0) + 0.5 * x for name, x in moved.items()}
        return Client(factors, rows)

    def moved(self) -> str:
        """The factor by which ΔW is scaled: the last in B R A order that clients train, and send if any is sent."""
        both = [name for name in "RBA" if name in self.phase.trains and name in self.phase.sends]
        return (both or [name for name in "RBA" if name in self.phase.trains])[0]

    def aligned(self, ranks: tuple[int, ...] = (RANK,) * len(ROWS)) -> list[Client]:
        """Clients whose ΔW are multiples of one rank-one matrix, by one factor: no sane aggregate can differ from the mean."""
        name, result = self.moved(), list[Client]()
        for k, (n, rank) in enumerate(zip(ROWS, ranks)):
            factors: Layers = {}
            for layer, held in self.held.items():
                own = _cut(held, rank)
                rows, columns = own[name].shape
                u, v = _draw(rows, 1, 1), _draw(1, columns, 2)
                # Of mixed ranks, only the first direction is everybody's.
                u, v = (u, torch.eye(1, columns).double()) if name == "B" else (u, v)
                u = torch.eye(rows, 1).double() if name == "A" else u
                factors[layer] = own | {name: (k + 1.0) * u @ v}
            result.append(Client(factors, n))
        return result

    def upload(self, client: Client) -> Layers:
        return {layer: self.phase.message(own, self.held[layer]) for layer, own in client.factors.items()}

    def collectors(self, clients: list[Client]) -> dict[str, Collector]:
        folded = {layer: self.phase.collect() for layer in self.shapes}
        for client in clients if self.phase.sends else []:
            for layer, own in self.upload(client).items():
                folded[layer].add(own, client.rows)
        return folded

    def aggregate(self, clients: list[Client], held: Layers | None = None) -> dict[str, Download]:
        """Returns what comes of a whole round: of this phase, or of the last that goes on with it."""
        *_, last = (self if held is None else replace(self, held=held)).exchanges(clients)
        return last.combined(clients)

    def combined(self, clients: list[Client]) -> dict[str, Download]:
        """Returns what comes of this phase alone."""
        got = {layer: c.done() if self.phase.sends else {} for layer, c in self.collectors(clients).items()}
        downloads = self.phase.combine_layers(got, self.held)
        if downloads.keys() != self.shapes.keys():
            raise _Broken(f"got downloads for {sorted(downloads)}, wanted {sorted(self.shapes)}")
        for layer, download in downloads.items():
            _check_shapes(layer, download, *self.shapes[layer])
        return downloads

    def effects(self, clients: list[Client], held: Layers | None = None) -> Tensor:
        """Returns for each client, as a row, its ΔW of all layers after it did as it was told."""
        held = self.held if held is None else held
        downloads = self.aggregate(clients, held)
        rows: list[Tensor] = []
        for client in clients:
            own = client.factors if self.phase.trains else held
            rows.append(torch.cat([_effect(download, own[layer]).flatten() for layer, download in downloads.items()]))
        return torch.stack(rows)

    def ideal(self, clients: list[Client]) -> Tensor:
        """Returns Σ p_k ΔW_k of all layers, formed densely."""
        total = sum(client.rows for client in clients)
        return torch.cat(
            [sum(c.rows / total * _dense(c.factors[layer]) for c in clients).flatten() for layer in self.shapes]  # type: ignore
        )


def _cut(factors: Factors, rank: int) -> Factors:
    cuts = {"A": (rank, None), "B": (None, rank), "R": (rank, rank)}
    return {name: x[: cuts[name][0], : cuts[name][1]] for name, x in factors.items() if name in cuts}


def _dense(factors: Factors) -> Tensor:
    B, A = product(factors)
    return B.double() @ A.double()


def _effect(download: Download, own: Factors) -> Tensor:
    if download.reset is not None:
        own = {"A": own["A"], "B": torch.zeros_like(own["B"])}
    dense = _dense(own | download.lasting().factors)
    return dense if download.merge is None else dense + download.merge[0].double() @ download.merge[1].double()


def _tensors(download: Download) -> dict[str, Tensor]:
    merge = {} if download.merge is None else {"merge.B": download.merge[0], "merge.A": download.merge[1]}
    return {**download.factors, **merge}


def _check_shapes(layer: str, download: Download, d_out: int, d_in: int) -> None:
    for name, x in _tensors(download).items():
        side = name.removeprefix("merge.")
        sides = {"A": (x.shape[0], d_in), "B": (d_out, x.shape[-1]), "R": (x.shape[0], x.shape[-1])}
        if tuple(x.shape) != sides.get(side, tuple(x.shape)):
            raise _Broken(f"layer of {d_out} × {d_in}: got {name} of shape {tuple(x.shape)}")
        if not torch.isfinite(x).all():
            raise _Broken(f"layer {layer!r}: {name} has NaN or infinity")
    if download.merge is not None and download.merge[0].shape[1] != download.merge[1].shape[0]:
        raise _Broken(f"merge of {tuple(download.merge[0].shape)} by {tuple(download.merge[1].shape)}")


def _same(measured: float, what: str, tolerance: float = TOLERANCE) -> str:
    if not measured <= tolerance:
        raise _Broken(f"{what}: relative difference {measured:.3g}, allowed {tolerance:g}")
    return f"{measured:.1e}"


Check = Callable[[Trial], str | None]
CLAIMS: list[tuple[str, Check]] = []


def _claim(sentence: str) -> Callable[[Check], Check]:
    """Registers a check: it returns what it measured, None where it does not apply, and raises where the claim is false."""

    def register(check: Check) -> Check:
        CLAIMS.append((sentence, check))
        return check

    return register


@_claim("clients that moved along one direction get the weighted mean")
def _known_answer(trial: Trial) -> str | None:
    if not (trial.phase.trains and trial.phase.by_rows):
        return None
    clients = trial.aligned()
    return _same(difference(trial.effects(clients), trial.ideal(clients).expand(len(clients), -1)), "against Σ p_k ΔW_k")


@_claim("the result is the mean of products, where the method says it is exact")
def _exact(trial: Trial) -> str | None:
    if not (trial.phase.trains and trial.phase.exact):
        return None
    clients = trial.clients()
    return _same(difference(trial.effects(clients), trial.ideal(clients).expand(len(clients), -1)), "Σ p_k ΔW_k", 1e-10)


@_claim("clients that agree count as one of them")
def _agreement(trial: Trial) -> str:
    clients = trial.clients()
    agreeing = [replace(clients[0], rows=n) for n in ROWS]
    return _same(difference(trial.effects(agreeing)[:1], trial.effects(clients[:1])), "against that client alone")


@_claim("the order of arrival changes nothing")
def _order(trial: Trial) -> str:
    clients, order = trial.clients(), [2, 0, 3, 1]
    return _same(
        difference(trial.effects([clients[k] for k in order]), trial.effects(clients)[order]), "after permuting clients"
    )


@_claim("the same clients in the same order give the same bits, and the global random state is left alone")
def _bits(trial: Trial) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = trial.aggregate(trial.clients())
        torch.manual_seed(2)
        state = torch.random.get_rng_state()
        again = trial.aggregate(trial.clients())
        if not torch.equal(state, torch.random.get_rng_state()):
            raise _Broken("the global generator was drawn from")
    for layer, download in first.items():
        _equal(_tensors(download), _tensors(again[layer]), "a second run")
        if download.reset != again[layer].reset:
            raise _Broken(f"reset {download.reset}, then {again[layer].reset}")
    return "equal"


def _equal(first: Factors, second: Factors, what: str) -> None:
    for name in first.keys() | second.keys():
        if name not in first or name not in second or not torch.equal(first[name], second[name]):
            raise _Broken(f"{name} differs after {what}")


@_claim("doubling every n_k changes nothing")
def _doubled(trial: Trial) -> str:
    clients = trial.clients()
    doubled = [replace(client, rows=2 * client.rows) for client in clients]
    return _same(difference(trial.effects(doubled), trial.effects(clients)), "after doubling")


@_claim("n_k = 2 counts as the client sent twice")
def _twice(trial: Trial) -> str:
    a, b = trial.clients()[:2]
    heavy, twice = [replace(a, rows=1.0), replace(b, rows=2.0)], [replace(c, rows=1.0) for c in (a, b, b)]
    return _same(difference(trial.effects(heavy), trial.effects(twice)[:2]), "against the client sent twice")


@_claim("factors scaled by s scale the result by s")
def _scale(trial: Trial) -> str | None:
    if not trial.phase.trains:
        return None
    name, s = trial.moved(), 3.0

    def scaled(layers: Layers) -> Layers:
        return {layer: {**own, name: s * own[name]} for layer, own in layers.items()}

    clients = trial.clients()
    larger = [replace(client, factors=scaled(client.factors)) for client in clients]
    return _same(difference(trial.effects(larger, scaled(trial.held)), s * trial.effects(clients)), f"{name} × {s}")


@_claim("another gauge (B G, G⁻¹ A) changes nothing, where factors are stacked")
def _gauge(trial: Trial) -> str | None:
    if not issubclass(trial.phase.collect, Stack) or not {"A", "B"} <= set(trial.phase.sends):
        return None
    turned: list[Client] = []
    # So few that no stack is wider than a layer: it would be added up, and nothing be left to turn.
    clients = trial.clients()[: min(map(min, trial.shapes.values())) // RANK]
    for k, client in enumerate(clients):
        G = _draw(RANK, RANK, 77 + k) + 3 * torch.eye(RANK).double()
        own = {layer: {**f, "B": f["B"] @ G, "A": torch.linalg.solve(G, f["A"])} for layer, f in client.factors.items()}
        turned.append(replace(client, factors=own))
    return _same(difference(trial.effects(turned), trial.effects(clients)), "after a change of gauge")


@_claim("inputs are not modified")
def _untouched(trial: Trial) -> str:
    clients, held = trial.clients(), _to(trial.held, torch.float64)
    before = [_to(client.factors, torch.float64) for client in clients]
    trial.aggregate(clients, held)
    for old, new in [*zip(before, (client.factors for client in clients)), (trial.held, held)]:
        for layer in old:
            _equal(old[layer], new[layer], "combine")
    return "untouched"


@_claim("the dtype that goes in comes out, and float32 is enough")
def _dtype(trial: Trial) -> str:
    results: dict[torch.dtype, Tensor] = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        clients = [replace(client, factors=_to(client.factors, dtype)) for client in trial.clients()]
        held = _to(trial.held, dtype)
        for download in trial.aggregate(clients, held).values():
            for name, x in _tensors(download).items():
                if x.dtype != dtype:
                    raise _Broken(f"{dtype} went in, {name} came out as {x.dtype}")
        results[dtype] = trial.effects(clients, held)
    return _same(difference(results[torch.float32], results[torch.float64]), "float32 against float64", 1e-4)


@_claim("uploads and downloads survive the wire to the last bit")
def _wire(trial: Trial) -> str:
    clients = [replace(client, factors=_to(client.factors, torch.float32)) for client in trial.clients()]
    for exchange in replace(trial, held=_to(trial.held, torch.float32)).exchanges(clients):
        sent = exchange.upload(clients[0])
        arrived = wire.unpack_factors(wire.decode(wire.encode(wire.Message({}, wire.pack_factors(sent)))).tensors)
        for layer in sent if exchange.phase.sends else ():
            _equal(sent[layer], arrived.get(layer, {}), "the way up")
        downloads = exchange.combined(clients)
        message = wire.decode(wire.encode(wire.Message(*wire.pack(downloads))))
        got = wire.unpack(message.header, message.tensors)
        for layer, download in downloads.items():
            _equal(_tensors(download), _tensors(got.get(layer, Download())), "the way down")
            if download.reset != got.get(layer, Download()).reset:
                raise _Broken("reset differs after the way down")
    return "equal"


@_claim("mixed ranks are taken, or refused in a sentence")
def _mixed(trial: Trial) -> str | None:
    if not trial.phase.trains or not trial.phase.sends:
        return None
    ranks = (2, 1, RANK, RANK)
    try:
        trial.aggregate(trial.clients(ranks=ranks))
    except MethodError as error:
        if trial.phase.mixed_ranks:
            raise _Broken(f"mixed_ranks is True, but refused: {error}") from None
        if "\n" in str(error) or "rank" not in str(error):
            raise _Broken(f"refused, but not in a sentence that says rank: {error}") from None
        return "refused"
    if not trial.phase.mixed_ranks:
        return "refused by the server, since mixed_ranks is False"
    if not trial.phase.by_rows:
        return "taken"
    clients = trial.clients(ranks=ranks) if trial.phase.exact else trial.aligned(ranks)
    measured = difference(trial.effects(clients), trial.ideal(clients).expand(len(clients), -1))
    return "taken, " + _same(measured, "mixed ranks against Σ p_k ΔW_k")


@_claim("a collector that is a mean keeps no uploads")
def _memory(trial: Trial) -> str | None:
    if not issubclass(trial.phase.collect, Mean) or not trial.phase.sends:
        return None
    most = 0
    for exchange in trial.exchanges(trial.clients()):
        few, many, one = bytes_kept(exchange, 2), bytes_kept(exchange, 8), bytes_kept(exchange, 1)
        if many - few > one:
            raise _Broken(f"{few} bytes after 2 clients, {many} after 8")
        most = max(most, many)
    return f"{most} bytes"


def bytes_kept(trial: Trial, K: int) -> int:
    """Returns the bytes kept after K clients: reachable from the phase's collectors, or uploads that anything else keeps."""
    collectors = {layer: trial.phase.collect() for layer in trial.shapes}
    uploads: list[weakref.ref[Tensor]] = []

    def fold(k: int) -> None:
        for layer, own in trial.upload(trial._client(k, 1.0, RANK)).items():
            collectors[layer].add(own, 1.0)
            uploads.extend(weakref.ref(x) for x in own.values())

    for k in range(K):
        fold(k)
    gc.collect(1)  # what the folding itself left in cycles is young
    storages: dict[int, int] = {}
    other = 0
    for thing in [*_reachable(collectors), *(x for ref in uploads if (x := ref()) is not None)]:
        if isinstance(thing, Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, (bytes, bytearray)) or hasattr(thing, "nbytes"):
            other += int(getattr(thing, "nbytes", sys.getsizeof(thing)))
    return sum(storages.values()) + other


def _reachable(root: object) -> Iterator[object]:
    seen, waiting = set[int](), [root]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType, types.FunctionType)):
            continue
        seen.add(id(thing))
        yield thing
        waiting.extend(gc.get_referents(thing))


def _make(method: Method | type[Method] | str, options: dict[str, Any]) -> Method:
    if isinstance(method, str):
        return methods.load(method, **options)
    return method if isinstance(method, Method) else method(**options)


def _title(index: int, phase: Method) -> str:
    kind = f"train {' '.join(phase.trains)}" if phase.trains else "measure" if phase.measures == "gradient" else "gather"
    return f"{index} ({kind})"


def trials(method: Method, shapes: Shapes) -> Iterator[tuple[str, Trial]]:
    """Yields every different phase of a plan with what clients hold when it begins, and what goes on with it."""
    held: Layers = {
        layer: {"A": _draw(RANK, d_in, 2 * i), "B": _draw(d_out, RANK, 2 * i + 1)}
        for i, (layer, (d_out, d_in)) in enumerate(shapes.items())
    }
    seen: list[tuple[type[Method], str]] = []
    phases = list(method.plan(4))
    for index, phase in enumerate(phases):
        kind = type(phase), repr(getattr(phase, "__dict__", phase))
        if kind in seen or phase.continues:
            continue
        seen.append(kind)
        if "R" in phase.trains:
            held = {
                layer: {**own, "R": _draw(*own["R"].shape, 9) if "R" in own else _draw(RANK, RANK, 9)}
                for layer, own in held.items()
            }
        rest = tuple(itertools.takewhile(lambda later: later.continues, phases[index + 1 :]))
        trial = Trial(phase, held, shapes, rest)
        yield _title(index, phase), trial
        if not phase.trains:
            try:
                downloads = trial.aggregate(trial.clients())
            except Exception:
                return  # what comes later cannot begin; the checks of this phase say why
            held = {layer: {**own, **downloads[layer].factors} for layer, own in held.items()}


def check_method(method: Method | type[Method] | str, **options: Any) -> list[Result]:
    """Checks a method against everything that it declares.

    Args:
        method: A method, its class, or its name or module path with its options.

    Returns:
        One result per phase and property; `holds` is None where a property does not apply.

    Raises:
        NonConforming: A property does not hold; the message lists all that do not.

    >>> sum(result.holds is None for result in check_method("fedit"))
    2
    """
    made, results = _make(method, options), list[Result]()
    steps = sum(1 for phase in made.plan(4) if phase.trains)
    results.append(Result("all", "plan(4) has four training rounds", steps == 4, f"{steps}"))
    for title, trial in trials(made, SHAPES):
        for claim, check in CLAIMS:
            try:
                detail = check(trial)
                results.append(Result(title, claim, None if detail is None else True, detail or "does not apply"))
            except _Broken as broken:
                results.append(Result(title, claim, False, str(broken)))
            except Exception as error:
                results.append(Result(title, claim, False, f"{type(error).__name__}: {error}"))
    if any(result.holds is False for result in results):
        raise NonConforming(type(made).__name__, results)
    return results


def _maskable(trial: Trial) -> bool:
    """Do the collectors see only Σ n_k X_k? Then masks m_k with Σ m_k = 0, sent as X_k + m_k / n_k, change nothing."""
    clients = trial.clients()
    plain, hidden = trial.collectors(clients), {layer: trial.phase.collect() for layer in trial.shapes}
    for k, client in enumerate(clients):
        sign = 1 if k % 2 else -1  # pairs of clients share a mask
        for layer, said in trial.upload(client).items():
            masks = {name: sign * _draw(x.shape[0], x.shape[1], 500 + k // 2) / client.rows for name, x in said.items()}
            hidden[layer].add({name: x + masks[name] for name, x in said.items()}, client.rows)
    for layer in plain:
        a, b = plain[layer].done(), hidden[layer].done()
        if not (isinstance(a, dict) and isinstance(b, dict)):
            return False
        if any(a[name].shape != b[name].shape or difference(b[name], a[name]) > TOLERANCE for name in a):
            return False
    return True


def capabilities(method: Method | type[Method] | str, **options: Any) -> dict[str, Any]:
    """Measures what a method can do; nothing of it is declared.

    A round of several exchanges counts with all of their bytes.

    Returns:
        `error` is the worst ‖ΔW − Σ p_k ΔW_k‖ / ‖Σ p_k ΔW_k‖ over clients and training phases in float64, `exact` whether it
        is rounding. `bytes_up` and `bytes_down` are per client, layer and round, of the wire's tensors and their part of the
        header, for a 64 × 48 layer of rank 3; `start_bytes_up` and `start_bytes_down` those of measuring phases. `maskable`:
        a secure sum would do. `mixed_ranks`: taken. `server_memory`: "constant" or "grows with clients".

    >>> found = capabilities("fedit")
    >>> found["exact"], found["maskable"], found["mixed_ranks"], found["server_memory"]
    (False, True, False, 'constant')
    """
    made = _make(method, options)
    found: dict[str, Any] = {"error": 0.0, "maskable": True, "mixed_ranks": True, "server_memory": "constant"}
    found |= dict.fromkeys(("bytes_up", "bytes_down", "start_bytes_up", "start_bytes_down"), 0)
    empty = len(wire.encode(wire.Message(*wire.pack({}))))
    for _, trial in trials(made, TINY):
        clients, up, down = trial.clients(), 0, 0
        for exchange in trial.exchanges(clients):
            up += len(wire.encode(wire.Message({"reset": {}}, wire.pack_factors(exchange.upload(clients[0]))))) - empty
            down += len(wire.encode(wire.Message(*wire.pack(exchange.combined(clients))))) - empty
            if exchange.phase.sends:
                found["maskable"] &= _maskable(exchange)
                if bytes_kept(exchange, 8) - bytes_kept(exchange, 2) > bytes_kept(exchange, 1):
                    found["server_memory"] = "grows with clients"
        kind = "" if trial.phase.trains else "start_"
        found[f"{kind}bytes_up"] = max(found[f"{kind}bytes_up"], up)
        found[f"{kind}bytes_down"] = max(found[f"{kind}bytes_down"], down)
        if trial.phase.trains:
            ideal = trial.ideal(clients)
            found["error"] = max(found["error"], *(difference(row, ideal) for row in trial.effects(clients)))
            found["mixed_ranks"] &= trial.phase.mixed_ranks
    return {"exact": found["error"] < 1e-10, **found}


def disclosures(method: Method | type[Method] | str, **options: Any) -> dict[str, Any]:
    """Says what a method sends and to whom it could tell something; all of it follows from its phases.

    Returns:
        `sends` is per phase what goes up and how many numbers that is, for a 64 × 48 layer of rank 3, and `keeps` what never
        does, or only in a last phase. `maskable`: secure aggregation is allowed; `why_not` otherwise. `server_sees` is what a
        run shows the server of each client, `server_sees_masked` what a masked one shows it ("" where there is none). `units`
        are the units of differential privacy that it allows, with `why_not_client`. `start_reads`: before it trains.

    >>> found = disclosures("ffa_lora")
    >>> found["sends"], found["maskable"], found["units"]
    ({'training': {'B': 192}}, True, ['example', 'client'])
    """
    made = _make(method, options)
    sends: dict[str, dict[str, int]] = {}
    keeps: list[str] = []
    for _, trial in trials(made, TINY):
        clients, turn = trial.clients(), "other rounds" if _when(trial.phase) in sends else _when(trial.phase)
        for later, exchange in enumerate(trial.exchanges(clients)):
            (own,) = exchange.upload(clients[0]).values()
            when = f"{turn}, message {later + 1}" if later else turn
            sends[when] = {name: x.numel() for name, x in own.items()}
        keeps += [name for name in trial.phase.keeps if name not in keeps]
    sends = {when: names for when, names in sends.items() if names}
    own, unbounded = blind_sum(made), bounded_sum(made, public=True)
    measured = " and ".join(sends.get("start", {}))
    return {
        "sends": sends,
        "keeps": keeps,
        "maskable": not own,
        "why_not": own,
        "server_sees": "; ".join(f"{when}: each client's {' and '.join(names)}" for when, names in sends.items()),
        "server_sees_masked": ""
        if own
        else "; ".join(f"{when}: Σ n_k and {' and '.join(f'Σ n_k {x}_k' for x in names)}" for when, names in sends.items()),
        "units": ["example", *([] if unbounded else ["client"])],
        "why_not_client": unbounded,
        "start_reads": f"rows ({measured})" if measured else "no rows",
    }


def _when(phase: Method) -> str:
    return "training" if phase.trains else {"gradient": "start", "factors": "gather"}[phase.measures]


def privacy_table(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Returns what `disclosures` says of methods as rows of a table, the headings first.

    Args:
        found: By name of the method.
    """
    rows = [["method", "sends (numbers)", "stays at home", "the server sees", "DP units", "start reads"]]
    for name, own in found.items():
        sends = "; ".join(
            ("" if when == "training" else "then " if ", message" in when else f"{when} ")
            + ", ".join(f"{x} {count}" for x, count in names.items())
            for when, names in own["sends"].items()
        )
        keeps = " and ".join([*own["keeps"], "head"] if own["keeps"] else [])
        sees = "sums, if masked" if own["maskable"] else "each client's"
        rows.append([name, sends, keeps or "–", sees, ", ".join(own["units"]), own["start_reads"]])
    return rows
