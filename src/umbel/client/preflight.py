"""What a site says of itself before the first round: versions, hashes, room, and the time of a training step."""

import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umbel import __version__
from umbel.client import fit, model, private
from umbel.client.prompts import pad_id
from umbel.config import Config

if TYPE_CHECKING:
    from umbel.client.client import Resident

STATES = 3
"""Files of a client's state that its disk must have room for: two, since a lost reply leaves the older one in force, and a
third while it is written."""


def facts(resident: "Resident", folder: Path, client: int) -> dict[str, Any]:
    """Returns all that a client says of itself; no later bit of the run depends on it having been asked.

    Args:
        resident: Base model, adapter and rows of this process.
        folder: Of the client's state; it need not exist yet.
        client: Its number.

    Returns:
        "versions", the hashes "model", "tokenizer" and "chat_template", the bytes "disk_bytes" (free where its state goes),
        "needs_bytes" (what its state takes at least; methods that merge products take more) and "memory_bytes" (available;
        left out where the system does not say), and "step_seconds", an optimizer step (left out without rows).
    """
    memory = available_memory()
    own: dict[str, Any] = {**resident.identity, "disk_bytes": _free_disk(folder)}
    own["needs_bytes"] = STATES * _state_bytes(resident, client)
    own |= {} if memory is None else {"memory_bytes": memory}
    return own | ({"step_seconds": _step_seconds(resident, client)} if resident.rows_of(client) else {})


def identity(config: Config, tokenizer: Any) -> dict[str, Any]:
    """Returns what the server and all clients of a run must share: versions and hashes."""
    names = ("torch", "transformers", "peft")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {
        "versions": {"umbel": __version__, "python": platform.python_version(), **versions},
        "model": model.fingerprint(config),
        "tokenizer": _sha256(_tokenizer(tokenizer)),
        "chat_template": _sha256(tokenizer.chat_template) if getattr(tokenizer, "chat_template", None) else "none",
    }


def _tokenizer(tokenizer: Any) -> Any:
    """Returns all that decides which tokens a text has, but not what its last use left in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inside = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    return [{**inside, "truncation": None, "padding": None}, tokenizer.special_tokens_map]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode(errors="backslashreplace")).hexdigest()


def _free_disk(folder: Path) -> int:
    place = next(above for above in (folder, *folder.resolve().parents) if above.exists())
    return shutil.disk_usage(place).free


def available_memory() -> int | None:
    """Returns the bytes of main memory that this process may still take; None where the system does not say."""
    known: list[int] = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = [line.split() for line in meminfo.read_text().splitlines()]
        known += [int(line[1]) * 1024 for line in lines if line[0] == "MemAvailable:"]
    elif "SC_AVPHYS_PAGES" in os.sysconf_names:
        known.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    # In a container the machine's memory is not ours.
    most, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if most.exists() and used.exists() and most.read_text().strip().isdecimal():
        known.append(max(0, int(most.read_text()) - int(used.read_text())))
    return min(known, default=None)


def _state_bytes(resident: "Resident", client: int) -> int:
    """Returns what a client's state takes at least, in float32: factors, head and, where it is kept, AdamW's two moments."""
    layers, plain = resident.adapter.layers, resident.adapter.plain_parameters
    ranks = {name: resident.ranks.get(client, shape.rank) for name, shape in layers.items()}
    numbers = sum(ranks[name] * (shape.d_in + shape.d_out) for name, shape in layers.items())
    numbers += sum(parameter.numel() for parameter in plain.values())
    training = resident.config.training
    moments = 2 if training.optimizer_state == "keep" and training.optim == "adamw_torch" else 0
    return 4 * numbers * (1 + moments)


def _step_seconds(resident: "Resident", client: int) -> float:
    """Times the second of two optimizer steps (the first one sets things up) at a learning rate of zero.

    Every request begins by putting its client on the model, so an adapter begun afresh is left as good as it was found; `fit`
    draws from a generator of its own.
    """
    config, times = resident.config, list[float]()
    training = replace(config.training, max_steps=2, learning_rate=0.0, head_learning_rate=0.0, optimizer_state="reset")
    phase = next(phase for phase in resident.method.plan(config.rounds) if phase.trains)
    # An R between A and B comes with the first download; A and B take as long.
    trains = phase.trains if set(phase.trains) <= {"A", "B"} else ("A", "B")
    resident.adapter.restart(config.seed, resident.lora(client))
    rows, pad = resident.rows_of(client), pad_id(resident.base.tokenizer)
    rest = 1, config.rounds, {}, lambda step, steps: times.append(time.perf_counter())
    if config.privacy.unit == "example":
        # Nothing of it leaves but the time, which is that of a step as the run will take it.
        rate, seed = private.sample_rate(config.training, len(rows)), secrets.randbits(256)
        noise = private.Noise(1.0, config.privacy.max_grad_norm, rate, seed)
        private.fit(resident.adapter, trains, rows, training, pad, noise, *rest)
    else:
        fit.fit(resident.adapter, trains, rows, training, pad, config.seed, *rest)
    resident.adapter.restart(config.seed)
    return round(times[1] - times[0], 6)
