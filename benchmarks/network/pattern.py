"""Flower's own LoRA pattern, as its fine-tuning examples have it, for the same work as an umbel run.

In every `train` call the client loads tokenizer, rows and base model, wraps it with PEFT, sets the weights that came, trains,
and returns PEFT's state dict; the server is Flower's FedAvg. Nothing of umbel is in here. Where the examples leave a choice,
the faster one was taken: rows are a local file that is already the client's own, the loop is plain PyTorch instead of a
trainer, and nobody evaluates.
"""

import json
import logging
import random
import time
import warnings
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg


@dataclass(frozen=True)
class Work:
    """What every client does in every round.

    Args:
        model: Folder of the base model.
        files: One JSONL file of rows per client.
        task: "classification" (columns text and label) or "instruction" (prompt and reply).
        labels: Names of the classes.
    """

    model: str
    files: list[str]
    task: str
    labels: list[str]
    max_length: int
    r: int
    lora_alpha: int
    target_modules: list[str]
    steps: int
    batch: int
    learning_rate: float
    rounds: int


def run(work: Work) -> dict[str, Any]:
    """Runs it in Flower's simulation; returns wall seconds, those of every round, and the clients' mean loss in each.

    "cpu" are the seconds that clients and server worked in each round but the first; Ray's own processes do not count.
    """
    import torch
    from flwr.simulation import run_simulation

    threads = torch.get_num_threads()
    moments: list[float] = []
    worked: list[float] = []
    losses: list[float] = []
    clients_worked: list[float] = []
    server, client = ServerApp(), ClientApp()

    @server.main()
    def _(grid: Grid, context: Context) -> None:
        model = _model(work)

        def noted(number: int, arrays: ArrayRecord) -> None:
            moments.append(time.perf_counter())
            worked.append(time.process_time())

        first = ArrayRecord(_state(model))
        config = ConfigRecord({"work": json.dumps(asdict(work)), "threads": threads})
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=len(work.files), min_available_nodes=len(work.files))
        result = strategy.start(grid, first, num_rounds=work.rounds, train_config=config, evaluate_fn=noted)
        for metrics in result.train_metrics_clientapp.values():
            losses.append(float(str(metrics["loss"])))
            # All clients have as many rows, so the mean over them is a plain one.
            clients_worked.append(len(work.files) * float(str(metrics["cpu"])))

    client.train()(train)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend = {"client_resources": {"num_cpus": 1.0}, "init_args": {"num_cpus": 1}}
        run_simulation(server, client, len(work.files), backend_config=backend)  # type: ignore[arg-type]
    seconds = time.perf_counter() - began
    if len(losses) != work.rounds:
        raise RuntimeError(f"{len(losses)} of {work.rounds} rounds were finished")
    cpu = [after - before + clients for (before, after), clients in zip(pairwise(worked), clients_worked)]
    return {"seconds": seconds, "rounds": [b - a for a, b in pairwise(moments)], "cpu": cpu[1:], "loss": losses}


def train(message: Message, context: Context) -> Message:
    """Answers one message, from nothing, as the examples do."""
    import torch
    from peft import set_peft_model_state_dict

    began = time.process_time()
    config, arrays = message.content["config"], message.content["arrays"]
    assert isinstance(config, ConfigRecord)
    assert isinstance(arrays, ArrayRecord)
    work = Work(**json.loads(str(config["work"])))
    torch.set_num_threads(int(config["threads"]))  # type: ignore[arg-type]
    partition = int(context.node_config["partition-id"])
    rows = [json.loads(line) for line in Path(work.files[partition]).read_text(encoding="utf-8").splitlines()]
    model = _model(work)
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    loss = _fit(model, _examples(work, rows), work, seed=1000 * int(config["server-round"]) + partition)  # type: ignore[arg-type]
    metrics = MetricRecord({"loss": loss, "num-examples": len(rows)})
    records = RecordDict({"arrays": ArrayRecord(_state(model)), "metrics": metrics})
    metrics["cpu"] = time.process_time() - began
    return Message(records, reply_to=message)


def _model(work: Work) -> Any:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    _quiet()
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": torch.float32}
    if work.task == "classification":
        kind, task_type, options["num_labels"] = transformers.AutoModelForSequenceClassification, "SEQ_CLS", len(work.labels)
    else:
        kind, task_type = transformers.AutoModelForCausalLM, "CAUSAL_LM"
    lora = LoraConfig(r=work.r, lora_alpha=work.lora_alpha, target_modules=work.target_modules, task_type=task_type)
    return get_peft_model(kind.from_pretrained(work.model, **options), lora)


@cache
def _quiet() -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _state(model: Any) -> dict[str, Any]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _examples(work: Work, rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Returns token ids and what is to be learned of them: the class, or the reply's tokens (-100 elsewhere)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    if work.task == "classification":
        found = tokenizer([row["text"] for row in rows], truncation=True, max_length=work.max_length)
        return [{"ids": ids, "labels": work.labels.index(row["label"])} for ids, row in zip(found["input_ids"], rows)]
    examples = []
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        reply = tokenizer(row["reply"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        prompt = prompt[: work.max_length - len(reply)]
        examples.append({"ids": prompt + reply, "labels": [-100] * len(prompt) + reply})
    return examples


def _fit(model: Any, examples: list[dict[str, Any]], work: Work, seed: int) -> float:
    """Trains for some steps; returns the mean loss."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    draw = random.Random(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=work.learning_rate, weight_decay=0.0)
    model.train()
    losses = []
    for _ in range(work.steps):
        batch = draw.sample(examples, work.batch)
        ids = [torch.tensor(example["ids"]) for example in batch]
        mask = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
        if work.task == "classification":
            labels = torch.tensor([example["labels"] for example in batch])
        else:
            labels = pad_sequence([torch.tensor(example["labels"]) for example in batch], True, -100)
        loss = model(input_ids=pad_sequence(ids, batch_first=True), attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses) / len(losses)
