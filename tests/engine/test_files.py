"""The engine of carried files: one file per ask, all replies or none, and nothing asked twice."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from umbel import envelope, kit, wire
from umbel.engine import Ask, Reply, Waiting
from umbel.engine.files import Files, own_key, requests_in

SITES = ["hospital-a", "hospital-b", "lab-c"]
JOB = {"run": "0123456789abcdef", "member": "fedit", "clients": 3, "config": {"seed": 3}}


def payload(client: int, round: int = 1, kind: str = "train", **more: object) -> bytes:
    return wire.encode(wire.Message({"run": JOB["run"], "round": round, "client": client, "kind": kind, **more}))


class Place:
    """A kit and the folder of a job."""

    def __init__(self, place: Path) -> None:
        self.kit, self.folder = place / "kit", place / "run"
        self.federation = kit.init(self.kit, "fed.example.org", SITES)

    def ask(self, *asks: Ask, **job: object) -> list[Reply]:
        return list(Files(self.folder, self.federation, {**JOB, **job}).ask(asks))

    def waits(self, *asks: Ask, **job: object) -> list[tuple[str, str]]:
        with pytest.raises(Waiting) as waiting:
            self.ask(*asks, **job)
        return [(own["site"], own["state"]) for own in waiting.value.asked]

    def outbox(self) -> dict[str, bytes]:
        return {path.relative_to(self.folder / "outbox").as_posix(): path.read_bytes() for path in self.files("outbox")}

    def files(self, box: str) -> list[Path]:
        return sorted(path for path in (self.folder / box).glob("*/*"))

    def reply(self, client: int, body: bytes) -> None:
        """Puts a good reply to the site's last request into the inbox."""
        site = SITES[client]
        request = requests_in(self.folder, own_key(self.federation.folder), site)[-1]
        head = replace(request.envelope.head, sender=site, to="server", reply_to=request.envelope.digest, job={}, most_bytes=0)
        head = replace(head, length=len(body), sha256=sha256(body).hexdigest())
        envelope.write(request.reply, head, body, kit.read_private_key(self.kit / site / "site.key"))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_each_ask_is_a_signed_file_for_its_site_and_the_replies_come_when_all_are_there(place):
    asks = [Ask(k, payload(k), 1000 + k) for k in range(3)]
    assert place.waits(*asks) == [(name, "missing") for name in SITES]
    assert list(place.outbox()) == [f"{name}/fedit-round-1-train.umbel" for name in SITES]
    for k, path in enumerate(place.files("outbox")):
        seen = envelope.look(path, own_key(place.federation.folder))
        assert envelope.read(seen, 10**6) == payload(k)
        assert (seen.head.to, seen.head.run, seen.head.member) == (SITES[k], JOB["run"], "fedit")
        assert (seen.head.most_bytes, seen.head.job) == (1000 + k, {"clients": 3, "config": {"seed": 3}})
    place.reply(2, b"two")
    place.reply(0, b"zero")
    assert place.waits(*asks) == [("hospital-a", "here"), ("hospital-b", "missing"), ("lab-c", "here")]
    place.reply(1, b"one")
    assert place.ask(*asks) == [Reply(0, b"zero"), Reply(1, b"one"), Reply(2, b"two")]


def test_asking_again_writes_nothing_even_if_a_site_has_joined_since(place):
    place.waits(Ask(0, payload(0)))
    before = place.outbox()
    place.waits(Ask(0, payload(0)), clients=4)
    assert place.outbox() == before


def test_another_request_in_the_same_round_is_another_file(place):
    place.waits(Ask(0, payload(0)))
    place.reply(0, b"its files are gone")
    assert place.waits(Ask(0, payload(0, has=-1))) == [("hospital-a", "missing")]
    assert list(place.outbox()) == ["hospital-a/fedit-round-1-train-2.umbel", "hospital-a/fedit-round-1-train.umbel"]
    assert place.ask(Ask(0, payload(0))) == [Reply(0, b"its files are gone")]


def test_requests_and_replies_of_durable_rounds_are_removed_and_another_methods_are_not(place):
    for member in ("fedit", "flora"):
        place.waits(Ask(0, payload(0)), Ask(1, payload(1)), member=member)
    place.reply(0, b"x")
    place.waits(Ask(1, payload(1, 2)))
    assert list(place.outbox()) == [
        "hospital-a/flora-round-1-train.umbel",
        "hospital-b/fedit-round-2-train.umbel",
        "hospital-b/flora-round-1-train.umbel",
    ]
    assert [path.name for path in place.files("inbox")] == ["flora-round-1-train.umbel"]


def test_nobody_waits_for_who_may_join_later_and_who_comes_is_heard(place):
    opening = [Ask(k, payload(k, 2, "open")) for k in (1, 2)]
    files = Files(place.folder, place.federation, JOB)
    assert list(files.ask(opening)) == [Reply(k, None, "brought no reply: missing") for k in (1, 2)]
    with pytest.raises(Waiting) as waiting:
        list(files.ask([Ask(0, payload(0, 2))]))
    assert [(own["site"], own["state"]) for own in waiting.value.asked] == [
        ("hospital-a", "missing"),
        ("hospital-b", "may join"),
        ("lab-c", "may join"),
    ]
    assert str(waiting.value) == "waiting for hospital-a"
    place.reply(2, b"I am here")
    assert place.ask(*opening)[1] == Reply(2, b"I am here")


def test_a_client_without_a_site_or_of_a_revoked_one_has_a_reason(place):
    kit.revoke(place.kit, "lab-c")
    assert place.ask(Ask(2, payload(2)), Ask(7, payload(7))) == [
        Reply(2, None, "site 'lab-c' is revoked"),
        Reply(7, None, "no site has this number"),
    ]


def test_a_reply_that_was_put_into_the_inbox_and_not_imported_is_checked_all_the_same(place):
    place.waits(Ask(0, payload(0), 10), Ask(1, payload(1), 10))
    place.reply(0, b"eleven byte")
    place.files("outbox")
    first, second = requests_in(place.folder, own_key(place.federation.folder))
    second.reply.parent.mkdir(parents=True)
    second.reply.write_bytes(first.reply.read_bytes())
    with pytest.raises(Waiting) as waiting:
        place.ask(Ask(0, payload(0), 10), Ask(1, payload(1), 10))
    reasons = [own["reason"] for own in waiting.value.asked]
    assert reasons[0].endswith("its payload has 11 bytes, allowed: 10")
    assert "signed with the key SHA256:" in reasons[1]
