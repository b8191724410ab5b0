"""Scores of a model on rows: accuracy and loss, likelihood of whole answers, exact match."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from umbel.client.prompts import IGNORED, Example, collate, encode, end_of_turn, label_answers, pad_id, prompt_ids, render
from umbel.client.split import Row
from umbel.config import Config, ConfigError

Progress = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""


def metric(config: Config) -> dict[str, str]:
    """Returns the name of the number to watch and whether "higher" or "lower" is better."""
    if config.task.kind == "instruction":
        return {"name": "loss", "better": "lower"}
    return {"name": "accuracy", "better": "higher"}


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    labels: list[str],
    config: Config,
    examples: Sequence[Example] | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Scores a model on rows.

    Classification gives "accuracy" and "loss", the mean cross-entropy. Choice gives the "accuracy" of the likeliest label
    name (`answer_scores`) and the "loss" of the right name; instruction the "loss" of the response. The loss of both is the
    mean over all response tokens of all rows, as in training. Where `task.answer` and `task.exact_match_rows` are set,
    instruction also gives "exact_match" over "exact_match_rows" rows, spread evenly over all.

    Args:
        model: A classification or causal model; its train or eval mode is as before on return.
        tokenizer: The model's.
        rows: Rows to score; may be empty.
        labels: All labels, in order.
        config: Its `data`, `task` and `training` (`per_device_eval_batch_size`, `bf16`).
        examples: `encode(rows, …)`, where it is at hand.
        progress: Called after each batch.

    Returns:
        The metrics and the number of "rows"; only `{"rows": 0}` where there are none.
    """
    if not rows:
        return {"rows": 0}
    examples = encode(rows, tokenizer, config, labels) if examples is None else examples
    report = progress or (lambda done, total: None)
    with _inference(model, config):
        if config.task.kind == "classification":
            return _classification(model, examples, config, pad_id(tokenizer), report)
        if config.task.kind == "choice":
            truth = [labels.index(row[config.data.label]) for row in rows]
            return _choice(model, examples, truth, label_answers(labels, tokenizer, config), config, pad_id(tokenizer), report)
        scores = _instruction(model, examples, config, pad_id(tokenizer), report)
        if config.task.answer and config.task.exact_match_rows:
            scores |= _exact_match(model, tokenizer, rows, config, report)
        return scores


@contextmanager
def _inference(model: nn.Module, config: Config) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with (
            torch.inference_mode(),
            torch.autocast(_device(model).type, dtype=torch.bfloat16, enabled=config.training.bf16),
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yields indices in batches, longest first: little padding, and too little memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _classification(
    model: nn.Module, examples: Sequence[Example], config: Config, pad: int, report: Progress
) -> dict[str, float]:
    right, loss, done = 0, 0.0, 0
    for batch in _batches([len(example.input_ids) for example in examples], config.training.per_device_eval_batch_size):
        inputs = {name: x.to(_device(model)) for name, x in collate([examples[i] for i in batch], pad).items()}
        labels = inputs.pop("labels")
        logits = model(**inputs).logits.float()
        right += int((logits.argmax(-1) == labels).sum())
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        done += len(batch)
        report(done, len(examples))
    return {"accuracy": right / done, "loss": loss / done, "rows": done}


def _choice(
    model: nn.Module,
    examples: Sequence[Example],
    truth: list[int],
    answers: list[list[int]],
    config: Config,
    pad: int,
    report: Progress,
) -> dict[str, float]:
    right, loss, tokens, done = 0, 0.0, 0, 0
    prompts = [example.input_ids[: example.prompt_length] for example in examples]
    # The batch size counts sequences that go through together, and each row becomes one per label.
    size = max(1, config.training.per_device_eval_batch_size // len(answers))
    for batch in _batches([len(prompt) for prompt in prompts], size):
        scores = answer_scores(model, [prompts[i] for i in batch], answers, pad)
        for score, i in zip(scores, batch, strict=True):
            right += int(score.argmax()) == truth[i]
            loss -= float(score[truth[i]])
            tokens += len(answers[truth[i]])
        done += len(batch)
        report(done, len(examples))
    return {"accuracy": right / done, "loss": loss / tokens, "rows": done}


def answer_scores(model: nn.Module, prompts: Sequence[list[int]], answers: Sequence[list[int]], pad: int) -> Tensor:
    """Returns the log-likelihood log p(answer | prompt) of every answer after every prompt.

    It is the sum of the log-probabilities of all tokens of the answer, the end of the turn among them. So every answer is
    scored as the whole reply it would be: "trade" is not favoured over "trade balance" for being its beginning, and no
    division by length is needed, which would favour long answers with predictable endings.

    Each prompt goes through the model once; its keys and values are then repeated for the answers. Prompts are padded on
    the left, so that every answer follows its prompt directly.

    Args:
        model: A causal model.
        prompts: Tokens, one list per row.
        answers: Tokens, one list per answer, none empty.
        pad: Token to pad with.

    Returns:
        Rows × answers, float32.
    """
    device, n, rows = _device(model), len(answers), len(prompts)
    ids, mask, positions = _pad_left(prompts, pad, device)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    first = torch.log_softmax(out.logits[:, -1].float(), -1)[:, [answer[0] for answer in answers]]
    if max(map(len, answers)) == 1:
        return first
    padded = collate([Example(answer, answer) for answer in answers], pad)
    given, follows = padded["input_ids"][:, :-1].to(device), padded["labels"][:, 1:].to(device)
    out.past_key_values.batch_repeat_interleave(n)
    answered = padded["attention_mask"][:, :-1].to(device)
    steps = positions[:, -1:] + 1 + torch.arange(given.shape[1], device=device)
    out = model(
        input_ids=given.repeat(rows, 1),
        attention_mask=torch.cat([mask.repeat_interleave(n, 0), answered.repeat(rows, 1)], dim=1),
        position_ids=steps.repeat_interleave(n, 0),
        past_key_values=out.past_key_values,
        use_cache=True,
    )
    losses = _token_losses(out.logits, follows.repeat(rows, 1))
    return first - losses.sum(-1).view(rows, n)


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns −log p of each label, 0 where it is −100; both are batch × length and in step."""
    return functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")


def _pad_left(sequences: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens, mask and positions, each batch × longest, with every sequence at the right end."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[pad] * (longest - len(s)) + s for s in sequences], device=device)
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def _instruction(model: nn.Module, examples: Sequence[Example], config: Config, pad: int, report: Progress) -> dict[str, float]:
    loss, tokens, done = 0.0, 0, 0
    for batch in _batches([len(example.input_ids) for example in examples], config.training.per_device_eval_batch_size):
        chosen = [examples[i] for i in batch]
        ids, mask, positions = _pad_left([example.input_ids for example in chosen], pad, _device(model))
        # Responses lie at the right end, so that only there logits over the whole vocabulary are needed.
        keep = max(len(example.input_ids) - example.prompt_length for example in chosen)
        labels = torch.full((len(chosen), keep), IGNORED, device=ids.device)
        for i, example in enumerate(chosen):
            response = example.input_ids[example.prompt_length :]
            labels[i, keep - len(response) :] = torch.tensor(response, device=ids.device)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep + 1)
        loss += sum(float(_token_losses(out.logits[i : i + 1, :-1], labels[i : i + 1]).sum()) for i in range(len(chosen)))
        tokens += int((labels != IGNORED).sum())
        done += len(batch)
        report(done, len(examples))
    return {"loss": loss / tokens, "rows": done}


def _exact_match(model: nn.Module, tokenizer: Any, rows: Sequence[Row], config: Config, report: Progress) -> dict[str, float]:
    n = min(config.task.exact_match_rows, len(rows))
    chosen = [rows[i * len(rows) // n] for i in range(n)]
    wanted = [last_match(config.task.answer, render(config.task.response, row)) for row in chosen]
    if None in wanted:
        response = render(config.task.response, chosen[wanted.index(None)])
        raise ConfigError(
            f"task.answer = {config.task.answer!r} matches nothing in the response of a test row: {response[-200:]!r}"
        )
    prompts = [prompt_ids(row, tokenizer, config, config.data.max_length) for row in chosen]
    right, done = 0, 0
    for batch in _batches([len(prompt) for prompt in prompts], config.training.per_device_eval_batch_size):
        texts = generate(model, tokenizer, [prompts[i] for i in batch], config.task.max_new_tokens)
        right += sum(last_match(config.task.answer, text) == wanted[i] for text, i in zip(texts, batch, strict=True))
        done += len(batch)
        report(done, n)
    return {"exact_match": right / n, "exact_match_rows": n}


def last_match(pattern: str, text: str) -> str | None:
    """Returns the last match in a text (its first group where the pattern has one), without commas and outer spaces.

    >>> last_match(r"#### ([0-9,]+)", "#### 7 and #### 1,024")
    '1024'
    """
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    return (matches[-1][1 if matches[-1].re.groups else 0] or "").replace(",", "").strip()


def generate(model: nn.Module, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """Returns the greedy continuation of each prompt, up to the end of the turn, the end of the text or the bound."""
    from transformers import GenerationConfig

    pad = pad_id(tokenizer)
    ids, mask, _ = _pad_left(prompts, pad, _device(model))
    stop = sorted({end_of_turn(tokenizer), tokenizer.eos_token_id or end_of_turn(tokenizer)})
    rule = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=pad)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=rule)  # type: ignore[operator]
    return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
