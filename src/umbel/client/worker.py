"""A site's worker: a process that keeps the base model in memory from one request to the next.

Flower starts a fresh process for every message. That process only passes bytes on, through a socket that nobody but this
user can open; where no worker runs, it does the work itself. Nothing here imports torch until there is work.
"""

import json
import os
import secrets
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping
from multiprocessing import AuthenticationError, connection
from pathlib import Path
from typing import Any

ADDRESS = "worker.json"
"""In the site's folder `state`: where the worker listens, and what it must be told first."""

IDLE_SECONDS = 900
"""After which a worker without requests lets its model go."""


FAILED = "umbel failed: "
"""Begins the line of a worker's output that `umbel site start` shows on its console."""

MOST_SECONDS = 86_400
"""For an answer of the worker, where the job does not say when the server stops waiting."""


def answer(folder: Path, job: Mapping[str, Any], payload: bytes) -> tuple[bytes, str]:
    """Returns a site's reply to a request, or the reason why there is none; one of the two is empty.

    Args:
        folder: The site's.
        job: See `umbel.client.site.Job`.
        payload: The request.
    """
    try:
        with _connect(folder) as link:
            link.send_bytes(json.dumps(job).encode())
            link.send_bytes(payload)
            seconds = job.get("seconds")
            if not link.poll(seconds if isinstance(seconds, (int, float)) else MOST_SECONDS):
                return b"", f"the site's worker has no answer after {seconds} seconds"
            return link.recv_bytes(), link.recv_bytes().decode()
    except (OSError, EOFError, ValueError, AuthenticationError):
        # No worker, or it was killed while it worked; what it had not made durable is done again.
        return answer_here(_load(folder), job, payload)


def serve(folder: Path) -> None:
    """Answers requests until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    worker = _load(folder)
    with tempfile.TemporaryDirectory(prefix="umbel-") as place:
        path, key = f"{place}/worker", secrets.token_bytes(32)
        with connection.Listener(path, "AF_UNIX", authkey=key) as listener:
            _write_address(folder, path, key)
            while True:
                if not connection.wait([listener._listener._socket], IDLE_SECONDS):  # type: ignore[attr-defined]
                    worker.let_go()
                    continue
                try:
                    with listener.accept() as link:
                        reply, error = answer_here(worker, json.loads(link.recv_bytes()), link.recv_bytes())
                        link.send_bytes(reply)
                        link.send_bytes(error.encode())
                except (OSError, EOFError, AuthenticationError):
                    continue  # whoever asked has gone


def answer_here(worker: Any, job: Mapping[str, Any], payload: bytes) -> tuple[bytes, str]:
    """Returns what `answer` does, from a worker of this process (`umbel.client.site.Worker`)."""
    from umbel.engine.reasons import reason

    try:
        return worker.answer(job, payload), ""
    except Exception as error:
        # The traceback stays here; the operator gets type, message and place, without this site's data.
        traceback.print_exc()
        print(f"{FAILED}{type(error).__name__}: {error}", flush=True)
        return b"", reason(error)


def _load(folder: Path) -> Any:
    from umbel import kit
    from umbel.client.site import Site, Worker

    own = kit.read_site(folder)
    return Worker(Site.of(folder, own))


def _connect(folder: Path) -> connection.Connection:
    told = json.loads((folder / "state" / ADDRESS).read_text(encoding="utf-8"))
    return connection.Client(told["socket"], "AF_UNIX", authkey=bytes.fromhex(told["key"]))  # type: ignore[return-value]


def _write_address(folder: Path, path: str, key: bytes) -> None:
    place = folder / "state" / ADDRESS
    temporary = place.with_suffix(".partial")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump({"socket": path, "key": key.hex()}, file)
    temporary.replace(place)


if __name__ == "__main__":
    # The module by its name, as everybody else imports it, not its copy that runs here.
    from umbel.client import worker

    worker.serve(Path(sys.argv[1]))
