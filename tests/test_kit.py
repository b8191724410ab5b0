"""Kits are folders that can be packed and moved, keys are the sites' identity, and certificates are what TLS wants."""

import json
import os
import shutil
import ssl
import stat
import subprocess
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from umbel import kit
from umbel.cli_federation import kit_app, site_app

asymmetric = pytest.importorskip("flwr.supercore.primitives.asymmetric", reason="flwr is not installed")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    kit.init(tmp_path / "kit", "fed.example.org", ["hospital-a", "lab-c"])
    return tmp_path / "kit"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def mutual_hello(ca: Path, folder: Path, name: str, host: str) -> None:
    """A TLS handshake in memory between a client that trusts `ca` and a server with a certificate of the kit."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(folder / f"{name}.crt", folder / f"{name}.key")
    strict = ssl.create_default_context(cafile=ca)
    strict.verify_flags |= ssl.VERIFY_X509_STRICT
    client = strict.wrap_bio(to_client, to_server, server_hostname=host)
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    done: set[object] = set()
    while len(done) < 2:
        for side in (client, server):
            try:
                side.do_handshake()
                done.add(side)
            except ssl.SSLWantReadError:
                pass


def test_private_files_are_their_owners_alone(made: Path) -> None:
    keys = sorted(str(path.relative_to(made)) for path in made.rglob("*.key"))
    assert keys == [
        "ca/ca.key",
        "hospital-a/site.key",
        "lab-c/site.key",
        "server/loopback.key",
        "server/server.key",
        "server/signing.key",
    ]
    assert {mode(made / key) for key in keys} == {0o600}
    assert {mode(path) for path in [made, *made.rglob("*")] if path.is_dir()} == {0o700}
    # No private key lies in a folder of somebody else's.
    private = {path.read_bytes() for path in made.rglob("*.key")}
    assert len(private) == 6
    others = [path for path in made.rglob("*") if path.is_file() and path.suffix != ".key"]
    assert not [path for path in others if b"PRIVATE" in path.read_bytes()]


def test_the_list_of_sites_has_names_numbers_and_keys_that_ssh_keygen_and_flower_read(made: Path) -> None:
    federation = kit.read(made / "server")
    assert (federation.server, federation.port, federation.superlink) == ("fed.example.org:9092", 9092, "")
    assert [(site.name, site.number, site.state) for site in federation.sites] == [
        ("hospital-a", 0, "active"),
        ("lab-c", 1, "active"),
    ]
    for site in federation.sites:
        public = asymmetric.bytes_to_public_key(site.key_bytes)
        assert asymmetric.public_key_to_bytes(public) == site.key_bytes
        assert asymmetric.uses_nist_ec_curve(public)
        private = kit.read_private_key(made / site.name / "site.key")
        assert asymmetric.verify_signature(public, b"text", asymmetric.sign_message(private, b"text"))
    if shutil.which("ssh-keygen"):
        told = subprocess.run(["ssh-keygen", "-lf", made / "lab-c" / "site.pub"], capture_output=True, text=True, check=True)
        assert told.stdout.split()[1] == federation.site("lab-c").fingerprint


def test_a_kit_can_be_moved(made: Path, tmp_path: Path) -> None:
    for path in made.rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes(), path
    moved = made.rename(tmp_path / "else where")
    assert kit.read(moved / "server").folder == (moved / "server").resolve()
    assert kit.read_site(moved / "lab-c").number == 1


def test_a_start_script_hands_over_its_own_folder(made: Path, tmp_path: Path) -> None:
    moved = made.rename(tmp_path / "it's moved")
    command = tmp_path / "umbel"
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    command.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    run = [moved / "lab-c" / "start", "--data", "my rows.jsonl"]
    done = subprocess.run(run, env=env, cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["site", "start", str(moved / "lab-c"), "--data", "my rows.jsonl"]
    command.unlink()
    done = subprocess.run(run, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)
    assert done.returncode == 127
    assert "no command 'umbel'" in done.stderr


@pytest.mark.parametrize("address", ["fed.example.org:443", "192.0.2.7", "[2001:db8::1]:9092"])
def test_the_servers_certificate_is_for_the_address_that_sites_dial(tmp_path: Path, address: str) -> None:
    federation = kit.init(tmp_path / "kit", address, ["a"])
    host, port = kit.host_and_port(address)
    assert kit.host_and_port(federation.server) == (host, port)
    mutual_hello(tmp_path / "kit" / "a" / "ca.crt", federation.folder, "server", host)
    for loopback in ("127.0.0.1", "localhost", "::1"):
        mutual_hello(federation.ca, federation.folder, "loopback", loopback)
    with pytest.raises(ssl.SSLCertVerificationError):
        mutual_hello(federation.ca, federation.folder, "server", "other.example.org")
    kit.init(tmp_path / "other", address, ["a"])
    with pytest.raises(ssl.SSLCertVerificationError):
        mutual_hello(tmp_path / "other" / "a" / "ca.crt", federation.folder, "server", host)


def test_certificates_last_ten_years_and_two(made: Path) -> None:
    now = datetime.now(UTC)
    for file, years in (("ca/ca.crt", 10), ("server/server.crt", 2), ("server/loopback.crt", 2)):
        certificate = kit.read_certificate(made / file)
        assert certificate.not_valid_before_utc < now
        assert abs(certificate.not_valid_after_utc - now - timedelta(days=365 * years)) < timedelta(days=1)


def test_renewing_keeps_the_ca_and_the_sites(made: Path) -> None:
    before = (made / "server" / "server.crt").read_bytes(), (made / "server" / "sites.json").read_bytes()
    kit.renew(made)
    assert (made / "server" / "server.crt").read_bytes() != before[0]
    assert (made / "server" / "sites.json").read_bytes() == before[1]
    mutual_hello(made / "lab-c" / "ca.crt", made / "server", "server", "fed.example.org")
    kit.renew(made, "new.example.org:443")
    mutual_hello(made / "lab-c" / "ca.crt", made / "server", "server", "new.example.org")
    assert kit.read(made / "server").server == "new.example.org:443"
    (made / "ca").rename(made.parent / "offline")
    with pytest.raises(kit.KitError, match=r"put the folder ca/ back"):
        kit.renew(made)


def test_joining_needs_no_ca_and_numbers_are_never_used_again(made: Path, tmp_path: Path) -> None:
    (made / "ca").rename(made.parent / "offline")
    kit.revoke(made, "lab-c")
    assert kit.join(made, "lab-d").number == 2
    own = tmp_path / "at the site"
    told = kit.make_key(own)
    site = kit.join(made, "lab-e", own / "site.pub")
    assert (site.number, site.fingerprint) == (3, told)
    assert not (made / "lab-e" / "site.key").exists()
    assert [(site.name, site.state) for site in kit.read(made / "server").sites] == [
        ("hospital-a", "active"),
        ("lab-c", "revoked"),
        ("lab-d", "active"),
        ("lab-e", "active"),
    ]


def test_rotating_changes_the_key_and_nothing_else(made: Path) -> None:
    before = kit.read(made / "server").sites
    old = (made / "hospital-a" / "site.key").read_bytes()
    site = kit.rotate(made, "hospital-a")
    after = kit.read(made / "server").sites
    assert after == (site, before[1])
    assert replace(site, public_key="", fingerprint="") == replace(before[0], public_key="", fingerprint="")
    assert site.key_bytes != before[0].key_bytes
    assert (made / "hospital-a" / "site.key").read_bytes() != old
    assert kit.public_text(kit.read_private_key(made / "hospital-a" / "site.key").public_key()) == site.public_key


def test_a_key_that_was_used_is_not_taken_again(made: Path) -> None:
    copy = made.parent / "old.pub"
    shutil.copy(made / "lab-c" / "site.pub", copy)
    with pytest.raises(kit.KitError, match="needs a new one"):
        kit.join(made, "lab-d", copy)


def test_what_is_refused_says_what_to_do(made: Path, tmp_path: Path) -> None:
    refused = [
        (lambda: kit.init(made, "x", ["a"]), "never overwritten"),
        (lambda: kit.init(tmp_path / "2", "x", ["a", "a"]), "given twice"),
        (lambda: kit.init(tmp_path / "2", "x", ["ca"]), "is not ca or server"),
        (lambda: kit.init(tmp_path / "2", "x", ["../a"]), "made of a–z"),
        (lambda: kit.init(tmp_path / "2", "https://x", ["a"]), "host or host:port"),
        (lambda: kit.init(tmp_path / "2", "x:70000", ["a"]), "from 1 to 65535"),
        (lambda: kit.join(made, "lab-c"), "umbel kit rotate lab-c"),
        (lambda: kit.rotate(made, "lab-z"), "there are hospital-a, lab-c"),
        (lambda: kit.rotate(made, kit.revoke(made, "lab-c").name), "revoked, which is for ever"),
        (lambda: kit.read(made / "hospital-a"), "federation.toml is missing"),
        (lambda: kit.read_site(made / "server"), "site.toml is missing"),
        (lambda: kit.make_key(made / "hospital-a"), "never overwritten"),
        (lambda: kit.join(made, "lab-d", made / "server" / "ca.crt"), "no public key in OpenSSH form"),
    ]
    for call, text in refused:
        with pytest.raises(kit.KitError, match=text):
            call()
    assert not (tmp_path / "2").exists()


def test_a_private_key_that_others_can_read_is_refused(made: Path) -> None:
    path = made / "lab-c" / "site.key"
    path.chmod(0o640)
    with pytest.raises(kit.KitError, match=f"mode 0640.*chmod 600 {path}"):
        kit.read_private_key(path)


def test_a_list_of_sites_that_was_changed_by_hand_is_refused(made: Path) -> None:
    path = made / "server" / "sites.json"
    entries = json.loads(path.read_text())
    entries[0]["public_key"] = entries[1]["public_key"]
    path.write_text(json.dumps(entries))
    with pytest.raises(kit.KitError, match="wrong state or fingerprint"):
        kit.read(made / "server")


def test_a_sites_options_are_read_and_checked(made: Path) -> None:
    folder = made / "lab-c"
    assert asdict(kit.read_site(folder)) == {
        "name": "lab-c",
        "number": 1,
        "server": "fed.example.org:9092",
        "data": "",
        "test": "",
        "model": "",
        "allow_code_execution": False,
        "methods": (),
        "public": "",
        "total_epsilon": 0.0,
        "secure_aggregation": False,
    }
    config = kit.update_site(folder, data="rows.jsonl", model="pkg:llm/weights")
    assert (config.data, config.model) == (str(folder.resolve() / "rows.jsonl"), "pkg:llm/weights")
    assert kit.update_site(folder, data="run").data == "run"
    good = (folder / "site.toml").read_text()
    for text, message in (
        (good + "colour = 1\n", "no key is called 'colour'"),
        (good.replace("number = 1", 'number = "1"'), "number must be a whole number, got '1'"),
        (good.replace("methods = []", "methods = [1]"), "methods must be a list of dotted names"),
        (good.replace('name = "lab-c"\n', ""), "name is missing"),
        ("= 1", "Invalid"),
    ):
        (folder / "site.toml").write_text(text)
        with pytest.raises(kit.KitError, match=message):
            kit.read_site(folder)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    runner = CliRunner()

    def told(app: object, *arguments: str, code: int = 0) -> str:
        done = runner.invoke(app, arguments)  # type: ignore[arg-type]
        assert done.exit_code == code, done.output
        return done.output

    assert "Site 1: kit/lab-c" in told(kit_app, "init", "--server", "fed.example.org", "--sites", "hospital-a, lab-c")
    printed = told(site_app, "key", "--out", "mine").splitlines()[0]
    assert printed in told(kit_app, "join", "lab-d", "--public-key", "mine/site.pub")
    assert "No server runs here" in told(kit_app, "rotate", "hospital-a")
    told(kit_app, "revoke", "lab-c")
    assert "Valid until" in told(kit_app, "renew")
    listed = json.loads(told(kit_app, "ls", "--json"))["sites"]
    assert [(row["number"], row["name"], row["state"]) for row in listed] == [
        (0, "hospital-a", "active"),
        (1, "lab-c", "revoked"),
        (2, "lab-d", "active"),
    ]
    assert listed[2]["fingerprint"] == printed
    assert "lab-d" in told(kit_app, "ls")
    assert told(kit_app, "revoke", "nobody", code=2).startswith("umbel: ")
