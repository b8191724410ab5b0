"""The commands of a federation across machines: kits, the server, a site."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes: the user's input is wrong; what was started could not go on; Ctrl-C."""

WRONG_INPUT = ("KitError", "ConfigError", "EnvelopeError", "RecordError")
"""Exceptions of ours that the user can do something about."""

kit_app = typer.Typer(help="Make and change kits: one folder per party, with its certificate or key.", no_args_is_help=True)
server_app = typer.Typer(help="The server of a federation.", no_args_is_help=True)
site_app = typer.Typer(help="A site of a federation.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The site's name, e.g. hospital-a.")]
KitFolder = Annotated[Path, typer.Option("--kit", help="The kit's folder, which has server/ inside.")]
PublicKey = Annotated[
    Path | None, typer.Option(help="The site.pub that the site made with `umbel site key`; its private key then stays there.")
]


@kit_app.command()
def init(
    server: Annotated[str, typer.Option(metavar="HOST[:PORT]", help="The address that sites dial; port 9092 if not given.")],
    sites: Annotated[str, typer.Option(metavar="NAME,NAME,…", help="The sites' names.")],
    out: Annotated[Path, typer.Option(help="The new folder.")] = Path("kit"),
) -> None:
    """Make a kit: a CA, the server's folder, and a folder with a key pair for each site."""
    with _told():
        from umbel import kit

        federation = kit.init(out, server, [name.strip() for name in sites.split(",") if name.strip()])
        typer.echo(f"Server: {out / 'server'} for {federation.server}")
        for site in federation.sites:
            typer.echo(f"Site {site.number}: {out / site.name}  {site.fingerprint}")
        typer.echo(
            f"Keep {out / 'ca'} offline; give every site its own folder and nothing else, over a channel that you trust."
        )


@kit_app.command()
def join(name: Name, public_key: PublicKey = None, kit_folder: KitFolder = Path("kit")) -> None:
    """Add a site; a running server lets it in at once."""
    with _told():
        from umbel import kit

        site = kit.join(kit_folder, name, public_key)
        typer.echo(f"Site {site.number}: {kit_folder / name}  {site.fingerprint}{_where(public_key)}")
        _settle(kit_folder)


@kit_app.command()
def rotate(name: Name, public_key: PublicKey = None, kit_folder: KitFolder = Path("kit")) -> None:
    """Give a site a new key; the old one is refused at once."""
    with _told():
        from umbel import kit

        site = kit.rotate(kit_folder, name, public_key)
        typer.echo(f"Site {site.number}: new key {site.fingerprint}{_where(public_key)}")
        if public_key is None:
            typer.echo(f"Give the site {kit_folder / name / 'site.key'} and site.pub.")
        _settle(kit_folder)


@kit_app.command()
def revoke(name: Name, kit_folder: KitFolder = Path("kit")) -> None:
    """Shut a site out for ever; a running server does at once."""
    with _told():
        from umbel import kit

        site = kit.revoke(kit_folder, name)
        typer.echo(f"Site {site.number}: {name} is revoked")
        _settle(kit_folder)


@kit_app.command()
def renew(
    server: Annotated[str | None, typer.Option(metavar="HOST[:PORT]", help="Another address for the server.")] = None,
    kit_folder: KitFolder = Path("kit"),
) -> None:
    """Issue the server's certificates anew from the same CA; sites change nothing. Needs the folder ca/."""
    with _told():
        from umbel import kit

        end = kit.renew(kit_folder, server)
        typer.echo(
            f"Valid until {end:%Y-%m-%d}: {kit_folder / 'server'}. Bring it to the server's machine and start the server again."
        )
        if server is not None:
            typer.echo(f"Every site's site.toml needs the new address: server = {kit.read(kit_folder / 'server').server!r}")


@kit_app.command()
def ls(kit_folder: KitFolder = Path("kit"), as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """List the sites: number, state, key; and whether they are online, where the server runs on this machine."""
    with _told():
        from umbel import deployment, kit

        federation = kit.read(kit_folder / "server")
        nodes = deployment.online(federation)
        rows: list[dict[str, Any]] = []
        for site in federation.sites:
            node = nodes.get(site.name)
            rows.append({"name": site.name, "number": site.number, "state": site.state, "fingerprint": site.fingerprint})
            rows[-1] |= {"node": node and node.node_id, "status": node and node.status}
        if as_json:
            typer.echo(json.dumps({"server": federation.server, "sites": rows}))
            return
        typer.echo(f"server  {federation.server}")
        for row in rows:
            status = f"  {row['status']}" if row["status"] else ""
            typer.echo(f"{row['number']:>6}  {row['name']:<20} {row['state']:<8} {row['fingerprint']}{status}")


@server_app.command(name="start")
def start_server(folder: Annotated[Path, typer.Argument(help="The kit's folder server/.")]) -> None:
    """Run the server: Flower's SuperLink on loopback, a TLS proxy in front that passes only what sites need. Ends on Ctrl-C."""
    with _told():
        from umbel import deployment

        deployment.start_server(folder, _say)


@site_app.command(name="start")
def start_site(
    folder: Annotated[Path, typer.Argument(help="The site's folder of the kit.")],
    data: Annotated[str | None, typer.Option(metavar="FILE", help="The site's rows; `run`: those of the run file.")] = None,
    test: Annotated[str | None, typer.Option(metavar="FILE", help="Rows to score on.")] = None,
    model: Annotated[str | None, typer.Option(metavar="PATH", help="The base model here, if not as the run names it.")] = None,
) -> None:
    """Run a site: it dials out, nothing listens. Options are noted, so that a restart needs none. Ends on Ctrl-C."""
    with _told():
        from umbel import deployment

        given = {"data": data, "test": test, "model": model}
        deployment.start_site(folder, _say, **{key: value for key, value in given.items() if value is not None})


@site_app.command(name="key")
def make_key(out: Annotated[Path, typer.Option(help="The folder that gets site.key and site.pub.")]) -> None:
    """Make a site's key pair at the site, so that its private key never travels; send the operator site.pub."""
    with _told():
        from umbel import kit

        typer.echo(kit.make_key(out))
        typer.echo(
            f"Send {out / 'site.pub'} to the operator, and the line above by another way; {out / 'site.key'} stays here."
        )


@server_app.command(name="import")
def import_replies(
    server: Annotated[Path, typer.Argument(help="The kit's folder server/.")],
    folder: Annotated[Path, typer.Argument(help="The folder that `umbel run --engine files` named.")],
    files: Annotated[list[Path] | None, typer.Argument(metavar="REPLY…", help="Files that `umbel site export` made.")] = None,
    close: Annotated[bool, typer.Option("--close", help="Go on without those who are still missing; quorum holds.")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Take replies that were carried here; when nobody is missing the run goes on until it has to wait again, or is done."""
    with _told():
        from umbel import offline

        taken = offline.take(folder, server, files or [])
        for own in taken:
            typer.echo(
                f"{own.file}: {own.state}{f' from {own.site}' if own.site else ''}{own.reason and f': {own.reason}'}", err=True
            )
        if close:
            tell_closed(offline.close(folder))
        files_told = [{"file": str(own.file), "site": own.site, "state": own.state, "reason": own.reason} for own in taken]
        carry(lambda: offline.go_on(folder, _events, server), folder, as_json, {"files": files_told})
        if any(own.state == "refused" for own in taken):
            raise typer.Exit(BAD_INPUT)


@site_app.command(name="export")
def export_reply(
    folder: Annotated[Path, typer.Argument(help="The site's folder of the kit.")],
    file: Annotated[Path, typer.Argument(metavar="REQUEST", help="The file that was brought from the server.")],
    out: Annotated[Path, typer.Option(help="The reply, to be carried back.")],
    data: Annotated[str | None, typer.Option(metavar="FILE", help="The site's rows; `run`: those of the run file.")] = None,
    test: Annotated[str | None, typer.Option(metavar="FILE", help="Rows to score on.")] = None,
    model: Annotated[str | None, typer.Option(metavar="PATH", help="The base model here, if not as the run names it.")] = None,
) -> None:
    """Answer one request without any network: check its signature, train, sign the reply. Options are noted for the next."""
    with _told():
        from umbel import deployment, kit, offline

        given = {key: value for key, value in (("data", data), ("test", test), ("model", model)) if value is not None}
        kept = {key: kit.placed(key, value, Path.cwd()) for key, value in given.items()}
        for key, value in kept.items():
            deployment.check_option(key, value)
        if kept:
            kit.update_site(folder, **kept)
        head = offline.answer(folder, file, out, _steps)
        what = f"round {head.round} ({head.kind}) of {head.member}, run {head.run}"
        typer.echo(f"{out}: the reply of {head.sender} to {what}, {head.length} bytes. Carry it to the server.")


def carry(go: Callable[[], Path], folder: Path, as_json: bool, told: Mapping[str, Any] | None = None) -> None:
    """Lets a run go as far as it can, and says what is to be carried where, or where the result is; JSON gets `told` too."""
    from umbel import report
    from umbel.engine import Waiting

    try:
        go()
    except KeyboardInterrupt:
        typer.echo(f"Stopped. Finished rounds and imported replies are kept; go on with: umbel run --resume {folder}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except Waiting as waiting:
        if as_json:
            typer.echo(json.dumps({"state": "waiting", "asked": waiting.asked, **(told or {})}))
        else:
            tell_waiting(folder, waiting.asked)
        return
    job = report.read_job(folder)
    page = report.write_html([job], folder / "report.html")
    if as_json:
        typer.echo(json.dumps({"state": "done", **(told or {}), **report.as_json([job])}))
        return
    contents = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    typer.echo("Done; nobody is waited for.")
    for label in contents["methods"]:
        typer.echo(f"Adapter of {label}: {folder / contents['members'][label] / 'adapter'}")
    typer.echo(f"Report: {page}")


def tell_waiting(folder: Path, asked: list[dict[str, Any]]) -> None:
    """Prints who is here, who is missing, and what to carry to whom."""
    rows = [("site", "state", "round", "request to carry there")]
    for own in asked:
        path = str(folder / own["request"]) if "request" in own and own["state"] in ("missing", "may join") else ""
        state = own["state"] + (f" ({own['reason']})" if "reason" in own else "")
        rows.append((own["site"], state, f"{own['round']} {own['run']}" if "round" in own else "", path))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        typer.echo("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]).rstrip())
    typer.echo("At a site:    umbel site export SITE_FOLDER REQUEST --out REPLY")
    typer.echo(f"Back here:    umbel server import SERVER_FOLDER {folder} REPLY …")
    typer.echo(f"Without them: umbel run --resume {folder} --close")


def tell_closed(names: list[str]) -> None:
    """Says without whom the round goes on."""
    typer.echo(f"The round goes on without {', '.join(names)}." if names else "Nobody was missing.", err=True)


# What the commands share


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turns what the user can do something about into one line and an exit code; anything else is a bug."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "cryptography":
            raise
        typer.echo(
            "umbel: cryptography is missing; install umbel with its federation extra: pip install 'umbel[federation]'", err=True
        )
        raise typer.Exit(FAILED) from None
    except Exception as error:
        kind = type(error).__name__
        if not type(error).__module__.startswith("umbel.") and not isinstance(error, OSError):
            raise
        typer.echo(f"umbel: {error}", err=True)
        raise typer.Exit(BAD_INPUT if kind in WRONG_INPUT else FAILED) from None


def _say(line: str) -> None:
    # Flushed by echo, so that a supervisor's log has it at once.
    typer.echo(line)


def _events(event: dict[str, Any]) -> None:
    """Says on stderr what a run does."""
    if event["event"] in ("stage", "note"):
        typer.echo(event["text"], err=True)
    elif event["event"] == "round":
        typer.echo(
            f"round {event['round']} of {event['rounds']}: {event['answered']} of {event['clients']} folded in", err=True
        )


def _steps(client: int, step: int, steps: int) -> None:
    if step == steps:
        typer.echo(f"trained {steps} steps", err=True)


def _settle(kit_folder: Path) -> None:
    """Says when a change holds: now, where the server runs on this machine, else at its next start."""
    from umbel import deployment, kit

    federation = kit.read(kit_folder / "server")
    if deployment.running(federation):
        deployment.wait_until_settled(federation)
        typer.echo("The running server has taken it over.")
    else:
        typer.echo("No server runs here; it holds from the next `umbel server start` (bring sites.json where the server runs).")


def _where(public_key: Path | None) -> str:
    return "" if public_key is None else "  (its private key stays at the site)"
