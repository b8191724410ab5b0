"""A site: one client on a machine of its own. A job and a request's bytes come in, a reply's bytes go out.

Nothing here knows how bytes travel. What a run may do at a site is the site's to say: which file it trains on, where its base
model is, whether a method of somebody's own may be loaded and whether code that a model wrote may be run.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from umbel import config as configuration
from umbel import wire
from umbel.client import client, data, model
from umbel.client.adapter import Adapter
from umbel.client.client import Client, Resident
from umbel.config import Config, ConfigError
from umbel.kit import RUN_ROWS, SiteConfig
from umbel.record import locked

Job = Mapping[str, Any]
"""What a site must know besides the request: "run" (an id), "member" (of the run's methods), "clients" (K), "config"."""


WAIT_SECONDS = 600
"""For another process of this site that is still at an older request of the same run."""


@dataclass(frozen=True)
class Site:
    """What a site says for itself.

    Args:
        number: Its client's; None takes that of every request, where all clients are of one machine.
        state: Folder of what is kept between requests.
        data: A file with its training rows, or RUN_ROWS.
        test: A file with its test rows, or "".
        model: Path of the base model here; "" takes the run's name for it.
        allow_code_execution: Whether `task.program` may be run here.
        methods: Dotted names of methods that are not umbel's and may be loaded here; None allows any.
        public: A file with rows that belong to nobody, for what a run measures on `data.public`.
        ledger: Folder of its ledger; None takes what the run's configuration says.
        total_epsilon: ε that all runs on its rows may spend; then it answers only runs that hide them. 0 lets each run say.
        secure_aggregation: It answers only runs whose uploads are masked.
    """

    number: int | None
    state: Path
    data: str = RUN_ROWS
    test: str = ""
    model: str = ""
    allow_code_execution: bool = False
    methods: tuple[str, ...] | None = ()
    public: str = ""
    ledger: Path | None = None
    total_epsilon: float = 0.0
    secure_aggregation: bool = False

    @classmethod
    def of(cls, folder: Path, told: SiteConfig) -> "Site":
        """Returns the site of a kit's folder, from its `site.toml`."""
        return cls(
            number=told.number,
            state=folder / "state",
            data=told.data,
            test=told.test,
            model=told.model,
            allow_code_execution=told.allow_code_execution,
            methods=tuple(told.methods),
            public=told.public,
            ledger=folder / "ledger",
            total_epsilon=told.total_epsilon,
            secure_aggregation=told.secure_aggregation,
        )


@dataclass
class Worker:
    """Answers requests for a site, with one base model and one adapter in memory for as long as jobs are alike.

    Args:
        site: Whose.
        on_step: See `Resident`.
    """

    site: Site
    on_step: Callable[[int, int, int], None] = lambda client, step, steps: None
    _key: Any = None
    _resident: Resident | None = None

    def answer(self, job: Job, payload: bytes) -> bytes:
        """Answers one request.

        Args:
            job: Which run and member it is of.
            payload: The request.

        Returns:
            The reply's bytes.

        Raises:
            ConfigError: The job is malformed, or asks for what this site does not allow.
            WireError: The request is malformed.
        """
        run, member, clients = _read_job(job)
        self._check_allowed(job["config"])
        config = configuration.from_table(job["config"])
        # Every request says which client it is for; whoever is not that client must not answer.
        number = wire.decode(payload).header.get("client")
        if self.site.number is not None and number != self.site.number:
            raise ConfigError(f"the request is for client {number!r:.40}, this site is client {self.site.number}")
        if type(number) is not int or not 0 <= number < clients:
            raise ConfigError(f"the request is for client {number!r:.40}, allowed: 0 to {clients - 1}")
        folder = self.site.state / run / member / str(number)
        with locked(folder, WAIT_SECONDS):
            resident, site = self._take(config, number, clients), self.site
            return Client(number, resident, folder, f"{run}/{member}", site.ledger, site.total_epsilon).answer(payload)

    def _take(self, config: Config, number: int, clients: int) -> Resident:
        # With files of its own a site is one client; else one process stands in for several.
        alone = self.site.number is not None
        key = (config, clients, number if alone else None)
        if self._resident is None or key != self._key:
            self.let_go()
            self._resident, self._key = self._load(config, number if alone else None, clients), key
        return self._resident

    def _load(self, config: Config, number: int | None, clients: int) -> Resident:
        if self.site.model:
            config = replace(config, model=replace(config.model, name=self.site.model))
        if self.site.data != RUN_ROWS and config.data.public:
            # What is public here is not for the run to say: it could name the site's own rows.
            if not self.site.public:
                raise ConfigError("data.public: this site has no public rows (public, in site.toml)")
            config = replace(config, data=replace(config.data, public=self.site.public))
        if self.site.data == RUN_ROWS:
            dataset = data.load(config)
            if dataset.clients != clients or dataset.unseen:
                raise ConfigError(
                    f"the run's file makes {dataset.clients} clients ({len(dataset.unseen)} of them unseen) and the federation "
                    f"has {clients} sites; with the rows of the run, the two must be the same"
                )
            dataset = dataset if number is None else data.of_client(dataset, number)
        else:
            assert number is not None
            dataset = data.load_site(config, number, clients, self.site.data, self.site.test)
        base = model.load(config, len(dataset.labels))
        adapter = Adapter(base.model, config.lora, base.heads, config.seed)
        tokens = client.tokens(config, base, dataset)
        return Resident(config, base, adapter, dataset, *tokens, ranks=client.ranks(config, dataset), on_step=self.on_step)

    def let_go(self) -> None:
        """Forgets the base model; the next request loads it again."""
        if self._resident is not None:
            self._resident.adapter.remove()
            self._resident = None

    def _check_allowed(self, table: Mapping[str, Any]) -> None:
        """Refuses what this site does not allow; on the raw table, since reading a configuration imports its method."""
        name, allowed = str((table.get("method") or {}).get("name")), self.site.methods
        if "." in name and allowed is not None and name not in allowed:
            raise ConfigError(
                f"method {name:.80}: not umbel's, and not among what this site allows: {allowed} (methods, in site.toml)"
            )
        if (table.get("task") or {}).get("program") and not self.site.allow_code_execution:
            raise ConfigError(
                "task.program runs code that a model wrote, which this site forbids (allow_code_execution, in site.toml)"
            )
        if self.site.total_epsilon and (table.get("privacy") or {}).get("unit") != "example":
            raise ConfigError("this site answers only runs with privacy.unit = example (total_epsilon, in site.toml)")
        if self.site.secure_aggregation and (table.get("privacy") or {}).get("secure_aggregation") is not True:
            raise ConfigError("this site answers only runs with masked uploads (secure_aggregation, in site.toml)")
        if self.site.total_epsilon and not self.site.test and (table.get("data") or {}).get("validation"):
            # Scores are exact, and a run chooses by its seed which rows they are of.
            raise ConfigError(
                "data.validation would have this site score its training rows, with no noise (total_epsilon, in site.toml); "
                "give test rows of its own, or leave data.validation out"
            )


def _read_job(job: Job) -> tuple[str, str, int]:
    """Checks a job, which may come from anywhere; run and member become names of folders."""
    run, member, clients = (job.get(key) for key in ("run", "member", "clients"))
    if not isinstance(run, str) or not re.fullmatch(r"[0-9a-f]{8,64}", run):
        raise ConfigError(f"job: run is {run!r:.40}, allowed: an id of 8 to 64 hexadecimal digits")
    if not isinstance(member, str) or not re.fullmatch(r"[^./\\ ][^/\\]{0,99}", member) or not member.isprintable():
        raise ConfigError(f"job: member is {member!r:.40}, allowed: text without / and \\ that begins with no dot")
    if type(clients) is not int or not 1 <= clients <= 10**6:
        raise ConfigError(f"job: clients is {clients!r:.40}, allowed: 1 to 1000000")
    table = job.get("config")
    if not isinstance(table, dict) or not all(
        isinstance(table.get(key, {}), dict) for key in ("method", "task", "privacy", "data")
    ):
        raise ConfigError(f"job: config is {table!r:.40}, allowed: a configuration's table")
    return run, member, clients
