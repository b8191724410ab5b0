"""Any umbel method as a Flower strategy for somebody's own ServerApp, whose clients know no more than PEFT.

A client answers with one ArrayRecord, its adapter as PEFT's `get_peft_model_state_dict` gives it, and one MetricRecord with
its number of rows. It gets the common adapter back in the same form, at its own rank. So those methods can be used whose
downloads are factors; what a method would merge into the frozen weight, such a client could not take.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from umbel import algebra, peft_config, peft_folder
from umbel.method import Download, Factors, Method, MethodError, load, names, taking_mixed_ranks
from umbel.peft_config import PREFIX, Contents
from umbel.safetensors_file import FolderError, short
from umbel.server import Aggregator, LayerShape, Refused, Server

ALPHA = "lora_alpha"
"""Where, in a ConfigRecord of its reply, a client of a rank of its own says its scale."""

FACTORS = "train-factors"
"""Where, in the configuration of a round, clients find which factors are to be trained."""

ROUNDED = 2**-7
"""Relative difference that a factor which was not trained may have: a client's model may be in bfloat16."""

log = logging.getLogger("flwr").log


def as_strategy(method: str | Mapping[str, Any] | Method, lora: Any, **options: Any) -> "AdapterStrategy":
    """Returns a strategy that aggregates PEFT adapters by one of umbel's methods.

    Args:
        method: A name, "flora_na"; a table with options, {"name": "florist", "energy": 0.99}; or a method.
        lora: The common adapter's `peft.LoraConfig`, or what its adapter_config.json holds, {"r": 8, "lora_alpha": 16}.
            Scales come from it; for methods that take mixed ranks its rank is the largest.
        options: Of Flower's `FedAvg`: fraction_train, min_train_nodes, weighted_by_key …

    Raises:
        MethodError: No such method or option, or one that needs more of clients than an adapter's state; says what to use.
        FolderError: `lora` is not plain LoRA.
    """
    if isinstance(method, str):
        method = {"name": method}
    if isinstance(method, Mapping):
        label = str(method.get("name"))
        method = load(label, **{key: value for key, value in method.items() if key != "name"})
    else:
        label = type(method).__name__
    refusal = _refusal(method)
    if refusal is not None:
        raise MethodError(
            f"as_strategy: {label} {refusal}, and a client that only exchanges its adapter cannot do that; here work "
            f"{', '.join(usable())}; all methods work with `umbel run --engine flower`"
        )
    values = peft_config.parse_object(peft_config.as_bytes(lora), "lora")
    config = {"peft_type": "LORA", **values}
    peft_config.check(config)
    return AdapterStrategy(label, method, config, **options)


def usable() -> list[str]:
    """Returns the names of umbel's methods that `as_strategy` takes with their default options."""
    return [name for name in names() if _refusal(load(name)) is None]


def _refusal(method: Method) -> str | None:
    """Says what a method needs of its clients beyond training some of A and B and sending them; None where that is all."""
    phases = list(method.plan(2))
    for phase in phases:
        if phase.speaks:
            return "asks every client more than once in a round, for messages of its own"
        if phase.keeps:
            return f"leaves {', '.join(phase.keeps)} with each client from round to round"
        strange = sorted({*phase.trains, *phase.sends} - {"A", "B"})
        if strange:
            return f"trains or sends {', '.join(strange)}, which PEFT's adapter does not have"
    if len(phases) != 2 or any(phase.trains != phase.sends or not phase.trains for phase in phases):
        return "has a phase in which clients do something else than train and send"
    for phase in phases:
        # Tried, not looked up, so that it holds for a method of anybody's, with its options.
        pairs = [_pair(8, seed) for seed in (1, 2)]
        collector = phase.collect()
        for weight, pair in enumerate(pairs, 1):
            collector.add({name: pair[name] for name in phase.sends}, weight)
        (download,) = phase.combine_layers({"": collector.done()}, {"": _pair(8, 3)}).values()
        if download.merge is not None or download.reset is not None:
            return "changes the frozen weights or starts the adapter afresh"
        halved = {name: x / 2 for name, x in pairs[0].items()}
        if phase.penalty(halved) is not None or phase.trained(pairs[0], halved) is not halved:
            return "also works at the client, on the loss or on what training made"
    return None


def _pair(rank: int, seed: int) -> Factors:
    return {"A": algebra.fresh_A(rank, 12, seed), "B": algebra.fresh_A(rank, 16, -seed).mT.contiguous()}


@dataclass(frozen=True)
class _Adapter:
    """An adapter as it travelled: its tensors by PEFT's names, and what they are."""

    state: Mapping[str, Tensor]
    contents: Contents

    def factors(self) -> dict[str, Factors]:
        """Returns every layer's factors in units of ΔW, at least in float32."""
        result: dict[str, Factors] = {}
        for name, layer in self.contents.layers.items():
            B, A = (peft_folder.wide(self.state[key]) for key in peft_config.keys(name, layer.kind))
            result[name] = {"A": A, "B": B * layer.scale}
        return result

    def plain(self) -> dict[str, Tensor]:
        return {name: peft_folder.wide(self.state[PREFIX + name]) for name in self.contents.plain}

    def like(self, factors: Mapping[str, Factors], plain: Mapping[str, Tensor], contents: Contents) -> ArrayRecord:
        """Returns other values in this adapter's order and dtypes, with the scales and ranks of `contents`."""
        found: dict[str, Tensor] = {PREFIX + name: x for name, x in plain.items()}
        for name, own in factors.items():
            layer = contents.layers[name]
            cut = Download(own).cut(layer.rank).factors
            found |= zip(peft_config.keys(name, layer.kind), (cut["B"] / layer.scale, cut["A"]))
        return ArrayRecord({key: Array(found[key].to(x.dtype).contiguous().numpy()) for key, x in self.state.items()})


class AdapterStrategy(FedAvg):
    """Flower's FedAvg with the aggregation of an umbel method; made by `as_strategy`.

    Sampling, configuration and evaluation are FedAvg's. A reply that cannot be used is left out with the reason in the log, and
    the round goes on with the others; where none is left, the common adapter stays as it is. To what clients measured are added

        aggregation-error       ‖ΔW sent − Σ p_k ΔW_k‖_F / ‖Σ p_k ΔW_k‖_F, mean over layers
        aggregation-error-max   of the worst layer
        aggregation-rank        largest rank that the method made, at most the common one
        replies-refused         replies that were left out
    """

    def __init__(self, label: str, method: Method, config: Mapping[str, Any], **options: Any) -> None:
        super().__init__(**options)
        self.method, self._label, self._config = method, label, dict(config)
        self._sent: _Adapter | None = None
        # What nodes have that differ from the common adapter in rank or scale.
        self._own: dict[int, Contents] = {}

    def summary(self) -> None:
        """Logs the method, then what FedAvg logs."""
        log(logging.INFO, "\t├──> Aggregation: umbel's %s", self._label)
        super().summary()

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Asks nodes as FedAvg does, and tells which factors they are to train.

        Raises:
            FolderError: `arrays` is not an adapter of the configuration that `as_strategy` was given.
        """
        self._sent = self._read(arrays)
        config[FACTORS] = [f"lora_{name}" for name in self._phase(server_round).trains]
        return self._for_each(super().configure_train(server_round, arrays, config, grid), self._sent)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Asks nodes as FedAvg does."""
        return self._for_each(super().configure_evaluate(server_round, arrays, config, grid), self._read(arrays))

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the common adapter and what was measured; (None, None) where no reply can be used."""
        if self._sent is None:
            raise RuntimeError("aggregate_train came before configure_train; the strategy has to know what it sent")
        answered, _ = self._check_and_log_replies(replies, is_train=True, validate=False)
        answered.sort(key=lambda message: message.metadata.src_node_id)
        round_ = _Round(self._phase(server_round), self._sent, server_round)
        usual = Counter(form for form in (_form(message.content) for message in answered) if form).most_common(1)
        folded: list[RecordDict] = []
        for message in answered:
            node, content = message.metadata.src_node_id, message.content
            try:
                weight = self._weight(content, usual[0][0] if usual else None)
                adapter = self._reply(content)
                round_.add(node, weight, adapter)
            except (Refused, FolderError) as refusal:
                log(logging.WARNING, "aggregate_train: refused the reply of node %d: %s", node, refusal)
                continue
            self._note(node, adapter.contents)
            folded.append(content)
        if not folded:
            return None, None
        arrays, measured = round_.done()
        metrics = self.train_metrics_aggr_fn(folded, self.weighted_by_key)
        for name, value in {**measured, "replies-refused": len(answered) - len(folded)}.items():
            metrics[name] = value
        return arrays, metrics

    def _phase(self, server_round: int) -> Method:
        return list(self.method.plan(server_round))[-1]

    def _read(self, arrays: ArrayRecord) -> _Adapter:
        """Returns the common adapter from what the ServerApp holds."""
        state: dict[str, Tensor] = {}
        for key, array in arrays.items():
            try:
                state[key] = _tensor(array, None)
            except Refused as refusal:
                raise FolderError(f"the common adapter: {short(key)} {refusal}") from None
        others = [key for key in state if not any(part.startswith("lora_") for part in key.split("."))]
        modules = {key.removeprefix(PREFIX).rpartition(".")[0] or key for key in others}
        # Heads and biases are what they are, whatever the configuration says of them; PEFT adds names to it on the way.
        saved = sorted({*(self._config.get("modules_to_save") or ()), *modules})
        return _Adapter(state, _judged({**self._config, "modules_to_save": saved}, state))

    def _for_each(self, messages: Iterable[Message], adapter: _Adapter) -> list[Message]:
        """Gives nodes of a rank or scale of their own the common adapter as theirs."""
        result = list(messages)
        for message in result:
            own = self._own.get(message.metadata.dst_node_id)
            if own is not None:
                arrays = adapter.like(adapter.factors(), adapter.plain(), own)
                message.content = RecordDict({**message.content, self.arrayrecord_key: arrays})
        return result

    def _note(self, node: int, contents: Contents) -> None:
        assert self._sent is not None
        if contents.layers == self._sent.contents.layers:
            self._own.pop(node, None)
        else:
            self._own[node] = contents

    def _weight(self, content: RecordDict, usual: Any) -> float:
        form = _form(content)
        if form is None:
            raise Refused(f"{len(content.metric_records)} MetricRecords, wanted one")
        if form != usual:
            raise Refused(f"metrics: {_some([name for name, _ in form])}; most have {_some([name for name, _ in usual])}")
        (metrics,) = content.metric_records.values()
        weight = metrics.get(self.weighted_by_key)
        if not isinstance(weight, (int, float)) or isinstance(weight, bool):
            raise Refused(f"no number under {self.weighted_by_key!r} in its MetricRecord")
        return weight

    def _reply(self, content: RecordDict) -> _Adapter:
        """Returns a client's adapter, with everything checked but its values."""
        assert self._sent is not None
        sent = self._sent
        if len(content.array_records) != 1:
            raise Refused(f"{len(content.array_records)} ArrayRecords, wanted one: its adapter")
        (arrays,) = content.array_records.values()
        missing, extra = [k for k in sent.state if k not in arrays], [k for k in arrays if k not in sent.state]
        if missing or extra:
            raise Refused(f"tensors missing: {_some(missing)}, unknown: {_some(extra)}")
        state: dict[str, Tensor] = {}
        for key, common in sent.state.items():
            try:
                state[key] = _tensor(arrays[key], tuple(common.shape))
            except Refused as refusal:
                raise Refused(f"{short(key)} {refusal}") from None
        ranks = {name: state[peft_config.keys(name, layer.kind)[1]].shape[0] for name, layer in sent.contents.layers.items()}
        config = {**self._config, "modules_to_save": sent.contents.config["modules_to_save"]}
        alphas = [own[ALPHA] for own in content.config_records.values() if ALPHA in own]
        if ranks != {name: layer.rank for name, layer in sent.contents.layers.items()}:
            self._check_own_ranks(ranks, alphas)
            config["rank_pattern"] = {peft_config.pattern_for(name): rank for name, rank in ranks.items()}
        if alphas:
            config["lora_alpha"] = alphas[0]
        return _Adapter(state, _judged(config, state))

    def _check_own_ranks(self, ranks: Mapping[str, int], alphas: list[Any]) -> None:
        assert self._sent is not None
        name, own = next((name, r) for name, r in ranks.items() if r != self._sent.contents.layers[name].rank)
        where = f"layer {short(name)} has rank {own}, sent was {self._sent.contents.layers[name].rank}"
        if not self.method.mixed_ranks:
            raise Refused(f"{where}; {self._label} needs one rank, {taking_mixed_ranks()}")
        if not alphas:
            raise Refused(
                f"{where}, so its scale is its own; add to the reply: ConfigRecord({{{ALPHA!r}: what its LoraConfig has}})"
            )


class _Round:
    """One round's folding, in units of ΔW."""

    def __init__(self, phase: Method, sent: _Adapter, number: int) -> None:
        self._phase, self._sent = phase, sent
        shapes = {name: LayerShape(own.d_out, own.d_in, own.rank) for name, own in sent.contents.layers.items()}
        self._server = Server(shapes, seed=0, plain_shapes=sent.contents.plain)
        self._server.held = sent.factors()
        self._fitted = _AtOneRank(phase, number)
        self._aggregator = Aggregator(cast(Method, self._fitted), self._server)

    def add(self, node: int, weight: float, adapter: _Adapter) -> None:
        """Folds in one client's adapter.

        Raises:
            Refused: It does not fit, or holds what no training makes.
        """
        factors = adapter.factors()
        for name, own in factors.items():
            for factor in sorted({"A", "B"} - set(self._phase.sends)):
                common = self._server.held[name][factor]
                if own[factor].shape != common.shape or not torch.allclose(own[factor], common, rtol=ROUNDED, atol=0):
                    raise Refused(
                        f"layer {short(name)}: lora_{factor} is not what was sent, and this round it is frozen; train only "
                        f"what the round's configuration says under {FACTORS!r}"
                    )
        uploads = {name: {factor: own[factor] for factor in self._phase.sends} for name, own in factors.items()}
        self._aggregator.add(node, weight, uploads, adapter.plain())

    def done(self) -> tuple[ArrayRecord, dict[str, float | int]]:
        """Returns the common adapter after the round, and what was measured."""
        aggregated = self._aggregator.done()
        factors = {name: own.factors for name, own in aggregated.downloads.items()}
        plain = {**self._sent.plain(), **aggregated.plain}
        measured: dict[str, float | int] = {"aggregation-rank": self._fitted.rank}
        errors = [x for x in (aggregated.error or {}).values() if math.isfinite(x)]
        if errors:  # where the mean of all updates is zero, no error is relative to it
            measured |= {"aggregation-error": sum(errors) / len(errors), "aggregation-error-max": max(errors)}
        return self._sent.like(factors, plain, self._sent.contents), measured


class _AtOneRank:
    """A method whose downloads have the rank that is held, so that the error that is measured is that of what clients get."""

    def __init__(self, method: Method, number: int) -> None:
        self._method, self._number = method, number
        self.rank = 0
        """Largest rank of what the method made, as far as it is sent."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def combine_layers(self, got: Mapping[str, Any], held: Mapping[str, Factors]) -> dict[str, Download]:
        return {name: self._fitted(name, own, held[name]) for name, own in self._method.combine_layers(got, held).items()}

    def _fitted(self, name: str, download: Download, held: Factors) -> Download:
        rank = held["A"].shape[0]
        factors = {**held, **download.cut(rank).factors}
        B, A = factors["B"], factors["A"]
        missing = rank - A.shape[0]
        self.rank = max(self.rank, A.shape[0])
        if missing:
            # The product stays, and the further directions can be trained.
            fresh = algebra.fresh_A(missing, A.shape[1], algebra.seed_of("pad", name, self._number)).to(A)
            B, A = torch.nn.functional.pad(B, (0, missing)), torch.cat([A, fresh])
        return Download({"A": A, "B": B})


def _judged(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Contents:
    return peft_config.judge(peft_config.as_bytes(config), tuple((key, tuple(x.shape)) for key, x in state.items()))


def _form(content: RecordDict) -> tuple[tuple[str, int], ...] | None:
    """Returns names and lengths of a reply's metrics, which must agree for a mean; None where there is not one record."""
    if len(content.metric_records) != 1:
        return None
    (metrics,) = content.metric_records.values()
    return tuple(sorted((name, len(value) if isinstance(value, list) else 0) for name, value in metrics.items()))


def _tensor(array: Array, largest: tuple[int, ...] | None) -> Tensor:
    """Returns what an array holds, after a look at its header: no memory is taken for more than is allowed.

    Raises:
        Refused: It is no array of floating-point numbers in numpy's format, or larger than `largest`.
    """
    if array.stype != "numpy.ndarray":
        raise Refused(f"is serialized as {array.stype[:40]!r}, allowed: 'numpy.ndarray'")
    file = BytesIO(array.data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version of the format")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:
        # numpy reads the header as a Python literal, which fails in many ways.
        raise Refused(f"is not in numpy's format ({type(error).__name__})") from None
    if dtype.str not in ("<f2", "<f4", "<f8"):
        raise Refused(f"holds {dtype.str}, allowed: float16, float32, float64")
    if largest is not None and (len(shape) != len(largest) or any(n > most for n, most in zip(shape, largest))):
        raise Refused(f"has shape {shape}, wanted {largest}")
    if not shape or not all(shape) or file.tell() + math.prod(shape) * dtype.itemsize != len(array.data):
        raise Refused(f"has shape {shape} and {len(array.data)} bytes, which do not fit")
    return torch.from_numpy(np.ascontiguousarray(array.numpy()))


def _some(keys: list[str]) -> str:
    return ", ".join(short(key) for key in keys[:2]) + (f" and {len(keys) - 2} more" if len(keys) > 2 else "") or "none"
