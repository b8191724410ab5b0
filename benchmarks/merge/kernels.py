"""Aggregating one layer in memory: umbel's methods, what one would take instead, and the products that cannot be avoided."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import adapters
import floors
import rivals
from adapters import Kind
from umbel import algebra
from umbel import method as methods
from umbel.algebra import Product
from umbel.method import Download, Factors

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "florist τ 0.9": ("florist", {"energy": 0.9}),
    "florist τ 1": ("florist", {"energy": 1.0}),
    "florist τ 1, merge": ("florist", {"energy": 1.0, "adopt": "merge"}),
    "flora_na": ("flora_na", {}),
    "best_rank": ("best_rank", {}),
    "fedit": ("fedit", {}),
}
PATIENCE = 3.0  # seconds; what took longer at first is not repeated
MOST_FOR_RIVALS = 100  # clients, beyond which only umbel runs, and no error is computed
DENSE_AT = (10, 100)  # clients at which a dense matrix of the layer is decomposed; its time hardly depends on them
MOST_DENSE_BYTES = 8e9  # that PEFT's "svd" may take
PEFT_LAYERS = 2


@dataclass(frozen=True)
class Case:
    """One layer and its clients.

    Args:
        shape: (d_out, d_in).
        rank: r of every client.
        kind: Of clients.
        clients: K.
        rivals: "all", or "paper" where the dense routes and PEFT are left out.
    """

    shape: tuple[int, int]
    rank: int
    kind: Kind
    clients: int
    rivals: Literal["all", "paper"] = "all"

    @property
    def title(self) -> str:
        return f"{self.shape[0]} × {self.shape[1]}, rank {self.rank}, {self.clients} clients, {self.kind}"


@dataclass
class Row:
    """Something that is timed.

    Args:
        name: For tables.
        by: Whose it is.
        beside: Umbel's row that it is compared with.
        run: What is timed.
        take: Turns what `run` returned into the pair that it stands for; not timed.
        layers: Of how many layers `run` makes the result.
        note: What a reader must know.
    """

    name: str
    by: Literal["umbel", "rival", "floor"]
    beside: str
    run: Callable[[], Any]
    take: Callable[[Any], Product | None] = lambda got: got
    layers: int = 1
    note: Callable[[], str] = lambda: ""


def plan(clients: list[int]) -> list[Case]:
    """Returns the cases at Llama-2-7B's shapes: all for the square layers, the paper's route alone for the MLP's."""
    square = [Case(adapters.SQUARE, 16, kind, K) for K in clients for kind in adapters.KINDS]
    wide = [Case(shape, 16, "alike", K, "paper") for shape in (adapters.WIDE, adapters.TALL) for K in clients if K <= 100]
    return square + wide


def quick() -> list[Case]:
    """Returns small cases that take every path, a stack wider than the layer among them."""
    return [Case((256, 192), 4, kind, K) for K in (5, 10, 60) for kind in adapters.KINDS] + [
        Case((192, 96), 4, "alike", 5, "paper")
    ]


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Runs every row of a case once, then all of them in turn `repeats` times, and returns medians and errors.

    Interleaved, so that what else the machine does meets all rows alike. The first pass is thrown away, but for rows that took
    longer than `PATIENCE` in it.
    """
    own = [adapters.factors(case.kind, case.shape, case.rank, k) for k in range(case.clients)]
    given = [(factors, float(adapters.rows(k))) for k, factors in enumerate(own)]
    total = sum(n for _, n in given)
    uploads = [(factors, n / total) for factors, n in given]
    small = case.clients <= MOST_FOR_RIVALS
    truth = _dense(uploads) if small else None
    rows, told = list[Row](), list[dict[str, Any]]()
    first: dict[str, float] = {}

    def begin(more: Iterator[Row]) -> None:
        for row in more:
            seconds, got = _timed(row)
            pair = row.take(got)
            first[row.name] = seconds
            rows.append(row)
            error = None if pair is None or truth is None else _error(pair, truth)
            rank = None if pair is None else pair[0].shape[1]
            told.append(
                {"name": row.name, "by": row.by, "beside": row.beside, "rank": rank, "error": error, "note": row.note()}
            )

    begin(_umbel(case, given))
    if small:
        begin(_rivals(case, uploads))
    begin(_floors(uploads, {row["name"]: row["rank"] for row in told}))
    samples: dict[str, list[float]] = {row.name: [] for row in rows}
    for _ in range(repeats):
        for row in rows:
            if first[row.name] <= PATIENCE:
                seconds, got = _timed(row)
                row.take(got)
                samples[row.name].append(seconds)
    for line in told:
        taken = samples[line["name"]] or [first[line["name"]]]
        line |= {"seconds": statistics.median(taken), "fastest": min(taken), "samples": len(taken)}
    shown = {"shape": list(case.shape), "rank": case.rank, "kind": case.kind, "clients": case.clients}
    return {**shown, "repeats": repeats, "rows": told}


def _timed(row: Row) -> tuple[float, Any]:
    begun = time.perf_counter()
    got = row.run()
    return (time.perf_counter() - begun) / row.layers, got


def _umbel(case: Case, given: list[tuple[Factors, float]]) -> Iterator[Row]:
    """What the server and `umbel merge` do with one layer: collect, combine."""
    held = {"A": torch.zeros(case.rank, case.shape[1]), "B": torch.zeros(case.shape[0], case.rank)}

    def aggregate(method: methods.Method) -> Download:
        collector = method.collect()
        for factors, n in given:
            collector.add(factors, n)
        return method.combine(collector.done(), held)

    for label, (name, options) in METHODS.items():
        method = methods.load(name, **options)
        yield Row(label, "umbel", label, lambda method=method: aggregate(method), _sent)


def _sent(download: Download) -> Product:
    sent = algebra.add_products(download.merge, methods.product(download.factors) if download.factors else None)
    assert sent is not None
    return sent


def _rivals(case: Case, uploads: rivals.Uploads) -> Iterator[Row]:
    for energy in (0.9, 1.0):
        label = f"florist τ {energy:g}"
        yield Row(f"two SVDs, τ {energy:g}", "rival", label, lambda energy=energy: rivals.florist(uploads, energy))
    if case.rivals == "paper":
        return
    adam = rivals.FLoRANA()
    yield Row("Adam, dense", "rival", "flora_na", lambda: adam(uploads), note=lambda: f"{adam.steps} steps")
    if case.clients in DENSE_AT or max(case.shape) < 1024:
        yield Row("FlexLoRA, dense", "rival", "best_rank", lambda: rivals.flexlora(uploads, case.rank))
    stock = rivals.Peft(uploads, PEFT_LAYERS)
    said = f"{PEFT_LAYERS} layers, time of one"
    for combination, label in (("linear", "fedit"), ("cat", "florist τ 1, merge"), ("svd", "best_rank")):
        dense = combination == "svd"
        if dense and (case.clients not in DENSE_AT or rivals.Peft.dense_bytes(uploads) > MOST_DENSE_BYTES):
            continue
        merge, take = (lambda c=combination: stock.merge(c)), (lambda _, c=combination: stock.take(c))
        yield Row(f"PEFT {combination}", "rival", label, merge, take, PEFT_LAYERS, lambda: said)


def _floors(uploads: rivals.Uploads, ranks: dict[str, int]) -> Iterator[Row]:
    B = torch.cat([own["B"] for own, _ in uploads], dim=1)
    A = torch.cat([p * own["A"] for own, p in uploads], dim=0)
    for label in ("florist τ 0.9", "florist τ 1", "florist τ 1, merge", "best_rank"):
        yield Row(f"products of {label}", "floor", label, floors.products(B, A, ranks[label]), lambda _: None)
    yield Row("products of flora_na", "floor", "flora_na", floors.grams(B, A), lambda _: None)


def _dense(uploads: rivals.Uploads) -> Tensor:
    """Returns Σ p_k B_k A_k in float64, by blocks of rows."""
    B = torch.cat([own["B"] for own, _ in uploads], dim=1)
    A = torch.cat([p * own["A"].double() for own, p in uploads], dim=0)
    return torch.cat([block.double() @ A for block in B.split(512)])


def _error(pair: Product, truth: Tensor) -> float:
    """Returns ‖B A − M‖_F / ‖M‖_F, by blocks of rows."""
    B, A = pair[0].double(), pair[1].double()
    apart = sum(float((b @ A - m).square().sum()) for b, m in zip(B.split(512), truth.split(512)))
    return (apart / float(truth.square().sum())) ** 0.5
