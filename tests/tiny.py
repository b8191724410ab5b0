"""Tiny real models and learnable texts, made on the spot: no hub, seconds to train."""

import json
import random
from pathlib import Path
from typing import Any

TOPICS = {"sea": "ship wave port sail", "sky": "cloud star moon wing", "soil": "root seed worm clay"}
FILLER = ["the", "a", "of", "and", "to", "in", "it", "was", "on", "that"]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def texts(rows: int, seed: int) -> list[dict[str, str]]:
    """Returns rows whose words tell their topic."""
    draw = random.Random(seed)
    result = []
    for _ in range(rows):
        topic = draw.choice(list(TOPICS))
        words = [draw.choice(TOPICS[topic].split()) for _ in range(3)] + [draw.choice(FILLER) for _ in range(4)]
        draw.shuffle(words)
        result.append({"text": " ".join(words), "label": topic, "reply": f"it was {topic}"})
    return result


def data(folder: Path, train: int = 90, test: int = 45) -> dict[str, Any]:
    """Writes JSONL files and returns the [data] table."""
    for name, rows, seed in (("train", train, 1), ("test", test, 2)):
        lines = [json.dumps(row) for row in texts(rows, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"), "max_length": 32}


def _tokenizer(folder: Path, chat: bool) -> int:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<user>", "<assistant>", *FILLER, *TOPICS]
    words += [word for topic in TOPICS.values() for word in topic.split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    if not chat:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    if chat:
        fast.chat_template = CHAT
    fast.save_pretrained(str(folder))
    return len(words)


def bert(folder: Path) -> Path:
    """Writes a two-layer BERT encoder, d_in = d_out = 32 for query and value, 32 → 48 for the intermediate layer."""
    import torch
    from transformers import BertConfig, BertModel

    vocabulary = _tokenizer(folder, chat=False)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(str(folder))
    return folder


def llama(folder: Path) -> Path:
    """Writes a two-layer Llama; its v_proj is 16 × 32 (grouped queries)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = _tokenizer(folder, chat=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=3,
        bos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


def gpt2(folder: Path) -> Path:
    """Writes a two-layer GPT-2, whose layers are Conv1D: they store d_in × d_out."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    vocabulary = _tokenizer(folder, chat=True)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=2, n_positions=128, pad_token_id=0, eos_token_id=3, bos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(str(folder))
    return folder


def table(folder: Path, method: Any = None, **sections: Any) -> dict[str, Any]:
    """Returns a classification job on the tiny BERT in `folder`: 3 skewed clients, 2 rounds."""
    (folder / "model").mkdir(exist_ok=True)
    result: dict[str, Any] = {
        "seed": 3,
        "rounds": 2,
        "model": {"name": str(bert(folder / "model")), "pooling": "mean"},
        "data": data(folder),
        "split": {"kind": "dirichlet", "clients": 3, "alpha": 0.5},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["query", "intermediate.dense"]},
        "training": {"learning_rate": 1e-2, "per_device_train_batch_size": 8, "max_steps": 3},
        "method": method or {"name": "fedit"},
    }
    return _merged(result, sections)


def causal_table(folder: Path, method: Any = None, **sections: Any) -> dict[str, Any]:
    """Returns a choice job on the tiny Llama."""
    result = table(folder, method)
    (folder / "llama").mkdir(exist_ok=True)
    result["model"] = {"name": str(llama(folder / "llama"))}
    result["task"] = {"kind": "choice", "prompt": "{text}"}
    result["lora"] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    return _merged(result, sections)


def _merged(table: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    for name, value in sections.items():
        table[name] = {**table.get(name, {}), **value} if isinstance(value, dict) else value
    return table
