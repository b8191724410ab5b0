"""Scores of a model on rows: accuracy and loss, likelihood of whole answers, exact match, programs that pass their tests."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from umbel.client.execute import code_of, failure
from umbel.client.prompts import (
    IGNORED,
    LETTERS,
    Example,
    collate,
    encode,
    end_of_turn,
    label_answers,
    option_answers,
    options,
    pad_id,
    prompt_ids,
    render,
)
from umbel.client.split import Row
from umbel.config import Config, ConfigError

Progress = Callable[[int, int], None]
"""Called with the rows done and the rows in all."""

Scored = dict[str, Any]
"""What is known of one scored row, as JSON has it; `score` names the entries."""


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
    """Scores a model on rows: the `summary` of `score`, whose arguments these are."""
    return summary(score(model, tokenizer, rows, labels, config, examples, progress), config)


def score(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    labels: list[str],
    config: Config,
    examples: Sequence[Example] | None = None,
    progress: Progress | None = None,
) -> list[Scored]:
    """Scores a model on every row.

    Every row gets its "loss", −log p of the right answer: of the label (classification), of all "tokens" of the right answer
    (choice) or of the response (instruction). Further:

    * Classification: "right", and "got", the likeliest label.
    * Choice: "right", and "got", the likeliest label name (`answer_scores`), or of `task.choices` the likeliest option's
      letter; there also "right_norm", where each log-likelihood is divided by the number of the option's characters.
    * Instruction, in `task.exact_match_rows` rows, spread evenly over all: the "text" generated. With `task.answer` "got" and
      "wanted", and "right" where they are the same text or number; where all that is wanted are numbers also
      "right_flexible", for the last number anywhere in the text. With `task.program` "right" where the program
      ran to its end, and "got", why it did not.

    Args:
        model: A classification or causal model; its train or eval mode is as before on return.
        tokenizer: The model's.
        rows: Rows to score; may be empty.
        labels: All labels, in order.
        config: Its `data`, `task` and `training` (`per_device_eval_batch_size`, `bf16`).
        examples: `encode(rows, …)`, where it is at hand.
        progress: Called after each batch.

    Returns:
        One table per row, in their order.
    """
    if not rows:
        return []
    examples = encode(rows, tokenizer, config, labels) if examples is None else examples
    report, task = progress or (lambda done, total: None), config.task
    with _inference(model, config):
        if task.kind == "classification":
            return _classification(model, examples, labels, config, pad_id(tokenizer), report)
        if task.kind == "choice":
            return _choice(model, tokenizer, rows, labels, examples, config, report)
        scored = _instruction(model, examples, config, pad_id(tokenizer), report)
        if task.exact_match_rows:
            for i, found in _generated(model, tokenizer, rows, config, report).items():
                scored[i] |= found
        return scored


def summary(scored: Sequence[Scored], config: Config) -> dict[str, float]:
    """Returns the metrics of rows that `score` made, or that were read from `scores.jsonl`.

    "loss" is the mean over rows (classification) or over all answer tokens of all rows, as in training. "accuracy" (and for
    `task.choices` "accuracy_norm"), "exact_match" (and where it applies "exact_match_flexible") and "pass_at_1" are shares of
    the rows that have them; where text was generated, "exact_match_rows" or "pass_at_1_rows" says how many those are.

    Returns:
        The metrics and the number of "rows"; only `{"rows": 0}` where there are none.
    """
    if not scored:
        return {"rows": 0}
    name = "pass_at_1" if config.task.program else "exact_match" if config.task.kind == "instruction" else "accuracy"
    result: dict[str, float] = {}
    for key in ("right", "right_norm", "right_flexible"):
        held = [row[key] for row in scored if key in row]
        if held:
            result[name + key.removeprefix("right")] = sum(held) / len(held)
            if config.task.kind == "instruction":
                result[f"{name}_rows"] = len(held)
    # A loss that is not finite has no number in JSON.
    losses = [math.nan if row["loss"] is None else row["loss"] for row in scored]
    result["loss"] = math.fsum(losses) / sum(row.get("tokens", 1) for row in scored)
    return result | {"rows": len(scored)}


def as_json(scored: Scored) -> Scored:
    """Returns one row's scores with null in place of what is no number in JSON: a model that diverged has such a loss."""
    return {key: _finite(value) for key, value in scored.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    model: nn.Module, examples: Sequence[Example], labels: list[str], config: Config, pad: int, report: Progress
) -> list[Scored]:
    scored, done = [Scored() for _ in examples], 0
    for batch in _batches([len(example.input_ids) for example in examples], config.training.per_device_eval_batch_size):
        inputs = {name: x.to(_device(model)) for name, x in collate([examples[i] for i in batch], pad).items()}
        truth = inputs.pop("labels")
        logits = model(**inputs).logits.float()
        losses = functional.cross_entropy(logits, truth, reduction="none").tolist()
        for i, got, right, loss in zip(batch, logits.argmax(-1).tolist(), truth.tolist(), losses, strict=True):
            scored[i] = {"right": got == right, "got": labels[got], "loss": loss}
        done += len(batch)
        report(done, len(examples))
    return scored


def _choice(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    labels: list[str],
    examples: Sequence[Example],
    config: Config,
    report: Progress,
) -> list[Scored]:
    own, data = bool(config.task.choices), config.data
    shared = [] if own else label_answers(labels, tokenizer, config)
    answers = [option_answers(row, tokenizer, config) if own else shared for row in rows]
    scored, done = [Scored() for _ in examples], 0
    prompts = [example.input_ids[: example.prompt_length] for example in examples]
    # The batch size counts sequences that go through together, and each row becomes one per answer.
    size = max(1, config.training.per_device_eval_batch_size // max(map(len, answers)))
    for batch in _batches([len(prompt) for prompt in prompts], size):
        table = answer_scores(model, [prompts[i] for i in batch], [answers[i] for i in batch], pad_id(tokenizer))
        for scores, i in zip(table.tolist(), batch, strict=True):
            names = list(LETTERS[: len(answers[i])]) if own else labels
            right, scores = names.index(rows[i][data.label]), scores[: len(names)]
            got = _largest(scores)
            scored[i] = {"right": got == right, "got": names[got]}
            if own:
                lengths = [len(option) for option in options(rows[i], config)]
                normed = [score / max(1, n) for score, n in zip(scores, lengths, strict=True)]
                scored[i] |= {"right_norm": _largest(normed) == right, "likelihoods": scores}
            scored[i] |= {"loss": -scores[right], "tokens": len(answers[i][right])}
        done += len(batch)
        report(done, len(examples))
    return scored


def _largest(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def answer_scores(model: nn.Module, prompts: Sequence[list[int]], answers: Sequence[Sequence[list[int]]], pad: int) -> Tensor:
    """Returns the log-likelihood log p(answer | prompt) of every answer after its prompt.

    It is the sum of the log-probabilities of all tokens of the answer, the end of the turn among them. So every answer is
    scored as the whole reply it would be: "trade" is not favoured over "trade balance" for being its beginning, and no
    division by length is needed, which would favour long answers with predictable endings.

    Each prompt goes through the model once; its keys and values are then repeated for the answers. Prompts are padded on
    the left, so that every answer follows its prompt directly.

    Args:
        model: A causal model.
        prompts: Tokens, one list per row.
        answers: Tokens, per row one list per answer, none empty; rows may have different numbers of answers.
        pad: Token to pad with.

    Returns:
        Rows × most answers of a row, float32; −∞ where a row has fewer.
    """
    device, n, rows = _device(model), max(map(len, answers)), len(prompts)
    # A row with fewer answers repeats its first, so that all have the same number; what they score is not used.
    flat = [answer for own in answers for answer in [*own, *[own[0]] * (n - len(own))]]
    missing = torch.tensor([[i >= len(own) for i in range(n)] for own in answers], device=device)
    ids, mask, positions = _pad_left(prompts, pad, device)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    begins = torch.tensor([answer[0] for answer in flat], device=device).view(rows, n)
    first = torch.log_softmax(out.logits[:, -1].float(), -1).gather(1, begins)
    if max(map(len, flat)) == 1:
        return first.masked_fill(missing, -math.inf)
    padded = collate([Example(answer, answer) for answer in flat], pad)
    given, follows = padded["input_ids"][:, :-1].to(device), padded["labels"][:, 1:].to(device)
    out.past_key_values.batch_repeat_interleave(n)
    answered = padded["attention_mask"][:, :-1].to(device)
    steps = positions[:, -1:] + 1 + torch.arange(given.shape[1], device=device)
    out = model(
        input_ids=given,
        attention_mask=torch.cat([mask.repeat_interleave(n, 0), answered], dim=1),
        position_ids=steps.repeat_interleave(n, 0),
        past_key_values=out.past_key_values,
        use_cache=True,
    )
    losses = _token_losses(out.logits, follows)
    return (first - losses.sum(-1).view(rows, n)).masked_fill(missing, -math.inf)


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns −log p of each label, 0 where it is −100; both are batch × length and in step."""
    return functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")


def _pad_left(sequences: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens, mask and positions, each batch × longest, with every sequence at the right end."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[pad] * (longest - len(s)) + s for s in sequences], device=device)
    mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def _instruction(model: nn.Module, examples: Sequence[Example], config: Config, pad: int, report: Progress) -> list[Scored]:
    scored, done = [Scored() for _ in examples], 0
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
        for i, row in enumerate(batch):
            loss = float(_token_losses(out.logits[i : i + 1, :-1], labels[i : i + 1]).sum())
            scored[row] = {"loss": loss, "tokens": int((labels[i] != IGNORED).sum())}
        done += len(batch)
        report(done, len(examples))
    return scored


def _generated(model: nn.Module, tokenizer: Any, rows: Sequence[Row], config: Config, report: Progress) -> dict[int, Scored]:
    """Returns by row what was generated for `task.exact_match_rows` of them, and whether it is right."""
    n = min(config.task.exact_match_rows, len(rows))
    chosen = [i * len(rows) // n for i in range(n)]
    wanted = {i: _wanted(rows[i], config) for i in chosen}
    prompts = {i: prompt_ids(rows[i], tokenizer, config, config.data.max_length) for i in chosen}
    found: dict[int, Scored] = {}
    for batch in _batches([len(prompts[i]) for i in chosen], config.training.per_device_eval_batch_size):
        own = [chosen[i] for i in batch]
        texts = generate(model, tokenizer, [prompts[i] for i in own], config.task.max_new_tokens)
        for i, text in zip(own, texts, strict=True):
            found[i] = {"text": text, **_judged(text, rows[i], wanted[i], config)}
        report(len(found), n)
    if config.task.answer and all(number(answer) is not None for answer in wanted.values()):
        for i, own in found.items():
            own["right_flexible"] = same(last_number(own["text"]), wanted[i])
    return found


def _wanted(row: Row, config: Config) -> str:
    if config.task.program:
        return ""
    response = render(config.task.response, row)
    wanted = last_match(config.task.answer, response)
    if wanted is None:
        raise ConfigError(
            f"task.answer = {config.task.answer!r} matches nothing in the response of a test row: {response[-200:]!r}"
        )
    return wanted


def _judged(text: str, row: Row, wanted: str, config: Config) -> Scored:
    if config.task.program:
        why = failure(render(config.task.program, row | {"candidate": code_of(text)}))
        return {"right": why is None, "got": why or "passed"}
    got = last_match(config.task.answer, text)
    return {"right": same(got, wanted), "got": got, "wanted": wanted}


def number(text: str | None) -> Decimal | None:
    """Returns the number that a text is, without "$", commas and a full stop after it; None where it is none.

    >>> number("$1,024.") == number("1024.0")
    True
    """
    try:
        value = Decimal((text or "").replace(",", "").replace("$", "").strip().rstrip("."))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def same(got: str | None, wanted: str) -> bool:
    """True for the same text, and for the same number however it is written."""
    return got == wanted or (number(got) is not None and number(got) == number(wanted))


def last_number(text: str) -> str | None:
    """Returns the last number in a text, found as lm-eval's "flexible-extract" of GSM8K finds it, but for dots that are none.

    >>> last_number("So 3 times $6 is $18.")
    '$18.'
    """
    found = [match for match in re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text) if number(match) is not None]
    return found[-1] if found else None


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
