"""Prompts and their tokens."""

from copy import deepcopy
from dataclasses import replace

import pytest

import tiny
from umbel.client.prompts import (
    IGNORED,
    Example,
    collate,
    columns,
    encode,
    end_of_turn,
    label_answers,
    option_answers,
    pad_id,
    prompt_ids,
    render,
)
from umbel.config import Config, ConfigError, Data, Task


def test_templates_name_columns_and_nothing_else():
    assert render("{a b} {{a}} {", {"a b": "{a}{{"}) == "{a}{{ {a} {"
    assert render("{x}", {"x": None}) == ""
    assert columns("{a}{b c}{{d}}") == ["a", "b c"]
    for template in ("{text.__class__}", "{text!r}", "{text:>9}", "{text[0]}"):
        with pytest.raises(ConfigError, match=r"no column .*Columns found: text\. Write \{\{ and \}\} for"):
            render(template, {"text": "x"})


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A tokenizer of whole words with a chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny.llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An encoder's tokenizer, [CLS] … [SEP], without a chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny.bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def by_bytes():
    """A tokenizer whose tokens are single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    return fast


CHOICE = Task(kind="choice", prompt="the {text} of", label_names={"x": "moon", "y": "star wing"})
ROW = {"text": "ship wave port", "label": "y"}


def taught(example):
    return [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]


def spelled(tokenizer, ids):
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def encoded(rows, tokenizer, task, labels=("x", "y"), **data):
    return encode(rows, tokenizer, Config(task=task, data=Data(**data)), list(labels))


def test_classification_is_the_text_and_the_labels_index(plain):
    (example,) = encoded([ROW], plain, Task(), max_length=5)
    assert spelled(plain, example.input_ids) == "[CLS] ship wave port [SEP]"
    assert example.labels == 1
    (cut,) = encoded([ROW], plain, Task(), max_length=4)
    assert spelled(plain, cut.input_ids) == "[CLS] ship wave [SEP]"


def test_only_the_answer_and_the_end_of_the_turn_are_learned(chat):
    (example,) = encoded([ROW], chat, CHOICE)
    assert spelled(chat, example.input_ids) == "<user> the ship wave port of [SEP] <assistant> star wing [SEP]"
    assert spelled(chat, taught(example)) == "star wing [SEP]"
    assert example.prompt_length == 8


def test_prompt_tokens_are_the_same_whatever_the_answer_is(chat, by_bytes, plain):
    for tokenizer in (chat, by_bytes, plain):
        rows = [{**ROW, "label": label} for label in "xy"]
        config = Config(task=CHOICE)
        room = config.data.max_length - max(map(len, label_answers(["x", "y"], tokenizer, config)))
        alone = prompt_ids(ROW, tokenizer, config, room)
        for example in encode(rows, tokenizer, config, ["x", "y"]):
            assert example.input_ids[: example.prompt_length] == alone


def test_without_a_chat_template_a_line_break_stands_between(by_bytes, plain):
    bare = deepcopy(by_bytes)
    bare.chat_template = None
    (example,) = encoded([ROW], bare, CHOICE)
    assert bare.decode(example.input_ids) == "the ship wave port of\nstar wing<end>"
    assert bare.decode(taught(example)) == "star wing<end>"
    (example,) = encoded([ROW], plain, CHOICE)
    assert spelled(plain, example.input_ids) == "[CLS] the ship wave port of star wing [SEP]", (
        "the prompt must not end the text"
    )


def test_the_end_of_the_turn_is_what_the_template_writes_after_an_answer(by_bytes):
    other = deepcopy(by_bytes)
    assert end_of_turn(other) == other.eos_token_id
    other.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    other.chat_template = other.chat_template.replace("<end>", " <turn>")
    assert end_of_turn(other) == other.convert_tokens_to_ids("<turn>") != other.eos_token_id
    other.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert end_of_turn(other) == other.eos_token_id


def test_a_long_text_is_cut_and_template_and_answer_stay_whole(chat):
    long = {"text": "ship " * 50, "label": "y"}
    (example,) = encoded([long], chat, CHOICE, max_length=12)
    assert spelled(chat, example.input_ids) == "<user> the ship ship ship ship of [SEP] <assistant> star wing [SEP]"


def test_every_label_leaves_room_for_the_longest_name(chat):
    long = [{"text": "ship " * 50, "label": label} for label in "xy"]
    x, y = encoded(long, chat, CHOICE, max_length=12)
    assert x.input_ids[: x.prompt_length] == y.input_ids[: y.prompt_length]
    assert (len(x.input_ids), len(y.input_ids)) == (11, 12)


def test_a_character_of_several_tokens_is_not_cut_in_two(by_bytes):
    for length in range(30, 60):
        (example,) = encoded([{"text": "é🌿" * 20, "label": "x"}], by_bytes, CHOICE, max_length=length)
        text = by_bytes.decode(example.input_ids)
        assert "\ufffd" not in text
        assert text.startswith("u:the ")
        assert text.endswith(" of<end>\na:moon<end>")
        assert length - 4 - 6 <= len(example.input_ids) <= length, "no more than one character less than fits"


def test_the_longest_of_several_texts_is_cut_first(chat):
    task = Task(kind="instruction", prompt="{a} of {b}", response="{c}")
    row = {"a": "ship wave", "b": "moon " * 40, "c": "star"}
    (example,) = encoded([row], chat, task, labels=(), max_length=12)
    assert spelled(chat, example.input_ids) == "<user> ship wave of moon moon moon moon [SEP] <assistant> star [SEP]"


def test_a_tokenizer_without_offsets_cuts_too(chat):
    class Slow:
        is_fast = False

        def __getattr__(self, name):
            return getattr(chat, name)

        def __call__(self, *args, **kwargs):
            assert "return_offsets_mapping" not in kwargs
            return chat(*args, **kwargs)

    (example,) = encoded([{"text": "ship " * 50, "label": "y"}], Slow(), CHOICE, max_length=12)
    assert 8 < len(example.input_ids) <= 12
    assert spelled(chat, example.input_ids).endswith("ship of [SEP] <assistant> star wing [SEP]")


def test_a_template_that_leaves_no_room_is_an_error(chat):
    with pytest.raises(ConfigError, match=r"the prompt without any text takes 5 tokens where the answer leaves 2"):
        encoded([ROW], chat, CHOICE, max_length=5)


def test_a_response_is_learned_with_its_end(chat):
    task = Task(kind="instruction", prompt="{q}", response="it was {a}")
    (example,) = encoded([{"q": "ship", "a": "sea"}], chat, task, labels=())
    assert spelled(chat, taught(example)) == "it was sea [SEP]"


def test_a_response_longer_than_half_is_cut_at_its_end_and_does_not_end_the_turn(chat):
    task = Task(kind="instruction", prompt="{q}", response="{a}")
    row = {"q": "ship " * 9, "a": "moon " * 30}
    (example,) = encoded([row], chat, task, labels=(), max_length=12)
    assert spelled(chat, example.input_ids) == "<user> ship ship ship [SEP] <assistant> moon moon moon moon moon moon"


def test_label_names_are_checked(chat):
    with pytest.raises(ConfigError, match=r"'xx' is no label. Did you mean 'x'\?"):
        encoded([ROW], chat, replace(CHOICE, label_names={"xx": "moon"}))
    with pytest.raises(ConfigError, match=r"several labels are called 'moon'"):
        encoded([ROW], chat, replace(CHOICE, label_names={"x": "moon", "y": "moon"}))


def test_names_of_labels_that_are_not_kept_do_no_harm(chat):
    config = Config(task=CHOICE, data=Data(labels=["x"]))
    assert len(label_answers(["x"], chat, config)) == 1


def test_batches_are_padded_on_the_right_and_padding_is_not_learned():
    batch = collate([Example([5, 6, 7], [IGNORED, 6, 7]), Example([8], [8])], pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


def test_batches_of_labelled_texts_hold_one_index_each():
    batch = collate([Example([5, 6], 2), Example([8], 0)], pad_id=9)
    assert batch["labels"].tolist() == [2, 0]


def test_a_tokenizer_without_a_padding_token_pads_with_its_end(by_bytes, plain):
    assert pad_id(by_bytes) == by_bytes.eos_token_id
    assert pad_id(plain) == plain.pad_token_id


def test_the_items_of_a_list_are_lines():
    assert render("{tests}|{none}", {"tests": ["assert x", 2, None], "none": []}) == "assert x\n2\n|"


OWN = Task(kind="choice", prompt="the {text} {lettered_choices} of", choices="options", response="it was {choice}")


def test_of_a_rows_own_options_the_right_one_is_learned(chat):
    config = Config(task=OWN, data=Data(max_length=64))
    rows = [
        {"text": "ship", "options": ["sea", "sky on the star", "soil"], "label": "C"},
        {"text": "moon", "options": "and sky/sea", "label": "A"},
    ]
    examples = encode(rows, chat, config, [])
    learned = [chat.decode([x for x in example.labels if x != IGNORED]) for example in examples]
    assert learned == ["it was soil [SEP]", "it was sky [SEP]"]
    prompts = [chat.decode(example.input_ids[: example.prompt_length]) for example in examples]
    # [UNK] are the letters, which the tiny vocabulary lacks.
    assert prompts[0] == "<user> the ship [UNK] sea [UNK] sky on the star [UNK] soil of [SEP] <assistant>"
    assert [chat.decode(answer) for answer in option_answers(rows[1], chat, config)] == ["it was sky [SEP]", "it was sea [SEP]"]


def test_a_row_leaves_room_for_the_longest_of_its_own_options(chat):
    config = Config(task=replace(OWN, prompt="{text}", response=""), data=Data(max_length=12))
    short = {"text": "ship " * 30, "options": ["sea", "sky"], "label": "A"}
    long = {"text": "ship " * 30, "options": ["sea", "sky on the star on the star"], "label": "A"}
    lengths = [example.prompt_length for example in encode([short, long], chat, config, [])]
    assert lengths == [12 - 2, 12 - 8]
