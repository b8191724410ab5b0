"""What a run left on disk, for tests that look into it."""

import json
from pathlib import Path
from typing import Any

import torch

from umbel import wire


def lines(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of rounds.jsonl."""
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def kept(folder: Path, client: int) -> dict[str, torch.Tensor]:
    """Returns a client's newest state: raw parameters by "layer|name"."""
    newest = max((folder / "clients" / str(client)).glob("*.safetensors"), key=lambda path: int(path.stem))
    return wire.decode(newest.read_bytes()).tensors
