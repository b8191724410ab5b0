"""Facts that clients say of themselves before the first round: what of them the server keeps, and what must agree."""

import re
from collections.abc import Mapping
from typing import Any

PACKAGES = ("umbel", "torch", "transformers", "peft")
"""What must be the same on both sides, to the minor version: a patch does not change what is trained or sent."""

HASHES = {"model": "base model sha256", "tokenizer": "tokenizer sha256", "chat_template": "chat template sha256"}
"""What must be the same on both sides to the last byte, and what to call it."""

BYTES = ("disk_bytes", "needs_bytes", "memory_bytes")


def read(said: Any) -> dict[str, Any]:
    """Returns what a client says of itself, with all that is no fact of the expected type and size left out.

    >>> read({"versions": {"torch": "2.9.0", "peft": 3}, "model": "ab" * 32, "disk_bytes": -1, "surprise": [1]})["versions"]
    {'torch': '2.9.0'}
    """
    given: dict[str, Any] = said if isinstance(said, dict) else {}
    versions: dict[str, Any] = given["versions"] if isinstance(given.get("versions"), dict) else {}
    facts: dict[str, Any] = {
        "versions": {name: versions[name] for name in (*PACKAGES, "python") if _is_text(versions.get(name), 40)}
    }
    facts |= {name: given[name] for name in HASHES if _is_text(given.get(name), 200)}
    facts |= {name: given[name] for name in BYTES if type(given.get(name)) is int and 0 <= given[name] < 2**63}
    seconds = given.get("step_seconds")
    if type(seconds) is float and 0 <= seconds < 1e9:
        facts["step_seconds"] = seconds
    return facts


def mismatch(expected: Mapping[str, Any], said: Mapping[str, Any]) -> str | None:
    """Returns why a client cannot take part, with its value and the server's; None where it can.

    Args:
        expected: The server's own facts; what is not among them is not compared.
        said: The client's, as `read` returns them.
    """
    own, others = said.get("versions", {}), expected.get("versions", {})
    for name in PACKAGES:
        if name in others and _minor(own.get(name)) != _minor(others[name]):
            return f"{name} {own.get(name, 'not said')}, server {others[name]}; install the same minor version on both sides"
    for name, title in HASHES.items():
        if name in expected and said.get(name) != expected[name]:
            return f"{title} {_short(said.get(name))}, server {_short(expected[name])}"
    disk, needs = said.get("disk_bytes"), said.get("needs_bytes")
    if disk is not None and needs is not None and disk < needs:
        return f"{disk / 1e6:.1f} MB free on the disk of its state, needed: at least {needs / 1e6:.1f} MB"
    return None


def _is_text(value: Any, longest: int) -> bool:
    return isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()


def _minor(version: Any) -> str | None:
    match = re.match(r"\d+\.\d+", version) if isinstance(version, str) else None
    return match[0] if match else version


def _short(value: Any) -> str:
    text = str(value) if value is not None else "not said"
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else text[:80]
