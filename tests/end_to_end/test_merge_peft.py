"""`umbel merge` against stock PEFT in float64 on real models: outputs and weights, for every kind of LoRA that PEFT writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

import sites
import umbel
from sites import KINDS, Sites
from umbel.method import MethodError

ROWS = (1200, 400, 400)
SHARES = (0.6, 0.2, 0.2)
EXACT: dict[str, dict[str, Any]] = {"florist": {"energy": 1.0}, "flora": {}, "fedex_lora": {}, "exact": {}}
ONE_RANK = ("fedit", "flora_na", "lora_fair", "best_rank", "fedex_lora", "exact")

Dense = list[Tensor]
"""One matrix for every site, d_out × r or r × d_in, float64."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sites]:
    """Gives the sites of a kind, made once."""
    known: dict[str, Sites] = {}

    def of(kind: str) -> Sites:
        if kind not in known:
            known[kind] = sites.made(KINDS[kind], tmp_path_factory.mktemp("sites") / "all")
        return known[kind]

    return of


def merged(own: Sites, out: Path, method: str | None, options: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Merges and returns the report."""
    settings: dict[str, Any] = {"weights": list(ROWS), "dtype": "float32", **more}
    return umbel.merge([*own.folders], out, method=method, options=options or {}, **settings)


def delta(own: Sites, folder: Path) -> dict[str, Tensor]:
    """Returns per layer what PEFT says that an adapter adds, d_out × d_in (dim × rows for an embedding)."""
    layers = sites.adapted(own.loaded(folder))
    return {name: _upright(layer, layer.get_delta_weight("default").detach()) for name, layer in layers.items()}


def _upright(layer: Any, stored: Tensor) -> Tensor:
    return stored.T if layer.lora_embedding_A or getattr(layer, "fan_in_fan_out", False) else stored


def apart(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_agrees_with_itself(made: Callable[[str], Sites], kind: str) -> None:
    """Whole models that PEFT merged, and PEFT's factors multiplied out, are the same sum."""
    own = made(kind)
    updates = own.updates(own.exact(SHARES))
    for layer in {layer for factors in own.factors for layer in factors}:
        have = [p * f[layer][0] @ f[layer][1] for p, f in zip(SHARES, own.factors) if layer in f]
        stored, wanted = updates.pop(f"{layer}.weight"), sum(have, torch.zeros(()))
        assert min(apart(x, wanted) for x in (stored, stored.T) if x.shape == wanted.shape) < 1e-12
    assert not [name for name in updates if not name.endswith("bias") and "classifier" not in name]


# The exact methods, against base + Σ p_k ΔW_k


CASES = [(kind, method) for kind in KINDS for method in EXACT if KINDS[kind].one_rank or method not in ONE_RANK]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_base_and_merged_adapter_are_base_and_exact_sum(
    made: Callable[[str], Sites], tmp_path: Path, kind: str, method: str
) -> None:
    own = made(kind)
    wanted = own.exact(SHARES)
    report = merged(own, tmp_path / "out", method, EXACT[method])
    model = own.loaded(tmp_path / "out")
    expected, first = own.outputs_with(wanted), own.outputs(own.base())
    assert apart(expected, first) > 0.02  # else there would be nothing to see
    # PEFT applies the factors one after the other here, and adds their product to the weight below.
    assert apart(own.outputs(model), expected) <= 1e-5
    got, updates = own.updates(own.weights_with(tmp_path / "out")), own.updates(wanted)
    assert set(got) == set(updates)
    for name, update in updates.items():
        assert apart(got[name], update) <= 2e-6, name
    assert set(report["layers"]) == set(sites.adapted(model))
    assert max(layer["error"] for layer in report["layers"].values()) <= 2e-6


@pytest.mark.parametrize("kind", ["linear", "mixed ranks"])
def test_without_a_method_the_sum_is_exact(made: Callable[[str], Sites], tmp_path: Path, kind: str) -> None:
    own = made(kind)
    merged(own, tmp_path / "out", None)
    for name, update in own.updates(own.exact(SHARES)).items():
        assert apart(own.updates(own.weights_with(tmp_path / "out"))[name], update) <= 2e-6


@pytest.mark.parametrize("method", ONE_RANK)
def test_methods_of_one_rank_refuse_mixed_ranks_and_write_nothing(
    made: Callable[[str], Sites], tmp_path: Path, method: str
) -> None:
    with pytest.raises(MethodError, match="mixed ranks are for"):
        merged(made("mixed ranks"), tmp_path / "out", method)
    assert list(tmp_path.iterdir()) == []


# All methods, against their formulas, written naively in dense float64


def mean(matrices: Dense) -> Tensor:
    return sum((p * x for p, x in zip(SHARES, matrices)), torch.zeros(()))


def total(Bs: Dense, As: Dense) -> Tensor:
    return mean([B @ A for B, A in zip(Bs, As)])


def cut(M: Tensor, rank: int) -> Tensor:
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :rank] * s[:rank] @ Vh[:rank]


def fedit(Bs: Dense, As: Dense) -> Tensor:
    return mean(Bs) @ mean(As)


def florist(Bs: Dense, As: Dense) -> Tensor:
    M = total(Bs, As)
    s = torch.linalg.svdvals(M)
    kept = s.square().cumsum(0) / s.square().sum()
    return cut(M, int((kept < 0.9).sum()) + 1)


def florist_of_rank_3(Bs: Dense, As: Dense) -> Tensor:
    return cut(total(Bs, As), 3)


def at_the_largest_rank(Bs: Dense, As: Dense) -> Tensor:
    return cut(total(Bs, As), max(A.shape[0] for A in As))


def lora_fair(Bs: Dense, As: Dense) -> Tensor:
    B, A = mean(Bs), mean(As)
    missed = (total(Bs, As) - B @ A) @ A.T @ torch.linalg.inv(A @ A.T + 0.01 * torch.eye(len(A)))
    return (B + missed) @ A


def inexact_fedex(Bs: Dense, As: Dense) -> Tensor:
    return fedit(Bs, As) + cut(total(Bs, As) - fedit(Bs, As), 2)


def hetlora(Bs: Dense, As: Dense) -> Tensor:
    size = torch.stack([p * (B @ A).norm() for p, B, A in zip(SHARES, Bs, As)])
    widest = max(len(A) for A in As)
    A, B = torch.zeros(widest, As[0].shape[1]).double(), torch.zeros(len(Bs[0]), widest).double()
    for w, B_k, A_k in zip(size / size.sum(), Bs, As):
        A[: len(A_k)] += w * A_k
        B[:, : len(A_k)] += w * B_k
    return B @ A


def padded_fedit(Bs: Dense, As: Dense) -> Tensor:
    r = max(len(A) for A in As)
    wide = [torch.cat([A, A.new_zeros(r - len(A), A.shape[1])]) for A in As]
    return mean([torch.cat([B, B.new_zeros(len(B), r - B.shape[1])], 1) for B in Bs]) @ mean(wide)


FORMULAS: list[tuple[str, dict[str, Any], Callable[[Dense, Dense], Tensor]]] = [
    ("fedit", {}, fedit),
    ("florist", {"energy": 0.9}, florist),
    ("florist", {"rank": 3}, florist_of_rank_3),
    ("best_rank", {}, at_the_largest_rank),
    ("flexlora", {}, at_the_largest_rank),
    ("lora_fair", {}, lora_fair),
    ("fedex_lora", {"residual_rank": 2}, inexact_fedex),
    ("hetlora", {}, hetlora),
    ("hetlora", {"weights": "rows"}, padded_fedit),
    ("florist", {"energy": 1.0}, total),
    ("flora", {}, total),
]
SEEN = ("linear", "Conv1D", "embedding", "mixed alpha", "rsLoRA at one site", "mixed ranks", "bfloat16")


HELD = [
    pytest.param(kind, *case, id=f"{kind}-{case[0]}-{case[2].__name__}")
    for kind in SEEN
    for case in FORMULAS
    if KINDS[kind].one_rank or case[0] not in ONE_RANK
]


@pytest.mark.parametrize(("kind", "method", "options", "formula"), HELD)
def test_every_layer_is_what_the_methods_formula_gives_and_its_error_is_the_dense_one(
    made: Callable[[str], Sites],
    tmp_path: Path,
    kind: str,
    method: str,
    options: dict[str, Any],
    formula: Callable[[Dense, Dense], Tensor],
) -> None:
    own = made(kind)
    report = merged(own, tmp_path / "out", method, options)
    got = delta(own, tmp_path / "out")
    for layer, update in got.items():
        Bs, As = own.matrices(layer)
        check_formula(update, formula(Bs, As), total(Bs, As))
        check_stated(report["layers"][layer], update, total(Bs, As))


def check_formula(update: Tensor, wanted: Tensor, ideal: Tensor) -> None:
    """Holds a layer against a formula's matrix, and its distance from the exact sum against that of the formula's."""
    # Where a truncation cuts between two singular values that are close, rounding turns what is kept; it gets no worse by that.
    cuts = int(torch.linalg.matrix_rank(wanted, rtol=1e-9)) < int(torch.linalg.matrix_rank(ideal, rtol=1e-9))
    assert apart(update, wanted) <= (2e-5 if cuts else 2e-6)
    assert apart(update, ideal) == pytest.approx(apart(wanted, ideal), abs=1e-6)


def check_stated(stated: dict[str, Any], update: Tensor, ideal: Tensor) -> None:
    """Holds what the report says of a layer against dense matrices."""
    # B in units of ΔW is rounded once, to float32, before anything is compared.
    assert stated["error"] == pytest.approx(apart(update, ideal), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "embedding", "mixed alpha"])
def test_flora_na_finds_what_alternating_least_squares_on_dense_matrices_finds(
    made: Callable[[str], Sites], tmp_path: Path, kind: str
) -> None:
    own = made(kind)
    report = merged(own, tmp_path / "out", "flora_na", {"sweeps": 500, "tolerance": 1e-12})
    for layer, update in delta(own, tmp_path / "out").items():
        B, A = (torch.stack([f[layer][i] for f in own.factors]) for i in (0, 1))
        ideal = total([*B], [*A])
        P = Q = torch.tensor(SHARES, dtype=torch.float64)
        for _ in range(500):
            P = _least_squares([x @ torch.einsum("k,krn->rn", Q, A) for x in B], ideal)
            Q = _least_squares([torch.einsum("k,kmr->mr", P, B) @ x for x in A], ideal)
        found = torch.einsum("k,kmr->mr", P, B) @ torch.einsum("k,krn->rn", Q, A)
        assert apart(update, ideal) == pytest.approx(apart(found, ideal), rel=1e-4), layer
        assert apart(update, ideal) < apart(fedit([*B], [*A]), ideal)
        check_stated(report["layers"][layer], update, ideal)


def _least_squares(basis: Dense, ideal: Tensor) -> Tensor:
    columns = torch.stack([x.flatten() for x in basis], 1)
    return torch.linalg.lstsq(columns, ideal.flatten().unsqueeze(1)).solution.squeeze(1)


# What else the command promises of a folder


@pytest.mark.parametrize("rank", [1, 3, 9, 14])
@pytest.mark.parametrize(
    ("kind", "method", "options", "formula"),
    [
        ("mixed ranks", "florist", {"energy": 1.0}, total),
        ("patterns and rsLoRA, unlike", "flora", {}, total),
        ("layers that a site lacks", "florist", {"energy": 1.0}, None),
        ("Conv1D", "fedit", {}, fedit),
        ("embedding", "exact", {}, total),
    ],
    ids=str,
)
def test_one_rank_for_all_layers_is_the_best_of_that_rank(
    made: Callable[[str], Sites], tmp_path: Path, rank: int, kind: str, method: str, options: dict[str, Any], formula: Any
) -> None:
    own = made(kind)
    report = merged(own, tmp_path / "out", method, options, rank=rank)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (rank, {}, {})
    layers = sites.adapted(own.loaded(tmp_path / "out"))
    assert {layer.r["default"] for layer in layers.values()} == {rank}
    for layer, update in delta(own, tmp_path / "out").items():
        have = [(p, *f[layer]) for p, f in zip(SHARES, own.factors) if layer in f]
        ideal = sum((p * B @ A for p, B, A in have), torch.zeros(()))
        whole = formula([B for _, B, _ in have], [A for _, _, A in have]) if formula else ideal
        check_formula(update, cut(whole, rank), ideal)
        assert report["layers"][layer]["rank"] == rank
        check_stated(report["layers"][layer], update, ideal)


@pytest.mark.parametrize("method", ["florist", "fedit"])
@pytest.mark.parametrize("kind", ["linear", "embedding", "head"])
def test_bfloat16_is_what_the_file_has_and_its_rounding_is_in_the_error(
    made: Callable[[str], Sites], tmp_path: Path, kind: str, method: str
) -> None:
    own = made(kind)
    report = merged(own, tmp_path / "out", method, EXACT.get(method), dtype="bfloat16")
    assert {x.dtype for x in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    for layer, update in delta(own, tmp_path / "out").items():
        Bs, As = own.matrices(layer)
        check_stated(report["layers"][layer], update, total(Bs, As))
        if method == "florist":
            assert 1e-4 < report["layers"][layer]["error"] < 1e-2


def test_layers_that_a_site_lacks_are_named(made: Callable[[str], Sites], tmp_path: Path) -> None:
    own = made("layers that a site lacks")
    report = merged(own, tmp_path / "out", "florist", {"energy": 1.0})
    said = " ".join(report["notes"])
    assert "site-c" in said
    assert "zero" in said
    # Site c, with a fifth of the rows, has value alone: it counts with a fifth, not with all.
    alone = "encoder.layer.1.attention.self.value"
    B, A = own.factors[2][alone]
    assert apart(delta(own, tmp_path / "out")[alone], 0.2 * B @ A) <= 2e-6


def test_sites_that_learned_nothing_merge_to_nothing(made: Callable[[str], Sites], tmp_path: Path) -> None:
    model = made("linear").model
    for k in range(2):
        with sites.quiet():
            fresh = get_peft_model(KINDS["linear"].loader.from_pretrained(model), LoraConfig(**sites.ATTENTION))
            fresh.save_pretrained(str(tmp_path / f"fresh-{k}"))
    own = Sites(KINDS["linear"], model, tuple(tmp_path / f"fresh-{k}" for k in range(2)))
    for method in ("florist", "fedit", "flora_na", "flora"):
        report = umbel.merge([*own.folders], tmp_path / method, method=method, weights=[1, 1])
        assert {layer["error"] for layer in report["layers"].values()} == {0.0}
        assert all(float(update.abs().max()) == 0 for update in delta(own, tmp_path / method).values())


@pytest.mark.parametrize("kind", ["linear", "rsLoRA at one site", "embedding", "head"])
def test_one_site_alone_comes_back(made: Callable[[str], Sites], tmp_path: Path, kind: str) -> None:
    own = made(kind)
    for method in ("florist", "fedit", "flora_na", "flora", "fedex_lora", "best_rank", "hetlora"):
        umbel.merge([own.folders[1]], tmp_path / method, method=method, options=EXACT.get(method), weights=[7], dtype="float32")
        wanted, got = (own.updates(own.weights_with(folder)) for folder in (own.folders[1], tmp_path / method))
        assert max(apart(got[name], update) for name, update in wanted.items()) <= 2e-6, method


def test_in_memory_gives_the_bits_that_the_folder_has(made: Callable[[str], Sites], tmp_path: Path) -> None:
    for kind in ("linear", "embedding", "head", "mixed ranks", "Conv1D"):
        own = made(kind)
        for method in ("florist", "flora") if kind == "mixed ranks" else ("florist", "fedit", "flora_na", "exact"):
            out = tmp_path / f"{kind}-{method}"
            written = merged(own, out, method)
            states = [load_file(folder / "adapter_model.safetensors") for folder in own.folders]
            configs = [LoraConfig.from_pretrained(str(folder)) for folder in own.folders]
            state, config, report = umbel.aggregate(states, configs, method=method, weights=list(ROWS))
            stored = load_file(out / "adapter_model.safetensors")
            assert state.keys() == stored.keys()
            assert all(torch.equal(x, stored[name]) for name, x in state.items())
            assert LoraConfig(**config).to_dict() == LoraConfig.from_pretrained(str(out)).to_dict()
            assert report["layers"] == written["layers"]


def test_the_order_of_folders_does_not_matter(made: Callable[[str], Sites], tmp_path: Path) -> None:
    own = made("mixed ranks")
    merged(own, tmp_path / "out", "florist", {"energy": 1.0})
    turned = Sites(own.kind, own.model, own.folders[::-1])
    merged(turned, tmp_path / "turned", "florist", {"energy": 1.0}, weights=list(ROWS[::-1]))
    first, second = delta(own, tmp_path / "out"), delta(own, tmp_path / "turned")
    assert all(apart(second[layer], update) <= 2e-6 for layer, update in first.items())
