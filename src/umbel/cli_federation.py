"""The commands of a federation across machines: kits, the server, a site."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

BAD_INPUT, FAILED = 2, 1
"""Exit codes: the user's input is wrong; what was started could not go on."""

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
        if kind not in ("KitError", "DeploymentError", "Unreachable", "ApiError") and not isinstance(error, OSError):
            raise
        typer.echo(f"umbel: {error}", err=True)
        raise typer.Exit(BAD_INPUT if kind == "KitError" else FAILED) from None


def _say(line: str) -> None:
    # Flushed by echo, so that a supervisor's log has it at once.
    typer.echo(line)


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
