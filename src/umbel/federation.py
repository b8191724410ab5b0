"""Runs over a real federation, from the operator's side: submit, follow, status, log, stop.

The job itself runs in Flower's ServerApp, on the machine of the SuperLink, and writes its folder there. What is here reads
that folder and talks to the SuperLink through the `flwr` command; it may go away and come back at any time.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w

from umbel import __version__, deployment, kit
from umbel import run as running
from umbel.record import Record, RecordError, locked, write_json
from umbel.run import Listener

REQUEST, EVENTS = "federation.json", "events.jsonl"
CHECK_SECONDS = 10
"""Between looks at whether Flower still has a run whose folder says nothing new."""

MOST_FAILURES = 2
"""Looks in a row at which the SuperLink may be away, as it is when it is started again."""

COMMAND_SECONDS = 120

APP = {
    "project": {
        "name": "umbel-app",
        "version": __version__,
        "description": "Federated LoRA fine-tuning with umbel",
        "license": "Apache-2.0",
        "dependencies": [],
    },
    "tool": {
        "flwr": {
            "app": {
                "publisher": "umbel",
                "components": {"serverapp": "umbel.app:server_app", "clientapp": "umbel.app:client_app"},
                "config": {"config": "", "out": "", "request": ""},
            }
        }
    },
}
"""The app that Flower carries to the sites: the names of two modules of the installed package."""


class FederationError(RuntimeError):
    """Flower did not take or did not finish a run; says what to do."""


@dataclass(frozen=True)
class Submitted:
    """A job that was given to a federation.

    Args:
        folder: The job's, on this machine.
        federation: The kit's server folder.
        number: Flower's of the run.
    """

    folder: Path
    federation: kit.Federation
    number: str


def submit(table: dict[str, Any], folder: Path, server: Path) -> Submitted:
    """Asks a running federation to run a job, on from where its folder stops.

    Args:
        table: A configuration (see `umbel.config`).
        folder: Of the job, on this machine.
        server: The kit's server folder.

    Raises:
        FederationError: The SuperLink is not there, or took no run.
        KitError: `server` is no kit's.
    """
    federation = kit.read(server)
    folder.mkdir(parents=True, exist_ok=True)
    request = {
        "federation": str(federation.folder),
        "table": table,
        "folder": str(folder.resolve()),
        "events": str((folder / EVENTS).resolve()),
        # Modules of one's own, such as a method, lie where the command was given.
        "path": [os.getcwd()],
        "number": None,
    }
    write_json(folder / REQUEST, request)
    with tempfile.TemporaryDirectory() as app:
        Path(app, "pyproject.toml").write_text(tomli_w.dumps(APP), encoding="utf-8")
        told = flwr(federation, "run", app, "umbel", "--run-config", f"request={json.dumps(str((folder / REQUEST).resolve()))}")
    number = str(told.get("run-id") or "")
    if not told.get("success") or not number:
        raise FederationError(f"Flower took no run: {json.dumps(told)[:500]}")
    write_json(folder / REQUEST, {**request, "number": number})
    return Submitted(folder, federation, number)


def find(folder: Path, submitted: bool = True) -> Submitted:
    """Returns a job that was submitted, or only prepared where that will do.

    Raises:
        FederationError: The folder's job was not given to a federation.
    """
    path = folder / REQUEST
    if not path.is_file():
        raise FederationError(f"{folder} holds no job that was given to a federation; give the folder that `umbel run` named")
    request = json.loads(path.read_text(encoding="utf-8"))
    if submitted and request.get("number") is None:
        raise FederationError(f"{folder}: the job was prepared and never submitted; go on with: umbel run --resume {folder}")
    try:
        federation = kit.read(Path(request["federation"]))
    except kit.KitError as error:
        again = f"umbel run --resume {folder} --federation DIR"
        raise FederationError(
            f"{folder}: its federation's folder is gone ({error}). Where it was moved, go on with: {again}"
        ) from None
    return Submitted(folder, federation, str(request["number"]))


def at_work(folder: Path) -> bool:
    """True while a process of this machine works at a job; one that was killed does not."""
    try:
        with locked(folder):
            return False
    except RecordError:
        return True


def flwr(federation: kit.Federation, *arguments: str) -> dict[str, Any]:
    """Runs one `flwr` command with JSON output.

    Raises:
        FederationError: It failed; its own words are in the message.
    """
    command = [sys.executable, "-m", "flwr.cli.app", *arguments, "--format", "json"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **federation.env}, timeout=COMMAND_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise FederationError(
            f"`flwr {arguments[0]}` has no answer from {federation.superlink} after {COMMAND_SECONDS} s"
        ) from None
    try:
        told = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        words = " ".join((done.stdout + done.stderr).split())[-500:]
        raise FederationError(
            f"`flwr {arguments[0]}` failed at {federation.superlink or 'a SuperLink that was never started'}: {words}. "
            f"Does it run? {federation.folder}/start"
        ) from None
    if not told.get("success", True):
        said = [line.strip() for line in str(told.get("error-message", "")).splitlines() if line.strip()]
        words = said[-1][:300] if said else "no reason"
        raise FederationError(
            f"`flwr {arguments[0]}` at {federation.superlink}: {words} (Does the server run? {federation.folder}/start)"
        )
    return told


def follow(submitted: Submitted, listen: Listener) -> None:
    """Passes a job's events on until it ends.

    Raises:
        FederationError: The job failed, was stopped, or Flower lost it.
    """
    checked, failures = time.monotonic(), 0
    for event in _events(submitted.folder / EVENTS, submitted.number):
        if event is not None:
            checked = time.monotonic()
            if event["event"] == "end":
                if event["error"]:
                    raise FederationError(event["error"])
                return
            listen(event)
        elif time.monotonic() - checked > CHECK_SECONDS:
            checked = time.monotonic()
            try:
                status, failures = flower_status(submitted), 0
            except FederationError as error:
                failures += 1
                if failures < MOST_FAILURES:
                    continue
                again = f"When it runs again, go on with: umbel run --resume {submitted.folder}"
                raise FederationError(f"{error}. {again}") from None
            if status.startswith("finished") and not _ended(submitted):
                raise FederationError(
                    f"Flower ended the run ({status}) and the job did not: its process was killed, or could not begin. "
                    f"See {submitted.federation.folder}/logs; go on with: umbel run --resume {submitted.folder}"
                )


def _ended(submitted: Submitted) -> bool:
    return any(event["event"] == "end" for event in events(submitted.folder, submitted.number))


def _events(path: Path, number: str) -> Iterator[dict[str, Any] | None]:
    """Yields the events of one submission as they are written, None where there is nothing new for half a second."""
    position = 0
    while True:
        lines: list[bytes] = []
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                lines = file.readlines()
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()  # it is still being written
        position += sum(map(len, lines))
        for line in lines:
            event = json.loads(line)
            if event.get("number") == number:
                yield event
        if not lines:
            yield None
            time.sleep(0.5)


def events(folder: Path, number: str = "") -> list[dict[str, Any]]:
    """Returns a job's events so far, of one submission or of all."""
    path = folder / EVENTS
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    told = [json.loads(line) for line in lines[:-1]]
    return [event for event in told if not number or event.get("number") == number]


def say(event: dict[str, Any]) -> str:
    """Returns one line of a log."""
    when = datetime.fromtimestamp(event.get("time", 0), UTC).strftime("%Y-%m-%d %H:%M:%S")
    kind = event["event"]
    if kind in ("stage", "note"):
        text = event["text"]
    elif kind == "member":
        text = f"run {event['label']} ({event['index'] + 1} of {event['members']})"
    elif kind == "round":
        text = f"round {event['round']} of {event['rounds']}: {_who(event)}, {event['answered']} of {event['clients']}"
    elif kind == "refused":
        text = f"round {event['round']}: refused {_who(event)}: {event['reason']}"
    elif kind == "end":
        text = f"ended: {event['error'] or 'done'}"
    else:
        text = kind
    return f"{when} {text}"


def _who(event: dict[str, Any]) -> str:
    return f"client {event['client']}" + (f" ({event['site']})" if "site" in event else "")


def flower_status(submitted: Submitted) -> str:
    """Returns what Flower says of a run: "pending", "running", "finished:failed" and so on."""
    told = flwr(submitted.federation, "ls", "umbel", "--run-id", submitted.number)
    runs = told.get("runs") or [{}]
    return str(runs[0].get("status") or told.get("error-message") or "unknown")


def _flower_status_or_why(submitted: Submitted) -> str:
    """What Flower says of a run, or that it says nothing: what is in the folder is true all the same."""
    try:
        return flower_status(submitted)
    except FederationError as error:
        return f"unknown: {error}"


def stop(submitted: Submitted) -> None:
    """Ends a run; its finished rounds are kept and `umbel run --resume` goes on with them.

    Raises:
        FederationError: It has ended already, or the SuperLink is not there.
    """
    if _ended(submitted):
        raise FederationError(f"{submitted.folder}: the job has ended already; see: umbel status {submitted.folder}")
    flwr(submitted.federation, "stop", submitted.number, "umbel")


def status(submitted: Submitted) -> dict[str, Any]:
    """Returns what a job has done and who is connected."""
    folder = submitted.folder
    members: dict[str, Any] = {}
    contents = json.loads((folder / "job.json").read_text(encoding="utf-8")) if (folder / "job.json").exists() else {}
    for label, place in contents.get("members", {}).items():
        if not (folder / place / "run.json").exists():
            members[label] = {"state": "waiting", "rounds": 0}
            continue
        record = Record(folder / place)
        lines = record.lines()
        last: Mapping[str, Any] = lines[-1] if lines else {}
        table = tomllib.loads((folder / place / "run.toml").read_text(encoding="utf-8"))
        members[label] = {
            "state": record.info.get("state"),
            "error": record.info.get("error"),
            "rounds": last.get("train_round", 0),
            "of": table["rounds"],
            "answered": last.get("answered", []),
            "refused": last.get("refused", []),
        }
    return {
        "folder": str(folder),
        "flower": _flower_status_or_why(submitted),
        "number": submitted.number,
        "members": members,
        "sites": sites(submitted.federation),
    }


def sites(federation: kit.Federation) -> list[dict[str, Any]]:
    """Returns the sites of a federation and which are connected; all are "unknown" while no server runs here."""
    nodes = deployment.online(federation)
    return [
        {"name": site.name, "number": site.number, "state": site.state}
        | {"status": nodes[site.name].status if site.name in nodes else "unknown"}
        for site in federation.sites
    ]


def is_federated(folder: Path) -> bool:
    """True where a job was given to a federation."""
    return (folder / REQUEST).is_file()


def table_of(folder: Path) -> dict[str, Any]:
    """Returns the configuration of a job that was submitted, whether it began or not."""
    if running.is_job(folder):
        return tomllib.loads((folder / "job.toml").read_text(encoding="utf-8"))
    return json.loads((folder / REQUEST).read_text(encoding="utf-8"))["table"]


def is_done(folder: Path) -> bool:
    """True where every run of a job has ended well."""
    if not running.is_job(folder) or not (folder / "job.json").exists():
        return False
    places = json.loads((folder / "job.json").read_text(encoding="utf-8"))["members"].values()
    return all(Record(folder / place).info.get("state") == "done" for place in places)
