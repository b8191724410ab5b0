"""Configuration: every mistake is an error that says where, got and allowed; what is resolved makes itself again."""

import copy
import re
import tomllib

import pytest
import tomli_w

from umbel import method as methods
from umbel.config import Config, ConfigError, Data, MethodChoice, Task, configs, for_task, from_table, override, read, to_table
from umbel.testing import disclosures

MINIMAL = {
    "model": {"name": "some-model"},
    "data": {"train": "train.jsonl"},
    "split": {"clients": 3},
    "lora": {"target_modules": ["q_proj"]},
}


def table(assignments=(), **changes):
    """The smallest configuration that can be run, with some keys set as `--set` does."""
    result = {**copy.deepcopy(MINIMAL), **changes}
    for assignment in assignments:
        result = override(result, assignment)
    return result


def only(given):
    (config,) = configs(given).values()
    return config


def refused(given):
    with pytest.raises(ConfigError) as caught:
        configs(given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reading


def test_training_rows_are_nobodys_public_rows():
    table = {"model": {"name": "m"}, "lora": {"target_modules": ["q"]}, "split": {"kind": "files"}}
    with pytest.raises(ConfigError, match="these are training rows"):
        from_table({**table, "data": {"train": ["a.jsonl", "b.jsonl"], "public": "b.jsonl"}})


def test_what_is_not_given_has_its_default():
    config = only(table())
    assert config.method == MethodChoice("fedit", {})
    assert (config.rounds, config.seed, config.lora.r, config.training.learning_rate) == (3, 0, 8, 1e-3)


def test_what_is_given_is_taken():
    config = only(
        table(
            method={"name": "florist", "energy": 0.8, "adopt": "merge"},
            lora={"target_modules": ["q", "v"], "r": 4, "rank_pattern": {"0.q": 2}, "alpha_pattern": {"0.q": 3}},
            data={"train": ["a.csv", "b.csv"], "labels": ["x"]},
            rounds=7,
        )
    )
    assert config.method == MethodChoice("florist", {"energy": 0.8, "adopt": "merge"})
    assert config.lora.rank_pattern == {"0.q": 2}
    assert config.lora.alpha_pattern == {"0.q": 3}
    assert config.data.train == ["a.csv", "b.csv"]
    assert config.rounds == 7


def test_a_whole_number_will_do_where_a_fraction_is_wanted():
    config = only(table(["training.learning_rate=1", "split.alpha=2"]))
    assert config.training.learning_rate == 1.0
    assert type(config.training.learning_rate) is type(config.split.alpha) is float


@pytest.mark.parametrize(
    ("given", "where", "near", "allowed"),
    [
        ({"round": 3}, "'round'", "'rounds'", "seed, rounds"),
        ({"modle": {"name": "x"}}, "'modle'", "'model'", "method, model, data"),
        ({"lora": {"rank_patern": {}, "target_modules": ["q"]}}, "'lora.rank_patern'", "'rank_pattern'", "r, rank_by"),
        ({"training": {"lr": 1.0}}, "'training.lr'", None, "learning_rate"),
        ({"training": {"learning_rte": 1.0}}, "'training.learning_rte'", "'learning_rate'", "learning_rate"),
        ({"training": {"batch_size": 4}}, "'training.batch_size'", "batch_size'", "per_device_train_batch_size"),
    ],
)
def test_an_unknown_key_names_the_nearest_and_the_allowed(given, where, near, allowed):
    message = refused(table(**given))
    assert f"unknown key {where}" in message
    assert near is None or near in message.partition("Did you mean")[2]
    assert allowed in message.partition("Allowed here: ")[2]


@pytest.mark.parametrize(
    ("assignment", "got", "allowed"),
    [
        ("rounds=2.5", "2.5", "int"),
        ("rounds=true", "True", "int"),
        ("rounds='3'", "'3'", "int"),
        ("training.learning_rate='high'", "'high'", "float"),
        ("training.learning_rate=false", "False", "float"),
        ("training.learning_rate=nan", "nan", "float"),
        ("training.learning_rate=inf", "inf", "float"),
        ("training.bf16=1", "1", "bool"),
        ("training.optim='adam'", "'adam'", "one of 'adamw_torch', 'sgd'"),
        ("wire.dtype='float16'", "'float16'", "one of 'float32', 'bfloat16', 'int8'"),
        ("lora.target_modules='q_proj'", "'q_proj'", "list[str]"),
        ("lora.target_modules=[1]", "[1]", "list[str]"),
        ("lora.rank_pattern={q = 1.5}", "{'q': 1.5}", "dict[str, int]"),
        ("lora.rank_pattern=[4]", "[4]", "dict[str, int]"),
        ("data.train=3", "3", "str | list[str]"),
        ("data.train=['a', 3]", "['a', 3]", "str | list[str]"),
        ("model.name=3", "3", "str"),
    ],
)
def test_a_value_of_another_type_says_where_got_and_allowed(assignment, got, allowed):
    message = refused(table([assignment]))
    assert message == f"'{assignment.partition('=')[0]}': got {got}, allowed: {allowed}"


@pytest.mark.parametrize("section", ["model", "lora", "training"])
@pytest.mark.parametrize("value", [5, "text", [1], [{"r": 8}]])
def test_a_section_that_is_no_table_says_so(section, value):
    assert refused(table(**{section: value})).startswith(f"'{section}' is a table ([{section}]), got {value!r}")


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("rounds", [0, -1], [1]),
        ("seed", [-1, 2**63], [0, 2**63 - 1]),
        ("data.max_length", [0], [1]),
        ("data.max_train_rows", [-1], [0]),
        ("data.validation", [-0.1, 1.0], [0.0, 0.5]),
        ("task.max_new_tokens", [0], [1]),
        ("split.clients", [-1, 0], [1]),
        ("split.alpha", [0, -1.0], [0.01]),
        ("split.shards_per_client", [0], [1]),
        ("lora.r", [0, -8], [1]),
        ("lora.lora_alpha", [0, -1], [0.5]),
        ("lora.lora_dropout", [-0.1, 1.0], [0.0, 0.9]),
        ("lora.rank_pattern", ["{q = 0}"], ["{q = 1}"]),
        ("lora.alpha_pattern", ["{q = 0}"], ["{q = 0.5}"]),
        ("training.learning_rate", [-1e-3], [0.0]),
        ("training.head_learning_rate", [-1e-3], [0.0]),
        ("training.per_device_train_batch_size", [0], [1]),
        ("training.per_device_eval_batch_size", [0], [1]),
        ("training.gradient_accumulation_steps", [0], [1]),
        ("training.warmup_ratio", [-0.1, 1.5], [0.0, 1.0]),
        ("training.weight_decay", [-0.1], [0.0]),
        ("training.max_grad_norm", [-1.0], [0.0]),
        ("server.clients_per_round", [-1], [0]),
        ("server.min_clients", [-1, 4], [0, 1, 3]),
        ("server.round_deadline", [0, -1.0], [0.5, 86400]),
    ],
)
def test_a_value_out_of_range_says_where_got_and_allowed(key, wrong, right):
    for value in right:
        configs(table([f"{key}={value}"]))
    for value in wrong:
        message = refused(table([f"{key}={value}"]))
        assert message.startswith(f"{key}: got ")
        assert str(value).strip("{}q= ") in message
        assert "allowed: " in message


@pytest.mark.parametrize("missing", ["model.name", "data.train", "lora.target_modules"])
def test_a_key_that_every_run_needs_is_asked_for(missing):
    section, _, key = missing.partition(".")
    given = table()
    del given[section][key]
    assert refused(given).startswith(f"{missing} is missing")


INSTRUCTION = ["task.kind=instruction", "task.response={reply}"]


@pytest.mark.parametrize(
    ("assignments", "says"),
    [
        (["training.max_steps=0", "training.num_train_epochs=0"], "training: give max_steps or num_train_epochs"),
        (["split.kind=by"], "split.column is missing"),
        (["task.kind=instruction"], "task.response is missing"),
        (["task.kind=choice", "model.pooling=mean"], "model.pooling = 'mean' is for task.kind = 'classification'"),
        (["task.choices=options"], "task.choices = 'options' is for task.kind = 'choice' (got 'classification')"),
        (["task.kind=choice", "task.choices=x", "data.labels=['a']"], "task.choices = 'x' is for task.kind = 'choice'"),
        ([*INSTRUCTION, "task.answer=x"], "task.answer = 'x', task.program = '' and task.exact_match_rows = 0: give one"),
        ([*INSTRUCTION, "task.exact_match_rows=3"], "task.answer = '', task.program = '' and task.exact_match_rows = 3"),
        ([*INSTRUCTION, "task.program=x", "task.exact_match_rows=3"], "task.program runs code that a model wrote"),
        (
            [*INSTRUCTION, "task.program=x", "task.answer=x", "task.exact_match_rows=3", "task.allow_code_execution=true"],
            "task.answer and task.program: give one of the two",
        ),
        (
            ["server.clients_per_round=2", "server.min_clients=3"],
            "server.min_clients: got 3, allowed: at most the clients of a",
        ),
        (["split.clients=0", "split.kind=dirichlet"], "split.clients: got 0, allowed: 1 or more for split.kind = 'dirichlet'"),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(assignments, says):
    assert refused(table(assignments)).startswith(says)


def test_another_task_takes_the_place_of_the_runs_own():
    run = only(table([*INSTRUCTION, "data.validation=0.5", "training.bf16=true", "lora.r=3"]))
    other = for_task(
        run,
        {
            "data": {"test": "b.jsonl", "max_length": 99},
            "task": {"kind": "choice", "choices": "options"},
            "training": {"per_device_eval_batch_size": 2},
        },
    )
    assert other.data == Data(train=run.data.train, test="b.jsonl", max_length=99)
    assert other.task == Task(kind="choice", choices="options")
    assert (other.training.per_device_eval_batch_size, other.training.bf16, other.lora.r) == (2, True, 3)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"model": {"name": "x"}}, r"'model' is not for scoring a finished run"),
        ({"training": {"max_steps": 1}}, r"'training\.max_steps' is not for scoring a finished run"),
        ({"data": {"tests": "x"}, "task": {"kind": "choice"}}, r"unknown key 'data\.tests'. Did you mean 'test'"),
        ({"task": {}}, r"task\.kind: got 'classification' for a run of kind 'instruction'"),
        (
            {"task": {"kind": "instruction", "response": "x", "program": "x", "exact_match_rows": 1}},
            r"task\.allow_code_execution = true",
        ),
    ],
)
def test_what_cannot_be_another_task_is_refused(other, says):
    with pytest.raises(ConfigError, match=says):
        for_task(only(table(INSTRUCTION)), other)


def test_a_split_by_column_or_files_needs_no_number_of_clients():
    assert only(table(["split.clients=0", "split.kind=files"])).split.clients == 0
    assert only(table(["split.clients=0", "split.kind=by", "split.column=hospital"])).split.clients == 0


# Methods


def test_an_unknown_method_names_the_nearest_and_all():
    message = refused(table(method={"name": "fedlt"}))
    assert "no method 'fedlt'. Did you mean 'fedit'? Known: " in message
    assert "florist" in message


def test_an_unknown_method_option_names_the_nearest_and_all():
    message = refused(table(method={"name": "florist", "enrgy": 0.9}))
    assert (
        message == "[method]: method 'florist' has no option 'enrgy'. Did you mean 'energy'? Its options: energy, rank, adopt"
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"energy": "high"}, "'method.energy': got 'high', allowed: float | None"),
        ({"energy": True}, "'method.energy': got True, allowed: float | None"),
        ({"rank": 2.5}, "'method.rank': got 2.5, allowed: int | None"),
        ({"adopt": "keep"}, "'method.adopt': got 'keep', allowed: one of 'load', 'merge'"),
        ({"energy": [0.9]}, "'method.energy': got [0.9], allowed: float | None"),
        ({"energy": 1.5}, "[method]: florist: energy: got 1.5, allowed: 0 < energy ≤ 1 (or give rank)"),
        ({"collect": 1}, "[method]: method 'florist' has no option 'collect'. Its options: energy, rank, adopt"),
    ],
)
def test_a_method_option_that_does_not_fit_says_got_and_allowed(options, says):
    message = refused(table(method={"name": "florist", **options}))
    assert message == says


@pytest.mark.parametrize("name", [None, "", 5, ["fedit"], "../fedit", ".fedit", "fed it"])
def test_a_method_without_a_name_is_told_the_names(name):
    method = {"energy": 0.9} if name is None else {"name": name}
    assert "[method] has no name" in refused(table(method=method))
    assert "Known: best_rank, exact, fed_sb" in refused(table(method=method))


@pytest.mark.parametrize("method", ["fedit", 5, [], ["fedit"], [5]])
def test_a_method_that_is_no_table_says_so(method):
    assert refused(table(method=method)).startswith("'method' is a table ([method], or [[method]] for several), got ")


def test_a_module_that_cannot_be_imported_is_no_traceback(tmp_path, monkeypatch):
    folder = tmp_path / "strange_methods"
    folder.mkdir()
    (folder / "needs_more.py").write_text("import a_package_that_is_not_here\n")
    (folder / "holds_none.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "No module named 'a_package_that_is_not_here'" in refused(table(method={"name": "strange_methods.needs_more"}))
    assert "defines no Method class" in refused(table(method={"name": "strange_methods.holds_none"}))


# Several methods


def test_several_methods_share_all_but_what_they_set_themselves():
    given = table(
        method=[
            {"name": "fedit"},
            {"name": "fed_sb", "lora": {"r": 64, "lora_alpha": 64}, "training": {"learning_rate": 0.5}},
            {"name": "florist", "energy": 0.8},
            {"name": "florist", "label": "florist, merged", "adopt": "merge", "wire": {"dtype": "bfloat16"}},
        ],
        rounds=5,
    )
    given["training"] = {"max_steps": 9}
    before = copy.deepcopy(given)
    result = configs(given)
    assert given == before
    assert list(result) == ["fedit", "fed_sb", "florist", "florist, merged"]
    assert [config.lora.r for config in result.values()] == [8, 64, 8, 8]
    assert [config.training.learning_rate for config in result.values()] == [1e-3, 0.5, 1e-3, 1e-3]
    assert [config.wire.dtype for config in result.values()] == ["float32"] * 3 + ["bfloat16"]
    assert all(config.lora.target_modules == ["q_proj"] for config in result.values())
    assert all(config.training.max_steps == 9 and config.rounds == 5 for config in result.values())
    assert result["florist, merged"].method == MethodChoice("florist", {"adopt": "merge"})


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ([{"name": "fedit"}, {"name": "fedit"}], "the label 'fedit' comes twice"),
        ([{"name": "fedit"}, {"name": "florist", "label": "fedit"}], "the label 'fedit' comes twice"),
        ([{"name": "fedit", "label": "central"}], "is a baseline's"),
        ([{"name": "fedit", "label": "local"}], "is a baseline's"),
        ([{"name": "fedit"}, {"name": "florist", "lora": {"rr": 4}}], "unknown key 'lora.rr'"),
        ([{"name": "fedit"}, {"name": "florist", "lora": {"r": 0}}], "lora.r: got 0"),
        ([{"name": "fedit", "rounds": 4}], "method 'fedit' has no option 'rounds'"),
        ([{"name": "fedit", "method": {"name": "florist"}}], "method 'fedit' has no option 'method'"),
        ([{"name": "fedit", "lora": 4}], "method 'fedit' has no option 'lora'"),
    ],
)
def test_methods_that_do_not_go_together_are_refused(methods, says):
    assert says in refused(table(method=methods))


@pytest.mark.parametrize("label", ["", 5, "..", ".hidden", "../elsewhere", "/elsewhere", "a/b", "a\\b", " a", "a\nb"])
def test_a_label_that_could_not_be_a_folder_inside_the_jobs_is_refused(label):
    assert "it names a folder" in refused(table(method=[{"name": "fedit", "label": label}, {"name": "florist"}]))


def test_a_shared_section_that_is_no_table_is_refused_where_a_method_overrides_it():
    given = table(lora=5, method=[{"name": "fedit", "lora": {"r": 4}}])
    assert refused(given).startswith("'lora' is a table ([lora]), got 5")


# --set


def test_set_overrides_what_the_file_says_and_leaves_the_table_alone():
    given = table(method={"name": "florist", "energy": 0.5}, rounds=2)
    before = copy.deepcopy(given)
    changed = given
    for assignment in ["method.energy=0.9", "rounds=4", "lora.rank_pattern.q=2", "model.name=other", "data.train=['a', 'b']"]:
        changed = override(changed, assignment)
    assert given == before
    config = only(changed)
    assert config.method.options == {"energy": 0.9}
    assert (config.rounds, config.model.name, config.data.train) == (4, "other", ["a", "b"])
    assert config.lora.rank_pattern == {"q": 2}
    assert config.lora.target_modules == ["q_proj"]


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("rounds", "--set takes key=value, got 'rounds'"),
        ("rounds.x=1", "--set rounds.x: 'rounds' is not a table"),
        ("method.energy=0.9", "[[method]] holds several; set it in the file"),
    ],
)
def test_an_assignment_that_has_no_place_is_refused(assignment, says):
    with pytest.raises(ConfigError) as caught:
        override(table(rounds=3, method=[{"name": "florist"}]), assignment)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("lora.rr=4", "unknown key 'lora.rr'"),
        ("=4", "unknown key ''"),
        ("method=florist", "'method' is a table"),
        ("rounds=", "'rounds': got ''"),
        ("rounds=08", "'rounds': got '08'"),
    ],
)
def test_an_assignment_of_something_unknown_is_refused_like_the_files_own(assignment, says):
    assert says in refused(table([assignment]))


# Files


def test_a_file_is_read_with_its_assignments(tmp_path):
    (tmp_path / "run.toml").write_text(tomli_w.dumps(table()), encoding="utf-8")
    given = read(tmp_path / "run.toml", ["rounds=4", "rounds=5", "method.name=florist"])
    assert only(given).rounds == 5
    assert only(given).method.name == "florist"


@pytest.mark.parametrize("content", [b"rounds = ", b"rounds = 3\nrounds = 4\n", b"\xff\xfe", b"[model"])
def test_a_file_that_is_not_toml_names_itself(tmp_path, content):
    (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.toml: not TOML: "):
        read(tmp_path / "run.toml")


def test_a_file_that_is_not_there_names_itself(tmp_path):
    with pytest.raises(ConfigError, match=r"no configuration file '.*run\.toml'"):
        read(tmp_path / "run.toml")


@pytest.mark.parametrize(
    "given",
    [
        table(),
        table(method={"name": "florist", "energy": 0.75, "adopt": "merge"}),
        table(method={"name": "fed_sb", "eta": 8e-06}, seed=2**63 - 1),
        table(
            data={"train": ["Zürich.csv", 'quote".csv'], "test": ["a", "b"], "labels": ["∂", "x\ny"], "validation": 0.1},
            split={"kind": "files"},
            lora={"target_modules": ["q"], "rank_pattern": {"layer.0.q": 4}, "alpha_pattern": {"layer.0.q": 1e-05}},
            task={"kind": "choice", "prompt": "Which?\n{text}", "label_names": {"rec.autos": "cars"}},
            training={"learning_rate": 3e-05, "max_steps": 8},
        ),
    ],
)
def test_the_resolved_configuration_makes_itself_again_also_through_a_file(given):
    config = only(given)
    assert isinstance(config, Config)
    resolved = to_table(config)
    assert from_table(resolved) == config
    assert from_table(tomllib.loads(tomli_w.dumps(resolved))) == config
    assert only(tomllib.loads(tomli_w.dumps(resolved))) == config
    assert to_table(from_table(resolved)) == resolved


def test_each_of_several_methods_resolves_to_a_run_of_its_own():
    methods = [{"name": "fedit"}, {"name": "fed_sb", "lora": {"r": 64}}]
    for config in configs(table(method=methods)).values():
        assert from_table(tomllib.loads(tomli_w.dumps(to_table(config)))) == config


PRIVATE = {"target_epsilon": 3.0, "target_delta": 0.1}
PUBLIC = {"train": "train.jsonl", "public": "public.jsonl"}


@pytest.mark.parametrize("name", methods.names())
def test_a_method_is_masked_or_noised_at_the_server_where_its_phases_allow_it_and_refused_with_the_reason(name):
    told = disclosures(name)
    for privacy, allowed, reason in (
        ({"secure_aggregation": True}, told["maskable"], told["why_not"]),
        ({"unit": "client", **PRIVATE}, "client" in told["units"], told["why_not_client"]),
    ):
        given = table(method={"name": name}, privacy=privacy, data=PUBLIC)
        if allowed:
            assert only(given).privacy.target_epsilon == privacy.get("target_epsilon", 0)
        else:
            with pytest.raises(ConfigError, match=re.escape(f"{name} {reason}; `umbel methods --privacy`")):
                only(given)


def test_a_method_of_somebodys_own_is_refused_by_the_same_reasons(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "umbel_tests"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a_private_thing.py").write_text(
        "from umbel.method import Download, Each, Method\n\n"
        "class APrivateThing(Method):\n    collect = Each\n\n"
        "    def combine(self, got, held):\n        return Download(factors=got[0][0])\n"
    )
    name = "umbel_tests.a_private_thing"
    for privacy in ({"secure_aggregation": True}, {"unit": "client", **PRIVATE}):
        with pytest.raises(ConfigError, match=r"look at every client's own A and B \(Each\)"):
            only(table(method={"name": name}, privacy=privacy))


def test_client_level_privacy_refuses_a_start_on_private_rows_and_a_delta_above_one_over_the_clients():
    noised = {"unit": "client", **PRIVATE}
    with pytest.raises(ConfigError, match=r"fed_sb measures a gradient \(G\) on every client's rows before any noise"):
        only(table(method={"name": "fed_sb"}, privacy=noised))
    assert only(table(method={"name": "fed_sb"}, privacy=noised, data=PUBLIC))
    assert only(table(method={"name": "fed_sb", "init": "random"}, privacy=noised))
    with pytest.raises(ConfigError, match=r"privacy\.target_delta: got 0\.3, allowed: at most 1 / 4, the number of clients"):
        only(table(privacy={**noised, "target_delta": 0.3}, split={"clients": 4}))
