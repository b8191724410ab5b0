"""Adapters that umbel itself trained, merged from their folders: the bits that the server makes of the same uploads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
import umbel
from umbel import method as methods
from umbel import run as running
from umbel.method import Factors
from umbel.server import Aggregated, Aggregator, LayerShape, Server

ROWS = (60, 90, 30)
PREFIX = "base_model.model."


def _trained(folder: Path, table: Callable[..., dict[str, Any]], **sections: Any) -> list[Path]:
    """Trains three sites, each with rows of its own, one base model under them all, and returns their adapters."""
    adapters: list[Path] = []
    common = table(folder, **sections)
    for k, rows in enumerate(ROWS):
        own = folder / f"site-{k}"
        own.mkdir()
        data = tiny.data(own)
        lines = [json.dumps(row) for row in tiny.texts(rows, seed=10 + k)]
        Path(data["train"]).write_text("\n".join(lines) + "\n", encoding="utf-8")
        job = {**common, "data": data, "split": {"kind": "iid", "clients": 1}}
        adapters.append(running.run(job, own / "run", baselines=False) / "adapter")
    return adapters


@pytest.fixture(scope="module", params=["head", "pooled", "causal"])
def adapters(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "causal":
        return _trained(folder, tiny.causal_table)
    return _trained(folder, tiny.table, model={"pooling": "mean" if request.param == "pooled" else "model"})


def _upload(folder: Path) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Returns what the site would have sent: umbel's folders are at scale 1, so files are in units of ΔW."""
    factors: dict[str, Factors] = {}
    plain: dict[str, Tensor] = {}
    for key, x in load_file(folder / "adapter_model.safetensors").items():
        name = key.removeprefix(PREFIX)
        layer, found, letter = name.removesuffix(".weight").partition(".lora_")
        if found:
            factors.setdefault(layer, {})[letter] = x
        else:
            plain[name] = x
    if (folder / "head.safetensors").exists():  # of a mean over the tokens, which no stock class has
        plain |= load_file(folder / "head.safetensors")
    return factors, plain


def _aggregated(adapters: list[Path], name: str, options: dict[str, Any], weights: list[int]) -> Aggregated:
    uploads = [_upload(folder) for folder in adapters]
    shapes = {
        layer: LayerShape(own["B"].shape[0], own["A"].shape[1], own["A"].shape[0]) for layer, own in uploads[0][0].items()
    }
    aggregator = Aggregator(methods.load(name, **options), Server(shapes, seed=0))
    for client, (n, (factors, plain)) in enumerate(zip(weights, uploads)):
        aggregator.add(client, n, factors, plain)
    return aggregator.done()


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("fedit", {}),
    ("flora_na", {}),
    ("florist", {"energy": 0.9}),
    ("florist", {"energy": 1.0}),
    ("florist", {"energy": 1.0, "adopt": "merge"}),
    ("flora", {}),
    ("lora_fair", {}),
    ("best_rank", {}),
    ("flexlora", {}),
    ("hetlora", {}),
]


@pytest.mark.parametrize(("name", "options"), METHODS, ids=str)
def test_what_the_command_writes_is_what_the_server_sends(
    adapters: list[Path], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    report = umbel.merge(adapters, tmp_path / "out", method=name, options=options, dtype="float32")
    wanted = _aggregated(adapters, name, options, list(ROWS))  # the rows that each folder's umbel.json tells
    factors, plain = _upload(tmp_path / "out")
    assert factors.keys() == wanted.downloads.keys()
    for layer, download in wanted.downloads.items():
        sent = download.factors if download.merge is None else dict(zip("BA", download.merge))
        # Folders hold the pair at scale 1, so nothing stands between the server's numbers and the file's.
        assert torch.equal(factors[layer]["A"], sent["A"]), layer
        assert torch.equal(factors[layer]["B"], sent["B"]), layer
        assert report["layers"][layer]["rank"] == sent["A"].shape[0]
    assert plain.keys() == wanted.plain.keys()
    assert all(torch.equal(x, wanted.plain[name]) for name, x in plain.items())
    assert wanted.error is not None
    for layer, error in wanted.error.items():
        assert report["layers"][layer]["error"] == pytest.approx(error, rel=1e-5, abs=5e-8)


def test_what_is_merged_into_the_base_comes_out_beside_the_means(adapters: list[Path], tmp_path: Path) -> None:
    umbel.merge(adapters, tmp_path / "out", method="fedex_lora", dtype="float32")
    factors, _ = _upload(tmp_path / "out")
    for layer, download in _aggregated(adapters, "fedex_lora", {}, list(ROWS)).downloads.items():
        assert download.merge is not None
        own = factors[layer]
        wanted = download.factors["B"] @ download.factors["A"] + download.merge[0] @ download.merge[1]
        assert own["A"].shape[0] == download.factors["A"].shape[0] + download.merge[1].shape[0]
        assert torch.allclose(own["B"] @ own["A"], wanted, atol=1e-7)


def test_weights_that_are_given_win_over_those_of_the_folders(adapters: list[Path], tmp_path: Path) -> None:
    umbel.merge(adapters, tmp_path / "out", method="fedit", weights=[1, 2, 5], dtype="float32")
    factors, _ = _upload(tmp_path / "out")
    for layer, download in _aggregated(adapters, "fedit", {}, [1, 2, 5]).downloads.items():
        assert torch.equal(factors[layer]["A"], download.factors["A"])
