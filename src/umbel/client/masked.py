"""A client's part in an exchange whose sum alone can be opened. Between messages its secrets lie in a file of its folder.

What would open more than the sum of one set of clients is refused here, whoever asks: this side needs no faith in the server
beyond the keys that it passes on.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umbel import masking, wire
from umbel.masking import LOSS, ROWS, SEALED_BYTES, SECRET_BYTES, SHARE_BYTES, MaskError, from_text, to_text
from umbel.method import Factors

Answer = dict[str, Any]

FILE = "exchange.json"
"""In the client's folder, readable by its user alone."""

KINDS = ("keys", "shares", "unmask")
"""What is asked besides the upload itself, in this order; the upload comes before "unmask"."""


class Exchange:
    """One client's exchange, from its keys to its unmasking.

    Args:
        number: The client's.
        folder: Of its state.
    """

    def __init__(self, number: int, folder: Path) -> None:
        self._me, self._path = number, folder / FILE

    def answer(self, header: Mapping[str, Any]) -> Answer:
        """Answers a request of one of `KINDS`; returns what the reply's header says besides its echo.

        Raises:
            MaskError: It would open more than a sum, or does not fit what was said before.
        """
        return {"keys": self._keys, "shares": self._shares, "unmask": self._unmask}[header["kind"]](header)

    def _keys(self, header: Mapping[str, Any]) -> Answer:
        """Begins an exchange, whatever became of the one before: its keys are never used again."""
        masking.needs()
        asked = _numbers(header.get("clients"), "clients")
        if self._me not in asked or len(asked) < masking.FEWEST:
            raise MaskError(
                f"a sum over the clients {asked} would open what client {self._me} sends, or is not its own; allowed: "
                f"{masking.FEWEST} or more, with it among them"
            )
        before = self._read()
        state: dict[str, Any] = {"run": header["run"], "round": header["round"], "stage": "keys", "clients": asked}
        state |= {"seal": masking.fresh().hex(), "mask": masking.fresh().hex()}
        last, opened = before["last"] if before is not None and before["run"] == state["run"] else (0, None)
        if state["round"] < last:
            raise MaskError(
                f"the sum of round {last} is open, so that one of round {state['round']} would be another of the same uploads"
            )
        self._write({**state, "last": [last, opened]})
        return {"public": self._public(state)}

    def _public(self, state: Mapping[str, Any]) -> list[str]:
        return [to_text(masking.public(bytes.fromhex(state[use]))) for use in ("seal", "mask")]

    def _shares(self, header: Mapping[str, Any]) -> Answer:
        """Takes everybody's keys, and seals for each a share of the own two secrets."""
        state = self._at("keys", header)
        public = header.get("public")
        listed = _by_client(public, "public")
        if not set(listed) <= set(state["clients"]) or listed.get(self._me) != self._public(state):
            raise MaskError(f"the keys are of clients {sorted(listed)}, asked were {state['clients']}, or mine are not my own")
        self._enough(listed, state, "keys")
        keys = {client: _keys(client, own) for client, own in listed.items()}
        if len({key for own in keys.values() for key in own}) < 2 * len(keys):
            raise MaskError("the keys are not all different")
        exchange = masking.exchange_of(state["run"], state["round"], keys)
        secret, needed = masking.fresh(), masking.threshold(len(state["clients"]))
        own = masking.split(secret, needed, len(keys))
        key = masking.split(bytes.fromhex(state["mask"]), needed, len(keys))
        shares = {client: (own[i], key[i]) for i, client in enumerate(sorted(keys))}
        state |= {"stage": "shares", "public": {str(k): [x.hex() for x in both] for k, both in keys.items()}}
        state |= {"exchange": exchange.hex(), "secret": secret.hex(), "held": {str(self._me): _hex(shares[self._me])}}
        self._write(state)
        private = bytes.fromhex(state["seal"])
        sealed = {
            str(client): to_text(masking.seal(private, keys[client][0], exchange, self._me, client, b"".join(shares[client])))
            for client in keys
            if client != self._me
        }
        return {"sealed": sealed, "commitment": masking.commitment(secret)}

    def mask(
        self, header: Mapping[str, Any], rows: int, loss: float | None, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Returns the masked upload; in one exchange there is one.

        Args:
            header: The request's; "sealed" has the shares that the others sent.
            rows: n_k.
            loss: The training loss, None where there is none to be told.
            tensors: The plain upload, x.

        Returns:
            By the same names and shapes n_k x as int64, and n_k and n_k loss, all masked.

        Raises:
            MaskError: Too few take part, a share cannot be read, or a number is out of range.
        """
        state, keys = self._taken(header)
        among, exchange = state["among"], bytes.fromhex(state["exchange"])
        clients = len(state["clients"])
        parts = {key: masking.to_fixed(x, rows, clients) for key, x in sorted(tensors.items())}
        shapes: dict[str, tuple[int, ...]] = {key: tuple(tensors[key].shape) for key in parts}
        if loss is not None:
            parts[LOSS] = masking.to_fixed(torch.tensor([loss]), rows, clients)
        parts[ROWS] = torch.tensor([rows])
        order = sorted(parts)
        whole = torch.cat([parts[key] for key in order])
        others = {client: keys[client][1] for client in among if client != self._me}
        masking.mask(whole, self._me, bytes.fromhex(state["secret"]), bytes.fromhex(state["mask"]), others, exchange)
        # Before anything leaves: a second upload under the same masks would tell how it differs from the first.
        self._write({**state, "stage": "sent"})
        pieces = zip(order, whole.split([parts[key].numel() for key in order]), strict=True)
        return {key: x.reshape(shapes.get(key, (1,))) for key, x in pieces}

    def check(self, header: Mapping[str, Any]) -> None:
        """Checks a request before the client works for it: it could not be answered without this exchange.

        Raises:
            MaskError: As in `mask`.
        """
        self._taken(header)

    def _taken(self, header: Mapping[str, Any]) -> tuple[dict[str, Any], dict[int, tuple[bytes, ...]]]:
        """Returns the state with the shares that the others sent, and everybody's public keys."""
        state = self._at("shares", header)
        sealed = _by_client(header.get("sealed"), "sealed")
        keys = {int(k): tuple(bytes.fromhex(x) for x in both) for k, both in state["public"].items()}
        if not set(sealed) <= set(keys) - {self._me}:
            raise MaskError(f"shares of clients {sorted(sealed)}, whose keys were of {sorted(keys)}")
        self._enough({*sealed, self._me}, state, "shares")
        exchange, private = bytes.fromhex(state["exchange"]), bytes.fromhex(state["seal"])
        for client, text in sealed.items():
            text = from_text(text, SEALED_BYTES, f"what client {client} sealed")
            opened = masking.unseal(private, keys[client][0], exchange, client, self._me, text)
            state["held"][str(client)] = _hex((opened[:SHARE_BYTES], opened[SHARE_BYTES:]))
        return {**state, "among": sorted([*sealed, self._me])}, keys

    def _unmask(self, header: Mapping[str, Any]) -> Answer:
        """Gives the shares that open the sum over the clients named: one kind of share of each client, once."""
        state = self._at("sent", header)
        there = _numbers(header.get("survivors"), "survivors")
        if "answer" in state:
            if there != state["last"][1]:
                raise MaskError(f"this sum was opened for the clients {state['last'][1]}; a second one, of {there}, is refused")
            return state["answer"]
        if self._me not in there or not set(there) <= set(state["among"]):
            raise MaskError(f"survivors {there}, allowed: client {self._me} and others of {state['among']}")
        self._enough(there, state, "uploads")
        last, opened = state["last"]
        if state["round"] == last and there != opened:
            raise MaskError(
                f"this round's sum was opened for the clients {opened}; with another of {there}, their difference "
                "would be what single clients sent. The round can be repeated with the same clients only"
            )
        held = state["held"]
        answer = {
            "own": {str(k): to_text(bytes.fromhex(held[str(k)][0])) for k in there},
            "key": {str(k): to_text(bytes.fromhex(held[str(k)][1])) for k in state["among"] if k not in there},
        }
        # From here on no secret is needed, and what was told may be told again.
        left = {key: state[key] for key in ("run", "round", "stage", "clients", "among")}
        self._write({**left, "last": [state["round"], there], "answer": answer})
        return answer

    def _enough(self, clients: Mapping[int, Any] | set[int] | list[int], state: Mapping[str, Any], what: str) -> None:
        needed = masking.threshold(len(state["clients"]))
        if len(clients) < needed:
            raise MaskError(
                f"{what} of {len(clients)} clients, needed: {needed} of the {len(state['clients'])} that were asked"
            )

    def _at(self, stage: str, header: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the exchange's state, which must be of this run and round and at this stage."""
        state = self._read()
        if state is None:
            raise MaskError(f"client {self._me} has no keys for this exchange; it takes part again in the next round")
        got, wanted = [state["run"], state["round"], state["stage"]], [header["run"], header["round"], stage]
        if got != wanted:
            raise MaskError(f"client {self._me}: its exchange is at {got} (run, round, stage), the request needs {wanted}")
        return state

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def _write(self, state: Mapping[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".partial")
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)


def check_trained(client: int, before: Mapping[str, Factors], after: Mapping[str, Factors]) -> None:
    """Checks that training moved something, as the server does where it sees uploads.

    Args:
        client: Its number.
        before: The trained factors per layer, before training.
        after: The same, after it.

    Raises:
        MaskError: Nothing moved, or the update is zero.
    """
    if all(bool((x == before[layer][name]).all()) for layer, own in after.items() for name, x in own.items()):
        raise MaskError(f"client {client} has not trained: its factors are what it was sent (learning rate 0?)")
    if all({"A", "B"} <= own.keys() and not bool(own["B"].any()) for own in after.values()):
        raise MaskError(f"client {client} has not trained: B = 0 in every layer, so its update is zero")


def _numbers(value: Any, what: str) -> list[int]:
    if not isinstance(value, list) or not all(type(k) is int and 0 <= k < 2**31 for k in value) or len({*value}) != len(value):
        raise wire.WireError(f"{what!r} is {value!r:.80}, allowed: different client numbers")
    return sorted(value)


def _by_client(value: Any, what: str) -> dict[int, Any]:
    if not isinstance(value, dict) or not all(k.isascii() and k.isdecimal() and len(k) <= 10 for k in value):
        raise wire.WireError(f"{what!r} is {value!r:.80}, allowed: an entry per client number")
    return {int(k): own for k, own in value.items()}


def _keys(client: int, both: Any) -> tuple[bytes, bytes]:
    if not isinstance(both, list) or len(both) != 2:
        raise MaskError(f"the public keys of client {client} are {both!r:.80}, wanted: two")
    seal, mask = (from_text(text, SECRET_BYTES, f"a public key of client {client}") for text in both)
    return seal, mask


def _hex(shares: tuple[bytes, bytes]) -> list[str]:
    return [share.hex() for share in shares]
