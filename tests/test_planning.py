"""What `umbel plan` says, held against what runs then record, and against loaded models."""

import json
import math
import subprocess
import sys
import time
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import tiny
from recorded import lines
from umbel import config as configuration
from umbel import method, planning, run, wire
from umbel.client import model
from umbel.client.adapter import Adapter
from umbel.config import ConfigError, Privacy, Wire
from umbel.loop import Plan
from umbel.server import LayerShape
from umbel.traffic import Sites, Small, traffic

WAYS = ("bytes_down", "bytes_up")
DTYPES = typing.get_args(typing.get_type_hints(Wire)["dtype"])
STEADY = {"florist": {"rank": 3}, "hetlora": {"gamma": 1.0}}
"""Options with which a method's bytes do not depend on what is learned."""


def entry(table, label):
    return next(own for own in planning.plan(table)["methods"] if own["label"] == label)


def ran(folder, table):
    """Runs a job without baselines; returns each method's lines."""
    run.run(table, folder / "out", baselines=False)
    job = json.loads((folder / "out" / "job.json").read_text())
    return {label: lines(folder / "out" / job["members"][label]) for label in job["methods"]}


def assert_close(forecast, recorded):
    """Within 2 % in every round of training and over the whole run, and to the byte in every download."""
    assert [(x["round"], x["phase"], x["train_round"]) for x in forecast] == [
        (x["round"], x["phase"], x["train_round"]) for x in recorded
    ]
    for ours, theirs in zip(forecast, recorded, strict=True):
        for way in WAYS:
            assert ours[way].keys() == theirs[way].keys()
            for client, size in theirs[way].items():
                if ours["phase"] != "open":
                    assert ours[way][client] == pytest.approx(size, rel=0.02), (ours["round"], way, client)
    for way in WAYS:
        said, was = (sum(sum(line[way].values()) for line in own) for own in (forecast, recorded))
        assert said == pytest.approx(was, rel=0.01), way


def check(folder, table):
    recorded = ran(folder, table)
    for own in planning.plan(table)["methods"]:
        if own["in_file"]:
            assert own["at_most"] == []
            assert_close(own["lines"], recorded[own["label"]])


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Every built-in method on the tiny BERT with a head, three rounds: (what was planned, what was recorded)."""
    folder = tmp_path_factory.mktemp("everything")
    chosen = [{"name": name, **STEADY.get(name, {})} for name in method.names()]
    chosen += [{"name": name, "label": f"{name} as it comes"} for name in STEADY]
    table = tiny.table(folder, method=chosen, rounds=3)
    recorded = ran(folder, table)
    return {own["label"]: own for own in planning.plan(table)["methods"]}, recorded


@pytest.mark.parametrize("name", method.names())
def test_the_bytes_are_those_of_the_record(everything, name):
    planned, recorded = everything
    assert planned[name]["at_most"] == []
    assert_close(planned[name]["lines"], recorded[name])


@pytest.mark.parametrize("name", STEADY)
def test_what_depends_on_the_data_is_an_upper_bound_and_said_so(everything, name):
    planned, recorded = everything
    label = f"{name} as it comes"
    assert planned[label]["at_most"]
    for ours, theirs in zip(planned[label]["lines"], recorded[label], strict=True):
        for way in WAYS:
            # A few bytes of the header are numbers, which may be longer.
            assert all(size <= ours[way][client] + 24 for client, size in theirs[way].items())
    said, was = (
        sum(sum(line[way].values()) for line in own for way in WAYS) for own in (planned[label]["lines"], recorded[label])
    )
    assert said > was


def test_the_bound_of_an_energy_is_its_share_of_all_directions():
    layers, sites = {"q": LayerShape(40, 60, 4)}, 5
    plan = Plan(method.load("florist", energy=0.9), 3, list(range(sites)))
    told = traffic(plan, Sites(layers, {}, dict.fromkeys(range(sites), 100)))
    width = math.ceil(0.9 * 4 * sites)
    assert told.at_most == ["bytes_down"]
    assert 0 <= told.lines[-1]["bytes_down"]["0"] - 4 * width * (40 + 60) < 600


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_ranks_in_every_dtype_of_the_wire(tmp_path, dtype):
    chosen = [{"name": name, **STEADY.get(name, {})} for name in method.names() if method.find(name).mixed_ranks]
    lora = {"r": [2, 4, 7]}
    check(tmp_path, tiny.table(tmp_path, method=chosen, rounds=4, lora=lora, wire={"dtype": dtype}))


def test_clients_that_sit_out_catch_up(tmp_path):
    chosen = [{"name": name} for name in ("fedit", "flora", "fedex_lora", "fed_sb")]
    training, server = {"max_steps": 2}, {"clients_per_round": 2}
    split = {"kind": "iid", "clients": 4}
    check(tmp_path, tiny.table(tmp_path, method=chosen, rounds=6, training=training, server=server, split=split))


@pytest.mark.parametrize(("dtype", "asked"), [("float32", 0), ("int8", 3)])
def test_masked_uploads_and_the_messages_around_them(tmp_path, dtype, asked):
    chosen = [{"name": name} for name in ("fedit", "fedsa_lora", "fed_sb")]
    split, server = {"kind": "iid", "clients": 4}, {"clients_per_round": asked}
    privacy = {"secure_aggregation": True}
    check(tmp_path, tiny.table(tmp_path, chosen, rounds=3, split=split, server=server, privacy=privacy, wire={"dtype": dtype}))


def test_noise_at_the_server_changes_no_message(tmp_path):
    chosen = [{"name": name} for name in ("fedit", "fedsa_lora")]
    privacy = {"unit": "client", "target_epsilon": 8.0, "target_delta": 0.2}
    check(tmp_path, tiny.table(tmp_path, chosen, rounds=3, split={"kind": "iid", "clients": 4}, privacy=privacy))


def test_stacks_wider_than_the_matrix(tmp_path):
    """Three clients of rank 12 on layers of 32: what they send together is more than the matrix holds."""
    chosen = [{"name": "flora"}, {"name": "exact"}, {"name": "florist", "energy": 1.0, "adopt": "merge"}]
    check(tmp_path, tiny.table(tmp_path, method=chosen, rounds=3, lora={"r": 12}))


def test_more_rounds_than_are_followed(tmp_path):
    chosen = [{"name": name} for name in ("fedit", "rolora", "fedsa_lora")]
    table = tiny.table(tmp_path, method=chosen, rounds=9, training={"max_steps": 1})
    check(tmp_path, table)
    plan = Plan(method.load("rolora"), 1000, [0, 1])
    told = traffic(plan, Sites({"q": LayerShape(40, 60, 4)}, {}, {0: 9, 1: 9}))
    assert told.followed < 10
    assert len(told.lines) == 1001
    down = [line["bytes_down"]["0"] for line in told.lines]
    assert down[998] == down[4] < down[999] == down[5]  # B is the shorter one


def test_a_causal_model_without_a_head(tmp_path):
    chosen = [{"name": "fedit"}, {"name": "fed_sb", "init": "gradient"}, {"name": "fedsa_lora"}]
    check(tmp_path, tiny.causal_table(tmp_path, method=chosen, training={"max_steps": 1}))


def test_an_architectures_own_head(tmp_path):
    table = tiny.table(tmp_path, model={"pooling": "model"})
    check(tmp_path, table)
    assert set(planning.plan(table)["plain"]) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("table", [tiny.table, tiny.causal_table])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_and_memory_of_the_weights_are_the_loaded_models(tmp_path, table, dtype):
    if table is tiny.table and dtype == "bfloat16":
        pytest.skip("heads are trained in float32")
    made = table(tmp_path, model={"dtype": dtype})
    config = configuration.configs(made)["fedit"]
    base = model.load(config, len(tiny.TOPICS))
    size = sum(x.numel() * x.element_size() for x in [*base.model.parameters(), *base.model.buffers()])
    own = entry(made, "fedit")["memory"]
    adapter = Adapter(base.model, config.lora, base.heads, 0)
    assert own["site"]["weights"] == size
    numbers = sum(s.rank * (s.d_out + s.d_in) for s in adapter.layers.values())
    plain = sum(p.numel() for p in adapter.plain_parameters.values())
    told = planning.plan(made)
    assert own["site"]["adapter"] == 4 * (numbers + plain)
    assert set(told["adapter_parameters"].values()) == {numbers + plain}
    assert sum(kind["layers"] for kind in told["layers"]) == len(adapter.layers)


def test_activations_grow_with_the_batch_and_only_a_skeleton_is_made(tmp_path):
    small, large = (
        entry(tiny.causal_table(tmp_path, training={"per_device_train_batch_size": size}), "fedit")["memory"]["site"]
        for size in (4, 8)
    )
    assert large["activations"] == pytest.approx(2 * small["activations"], rel=0.05)
    config = configuration.configs(tiny.causal_table(tmp_path))["fedit"]
    assert {p.device.type for p in model.skeleton(config, 0).model.parameters()} == {"meta"}


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory):
    """A file for a Llama of 7 billion parameters of which there is nothing but config.json, and rows that are elsewhere."""
    folder = tmp_path_factory.mktemp("large")
    LlamaConfig().save_pretrained(str(folder))
    (folder / "generation_config.json").unlink(missing_ok=True)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return {
        "rounds": 20,
        "model": {"name": str(folder), "dtype": "bfloat16"},
        "data": {"train": "at-the-sites.jsonl", "test": "at-the-sites.jsonl"},
        "task": {"kind": "instruction", "prompt": "{question}", "response": "{answer}"},
        "split": {"clients": 10},
        "lora": {"r": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "method": {"name": "fedit"},
    }


def test_a_large_model_takes_seconds_and_no_weights(seven_billion):
    began = time.perf_counter()
    told = planning.plan(seven_billion, link="20Mbit")
    assert time.perf_counter() - began < 40  # about 3
    assert told["model"]["parameters"] == 6_738_415_616
    numbers = 32 * 8 * (4 * 4096 + 4096 + 11008)
    assert set(told["adapter_parameters"].values()) == {numbers}
    own = {entry["label"]: entry for entry in told["methods"]}
    assert [label for label, entry in own.items() if entry["reason"]] == []
    assert own["fedit"]["later_round"]["bytes_down"] == pytest.approx(4 * numbers, rel=0.01)
    assert own["flora"]["later_round"]["bytes_down"] == pytest.approx(10 * 4 * numbers, rel=0.01)
    assert own["fed_sb"]["besides"]["bytes_up"] == pytest.approx(4 * 32 * 4096 * (2 * 4096 + 11008), rel=0.01)
    assert own["fedit"]["memory"]["site"]["weights"] == pytest.approx(2 * 6_738_415_616, rel=0.01)
    # 20 rounds of 32 MB each way, less the first download, at 20 Mbit/s.
    assert own["fedit"]["seconds"]["run"] == pytest.approx(39 * 4 * numbers * 8 / 20e6, rel=0.01)
    assert own["fedit"]["seconds"]["server_run"] == pytest.approx(10 * own["fedit"]["seconds"]["run"], rel=0.01)
    assert any("cannot be read here" in note for note in told["notes"])


def test_a_classifier_of_which_only_the_configuration_is_there_has_a_head(tmp_path):
    made = tiny.table(tmp_path, model={"pooling": "model"})
    whole = planning.plan(made)
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.unlink()
    assert planning.plan(made)["plain"] == whole["plain"]
    assert planning.plan(made)["layers"] == whole["layers"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_messages_length_for_all_layers_is_the_real_ones(dtype):
    """One layer stands for two of its shape; names with quotes and other alphabets are escaped twice in a header."""
    layers = {name: LayerShape(5, 7, 2) for name in ('ä"b.q', "b.ß.q")} | {"c": LayerShape(4, 7, 2)}
    whole = {name: {"A": torch.randn(2, 7), "B": torch.randn(shape.d_out, 2)} for name, shape in layers.items()}
    heads = {"plain|head": torch.randn(3)}

    def payload(chosen):
        reset = {"reset": dict.fromkeys(chosen, 5), "kind": "train"}
        return wire.encode(wire.Message(reset, wire.pack_factors({n: whole[n] for n in chosen}) | heads), dtype)

    small = Small(layers, 1000)
    assert small.length(payload(small.layers)) == len(payload(layers))
    assert len(small.layers) == 2


def test_the_server_keeps_a_mean_or_every_upload(tmp_path):
    made = tiny.table(tmp_path, method=[{"name": "fedit"}, {"name": "flora_na"}], server={"aggregation_error": False})

    def kept(clients):
        told = planning.plan(made, clients=clients)
        assert told["clients"] == clients
        return {own["label"]: own["memory"]["server"]["kept"] for own in told["methods"] if own["in_file"]}

    few, many = kept(2), kept(6)
    assert few["fedit"] == many["fedit"]
    assert many["flora_na"] > few["flora_na"] * 1.5


def test_a_masked_sum_and_an_upload_are_in_the_servers_memory():
    layers = {name: LayerShape(40, 60, 4) for name in ("q", "v")}
    sites = Sites(layers, {"head": (3, 5)}, {0: 9, 1: 9})
    for name, numbers in (("fedit", 2 * 4 * 100), ("ffa_lora", 2 * 4 * 40), ("fed_sb", 2 * 40 * 60)):
        plan = Plan(method.load(name), 2, [0, 1], measure_error=False)
        plain, masked = (traffic(replace(plan, privacy=Privacy(secure_aggregation=on)), sites).kept for on in (False, True))
        assert masked - plain == 2 * 8 * (numbers + 15)


def test_methods_that_cannot_run_say_why(tmp_path):
    told = planning.plan(tiny.table(tmp_path, {"name": "flora"}, lora={"r": [2, 4, 4]}))
    reasons = {own["label"]: own["reason"] for own in told["methods"]}
    assert "one rank" in reasons["fedit"]
    assert reasons["flexlora"] is None
    assert [kind["ranks"] for kind in told["layers"]] == [[2, 4], [2, 4]]
    too_much = planning.plan(tiny.table(tmp_path, {"name": "fedit"}, lora={"r": 40}))
    assert "rank 40" in next(own["reason"] for own in too_much["methods"] if own["label"] == "fedsvd")


@pytest.mark.parametrize("link", ["fast", "20", "0Mbit", "-3Mbit", "20 Mbit per second", "20Tbit"])
def test_a_link_that_is_none_is_refused(link):
    with pytest.raises(ConfigError, match="--link: got"):
        planning.bits_per_second(link)


def test_links(tmp_path):
    assert [planning.bits_per_second(x) for x in ("500kbit", "1Gbit", "10MB/s", "2.5 Mbit/s")] == [5e5, 1e9, 8e7, 2.5e6]


def test_what_must_be_known_is_asked_for(tmp_path):
    made = tiny.table(tmp_path, data={"train": "elsewhere.jsonl"}, split={"kind": "iid"})
    with pytest.raises(ConfigError, match=r"size of the head is unknown; give data\.labels"):
        planning.plan(made)
    told = planning.plan({**made, "data": {**made["data"], "labels": list(tiny.TOPICS)}})
    assert told["plain"]["classifier.weight"] == [3, 32]
    with pytest.raises(ConfigError, match="--clients"):
        planning.plan(tiny.table(tmp_path, split={"kind": "by", "column": "label", "clients": 0}), clients=4)
    with pytest.raises(ConfigError, match="no configuration of a model"):
        planning.plan(tiny.table(tmp_path, model={"name": str(tmp_path)}))


def test_the_command_prints_a_table_or_json(tmp_path):
    import tomli_w

    file = tmp_path / "run.toml"
    file.write_bytes(tomli_w.dumps(tiny.table(tmp_path, {"name": "florist"})).encode())
    call = [sys.executable, "-m", "umbel.cli", "plan", str(file), "--link", "20Mbit", "--set", "lora.r=2"]
    env = {"COLUMNS": "200", "PYTHONPATH": str(Path(planning.__file__).parents[1]), "PATH": "", "HF_HUB_OFFLINE": "1"}
    shown = subprocess.run(call, capture_output=True, text=True, check=True, env=env).stdout
    assert "florist" in shown
    assert "≤" in shown
    told = json.loads(subprocess.run([*call, "--json"], capture_output=True, text=True, check=True, env=env).stdout)
    assert told["layers"][0]["ranks"] == [2]
    assert told["methods"][0]["seconds"]["run"] > 0
