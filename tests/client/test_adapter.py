"""Scale, orientation, merges, ranks: what read() and apply() mean on a real PEFT model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import tiny
from umbel.client.adapter import Adapter, WithR
from umbel.config import ConfigError, Lora
from umbel.method import Download, product

SHAPES = {
    "bert": (AutoModel, tiny.bert, ["query", "intermediate.dense"]),
    "llama": (AutoModelForCausalLM, tiny.llama, ["q_proj", "v_proj", "up_proj"]),
    "gpt2": (AutoModelForCausalLM, tiny.gpt2, ["c_attn", "c_fc"]),
}
LORAS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "uneven": {"r": 3, "lora_alpha": 7},
    "rslora": {"r": 3, "lora_alpha": 7, "use_rslora": True},
}


def make(kind: str, folder: Path, **lora: Any) -> tuple[Adapter, torch.nn.Module]:
    cls, build, targets = SHAPES[kind]
    base = cls.from_pretrained(str(build(folder)))
    return Adapter(base, Lora(target_modules=targets, **lora), [], seed=1), base


def outputs(adapter: Adapter) -> torch.Tensor:
    ids = torch.tensor([[2, 5, 7, 9, 11], [2, 6, 8, 10, 3]])
    with torch.no_grad():
        return adapter.model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]


def randomized(adapter: Adapter, seed: int = 5) -> dict[str, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    factors = {
        layer: {
            "A": torch.randn(s.rank, s.d_in, generator=draw) / 4,
            "B": torch.randn(s.d_out, s.rank, generator=draw) / 4,
        }
        for layer, s in adapter.layers.items()
    }
    adapter.apply({layer: Download(factors=own) for layer, own in factors.items()}, {})
    return factors


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("lora", LORAS)
def test_factors_are_in_units_of_delta_w_whatever_the_scale_and_the_layer_class(kind: str, lora: str, tmp_path: Path) -> None:
    adapter, _ = make(kind, tmp_path, **LORAS[lora])
    randomized(adapter)
    for layer, factors in adapter.read().items():
        B, A = product(factors)
        delta = adapter._modules[layer].get_delta_weight("default")
        wanted = adapter.oriented(layer, delta)
        assert wanted.shape == (adapter.layers[layer].d_out, adapter.layers[layer].d_in)
        torch.testing.assert_close(B @ A, wanted, atol=1e-6, rtol=1e-5)


def test_rank_and_alpha_patterns_give_each_layer_its_own_scale(tmp_path: Path) -> None:
    pattern = {"layer.0.intermediate.dense": 2}
    adapter, _ = make(
        "bert", tmp_path, r=4, lora_alpha=8, rank_pattern=pattern, alpha_pattern={"layer.1.attention.self.query": 3.0}
    )
    ranks = {layer: shape.rank for layer, shape in adapter.layers.items()}
    assert ranks["encoder.layer.0.intermediate.dense"] == 2
    assert ranks["encoder.layer.1.intermediate.dense"] == 4
    randomized(adapter)
    for layer, factors in adapter.read().items():
        B, A = product(factors)
        torch.testing.assert_close(B @ A, adapter._modules[layer].get_delta_weight("default"), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("lora", LORAS)
def test_what_is_written_is_read_back(lora: str, tmp_path: Path) -> None:
    adapter, _ = make("bert", tmp_path, **LORAS[lora])
    written = randomized(adapter)
    for layer, factors in adapter.read().items():
        for name in ("A", "B"):
            torch.testing.assert_close(factors[name], written[layer][name], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_merge_and_a_reset_give_the_outputs_of_the_adapter_that_was_merged(kind: str, tmp_path: Path) -> None:
    adapter, _ = make(kind, tmp_path, r=4, lora_alpha=8)
    start = outputs(adapter)
    factors = randomized(adapter)
    wanted = outputs(adapter)
    assert (wanted - start).abs().max() > 1e-2
    adapter.apply({layer: Download(merge=(own["B"], own["A"]), reset=9) for layer, own in factors.items()}, {})
    torch.testing.assert_close(outputs(adapter), wanted, atol=1e-5, rtol=1e-4)
    assert all((own["B"] == 0).all() for own in adapter.read().values())


@pytest.mark.parametrize("kind", SHAPES)
def test_removing_the_adapter_gives_back_the_base_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    adapter, base = make(kind, tmp_path, r=4, lora_alpha=8)
    before = {layer: weight.detach().clone() for layer, weight in adapter.frozen_weights().items()}
    factors = randomized(adapter)
    adapter.apply({layer: Download(merge=(own["B"], own["A"]), reset=9) for layer, own in factors.items()}, {})
    assert any((weight != before[layer]).any() for layer, weight in adapter.frozen_weights().items())
    assert adapter.remove() is base
    names = dict(base.named_parameters())
    assert not [name for name in names if "lora" in name]
    for layer, weight in before.items():
        assert torch.equal(names[f"{layer}.weight"], weight)


def test_a_client_swapped_in_again_is_the_same_to_the_last_bit_merges_included(tmp_path: Path) -> None:
    adapter, _ = make("llama", tmp_path, r=3, lora_alpha=7)
    factors = randomized(adapter)
    adapter.apply({layer: Download(merge=(own["B"], own["A"])) for layer, own in factors.items()}, {})
    one, kept = outputs(adapter), adapter.state()
    adapter.restart(seed=2)
    randomized(adapter, seed=6)
    assert not torch.equal(outputs(adapter), one)
    adapter.set_state(*kept)
    assert torch.equal(outputs(adapter), one)


def test_merges_received_one_by_one_or_composed_give_the_same_bits(tmp_path: Path) -> None:
    adapter, _ = make("bert", tmp_path, r=4, lora_alpha=8)
    first, second = (
        {layer: Download(merge=(own["B"], own["A"])) for layer, own in randomized(adapter, s).items()} for s in (1, 2)
    )
    adapter.restart(seed=0)
    adapter.apply(first, {})
    adapter.apply(second, {})
    stepwise = outputs(adapter)
    adapter.restart(seed=0)
    adapter.apply({layer: first[layer].then(second[layer]) for layer in first}, {})
    assert torch.equal(outputs(adapter), stepwise)


def test_a_pair_of_higher_rank_is_cut_to_its_first_directions(tmp_path: Path) -> None:
    adapter, _ = make("bert", tmp_path, r=3, lora_alpha=7)
    wide = {layer: {"A": torch.randn(6, s.d_in), "B": torch.randn(s.d_out, 6)} for layer, s in adapter.layers.items()}
    adapter.apply({layer: Download(factors=own) for layer, own in wide.items()}, {})
    for layer, own in adapter.read().items():
        torch.testing.assert_close(own["A"], wide[layer]["A"][:3])
        torch.testing.assert_close(own["B"], wide[layer]["B"][:, :3])


def test_a_pair_of_lower_rank_is_padded_so_that_the_product_stays_and_gradients_flow(tmp_path: Path) -> None:
    adapter, _ = make("bert", tmp_path, r=4, lora_alpha=8)
    narrow = {layer: {"A": torch.randn(2, s.d_in), "B": torch.randn(s.d_out, 2)} for layer, s in adapter.layers.items()}
    adapter.apply({layer: Download(factors=own) for layer, own in narrow.items()}, {})
    for layer, own in adapter.read().items():
        torch.testing.assert_close(own["B"] @ own["A"], narrow[layer]["B"] @ narrow[layer]["A"], atol=1e-6, rtol=1e-5)
    parameters = adapter.trainable(("A", "B"))
    adapter.model(input_ids=torch.tensor([[2, 5, 7]]))[0].square().sum().backward()
    for A, B in zip(parameters[::2], parameters[1::2]):
        assert A.shape[0] == 4
        assert B.grad is not None
        # The padded columns of B are zero and learn at once, because their rows of A are not.
        assert (B.grad[:, 2:] != 0).any(dim=0).all()


def test_the_observer_takes_a_pair_at_the_rank_it_has(tmp_path: Path) -> None:
    adapter, _ = make("bert", tmp_path, r=3, lora_alpha=7)
    wide = {layer: {"A": torch.randn(6, s.d_in), "B": torch.randn(s.d_out, 6)} for layer, s in adapter.layers.items()}
    adapter.apply({layer: Download(factors=own) for layer, own in wide.items()}, {}, own_rank=False)
    for layer, own in adapter.read().items():
        torch.testing.assert_close(own["B"] @ own["A"], wide[layer]["B"] @ wide[layer]["A"], atol=1e-5, rtol=1e-5)
    adapter.restart(seed=1)
    assert {own["A"].shape[0] for own in adapter.read().values()} == {3}


def test_with_an_R_only_R_is_trained_and_the_output_is_that_of_B_R_A(tmp_path: Path) -> None:
    adapter, _ = make("llama", tmp_path, r=3, lora_alpha=7)
    own = {
        layer: {"A": torch.randn(3, s.d_in) / 4, "B": torch.randn(s.d_out, 3) / 4, "R": torch.randn(3, 3)}
        for layer, s in adapter.layers.items()
    }
    adapter.apply({layer: Download(factors=factors) for layer, factors in own.items()}, {})
    with_R = outputs(adapter)
    assert all(isinstance(module.lora_B["default"], WithR) for module in adapter._modules.values())
    for layer, factors in adapter.read().items():
        torch.testing.assert_close(factors["R"], own[layer]["R"], atol=1e-6, rtol=1e-5)
    trained = adapter.trainable(("R",))
    assert {tuple(p.shape) for p in trained} == {(3, 3)}
    assert {id(p) for p in adapter.model.parameters() if p.requires_grad} == {id(p) for p in trained}
    adapter.restart(seed=1)
    plain = {layer: Download(factors={"B": f["B"] @ f["R"], "A": f["A"]}) for layer, f in own.items()}
    adapter.apply(plain, {})
    torch.testing.assert_close(outputs(adapter), with_R, atol=1e-5, rtol=1e-4)


def test_reading_gives_copies_that_later_training_does_not_touch(tmp_path: Path) -> None:
    adapter, _ = make("bert", tmp_path, r=4, lora_alpha=4)
    randomized(adapter)
    read = adapter.read()
    before = {layer: {name: x.clone() for name, x in own.items()} for layer, own in read.items()}
    for parameter in adapter.trainable(("A", "B")):
        parameter.data.add_(1)
    assert all(torch.equal(read[layer][name], x) for layer, own in before.items() for name, x in own.items())


def test_a_pattern_that_matches_no_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[lora\].*layer.7"):
        make("bert", tmp_path, rank_pattern={"layer.7.attention.self.query": 2})


def test_an_unknown_target_module_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no linear layer 'q_proj'.*query"):
        Adapter(AutoModel.from_pretrained(str(tiny.bert(tmp_path))), Lora(target_modules=["q_proj"]), [], 0)
