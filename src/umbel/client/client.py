"""A client: answers the server's requests with its own rows, over a base model that it may share with others."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umbel import algebra, wire
from umbel import method as methods
from umbel.client import evaluate, fit, masked, preflight, private
from umbel.client.account import Account
from umbel.client.adapter import Adapter
from umbel.client.data import Dataset, Example, encode, load_public
from umbel.client.model import Base
from umbel.client.prompts import pad_id
from umbel.config import Config, ConfigError, Lora
from umbel.ledger import Ledger
from umbel.method import HELD, Download, Factors, Method
from umbel.record import write_file, write_lines
from umbel.server import OBSERVER, fresh_factors

Answer = dict[str, Any]

OPTIMIZER = "optimizer|"
"""Begins the names of an optimizer's state in a client's file: optimizer|<factors>|<tensor>."""

LOST = "lost|"
"""Begins the names of what rounding an upload lost, in a client's file: lost|<the tensor's name in the upload>."""

COMMON = "common|"
"""Begins the names of what all clients held when the round began, where messages need it: common|<layer>|<factor>."""


@dataclass
class Resident:
    """What the clients of one process share: base model, adapter, rows and their tokens.

    Args:
        config: The run's.
        base: The frozen model.
        adapter: On that model; its content is whichever client's turn it is.
        dataset: All rows and who owns them.
        train: Tokens of the training rows, in their order.
        test: Tokens of the test rows.
        on_step: Called with (client, step, steps).
        ranks: Per client the rank of its adapter, where clients differ.
    """

    config: Config
    base: Base
    adapter: Adapter
    dataset: Dataset
    train: list[Example]
    test: list[Example]
    on_step: Callable[[int, int, int], None] = lambda client, step, steps: None
    ranks: Mapping[int, int] = field(default_factory=dict[int, int])

    def __post_init__(self) -> None:
        choice = self.config.method
        self.method = methods.load(choice.name, **choice.options)

    @cached_property
    def speaks(self) -> bool:
        """Whether the method's clients send messages of their own making."""
        return any(phase.speaks for phase in self.method.plan(self.config.rounds))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Versions and hashes of this process, read once: hashing a large model takes as long as reading it."""
        return preflight.identity(self.config, self.base.tokenizer)

    @cached_property
    def public(self) -> list[Example]:
        """Tokens of the rows of `data.public`; none where there are none."""
        rows = load_public(self.config, self.dataset.labels) if self.config.data.public else []
        return encode(rows, self.base.tokenizer, self.config, self.dataset.labels)

    def lora(self, client: int) -> Lora | None:
        """Returns a client's own rank and alpha; None where all have the same."""
        return self.config.lora.of(client, self.ranks[client]) if client in self.ranks else None

    def rows_of(self, client: int) -> list[Example]:
        """Returns a client's training rows."""
        return [self.train[i] for i, own in enumerate(self.dataset.owner_train) if own == client]

    def score(self, owner: int, generate: bool, keep: Path | None = None) -> dict[str, float] | None:
        """Scores the model as it stands on a client's test rows, or on all for the observer; None without rows.

        Args:
            owner: The client, or OBSERVER.
            generate: Whether replies are generated, where the task has something to find in them.
            keep: A file for the scores of every row, one JSON object per line: "row", its place among the test rows, its
                "client", and what `umbel.client.evaluate.score` says of it. None keeps nothing.
        """
        chosen = [i for i, own in enumerate(self.dataset.owner_test) if owner in (own, OBSERVER)]
        if not chosen:
            return None
        task = self.config.task if generate else replace(self.config.task, exact_match_rows=0)
        scored = evaluate.score(
            self.adapter.model,
            self.base.tokenizer,
            [self.dataset.test[i] for i in chosen],
            self.dataset.labels,
            replace(self.config, task=task),
            examples=[self.test[i] for i in chosen],
        )
        if keep is not None:
            owners = self.dataset.owner_test
            which = zip(chosen, scored, strict=True)
            write_lines(keep, [{"row": i, "client": owners[i], **evaluate.as_json(own)} for i, own in which])
        scores = evaluate.summary(scored, self.config)
        if owner == OBSERVER and self.dataset.unseen:
            away = [own for i, own in zip(chosen, scored, strict=True) if self.dataset.owner_test[i] in self.dataset.unseen]
            scores |= {f"unseen_{name}": value for name, value in evaluate.summary(away, self.config).items()}
        # A model that diverged has a loss that JSON cannot say; its accuracy still counts.
        return {name: value for name, value in scores.items() if math.isfinite(value)}


def tokens(config: Config, base: Base, dataset: Dataset) -> tuple[list[Example], list[Example]]:
    """Returns the tokens of all training and all test rows."""
    return (
        encode(dataset.train, base.tokenizer, config, dataset.labels),
        encode(dataset.test, base.tokenizer, config, dataset.labels),
    )


def ranks(config: Config, dataset: Dataset) -> dict[int, int]:
    """Returns each client's rank where clients may differ, else nothing.

    Raises:
        ConfigError: A list of another length than there are clients, or a column that says no rank.
    """
    lora = config.lora
    if not lora.mixed:
        return {}
    if not lora.rank_by:
        for key, values in (("r", lora.r), ("lora_alpha", lora.lora_alpha)):
            if isinstance(values, list) and len(values) != dataset.clients:
                raise ConfigError(f"lora.{key}: got {len(values)} values, for {dataset.clients} clients")
        return dict(enumerate(lora.r if isinstance(lora.r, list) else [lora.r] * dataset.clients))
    # Of a site's rows the others' are not there.
    said: dict[int, set[str]] = {k: set() for k in sorted({*dataset.owner_train} - {-2})}
    for row, owner in zip(dataset.train, dataset.owner_train):
        if owner in said:
            said[owner].add(str(row.get(lora.rank_by, "nothing")))
    for client, values in said.items():
        text = next(iter(values), "nothing")
        if len(values) > 1 or not text.isdecimal() or not 1 <= int(text) <= lora.rank:
            got = ", ".join(sorted(values)[:3]) or "no rows"
            raise ConfigError(
                f"lora.rank_by = {lora.rank_by!r}: the rows of client {client} say {got}; allowed: one number from 1 to "
                f"lora.r = {lora.rank} in all rows of a client"
            )
    return {client: int(next(iter(values))) for client, values in said.items()}


@dataclass
class Client:
    """One client, or the observer. Between requests everything it knows is in files under `folder`.

    Args:
        number: Ours, from 0; OBSERVER owns no rows and scores all test rows.
        resident: Shared with the other clients of this process.
        folder: Of this client's state.
        run: Names the run and its method for ever, in the ledger.
        ledger: Folder of the ledger; None takes what the configuration says.
        total_epsilon: ε that all runs on these rows may spend; 0 takes what the configuration says.
    """

    number: int
    resident: Resident
    folder: Path
    run: str = ""
    ledger: Path | None = None
    total_epsilon: float = 0.0
    _seconds: dict[str, float] = field(default_factory=dict[str, float])
    _payload: bytes = b""

    def answer(self, payload: bytes) -> bytes:
        """Answers one request.

        Args:
            payload: A message of kind "open", "train", "update", "measure", "gather" or "observe", or of `masked.KINDS`.

        Returns:
            The reply, in the run's wire dtype.
        """
        self._seconds, self._payload = {}, payload
        with self._timed("wire"):
            request = wire.decode(payload)
        kind = request.header["kind"]
        asked = request.header.get("client")
        if type(asked) is not int or asked != self.number:
            raise wire.WireError(f"this is client {self.number}, the request is for client {asked!r:.80}")
        echo = {key: request.header.get(key) for key in wire.ECHO}
        if "sealed" in request.header:
            # Fresh in every exchange; what is trained, and paid for, does not depend on it.
            whole = {key: x for key, x in request.header.items() if key != "sealed"}
            self._payload = wire.encode(wire.Message(whole, request.tensors))
        if kind == "open":
            return wire.encode(wire.Message({**echo, **self._open(bool(request.header.get("preflight")))}))
        if kind in masked.KINDS:
            with self._timed("wire"):
                said = masked.Exchange(self.number, self.folder).answer(request.header)
            return wire.encode(wire.Message({**said, "seconds": self._told_seconds(), **echo}))
        for key in ("has", "keep"):
            # They name files.
            if type(request.header.get(key)) is not int or not -1 <= request.header[key] < 2**31:
                raise wire.WireError(f"{key!r} is {request.header.get(key)!r:.80}, allowed: a number of rounds, or −1")
        header: Answer
        beside = self._take(request)
        if beside is None:
            kept = self.resident.config.training.optimizer_state == "keep"
            return wire.encode(wire.Message({**echo, "lost": "state and optimizer" if kept else "state"}))
        if kind != "observe" and self._masks:
            masked.Exchange(self.number, self.folder).check(request.header)
        if kind == "observe":
            header, tensors = self._observe(request.header)
        elif kind == "measure":
            header, tensors = self._measure(request.header)
        elif kind == "gather":
            header, tensors = self._gather(request.header)
        elif kind == "update":
            header, tensors = self._say_more(request.header, beside)
        else:
            header, tensors, beside = self._train(request.header, beside)
            if not self._masks:
                with self._timed("wire"):
                    tensors, beside = self._make_good(tensors, beside)
        if kind != "observe" and self._masks:
            with self._timed("wire"):
                exchange = masked.Exchange(self.number, self.folder)
                tensors = exchange.mask(request.header, header["rows"], header.get("loss"), tensors)
            header = {}  # rows, steps, loss and scores are this client's own, and the first and the third are in the sum
        elif kind != "observe":
            with self._timed("wire"):
                header |= self._rounding(tensors)
        self._keep(request.header, beside)
        header["seconds"] = self._told_seconds()
        return wire.encode(wire.Message({**header, **echo}, tensors), self.resident.config.wire.dtype)

    def _told_seconds(self) -> dict[str, float]:
        return {stage: round(value, 3) for stage, value in self._seconds.items()}

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - started

    @property
    def _masks(self) -> bool:
        return self.resident.config.privacy.secure_aggregation

    def _mine(self) -> list[Example]:
        return self.resident.rows_of(self.number)

    def _account(self) -> Account | None:
        """Returns what keeps this client's accounts; None where its rows are not hidden one by one."""
        resident, own = self.resident, self.resident.config.privacy
        if own.unit != "example":
            return None
        shared = Path(own.ledger).expanduser() if own.ledger and not self.ledger else None
        place = self.ledger or (shared / str(self.number) if shared else self.folder / "ledger")
        # Another run may deal the same rows to other clients.
        others = [other for other in sorted(shared.iterdir()) if other != place] if shared and shared.exists() else []
        return Account(
            config=resident.config,
            run=self.run,
            client=self.number,
            clients=[k for k in range(resident.dataset.clients) if k not in resident.dataset.unseen],
            rows=resident.dataset.train_of(self.number),
            examples=self._mine(),
            ledger=Ledger(place),
            budget=self.total_epsilon or own.total_epsilon or own.target_epsilon,
            others=[Ledger(other) for other in others],
            identity=lambda: resident.identity,
        )

    def _state_bytes(self, header: Answer) -> bytes:
        return (self.folder / f"{header['has']}.safetensors").read_bytes() if header["has"] >= 0 else b""

    def _open(self, with_facts: bool) -> Answer:
        if (account := self._account()) is not None:
            account.check()
        own = self.resident.ranks.get(self.number)
        layers = {name: [s.d_out, s.d_in, own or s.rank] for name, s in self.resident.adapter.layers.items()}
        plain = {name: list(p.shape) for name, p in self.resident.adapter.plain_parameters.items()}
        # Where uploads are masked, the weights are, too.
        answer: Answer = {"layers": layers, "plain": plain, "rows": 1 if self._masks else len(self._mine())}
        return answer | ({"preflight": preflight.facts(self.resident, self.folder, self.number)} if with_facts else {})

    def _take(self, request: wire.Message) -> dict[str, Tensor] | None:
        """Puts this client on the model: its own state, then what it is owed.

        Returns:
            What it keeps beside the model: its optimizers' states, what rounding its uploads lost, and what all clients held
            when the round began, where that is needed; None where the state that the server believes in is gone.
        """
        adapter, beside = self.resident.adapter, dict[str, Tensor]()
        with self._timed("adapter"):
            has = request.header["has"]
            own = self.resident.lora(self.number)
            if has < 0:
                adapter.restart(self.resident.config.seed, own)
            else:
                try:
                    kept = wire.decode((self.folder / f"{has}.safetensors").read_bytes())
                except (FileNotFoundError, wire.WireError):
                    return None
                beside = {k: x for k, x in kept.tensors.items() if k.startswith((OPTIMIZER, LOST, COMMON))}
                state = {k: x for k, x in kept.tensors.items() if k not in beside}
                adapter.scale(own)
                adapter.set_state(kept.header["history"], state)
            downloads = wire.unpack(request.header, request.tensors)
            if self.resident.speaks and self.number != OBSERVER:
                beside = self._with_common(beside, downloads, request.header)
                downloads = {layer: download.lasting() for layer, download in downloads.items()}
            before = adapter.read(("A",)) if any(k.startswith(LOST) for k in beside) else {}
            adapter.apply(downloads, wire.unpack_plain(request.tensors), own_rank=self.number != OBSERVER)
            if before:
                after = adapter.read(("A",))
                turned = {layer for layer, own in before.items() if not _same_directions(own["A"], after[layer]["A"])}
                turned |= {layer for layer, download in downloads.items() if download.reset is not None}
                beside = {k: x for k, x in beside.items() if not (k.startswith(LOST) and k.split("|")[1] in turned)}
        return beside

    def _with_common(self, beside: dict[str, Tensor], downloads: Mapping[str, Download], header: Answer) -> dict[str, Tensor]:
        """Returns `beside` with what is held in common from now on, at the largest rank, and what was given for this phase."""
        common, layers = _common(beside), self.resident.adapter.layers
        said = header.get("ranks", {})
        for layer, download in downloads.items():
            held = Download(common.get(layer, {})).lasting().factors
            if download.reset is not None and layer in layers:
                rank = said.get(layer, layers[layer].rank) if isinstance(said, dict) else None
                if type(rank) is not int or not 1 <= rank <= layers[layer].rank:
                    raise wire.WireError(f"layer {layer!r}: its rank is {rank!r:.80}, allowed: 1 to {layers[layer].rank}")
                held = fresh_factors(layer, replace(layers[layer], rank=rank), download.reset)
            common[layer] = {**held, **download.factors}
        others = {k: x for k, x in beside.items() if not k.startswith(COMMON)}
        return others | {COMMON + key: x for key, x in wire.pack_factors(common).items()}

    def _upload(self, header: Answer, beside: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the named tensors of what the phase sends."""
        resident = self.resident
        if not resident.speaks:
            return wire.pack_factors(resident.adapter.read(header["sends"]))
        phase, common = self._phase(header), _common(beside)
        said = {layer: phase.message(own, common.get(layer, {})) for layer, own in resident.adapter.read().items()}
        return wire.pack_factors(said)

    def _phase(self, header: Answer) -> Method:
        phases = list(self.resident.method.plan(int(header["rounds"])))
        number = header.get("round")
        if type(number) is not int or not 1 <= number <= len(phases) or list(phases[number - 1].sends) != list(header["sends"]):
            raise wire.WireError(f"round {number!r:.80} sends {header['sends']!r:.80}, which the run's method has no phase for")
        return phases[number - 1]

    def _keep(self, header: Answer, beside: dict[str, Tensor]) -> None:
        """Makes this client's state durable; the one the server believes in stays until the next request."""
        with self._timed("record"):
            history, tensors = self.resident.adapter.state()
            tensors |= beside
            self.folder.mkdir(parents=True, exist_ok=True)
            keep = {f"{header['has']}.safetensors", f"{header['keep']}.safetensors"}
            write_file(self.folder / f"{header['keep']}.safetensors", wire.encode(wire.Message({"history": history}, tensors)))
            # Scoring at the end of a round that is not yet committed: if it is asked anew, an older state is the one it needs.
            within = header["kind"] == "observe" and self.number != OBSERVER
            for old in self.folder.glob("*.safetensors"):
                if old.name not in keep and not within:
                    old.unlink()

    def _seed(self, header: Answer) -> int:
        return algebra.seed_of(self.resident.config.seed, "client", self.number, header["train_round"])

    def _make_good(self, tensors: dict[str, Tensor], beside: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Adds what rounding lost of earlier uploads to this one.

        Returns:
            (the upload, what to keep beside the model: with what rounding will lose this time).
        """
        dtype = self.resident.config.wire.dtype
        if dtype != "int8":
            return tensors, beside
        beside, whole = dict(beside), dict[str, Tensor]()
        for key, x in tensors.items():
            if not key.startswith("plain|") and key.rpartition("|")[2] not in HELD:
                whole[key] = x  # each round's message is about other directions
                continue
            last = beside.pop(LOST + key, None)
            whole[key] = x if last is None or last.shape != x.shape else x + last
            lost = whole[key] - wire.rounded(whole[key], dtype, key)
            # An upload that is not finite is refused; it must not spoil the next.
            if bool(lost.any()) and bool(lost.isfinite().all()):
                beside[LOST + key] = lost
        return whole, beside

    def _rounding(self, tensors: Mapping[str, Tensor]) -> Answer:
        """Returns {"rounding": ‖sent − rounded‖_F / ‖sent‖_F} of an upload; nothing where nothing is rounded."""
        dtype = self.resident.config.wire.dtype
        if dtype == "float32":
            return {}
        lost = sum(float((x - wire.rounded(x, dtype, key)).double().square().sum()) for key, x in tensors.items())
        all_of_it = sum(float(x.double().square().sum()) for x in tensors.values())
        share = math.sqrt(lost / all_of_it) if all_of_it > 0 else 0.0
        return {"rounding": share} if math.isfinite(share) else {}

    def _train(self, header: Answer, beside: dict[str, Tensor]) -> tuple[Answer, dict[str, Tensor], dict[str, Tensor]]:
        resident = self.resident
        # A method that trains now this, now that factor has an optimizer for each.
        mine = f"{OPTIMIZER}{''.join(header['trains'])}|"
        before = resident.adapter.read(header["trains"]) if self._masks else {}
        shared = (
            int(header["train_round"]),
            int(header["rounds"]),
            {k.removeprefix(mine): x for k, x in beside.items() if k.startswith(mine)},
            lambda step, steps: resident.on_step(self.number, step, steps),
            resident.method,
        )
        rows = (
            resident.adapter,
            tuple(header["trains"]),
            self._mine(),
            resident.config.training,
            pad_id(resident.base.tokenizer),
        )
        with self._timed("fit"):
            if (account := self._account()) is None:
                fitted = fit.fit(*rows, self._seed(header), *shared)
                said = {"loss": fitted.loss}
            else:
                # The loss is of rows that no noise hides, so it stays here.
                noise, spent = account.train(int(header["train_round"]), self._payload, self._state_bytes(header))
                fitted = private.fit(*rows, noise, *shared)
                said = {"epsilon": spent}
        if before:
            masked.check_trained(self.number, before, resident.adapter.read(header["trains"]))
        with self._timed("evaluate"):
            keep = self._scores_file(int(header["train_round"]) == int(header["rounds"]))
            scores = resident.score(self.number, generate=False, keep=keep) if header["score"] else None
        with self._timed("adapter"):
            tensors = self._upload(header, beside)
            # What keeps a factor at home keeps the head there, too.
            tensors |= {} if header["keeps"] else wire.pack_plain(resident.adapter.read_plain())
        others = {k: x for k, x in beside.items() if not k.startswith(mine)}
        answer = {"rows": len(self._mine()), **said, "steps": fitted.steps, "scores": scores}
        return answer, tensors, others | {mine + key: x for key, x in fitted.optimizer.items()}

    def _gather(self, header: Answer) -> tuple[Answer, dict[str, Tensor]]:
        """Scores this client's own model, then sends of it what nobody had until now."""
        resident = self.resident
        with self._timed("evaluate"):
            keep = self._scores_file(True)
            scores = resident.score(self.number, generate=False, keep=keep) if header["score"] else None
        with self._timed("adapter"):
            tensors = wire.pack_factors(resident.adapter.read(header["sends"])) | wire.pack_plain(resident.adapter.read_plain())
        return {"rows": len(self._mine()), "scores": scores}, tensors

    def _say_more(self, header: Answer, beside: Mapping[str, Tensor]) -> tuple[Answer, dict[str, Tensor]]:
        """Sends another message of what this client trained in this round."""
        with self._timed("adapter"):
            return {"rows": len(self._mine())}, self._upload(header, beside)

    def _measure(self, header: Answer) -> tuple[Answer, dict[str, Tensor]]:
        resident, said = self.resident, {}
        mine = self._mine()
        samples = max(1, min(int(header["samples"]), len(resident.public or mine)))
        rest = resident.config.training, pad_id(resident.base.tokenizer)
        account = None if resident.public else self._account()
        with self._timed("fit"):
            if account is None:
                gradients = fit.gradient(resident.adapter, resident.public or mine, *rest, self._seed(header), samples)
            else:
                noise, said["epsilon"] = account.measure(samples, self._payload, self._state_bytes(header))
                gradients = private.gradient(resident.adapter, mine, *rest, noise)
            if "G" in header["sends"]:
                factors = {layer: {"G": G} for layer, G in gradients.items()}
            else:
                factors = {layer: _best_product(G, resident.adapter.layers[layer].rank) for layer, G in gradients.items()}
        return {"rows": samples, **said}, wire.pack_factors(factors)

    def _observe(self, header: Answer) -> tuple[Answer, dict[str, Tensor]]:
        with self._timed("evaluate"):
            generate = bool(header["generate"])
            # At the opening replies are generated, too, but only the last round's rows are kept.
            # A client's file has the scores of its own model, which its last round left.
            keep = self._scores_file(generate and header["keep"] > 0 and self.number == OBSERVER)
            return {"scores": self.resident.score(self.number, generate, keep)}, {}

    def _scores_file(self, last: bool) -> Path | None:
        """Returns where the scores of every row go after the last round."""
        if not last:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / "scores.jsonl"


def _common(beside: Mapping[str, Tensor]) -> dict[str, Factors]:
    return wire.unpack_factors({k.removeprefix(COMMON): x for k, x in beside.items() if k.startswith(COMMON)})


def _same_directions(before: Tensor, after: Tensor) -> bool:
    """Whether an A still means the same directions, so that what its pair lost to rounding still belongs to it.

    A mean moves A a little; a decomposition, or a fresh adapter, turns it into another.
    """
    if before.shape != after.shape:
        return False
    return float((before * after).sum()) > 0.5 * float(before.norm() * after.norm())


def _best_product(G: Tensor, rank: int) -> dict[str, Tensor]:
    """Returns the best product of the given rank of a dense matrix: B = U s, A = Vᵀ."""
    U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    return {"B": U[:, :rank] * s[:rank], "A": Vh[:rank]}
