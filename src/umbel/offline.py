"""Runs without any network: at the server begin, take replies, go on; at a site answer one request.

Every start of a run goes as far as the replies in its folder let it and ends; nothing listens and nothing waits.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from umbel import config as configuration
from umbel import envelope as envelopes
from umbel import kit
from umbel import run as running
from umbel.client.site import Site, Worker
from umbel.config import ConfigError
from umbel.engine.files import CLOSED, INBOX, OUTBOX, Files, Request, check_reply, own_key, requests_in
from umbel.envelope import SERVER, Envelope, EnvelopeError, Head
from umbel.record import RecordError, locked, write_json
from umbel.run import Listener, Network

MARK = "offline.json"


@dataclass(frozen=True)
class Taken:
    """What became of one file that was brought.

    Args:
        file: It.
        site: Who signed it; "" where nobody of this federation did.
        state: "taken", "here already", or "refused".
        reason: Why it was refused.
    """

    file: Path
    site: str
    state: str
    reason: str = ""


# At the server


def begin(table: dict[str, Any], folder: Path, server: Path, listen: Listener = lambda event: None) -> Path:
    """Begins a run whose requests and replies are carried.

    Args:
        table: A configuration (see `umbel.config`).
        folder: Of the job.
        server: The kit's server folder.
        listen: Called with events, for progress.

    Returns:
        The folder, once everything is done.

    Raises:
        Waiting: Requests were written and must be carried to their sites; always, since nobody has answered yet.
        KitError: `server` is no kit's.
    """
    federation = kit.read(server)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MARK, {"federation": str(federation.folder)})
    return _run(table, folder, federation, listen)


def go_on(folder: Path, listen: Listener = lambda event: None, server: Path | None = None) -> Path:
    """Goes on as far as the replies allow; `server` where the kit's server folder has moved.

    Raises:
        Waiting: More have to be brought.
        RecordError: There is no such run in the folder.
    """
    federation = kit.read(server or federation_of(folder))
    if not running.is_job(folder):
        raise RecordError(f"{folder}: the run was stopped before it began; give its file again: umbel run FILE --out {folder}")
    if server is not None:
        _check_ours(folder, federation)
        write_json(folder / MARK, {"federation": str(federation.folder)})
    return _run(configuration.read(folder / "job.toml"), folder, federation, listen)


def _run(table: dict[str, Any], folder: Path, federation: kit.Federation, listen: Listener) -> Path:
    active = [site.number for site in federation.sites if site.state == kit.ACTIVE]
    if not active:
        raise kit.KitError(f"{federation.folder}: no site is active; add one: umbel kit join NAME")

    def engine(job: dict[str, Any], deadline: float) -> Files:
        # People have no deadline; `close` ends a round without those who do not come.
        return Files(folder, federation, job)

    running.run(table, folder, listen, network=Network(sorted(active), engine))
    for carried in (OUTBOX, INBOX):
        shutil.rmtree(folder / carried, ignore_errors=True)
    return folder


def take(folder: Path, server: Path, files: list[Path]) -> list[Taken]:
    """Checks replies that were brought and keeps the good ones, on the disk, before it returns.

    Raises:
        RecordError: There is no such run in the folder, or another process is at work in it.
        KitError: `server` is no kit's, or not this run's.
    """
    federation = kit.read(server)
    federation_of(folder)
    _check_ours(folder, federation)
    with locked(folder):
        return [_take(folder, federation, file) for file in files]


def close(folder: Path) -> list[str]:
    """Lets the present round go on without those whose replies are not here; returns their names.

    Quorum holds (`server.min_clients`): with too few left the run stops, and a reply that is brought later still counts.
    """
    federation = kit.read(federation_of(folder))
    closed: list[str] = []
    with locked(folder):
        for request in requests_in(folder, own_key(federation.folder)):
            head = request.envelope.head
            joining = head.kind == "open" and head.round > 0  # nobody waits for it
            if not request.closed and not joining and not request.reply.exists():
                path = request.envelope.path
                path.rename(path.with_suffix(CLOSED))
                closed.append(request.site)
    return closed


def waiting(folder: Path) -> list[dict[str, Any]]:
    """Returns per request of the present round who is here and who is missing (see `Waiting`); nothing where none is."""
    asked: list[dict[str, Any]] = []
    contents = json.loads((folder / "job.json").read_text(encoding="utf-8")) if (folder / "job.json").exists() else {}
    for place in contents.get("members", {}).values():
        path = folder / place / "run.json"
        info = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        asked += info.get("waiting", []) if info.get("state") == "waiting" else []
    return asked


def is_offline(folder: Path) -> bool:
    """True where a run's requests and replies are carried."""
    return (folder / MARK).is_file()


def federation_of(folder: Path) -> Path:
    """Returns the kit's server folder of a run whose requests and replies are carried.

    Raises:
        RecordError: There is no such run in the folder.
    """
    if not is_offline(folder):
        raise RecordError(f"{folder} holds no run that began with --engine files; give the folder that `umbel run` named")
    return Path(json.loads((folder / MARK).read_text(encoding="utf-8"))["federation"])


def _check_ours(folder: Path, federation: kit.Federation) -> None:
    """Refuses a kit whose key did not sign the requests that are out."""
    files = [path for path in (folder / OUTBOX).glob("*/*") if not path.name.startswith(".")]
    if files and not requests_in(folder, own_key(federation.folder)):
        raise kit.KitError(f"{federation.folder} is not the kit of {folder}; its own was {federation_of(folder)}")


def _take(folder: Path, federation: kit.Federation, file: Path) -> Taken:
    sites = {site.fingerprint: site for site in federation.sites}
    name = ""
    try:
        reply = envelopes.look(file, {own: site.public_key for own, site in sites.items()})
        site = sites[reply.signer]
        name = site.name
        if site.state != kit.ACTIVE:
            raise EnvelopeError(f"{file}: signed by site {name!r}, which is revoked")
        request = _asked(folder, federation, reply, name)
        check_reply(reply, request)
        if _is_here(request, reply, site):
            return Taken(file, name, "here already")
        envelopes.copy(reply, request.envelope.head.most_bytes, request.reply)
    except EnvelopeError as error:
        return Taken(file, name, "refused", str(error).removeprefix(f"{file}: "))
    except OSError as error:
        return Taken(file, name, "refused", f"cannot be read: {error.strerror}")
    return Taken(file, name, "taken")


def _asked(folder: Path, federation: kit.Federation, reply: Envelope, site: str) -> Request:
    """Returns the request in the outbox that a reply names."""
    requests = requests_in(folder, own_key(federation.folder), site)
    for request in requests:
        if request.envelope.digest == reply.head.reply_to:
            return request
    head, file = reply.head, reply.path
    run = json.loads((folder / "job.json").read_text(encoding="utf-8"))["id"] if running.is_job(folder) else ""
    if head.sender == SERVER or not head.reply_to:
        raise EnvelopeError(f"{file}: a request, expected: a reply, which `umbel site export` makes")
    if head.run != run:
        raise EnvelopeError(f"{file}: of run {head.run}, this is run {run}")
    if not requests:
        raise EnvelopeError(f"{file}: for round {head.round} of {head.member!r}, but nothing is asked of site {site!r} now")
    nearest = next((own for own in requests if own.envelope.head.member == head.member), requests[0]).envelope
    asked = nearest.head
    if (head.member, head.round, head.kind) != (asked.member, asked.round, asked.kind):
        raise EnvelopeError(
            f"{file}: for round {head.round} ({head.kind}) of {head.member!r}, "
            f"asked now is round {asked.round} ({asked.kind}) of {asked.member!r}"
        )
    raise EnvelopeError(f"{file}: to request {head.reply_to[:16]}…, asked now is {nearest.digest[:16]}… ({nearest.path.name})")


def _is_here(request: Request, reply: Envelope, site: kit.Site) -> bool:
    """True where the same reply was imported; another one to the same request is refused, a damaged one replaced."""
    if not request.reply.exists():
        return False
    try:
        before = envelopes.look(request.reply, {site.fingerprint: site.public_key})
        check_reply(before, request)
    except EnvelopeError:
        return False
    if before.digest != reply.digest:
        raise EnvelopeError(
            f"{reply.path}: another reply to a request that is answered; imported was sha256 {before.head.sha256[:16]}…, "
            f"this has {reply.head.sha256[:16]}…. The first one counts"
        )
    return True


# At a site


def answer(folder: Path, file: Path, out: Path, on_step: Callable[[int, int, int], None] = lambda *_: None) -> Head:
    """Answers one request; the same one again gets the same reply, without training again.

    Args:
        folder: The site's of the kit. What is kept between requests is in its folder `state`, as over a network.
        file: The request.
        out: Where the reply goes.
        on_step: Called with (client, step, steps).

    Returns:
        The reply's head.

    Raises:
        EnvelopeError: The request is not the server's, not for this site, damaged, or older than one answered before.
        ConfigError: It asks for what this site does not allow, or the site has no rows.
        KitError: `folder` is no site's.
    """
    settings = kit.read_site(folder)
    request = envelopes.look(file, own_key(folder))
    head = request.head
    if head.sender != SERVER or head.reply_to:
        raise EnvelopeError(f"{file}: from {head.sender!r:.80}, expected: a request of the server")
    if head.to != settings.name:
        raise EnvelopeError(f"{file}: for site {head.to!r:.80}, this is {settings.name!r}")
    if out.resolve() == file.resolve():
        raise EnvelopeError(f"{out}: is the request itself; give another file for the reply")
    key, public = kit.read_private_key(folder / "site.key"), own_public(folder)
    kept = folder / "state" / head.run / head.member / "reply.umbel"
    before = _before(kept, public)
    if before is not None and before.head.reply_to == request.digest:
        envelopes.copy(before, before.head.length, out)
        return before.head
    if before is not None and head.round < before.head.round:
        raise EnvelopeError(
            f"{file}: of round {head.round}, this site has answered round {before.head.round} of this run; bring the newest one"
        )
    if not settings.data:
        raise ConfigError(f"{folder / 'site.toml'}: data is not set; give --data FILE, or --data run for the run's own rows")
    payload = envelopes.read(request, head.length)
    job = {**head.job, "run": head.run, "member": head.member}
    reply = Worker(Site.of(folder, settings), on_step).answer(job, payload)
    if len(reply) > head.most_bytes:
        raise EnvelopeError(f"{file}: the reply has {len(reply)} bytes, the server allows {head.most_bytes}")
    said = replace(
        head,
        sender=settings.name,
        to=SERVER,
        length=len(reply),
        sha256=hashlib.sha256(reply).hexdigest(),
        reply_to=request.digest,
        most_bytes=0,
        job={},
    )
    envelopes.write(kept, said, reply, key)
    envelopes.copy(envelopes.look(kept, public), len(reply), out)
    return said


def own_public(folder: Path) -> dict[str, str]:
    """Returns a site's public key by its fingerprint; it is made from the private one, which is what signs."""
    text = kit.public_text(kit.read_private_key(folder / "site.key").public_key())
    return {kit.fingerprint(text): text}


def _before(kept: Path, public: dict[str, str]) -> Envelope | None:
    """Returns the site's last reply of a run; None where there is none, or one of an older key, which has to be made anew."""
    try:
        return envelopes.look(kept, public)
    except (FileNotFoundError, EnvelopeError):
        return None
