"""Who gets in, tried on the real server: SuperLink behind nginx, SuperNodes with keys; and what comes back after a kill.

Every process is one that a user would start; nothing listens on a port that others know.
"""

import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from umbel import deployment, kit, superlink

pytest.importorskip("flwr", reason="flwr is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("nginx", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])) is None,
        reason="nginx is not installed: apt install nginx",
    ),
]


class Started:
    """An `umbel` command that runs, and what it says."""

    def __init__(self, folder: Path, *arguments: str, **env: str) -> None:
        self.path = folder / f".said-{time.monotonic_ns()}"
        with self.path.open("w") as out:
            command = [sys.executable, "-m", "umbel.cli", *arguments]
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder, env=os.environ | env)

    @property
    def said(self) -> str:
        return self.path.read_text()

    def wait_for(self, text: str, seconds: float = 60) -> None:
        until(lambda: text in self.said or self.process.poll() is not None, seconds, lambda: f"{text!r} not in {self.said!r}")
        assert text in self.said, self.said

    def ended(self, seconds: float = 30) -> str:
        """Waits for its end by itself; returns what it said."""
        assert self.process.wait(seconds) == 1, self.said
        return self.said

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)


def until(holds: Callable[[], bool], seconds: float = 60, what: Callable[[], str] = lambda: "") -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, what()
        time.sleep(0.1)


class Place:
    """A kit, its server, and its sites."""

    def __init__(self, folder: Path, server: str = "127.0.0.1") -> None:
        self.kit = folder / "kit"
        self.data = folder / "rows.jsonl"
        self.data.write_text('{"text": "of a patient"}\n' * 3)
        kit.init(self.kit, f"{server}:{deployment.free_port()}", ["hospital-a", "hospital-b", "lab-c"])
        self.all: list[Started] = []
        self.start_server()

    def start_server(self) -> None:
        self.server = Started(self.kit.parent, "server", "start", str(self.kit / "server"))
        self.all.append(self.server)
        self.server.wait_for("ready: ")

    @contextlib.contextmanager
    def site(self, folder: Path, *options: str, **env: str) -> Iterator[Started]:
        started = Started(self.kit.parent, "site", "start", str(folder), *options, **env)
        self.all.append(started)
        yield started
        started.stop()

    def umbel(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "umbel.cli", *arguments]
        return subprocess.run(command, cwd=self.kit.parent, capture_output=True, text=True, check=True).stdout

    @property
    def federation(self) -> kit.Federation:
        return kit.read(self.kit / "server")

    @property
    def nodes(self) -> list[superlink.Node]:
        return superlink.Control(self.federation.superlink, self.federation.ca).nodes()

    def status(self, name: str) -> str:
        return deployment.online(self.federation)[name].status

    def copy(self, name: str, to: str) -> Path:
        return Path(shutil.copytree(self.kit / name, self.kit.parent / to))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("a federation"))
    yield made
    for started in made.all:
        started.stop()


class Tunnel(threading.Thread):
    """An outbound proxy as hospitals have it: it takes CONNECT, knows names that the site does not, and passes bytes on."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.asked: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.serve, args=[self.listener.accept()[0]], daemon=True).start()

    def serve(self, link: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += link.recv(4096)
        self.asked.append(head.split()[1].decode())
        with link, socket.create_connection(("127.0.0.1", int(self.asked[-1].rpartition(":")[2]))) as out:
            link.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=self.copy, args=[out, link], daemon=True)
            back.start()
            self.copy(link, out)
            back.join()

    @staticmethod
    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(65536):
                target.sendall(block)
            target.shutdown(socket.SHUT_WR)


def ask(address: str, ca: Path, path: str, verb: str = "POST", body: bytes = b"") -> superlink.Answer:
    return superlink.request(verb, address, path, ssl.create_default_context(cafile=ca), body, proxied=False)


def family(pid: int) -> list[int]:
    """A process and everything that it started and they started."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents.setdefault(int((entry / "stat").read_text().rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def listening(pids: list[int]) -> dict[int, str]:
    """The TCP ports on which processes listen, with the address in hexadecimal, as the kernel writes it."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes |= set(re.findall(r"socket:\[(\d+)\]", str(entry.readlink())))
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, port = fields[1].split(":")
                found[int(port, 16)] = address
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def test_a_site_with_its_key_comes_online_and_nothing_listens_at_it(place: Place) -> None:
    with place.site(place.kit / "hospital-a", "--data", str(place.data)) as site:
        site.wait_for("online: hospital-a")
        assert "3 rows" in site.said
        assert place.status("hospital-a") == "online"
        listed = json.loads(place.umbel("kit", "ls", "--json"))["sites"]
        assert [row["status"] for row in listed] == ["online", "registered", "registered"]
        assert {node.public_key for node in place.nodes} == {one.key_bytes for one in place.federation.sites}
        if sys.platform == "linux":
            assert set(listening(family(site.process.pid)).values()) <= LOOPBACK
            ports = listening(family(place.server.process.pid))
            assert {port for port, address in ports.items() if address not in LOOPBACK} == {place.federation.port}
        with place.site(place.kit / "hospital-a") as second:
            assert "is running already" in second.ended()
    assert site.process.returncode == 0
    until(lambda: place.status("hospital-a") == "offline")
    # The options were noted.
    with place.site(place.kit / "hospital-a") as site:
        site.wait_for("online: hospital-a")
        assert "3 rows" in site.said


def test_an_unknown_key_is_refused_by_name(place: Place) -> None:
    folder = place.copy("lab-c", "unknown")
    (folder / "site.key").unlink()
    told = kit.make_key(folder)
    before = place.nodes
    with place.site(folder, "--data", "run") as site:
        said = site.ended()
    assert f"does not know this site's key {told}" in said
    assert "umbel kit" in said
    assert place.nodes == before


def test_no_key_is_refused(place: Place) -> None:
    folder = place.copy("lab-c", "no-key")
    (folder / "site.key").unlink()
    with place.site(folder, "--data", "run") as site:
        assert site.process.wait(30) == 2
    assert f"{folder / 'site.key'} is missing" in site.said
    # Flower's own SuperNode without a key makes one and asks to be let in.
    before = place.nodes
    command = ["flower-supernode", "--superlink", place.federation.server, "--root-certificates", str(place.federation.ca)]
    command += ["--port", str(deployment.free_port())]
    # To a file: helpers that it leaves behind would hold a pipe open.
    with (folder / "said").open("w") as out:
        env = os.environ | kit.flower_env(folder)
        assert subprocess.run(command, env=env, stdout=out, stderr=out, timeout=60, check=False).returncode == 1
    assert "Failed to initialize the connection" in (folder / "said").read_text()
    # And a call without any signature.
    key = place.federation.sites[2].key_bytes
    answer = ask(
        place.federation.server, place.federation.ca, "/v1/fleet/activate-node", body=superlink.encode((1, key), (2, 30.0))
    )
    assert answer.status == 401
    assert place.nodes == before


def test_a_signature_of_another_time_or_of_another_key_is_refused(place: Place) -> None:
    key = kit.read_private_key(place.kit / "lab-c" / "site.key")
    other = kit.read_private_key(place.kit / "hospital-b" / "site.key")
    context = ssl.create_default_context(cafile=place.federation.ca)
    body = superlink.encode((1, kit.flower_bytes(key.public_key())), (2, -1.0))

    def answer(headers: dict[str, str]) -> superlink.Answer:
        return superlink.request("POST", place.federation.server, "/v1/fleet/activate-node", context, body, headers)

    now = datetime.now(UTC)
    assert superlink.knows_key(answer(superlink.signed(key, now))) is True
    assert superlink.knows_key(answer(superlink.signed(key, now - timedelta(seconds=250)))) is True
    for moment in (now + timedelta(seconds=30), now - timedelta(seconds=400)):
        refused = answer(superlink.signed(key, moment))
        assert refused.status == 401
        assert refused.date is not None
        assert abs(refused.date - now) < timedelta(seconds=30)
    forged = superlink.signed(other, now) | {"flwr-public-key": superlink.signed(key, now)["flwr-public-key"]}
    assert answer(forged).status == 401
    assert answer(superlink.signed(other, now)).status == 401


def test_plain_http_is_refused(place: Place) -> None:
    host, port = kit.host_and_port(place.federation.server)
    link = http.client.HTTPConnection(host, port, timeout=10)
    link.request("POST", "/v1/fleet/pull-messages", b"")
    assert link.getresponse().status == 400
    link.close()
    old = ssl.create_default_context(cafile=place.federation.ca)
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection((host, port), timeout=10) as raw, pytest.raises(ssl.SSLError):
        old.wrap_socket(raw, server_hostname=host)


def test_another_ca_is_refused_with_both_keys_named(place: Place, tmp_path: Path) -> None:
    kit.init(tmp_path / "other", place.federation.server, ["lab-c"])
    folder = place.copy("lab-c", "wrong-ca")
    shutil.copy(tmp_path / "other" / "lab-c" / "ca.crt", folder / "ca.crt")
    with place.site(folder, "--data", "run") as site:
        said = site.ended()
    assert "is not the server that this folder trusts" in said
    for ca in (place.federation.ca, folder / "ca.crt"):
        assert kit.key_id(kit.read_certificate(ca)) in said


def test_another_name_is_refused_by_name(place: Place) -> None:
    folder = place.copy("lab-c", "wrong-name")
    kit.update_site(folder, server=f"localhost:{place.federation.port}")
    with place.site(folder, "--data", "run") as site:
        assert "certificate is for CN=127.0.0.1, not for this address" in site.ended()


def test_only_what_sites_need_is_reachable_from_outside(place: Place) -> None:
    from flwr.superlink.main import create_app

    paths = set(create_app().openapi()["paths"]) | {"/docs", "/openapi.json", "/"}
    assert {f"/v1/fleet/{name}" for name in deployment.PASSED} <= paths
    assert {"/v1/control/start-run", "/v1/control/register-node", "/v1/fleet/register-node", "/health"} <= paths
    federation = place.federation
    inside = ssl.create_default_context(cafile=federation.ca)
    for path in sorted(paths - {f"/v1/fleet/{name}" for name in deployment.PASSED}):
        for verb in ("GET", "POST"):
            assert ask(federation.server, federation.ca, path, verb).status == 404, path
    # The same calls are answered on loopback.
    assert superlink.request("POST", federation.superlink, "/v1/control/list-nodes", inside, proxied=False).status == 200
    assert superlink.request("GET", federation.superlink, "/health", inside, proxied=False).status == 200
    for path in (
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet/pull-messages/../../control/list-nodes",
        "/v1/fleet/pull-messages%2f..%2f..%2fcontrol%2flist-nodes",
        "/v1/control/list-nodes/../../fleet/pull-messages",
        "//v1//control//list-nodes",
        "/v1/fleet/pull-messages;/../../control/list-nodes",
        "/v1/fleet/pull-messages?/../../control/list-nodes",
        "/v1/FLEET/pull-messages",
    ):
        # 401 is the SuperLink's answer to a site's call that nobody signed.
        assert ask(federation.server, federation.ca, path).status in (400, 401, 404, 415, 422), path


def test_what_is_far_larger_than_a_piece_is_refused(place: Place) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
        answer = ask(place.federation.server, place.federation.ca, "/v1/fleet/push-object", body=bytes(20_000_000))
        assert answer.status == 413


def test_join_rotate_and_revoke_hold_at_once(place: Place) -> None:
    assert "taken it over" in place.umbel("kit", "join", "lab-d")
    with place.site(place.kit / "lab-d", "--data", "run") as site:
        site.wait_for("online: lab-d")
        old = place.copy("lab-d", "old-lab-d")
        assert "taken it over" in place.umbel("kit", "rotate", "lab-d")
        assert f"does not know this site's key {kit.fingerprint((old / 'site.pub').read_text())}" in site.ended(60)
    with place.site(old) as site:
        assert "does not know this site's key" in site.ended()
    with place.site(place.kit / "lab-d") as site:
        site.wait_for("online: lab-d")
        assert place.federation.site("lab-d").number == 3
        assert "taken it over" in place.umbel("kit", "revoke", "lab-d")
        assert "does not know this site's key" in site.ended(60)
    with place.site(place.kit / "lab-d") as site:
        assert "does not know this site's key" in site.ended()
    assert "lab-d" not in {one.name for one in place.federation.sites if one.state == kit.ACTIVE}


def test_a_broken_list_of_sites_ends_nothing(place: Place) -> None:
    path = place.kit / "server" / "sites.json"
    good, before = path.read_bytes(), place.nodes
    path.write_text("[]]")
    place.server.wait_for("is not taken over: ")
    # A site whose key the SuperLink has refused for ever: as an older file says.
    entries = json.loads(good)
    entries[0]["state"] = kit.REVOKED
    path.write_text(json.dumps(entries))
    shut_out = [node.status for node in before].count(superlink.UNREGISTERED) + 1
    until(lambda: [node.status for node in place.nodes].count(superlink.UNREGISTERED) == shut_out)
    path.write_bytes(good)
    place.server.wait_for(f"umbel kit rotate {entries[0]['name']}")
    assert place.server.process.poll() is None
    lost = place.federation.site(entries[0]["name"]).key_bytes
    place.umbel("kit", "rotate", entries[0]["name"])
    assert [node for node in place.nodes if node in before] == [node for node in before if node.public_key != lost]


def test_everything_comes_back_after_a_kill_with_the_same_identity(place: Place) -> None:
    with place.site(place.kit / "hospital-b", "--data", "run") as site:
        site.wait_for("online: hospital-b")
        before = place.nodes
        # The SuperLink.
        pids = [
            pid for pid in family(place.server.process.pid) if b"flower-superlink" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        everyone = family(place.server.process.pid)
        os.kill(pids[0], signal.SIGKILL)
        assert "superlink ended (code -9)" in place.server.ended()
        until(lambda: not [pid for pid in everyone if Path(f"/proc/{pid}/exe").exists()])
        place.start_server()
        until(lambda: place.status("hospital-b") == "online")
        # `umbel server start`.
        everyone = family(place.server.process.pid)
        place.server.stop(signal.SIGKILL)
        until(lambda: not [pid for pid in everyone if Path(f"/proc/{pid}/exe").exists()])
        # A site that starts meanwhile says so, and goes on trying.
        with place.site(place.kit / "lab-c", "--data", "run") as patient:
            patient.wait_for(f"{place.federation.server} cannot be reached: ")
            place.start_server()
            patient.wait_for("online: lab-c")
        until(lambda: place.status("hospital-b") == "online")
        # The SuperNode: it is started again by the command that watches over it.
        pids = [pid for pid in family(site.process.pid) if b"flower-supernode" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(pids[0], signal.SIGKILL)
        site.wait_for("the SuperNode ended (code -9)")
        until(lambda: site.said.count("online: hospital-b") == 2, what=lambda: site.said)
        # `umbel site start`, at once again, although the SuperLink still takes the old one for online.
        everyone = family(site.process.pid)
        site.stop(signal.SIGKILL)
        with place.site(place.kit / "hospital-b") as again:
            again.wait_for("online: hospital-b", 30)
            until(lambda: not [pid for pid in everyone if Path(f"/proc/{pid}/exe").exists()])
        assert [(node.node_id, node.public_key) for node in place.nodes] == [(node.node_id, node.public_key) for node in before]


def test_a_worker_that_was_killed_is_started_again(tmp_path: Path) -> None:
    kit.init(tmp_path / "kit", "fed.example.org", ["a"])
    folder, said = tmp_path / "kit" / "a", list[str]()
    address = folder / "state" / "worker.json"
    with deployment._locked(folder) as lock, deployment._Children(folder, lock) as children:
        worker = deployment._Worker(children, folder, said.append)
        worker.keep()
        until(address.exists)
        first = address.read_text()
        worker.keep()
        assert said == []
        children.all[0].process.kill()
        children.all[0].process.wait(10)
        worker.keep()
        until(lambda: address.read_text() != first)
        assert "the worker ended (code -9)" in said[0]


def test_a_site_behind_an_outbound_proxy(tmp_path: Path) -> None:
    """The name is one that this machine cannot find, so all that arrives went through the proxy."""
    place, tunnel = Place(tmp_path, "fed.example.org"), Tunnel()
    try:
        proxies = {"HTTPS_PROXY": tunnel.address, "https_proxy": tunnel.address, "http_proxy": "http://127.0.0.1:9"}
        with place.site(place.kit / "lab-c", "--data", "run", **proxies) as site:
            site.wait_for("online: lab-c at fed.example.org")
            until(lambda: place.status("lab-c") == "online")
        assert set(tunnel.asked) == {place.federation.server}
    finally:
        tunnel.listener.close()
        for started in place.all:
            started.stop()


def test_a_taken_port_and_a_second_server_are_refused(place: Place, tmp_path: Path) -> None:
    second = Started(tmp_path, "server", "start", str(place.kit / "server"))
    assert "is running already" in second.ended()
    kit.init(tmp_path / "kit", place.federation.server, ["a"])
    second = Started(tmp_path, "server", "start", str(tmp_path / "kit" / "server"))
    said = second.ended()
    assert "ready: " not in said
    assert "Address already in use" in said


def test_no_secret_is_in_any_log_or_record(place: Place) -> None:
    """Runs after the others, on all that they left behind."""
    keys = [path for path in place.kit.parent.rglob("*.key") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}
    secrets = [line for path in keys for line in path.read_bytes().splitlines() if len(line) > 40 and b" " not in line]
    # Inside an OpenSSH file the private number lies between other things: look for it in the usual spellings, too.
    for path in keys:
        if path.read_bytes().startswith(b"-----BEGIN OPENSSH"):
            number = kit.read_private_key(path).private_numbers().private_value
            raw = number.to_bytes(48, "big")
            secrets += [str(number).encode(), raw.hex().encode(), base64.b64encode(raw), raw]
    looked = 0
    for path in place.kit.parent.rglob("*"):
        if path.is_file() and path not in keys:
            content = path.read_bytes()
            looked += 1
            assert not [secret for secret in secrets if secret in content], path
            assert b"of a patient" not in content or path == place.data, path
    logs = [path for path in place.kit.parent.rglob("*.log") if path.stat().st_size]
    assert len(logs) >= 3
    assert looked > 50


def test_rows_are_counted_and_a_bad_file_is_named_without_its_rows(tmp_path: Path) -> None:
    files = {
        "a.jsonl": '{"text": "one"}\n\n{"text": "two"}\n',
        "a.json": '[{"text": "one"}, {"text": "two"}]',
        "a.csv": 'text,label\n"one\nline",x\ntwo,y\n',
        "a.tab": "text\tlabel\nstring\tdiscrete\nmeta\tclass\none\tx\ntwo\ty\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert deployment.count_rows(tmp_path / name) == 2, name
    (tmp_path / "a.xlsx").touch()
    (tmp_path / "bad.jsonl").write_text('{"text": "secret patient')
    for name, message in (
        ("bad.jsonl", "cannot be read as rows"),
        ("none.jsonl", "No such file"),
        ("a.xlsx", "'.xlsx' are not read"),
    ):
        with pytest.raises(kit.KitError, match=message) as raised:
            deployment.count_rows(tmp_path / name)
        assert "secret" not in str(raised.value)
