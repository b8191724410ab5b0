"""What a client sends where the wire rounds: what rounding loses is kept, and made good by later uploads."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from recorded import lines
from umbel import run as running
from umbel import wire
from umbel.client.adapter import Adapter
from umbel.client.client import LOST, Client, Resident, _same_directions, tokens
from umbel.client.data import load as load_data
from umbel.client.model import load as load_model
from umbel.config import configs
from umbel.method import Download

METHODS: list[dict[str, Any]] = [
    {"name": "fedit"},
    {"name": "flora_na"},
    {"name": "florist"},
    {"name": "flora"},
    {"name": "fed_sb", "lora": {"r": 8, "lora_alpha": 8}},
]


def a_client(tmp_path: Path, dtype: str) -> Client:
    resident: Any = SimpleNamespace(config=SimpleNamespace(wire=SimpleNamespace(dtype=dtype)))
    return Client(0, resident, tmp_path)


def arrived(client: Client, upload: torch.Tensor, rounds: int, feedback: bool) -> torch.Tensor:
    """The mean of what the server holds after the same upload was sent again and again."""
    key, kept, total = "q|A", dict[str, torch.Tensor](), torch.zeros_like(upload, dtype=torch.float64)
    for _ in range(rounds):
        sent, kept = client._make_good({key: upload}, kept if feedback else {})
        total += wire.decode(wire.encode(wire.Message({}, sent), "int8")).tensors[key].double()
    return total / rounds


def test_over_rounds_what_arrives_is_what_was_trained_on_average(tmp_path: Path) -> None:
    upload = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    client = a_client(tmp_path, "int8")
    without = float((arrived(client, upload, 64, False) - upload).abs().max())
    within = float((arrived(client, upload, 64, True) - upload).abs().max())
    step = float(upload.abs().amax(1).max()) / 127
    assert without > step / 3  # the same rounding each time never averages out
    assert within < step / 64


def test_other_wires_send_what_was_trained_and_keep_nothing(tmp_path: Path) -> None:
    upload = {"q|A": torch.randn(4, 50)}
    for dtype in ("float32", "bfloat16"):
        sent, kept = a_client(tmp_path, dtype)._make_good(upload, {})
        assert sent is upload
        assert kept == {}


def test_an_upload_that_is_not_finite_does_not_spoil_the_next(tmp_path: Path) -> None:
    client = a_client(tmp_path, "int8")
    _, kept = client._make_good({"q|A": torch.tensor([[float("nan"), 1.0]])}, {})
    assert kept == {}


def test_what_was_lost_at_another_rank_is_not_added(tmp_path: Path) -> None:
    upload = torch.ones(2, 3)
    sent, _ = a_client(tmp_path, "int8")._make_good({"q|A": upload}, {f"{LOST}q|A": torch.ones(3, 3)})
    assert torch.equal(sent["q|A"], upload)


def test_the_rounding_of_an_upload_is_its_relative_error(tmp_path: Path) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    for dtype in ("bfloat16", "int8"):
        own = a_client(tmp_path, dtype)._rounding({"q|B": x})["rounding"]
        assert own == pytest.approx(float((x - wire.rounded(x, dtype, "q|B")).norm() / x.norm()), rel=1e-4)
        assert 1e-4 < own < 2e-2
    assert a_client(tmp_path, "float32")._rounding({"q|B": x}) == {}
    assert a_client(tmp_path, "int8")._rounding({"q|B": torch.zeros(2, 2)}) == {"rounding": 0.0}


def test_directions_are_the_same_after_a_mean_and_others_after_a_decomposition() -> None:
    A = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    other = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    assert _same_directions(A, A + 0.1 * other)
    assert not _same_directions(A, torch.linalg.svd(A, full_matrices=False)[2])
    assert not _same_directions(A, other)
    assert not _same_directions(A, A[:3])


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    table = tiny.table(folder, METHODS, wire={"dtype": "int8"}, rounds=4, training={"max_steps": 5})
    return running.run(table, folder / "run")


@pytest.fixture(scope="module")
def wide_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float32")
    return running.run(tiny.table(folder, METHODS, rounds=4, training={"max_steps": 5}), folder / "run")


def kept(folder: Path, client: int) -> set[str]:
    newest = max((folder / "clients" / str(client)).glob("*.safetensors"), key=lambda path: int(path.stem))
    return {key for key in wire.decode(newest.read_bytes()).tensors if key.startswith(LOST)}


@pytest.mark.parametrize("name", [method["name"] for method in METHODS])
def test_methods_train_with_int8_on_the_wire_nearly_as_with_float32(job: Path, wide_job: Path, name: str) -> None:
    small, wide = lines(job / name), lines(wide_job / name)
    trained = [line for line in small if line["phase"] == "train"]
    assert trained[-1]["global"]["loss"] < trained[0]["global"]["loss"]
    assert trained[-1]["global"]["loss"] == pytest.approx(wide[-1]["global"]["loss"], abs=0.05)
    assert all(0 < x < 0.02 for line in trained for x in line["rounding"].values())
    assert all(set(line["rounding"]) == {"0", "1", "2"} for line in trained)
    assert all(line["rounding"] == {} for line in wide)
    assert small[-1]["bytes_up"]["0"] < wide[-1]["bytes_up"]["0"]


def test_what_was_lost_is_in_the_clients_file_by_the_names_of_its_upload(job: Path) -> None:
    found = kept(job / "fedit", 0)
    assert {key.rpartition("|")[2] for key in found if not key.startswith(LOST + "plain|")} == {"A", "B"}
    assert any(key.startswith(LOST + "plain|") for key in found)
    assert {key.rpartition("|")[2] for key in kept(job / "fed_sb", 1) if not key.startswith(LOST + "plain|")} == {"R"}


# What a download leaves of it


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory) -> Resident:
    (config,) = configs(tiny.table(tmp_path_factory.mktemp("resident"), wire={"dtype": "int8"})).values()
    dataset = load_data(config)
    base = load_model(config, len(dataset.labels))
    adapter = Adapter(base.model, config.lora, base.heads, config.seed)
    return Resident(config, base, adapter, dataset, *tokens(config, base, dataset))


def after(resident: Resident, folder: Path, download: Any) -> set[str]:
    """Layers of which a client still makes good what was lost, after one layer of its adapter was given a download."""
    adapter, client = resident.adapter, Client(0, resident, folder)
    adapter.restart(3)
    layer, other = list(adapter.layers)[:2]
    lost = {f"{LOST}{name}|{key}": torch.ones(2, 2) for name in (layer, other) for key in ("A", "B")}
    client._keep(
        {"has": -1, "keep": 0, "kind": "train"},
        {**lost, f"{LOST}plain|head": torch.ones(2, 2), "optimizer|AB|0.step": torch.tensor(3.0)},
    )
    header, tensors = wire.pack({layer: download(adapter.read()[layer])})
    beside = client._take(wire.Message({**header, "has": 0}, tensors))
    assert "optimizer|AB|0.step" in beside
    assert {f"{LOST}{other}|A", f"{LOST}{other}|B", f"{LOST}plain|head"} <= set(beside)
    return {key.split("|")[2] for key in beside if key.startswith(f"{LOST}{layer}|")}


DOWNLOADS: dict[str, tuple[Any, set[str]]] = {
    "nothing": (lambda own: Download(), {"A", "B"}),
    "a mean": (lambda own: Download({"A": own["A"] * 1.1, "B": own["B"] + 1}), {"A", "B"}),
    "a B alone": (lambda own: Download({"B": own["B"] + 1}), {"A", "B"}),
    "a merge": (lambda own: Download(merge=(own["B"] + 1, own["A"])), {"A", "B"}),
    "a fresh adapter": (lambda own: Download(reset=5), set()),
    "the same adapter afresh": (lambda own: Download(reset=3), set()),
    "other directions": (lambda own: Download({"A": own["A"].flip(0), "B": own["B"] + 1}), set()),
}


@pytest.mark.parametrize(("download", "left"), DOWNLOADS.values(), ids=DOWNLOADS)
def test_what_was_lost_is_forgotten_where_it_has_no_place_any_more(
    resident: Resident, tmp_path: Path, download: Any, left: set[str]
) -> None:
    assert after(resident, tmp_path, download) == left
