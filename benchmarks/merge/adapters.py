"""Invented client adapters: the factors of one layer, and whole PEFT folders on disk.

Two kinds of clients. "unrelated" ones share nothing: every factor is drawn by itself, and the sum of products has the full rank
of the stack and a flat spectrum. "alike" ones are what a federation makes: a common pair whose columns fall off, and a drift of
each client's own. Everything is drawn from a seed of (kind, layer, client), so that every run sees the same numbers.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from umbel import algebra
from umbel.method import Factors

Kind = Literal["alike", "unrelated"]
KINDS: tuple[Kind, ...] = ("alike", "unrelated")
DRIFT = 0.3  # ‖drift‖ / ‖common‖ of an "alike" client's factors
LARGEST = 12e9  # bytes of distinct files that `write` makes at most


@dataclass(frozen=True)
class Model:
    """The adapted weights of one model.

    Args:
        name: For tables.
        shapes: Per weight of one block its name and (d_out, d_in).
        blocks: How many blocks.
        rank: r of every adapter.
    """

    name: str
    shapes: dict[str, tuple[int, int]]
    blocks: int
    rank: int = 16

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) by the layer's full name."""
        return {f"model.layers.{i}.{name}": shape for i in range(self.blocks) for name, shape in self.shapes.items()}

    @property
    def bytes(self) -> int:
        """Of one adapter's tensors in float32."""
        return sum(4 * self.rank * (d_out + d_in) for d_out, d_in in self.layers.values())


SQUARE, WIDE, TALL = (4096, 4096), (11008, 4096), (4096, 11008)  # (d_out, d_in)
ATTENTION = {f"self_attn.{name}_proj": SQUARE for name in "qkvo"}
MLP = {"mlp.gate_proj": WIDE, "mlp.up_proj": WIDE, "mlp.down_proj": TALL}
QV = Model("Llama-2-7B, q and v", {name: ATTENTION[name] for name in ("self_attn.q_proj", "self_attn.v_proj")}, 32)
QV_FEW = Model("Llama-2-7B, q and v, 2 blocks", QV.shapes, 2)
ALL = Model("Llama-2-7B, all seven", ATTENTION | MLP, 32)
ALL_FEW = Model("Llama-2-7B, all seven, 4 blocks", ALL.shapes, 4)
SMALL = Model("small", {"self_attn.q_proj": (256, 192), "self_attn.v_proj": (192, 256)}, 2, rank=4)


def rows(client: int) -> int:
    """Returns n_k, a client's number of training rows: unequal, so that weights count."""
    return 400 + 150 * (client % 7)


def factors(kind: Kind, shape: tuple[int, int], rank: int, client: int, layer: str = "") -> Factors:
    """Returns one client's factors of one layer, float32: A rank × d_in, B d_out × rank; ‖B A‖ does not depend on the width."""
    A, B = _pair(shape, rank, algebra.seed_of(kind, layer, client))
    if kind == "unrelated":
        return {"A": A, "B": B}
    common_A, common_B = _pair(shape, rank, algebra.seed_of(kind, layer, "common"))
    falling = torch.arange(1, rank + 1).reciprocal()  # singular values 1, 1/2, 1/3 …
    return {"A": common_A + DRIFT * A, "B": (common_B + DRIFT * B) * falling}


def _pair(shape: tuple[int, int], rank: int, seed: int) -> tuple[Tensor, Tensor]:
    d_out, d_in = shape
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=generator).mul_(d_in**-0.5)
    return A, torch.randn(d_out, rank, generator=generator).mul_(d_out**-0.5)


def write(folder: Path, kind: Kind, model: Model, clients: int, distinct: int) -> list[Path]:
    """Writes PEFT folders 0000, 0001 … and returns them.

    Only the first `distinct` have files of their own; the others are hard links to them in turn, since a thousand adapters of a
    7B model would fill a disk. They are opened and read one by one all the same.

    Args:
        folder: Made where missing.
        kind: Of clients.
        model: What is adapted.
        clients: How many folders.
        distinct: How many of them differ.

    Raises:
        OSError: The files would take more than `LARGEST` bytes or half of what is free.
    """
    distinct = min(distinct, clients)
    folder.mkdir(parents=True, exist_ok=True)
    needed, allowed = distinct * model.bytes, min(LARGEST, shutil.disk_usage(folder).free / 2)
    if needed > allowed:
        raise OSError(f"{distinct} adapters of {model.name} take {needed:,} bytes, allowed: {allowed:,.0f}; take fewer")
    made = [folder / f"{k:04}" for k in range(clients)]
    for k, own in enumerate(made):
        own.mkdir()
        if k < distinct:
            _write_one(own, kind, model, k)
            continue
        for file in made[k % distinct].iterdir():
            os.link(file, own / file.name)
    return made


def _write_one(folder: Path, kind: Kind, model: Model, client: int) -> None:
    tensors: dict[str, Tensor] = {}
    for layer, shape in model.layers.items():
        for name, x in factors(kind, shape, model.rank, client, layer).items():
            tensors[f"base_model.model.{layer}.lora_{name}.weight"] = x
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    _write_json(folder / "adapter_config.json", config(model))
    _write_json(folder / "umbel.json", {"num_examples": rows(client)})


def config(model: Model) -> dict[str, Any]:
    """Returns `adapter_config.json` as PEFT writes it, at scale α / r = 1."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"invented/{model.name.partition(',')[0].lower()}",
        "revision": None,
        "inference_mode": True,
        "r": model.rank,
        "lora_alpha": model.rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(name.rpartition(".")[2] for name in model.shapes),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
