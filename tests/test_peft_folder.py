import json
import os
import pickle
import threading
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from umbel.peft_folder import FolderError, Writer, check_together, from_state, open_folder, stock_config
from umbel.record import new_folder

MODELS = {
    "bert": (tiny.bert, transformers.AutoModel),
    "classifier": (tiny.bert, transformers.AutoModelForSequenceClassification),
    "llama": (tiny.llama, transformers.AutoModelForCausalLM),
    "gpt2": (tiny.gpt2, transformers.AutoModelForCausalLM),
}

KINDS = {
    "plain": ("bert", {"target_modules": ["query", "intermediate.dense"], "r": 4, "lora_alpha": 6}),
    "rslora and patterns": (
        "llama",
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 2},
            "alpha_pattern": {r".*\.0\..*q_proj": 5, "v_proj": 0.5},
        },
    ),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 3, "lora_alpha": 5}),
    "embedding of another name": ("bert", {"target_modules": ["word_embeddings", "value"]}),
    "head saved whole": ("classifier", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "bias of the layers": ("bert", {"target_modules": ["query", "value"], "bias": "lora_only"}),
    "all biases": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "norms saved whole": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "orthogonal start": ("bert", {"target_modules": ["query", "value"], "init_lora_weights": "orthogonal", "r": 4}),
    "mica": ("bert", {"target_modules": ["query", "value"], "init_lora_weights": "mica", "r": 4}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    found = {}
    for name, (make, _) in MODELS.items():
        found[name] = make(tmp_path_factory.mktemp(name))
    return found


def base(bases, name, **options):
    torch.manual_seed(0)
    return MODELS[name][1].from_pretrained(bases[name], **options).eval()


def adapted(model, seed=0, **options):
    """A PEFT model whose adapter does something, heads and biases included."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    return wrapped.eval()


def save(model, folder):
    with warnings.catch_warnings():
        # PEFT says that it saves the vocabulary's table too, which is what is wanted.
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        model.save_pretrained(folder)


def outputs(model):
    with torch.inference_mode():
        return model(input_ids=torch.arange(4, 14)[None])[0]


def written(folder, adapter, dtype=torch.float32, ranks=None):
    """Writes an adapter as the result of a merge is written."""
    layers = {name: layer.kind for name, layer in adapter.layers.items()}
    with new_folder(folder) as temporary:
        writer = Writer(temporary, layers, adapter.plain, dtype)
        for name in adapter.layers:
            factors = adapter.read(name)
            writer.layer(name, factors["B"], factors["A"])
        for name in adapter.plain:
            writer.plain(name, adapter.read_plain(name))
        writer.close(stock_config([adapter], {name: layer.rank for name, layer in adapter.layers.items()}, adapter.plain))
    return folder


@pytest.fixture
def saved(tmp_path):
    """A small folder written by hand, for what PEFT would not write."""

    def make(name="site", tensors=None, umbel=None, **config):
        folder = tmp_path / name
        folder.mkdir()
        about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base", **config}
        (folder / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
        torch.manual_seed(len(name))
        content = {"q.lora_A.weight": torch.randn(2, 6), "q.lora_B.weight": torch.randn(5, 2)} | (tensors or {})
        save_file({f"base_model.model.{key}": x for key, x in content.items()}, folder / "adapter_model.safetensors")
        if umbel is not None:
            (folder / "umbel.json").write_text(umbel, encoding="utf-8")
        return folder

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_what_peft_computes_with(tmp_path, bases, kind):
    name, options = KINDS[kind]
    model = adapted(base(bases, name), **options)
    save(model, tmp_path / "a")
    stored = open_folder(tmp_path / "a")
    modules = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    assert set(stored.layers) == set(modules)
    for layer, module in modules.items():
        about, factors = stored.layers[layer], stored.read(layer)
        product = factors["B"] @ factors["A"]
        assert product.shape == (about.d_out, about.d_in)
        assert factors["A"].shape[0] == about.rank
        transposed = about.kind == "embedding" or getattr(module, "fan_in_fan_out", False)
        wanted = module.get_delta_weight("default")
        torch.testing.assert_close(product.T if transposed else product, wanted, rtol=1e-5, atol=1e-6)
    in_file = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {f"base_model.model.{n}" for n in stored.plain} == {key for key in in_file if "lora_" not in key}
    for n in stored.plain:
        assert torch.equal(stored.read_plain(n), in_file[f"base_model.model.{n}"])
    assert stored.bytes == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_does_the_same_in_stock_peft(tmp_path, bases, kind, recwarn):
    name, options = KINDS[kind]
    model = adapted(base(bases, name), **options)
    wanted = outputs(model)
    assert not torch.allclose(wanted, outputs(base(bases, name)), atol=1e-2)
    save(model, tmp_path / "a")
    folder = written(tmp_path / "out", open_folder(tmp_path / "a"))
    recwarn.clear()
    loaded = peft.PeftModel.from_pretrained(base(bases, name), str(folder)).eval()
    assert [str(w.message) for w in recwarn if "peft" in w.filename and w.category is not FutureWarning] == []
    torch.testing.assert_close(outputs(loaded), wanted, rtol=1e-4, atol=1e-4)
    again = open_folder(folder)
    assert {n: layer.scale for n, layer in again.layers.items()} == dict.fromkeys(again.layers, 1.0)


def test_scaled_factors_have_the_bits_that_a_client_would_send(tmp_path, bases):
    model = adapted(base(bases, "llama"), target_modules=["q_proj", "v_proj"], r=3, lora_alpha=7, use_rslora=True)
    save(model, tmp_path / "a")
    stored = open_folder(tmp_path / "a")
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            factors = stored.read(name.removeprefix("base_model.model."))
            assert torch.equal(factors["B"], module.lora_B["default"].weight * module.scaling["default"])
            assert torch.equal(factors["A"], module.lora_A["default"].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_narrow_factors_are_widened_before_they_are_scaled(saved, dtype):
    A, B = torch.randn(2, 6).to(dtype), torch.randn(5, 2).to(dtype)
    stored = open_folder(saved(tensors={"q.lora_A.weight": A, "q.lora_B.weight": B}, lora_alpha=3))
    factors = stored.read("q")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(factors["A"], A.to(wide))
    assert torch.equal(factors["B"], B.to(wide) * 1.5)


def test_an_adapter_in_memory_is_the_same_as_its_folder(tmp_path, bases):
    model = adapted(base(bases, "classifier"), target_modules=["query"], task_type="SEQ_CLS", use_rslora=True)
    save(model, tmp_path / "a")
    stored = open_folder(tmp_path / "a")
    state = {key: x.clone() for key, x in peft.get_peft_model_state_dict(model).items()}
    held = from_state(state, model.peft_config["default"], "here", num_examples=3)
    assert (held.layers, held.plain, held.num_examples) == (stored.layers, stored.plain, 3)
    for layer in held.layers:
        for factor in ("A", "B"):
            assert torch.equal(held.read(layer)[factor], stored.read(layer)[factor])
    for key, x in peft.get_peft_model_state_dict(model).items():
        assert torch.equal(state[key], x), "reading must not write to the caller's tensors"
    assert check_together([held, stored], force=False) == []


@pytest.mark.parametrize(
    ("state", "config", "words"),
    [
        ({"base_model.model.q.lora_A.weight": torch.ones(2, 3, dtype=torch.int64)}, {}, "int64"),
        ({"base_model.model.q.lora_A.weight": torch.ones(0, 3)}, {}, "not empty"),
        ({"base_model.model.q.lora_A.weight": torch.ones(2, 3)}, {"peft_type": "LORA"}, "lora_A alone"),
        ({}, {"peft_type": "LORA"}, "no LoRA factors"),
        ({}, {"peft_type": "LORA", "extra": object()}, "wanted a LoraConfig"),
        ({}, 7, "wanted a LoraConfig"),
    ],
)
def test_states_that_are_no_adapter_are_refused(state, config, words):
    with pytest.raises(FolderError, match=f"here: .*{words}"):
        from_state(state, config, "here")


def sharded(folder, split=None, **changes):
    """Splits a folder's tensors into two files with an index; `changes` are made to its weight_map."""
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: x for key, x in tensors.items() if parts[key] == name}, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": {**parts, **changes}}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def test_shards_are_read_like_one_file(saved):
    whole, parts = open_folder(saved("site-1")), open_folder(sharded(saved("site-2")))
    assert whole.layers == parts.layers
    for factor in ("A", "B"):
        assert torch.equal(whole.read("q")[factor], parts.read("q")[factor])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model.model.q.lora_A.weight": "../site/model-00001-of-00002.safetensors"}, "file name"),
        ({"base_model.model.q.lora_A.weight": "/etc/passwd"}, "file name"),
        ({"base_model.model.q.lora_A.weight": ".."}, "file name"),
        ({"base_model.model.q.lora_A.weight": "a\0.safetensors"}, "file name"),
        ({"base_model.model.q.lora_A.weight": "gone.safetensors"}, "cannot be read"),
        ({"base_model.model.q.lora_A.weight": 3}, "weight_map"),
        ({"base_model.model.k.lora_A.weight": "model-00001-of-00002.safetensors"}, "does not agree"),
        ({"base_model.model.q.lora_A.weight": "model-00002-of-00002.safetensors"}, "does not agree"),
    ],
)
def test_an_index_that_lies_is_refused(saved, changes, words):
    with pytest.raises(FolderError, match=words):
        open_folder(sharded(saved(), **changes))


def test_an_index_beside_a_single_file_is_refused(saved):
    folder = saved()
    content = (folder / "adapter_model.safetensors").read_bytes()
    (sharded(folder) / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(FolderError, match="has both"):
        open_folder(folder)


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(saved, tmp_path):
    folder = sharded(saved())
    shard = folder / "model-00001-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(FolderError, match="a link out of its folder"):
        open_folder(folder)


def _pickled(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"q": 1}))


def _piped(folder):
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")


def _cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "words"),
    {
        "pickle alone": (_pickled, "adapter_model.bin only, a pickle file.*convert"),
        "pipe": (_piped, "not a regular file"),
        "truncated": (_cut, "wrong safetensors header"),
        "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "neither adapter_model.safetensors nor"),
        "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: cannot be read"),
        "config is a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "wanted an object"),
        "huge config": (lambda f: os.truncate(f / "adapter_config.json", 10**8), "allowed: up to 10000000"),
        "secret config": (
            lambda f: ((f / "adapter_config.json").unlink(), (f / "adapter_config.json").symlink_to("/etc/hostname")),
            "a link out of its folder",
        ),
    }.values(),
)
def test_a_damaged_folder_is_refused_with_its_name(saved, damage, words):
    folder = saved()
    damage(folder)
    with pytest.raises(FolderError, match=words) as caught:
        open_folder(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pickle_beside_the_tensors_is_not_looked_at(saved):
    folder = saved()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert open_folder(folder).layers


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_bytes(b"")])
def test_what_is_no_folder_is_refused(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(FolderError, match="no such folder"):
        open_folder(tmp_path / "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e16, -1e16])
@pytest.mark.parametrize("key", ["q.lora_A.weight", "q.lora_B.weight", "head.weight"])
def test_values_that_are_not_sound_are_refused_when_read(saved, key, value):
    x = {"q.lora_A.weight": torch.ones(2, 6), "q.lora_B.weight": torch.ones(5, 2), "head.weight": torch.ones(3, 3)}[key]
    x[-1, -1] = value
    stored = open_folder(saved(tensors={key: x, "head.bias": torch.ones(3)}, modules_to_save=["head"]))
    with pytest.raises(FolderError, match="NaN, infinity or values beyond"):
        stored.read_plain("head.weight") if key == "head.weight" else stored.read("q")
    assert torch.equal(stored.read_plain("head.bias"), torch.ones(3))


@pytest.mark.parametrize(
    ("text", "rows"), [('{"num_examples": 12}', 12), ('{"num_examples": 1000000000000}', 10**12), ("{}", None)]
)
def test_rows_are_read_from_umbel_json(saved, text, rows):
    assert open_folder(saved(umbel=text)).num_examples == rows


@pytest.mark.parametrize("rows", ["0", "-1", "1.5", "true", '"7"', "1000000000001", "NaN", "1e3"])
def test_rows_that_are_not_sound_are_refused(saved, rows):
    with pytest.raises(FolderError, match=r"umbel\.json"):
        open_folder(saved(umbel=f'{{"num_examples": {rows}}}'))


def test_reading_from_several_threads_gives_the_same(tmp_path):
    tensors = {}
    for i in range(20):
        tensors |= {f"base_model.model.l{i}.lora_A.weight": torch.full((8, 500), float(i))}
        tensors |= {f"base_model.model.l{i}.lora_B.weight": torch.full((300, 8), float(i))}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    stored = open_folder(tmp_path)
    wrong = []

    def work():
        for i in list(range(20)) * 10:
            factors = stored.read(f"l{i}")
            if not all(bool((x == i).all()) for x in factors.values()):
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("key", "one", "two", "words"),
    [
        ("base_model_name_or_path", "base-a", "base-b", "different base models: 'base-a' in .*one, 'base-b' in .*two"),
        ("revision", "v1", "v2", "different revisions"),
        ("revision", None, "v2", "different revisions"),
        ("task_type", "CAUSAL_LM", "SEQ_CLS", "different tasks"),
    ],
)
def test_adapters_of_different_models_are_refused_unless_forced(saved, key, one, two, words):
    adapters = [open_folder(saved("one", **{key: one})), open_folder(saved("two", **{key: two}))]
    with pytest.raises(FolderError, match=words):
        check_together(adapters, force=False)
    (note,) = check_together(adapters, force=True)
    assert "merged all the same" in note


def test_the_default_branch_written_out_and_a_task_that_is_not_named_are_no_difference(saved):
    one = open_folder(saved("one", revision=None, task_type="CAUSAL_LM"))
    two = open_folder(saved("two", revision="main", task_type=None))
    assert check_together([one, two], force=False) == []


@pytest.mark.parametrize(
    "tensors",
    [
        {"q.lora_A.weight": torch.ones(2, 7)},
        {"q.lora_B.weight": torch.ones(4, 2)},
    ],
)
def test_layers_of_different_shape_are_refused_with_both_names_even_forced(saved, tensors):
    adapters = [open_folder(saved("one")), open_folder(saved("two", tensors))]
    with pytest.raises(FolderError, match=r"layer 'q': 5 × 6 \(linear\) in .*one, .* in .*two"):
        check_together(adapters, force=True)


def test_different_ranks_and_scales_are_no_difference(saved):
    tensors = {"q.lora_A.weight": torch.ones(3, 6), "q.lora_B.weight": torch.ones(5, 3)}
    adapters = [open_folder(saved("one")), open_folder(saved("two", tensors, r=3, use_rslora=True))]
    assert check_together(adapters, force=False) == []


def test_layers_that_some_lack_are_said(saved):
    more = {f"l{i}.lora_{f}.weight": torch.ones(2, 2) for i in range(5) for f in "AB"}
    adapters = [open_folder(saved("one", more)), open_folder(saved("two"))]
    (note,) = check_together(adapters, force=False)
    assert note == f"layers l0, l1, l2 and 2 more: not in {adapters[1].name} (counts as zero there)"


def test_parameters_that_some_lack_have_no_mean(saved):
    head = {"head.weight": torch.ones(2, 2)}
    adapters = [open_folder(saved("one", head, modules_to_save=["head"])), open_folder(saved("two"))]
    with pytest.raises(FolderError, match=r"two: has no head\.weight, which others have"):
        check_together(adapters, force=False)
    assert any("over those that have it" in note for note in check_together(adapters, force=True))


def test_parameters_of_different_shape_are_refused(saved):
    heads = [open_folder(saved(f"s{n}", {"head.weight": torch.ones(n, 2)}, modules_to_save=["head"])) for n in (2, 3)]
    with pytest.raises(FolderError, match=r"parameter 'head\.weight': 2 × 2 in .*s2, 3 × 2 in .*s3"):
        check_together(heads, force=True)


def test_the_written_config_gives_each_layer_its_rank_whatever_the_names(saved):
    names = ["model.layers.1.q", "model.layers.11.q", "x.model.layers.1.q", "model.layers.2.q", "model.layers.3.q"]
    ranks = dict(zip(names, [1, 2, 3, 4, 4], strict=True))
    options = {"bias": "all", "auto_mapping": {"a": "b"}, "base_model_name_or_path": None}
    config = stock_config([open_folder(saved("one", **options))], ranks, [])
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 4, sorted(names))
    assert (config["bias"], config["auto_mapping"], config["modules_to_save"]) == ("all", {"a": "b"}, None)
    options = peft.LoraConfig(**{key: value for key, value in config.items() if key != "peft_type"})
    root = torch.nn.Module()
    for name in names:
        at = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.add_module(last, torch.nn.Linear(8, 8))
    model = peft.get_peft_model(root, options)
    got = {
        n.removeprefix("base_model.model."): (m.r["default"], m.scaling["default"])
        for n, m in model.named_modules()
        if hasattr(m, "lora_A")
    }
    assert got == {name: (rank, 1.0) for name, rank in ranks.items()}


def test_what_is_returned_is_what_is_in_the_file(saved, tmp_path):
    stored = open_folder(saved())
    (tmp_path / "out").mkdir()
    writer = Writer(tmp_path / "out", {"q": "linear"}, [], torch.bfloat16)
    factors = stored.read("q")
    kept = writer.layer("q", factors["B"], factors["A"])
    writer.close(stock_config([stored], {"q": 2}, []))
    assert writer.bytes == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    again = open_folder(tmp_path / "out").read("q")
    for factor, x in kept.items():
        assert x.dtype == torch.float32
        assert torch.equal(x, factors[factor].bfloat16().float())
        assert torch.equal(x, again[factor])


def test_nothing_is_left_when_writing_fails(saved, tmp_path):
    stored = open_folder(saved())
    before = set(os.listdir("/proc/self/fd"))

    def fail(folder):
        writer = Writer(folder, {"q": "linear"}, [], torch.float16)
        try:
            writer.layer("q", stored.read("q")["B"] * 1e6, stored.read("q")["A"])
        finally:
            writer.abandon()

    with pytest.raises(FolderError, match="leaves the range"), new_folder(tmp_path / "out") as temporary:
        fail(temporary)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site"]
    assert set(os.listdir("/proc/self/fd")) == before
