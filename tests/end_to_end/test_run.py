"""Whole runs on tiny real models: every method, every task, out comes a folder that stock PEFT loads."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

import tiny
from recorded import lines
from umbel import method as methods
from umbel import run as running
from umbel import wire
from umbel.cli import app
from umbel.client import publish
from umbel.client.adapter import Adapter
from umbel.client.client import Client, Resident, tokens
from umbel.client.data import collate
from umbel.client.data import load as load_data
from umbel.client.evaluate import summary
from umbel.client.fit import batches
from umbel.client.model import load as load_model
from umbel.config import ConfigError, configs, for_task, from_table
from umbel.engine import Ask, Reply
from umbel.engine.local import Local
from umbel.loop import Plan, federate
from umbel.record import Record
from umbel.server import OBSERVER, Aggregator, Server

METHODS: list[dict[str, Any]] = [
    {"name": "fedit"},
    {"name": "flora_na"},
    {"name": "flora_na", "label": "flora_na-shared", "scope": "shared"},
    {"name": "florist"},
    {"name": "florist", "label": "florist-merge", "adopt": "merge", "energy": 1.0},
    {"name": "fed_sb", "lora": {"r": 8, "lora_alpha": 8}},
    {"name": "fed_sb", "label": "fed_sb-gradient", "init": "gradient"},
    {"name": "fed_sb", "label": "fed_sb-random", "init": "random"},
    *({"name": name} for name in ("ffa_lora", "rolora", "fedex_lora", "flora", "flexlora", "hetlora", "lora_fair")),
    *({"name": name} for name in ("fedsvd", "best_rank", "exact", "ravan", "power")),
]
EXACT = ("fed_sb", "fed_sb-gradient", "fed_sb-random", "florist-merge", "ffa_lora", "rolora", "fedex_lora", "flora", "fedsvd")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classification")
    return running.run(tiny.table(folder, METHODS), folder / "run")


@pytest.fixture(scope="module")
def causal_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choice")
    return running.run(tiny.causal_table(folder, METHODS), folder / "run")


@pytest.mark.parametrize("label", [m.get("label", m["name"]) for m in METHODS])
def test_every_round_of_every_method_is_recorded_whole(job: Path, label: str) -> None:
    rounds = lines(job / label)
    assert rounds[0]["phase"] == "open"
    assert [line["round"] for line in rounds] == list(range(len(rounds)))
    trained = [line for line in rounds if line["phase"] == "train"]
    assert [line["train_round"] for line in trained] == [1, 2]
    later = {line["train_round"]: line for line in rounds if line["phase"] == "update"}
    for line in trained:
        over = later.get(line["train_round"], line)
        assert line["asked"] == line["answered"] == [0, 1, 2]
        assert line["refused"] == []
        assert set(line["bytes_up"]) == set(line["bytes_down"]) == {"0", "1", "2"}
        assert line["steps"] == {"0": 3, "1": 3, "2": 3}
        assert over["global"]["rows"] == sum(own["rows"] for own in line["local"].values()) == 45
        assert len(over["rank"]) == 4
        assert len(line["aggregation_error"] or {}) == (0 if label == "power" else 4)
        assert sum(line["seconds"][stage] for stage in ("fit", "evaluate", "adapter", "wire", "server", "record")) <= (
            line["seconds"]["total"] + 0.01
        )
    info = json.loads((job / label / "run.json").read_text())
    assert info["state"] == "done"
    assert info["adapter"]["reload_max_difference"] < 1e-5


def test_exact_methods_are_exact_and_flora_na_is_no_worse_than_what_it_starts_from(job: Path) -> None:
    for label in (*EXACT, "exact", "ravan"):
        for line in lines(job / label):
            assert all(error <= 1e-5 for error in (line["aggregation_error"] or {}).values()), label
    assert any(error > 1e-3 for error in lines(job / "fedit")[-1]["aggregation_error"].values())


def test_all_methods_start_from_the_same_batches_and_seeds(job: Path) -> None:
    first = {label: lines(job / label)[1]["loss"] for label in ("fedit", "flora_na", "florist", "florist-merge")}
    assert len({json.dumps(loss) for loss in first.values()}) == 1


def test_baselines_stand_beside_the_methods(job: Path) -> None:
    contents = json.loads((job / "job.json").read_text())
    assert contents["local"] == ["local/client-0", "local/client-1", "local/client-2"]
    central = lines(job / contents["central"])
    assert [line["steps"] for line in central if line["phase"] == "train"] == [{"0": 9}, {"0": 9}]
    for place in contents["local"]:
        alone = lines(job / place)
        assert alone[-1]["global"]["rows"] == 45
        assert len(alone[-1]["asked"]) == 1


def test_the_split_is_saved_with_hashes(job: Path) -> None:
    split = json.loads((job / "split.json").read_text())
    assert sorted(row for rows in split["rows"]["train"] for row in rows) == list(range(90))
    assert len(split["hashes"]["train"]) == 64


@pytest.mark.parametrize("label", [m.get("label", m["name"]) for m in METHODS])
def test_stock_peft_loads_the_result_and_gives_the_scores_of_the_run(job: Path, label: str) -> None:
    """Nothing of umbel here but the data: AutoModel, PeftModel, and the head's two tensors."""
    info = json.loads((job / label / "run.json").read_text())
    config = from_table(info["config"])
    folder = job / label / "adapter"
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(config.model.name), str(folder)).eval()
    head = load_file(folder / "head.safetensors")
    dataset = load_data(config)
    tokenizer = load_model(config, 3).tokenizer
    batch = tokenizer([row["text"] for row in dataset.test], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    logits = (hidden * mask).sum(1) / mask.sum(1) @ head["classifier.weight"].T + head["classifier.bias"]
    names = json.loads((folder / "umbel.json").read_text())["labels"]
    right = sum(names[int(i)] == row["label"] for i, row in zip(logits.argmax(-1), dataset.test))
    assert right / len(dataset.test) == pytest.approx(lines(job / label)[-1]["global"]["accuracy"])


@pytest.mark.parametrize("label", [m.get("label", m["name"]) for m in METHODS])
def test_stock_peft_loads_a_causal_result(causal_job: Path, label: str) -> None:
    info = json.loads((causal_job / label / "run.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(info["config"]["model"]["name"])
    ids = torch.tensor([[4, 9, 16, 20]])
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, str(causal_job / label / "adapter"))(input_ids=ids).logits
    assert (adapted - plain).abs().max() > 1e-4
    assert info["adapter"]["reload_max_difference"] < 1e-5
    assert info["adapter"]["reload_factor_error"] < 1e-6


def test_eval_scores_the_folder_as_the_run_did(job: Path, causal_job: Path) -> None:
    for folder in (job / "florist-merge", causal_job / "fed_sb"):
        again = running.evaluate_again(folder)
        assert again["accuracy"] == pytest.approx(lines(folder)[-1]["global"]["accuracy"])
        assert again["loss"] == pytest.approx(lines(folder)[-1]["global"]["loss"], rel=1e-4)


def test_the_scores_of_every_row_make_the_metrics_again(job: Path, causal_job: Path) -> None:
    for folder in (job / "florist", job / "central", job / "local" / "client-1", causal_job / "fed_sb"):
        config = from_table(json.loads((folder / "run.json").read_text())["config"])
        last = lines(folder)[-1]
        rows = scores_of(folder, OBSERVER)
        assert [row["row"] for row in rows] == list(range(45))
        assert summary(rows, config) == last["global"]
        for client, own in last["local"].items():
            rows = scores_of(folder, int(client))
            assert {row["client"] for row in rows} == {int(client)}
            assert summary(rows, config) == own
    manifest = json.loads((job / "split.json").read_text())
    owners = [row["client"] for row in scores_of(job / "florist", OBSERVER)]
    assert [owners.count(k) for k in range(3)] == [len(own) for own in manifest["rows"]["test"]]


def scores_of(folder: Path, client: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "clients" / str(client) / "scores.jsonl").read_text().splitlines()]


def test_a_causal_run_is_scored_on_other_tasks(causal_job: Path, tmp_path: Path) -> None:
    folder = causal_job / "florist"
    config = from_table(json.loads((folder / "run.json").read_text())["config"])
    options = [["sea", "sky", "soil"], ["sky", "sea"]]
    rows = [
        {"text": row["text"], "options": options[i % 2], "label": options[i % 2].index(row["label"])}
        for i, row in enumerate(tiny.texts(40, seed=4))
        if row["label"] in options[i % 2]
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tables = {
        "again": {"data": {"test": config.data.test, "max_length": 32}, "task": {"kind": "choice", "prompt": "{text}"}},
        "own": {
            "data": {"test": str(tmp_path / "own.jsonl"), "max_length": 48},
            "task": {"kind": "choice", "prompt": "{text}", "choices": "options"},
        },
    }
    seen: list[tuple[str, int, int]] = []
    scores = running.evaluate_on(folder, tables, tmp_path / "out", lambda *step: seen.append(step))
    assert scores["again"] == pytest.approx(running.evaluate_again(folder), rel=1e-6)
    assert scores["own"]["rows"] == len(rows)
    for name in tables:
        kept = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        assert summary(kept, for_task(config, tables[name])) == scores[name]
    assert seen[-1] == ("own", len(rows), len(rows))
    (tmp_path / "own.toml").write_text(tomli_w.dumps(tables["own"]), encoding="utf-8")
    arguments = ["eval", str(folder), "--config", str(tmp_path / "own.toml"), "--out", str(tmp_path / "again")]
    said = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(said.stdout) == {"own": scores["own"]}
    assert (tmp_path / "again" / "own.jsonl").read_bytes() == (tmp_path / "out" / "own.jsonl").read_bytes()
    said = CliRunner().invoke(app, [*arguments, "--set", "data.max_test_rows=5"])
    assert [line.split()[-1] for line in said.stdout.strip().splitlines()] == ["rows", "5"]
    with pytest.raises(ConfigError, match="allowed by this model: at most"):
        running.evaluate_on(folder, {"long": {**tables["again"], "data": {"test": config.data.test, "max_length": 10**6}}})


def test_a_run_trains_on_options_of_each_rows_own(tmp_path: Path) -> None:
    table = tiny.causal_table(
        tmp_path,
        {"name": "florist"},
        rounds=3,
        task={"kind": "choice", "prompt": "{text}", "choices": "options", "response": "it was {choice}"},
        training={"max_steps": 12},
    )
    for which, rows, seed in (("train", 90, 1), ("test", 45, 2)):
        own = [row | {"options": "sea/sky/soil"} for row in tiny.texts(rows, seed)]
        Path(table["data"][which]).write_text("\n".join(map(json.dumps, own)), encoding="utf-8")
    rounds = lines(running.run(table, tmp_path / "run"))
    assert rounds[-1]["global"]["loss"] < rounds[0]["global"]["loss"] - 0.1
    assert set(rounds[-1]["global"]) == {"accuracy", "accuracy_norm", "loss", "rows"}


def test_a_head_that_reads_one_token_is_saved_where_peft_looks_for_it(tmp_path: Path) -> None:
    table = tiny.table(tmp_path, {"name": "florist"}, model={"pooling": "model"})
    folder = running.run(table, tmp_path / "run")
    base = AutoModelForSequenceClassification.from_pretrained(table["model"]["name"], num_labels=3)
    model = PeftModel.from_pretrained(base, str(folder / "adapter"))
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in saved
    assert torch.equal(
        model.base_model.model.classifier.modules_to_save["default"].weight, saved["base_model.model.classifier.weight"]
    )


def test_conv1d_layers_come_out_right(tmp_path: Path) -> None:
    table = tiny.causal_table(tmp_path, METHODS, lora={"target_modules": ["c_attn", "c_fc"]})
    (tmp_path / "gpt2").mkdir()
    table["model"] = {"name": str(tiny.gpt2(tmp_path / "gpt2"))}
    folder = running.run(table, tmp_path / "run")
    for label in ("fedit", "florist-merge", "fed_sb"):
        assert json.loads((folder / label / "run.json").read_text())["adapter"]["reload_max_difference"] < 1e-5


def test_instruction_tuning_lowers_the_loss_and_reports_it_before_and_after(tmp_path: Path) -> None:
    table = tiny.causal_table(
        tmp_path,
        {"name": "florist"},
        task={"kind": "instruction", "prompt": "{text}", "response": "{reply}", "answer": "[a-z]+", "exact_match_rows": 4},
        training={"max_steps": 6},
    )
    rounds = lines(running.run(table, tmp_path / "run"))
    assert rounds[0]["phase"] == "open"
    assert rounds[-1]["global"]["loss"] < rounds[0]["global"]["loss"]
    assert 0 <= rounds[-1]["global"]["exact_match"] <= 1
    assert rounds[-1]["global"]["exact_match_rows"] == 4
    rows = scores_of(tmp_path / "run", OBSERVER)
    assert summary(rows, configs(table)["florist"]) == rounds[-1]["global"]
    assert sum("text" in row for row in rows) == 4


def test_bfloat16_on_the_wire_halves_the_bytes_and_the_result_is_what_clients_hold(tmp_path: Path) -> None:
    entries = [{"name": "fedit"}, {"name": "fedit", "label": "half", "wire": {"dtype": "bfloat16"}}]
    folder = running.run(tiny.table(tmp_path, entries), tmp_path / "run")
    full, half = lines(folder / "fedit")[-1]["bytes_up"]["0"], lines(folder / "half")[-1]["bytes_up"]["0"]
    assert half < 0.65 * full
    saved = load_file(folder / "half" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(x, x.to(torch.bfloat16).float()) for x in saved.values())


def test_clients_that_sit_out_catch_up(tmp_path: Path) -> None:
    entries = [
        {"name": "florist", "adopt": "merge", "energy": 1.0, "server": {"clients_per_round": 2}},
        {"name": "fed_sb", "server": {"clients_per_round": 1}},
    ]
    folder = running.run(tiny.table(tmp_path, entries, rounds=4), tmp_path / "run")
    asked = [tuple(line["asked"]) for line in lines(folder / "florist") if line["phase"] == "train"]
    assert {len(own) for own in asked} == {2}
    assert len(set(asked)) > 1
    for label in ("florist", "fed_sb"):
        info = json.loads((folder / label / "run.json").read_text())
        assert info["adapter"]["reload_max_difference"] < 1e-5
        assert all(
            max(line["aggregation_error"].values()) < 1e-5 for line in lines(folder / label) if line["aggregation_error"]
        )


# Runs taken apart


def residents(table: dict[str, Any], folder: Path, alone: bool = False) -> tuple[Resident, Any]:
    config = next(iter(configs(table).values()))
    dataset = load_data(config)
    base = load_model(config, len(dataset.labels))
    train, test = tokens(config, base, dataset)
    if alone:
        dataset = running._pooled(dataset)
    adapter = Adapter(base.model, config.lora, base.heads, config.seed)
    return Resident(config, base, adapter, dataset, train, test), config


def engine(resident: Resident, folder: Path) -> Local:
    numbers = [*range(resident.dataset.clients), OBSERVER]
    return Local({k: Client(k, resident, folder / "clients" / str(k)).answer for k in numbers})


@pytest.mark.parametrize("name", ["fedit", "flora_na"])
def test_with_one_client_a_federated_run_is_central_training_step_for_step(name: str, tmp_path: Path) -> None:
    """Against one plain PyTorch loop over all rounds × steps, with one optimizer and one schedule, to the last bit."""
    training = {"optimizer_state": "keep", "lr_scheduler_type": "cosine", "warmup_ratio": 0.2}
    table = tiny.causal_table(tmp_path, {"name": name}, training=training, rounds=3)
    resident, config = residents(table, tmp_path, alone=True)
    plan = Plan(methods.load(name), 3, [0], seed=config.seed, score_clients=False)
    server = federate(engine(resident, tmp_path), plan, Record(tmp_path / "run"))

    adapter = resident.adapter
    adapter.restart(config.seed)
    parameters = adapter.trainable(("A", "B"))
    adapter.model.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for step in range(9):
        if step % 3 == 0:
            from umbel.algebra import seed_of

            seed = seed_of(config.seed, "client", 0, step // 3 + 1)
            stream = batches(resident.train, 8, torch.Generator().manual_seed(seed))
        warmup = math.ceil(0.2 * 9)
        rate = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (9 - warmup)))
        optimizer.param_groups[0]["lr"] = 1e-2 * rate
        batch = collate(next(stream), 0)
        logits = adapter.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        target = batch["labels"][:, 1:]
        wanted = target != -100
        torch.nn.functional.cross_entropy(logits[:, :-1][wanted], target[wanted]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for layer, own in adapter.read().items():
        for factor, x in own.items():
            assert torch.equal(server.held[layer][factor], x), (layer, factor)


class Capturing:
    """The local engine, keeping what clients sent."""

    def __init__(self, inner: Local) -> None:
        self.inner, self.replies = inner, list[Reply]()

    def ask(self, asks: Any) -> Iterator[Reply]:
        def only(ask: Ask) -> Ask:
            return ask

        for reply in self.inner.ask(map(only, asks)):
            self.replies.append(reply)
            yield reply


def test_on_the_same_uploads_errors_order_as_theory_says_in_every_layer_and_round(tmp_path: Path) -> None:
    """exact ≤ best_rank ≤ flora_na ≤ fedit, and best_rank ≤ lora_fair ≤ fedit."""
    table = tiny.table(tmp_path, {"name": "flora_na"}, rounds=4, training={"max_steps": 5})
    resident, config = residents(table, tmp_path)
    capturing, record = Capturing(engine(resident, tmp_path)), Record(tmp_path / "run")
    clients = [0, 1, 2]
    federate(capturing, Plan(methods.load("flora_na"), 4, clients, seed=config.seed), record)
    uploads = [
        (reply.client, wire.decode(reply.payload))
        for reply in capturing.replies
        if reply.payload is not None and reply.client != OBSERVER
    ][len(clients) :]
    trained = [line for line in record.lines() if line["phase"] == "train"]
    assert len(trained) == 4
    better = 0
    for line, start in zip(trained, range(0, len(uploads), 3)):
        errors: dict[str, dict[str, float]] = {}
        for name in ("exact", "best_rank", "flora_na", "lora_fair", "fedit"):
            aggregator = Aggregator(methods.load(name), Server(resident.adapter.layers, config.seed))
            for client, message in uploads[start : start + 3]:
                factors = wire.unpack_factors(message.tensors)
                aggregator.add(client, message.header["rows"], factors, wire.unpack_plain(message.tensors))
            found = aggregator.done().error
            assert found is not None
            errors[name] = found
        assert errors["flora_na"] == pytest.approx(line["aggregation_error"], rel=1e-6)
        chains = (("exact", "best_rank", "flora_na", "fedit"), ("best_rank", "lora_fair", "fedit"))
        for lower, higher in (pair for chain in chains for pair in pairwise(chain)):
            for layer, error in errors[lower].items():
                assert error <= errors[higher][layer] * (1 + 1e-6) + 1e-7, (lower, higher, line["round"], layer)
        assert max(errors["exact"].values()) < 1e-6
        better += sum(errors["flora_na"][layer] < 0.999 * errors["fedit"][layer] for layer in errors["fedit"])
    assert better > 0


def test_fed_sb_sends_r_squared_numbers_per_layer_whatever_the_layers_and_clients(tmp_path: Path) -> None:
    """Bytes up = r² × 4 per layer + header, on a task without a head, for two models and two numbers of clients."""
    found: dict[tuple[str, int], int] = {}
    for kind, targets in (("llama", ["q_proj", "up_proj"]), ("gpt2", ["c_attn", "c_fc"])):
        for clients in (2, 4):
            folder = tmp_path / f"{kind}{clients}"
            folder.mkdir()
            table = tiny.causal_table(
                folder, {"name": "fed_sb"}, lora={"target_modules": targets, "r": 5}, split={"kind": "iid", "clients": clients}
            )
            (folder / "own").mkdir()
            table["model"] = {"name": str(getattr(tiny, kind)(folder / "own"))}
            resident, config = residents(table, folder)
            record = Record(folder / "run")
            plan = Plan(methods.load("fed_sb"), 1, list(range(clients)), seed=config.seed, observe="never", score_clients=False)
            federate(engine(resident, folder), plan, record)
            sent = record.lines()[-1]["bytes_up"]
            assert max(sent.values()) - min(sent.values()) <= 64  # numbers in the header differ in length
            names = sum(len(layer) for layer in resident.adapter.layers)
            payload = 4 * 5 * 5 * 4
            assert payload < sent["0"] < payload + 4 * 80 + names + 600
            found[kind, clients] = sent["0"] - names
    assert max(found.values()) - min(found.values()) <= 96


def test_a_job_whose_methods_would_not_share_their_data_is_refused(tmp_path: Path) -> None:
    entries = [{"name": "fedit"}, {"name": "florist", "split": {"alpha": 9.0}}]
    from umbel.config import ConfigError

    with pytest.raises(ConfigError, match=r"florist: 'split' differs from fedit's"):
        running.run(tiny.table(tmp_path, entries), tmp_path / "run")


def test_a_result_that_does_not_reproduce_the_model_is_not_called_done(job: Path, tmp_path: Path) -> None:
    """The comparison can fail: against a folder with one factor changed it does."""
    import shutil

    from safetensors.torch import save_file

    folder = tmp_path / "adapter"
    shutil.copytree(job / "fedit" / "adapter", folder)
    config = from_table(json.loads((job / "fedit" / "run.json").read_text())["config"])
    with publish.Stock(config, 3).loaded(folder) as own:
        _, test = tokens(config, own, load_data(config))
        tensors = load_file(folder / "adapter_model.safetensors")
        name = next(key for key in tensors if "lora_B" in key)
        tensors[name] = tensors[name] + 1
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        assert publish.difference(own, own.model, test[:8]) == 0
        with publish.Stock(config, 3).loaded(folder) as changed:
            assert publish.difference(changed, own.model, test[:8]) > 1e-4


def test_folders_loaded_one_after_the_other_leave_no_trace_in_the_base(job: Path) -> None:
    config = from_table(json.loads((job / "fedit" / "run.json").read_text())["config"])
    stock = publish.Stock(config, 3)
    rows = tokens(config, load_model(config, 3), load_data(config))[1][:8]
    with stock.loaded(job / "fedit" / "adapter") as first, torch.inference_mode():
        batch = {key: x for key, x in collate(rows, 0).items() if key != "labels"}
        wanted = first.model(**batch).logits.clone()
    with stock.loaded(job / "florist-merge" / "adapter") as other, torch.inference_mode():
        assert not torch.equal(other.model(**batch).logits, wanted)
    with stock.loaded(job / "fedit" / "adapter") as again, torch.inference_mode():
        assert torch.equal(again.model(**batch).logits, wanted)


def test_layers_that_are_new_with_the_task_are_trained_averaged_and_published(tmp_path: Path) -> None:
    """DistilBERT has a `pre_classifier` beside its `classifier`; both are missing from an encoder's checkpoint."""
    from transformers import DistilBertConfig, DistilBertModel

    table = tiny.table(tmp_path, {"name": "fedit"}, model={"pooling": "model"}, lora={"target_modules": ["q_lin", "lin1"]})
    torch.manual_seed(0)
    small = DistilBertConfig(vocab_size=40, dim=32, hidden_dim=48, n_layers=2, n_heads=2, max_position_embeddings=64)
    DistilBertModel(small).save_pretrained(table["model"]["name"])
    folder = running.run(table, tmp_path / "run")
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {"base_model.model.pre_classifier.weight", "base_model.model.classifier.bias"} <= set(saved)
    torch.manual_seed(99)
    base = AutoModelForSequenceClassification.from_pretrained(table["model"]["name"], num_labels=3)
    model = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    dataset = load_data(from_table(json.loads((folder / "run.json").read_text())["config"]))
    tokenizer = load_model(from_table(json.loads((folder / "run.json").read_text())["config"]), 3).tokenizer
    batch = tokenizer([row["text"] for row in dataset.test], padding=True, return_tensors="pt")
    with torch.no_grad():
        guesses = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    right = sum(dataset.labels[int(i)] == row["label"] for i, row in zip(guesses, dataset.test))
    assert right / len(dataset.test) == pytest.approx(lines(folder)[-1]["global"]["accuracy"])


def test_a_quorum_is_for_the_clients_that_take_part_and_not_for_the_baselines(tmp_path: Path) -> None:
    quorum = {"server": {"min_clients": 3}, "training": {"max_steps": 1}}
    with pytest.raises(ConfigError, match=r"server\.min_clients: got 3, allowed: at most the 2 clients that take part"):
        running.run(tiny.table(tmp_path, split={"unseen": 0.3}, **quorum), tmp_path / "unseen")
    folder = running.run(tiny.table(tmp_path, **quorum), tmp_path / "all")
    for member in (".", "central", "local/client-0"):
        assert json.loads((folder / member / "run.json").read_text())["state"] == "done"
    assert running.resume(folder) == folder


def test_a_job_does_not_go_on_over_other_rows_or_another_configuration(tmp_path: Path) -> None:
    from umbel.record import RecordError

    table = tiny.table(tmp_path, {"name": "fedit"})
    folder = running.run(table, tmp_path / "run")
    with pytest.raises(RecordError, match="another configuration"):
        running.run({**table, "rounds": 5}, folder)
    test = tmp_path / "test.jsonl"
    test.write_text(test.read_text() + test.read_text().splitlines()[0] + "\n")
    with pytest.raises(RecordError, match="the test rows have changed"):
        running.resume(folder)


@pytest.mark.parametrize("keep", ["../../../evil", True, -2, None, 1.5])
def test_a_server_cannot_name_files_outside_a_clients_folder(keep: Any, tmp_path: Path) -> None:
    resident, _ = residents(tiny.causal_table(tmp_path), tmp_path)
    client = Client(0, resident, tmp_path / "deep" / "clients" / "0")
    header = {"kind": "observe", "client": 0, "has": -1, "keep": keep, "generate": False}
    with pytest.raises(wire.WireError, match="'keep' is"):
        client.answer(wire.encode(wire.Message(header)))
    assert not list(tmp_path.glob("**/*evil*"))


def test_a_folder_with_somebody_elses_files_is_not_written_to(tmp_path: Path) -> None:
    from umbel.record import RecordError

    (tmp_path / "mine" / "adapter").mkdir(parents=True)
    (tmp_path / "mine" / "adapter" / "precious.txt").write_text("p")
    with pytest.raises(RecordError, match="is not empty \\(adapter\\) and holds no run"):
        running.run(tiny.table(tmp_path), tmp_path / "mine")
    assert (tmp_path / "mine" / "adapter" / "precious.txt").read_text() == "p"


def test_resuming_what_is_no_run_touches_nothing(tmp_path: Path) -> None:
    from umbel.record import RecordError

    (tmp_path / "job.toml").write_text("# mine\nrounds = 1\n")
    for name in ("typo", ".", "job.toml"):
        with pytest.raises(RecordError, match="no folder that `umbel run` made"):
            running.resume(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["job.toml"]
    assert (tmp_path / "job.toml").read_text() == "# mine\nrounds = 1\n"


def test_a_members_folder_resumes_its_job(job: Path) -> None:
    assert running.resume(job / "florist") == job
    assert running.resume(job / "local" / "client-0") == job
