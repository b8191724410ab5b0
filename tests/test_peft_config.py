import dataclasses
import json
import time

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from umbel import peft_config
from umbel.peft_config import PREFIX, judge
from umbel.safetensors_file import FolderError

PAIR = ((f"{PREFIX}q.lora_A.weight", (4, 6)), (f"{PREFIX}q.lora_B.weight", (5, 4)))


def config(**values):
    return json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **values}).encode()


def scale(name="q", rank=4, **values):
    return peft_config.scales({"r": 4, "lora_alpha": 8, **values}, {name: rank})[name]


def test_every_key_that_the_installed_peft_writes_has_been_thought_about():
    known = peft_config._HARMLESS | set(peft_config._OTHER_KINDS)
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} | set(peft.LoraConfig().to_dict()) <= known


def test_every_variant_that_the_installed_peft_marks_as_one_is_refused():
    marked = {f.name for f in dataclasses.fields(peft.LoraConfig) if f.metadata.get("is_lora_variant")}
    assert len(marked) >= 5
    assert marked <= set(peft_config._OTHER_KINDS)


def test_a_plain_configuration_is_taken():
    contents = judge(config(task_type="CAUSAL_LM", lora_dropout=0.1, target_modules=["q"], something_new=None), PAIR)
    (layer,) = contents.layers.values()
    assert (layer.d_out, layer.d_in, layer.rank, layer.scale, layer.kind) == (5, 6, 4, 2.0, "linear")
    # Folders that are alike share one answer.
    assert judge(config(task_type="CAUSAL_LM", lora_dropout=0.1, target_modules=["q"], something_new=None), PAIR) is contents


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"peft_type": None}, "peft_type"),
        ({"use_dora": True}, "DoRA"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"lora_bias": True}, "bias in B"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"trainable_token_indices": [1]}, "trainable tokens"),
        ({"layer_replication": [[0, 1]]}, "layer replication"),
        ({"target_parameters": ["experts.w"]}, "bare parameters"),
        ({"kasa_config": {"a": 1}}, "KaSA"),
        ({"monteclora_config": {"a": 1}}, "Monte Carlo"),
        ({"velora_config": {"a": 1}}, "VeLoRA"),
        ({"arrow_config": {"a": 1}}, "Arrow"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
        ({"use_something_of_tomorrow": True}, "unknown key"),
        *(
            ({"init_lora_weights": start}, "init_lora_weights")
            for start in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda")
        ),
        *(({"init_lora_weights": start}, "init_lora_weights") for start in ("loftq", "lora_ga", "", None, 1, ["eva"])),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"fan_in_fan_out": None}, "fan_in_fan_out"),
        *(({"r": r}, "r is") for r in (0, -1, 4.0, True, "4", None, 10**30)),
        *(({"lora_alpha": alpha}, "lora_alpha") for alpha in (0, -2, True, "8", None, 1e300, 10**400)),
        ({"rank_pattern": {"q": 0}}, "rank_pattern"),
        ({"rank_pattern": ["q"]}, "rank_pattern"),
        ({"alpha_pattern": {"q": "1"}}, "alpha_pattern"),
        ({"bias": "some"}, "bias"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
        ({"revision": ["main"]}, "revision"),
        ({"modules_to_save": "head"}, "modules_to_save"),
        ({"modules_to_save": [""]}, "modules_to_save"),
    ],
    ids=str,
)
def test_what_is_not_plain_lora_is_refused_in_a_sentence(values, words):
    with pytest.raises(FolderError, match=words) as caught:
        judge(config(**values), PAIR)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_leave_the_base_model_as_it_is_are_taken(start):
    assert judge(config(init_lora_weights=start), PAIR).layers


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b'{"r": NaN}', b'{"r": 1, "r": 2}', b'{"peft_type":' + b"[" * 10**5, b"\xff\xfe{}"], ids=range(7)
)
def test_what_is_no_sound_json_is_refused(data):
    with pytest.raises(FolderError, match=r"adapter_config\.json"):
        judge(data, PAIR)


def test_scales():
    assert scale() == 2.0
    assert scale(use_rslora=True) == 4.0
    assert scale(lora_alpha=3) == 0.75
    assert scale(rank=2, rank_pattern={"q": 2}) == 4.0
    assert scale(rank=2, rank_pattern={"q": 2}, alpha_pattern={"q": 2}, use_rslora=True) == 2 / 2**0.5
    assert peft_config.scales({}, {"q": 8}) == {"q": 1.0}
    with pytest.raises(FolderError, match="has factors of rank 3, its r and rank_pattern say 4"):
        scale(rank=3)


NAMES = ["model.layers.1.q", "model.layers.11.q", "x.model.layers.1.q", "model.layers.1.q_proj", "q", "layers.1.q", "a+b"]
KEYS = [
    *NAMES,
    "q$",
    r".*\.q",
    r"layers\.1\.q",
    r"layers.\d+.q",
    "model.layers.1",
    "(model|x).*q",
    "^q",
    "a)|(q",
    r"layers\.(1|11)\.q",
    "[ab]+.*",
    "(self_)?q",
    "",
    "(?i:Q)",
    *map(peft_config.pattern_for, NAMES),
]


@pytest.mark.parametrize("name", NAMES)
@given(keys=st.lists(st.sampled_from(KEYS), unique=True, max_size=4))
@settings(max_examples=60, deadline=None)
def test_patterns_match_as_in_peft(name, keys):
    pattern = {key: i + 1 for i, key in enumerate(keys)}
    wanted = pattern.get(get_pattern_key(pattern.keys(), name), 8)
    assert scale(name, alpha_pattern=pattern) == wanted / 4


@pytest.mark.parametrize(
    "key",
    [
        *("(a+)+b", "(a|a)*b", "((a?)*)*", "(.*)(.*)+x", "(?=a)b", r"(a)\2", "(?>a)", "(a|b|ab)+"),
        *(".*" * 9 + "x", ".*" * 5 + "x", "a?" * 30 + "a" * 30, "(a|a)" * 40, "(", "[", "*", "(?P<x", "x" * 1001, "(" * 400),
    ],
    ids=lambda key: key[:12],
)
def test_a_pattern_that_could_run_for_ever_or_is_none_is_refused_at_once(key):
    began = time.monotonic()
    with pytest.raises(FolderError, match=r"alpha_pattern.*names out"):
        scale("a" * 60 + ".q", alpha_pattern={key: 3})
    assert time.monotonic() - began < 2


def test_a_written_pattern_means_one_layer():
    for name in NAMES:
        pattern = {peft_config.pattern_for(name): 2}
        found = [other for other in NAMES if get_pattern_key(pattern, other) in pattern]
        assert found == [name]


def tensors(*more, drop=None):
    return tuple(item for item in PAIR + tuple((PREFIX + name, shape) for name, shape in more) if item[0] != drop)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ((), "no LoRA factors"),
        (tensors(drop=PAIR[0][0]), "lora_B alone"),
        (tensors(drop=PAIR[1][0]), "lora_A alone"),
        ((PAIR[0], (PAIR[1][0], (5, 3))), "wanted r × d_in"),
        ((PAIR[0], (PAIR[1][0], (5,))), "wanted r × d_in"),
        ((PAIR[0], (PAIR[1][0], (5, 4, 1, 1))), "convolution"),
        (((PAIR[0][0].removeprefix(PREFIX), (4, 6)),), "does not begin with"),
        (tensors(("q.lora_embedding_A", (4, 6)), ("q.lora_embedding_B", (5, 4))), "one kind"),
        (tensors(("q.lora_magnitude_vector", (5,))), "DoRA"),
        (tensors(("q.lora_magnitude_vector.weight", (5,))), "DoRA"),
        (tensors(("q.lora_B.bias", (5,))), "bias in B"),
        (tensors(("q.lora_A.default.weight", (4, 6))), "no part of a plain LoRA"),
        (tensors(("q.lora_diag", (4,))), "no part of a plain LoRA"),
        (tensors(("q.token_adapter.trainable_tokens_delta", (4, 6))), "no part of a plain LoRA"),
        (tensors(("q.base_layer.lora_A.weight", (4, 6)), ("q.base_layer.lora_B.weight", (5, 4))), "inside another adapter"),
        (tensors(("classifier.weight", (3, 5))), "neither a factor"),
        (tensors(("q.base_layer.bias", (5,))), "neither a factor"),
        (tensors(("q.base_layer.weight", (5, 6))), "neither a factor"),
    ],
)
def test_tensors_that_nothing_explains_are_refused(shapes, words):
    with pytest.raises(FolderError, match=words):
        judge(config(), shapes)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("classifier.weight", {"modules_to_save": ["classifier"]}),
        ("model.classifier.dense.bias", {"modules_to_save": ["classifier"]}),
        ("q.base_layer.bias", {"bias": "lora_only"}),
        ("norm.bias", {"bias": "all"}),
        ("model.embed_tokens.weight", {}),
        ("model.embed_tokens.base_layer.weight", {}),
        ("lm_head.weight", {}),
    ],
)
def test_what_modules_to_save_bias_or_a_vocabulary_explains_is_plain(name, values):
    contents = judge(config(**values), tensors((name, (3,))))
    assert dict(contents.plain) == {name: (3,)}
    assert list(contents.layers) == ["q"]
