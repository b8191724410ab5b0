"""The server's arithmetic: what all clients hold, what each is owed, and one round's folding. Knows no transport."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from umbel import algebra, method, wire
from umbel.method import HELD, Collector, Download, Factors, Mean, Method, MethodError, Stack

OBSERVER = -1
"""The number of the client that only scores the common model on all test rows; its bytes are not counted."""


LARGEST = 1e15
"""Bound on the entries of an upload: with it, products and their singular values stay finite in float32."""

MOST_ROWS = 10**12
"""Bound on n_k, so that sums and shares of weights stay finite."""


class Refused(ValueError):
    """An upload that is left out of the round; the message is the reason in the record."""


class ServerError(RuntimeError):
    """The round cannot be ended; the message says why and what to do."""


@dataclass(frozen=True)
class LayerShape:
    """One adapted weight: d_out × d_in, and the rank r of its adapter (at the server the largest of all clients')."""

    d_out: int
    d_in: int
    rank: int


def fresh_factors(layer: str, shape: LayerShape, seed: int) -> Factors:
    """Returns the factors of a new adapter: A random from the seed and the layer's name, B = 0.

    Clients and server call this with the same arguments and hold the same bits.
    """
    A = algebra.fresh_A(shape.rank, shape.d_in, algebra.seed_of(seed, layer))
    return {"A": A, "B": torch.zeros(shape.d_out, shape.rank)}


def update(layer: str, download: Download, held: Factors) -> algebra.Product:
    """Returns the product by which a client's weight differs from the frozen one it began the round with.

    Args:
        layer: Its name, from which a fresh adapter is drawn.
        download: What the client takes, with the reset that the server mixed.
        held: The factors before it.
    """
    if download.reset is None:
        factors = {**held, **download.factors}
    elif "B" not in download.factors:
        factors = {}  # the fresh adapter's own product is zero
    else:
        r, d_in = held["A"].shape
        fresh = algebra.fresh_A(r, d_in, algebra.seed_of(download.reset, layer))
        factors = {"A": fresh.to(held["A"]), **download.factors}
    sent = algebra.add_products(download.merge, method.product(factors) if factors else None)
    return sent if sent is not None else (0 * held["B"], held["A"])


_UNSOUND = f"NaN, infinity or values beyond ±{LARGEST:.0e}"


def _sound(x: Tensor) -> bool:
    return bool((x.abs() <= LARGEST).all())


@dataclass(frozen=True)
class Aggregated:
    """What one round's uploads became.

    Args:
        downloads: Per layer, as rounded by the wire.
        plain: Weighted means of parameters that are not factors.
        error: Per layer ‖ΔW_sent − Σ p_k ΔW_k‖_F / ‖Σ p_k ΔW_k‖_F, where it was measured.
        error_of_sum: The same against K Σ p_k ΔW_k, the sum over clients that some papers take as the ideal.
        rank: Per layer the rank of the product that was sent.
        ranks: Per client and layer the rank of its upload.
    """

    downloads: dict[str, Download]
    plain: dict[str, Tensor]
    error: dict[str, float] | None
    error_of_sum: dict[str, float] | None
    rank: dict[str, int]
    ranks: dict[int, dict[str, int]] = field(default_factory=dict[int, dict[str, int]])


class Server:
    """What the clients hold in common, and what each of them is owed.

    Args:
        layers: Shape of every adapted weight.
        seed: The run's.
        dtype: The wire's; the server holds what the clients hold after rounding.
        plain_shapes: Shapes of the parameters that are not factors, as agreed at the opening; None takes the first upload's.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerShape],
        seed: int,
        dtype: str = "float32",
        plain_shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.layers = dict(layers)
        self.plain_shapes = None if plain_shapes is None else dict(plain_shapes)
        self.seed = seed
        self.dtype = dtype
        self.round = 0
        self.held = {layer: fresh_factors(layer, shape, seed) for layer, shape in self.layers.items()}
        self.merged: dict[str, tuple[Tensor, Tensor]] = {}
        self.plain: dict[str, Tensor] = {}
        # How many rounds' results each client has; −1 for one that never started.
        self.has: dict[int, int] = {}
        # Per client and layer the rank that it last had, where that is not the largest.
        self.ranks: dict[int, dict[str, int]] = {}
        # What is owed to clients that have so many rounds; clients that left together share one composition.
        self.owed: dict[int, dict[str, Download]] = {-1: {layer: Download(reset=seed) for layer in self.layers}}

    def owed_to(self, client: int, whole: bool = False) -> dict[str, Download]:
        """Returns all that happened since the client last took its downloads, composed per layer.

        Pairs are cut to the client's rank, unless `whole`.
        """
        owed, own = self.owed[self.has.get(client, -1)], self.ranks.get(client)
        if not own or whole:
            return owed
        return {layer: download.cut(own[layer]) if layer in own else download for layer, download in owed.items()}

    def rank_of(self, client: int, layer: str) -> int:
        """Returns the rank of a client's adapter, as it last said."""
        return self.ranks.get(client, {}).get(layer, self.layers[layer].rank)

    def note_rank(self, client: int, layer: str, rank: int) -> None:
        """Notes the rank of a client's adapter."""
        if rank != self.rank_of(client, layer):
            self.ranks.setdefault(client, {})[layer] = rank

    def took(self, client: int) -> None:
        """Notes that a client holds all that happened until now."""
        self.has[client] = self.round
        self.owed.setdefault(self.round, {})

    def in_phase(self) -> list[int]:
        """Returns the clients whose uploads were folded in the last phase."""
        return sorted(client for client, has in self.has.items() if has == self.round - 1 and client != OBSERVER)

    def settle(self, aggregated: Aggregated) -> None:
        """Ends a phase: what was combined is held from now on, and owed to everybody.

        What is given for the next phase only is owed to those whose uploads were folded in this one.
        """
        folded = self.round
        self.round += 1
        for client, own in aggregated.ranks.items():
            for layer, rank in own.items():
                self.note_rank(client, layer, rank)
        for layer, download in aggregated.downloads.items():
            self._hold(layer, download)
        self.plain = {**self.plain, **aggregated.plain}
        wanted = {*self.has.values(), -1}
        new = {layer: aggregated.downloads.get(layer, Download()) for layer in self.layers}
        lasting = {layer: download.lasting() for layer, download in new.items()}
        self.owed = {
            has: {layer: owed.get(layer, Download()).then((new if has == folded else lasting)[layer]) for layer in self.layers}
            for has, owed in self.owed.items()
            if has in wanted
        }

    def as_before(self) -> Aggregated:
        """Returns what a round comes to that is given up: everybody goes back to the factors with which it began."""
        common = {layer: {name: x for name, x in own.items() if name in HELD} for layer, own in self.held.items()}
        rank = {layer: shape.rank for layer, shape in self.layers.items()}
        return Aggregated({layer: Download(own) for layer, own in common.items()}, {}, None, None, rank)

    def _hold(self, layer: str, download: Download) -> None:
        if download.reset is not None:
            self.held[layer] = fresh_factors(layer, self.layers[layer], download.reset)
        self.held[layer] = {**Download(self.held[layer]).lasting().factors, **download.factors}
        merged = algebra.add_products(self.merged.get(layer), download.merge)
        if merged is not None:
            self.merged[layer] = merged

    def model(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns per layer (B, A), whose product is all that training has added to the frozen weight."""
        result: dict[str, tuple[Tensor, Tensor]] = {}
        for layer, factors in self.held.items():
            total = algebra.add_products(self.merged.get(layer), method.product(factors))
            assert total is not None
            result[layer] = total
        return result

    # State to tensors and back, for the record.

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns everything that a later process needs to go on, as (JSON, tensors)."""
        header: dict[str, Any] = {"round": self.round, "has": {str(k): n for k, n in self.has.items()}, "owed": {}}
        header["ranks"] = {str(k): ranks for k, ranks in self.ranks.items()}
        tensors = {f"held/{key}": x for key, x in wire.pack_factors(self.held).items()}
        tensors |= {f"plain/{name}": x for name, x in self.plain.items()}
        for layer, (B, A) in self.merged.items():
            tensors |= {f"merged/{layer}|B": B, f"merged/{layer}|A": A}
        for has, downloads in self.owed.items():
            packed, own = wire.pack(downloads)
            header["owed"][str(has)] = packed
            tensors |= {f"owed/{has}/{key}": x for key, x in own.items()}
        return header, tensors

    def restore(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}

        self.round = int(header["round"])
        self.has = {int(k): int(n) for k, n in header["has"].items()}
        self.ranks = {int(k): {layer: int(n) for layer, n in own.items()} for k, own in header["ranks"].items()}
        self.held = wire.unpack_factors(under("held/"))
        self.plain = under("plain/")
        self.merged = {layer: (own["B"], own["A"]) for layer, own in wire.unpack_factors(under("merged/")).items()}
        self.owed = {int(has): wire.unpack(packed, under(f"owed/{has}/")) for has, packed in header["owed"].items()}


class _Lazily(Mapping[str, Any]):
    """Per layer what the collector's `done` gives, made from the uploads when it is asked for; the last one is kept."""

    def __init__(self, layers: list[str], make: Callable[[str], Any]) -> None:
        self._layers, self._make = layers, make
        self._last: tuple[str, Any] | None = None

    def __getitem__(self, layer: str) -> Any:
        if layer not in self._layers:
            raise KeyError(layer)
        if self._last is None or self._last[0] != layer:
            self._last = None  # two layers at a time would be one too many
            self._last = layer, self._make(layer)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


@dataclass
class Aggregator:
    """One round: take uploads in the order of asking, then combine them, one layer at a time.

    What is taken is kept until `done` as it was given. Where that is in files (`wire.Spooled`), memory does not grow with the
    number of clients, except by what a method makes of one layer of all of them.

    Args:
        phase: The method, or its measuring phase.
        server: What is held in common; read, not changed.
        measure_error: Measure the aggregation error, for which every upload is read once more.
    """

    phase: Method
    server: Server
    measure_error: bool = True
    folded: list[int] = field(default_factory=list[int])

    def __post_init__(self) -> None:
        self._uploads: list[tuple[int, float, Mapping[str, Factors]]] = []
        self._plain = Mean()
        self._plain_shapes = {name: tuple(x.shape) for name, x in self.server.plain.items()} or None
        self._ranks: dict[int, dict[str, int]] = {}
        self._given: tuple[Callable[[str], Factors], Mapping[str, Tensor]] | None = None
        # ΔW is linear in a factor that is sent alone, so its mean gives Σ p_k ΔW_k; with two, every product is needed.
        self._alone = len(self.phase.sends) == 1
        # A measurement has no update whose aggregate could be wrong; neither have clients that keep a part of theirs. And what
        # a message tells of an update is not all of it.
        self._measured = self.measure_error and self.phase.trains and not self.phase.keeps and not self.phase.speaks
        self._said: dict[str, dict[str, tuple[int, ...]]] = {}

    def add(self, client: int, weight: float, factors: Mapping[str, Factors], plain: Mapping[str, Tensor]) -> None:
        """Checks one client's upload whole, then takes it; the arguments are those of `check`.

        Raises:
            Refused: The upload does not fit; nothing of it was taken.
        """
        self.fold(client, weight, factors, plain, self.check(client, weight, factors, plain))

    def fold(
        self,
        client: int,
        weight: float,
        factors: Mapping[str, Factors],
        plain: Mapping[str, Tensor],
        ranks: Mapping[str, int],
    ) -> None:
        """Takes an upload that was checked; `factors` are read when the round is done, `ranks` is what `check` said."""
        self._uploads.append((client, weight, factors))
        if ranks:
            self._ranks[client] = dict(ranks)
        if plain:
            self._plain.add(dict(plain), weight)
        self._plain_shapes = {name: tuple(x.shape) for name, x in plain.items()}
        self.folded.append(client)

    def give(self, mean: Callable[[str], Factors], plain: Mapping[str, Tensor]) -> None:
        """Has the method combine `mean` of each layer, and `plain`, in place of the mean of what was taken.

        The aggregation error is measured against what was taken all the same.
        """
        self._given = mean, plain

    def most_bytes(self) -> int:
        """Returns how long an honest upload can be: every factor at its largest, and its header."""
        numbers = sum(math.prod(shape) for shape in (self.server.plain_shapes or {}).values())
        for layer, shape in self.server.layers.items():
            sizes = {"A": shape.rank * shape.d_in, "B": shape.rank * shape.d_out, "R": shape.rank**2}
            sizes["G"] = shape.d_in * shape.d_out
            sizes |= {name: math.prod(said) for name, said in self._message_shapes(layer).items()}
            numbers += sum(sizes.get(name, 0) for name in self.phase.sends)
        return 4 * numbers + self.most_header()

    def most_header(self) -> int:
        """Returns how long its header can be: a mebibyte, and 400 bytes for the names and shapes of each layer."""
        return 2**20 + 400 * len(self.server.layers)

    def check(self, client: int, weight: float, factors: Mapping[str, Factors], plain: Mapping[str, Tensor]) -> dict[str, int]:
        """Checks that one client's upload fits: layers, names, shapes, ranks, numbers.

        Args:
            client: Its number.
            weight: n_k, its number of rows.
            factors: Per layer what the phase `sends`.
            plain: Parameters that are not factors.

        Returns:
            Per layer the rank of the upload, where it has one.

        Raises:
            Refused: It does not fit.
        """
        if not 0 < weight <= MOST_ROWS:
            raise Refused(f"client {client} says it has {weight} rows, allowed: more than 0, at most {MOST_ROWS:.0e}")
        sends = set(self.phase.sends)
        wanted = set(self.server.layers) if sends else set[str]()
        if set(factors) != wanted:
            missing, extra = sorted(wanted - set(factors)), sorted(set(factors) - wanted)
            raise Refused(f"client {client}: layers missing {missing[:3]}, unknown {extra[:3]}")
        for layer, own in factors.items():
            if set(own) != sends:
                raise Refused(f"layer {layer!r}: client {client} sent {sorted(own)}, wanted {sorted(sends)}")
            self._check_shapes(client, layer, own)
            for name, x in own.items():
                if not _sound(x):
                    raise Refused(f"layer {layer!r}: client {client} sent {name} with {_UNSOUND}")
        known = self.server.plain_shapes if self.server.plain_shapes is not None else self._plain_shapes
        sent = {name: tuple(x.shape) for name, x in plain.items()}
        for name, x in plain.items():
            if not _sound(x):
                raise Refused(f"parameter {name!r}: client {client} sent {_UNSOUND}")
        if (known is not None and sent != known) if self._sends_plain() else sent:
            raise Refused(f"client {client}: parameters that are not factors differ from the others' in name or shape")
        paired = {layer: own for layer, own in factors.items() if "A" in own or "B" in own}
        return {layer: own["A"].shape[0] if "A" in own else own["B"].shape[1] for layer, own in paired.items()}

    def check_trained(self, client: int, factors: Mapping[str, Factors]) -> None:
        """Checks that a client has trained, where the phase trains; `factors` passed `check`.

        Raises:
            Refused: It sent what it was sent, up to the last bit that its own scale may cost; or a pair whose product is zero.
        """
        if (
            self.phase.speaks
            and self.phase.trains
            and all(self._says_held(client, layer, own) for layer, own in factors.items())
        ):
            raise Refused(f"client {client} sent what follows from the factors that it was sent: it has not trained")
        trained = [name for name in self.phase.sends if name in self.phase.trains]
        # A does not move in the first step of a new adapter, since its gradient is Bᵀ G and B = 0.
        still = trained == ["A"] and self.server.has.get(client, -1) < 0
        if (
            trained
            and not still
            and all(self._is_held(layer, name, own[name]) for layer, own in factors.items() for name in trained)
        ):
            raise Refused(f"client {client} sent back the factors that it was sent: it has not trained (learning rate 0?)")
        if (
            {"A", "B"} <= set(self.phase.trains)
            and "B" in trained
            and not any(bool(own["B"].any()) for own in factors.values())
        ):
            raise Refused(f"client {client} sent B = 0 in every layer, so its update is zero: it has not trained")

    def _says_held(self, client: int, layer: str, own: Factors) -> bool:
        """Whether a client's message is that of the factors it was sent, up to the rounding of other machines' products."""
        held = self.server.held[layer]
        said = self.phase.message(Download(held).cut(self.server.rank_of(client, layer)).factors, held)
        was = {name: wire.rounded(x, self.server.dtype, name) for name, x in said.items()}
        return all(float(algebra.frobenius(own[name] - x)) <= 2.0**-20 * float(algebra.frobenius(x)) for name, x in was.items())

    def _is_held(self, layer: str, name: str, x: Tensor) -> bool:
        # A fresh adapter was drawn by both sides and never rounded.
        was = wire.rounded(self.server.held[layer][name], self.server.dtype, name)
        if name in ("A", "B"):
            # A client of another rank was sent the first directions, or filled up with a B of zeros.
            axis = 0 if name == "A" else 1
            common = min(x.shape[axis], was.shape[axis])
            if name == "B" and bool(x[:, common:].any()):
                return False
            x, was = x.narrow(axis, 0, common), was.narrow(axis, 0, common)
        return bool(((x - was).abs() <= 2.0**-22 * was.abs()).all())

    def norm(self, client: int, factors: Mapping[str, Factors]) -> float:
        """Returns ‖ΔW‖_F of a client's adapter over all layers, from Gram matrices of its factors; they passed `check`.

        Where the server does not know ΔW, because a factor stays at the client or something else was sent, it is the norm of
        what was sent.
        """
        return math.sqrt(sum(self._square(client, layer, own) for layer, own in factors.items()))

    def _square(self, client: int, layer: str, own: Factors) -> float:
        if "G" in own or self.phase.keeps or self.phase.speaks:
            return sum(float(x.double().square().sum()) for x in own.values())
        known = self.server.held[layer]
        if not {"A", "B"} <= own.keys():
            known = Download(known).cut(self.server.rank_of(client, layer)).factors
        B, A = (x.double() for x in method.product({**known, **own}))
        return max(0.0, float(algebra.inner(B, A, B, A)))

    def _sends_plain(self) -> bool:
        phase = self.phase
        return not phase.keeps if phase.trains else bool(phase.sends) and phase.measures == "factors"

    def _check_shapes(self, client: int, layer: str, own: Factors) -> None:
        shape = self.server.layers[layer]
        where = f"layer {layer!r}: client {client}"
        known = rank = self.server.rank_of(client, layer)
        if "A" in own and own["A"].ndim == 2:
            rank = own["A"].shape[0]
        elif "B" in own and own["B"].ndim == 2:
            rank = own["B"].shape[1]
        if rank > known or (rank < known and not self.phase.mixed_ranks) or rank < 1:
            # Whoever takes mixed ranks takes a client that gave up some of its directions, too.
            allowed = f"1 to {known}" if self.phase.mixed_ranks else str(known)
            raise Refused(f"{where} sent factors of rank {rank}, allowed: {allowed}")
        expected = {
            "A": (rank, shape.d_in),
            "B": (shape.d_out, rank),
            "R": tuple(self.server.held[layer]["R"].shape) if "R" in self.server.held[layer] else (rank, rank),
            "G": (shape.d_out, shape.d_in),
            **self._message_shapes(layer),
        }
        for name, x in own.items():
            if tuple(x.shape) != expected.get(name):
                raise Refused(f"{where} sent {name} of shape {tuple(x.shape)}, wanted {expected.get(name)}")

    def _message_shapes(self, layer: str) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of what clients say of a layer; nothing where they send factors."""
        if self.phase.speaks and layer not in self._said:
            held = self.server.held[layer]
            self._said[layer] = {name: tuple(x.shape) for name, x in self.phase.message(held, held).items()}
        return self._said.get(layer, {})

    def done(self) -> Aggregated:
        """Combines what was folded.

        Raises:
            ServerError: Nobody was folded, or the method refuses what it got.
        """
        if not self.folded:
            raise ServerError("no client is left in this round")
        held = self.server.held
        mean, mean_plain = self._given or (lambda layer: self._collected(layer, self.phase.collect()), self._plain.done())
        got = _Lazily(list(self.server.layers), mean)
        try:
            combined = self.phase.combine_layers(got, held)
        except MethodError as refusal:
            raise ServerError(str(refusal)) from refusal
        downloads = {layer: self._finish(layer, download) for layer, download in combined.items()}
        error: dict[str, float] = {}
        error_of_sum: dict[str, float] = {}
        rank: dict[str, int] = {}
        for layer, download in downloads.items():
            sent = update(layer, download, self.server.held[layer])
            rank[layer] = sent[0].shape[-1]
            if self._measured:
                common = {name: x.double() for name, x in self.server.held[layer].items()}
                ideal = method.product({**common, **self._collected(layer, Mean() if self._alone else Stack(), self._alone)})
                error[layer] = algebra.relative_error(sent, ideal)
                error_of_sum[layer] = algebra.error_to_sum(error[layer], sent, ideal, len(self.folded))
        plain = {name: wire.rounded(x, self.server.dtype, f"plain|{name}") for name, x in mean_plain.items()}
        return Aggregated(downloads, plain, error or None, error_of_sum or None, rank, self._ranks)

    def _collected(self, layer: str, collector: Collector, wide: bool = False) -> Any:
        """Returns what a collector makes of one layer of all uploads, `wide` in float64."""
        if not self.phase.sends:
            return {}
        for client, weight, factors in self._uploads:
            own = factors[layer]
            try:
                collector.add({name: x.double() for name, x in own.items()} if wide else own, weight)
            except MethodError as error:
                # A collector of somebody's own that is stricter than our checks.
                raise ServerError(f"layer {layer!r}: client {client} {error}") from error
        return collector.done()

    def _finish(self, layer: str, download: Download) -> Download:
        """Mixes the run's seed and the round into a reset, and rounds tensors as the wire will."""
        dtype, reset, merge = self.server.dtype, download.reset, download.merge
        return replace(
            download,
            factors={name: wire.rounded(x, dtype, name) for name, x in download.factors.items()},
            merge=merge and (wire.rounded(merge[0], dtype, "merge.B"), wire.rounded(merge[1], dtype, "merge.A")),
            reset=None if reset is None else algebra.seed_of(self.server.seed, self.server.round, reset),
        )
