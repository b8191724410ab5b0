"""umbel as a Flower app: `server_app` runs the job at the server, `client_app` answers at every site.

`umbel run --engine flower` submits it (see `umbel.federation`), `--engine ray` runs it in Flower's simulation, and the folder
`app/` of the project is the same app for people who live in Flower.
"""

import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from umbel import kit
from umbel.client import worker
from umbel.engine.flower import EnvelopeError, Flower, job_of, payload_of, to_content

# What is heavy is imported where it is used: the process that Flower starts for each message only passes bytes on.

Listener = Callable[[dict[str, Any]], None]

NODES_SECONDS = 120
"""For the nodes of a simulation to say which partition they are."""

server_app = ServerApp()
client_app = ClientApp()

_workers: dict[Path, Any] = {}
"""Of a simulation's process, by the folder of what its clients keep."""


class Nodes(Protocol):
    """Who of Flower's nodes is which client of ours."""

    @property
    def clients(self) -> list[int] | None:
        """All that may take part, connected or not; None where the run's file says it."""
        ...

    def connected(self) -> Mapping[int, int]:
        """Returns client numbers and node ids of those that are there now."""
        ...


class Sites:
    """The sites of a kit, told apart by their keys, which the SuperLink has checked."""

    def __init__(self, grid: Grid, federation: kit.Federation) -> None:
        self._grid, self._folder, self._sites = grid, federation.folder, federation.sites

    @property
    def clients(self) -> list[int]:
        return sorted(self._numbers().values())

    def connected(self) -> dict[int, int]:
        numbers = self._numbers()
        return {numbers[node.public_key]: node.node_id for node in self._grid.get_nodes() if node.public_key in numbers}

    def _numbers(self) -> dict[bytes, int]:
        # Read each time: sites join and are revoked while a run goes on. A list that is no good ends no run: what held goes on.
        with suppress(kit.KitError):
            self._sites = kit.read(self._folder).sites
        return {site.key_bytes: site.number for site in self._sites if site.state == kit.ACTIVE}


class Partitions:
    """The nodes of a simulation, which say themselves which partition they are."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._known: dict[int, int] = {}

    @property
    def clients(self) -> None:
        return None

    def connected(self) -> dict[int, int]:
        there = list(self._grid.get_node_ids())
        strange = [node for node in there if node not in self._known]
        if strange:
            asks = [Message(RecordDict(), node, "query", ttl=NODES_SECONDS) for node in strange]
            for message in self._grid.send_and_receive(asks, timeout=NODES_SECONDS):
                said = message.content.get("node") if message.has_content() else None
                if isinstance(said, ConfigRecord) and isinstance(said.get("partition-id"), int):
                    self._known[message.metadata.src_node_id] = said["partition-id"]  # type: ignore[assignment]
        return {number: node for node, number in self._known.items() if node in there}


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the job that `umbel run` asked for, or the run file that `flwr run` names."""
    from umbel import config as configuration
    from umbel import report

    given = context.run_config
    if given.get("request"):
        request = json.loads(Path(str(given["request"])).read_text(encoding="utf-8"))
        sys.path[:0] = request["path"]
        nodes = Sites(grid, kit.read(Path(request["federation"])))
        number = str(context.run_id)
        names = {site.number: site.name for site in kit.read(Path(request["federation"])).sites}
        with Path(request["events"]).open("a", encoding="utf-8") as log:

            def listen(event: dict[str, Any]) -> None:
                who = {"site": names[event["client"]]} if event.get("client") in names else {}
                print(json.dumps({"time": time.time(), "number": number, **event, **who}), file=log, flush=True)

            error = ""
            try:
                # Paths in a run's file are relative to where the command was given, here as in one process.
                os.chdir(request["path"][0])
                serve(grid, request["table"], Path(request["folder"]), nodes, listen)
            except (KeyboardInterrupt, SystemExit):
                error = f"stopped; finished rounds are kept, go on with: umbel run --resume {request['folder']}"
                raise
            except BaseException as failure:
                error = f"{type(failure).__name__}: {failure}"
                raise
            finally:
                listen({"event": "end", "error": error})
    elif given.get("config"):
        file, out = _own_paths(given)
        table, nodes = configuration.read(file), Partitions(grid)
        _check_partitions(_clients(table), len(nodes.connected()))
        serve(grid, table, out, nodes, _print_event)
        page = report.write_html([report.read_job(out)], out / "report.html")
        print(f"umbel: done; adapters and records in {out}, report: {page}", flush=True)
    else:
        raise configuration.ConfigError("no run file; give it with: flwr run app --run-config 'config=\"/path/of/run.toml\"'")


def _clients(table: dict[str, Any]) -> int:
    from umbel import config as configuration
    from umbel.client import data

    return data.load(next(iter(configuration.configs(table).values()))).clients


def _check_partitions(clients: int, nodes: int) -> None:
    from umbel.config import ConfigError

    if nodes < clients:
        raise ConfigError(
            f"the run has {clients} clients, the simulation {nodes} nodes; add: --federation-config 'num-supernodes={clients}'"
        )


def _own_paths(given: Mapping[str, Any]) -> tuple[Path, Path]:
    """Returns the run file that `flwr run` names, and the folder for its results."""
    from umbel.config import ConfigError

    file = Path(str(given.get("config", ""))).expanduser()
    out = Path(str(given.get("out") or file.parent / "runs" / file.stem)).expanduser()
    for key, path in (("config", file), ("out", out)):
        if not path.is_absolute():
            raise ConfigError(f"{key}: got {str(path)!r}, wanted a whole path; Flower's processes work in folders of their own")
    return file, out


def serve(grid: Grid, table: dict[str, Any], folder: Path, nodes: Nodes, listen: Listener) -> None:
    """Runs a job over the nodes of a grid, on from where its folder stops."""
    from umbel.run import Network, run

    def engine(job: Mapping[str, Any], deadline: float) -> Flower:
        return Flower(grid, nodes.connected, lambda: set(nodes.clients or ()), job, deadline)

    run(table, folder, listen, network=Network(nodes.clients, engine))


def simulate(table: dict[str, Any], folder: Path, listen: Listener) -> None:
    """Runs a job in Flower's simulation: clients side by side in Ray's processes, each with a share of cores and GPUs.

    Args:
        table: A configuration (see `umbel.config`).
        folder: Of the job; what clients keep is in its folder `sites`.
        listen: Called with events, for progress.
    """
    import torch
    from flwr.simulation import run_simulation

    clients, state = _clients(table), (folder / "sites").resolve()
    path = [os.getcwd()]
    server, client = ServerApp(), ClientApp()

    @server.main()
    def _(grid: Grid, context: Context) -> None:
        serve(grid, table, folder, Partitions(grid), listen)

    @client.train()
    def _(message: Message, context: Context) -> Message:
        sys.path[:0] = [place for place in path if place not in sys.path]
        return answer_simulated(state, message)

    client.query()(query)
    each: dict[str, Any] = {"num_cpus": 1.0, "num_gpus": 1.0 if torch.cuda.is_available() else 0.0}
    with _only_errors():
        run_simulation(server, client, clients, backend_config={"client_resources": each})


@contextmanager
def _only_errors() -> Iterator[None]:
    """Keeps Flower from saying what it does, since our progress is shown, and that `run_simulation` is not for apps."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _print_event(event: dict[str, Any]) -> None:
    from umbel.federation import say

    if event["event"] in ("stage", "note", "member", "round", "refused"):
        print("umbel:", say({**event, "time": time.time()}), flush=True)


@client_app.query()
def query(message: Message, context: Context) -> Message:
    """Says which partition of a simulation this node is."""
    number = context.node_config.get("partition-id", -1)
    return Message(RecordDict({"node": ConfigRecord({"partition-id": int(number)})}), reply_to=message)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Answers one request, of whatever kind: what is asked is in the payload."""
    folder = context.node_config.get("site")
    if folder is not None:
        return _reply(message, partial(worker.answer, Path(str(folder))))
    # A node of a simulation: run file and rows are this machine's own.
    return answer_simulated(_own_paths(context.run_config)[1] / "sites", message)


def answer_simulated(state: Path, message: Message) -> Message:
    """Answers for whichever client is asked, with the rows that the run's file gives to it; what it keeps goes to `state`."""
    from umbel.client.site import Site, Worker

    def answer(job: Mapping[str, Any], payload: bytes) -> tuple[bytes, str]:
        if state not in _workers:
            _workers[state] = Worker(Site(None, state, methods=None))
        return worker.answer_here(_workers[state], job, payload)

    return _reply(message, answer)


def _reply(message: Message, answer: Callable[[Mapping[str, Any], bytes], tuple[bytes, str]]) -> Message:
    try:
        payload, error = answer(job_of(message.content), payload_of(message.content))
    except EnvelopeError as refusal:
        payload, error = b"", str(refusal)
    except Exception as failure:
        # What is not caught here Flower would send to the operator word for word.
        from umbel.engine.reasons import reason

        traceback.print_exc()
        payload, error = b"", reason(failure)
    return Message(to_content(payload, error=error), reply_to=message)
