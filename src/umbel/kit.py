"""Kits: one folder per party with its certificate or key, and the list of the sites. Files only; nothing runs here.

Identity is a key pair. A kit depends on no version of the software and holds no path, so that a folder can be packed and moved.
"""

import base64
import fcntl
import functools
import hashlib
import ipaddress
import json
import os
import re
import stat
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DEFAULT_PORT = 9092
CA_YEARS, SERVER_YEARS = 10, 2
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ACTIVE, REVOKED = "active", "revoked"
RUN_ROWS = "run"
"""What `data` of a site says when its rows are those that the run file itself gives to it."""


class KitError(RuntimeError):
    """A kit that cannot be made, changed or read; says what to do."""


@dataclass(frozen=True)
class Site:
    """A site as the server knows it. `public_key` is OpenSSH text, `fingerprint` what `ssh-keygen -l` prints of it."""

    name: str
    number: int
    public_key: str
    fingerprint: str
    state: str

    @cached_property
    def key_bytes(self) -> bytes:
        """The public key as Flower keeps it (`NodeInfo.public_key`): PEM, SubjectPublicKeyInfo."""
        return flower_bytes(read_public_key(self.public_key, f"site {self.name!r}"))


@dataclass(frozen=True)
class Federation:
    """A server's folder. `server` is the public host:port, `superlink` the loopback one ("" before the first start)."""

    folder: Path
    server: str
    port: int
    superlink: str
    ca: Path
    sites: tuple[Site, ...]

    @property
    def env(self) -> dict[str, str]:
        """What the environment of Flower's commands needs besides our own, for `os.environ | federation.env`."""
        return flower_env(self.folder)

    def site(self, name: str) -> Site:
        """Returns a site by its name; KitError where there is none."""
        for site in self.sites:
            if site.name == name:
                return site
        known = ", ".join(site.name for site in self.sites) or "none"
        raise KitError(f"{self.folder}: no site is called {name!r}; there are {known}")


@dataclass(frozen=True)
class SiteConfig:
    """A site's `site.toml`. Paths are absolute once read; `data` may be "run", `model` "" (as the run names it)."""

    name: str
    number: int
    server: str
    data: str = ""
    test: str = ""
    model: str = ""
    allow_code_execution: bool = False
    methods: tuple[str, ...] = ()
    public: str = ""
    total_epsilon: float = 0.0
    secure_aggregation: bool = False


# Making and changing kits


def _alone(change: Callable[..., Site]) -> Callable[..., Site]:
    """Has one process at a time change a kit's sites; a second one is refused."""

    @functools.wraps(change)
    def alone(kit: Path, *arguments: Any, **options: Any) -> Site:
        read(kit / "server")
        with (kit / "server" / ".changing").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise KitError(f"{kit}: another `umbel kit` command is changing it; try again when it has ended") from None
            return change(kit, *arguments, **options)

    return alone


def init(out: Path, server: str, names: list[str]) -> Federation:
    """Makes a kit: `out`/ca, `out`/server and a folder per site. `server` is host or host:port, as sites dial it.

    Refuses a folder that is not empty, names that are no names, and names given twice.
    """
    host, port = host_and_port(server)
    for name in names:
        _check_name(name)
        if names.count(name) > 1:
            raise KitError(f"--sites: {name!r} is given twice; names are who is who")
    if out.exists() and any(out.iterdir()):
        raise KitError(f"{out} is not empty; a kit is never overwritten. Add sites by `umbel kit join`, or give another --out")
    _folder(out)
    ca_key = ec.generate_private_key(ec.SECP384R1())
    ca = _ca_certificate(ca_key, host)
    _folder(out / "ca")
    _write_private(out / "ca" / "ca.key", _pem(ca_key))
    write_file(out / "ca" / "ca.crt", _certificate_pem(ca), 0o644)
    folder = _folder(out / "server")
    write_file(folder / "ca.crt", _certificate_pem(ca), 0o644)
    write_file(folder / "federation.toml", _federation_toml(f"{_bracketed(host)}:{port}", port), 0o644)
    _issue(folder, "server", [host], ca_key, ca)
    _issue(folder, "loopback", list(LOOPBACK), ca_key, ca)
    _key_pair(folder, "signing")
    _write_sites(folder, ())
    write_file(folder / "start", _start_script("server").encode(), 0o755)
    for name in names:
        join(out, name)
    return read(folder)


@_alone
def join(kit: Path, name: str, public_key: Path | None = None) -> Site:
    """Adds a site to `kit`/server/sites.json and makes its folder, without a key where it sends its public one."""
    _check_name(name)
    federation = read(kit / "server")
    for site in federation.sites:
        if site.name == name and site.state == REVOKED:
            raise KitError(f"{kit}: site {name!r} was revoked, which is for ever; choose another name")
        if site.name == name:
            raise KitError(f"{kit}: a site called {name!r} is there; a new key for it: `umbel kit rotate {name}`")
    folder = kit / name
    if folder.exists() and any(folder.iterdir()):
        raise KitError(f"{folder} is not empty; a kit is never overwritten. Move it away, or choose another name")
    number = max((site.number for site in federation.sites), default=-1) + 1
    _site_folder(federation, folder, name, number)
    site = _with_key(federation, folder, Site(name, number, "", "", ACTIVE), public_key)
    _write_sites(federation.folder, (*federation.sites, site))
    return site


@_alone
def rotate(kit: Path, name: str, public_key: Path | None = None) -> Site:
    """Gives a site a new key pair, or takes the public key of one that it made itself; the old key is refused from then on."""
    federation = read(kit / "server")
    site = federation.site(name)
    if site.state == REVOKED:
        raise KitError(f"site {name!r} is revoked, which is for ever; let it join under another name: `umbel kit join`")
    folder = kit / name
    if not folder.exists():
        _site_folder(federation, folder, name, site.number)
    site = _with_key(federation, folder, site, public_key)
    _write_sites(federation.folder, tuple(site if old.name == name else old for old in federation.sites))
    return site


@_alone
def revoke(kit: Path, name: str) -> Site:
    """Shuts a site out for ever. Its number stays its own."""
    federation = read(kit / "server")
    site = replace(federation.site(name), state=REVOKED)
    _write_sites(federation.folder, tuple(site if old.name == name else old for old in federation.sites))
    return site


def renew(kit: Path, server: str | None = None) -> datetime:
    """Issues the server's certificates anew from the same CA, for another address where one is given; returns when they end."""
    federation = read(kit / "server")
    key_file = kit / "ca" / "ca.key"
    if not key_file.exists():
        raise KitError(f"{key_file} is missing; renewing needs the CA's key, which the operator keeps: put the folder ca/ back")
    check_private(key_file)
    ca_key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
    ca = read_certificate(kit / "ca" / "ca.crt")
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey) or ca_key.public_key() != ca.public_key():
        raise KitError(f"{key_file} is not the key of {kit / 'ca' / 'ca.crt'}; put back the ones that `umbel kit init` made")
    host, port = host_and_port(server or federation.server)
    if server is not None:
        write_file(federation.folder / "federation.toml", _federation_toml(f"{_bracketed(host)}:{port}", port), 0o644)
    _issue(federation.folder, "loopback", list(LOOPBACK), ca_key, ca)
    return _issue(federation.folder, "server", [host], ca_key, ca)


def make_key(out: Path) -> str:
    """Makes a site's key pair where it will be used, so that the private key never travels; returns the fingerprint."""
    if (out / "site.key").exists():
        raise KitError(f"{out / 'site.key'} is there; a key is never overwritten. Give another --out")
    _folder(out)
    return fingerprint(_key_pair(out, "site"))


# Reading kits


def read(folder: Path) -> Federation:
    """Reads a server's folder (`kit/server`); KitError where it is none."""
    folder = folder.resolve()
    table = _toml(folder / "federation.toml", "the folder `server` of a kit that `umbel kit init` made")
    host, port = host_and_port(str(table.get("server", "")))
    listen = table.get("port", port)
    if not isinstance(listen, int) or not 0 < listen < 65536:
        raise KitError(f"{folder / 'federation.toml'}: port must be from 1 to 65535, got {listen!r}")
    return Federation(folder, f"{_bracketed(host)}:{port}", listen, _superlink(folder), folder / "ca.crt", _sites(folder))


def read_site(folder: Path) -> SiteConfig:
    """Reads a site's folder (`kit/<site>`); relative paths are taken from the folder, `pkg:` stays as it is."""
    folder = folder.resolve()
    path = folder / "site.toml"
    table = _toml(path, "the folder of a site that `umbel kit init` or `umbel kit join` made")
    kinds: dict[str, type] = {"name": str, "number": int, "server": str, "data": str, "test": str, "model": str}
    kinds |= {"allow_code_execution": bool, "methods": list, "public": str, "total_epsilon": float}
    kinds |= {"secure_aggregation": bool}
    if type(table.get("total_epsilon")) is int:
        table["total_epsilon"] = float(table["total_epsilon"])
    for key, value in table.items():
        if key not in kinds:
            raise KitError(f"{path}: no key is called {key!r}; known: {', '.join(kinds)}")
        if type(value) is not kinds[key] or (key == "methods" and not all(isinstance(name, str) for name in value)):
            raise KitError(f"{path}: {key} must be {_KINDS[kinds[key]]}, got {value!r}")
    if not 0 <= table.get("total_epsilon", 0.0) < float("inf"):
        raise KitError(f"{path}: total_epsilon must be 0 or more, got {table['total_epsilon']}")
    missing = [key for key in ("name", "number", "server") if key not in table]
    if missing:
        raise KitError(f"{path}: {', '.join(missing)} is missing; take the folder that the operator made")
    for key in ("data", "test", "model", "public"):
        if table.get(key):
            table[key] = placed(key, table[key], folder)
    table["methods"] = tuple(table.get("methods", ()))
    return SiteConfig(**table)


def placed(key: str, value: str, folder: Path) -> str:
    """Returns the absolute path that a value of `data`, `test` or `model` stands for; "run", `pkg:` and "" stay as they are."""
    special = not value or value.startswith("pkg:") or (key == "data" and value == RUN_ROWS)
    return value if special else str(folder / Path(value).expanduser())


_KINDS = {str: "text", int: "a whole number", bool: "true or false", float: "a number", list: "a list of dotted names"}


def write_site(folder: Path, config: SiteConfig) -> None:
    """Writes a site's `site.toml`, whole or not at all."""
    write_file(folder / "site.toml", tomli_w.dumps(asdict(config) | {"methods": list(config.methods)}).encode(), 0o600)


def update_site(folder: Path, **changes: str) -> SiteConfig:
    """Notes options in a site's `site.toml`, so that a restart needs none; returns the file as it is now."""
    read_site(folder)
    table = tomllib.loads((folder / "site.toml").read_text(encoding="utf-8"))
    if any(table.get(key) != value for key, value in changes.items()):
        write_file(folder / "site.toml", tomli_w.dumps(table | changes).encode(), 0o600)
    return read_site(folder)


def flower_env(folder: Path) -> dict[str, str]:
    """Returns the environment that every Flower process of a folder gets besides our own."""
    # SuperLink and SuperNode look their helpers up on PATH: those beside this Python must come first.
    bin_folder = str(Path(sys.executable).parent)
    # An outbound proxy is for the way out; Flower's processes of one machine talk over loopback.
    direct = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), *LOOPBACK]))
    return {
        "PATH": os.pathsep.join([bin_folder, os.environ.get("PATH", os.defpath)]),
        "NO_PROXY": direct,
        "no_proxy": direct,
        "FLWR_HOME": str(folder / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "HF_HUB_OFFLINE": "1",
    }


def write_flower_config(federation: Federation, superlink: str) -> None:
    """Tells the `flwr` command where the SuperLink is; its paths must be absolute, so every start writes them anew."""
    connection = {"address": superlink, "root-certificates": str(federation.ca)}
    table = {"superlink": {"default": "umbel", "umbel": connection}}
    _folder(federation.folder / "flower")
    write_file(federation.folder / "flower" / "config.toml", tomli_w.dumps(table).encode(), 0o600)


def _superlink(folder: Path) -> str:
    try:
        table = tomllib.loads((folder / "flower" / "config.toml").read_text(encoding="utf-8"))
        return table["superlink"]["umbel"]["address"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return ""


def _sites(folder: Path) -> tuple[Site, ...]:
    path = folder / "sites.json"
    try:
        sites = tuple(Site(**entry) for entry in json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise KitError(f"{path}: not a list of sites ({error}); take it back from a copy of the kit") from None
    for site in sites:
        if site.state not in (ACTIVE, REVOKED) or fingerprint(site.public_key) != site.fingerprint:
            raise KitError(f"{path}: site {site.name!r} has a wrong state or fingerprint; change it by `umbel kit`")
    return sites


def _toml(path: Path, what: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KitError(f"{path} is missing; give {what}") from None
    except tomllib.TOMLDecodeError as error:
        raise KitError(f"{path}: {error}") from None


# Addresses and names


def host_and_port(server: str) -> tuple[str, int]:
    """Splits host or host:port; an IPv6 address with a port is in brackets."""
    found = re.fullmatch(r"\[([0-9A-Fa-f:.]+)\](?::(\d+))?|([A-Za-z0-9._-]+)(?::(\d+))?", server)
    if found is None:
        raise KitError(f"server must be host or host:port, as fed.example.org:9092 or [2001:db8::1]:9092, got {server!r}")
    port = int(found[2] or found[4] or DEFAULT_PORT)
    if not 0 < port < 65536:
        raise KitError(f"server: the port must be from 1 to 65535, got {port}")
    return found[1] or found[3], port


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name) or name in ("ca", "server"):
        raise KitError(f"a site's name is made of a–z, 0–9 and - (at most 63) and is not ca or server; got {name!r}")


# Keys


def fingerprint(public_key: str) -> str:
    """Returns the fingerprint of an OpenSSH public key, as `ssh-keygen -l` prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(base64.b64decode(public_key.split()[1])).digest()).decode().rstrip("=")


def read_public_key(text: str, where: str) -> ec.EllipticCurvePublicKey:
    """Reads an OpenSSH public key; KitError unless it is one of the curve P-384, which Flower takes."""
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except Exception as error:
        raise KitError(f"{where}: no public key in OpenSSH form ({error}); `umbel site key` makes one") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise KitError(f"{where}: the key must be ecdsa-sha2-nistp384, got {text.split()[0]}; `umbel site key` makes one")
    return key


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Reads a private key in OpenSSH form after checking that nobody else can."""
    check_private(path)
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), password=None)
    except Exception as error:
        raise KitError(f"{path}: no private key in OpenSSH form ({type(error).__name__}); put the right one there") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KitError(f"{path}: the key must be of the curve P-384; `umbel site key` makes one")
    return key


def flower_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """Returns a public key as Flower's wire and database hold it."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def public_text(key: ec.EllipticCurvePublicKey) -> str:
    """Returns a public key as one line of OpenSSH text."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def check_private(path: Path) -> None:
    """Refuses a private key that others could read."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        raise KitError(f"{path} is missing; put the private key there that belongs to this folder") from None
    if mode & 0o077:
        raise KitError(f"{path}: others can read this private key (mode {mode:04o}); run: chmod 600 {path}")


def _key_pair(folder: Path, name: str) -> str:
    key = ec.generate_private_key(ec.SECP384R1())
    text = public_text(key.public_key())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    _write_private(folder / f"{name}.key", private)
    write_file(folder / f"{name}.pub", (text + "\n").encode(), 0o644)
    return text


def _with_key(federation: Federation, folder: Path, site: Site, public_key: Path | None) -> Site:
    """Returns the site with a new key: made here, or the one of which it sent the public half."""
    if public_key is None:
        text = _key_pair(folder, "site")
    else:
        key = read_public_key(public_key.read_text(encoding="utf-8", errors="replace").strip(), str(public_key))
        text = public_text(key)
        # A key that was used before, by anybody, would be refused by the SuperLink: it never forgets one.
        if text in [other.public_key for other in federation.sites]:
            raise KitError(f"{public_key}: this key is in sites.json already; every site and every rotation needs a new one")
        (folder / "site.key").unlink(missing_ok=True)
        write_file(folder / "site.pub", (text + "\n").encode(), 0o644)
    return replace(site, public_key=text, fingerprint=fingerprint(text))


# Certificates


def read_certificate(path: Path) -> x509.Certificate:
    """Reads the first certificate of a PEM file."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except FileNotFoundError:
        raise KitError(f"{path} is missing; take it from the kit") from None
    except ValueError as error:
        raise KitError(f"{path}: no certificate in it ({error}); take it from the kit") from None


def key_id(certificate: x509.Certificate, of_issuer: bool = False) -> str:
    """Names the key of a certificate, or of who issued it, in hexadecimal; "unknown" where it does not say."""
    try:
        if of_issuer:
            found = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        else:
            found = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    except x509.ExtensionNotFound:
        found = None
    return "unknown" if found is None else found.hex(":")


def _ca_certificate(key: ec.EllipticCurvePrivateKey, host: str) -> x509.Certificate:
    # Numbered, so that the CAs of two kits for one server are told apart by their names, too.
    name = _name(f"umbel CA {os.urandom(4).hex()} of {host}"[:64])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = _builder(name, name, key.public_key(), CA_YEARS).add_extension(x509.BasicConstraints(True, 0), critical=True)
    return builder.add_extension(usage, critical=True).sign(key, hashes.SHA384())


def _issue(folder: Path, name: str, hosts: list[str], ca_key: ec.EllipticCurvePrivateKey, ca: x509.Certificate) -> datetime:
    """Writes `name`.key and `name`.crt, which the CA signs for the given hosts; returns when the certificate ends."""
    key = ec.generate_private_key(ec.SECP384R1())
    builder = _builder(_name(hosts[0][:64]), ca.subject, key.public_key(), SERVER_YEARS, ca)
    builder = builder.add_extension(x509.BasicConstraints(False, None), critical=True)
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    builder = builder.add_extension(usage, critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName([_san(host) for host in hosts]), critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
            ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        ),
        critical=False,
    )
    certificate = builder.sign(ca_key, hashes.SHA384())
    _write_private(folder / f"{name}.key", _pem(key))
    write_file(folder / f"{name}.crt", _certificate_pem(certificate), 0o644)
    return certificate.not_valid_after_utc


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, years: int, ca: x509.Certificate | None = None
) -> x509.CertificateBuilder:
    # A day back, for machines whose clocks are behind.
    start = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
    end = start + timedelta(days=365 * years + 1)
    end = end if ca is None else min(end, ca.not_valid_after_utc)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(end)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _san(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


# Files


def write_file(path: Path, data: bytes, mode: int) -> None:
    """Writes a file with its mode, whole or not at all; it never exists with another mode."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.chmod(mode)
    temporary.replace(path)


def _write_private(path: Path, data: bytes) -> None:
    write_file(path, data, 0o600)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


def _site_folder(federation: Federation, folder: Path, name: str, number: int) -> None:
    _folder(folder)
    _folder(folder / "state")
    write_site(folder, SiteConfig(name, number, federation.server))
    write_file(folder / "ca.crt", federation.ca.read_bytes(), 0o644)
    write_file(folder / "server.pub", (federation.folder / "signing.pub").read_bytes(), 0o644)
    write_file(folder / "start", _start_script("site").encode(), 0o755)


def _write_sites(folder: Path, sites: tuple[Site, ...]) -> None:
    write_file(folder / "sites.json", (json.dumps([asdict(site) for site in sites], indent=1) + "\n").encode(), 0o644)


def _federation_toml(server: str, port: int) -> bytes:
    lines = [
        f'server = "{server}"   # what sites dial; server.crt is made out to this name',
        f"port = {port}   # where the proxy of this machine listens; differs from the above behind a port forwarding",
    ]
    return ("\n".join(lines) + "\n").encode()


def _start_script(what: str) -> str:
    return f"""#!/bin/sh
# Starts this folder, wherever it lies, with the `umbel` on PATH, or the one that the variable UMBEL names.
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd) || exit 1
umbel=${{UMBEL:-umbel}}
if ! command -v "$umbel" >/dev/null 2>&1; then
    echo "start: no command '$umbel'; activate the environment that umbel is installed in, or set UMBEL=.../bin/umbel" >&2
    exit 127
fi
exec "$umbel" {what} start "$here" "$@"
"""


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
