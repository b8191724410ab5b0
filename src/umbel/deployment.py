"""The processes of a federation: SuperLink and TLS proxy at the server, SuperNode at a site. They die with `umbel`."""

import contextlib
import csv
import fcntl
import grp
import json
import logging
import os
import pwd
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from umbel import kit, superlink
from umbel.client.worker import FAILED
from umbel.kit import Federation, KitError, SiteConfig

Say = Callable[[str], None]

LOG_BYTES, LOG_FILES = 5_000_000, 4
START_SECONDS, STOP_SECONDS = 60, 10
REDIAL_SECONDS, REMIND_SECONDS = 3, 60
MOST_FAILED_STARTS = 5

PASSED = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
"""What a SuperNode with a key calls of /v1/fleet/; the proxy answers 404 to everything else."""


class DeploymentError(RuntimeError):
    """Something that ends a server or a site; says what a person has to do."""


class Unreachable(DeploymentError):
    """The server does not answer now; it may later."""


# The server


def start_server(folder: Path, say: Say = print) -> None:
    """Runs a server's folder until SIGTERM or SIGINT.

    Raises:
        KitError: The folder is no server's, or a key in it is readable by others.
        DeploymentError: nginx or flwr is missing, a port is taken, or one of the processes ended by itself.
    """
    os.umask(0o077)  # databases, logs and state are nobody else's
    federation = kit.read(folder)
    nginx = _nginx()
    _check_server(federation, say)
    with _locked(federation.folder) as lock, _Children(federation.folder, lock) as children, _stopping():
        _check_port(federation)
        address = _superlink_address(federation)
        kit.write_flower_config(federation, address)
        children.start("superlink", _superlink_command(federation, address), federation.env)
        control = superlink.Control(address, federation.ca)
        children.wait_for(control.healthy, "SuperLink does not answer")
        seen = _changed(federation)
        for line in sync(federation):
            if line.startswith("NOT"):
                say(line)
        (federation.folder / "proxy").mkdir(mode=0o700, exist_ok=True)
        configuration = nginx_configuration(federation, address).encode()
        kit.write_file(federation.folder / "proxy" / "nginx.conf", configuration, 0o600)
        command = [nginx, "-p", str(federation.folder / "proxy"), "-c", "nginx.conf", "-e", "stderr"]
        children.start("proxy", command, federation.env)
        children.wait_for(lambda: _shows_certificate(federation), f"no TLS proxy of ours listens on port {federation.port}")
        say(f"ready: {federation.server}, {_active(federation)} sites")
        while True:
            children.check()
            if _changed(federation) != seen:
                seen = _changed(federation)
                _take_over(folder, say)
            time.sleep(0.5)


def _take_over(folder: Path, say: Say) -> None:
    """Takes over a changed sites.json. One that is no good is said and ends nobody's run: what held before goes on."""
    try:
        say("; ".join(sync(kit.read(folder))) or "sites.json has changed; nothing to do")
    except (KitError, DeploymentError, superlink.ApiError, OSError) as error:
        say(f"sites.json has changed, and is not taken over: {error}")


def sync(federation: Federation) -> list[str]:
    """Makes the SuperLink know the keys of active sites and no others; returns what was done, a line each."""
    control = superlink.Control(federation.superlink or kit.read(federation.folder).superlink, federation.ca)
    nodes = {node.public_key: node for node in control.nodes()}
    active = {site.key_bytes: site for site in federation.sites if site.state == kit.ACTIVE}
    done = []
    for key, node in nodes.items():
        if key not in active and node.status != superlink.UNREGISTERED:
            control.unregister(node.node_id)
            done.append(f"shut out: node {node.node_id}")
    for key, site in active.items():
        if key not in nodes:
            done.append(f"let in: {site.name} as node {control.register(key, site.name)}")
        elif nodes[key].status == superlink.UNREGISTERED:
            done.append(
                f"NOT let in: {site.name}, whose key was revoked or replaced before, and a SuperLink never takes one back; "
                f"run: umbel kit rotate {site.name}"
            )
    return done


def running(federation: Federation) -> bool:
    """Whether `umbel server start` runs on this machine for this folder."""
    try:
        with _owned(federation.folder):
            return False
    except DeploymentError:
        return True


def wait_until_settled(federation: Federation, seconds: float = 30) -> None:
    """Waits until the running server has taken over sites.json; DeploymentError when it does not."""
    active = {site.key_bytes for site in federation.sites if site.state == kit.ACTIVE}
    control = superlink.Control(federation.superlink, federation.ca)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if {node.public_key for node in control.nodes() if node.status != superlink.UNREGISTERED} == active:
                return
        time.sleep(0.2)
    raise DeploymentError(
        f"{federation.folder}: sites.json is changed, but the server has not taken it over after {seconds:.0f} s; "
        f"restart it, and look into {federation.folder / 'logs'}"
    )


def online(federation: Federation) -> dict[str, superlink.Node]:
    """Returns the node of every site that the SuperLink knows, by the site's name; empty while no server runs here."""
    if not federation.superlink:
        return {}
    try:
        nodes = {node.public_key: node for node in superlink.Control(federation.superlink, federation.ca).nodes()}
    except OSError:
        return {}
    return {site.name: nodes[site.key_bytes] for site in federation.sites if site.key_bytes in nodes}


def _superlink_command(federation: Federation, address: str) -> list[str]:
    folder = federation.folder
    host, port = kit.host_and_port(address)
    command = ["flower-superlink", "--enable-supernode-auth", "--host", host, "--port", str(port)]
    command += ["--ssl-certfile", str(folder / "loopback.crt"), "--ssl-keyfile", str(folder / "loopback.key")]
    return [*command, "--ssl-ca-certfile", str(federation.ca), "--database", str(folder / "superlink.db")]


def nginx_configuration(federation: Federation, superlink_address: str) -> str:
    """Returns the proxy's configuration. Its paths are relative to the folder `proxy`, so that no name needs quoting."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    # As root, nginx would give its workers to an account that may not enter our folder.
    user = f"user {pwd.getpwuid(0).pw_name} {grp.getgrgid(os.getgid()).gr_name};" if os.geteuid() == 0 else ""
    return f"""\
daemon off;
{user}
worker_processes 2;
worker_rlimit_nofile {files};
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections {files // 2}; }}
http {{
    access_log off;
    server_tokens off;
    default_type text/plain;
    client_body_temp_path body;
    proxy_temp_path answers;
    fastcgi_temp_path unused-fastcgi;
    uwsgi_temp_path unused-uwsgi;
    scgi_temp_path unused-scgi;

    # Flower sends what is large in pieces of 5 MB; a message without its tensors is far smaller than that.
    client_max_body_size 8m;
    client_body_timeout 60s;
    client_header_timeout 20s;
    keepalive_timeout 75s;
    # A hospital's machines share one address behind its router. Beyond the limit the answer is 503, and sites try again.
    limit_conn_zone $binary_remote_addr zone=links:1m;
    limit_req_zone $binary_remote_addr zone=calls:1m rate=200r/s;

    upstream superlink {{
        server {superlink_address};
        keepalive 32;
        # Less than the 5 s after which the SuperLink closes an idle connection.
        keepalive_timeout 3s;
    }}

    server {{
        listen {federation.port} ssl;
        {f"listen [::]:{federation.port} ssl;" if _has_ipv6() else ""}
        ssl_certificate ../server.crt;
        ssl_certificate_key ../server.key;
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_session_cache shared:tls:2m;
        limit_conn links 256;

        location / {{ return 404 "umbel: only sites of the federation have business here\\n"; }}

        # The path is built anew, so that nothing that somebody wrote into it reaches the SuperLink.
        location ~ ^/v1/fleet/(?<call>{"|".join(PASSED)})$ {{
            limit_except POST {{ deny all; }}
            limit_req zone=calls burst=400 nodelay;
            proxy_pass https://superlink/v1/fleet/$call;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_ssl_verify on;
            proxy_ssl_trusted_certificate ../ca.crt;
            proxy_ssl_name localhost;
            proxy_ssl_server_name on;
            proxy_ssl_protocols TLSv1.2 TLSv1.3;
            proxy_connect_timeout 5s;
            proxy_read_timeout 120s;
            proxy_send_timeout 60s;
        }}
    }}
}}
"""


def _check_server(federation: Federation, say: Say) -> None:
    for name in ("server", "loopback"):
        kit.check_private(federation.folder / f"{name}.key")
        path = federation.folder / f"{name}.crt"
        left = kit.read_certificate(path).not_valid_after_utc - datetime.now(UTC)
        if left < timedelta(0):
            raise DeploymentError(f"{path} has expired; run where the kit's folder ca/ is: umbel kit renew")
        if left < timedelta(days=30):
            say(f"{path} expires in {left.days} days; run where the kit's folder ca/ is: umbel kit renew")
    kit.check_private(federation.folder / "signing.key")
    _flower_command("flower-superlink")


def _nginx() -> str:
    places = [os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin", "/opt/homebrew/bin"]
    found = shutil.which("nginx", path=os.pathsep.join(places))
    if found is None:
        raise DeploymentError(
            "nginx is missing, which ends TLS in front of the SuperLink; install it (apt install nginx, dnf install nginx, "
            "brew install nginx; version 1.19.5 or newer). Its own service need not run"
        )
    return found


def _flower_command(name: str) -> None:
    if not (Path(sys.executable).parent / name).exists() and shutil.which(name) is None:
        raise DeploymentError(f"{name} is missing; install umbel with its federation extra: pip install 'umbel[federation]'")


def _check_port(federation: Federation) -> None:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", federation.port))
        except OSError as error:
            raise DeploymentError(
                f"port {federation.port} of this machine is not to be had: {error.strerror}; end what listens there, or give "
                f"another `port` in {federation.folder / 'federation.toml'} (and `server`, if sites shall dial it)"
            ) from None


def _superlink_address(federation: Federation) -> str:
    """The port of the last start where it is free, so that what looks at the server need not learn a new one."""
    if federation.superlink:
        host, port = kit.host_and_port(federation.superlink)
        with contextlib.suppress(OSError), socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((host, port))
            return federation.superlink
    return f"127.0.0.1:{free_port()}"


def free_port() -> int:
    """Returns a port of the loopback interface that nobody listens on."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return tried.getsockname()[1]


def _shows_certificate(federation: Federation) -> bool:
    """Whether it is our proxy that listens on the port, and not somebody else's server."""
    own = kit.read_certificate(federation.folder / "server.crt")
    with contextlib.suppress(OSError):
        return _shown_certificate(f"127.0.0.1:{federation.port}", proxied=False) == own
    return False


def _shown_certificate(server: str, proxied: bool) -> kit.x509.Certificate:
    """Returns the certificate that a server shows, whoever signed it."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.closing(superlink.connection(server, context, proxied, 10)) as link:
        link.connect()
        return kit.x509.load_der_x509_certificate(link.sock.getpeercert(True) or b"")


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as tried:
        tried.bind(("::1", 0))
        return True
    return False


def _changed(federation: Federation) -> tuple[int, int]:
    try:
        found = (federation.folder / "sites.json").stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_mtime_ns, found.st_ino


def _active(federation: Federation) -> int:
    return sum(site.state == kit.ACTIVE for site in federation.sites)


# A site


def start_site(folder: Path, say: Say = print, **options: str) -> None:
    """Runs a site's folder until SIGTERM or SIGINT; `options` (data, test, model) are noted in its site.toml.

    Raises:
        KitError: The folder is no site's, a file is missing or readable by others.
        DeploymentError: The server is another one than this folder's, or does not know its key; flwr is missing.
    """
    os.umask(0o077)
    folder = folder.resolve()
    kit.read_site(folder)
    with _locked(folder) as lock, _Children(folder, lock) as children, _stopping():
        # The working directory is this start's; the next one may have another.
        options = {key: kit.placed(key, value, Path.cwd()) for key, value in options.items()}
        for key, value in options.items():
            check_option(key, value)
        config = kit.update_site(folder, **options)
        rows = _count(config)
        key = kit.read_private_key(folder / "site.key")
        kit.read_certificate(folder / "ca.crt")
        _flower_command("flower-supernode")
        fleet = superlink.Fleet(config.server, folder / "ca.crt", key)
        failed, worker = 0, _Worker(children, folder, say)
        while True:
            _wait_until_let_in(fleet, config, folder, say)
            _forget_last_time(fleet, folder)
            worker.keep()
            child = children.start("site", _supernode_command(folder, config), kit.flower_env(folder))
            came_online = _watch(child, worker, fleet, config, folder, say, rows)
            failed = 0 if came_online else failed + 1
            if failed == MOST_FAILED_STARTS:
                raise DeploymentError(f"the SuperNode does not start; its last lines ({child.log}):\n{child.tail()}")
            say(f"the SuperNode ended (code {child.process.returncode}); dialling again in {REDIAL_SECONDS} s")
            time.sleep(REDIAL_SECONDS)


def check_let_in(fleet: superlink.Fleet, config: SiteConfig, folder: Path) -> None:
    """Asks the server whether it takes this site, changing nothing.

    Raises:
        Unreachable: Nobody answers, or the SuperLink is not up yet.
        DeploymentError: Trying again does not help: another CA, an expired certificate, an unknown key, a wrong clock.
    """
    try:
        answer = fleet.probe()
    except ssl.SSLCertVerificationError as error:
        try:
            message = _bad_certificate(error, config.server, folder)
        except OSError as gone:
            raise Unreachable(f"{config.server} cannot be reached: {gone.strerror or gone}") from None
        raise DeploymentError(message) from None
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise Unreachable(f"{config.server} cannot be reached: {reason}") from None
    known = superlink.knows_key(answer)
    if known:
        return
    if known is None:
        if answer.status in (429, 500, 502, 503, 504):
            raise Unreachable(f"{config.server} answers {answer.status}: its SuperLink is not up")
        if answer.status == 401:
            raise DeploymentError(_bad_clock(answer, config.server))
        raise DeploymentError(f"{config.server} answers {answer.status} to a site's call: is it an umbel server's address?")
    own = kit.fingerprint(kit.public_text(fleet.key.public_key()))
    raise DeploymentError(
        f"{config.server} does not know this site's key {own}: it was never let in, was replaced or revoked. "
        f"The operator compares it with `umbel kit ls`; new key: `umbel kit rotate {config.name}`, new site: `umbel kit join`"
    )


def count_rows(path: Path) -> int:
    """Counts the rows of a data file (.jsonl, .json, .csv, .tsv, .tab); KitError where it cannot be read as one."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".jsonl":
                return sum(_is_object(json.loads(line)) for line in file if line.strip())
            if path.suffix == ".json":
                return len(json.load(file))
            if path.suffix in (".csv", ".tsv", ".tab"):
                csv.field_size_limit(2**31 - 1)
                header = 3 if path.suffix == ".tab" else 1
                return max(0, sum(1 for _ in csv.reader(file, delimiter="," if path.suffix == ".csv" else "\t")) - header)
    except (OSError, ValueError, csv.Error) as error:
        # The reason without the text around it: a row of patients' data has no place in a message.
        raise KitError(f"{path}: cannot be read as rows: {getattr(error, 'strerror', None) or type(error).__name__}") from None
    raise KitError(f"{path}: files of type {path.suffix!r} are not read; allowed: .jsonl, .json, .csv, .tsv, .tab")


def _is_object(value: Any) -> bool:
    if not isinstance(value, dict):
        raise ValueError
    return True


def check_option(key: str, value: str) -> None:
    """Checks a file before it is noted, so that a mistyped name does not take a good one's place; "" takes one away."""
    if value.startswith("pkg:") or value == kit.RUN_ROWS or not value:
        return
    if key == "model" and not Path(value).exists():
        raise KitError(f"--model: no folder {value!r}; give the base model's, or leave it out to use what the run names")
    if key in ("data", "test"):
        count_rows(Path(value))


def _count(config: SiteConfig) -> int | None:
    if not config.data:
        raise KitError(f"site {config.name!r} has no data yet; start it once with --data FILE (or --data run to try it out)")
    return None if config.data == kit.RUN_ROWS or config.data.startswith("pkg:") else count_rows(Path(config.data))


def _supernode_command(folder: Path, config: SiteConfig) -> list[str]:
    place = str(folder)
    if "'" in place and '"' in place:
        raise KitError(f"{place}: Flower cannot take a path with both ' and \" in it; move the folder")
    value = f"'{place}'" if "'" not in place else json.dumps(place)
    command = ["flower-supernode", "--superlink", config.server, "--root-certificates", str(folder / "ca.crt")]
    command += ["--auth-supernode-private-key", str(folder / "site.key"), "--node-config", f"site={value}"]
    return [*command, "--host", "127.0.0.1", "--port", str(free_port())]


def _wait_until_let_in(fleet: superlink.Fleet, config: SiteConfig, folder: Path, say: Say) -> None:
    reminded = -float(REMIND_SECONDS)
    while True:
        try:
            return check_let_in(fleet, config, folder)
        except Unreachable as error:
            if time.monotonic() - reminded >= REMIND_SECONDS:
                say(f"{error}; trying again every {REDIAL_SECONDS} s")
                reminded = time.monotonic()
        time.sleep(REDIAL_SECONDS)


def _forget_last_time(fleet: superlink.Fleet, folder: Path) -> None:
    """A SuperNode that was killed counts as online for up to 60 s, in which the SuperLink would refuse a new one."""
    try:
        node_id = int((folder / "state" / "node_id").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    with contextlib.suppress(OSError):
        fleet.deactivate(node_id)


def _check_reachable(fleet: superlink.Fleet, config: SiteConfig) -> None:
    """Raises Unreachable where the proxy does not answer; unlike `check_let_in` it leaves no line in the SuperLink's log."""
    try:
        superlink.request("GET", fleet.address, "/", fleet.context)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise Unreachable(f"{config.server} cannot be reached: {reason}") from None


class _Worker:
    """A site's worker, which keeps the base model in memory; without it every message loads it in a process of its own."""

    def __init__(self, children: "_Children", folder: Path, say: Say) -> None:
        self._children, self._folder, self._say = children, folder, say
        self._child: _Child | None = None

    def tell(self) -> None:
        """Says what it could not do; the operator is told less, since the reason may hold rows."""
        while self._child is not None and self._child.failed:
            self._say(f"{self._child.failed.popleft()} (more in {self._child.log})")

    def keep(self) -> None:
        """Starts it where it does not run."""
        if self._child is not None:
            if (code := self._child.process.poll()) is None:
                return
            self._say(f"the worker ended (code {code}); starting another ({self._child.log} says why, where it could)")
        command = [sys.executable, "-m", "umbel.client.worker", str(self._folder)]
        self._child = self._children.start("worker", command, kit.flower_env(self._folder))


def _watch(
    child: "_Child", worker: _Worker, fleet: superlink.Fleet, config: SiteConfig, folder: Path, say: Say, rows: int | None
) -> bool:
    """Waits for a SuperNode's end; returns whether it was online. Says when it is, and while the server cannot be reached."""
    on, lost, asked = False, False, time.monotonic()
    while child.process.poll() is None:
        if not on and child.node_id:
            on = True
            (folder / "state").mkdir(mode=0o700, exist_ok=True)
            kit.write_file(folder / "state" / "node_id", str(child.node_id).encode(), 0o600)
            say(f"online: {config.name} at {config.server}, {'the run’s own rows' if rows is None else f'{rows} rows'}")
        worker.tell()
        if time.monotonic() - asked > REMIND_SECONDS:
            asked = time.monotonic()
            worker.keep()
            try:
                _check_reachable(fleet, config)
                if lost:
                    say(f"{config.server} answers again")
                lost = False
            except Unreachable as error:
                lost = True
                say(f"{error}; the SuperNode goes on trying")
        time.sleep(0.2)
    return on


def _bad_certificate(error: ssl.SSLCertVerificationError, server: str, folder: Path) -> str:
    shown = _shown_certificate(server, proxied=True)
    if error.verify_code in (62, 64):
        name = shown.subject.rfc4514_string()
        return f"{server}: the server's certificate is for {name}, not for this address; operator: `umbel kit renew --server`"
    if error.verify_code in (9, 10):
        dates = f"{shown.not_valid_before_utc:%Y-%m-%d} to {shown.not_valid_after_utc:%Y-%m-%d}"
        return f"{server}: the server's certificate holds from {dates}; check the clock here, or operator: `umbel kit renew`"
    own = kit.read_certificate(folder / "ca.crt")
    return (
        f"{server} is not the server that this folder trusts: its certificate is signed by {shown.issuer.rfc4514_string()}, "
        f"key {kit.key_id(shown, of_issuer=True)}; ca.crt here is {own.subject.rfc4514_string()}, key {kit.key_id(own)}. "
        "Either the folder is of another federation, or something on the way opens TLS"
    )


def _bad_clock(answer: superlink.Answer, server: str) -> str:
    if answer.date is None:
        return f"{server} refuses this site's signature; check this machine's clock"
    ahead = (datetime.now(UTC) - answer.date).total_seconds()
    apart = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    return f"{server} refuses this site's signature: this machine's clock is {apart} (allowed: 5 s ahead, 300 s behind); set it"


# Processes

_LAUNCHER = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the process that started this one is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Asks Linux for SIGTERM when the parent dies, however it dies, and becomes the command."""


class _Child:
    """A process whose output goes to a log that cannot grow without bound."""

    def __init__(self, name: str, command: list[str], env: dict[str, str], folder: Path, lock: int) -> None:
        self.name, self.log = name, folder / "logs" / f"{name}.log"
        self.node_id = 0
        self.last: deque[str] = deque(maxlen=20)
        self.failed: deque[str] = deque(maxlen=20)
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
        # In a session of its own, so that Ctrl-C reaches us alone; holding the lock, so that nobody starts beside it.
        self.process = subprocess.Popen(
            launcher,
            env=os.environ | env,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock],
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        handler = RotatingFileHandler(self.log, maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            line = re.sub(r"\x1b\[[0-9;]*m", "", raw.decode(errors="replace")).rstrip()
            # A site's question whether it is let in, which SuperLink logs as an error, once a minute and site.
            if "[ApiError:2003]" in line:
                continue
            self.last.append(line)
            if line.startswith(FAILED):
                self.failed.append(line)
            if found := re.search(r"SuperNode ID: (\d+)", line):
                self.node_id = int(found[1])
            handler.handle(logging.makeLogRecord({"msg": line}))
        handler.close()
        self.process.stdout.close()

    def tail(self) -> str:
        """The last lines that it wrote."""
        self.reader.join(timeout=2)
        return "\n".join(f"    {line}" for line in list(self.last)[-8:])

    def stop(self) -> None:
        """Ends it: SIGTERM, and SIGKILL for one that does not care."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class _Children:
    """The processes of one folder; they end, last started first, when the block ends."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder, self.lock = folder, lock
        self.all: list[_Child] = []
        (folder / "logs").mkdir(mode=0o700, exist_ok=True)

    def __enter__(self) -> "_Children":
        return self

    def __exit__(self, *_: Any) -> None:
        for child in reversed(self.all):
            child.stop()

    def start(self, name: str, command: list[str], env: dict[str, str]) -> _Child:
        """Starts a process and keeps it in view."""
        child = _Child(name, command, env, self.folder, self.lock)
        self.all = [*(other for other in self.all if other.process.poll() is None), child]
        return child

    def check(self) -> None:
        """DeploymentError when a process has ended by itself."""
        for child in self.all:
            if (code := child.process.poll()) is not None:
                raise DeploymentError(f"{child.name} ended (code {code}); its last lines ({child.log}):\n{child.tail()}")

    def wait_for(self, ready: Callable[[], bool], failure: str) -> None:
        """Waits until `ready`; DeploymentError when a process ends before, or it takes too long."""
        end = time.monotonic() + START_SECONDS
        while not ready():
            self.check()
            if time.monotonic() > end:
                raise DeploymentError(f"{failure} after {START_SECONDS} s; its last lines:\n{self.all[-1].tail()}")
            time.sleep(0.1)
        self.check()


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """Holds a folder for one `umbel`; DeploymentError where another has it. A killed one lets go by itself."""
    with (folder / ".owner").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DeploymentError(f"{folder} is running already; stop that process first") from None
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Holds a folder for one `umbel` and its children, yielding the descriptor that they share.

    Those of a killed one take a moment to end; they are waited for.
    """
    with _owned(folder), (folder / ".lock").open("w") as handle:
        end = time.monotonic() + STOP_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise DeploymentError(f"{folder}: processes of a killed start do not end; end them by hand") from None
                time.sleep(0.1)
        yield handle.fileno()


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Ends the block quietly on SIGTERM or SIGINT; no second one disturbs what follows."""
    signals = (signal.SIGTERM, signal.SIGINT)
    before: dict[signal.Signals, Any] = {number: signal.signal(number, signal.default_int_handler) for number in signals}
    try:
        yield
    except KeyboardInterrupt:
        before = dict.fromkeys(signals, signal.SIG_IGN)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
