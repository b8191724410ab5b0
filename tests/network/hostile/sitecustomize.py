"""A hostile site: put before everything else on PYTHONPATH, it changes what this site answers, and nothing else of umbel.

The file `attack.json` in the site's folder says per round what is done. What is changed is the reply's bytes where the worker
makes them, or Flower's records where the process that Flower starts packs them.
"""

import json
import os
import sys
from pathlib import Path

FOLDER = os.environ.get("HOSTILE_SITE", "")


def attack_of(payload):
    size = int.from_bytes(payload[:8], "little")
    try:
        header = json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["umbel"])
    except ValueError:
        return "", {}  # it is damaged already
    if header.get("kind") != "train":
        return "", header
    return json.loads(Path(FOLDER, "attack.json").read_text()).get(str(header["round"]), ""), header


def damaged(name, payload):
    import torch

    from umbel import wire

    message = wire.decode(payload)
    header, tensors = dict(message.header), dict(message.tensors)
    first = next(iter(tensors))
    if name == "old":
        return Path(FOLDER, "first-reply").read_bytes()
    if name == "truncated":
        return payload[: len(payload) // 2]
    if name == "pickle":
        import pickle

        return (64).to_bytes(8, "little") + pickle.dumps({"factors": [1.0] * 50})
    if name == "oversized":
        tensors["plain|extra"] = torch.zeros(30_000_000)
    elif name == "nan":
        tensors[first] = torch.full_like(tensors[first], float("nan"))
    elif name == "rank":
        tensors[first] = torch.zeros(tensors[first].shape[0] + 3, *tensors[first].shape[1:])
    elif name == "huge":
        tensors = {key: x * (1e5 if key.endswith("|B") else 1) for key, x in tensors.items()}
    elif name == "zero":
        tensors = {key: x * (0 if key.endswith("|B") else 1) for key, x in tensors.items()}
    elif name == "run":
        header["run"] = "somebody else's"
    elif name == "client":
        header["client"] = 0
    elif name == "rows":
        header["rows"] = 10**9
    elif name == "raises":
        raise ValueError("could not convert string to float: 'Jane Doe, born 1961'")
    return wire.encode(wire.Message(header, tensors))


def install_worker():
    from umbel.client import worker

    honest = worker.answer_here

    def answer_here(work, job, payload):
        reply, error = honest(work, job, payload)
        if error:
            return reply, error
        name, header = attack_of(reply)
        if header.get("kind") == "train" and header["round"] == 1:
            Path(FOLDER, "first-reply").write_bytes(reply)
        if name == "raises":

            class Raising:
                def answer(self, job, payload):
                    return damaged(name, payload)

            return honest(Raising(), job, reply)
        return (damaged(name, reply) if name and not name.startswith("flower-") else reply), error

    worker.answer_here = answer_here


def install_app():
    from umbel.engine import flower

    honest = flower.to_content

    def to_content(payload, job=None, error=""):
        content = honest(payload, job, error)
        name, _ = attack_of(payload) if payload and not error else ("", {})
        if name == "flower-bomb":
            # One chunk of a mebibyte, listed a million times: a terabyte for whoever joins them.
            array = content["payload"]["body"]
            array.data = os.urandom(2**20)
            deflate = type(array).deflate

            class Bomb(type(array)):
                def deflate(self):
                    return deflate(self)

            one = array.slice_array()
            array.__dict__["_chunks"] = one * 1_000_000
        elif name == "flower-empty":
            del content["payload"]
        elif name == "flower-other":
            content["payload"]["body"] = content["payload"]["body"].__class__(
                dtype="bytes", shape=(1,), stype="safetensors", data=b"x"
            )
        return content

    flower.to_content = to_content
    if "umbel.app" in sys.modules:
        sys.modules["umbel.app"].to_content = to_content


if FOLDER:
    arguments = " ".join(sys.orig_argv)
    if "umbel.client.worker" in arguments:
        install_worker()
    elif "flwr-clientapp" in arguments:
        install_app()
