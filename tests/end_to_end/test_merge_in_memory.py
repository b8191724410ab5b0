"""`umbel.aggregate` on live PEFT models with invented options, back into a live PEFT model."""

import copy
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

import sites
import umbel
from sites import Tangle

BASE = Tangle.from_pretrained(None)
PATTERNS = (
    "q",
    "h.0.q",
    "h.1.q",
    "^h.1.q",
    r"^h\.1\.q",
    "x.h.1.q",
    r"h\.[01]\.q",
    r"x\..*\.q",
    "h_1.q",
    r"(x\.)?h\.0\.q",
    "nothing",
)
"""Keys for rank_pattern and alpha_pattern: names, ends of names, expressions, those of several layers, one of none."""

ranks = st.integers(1, 7)
alphas = st.one_of(st.integers(1, 40), st.floats(0.25, 9))
options = st.fixed_dictionaries(
    {
        "r": ranks,
        "lora_alpha": alphas,
        "use_rslora": st.booleans(),
        "rank_pattern": st.dictionaries(st.sampled_from(PATTERNS), ranks, max_size=3),
        "alpha_pattern": st.dictionaries(st.sampled_from(PATTERNS), alphas, max_size=3),
        "target_modules": st.sampled_from([["q"], ["h.1.q", "h_1.q"], r".*h\.[01]\.q", ["h.0.q", "embed"], "all-linear"]),
    }
)


def _client(own: dict[str, Any], seed: int) -> PeftModel:
    with sites.quiet():
        model = get_peft_model(copy.deepcopy(BASE), LoraConfig(**own))
    sites.train(model, seed)
    return model


def _deltas(model: PeftModel) -> dict[str, Tensor]:
    """Returns per layer what PEFT says that the adapter adds, computed in float64."""
    return {name: layer.get_delta_weight("default").detach() for name, layer in sites.adapted(model.double()).items()}


@settings(max_examples=40, deadline=None)
@given(own=st.lists(options, min_size=1, max_size=4), rows=st.lists(st.integers(1, 1000), min_size=4, max_size=4))
def test_the_sum_is_exact_whatever_options_the_clients_have(own: list[dict[str, Any]], rows: list[int]) -> None:
    models = [_client(one, seed) for seed, one in enumerate(own)]
    rows = rows[: len(models)]
    with sites.quiet():
        states = [get_peft_model_state_dict(model) for model in models]
    configs = [model.peft_config["default"] for model in models]
    state, config, report = umbel.aggregate(states, configs, weights=rows)
    with sites.quiet():
        merged = get_peft_model(copy.deepcopy(BASE), LoraConfig(**config))
        loaded = set_peft_model_state_dict(merged, state)
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora_" in key]
    wanted: dict[str, Tensor] = {}
    for model, n in zip(models, rows):
        for layer, delta in _deltas(model).items():
            wanted[layer] = wanted.get(layer, torch.zeros(())) + n / sum(rows) * delta
    got = _deltas(merged)
    assert got.keys() == wanted.keys() == report["layers"].keys()
    for layer, delta in wanted.items():
        assert float((got[layer] - delta).norm()) <= 2e-6 * float(delta.norm())
