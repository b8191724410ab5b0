"""Client-level differential privacy at the server: what each client changed is clipped, and noise is added to the mean once.

    u_k = x_k − x̂                                       (1)    what client k sent less what it was sent, all layers together
    x = x̂ + 1/K′ (Σ_k u_k min(1, C / ‖u_k‖) + σ C N)    (2)    K′ clients were asked; N is standard normal

Whatever one client sends moves the sum in (2) by C at most. So weights are the same for all, rows being data; K′ counts those
who were asked and did not answer, too; and no upload is refused for what others sent, since that would let one client decide
whether another one counts. What is done to x afterwards (rounding, a method's `combine`) costs nothing.

Who takes part in a round is drawn by the run's public seed, so no amplification by sampling is claimed: a client's rounds are
Gaussian mechanisms, one after the other, of which σ lets the client with the most of them end at the target.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from umbel import privacy
from umbel.admission import Upload
from umbel.asking import Heard, Plan
from umbel.ledger import Entry, Ledger, epsilon_of
from umbel.method import Factors
from umbel.record import Record
from umbel.server import Aggregator, Server, ServerError
from umbel.wire import Spooled

PLAIN = "plain"
"""The part of an upload that is no layer: heads and biases."""


class Changes:
    """What a round's clients changed, read from their uploads one part at a time: a layer, or what is no factor.

    Args:
        uploads: Per client its factors, and in `plain()` the rest.
        before: What all of them were sent: per layer its factors, under "plain" the rest; what is missing there is zero.
        bound: C > 0, the norm to which each client's change is clipped, over all parts together.
        asked: K′, the divisor, at least as many as there are uploads.

    Attributes:
        norms: Per client ‖u_k‖ before the clip.
        asked: K′.
    """

    def __init__(self, uploads: Mapping[int, Spooled], before: Mapping[str, Factors], bound: float, asked: int) -> None:
        self._uploads, self._before, self._bound, self.asked = dict(uploads), before, bound, asked
        self._hashes: dict[int, str] = {}
        self.norms: dict[int, float] = {}
        for client, upload in uploads.items():
            square, digest = 0.0, hashlib.sha256()
            for part in self.parts:
                for name, x in _part(upload, part).items():
                    change = self._change(part, name, x)
                    square += float(change.square().sum())
                    digest.update(f"{part}|{name}|{tuple(x.shape)}\0".encode() + change.numpy().tobytes())
            self.norms[client], self._hashes[client] = math.sqrt(square), digest.hexdigest()

    @property
    def parts(self) -> list[str]:
        first = next(iter(self._uploads.values()), None)
        return [] if first is None else [*first, PLAIN]

    @property
    def clients(self) -> list[int]:
        return list(self._uploads)

    def without(self, clients: Sequence[int]) -> "Changes":
        """Returns the same round without some of its uploads; the divisor stays."""
        left = {client: upload for client, upload in self._uploads.items() if client not in clients}
        return Changes(left, self._before, self._bound, self.asked) if clients else self

    def digest(self, *said: object) -> str:
        """Returns a hash of all that (2) is made of, and of what is said besides: the same noise must never be used for two."""
        whole = [*said, self._bound, self.asked, sorted(self._hashes.items())]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    def mean(self, part: str, sigma: float = 0.0, seed: int = 0) -> Factors:
        """Returns x of (2) for one part.

        Args:
            part: A layer, or "plain".
            sigma: σ; at 0 nothing is added.
            seed: Of the noise: a secret of the server's, different for every other round or set of uploads.
        """
        sums: Factors = {}
        for client, upload in self._uploads.items():
            kept = min(1.0, self._bound / self.norms[client]) if self.norms[client] else 1.0
            for name, x in _part(upload, part).items():
                change = kept * self._change(part, name, x)
                sums[name] = sums[name] + change if name in sums else change
        result: Factors = {}
        for name, total in sums.items():
            if sigma:
                total.add_(privacy.Secret(seed, part, name).normal(total.shape), alpha=sigma * self._bound)
            result[name] = (self._was(part, name, total) + total / self.asked).float()
        return result

    def _was(self, part: str, name: str, like: Tensor) -> Tensor:
        was = self._before.get(part, {}).get(name)
        return torch.zeros_like(like, dtype=torch.float64) if was is None else was.double()

    def _change(self, part: str, name: str, x: Tensor) -> Tensor:
        return x.double() - self._was(part, name, x)


def _part(upload: Spooled, part: str) -> Factors:
    return upload.plain() if part == PLAIN else upload[part]


def sent_before(plan: Plan, server: Server) -> dict[str, Factors]:
    """Returns what all clients were sent, for `Changes`: heads that nobody trained yet are the model's own."""
    return {**server.held, PLAIN: {**plan.plain, **server.plain}}


def most_rounds(plan: Plan, clients: Sequence[int]) -> int:
    """Returns how many uploads a run takes of the client with the most: its rounds, and what is gathered at the end."""
    counts: Counter[int] = Counter()
    turn = 0
    for phase in plan.method.plan(plan.rounds):
        turn += bool(phase.trains)
        if phase.trains:
            counts.update(privacy.chosen(plan.seed, clients, plan.clients_per_round, turn))
        elif phase.sends and phase.measures == "factors":
            counts.update(list(counts))
    return max(counts.values(), default=0)


def noise(plan: Plan, clients: Sequence[int]) -> float:
    """Returns σ of a run: with it, the client with the most rounds ends at the target.

    Args:
        plan: The run's.
        clients: Those who opened it.

    Raises:
        privacy.PrivacyError: δ is more than 1 / K.
    """
    terms = plan.privacy
    privacy.check_delta(terms.target_delta, len(plan.clients), "clients")
    return privacy.noise_multiplier(terms.target_epsilon, terms.target_delta, ((1.0, most_rounds(plan, clients)),))


class Hiding:
    """One round of a run that hides each client from all but the server: whom it asks, what it adds up, what it writes down.

    Args:
        plan: The run's, with its `privacy`.
        record: The run's, opened: σ is for those who were there then.
        turn: The training round.
        heard: Of this round; refusals and what the record says of the noise are noted there.
    """

    def __init__(self, plan: Plan, record: Record, turn: int, heard: Heard) -> None:
        self._plan, self._turn, self._heard = plan, turn, heard
        self._ledger = Ledger(Path(plan.privacy.ledger) if plan.privacy.ledger else record.folder / "ledger")
        self._run = " ".join(str(x) for x in (plan.run, record.info.get("label"), record.info.get("started")) if x)
        self._sigma = noise(plan, record.lines()[0]["answered"])
        self._names: dict[int, str] = {}

    def within_budget(self, asked: list[int]) -> list[int]:
        """Returns those who can still pay for this round; the others are noted as refused.

        Raises:
            ServerError: Nobody can.
        """
        entries = {client: self._entry(client, "") for client in asked}
        written = self._ledger.entries()
        # A round that a kill ended was paid for. Whether its uploads come again is seen when they are there.
        paid = {entry.client for entry in written if self._is_this_round(entry)}
        short = self._short([entry for client, entry in entries.items() if client not in paid], written)
        if asked and len(short) == len(asked):
            raise ServerError(f"round {self._heard.round}: no client can be asked: {self._heard.reasons()}")
        return [client for client in asked if client not in short]

    def fold(self, uploads: Mapping[int, Upload], aggregator: Aggregator, asked: int) -> None:
        """Folds the round's uploads in, in the order given, all with the same weight."""
        before = sent_before(self._plan, aggregator.server)
        spooled = {client: upload.factors for client, upload in uploads.items()}
        changes = Changes(spooled, before, self._plan.privacy.max_grad_norm, asked)
        entries = [self._entry(client, self._digest(changes)) for client in changes.clients]
        self._changes = changes.without(self._short(entries, self._ledger.entries()))
        for client in self._changes.clients:
            upload = uploads[client]
            aggregator.fold(client, 1, upload.factors, upload.factors.plain(), upload.ranks)
            self._heard.norms[client] = upload.norm
            self._heard.answered.append(client)

    def spend(self, aggregator: Aggregator) -> None:
        """Writes the round into the ledger, then lets the method have the mean with noise.

        Raises:
            ServerError: Another run has spent the budget meanwhile; nothing is written.
        """
        terms, changes, digest = self._plan.privacy, self._changes, self._digest(self._changes)
        entries = [self._entry(client, digest) for client in changes.clients]

        def check(written: list[Entry]) -> None:
            if self._short(entries, written):
                raise ServerError(f"round {self._heard.round}: {self._heard.reasons()}")

        self._ledger.spend_all(entries, check)
        spent = _by_client(entry for entry in self._ledger.entries() if entry.run == self._run)
        seed = self._ledger.seed(digest)
        aggregator.give(lambda layer: changes.mean(layer, self._sigma, seed), changes.mean(PLAIN, self._sigma, seed))
        self._heard.noise = {
            "sigma": self._sigma,
            "deviation": self._sigma * terms.max_grad_norm / changes.asked,
            "change": {str(client): norm for client, norm in changes.norms.items()},
        }
        self._heard.epsilon = {str(client): _epsilon(spent[client]) for client in changes.clients}

    def _digest(self, changes: Changes) -> str:
        return changes.digest(self._run, self._heard.kind, self._turn, self._sigma)

    def _entry(self, client: int, digest: str) -> Entry:
        terms = self._plan.privacy
        if client not in self._names:
            # Whose data a client's number stands for is not known here: in another run with this ledger it is the same client.
            self._names[client] = self._ledger.name_data([{"client": f"client {client}"}])
        return Entry(
            run=self._run,
            client=client,
            round=self._turn,
            kind=self._heard.kind,
            sigma=self._sigma,
            sample_rate=1.0,
            steps=1,
            max_grad_norm=terms.max_grad_norm,
            delta=terms.target_delta,
            target=terms.target_epsilon,
            budget=terms.total_epsilon or terms.target_epsilon,
            request=hashlib.sha256(f"{digest} {client}".encode()).hexdigest(),
            data=self._names[client],
            unit="client",
        )

    def _is_this_round(self, entry: Entry) -> bool:
        return (entry.run, entry.kind, entry.round) == (self._run, self._heard.kind, self._turn)

    def _short(self, entries: Sequence[Entry], written: Sequence[Entry]) -> list[int]:
        """Returns the clients whose entry, unless it is written already, would be more than they may spend; notes why."""
        everything = _by_client(written)
        known, short = {entry.request for entry in written}, list[int]()
        for entry in entries:
            every = [*everything.get(entry.client, []), entry]
            own = [other for other in every if other.run == self._run]
            budgets = (("this run", own, self._plan.privacy.target_epsilon), ("all runs", every, entry.budget))
            for who, spendings, budget in budgets if entry.request not in known else ():
                after = _epsilon(spendings)
                # Sums are composed anew each time, and in another grouping.
                if after > budget * (1 + 1e-9):
                    short.append(entry.client)
                    self._heard.refuse(
                        entry.client,
                        f"client {entry.client} has no budget left for this round: with it {who} would have spent "
                        f"ε = {after:.4g}, allowed {budget:g}",
                    )
                    break
        return short


def _by_client(entries: Iterable[Entry]) -> dict[int, list[Entry]]:
    result: dict[int, list[Entry]] = {}
    for entry in entries:
        result.setdefault(entry.client, []).append(entry)
    return result


def _epsilon(entries: Sequence[Entry]) -> float:
    return epsilon_of(entries, min(entry.delta for entry in entries))
