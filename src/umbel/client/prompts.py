"""What a model is given of a row: a prompt, the answer to be learned, and their tokens."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from umbel.client.split import Row
from umbel.config import Config, ConfigError, nearest

IGNORED = -100
"""The label of a token that is not learned, as in PyTorch's cross-entropy."""

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Of a row's own options, in their order."""

TEMPLATE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


def columns(template: str) -> list[str]:
    """Returns the columns that a template names.

    >>> columns("Say {text} as {{json}}")
    ['text']
    """
    return [match[1] for match in TEMPLATE.finditer(template) if match[1]]


def render(template: str, row: Mapping[str, Any]) -> str:
    """Puts a row's values in place of `{column}`; `{{` and `}}` are literal braces.

    Only whole column names are looked up (no attributes, indices or formats), and values are not looked at again, so that
    braces in a row's text stay what they are.

    >>> render("Which topic? {text} {{}}", {"text": "a {text} in braces"})
    'Which topic? a {text} in braces {}'

    Raises:
        ConfigError: The row has no such column.
    """

    def value(match: re.Match[str]) -> str:
        if not match[1]:
            return match[0][0]
        if match[1] not in row:
            raise ConfigError(
                f"template {template!r}: no column {match[1]!r}. {nearest(match[1], list(row))}Columns "
                f"found: {', '.join(row)}. Write {{{{ and }}}} for literal braces"
            )
        return string(row[match[1]])

    return TEMPLATE.sub(value, template)


def string(value: Any) -> str:
    """Returns a value as it appears in a text: None is empty, the items of a list are lines."""
    if isinstance(value, list):
        return "\n".join(map(string, value))
    return "" if value is None else str(value)


def options(row: Row, config: Config) -> list[str]:
    """Returns a row's own options (`task.choices`).

    Raises:
        ConfigError: They are not 2 to 26 different texts.
    """
    value = row[config.task.choices]
    found = [string(item) for item in value] if isinstance(value, list) else string(value).split()[-1:]
    if not isinstance(value, list) and found:
        found = found[0].split("/")
    if not 2 <= len(found) <= len(LETTERS) or len(set(found)) < len(found):
        raise ConfigError(
            f"task.choices = {config.task.choices!r}: a row has {string(value)[-80:]!r} there, allowed: a list of 2 to "
            f"{len(LETTERS)} different options, or a text whose last word is such options between slashes"
        )
    return found


def right_letter(row: Row, config: Config) -> str:
    """Returns the letter of the right one of a row's options, "A" for the first.

    A number is the option's place, counted from 0; a text is the option itself, or its letter.

    Raises:
        ConfigError: `data.label` names none of them, or two.
    """
    known, label = options(row, config), row[config.data.label]
    letters = LETTERS[: len(known)]
    if isinstance(label, int) and not isinstance(label, bool):
        named = {label} & set(range(len(known)))
    else:
        named = {i for i, option in enumerate(known) if option == string(label)} | {
            i for i, letter in enumerate(letters) if letter == label
        }
    if len(named) != 1:
        raise ConfigError(
            f"data.label = {config.data.label!r}: a row says {label!r}, which names {'two' if named else 'none'} of its "
            f"options {known}; allowed: an option's text, its letter ({letters[0]} to {letters[-1]}), or its number from 0"
        )
    return letters[named.pop()]


def with_choices(row: Row, config: Config) -> Row:
    """Returns the row with {lettered_choices} for its prompt, where `task.choices` gives it options."""
    if not config.task.choices:
        return row
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options(row, config))]
    return row | {"lettered_choices": "\n".join(lines)}


def option_answers(row: Row, tokenizer: Any, config: Config) -> list[list[int]]:
    """Returns for each of a row's own options the tokens of its answer, with the end of the turn."""
    template, end = config.task.response or "{choice}", end_of_turn(tokenizer)
    given = zip(LETTERS, options(row, config))
    return [
        [*_tokens(render(template, row | {"choice": option, "letter": letter}), tokenizer), end] for letter, option in given
    ]


@dataclass(frozen=True)
class Example:
    """One row as a model takes it.

    Args:
        input_ids: Tokens, at most `data.max_length`.
        labels: The index of the label (classification), or per token the token itself where it is part of the response and
            −100 elsewhere.
    """

    input_ids: list[int]
    labels: list[int] | int

    @property
    def prompt_length(self) -> int:
        """Tokens before the response."""
        assert isinstance(self.labels, list)
        return next(i for i, label in enumerate(self.labels) if label != IGNORED)


def encode(rows: Sequence[Row], tokenizer: Any, config: Config, labels: list[str]) -> list[Example]:
    """Turns rows into tokens.

    Classification: the text with the tokenizer's special tokens, cut at its end. Otherwise prompt, response and the token
    that ends a turn, of which the prompt is not learned. Prompt and response are tokenized apart and joined, so that the
    prompt's tokens are the same whatever the answer is, as they are when an answer is generated; a tokenizer that would
    merge across the joint is thereby kept from it.

    What is too long loses the end of the prompt's longest column value, never of the template, so that the response stays
    whole. All rows of a "choice" leave room for the longest name, or for the longest of the row's own options (whose rows'
    label is the right one's letter, as `load` leaves it). A response longer than half of `max_length` is itself cut
    at its end (and then does not end the turn), because a response without its question teaches nothing.

    Args:
        rows: Rows with the columns that the task names.
        tokenizer: A Hugging Face tokenizer; its chat template is used where it has one, else prompt and response are
            separated by a line break.
        config: Its `data` and `task`.
        labels: All labels, in the order of the classification head.

    Raises:
        ConfigError: `max_length` leaves no room for any text, or a template names a missing column.
    """
    task, data = config.task, config.data
    if task.kind == "classification":
        index = {label: i for i, label in enumerate(labels)}
        texts = [string(row[data.text]) for row in rows]
        ids = tokenizer(texts, truncation=True, max_length=data.max_length)["input_ids"] if texts else []
        return [Example(list(tokens), index[row[data.label]]) for tokens, row in zip(ids, rows, strict=True)]
    if task.choices:
        return [_own_choice(row, tokenizer, config) for row in rows]
    if task.kind == "choice":
        answers = dict(zip(labels, label_answers(labels, tokenizer, config), strict=True))
        room = data.max_length - max(map(len, answers.values()))
        return [_example(prompt_ids(row, tokenizer, config, room), answers[row[data.label]]) for row in rows]
    end, result = end_of_turn(tokenizer), list[Example]()
    for row in rows:
        response = [*_tokens(render(task.response, row), tokenizer), end]
        prompt = prompt_ids(row, tokenizer, config, max(data.max_length - len(response), data.max_length // 2))
        result.append(_example(prompt, response[: data.max_length - len(prompt)]))
    return result


def _own_choice(row: Row, tokenizer: Any, config: Config) -> Example:
    answers = option_answers(row, tokenizer, config)
    prompt = prompt_ids(row, tokenizer, config, config.data.max_length - max(map(len, answers)))
    return _example(prompt, answers[LETTERS.index(row[config.data.label])])


def _example(prompt: list[int], response: list[int]) -> Example:
    return Example(prompt + response, [IGNORED] * len(prompt) + response)


def label_answers(labels: list[str], tokenizer: Any, config: Config) -> list[list[int]]:
    """Returns for each label the tokens of its name as an answer, with the end of the turn (choice).

    Raises:
        ConfigError: Two labels have one name, or `task.label_names` names what is no label.
    """
    given = config.task.label_names
    strange = sorted(set(given) - set(labels))
    # Where data.labels keeps only some, names of the others do no harm.
    if strange and not config.data.labels:
        raise ConfigError(
            f"task.label_names: {strange[0]!r} is no label. {nearest(strange[0], labels)}Labels: {', '.join(labels)}"
        )
    names = [given.get(label, label) for label in labels]
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise ConfigError(f"task.label_names: several labels are called {twice[0]!r}; give each a name of its own")
    return [[*_tokens(name, tokenizer), end_of_turn(tokenizer)] for name in names]


def prompt_ids(row: Row, tokenizer: Any, config: Config, room: int) -> list[int]:
    """Returns the tokens of a row's prompt, up to where the answer begins, at most `room` of them.

    Where they are more, the longest column value in the prompt loses its end, again and again until they fit.

    Raises:
        ConfigError: The template alone takes more than `room`.
    """
    template = config.task.prompt
    values = {column: string(value) for column, value in with_choices(row, config).items()}
    ids = _prompt(render(template, values), tokenizer)
    while len(ids) > room:
        longest = max(columns(template), key=lambda column: len(values[column]), default="")
        if not values.get(longest):
            raise ConfigError(
                f"data.max_length: got {config.data.max_length}, but the prompt without any text takes {len(ids)} tokens where "
                f"the answer leaves {room}. Raise data.max_length or shorten task.prompt"
            )
        values[longest] = _head(values[longest], len(ids) - room, tokenizer)
        ids = _prompt(render(template, values), tokenizer)
    return ids


def _head(text: str, excess: int, tokenizer: Any) -> str:
    """Returns the text without its last `excess` tokens; always shorter than it was."""
    if not tokenizer.is_fast:
        n = len(_tokens(text, tokenizer))
        return text[: min(len(text) - 1, len(text) * max(n - excess, 0) // max(n, 1))].rstrip()
    starts = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    # Cut where the first dropped token begins: that also drops a character of which it is only a part.
    return text[: starts[-excess][0]].rstrip() if excess < len(starts) else ""


def _prompt(content: str, tokenizer: Any) -> list[int]:
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": content}]
        return _tokens(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False), tokenizer)
    ids = list(tokenizer(content + "\n")["input_ids"])
    # Some tokenizers end every text; here the text goes on.
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _tokens(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_of_turn(tokenizer: Any) -> int:
    """Returns the token that ends an answer: the first special one that the chat template writes after it, else eos.

    Raises:
        ConfigError: There is neither.
    """
    if tokenizer.chat_template:
        answer = "umbelliferous"
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)[2]
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
        for token in _tokens(after, tokenizer):
            if token in special:
                return token
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-text token, so a model could not learn to stop. Set its eos_token")
    return tokenizer.eos_token_id


def pad_id(tokenizer: Any) -> int:
    """Returns the token to pad with; it is masked everywhere, so that any will do."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def collate(batch: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Makes one batch of examples, padded on the right.

    Returns:
        "input_ids" and "attention_mask" of shape batch × longest, and "labels": batch label indices, or batch × longest
        tokens with −100 where nothing is learned.
    """
    longest = max(len(example.input_ids) for example in batch)
    ids = torch.full((len(batch), longest), pad_id, dtype=torch.long)
    mask = torch.zeros((len(batch), longest), dtype=torch.long)
    labels = torch.full((len(batch), longest), IGNORED, dtype=torch.long)
    for i, example in enumerate(batch):
        n = len(example.input_ids)
        ids[i, :n] = torch.tensor(example.input_ids)
        mask[i, :n] = 1
        if isinstance(example.labels, list):
            labels[i, :n] = torch.tensor(example.labels)
    if all(isinstance(example.labels, int) for example in batch):
        labels = torch.tensor([example.labels for example in batch])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
