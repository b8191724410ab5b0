"""What a client's answer costs in privacy, and whether it may be given: between its requests and its ledger."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from umbel import config as configuration
from umbel import privacy
from umbel.client import fit, private
from umbel.client.prompts import Example
from umbel.client.split import Row
from umbel.config import Config
from umbel.ledger import BudgetError, Entry, Ledger, request_hash
from umbel.privacy import PrivacyError

TRAIN, MEASURE = "train", "measure"


@dataclass(frozen=True)
class Account:
    """One client's, in one run whose `privacy.unit` is "example".

    Args:
        config: The run's.
        run: Names the run and its method for ever.
        client: The client's number.
        clients: Those that take part, among whom every round draws.
        rows: Its training rows, as they were read.
        examples: Their tokens.
        ledger: Its own.
        budget: ε that all runs on these rows may spend.
        others: Ledgers of the other clients of this process, whose rows may be this one's in another run.
        identity: Returns versions and the hash of the base model, which decide an answer, too.
    """

    config: Config
    run: str
    client: int
    clients: Sequence[int]
    rows: Sequence[Row]
    examples: Sequence[Example]
    ledger: Ledger
    budget: float
    others: Sequence[Ledger]
    identity: Callable[[], Mapping[str, Any]]

    def check(self) -> None:
        """Raises PrivacyError where this client cannot take part at all: δ, too little ε for any noise, or no Opacus."""
        own = self.config.privacy
        with self._discreet():
            privacy.check_delta(own.target_delta, len(self.rows), f"rows of client {self.client}")
            self._sigma(())

    def train(self, train_round: int, payload: bytes, state: bytes) -> tuple[private.Noise, float]:
        """Spends what a training round costs.

        Args:
            train_round: From 1.
            payload: The request.
            state: The client's own file as it was when the request came.

        Returns:
            (noise for `umbel.client.private.fit`, ε of this run so far).

        Raises:
            BudgetError: It would be more than may be spent.
            PrivacyError: δ is too large, or no noise is enough.
        """
        start = tuple(entry.spent for entry in self._own() if entry.kind == MEASURE)
        rate, steps = self._rate(), self._steps()
        with self._discreet():
            return self._spend(TRAIN, train_round, (self._sigma(start), rate, steps), payload, state)

    def measure(self, samples: int, payload: bytes, state: bytes) -> tuple[private.Noise, float]:
        """Spends `start_share` of ε on the gradient over so many rows on average; as `train`."""
        own, rate = self.config.privacy, privacy.sample_rate(samples, len(self.rows))
        with self._discreet():
            sigma = privacy.noise_multiplier(own.start_share * own.target_epsilon, own.target_delta, ((rate, 1),))
            return self._spend(MEASURE, 0, (sigma, rate, 1), payload, state)

    @contextmanager
    def _discreet(self) -> Iterator[None]:
        """Says less of a refusal where uploads are masked: ε and 1/n would tell how many rows there are."""
        try:
            yield
        except (BudgetError, PrivacyError) as error:
            if not self.config.privacy.secure_aggregation:
                raise
            raise type(error)(
                f"client {self.client} cannot take part within the ε and δ that were asked for; why is in its own log, and "
                "what it has spent in its ledger"
            ) from error

    def _spend(self, kind: str, number: int, spent: privacy.Spent, payload: bytes, state: bytes) -> tuple[private.Noise, float]:
        own, (sigma, rate, steps) = self.config.privacy, spent
        privacy.check_delta(own.target_delta, len(self.rows), f"rows of client {self.client}")
        context = {
            "run": self.run,
            "client": self.client,
            "spent": [kind, *spent, own.max_grad_norm],
            "config": _deciding(self.config),
            "identity": dict(self.identity()),
            "tokens": self._tokens,
        }
        request = request_hash(payload, state, context)
        entry = Entry(
            run=self.run,
            client=self.client,
            round=number,
            kind=kind,
            sigma=sigma,
            sample_rate=rate,
            steps=steps,
            max_grad_norm=own.max_grad_norm,
            delta=own.target_delta,
            target=own.target_epsilon,
            budget=self.budget,
            request=request,
            data=self._data,
        )
        elsewhere = [spent for other in self.others for spent in other.other_runs(self.rows, self.run)]
        standing = self.ledger.spend(entry, elsewhere)
        return private.Noise(sigma, own.max_grad_norm, rate, self.ledger.seed(request)), standing.run_after

    def _sigma(self, start: tuple[privacy.Spent, ...]) -> float:
        """Returns σ of every training round: the same in all of them, whatever was spent by other runs."""
        own, server = self.config.privacy, self.config.server
        times = privacy.participations(
            self.config.seed, self.config.rounds, self.clients, server.clients_per_round, self.client
        )
        whole = ((self._rate(), self._steps() * max(1, times)),)
        return privacy.noise_multiplier(own.target_epsilon, own.target_delta, whole, start)

    def _rate(self) -> float:
        return private.sample_rate(self.config.training, len(self.rows))

    def _steps(self) -> int:
        return fit.steps_per_round(self.config.training, len(self.rows))

    def _own(self) -> list[Entry]:
        return [entry for entry in self.ledger.entries() if (entry.run, entry.client) == (self.run, self.client)]

    @cached_property
    def _data(self) -> str:
        return self.ledger.name_data(self.rows)

    @cached_property
    def _tokens(self) -> str:
        """Hash of what is trained on, in its order: the draw is of places, not of rows."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(json.dumps(asdict(example), sort_keys=True, default=str).encode())
        return digest.hexdigest()


def _deciding(config: Config) -> dict[str, Any]:
    """Returns what of a configuration an answer may depend on: a resumed run may wait longer, and is not another one."""
    table = configuration.to_table(config)
    for key in configuration.ADJUSTABLE:
        section, _, name = key.partition(".")
        table[section] = {other: value for other, value in table[section].items() if other != name}
    return table
