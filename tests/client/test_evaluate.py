"""Scores against the same numbers computed row by row, without batches, padding or caches."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import tiny
from umbel.client import evaluate as evaluation
from umbel.client.evaluate import answer_scores, evaluate, generate, last_match, metric
from umbel.client.prompts import IGNORED, collate, encode, end_of_turn, label_answers, prompt_ids
from umbel.config import Config, ConfigError, Data, Task, Training

LABELS = sorted(tiny.TOPICS)
ROWS = tiny.texts(25, seed=5)
TASKS = {
    "classification": Task(),
    # "sea" is the beginning of "sea wave sail": names of different length compete.
    "choice": Task(kind="choice", prompt="it was {text} on that", label_names={"sky": "sea wave sail", "soil": "soil"}),
    "instruction": Task(kind="instruction", prompt="{text}", response="{reply}"),
}


def configure(kind, size=4, **training):
    return Config(
        task=TASKS[kind],
        data=Data(max_length=32),
        training=Training(per_device_eval_batch_size=size, **training),
    )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tiny.bert(tmp_path_factory.mktemp("bert"))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    torch.nn.init.normal_(model.classifier.weight, std=3.0)  # so that rows differ visibly
    return model, AutoTokenizer.from_pretrained(folder)


def causal(kind, vocabulary):
    """Returns a small causal model: rotary, learned positions, or a window shorter than the rows."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "initializer_range": 0.3,
    }
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**shape, sliding_window=5)).eval()
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny.llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def llama(tokenizer):
    return causal("llama", len(tokenizer))


@pytest.fixture(scope="module")
def taught(tokenizer):
    """A model that has learned to reply "it was <topic>" and to stop."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tokenizer.name_or_path).train()
    examples = encode(tiny.texts(128, seed=9), tokenizer, configure("instruction"), [])
    batch = collate(examples, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def log_likelihood(model, prompt, answer):
    """log p(answer | prompt) by one plain forward of both."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    steps = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return sum(float(steps[i, token]) for i, token in enumerate(answer))


def test_classification_equals_one_row_at_a_time(encoder):
    model, tokenizer = encoder
    scores = evaluate(model, tokenizer, ROWS, LABELS, configure("classification"))
    model.eval()
    right, loss = 0, 0.0
    for row in ROWS:
        truth = torch.tensor([LABELS.index(row["label"])])
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits
        right += int(logits.argmax() == truth)
        loss += float(functional.cross_entropy(logits, truth))
    assert scores["accuracy"] == right / 25
    assert 0 < right < 25
    assert scores["loss"] == pytest.approx(loss / 25, rel=1e-5)
    assert scores["rows"] == 25


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_answers_with_a_repeated_cache_score_as_plain_forwards_of_prompt_and_answer(kind, tokenizer):
    model = causal(kind, len(tokenizer))
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 20, (n,), generator=draw).tolist() for n in (9, 3, 12)]
    answers = [[4, 3], [4, 5, 6, 3], [7], [5, 8, 3]]
    with torch.inference_mode():
        scores = answer_scores(model, prompts, [answers] * 3, pad=17)
    naive = torch.tensor([[log_likelihood(model, prompt, answer) for answer in answers] for prompt in prompts])
    assert scores.shape == (3, 4)
    assert torch.allclose(scores, naive, atol=1e-4), (scores - naive).abs().max()
    assert naive.std() > 0.1


def test_answers_of_one_token_need_no_second_pass(llama):
    with torch.inference_mode():
        scores = answer_scores(llama, [[5, 6], [7]], [[[4], [9]]] * 2, pad=0)
    naive = torch.tensor([[log_likelihood(llama, prompt, answer) for answer in ([4], [9])] for prompt in ([5, 6], [7])])
    assert torch.allclose(scores, naive, atol=1e-4)


def test_choice_takes_the_likeliest_whole_answer(llama, tokenizer):
    config = configure("choice")
    scores = evaluate(llama, tokenizer, ROWS, LABELS, config)
    answers = label_answers(LABELS, tokenizer, config)
    right, loss, tokens = 0, 0.0, 0
    for row in ROWS:
        prompt = prompt_ids(row, tokenizer, config, 32 - max(map(len, answers)))
        likelihoods = [log_likelihood(llama, prompt, answer) for answer in answers]
        truth = LABELS.index(row["label"])
        right += max(range(3), key=likelihoods.__getitem__) == truth
        loss -= likelihoods[truth]
        tokens += len(answers[truth])
    assert scores == {"accuracy": right / 25, "loss": pytest.approx(loss / tokens, rel=1e-4), "rows": 25}


def test_choice_loss_is_the_training_loss(llama, tokenizer):
    config = configure("choice")
    batch = collate(encode(ROWS, tokenizer, config, LABELS), 0)
    with torch.no_grad():
        expected = float(llama(**batch).loss)
    assert evaluate(llama, tokenizer, ROWS, LABELS, config)["loss"] == pytest.approx(expected, rel=1e-4)


def test_instruction_loss_is_the_mean_over_all_response_tokens(llama, tokenizer):
    rows = [*ROWS, {"text": "ship", "reply": "it was sea on that root and seed"}]
    config = configure("instruction")
    total, tokens = 0.0, 0
    for example in encode(rows, tokenizer, config, []):
        with torch.no_grad():
            loss = llama(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss
        n = sum(label != IGNORED for label in example.labels)
        total, tokens = total + float(loss) * n, tokens + n
    scores = evaluate(llama, tokenizer, rows, [], config)
    assert scores == {"loss": pytest.approx(total / tokens, rel=1e-5), "rows": 26}


@pytest.mark.parametrize("kind", list(TASKS))
def test_the_batch_size_changes_no_score(kind, encoder, llama, tokenizer):
    model, tokens = encoder if kind == "classification" else (llama, tokenizer)
    small, large = (evaluate(model, tokens, ROWS, LABELS, configure(kind, size)) for size in (1, 64))
    assert small == {name: pytest.approx(value, rel=1e-5) for name, value in large.items()}


@pytest.mark.parametrize("kind", list(TASKS))
def test_rows_that_are_encoded_already_score_the_same(kind, encoder, llama, tokenizer):
    model, tokens = encoder if kind == "classification" else (llama, tokenizer)
    config = configure(kind)
    examples = encode(ROWS, tokens, config, LABELS)
    assert evaluate(model, tokens, ROWS, LABELS, config, examples) == evaluate(model, tokens, ROWS, LABELS, config)


def test_train_and_eval_modes_are_as_before_also_after_an_error(encoder):
    model, tokenizer = encoder
    model.train()
    model.classifier.eval()
    evaluate(model, tokenizer, ROWS, LABELS, configure("classification"))
    assert (model.training, model.bert.training, model.classifier.training) == (True, True, False)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, tokenizer, ROWS, LABELS, configure("classification"), progress=lambda done, total: 1 // 0)
    assert (model.training, model.bert.training, model.classifier.training) == (True, True, False)


def test_dropout_is_off_while_scoring(encoder):
    model, tokenizer = encoder
    model.train()
    first, second = (evaluate(model, tokenizer, ROWS, LABELS, configure("classification")) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_decides_on_autocast(encoder, bf16):
    model, tokenizer = encoder
    seen = set()
    hook = model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *args: seen.add(args[-1].dtype))
    evaluate(model, tokenizer, ROWS, LABELS, configure("classification", bf16=bf16))
    hook.remove()
    assert seen == {torch.bfloat16 if bf16 else torch.float32}
    assert not torch.is_autocast_enabled("cpu")


def test_progress_counts_rows(encoder):
    model, tokenizer = encoder
    seen = []
    evaluate(model, tokenizer, ROWS, LABELS, configure("classification", 10), progress=lambda *step: seen.append(step))
    assert seen == [(10, 25), (20, 25), (25, 25)]


def test_no_rows_give_no_metric(llama, tokenizer):
    assert evaluate(llama, tokenizer, [], LABELS, configure("choice")) == {"rows": 0}


def test_generation_in_a_padded_batch_equals_one_greedy_step_after_another(taught, tokenizer):
    config = configure("instruction")
    texts = ("ship wave port", "cloud of the star and the moon", "root seed clay on")
    prompts = [prompt_ids({"text": text}, tokenizer, config, 32) for text in texts]
    stop = end_of_turn(tokenizer)
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and (len(ids) == len(prompt) or ids[-1] != stop):
            with torch.no_grad():
                ids.append(int(taught(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert generate(taught, tokenizer, prompts, 6) == expected
    assert expected == ["it was sea", "it was sky", "it was soil"], "the replies stop by themselves before six tokens"


def test_generation_is_bounded(taught, tokenizer):
    prompts = [prompt_ids({"text": "ship"}, tokenizer, configure("instruction"), 32)]
    assert generate(taught, tokenizer, prompts, 2) == ["it was"]


def test_exact_match_of_a_taught_model_is_high_and_of_an_untaught_one_zero(taught, llama, tokenizer):
    config = configure("instruction")
    config = replace(config, task=replace(config.task, answer=r"was (\w+)", exact_match_rows=10, max_new_tokens=5))
    scores = evaluate(taught, tokenizer, ROWS, [], config)
    assert scores["exact_match"] >= 0.9
    assert (scores["exact_match_rows"], scores["rows"]) == (10, 25)
    assert evaluate(llama, tokenizer, ROWS, [], config)["exact_match"] == 0


def test_exact_match_compares_the_last_numbers_without_commas(llama, tokenizer, monkeypatch):
    rows = [{"text": "ship", "reply": f"on #### {answer}"} for answer in ("1,024", "7", "7", "8")]
    replies = iter(["#### 9 #### 1024", "#### 7 of", "none", "#### 9"])
    monkeypatch.setattr(evaluation, "generate", lambda model, tokenizer, prompts, bound: [next(replies) for _ in prompts])
    config = configure("instruction")
    config = replace(config, task=replace(config.task, answer=r"#### ([\d,]+)", exact_match_rows=4))
    assert evaluate(llama, tokenizer, rows, [], config)["exact_match"] == 0.5


def test_exact_match_rows_are_spread_over_all_rows(llama, tokenizer, monkeypatch):
    rows = [{"text": "ship " * (20 - i), "reply": str(i)} for i in range(20)]
    asked = []
    monkeypatch.setattr(
        evaluation, "generate", lambda model, tokenizer, prompts, bound: [asked.append(len(p)) or "0" for p in prompts]
    )
    config = configure("instruction")
    config = replace(config, task=replace(config.task, answer=r"\d+", exact_match_rows=4))
    assert evaluate(llama, tokenizer, rows, [], config)["exact_match"] == 0.25
    assert [asked[0] - n for n in asked] == [0, 5, 10, 15]


def test_a_pattern_that_no_reference_matches_is_an_error(llama, tokenizer):
    config = configure("instruction")
    config = replace(config, task=replace(config.task, answer=r"#### (\d+)", exact_match_rows=2))
    with pytest.raises(ConfigError, match=r"matches nothing in the response of a test row: 'it was"):
        evaluate(llama, tokenizer, ROWS, [], config)


def test_the_last_match_is_the_group_where_there_is_one():
    assert last_match(r"\d+", "1 and 22") == "22"
    assert last_match(r"is (\d+)", "is 1 and is 22 of 3") == "22"
    assert last_match(r"\d+", "none") is None


def test_the_metric_follows_the_task():
    assert metric(configure("classification")) == metric(configure("choice")) == {"name": "accuracy", "better": "higher"}
    assert metric(configure("instruction")) == {"name": "loss", "better": "lower"}
