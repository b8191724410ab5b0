"""as_strategy: the right mean of PEFT adapters in Flower's own words, bad replies refused one by one."""

import io
import logging
import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

import tiny
import umbel
from umbel.engine.flower import as_strategy
from umbel.engine.flower_strategy import AdapterStrategy, usable
from umbel.method import Download, Factors, Mean, Method, MethodError, names
from umbel.safetensors_file import FolderError

LAYERS = {"layer.0.query": (10, 7), "layer.1.dense": (6, 9)}
"""d_out × d_in."""

R, ALPHA = 3, 12
LORA = {"r": R, "lora_alpha": ALPHA}
PREFIX = "base_model.model."
HEAD = f"{PREFIX}classifier.weight"


@pytest.fixture(autouse=True)
def in_a_run(monkeypatch):
    """Flower writes the number of its run on every message."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Nodes(Grid):
    """A grid with nodes 1 … n, which is all that a strategy asks of one."""

    def __init__(self, n: int) -> None:
        self._nodes = list(range(1, n + 1))

    def get_node_ids(self):
        return self._nodes

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def get_nodes(self):
        raise NotImplementedError

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError


def state(seed: int, rank: int = R, head: bool = True) -> dict[str, np.ndarray]:
    """An adapter as PEFT gives it, with numbers of a trained one."""
    draw = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for name, (d_out, d_in) in LAYERS.items():
        found[f"{PREFIX}{name}.lora_A.weight"] = draw.standard_normal((rank, d_in)).astype(np.float32)
        found[f"{PREFIX}{name}.lora_B.weight"] = draw.standard_normal((d_out, rank)).astype(np.float32)
    if head:
        found[HEAD] = draw.standard_normal((4, 5)).astype(np.float32)
    return found


def record(arrays: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({key: Array(x) for key, x in arrays.items()})


def product(arrays: Any, name: str, scale: float) -> np.ndarray:
    """ΔW = s B A, dense in float64."""
    B, A = (np.asarray(arrays[f"{PREFIX}{name}.lora_{factor}.weight"], dtype=np.float64) for factor in "BA")
    return scale * B @ A


def asked(strategy: FedAvg, common: dict[str, np.ndarray], nodes: int, number: int = 1) -> dict[int, Message]:
    messages = strategy.configure_train(number, record(common), ConfigRecord(), Nodes(nodes))
    return {message.metadata.dst_node_id: message for message in messages}


def reply(request: Message, arrays: Any, rows: Any = 5, config: Any = None, **metrics: Any) -> Message:
    content = RecordDict({"arrays": record(arrays) if isinstance(arrays, dict) else arrays})
    content["metrics"] = MetricRecord({"num-examples": rows, **metrics})
    if config is not None:
        content["own"] = ConfigRecord(config)
    return _reply(request, content)


def _reply(request: Message, content: RecordDict) -> Message:
    # As the link does, which gives a request its number when it is sent.
    request.metadata.__dict__["_message_id"] = f"request-{request.metadata.dst_node_id}"
    return Message(content, reply_to=request)


def numpy(arrays: ArrayRecord | None) -> dict[str, np.ndarray]:
    assert arrays is not None
    return {key: x.numpy() for key, x in arrays.items()}


ROWS = [3, 8, 1]
SENDS_BOTH = [name for name in usable() if name not in ("ffa_lora", "fedsvd", "rolora")]


def one_round(method: Any, uploads: list[dict[str, np.ndarray]], common: dict[str, np.ndarray], number: int = 1):
    strategy = as_strategy(method, LORA)
    requests = asked(strategy, common, len(uploads), number)
    replies = [reply(requests[k], x, n) for k, (x, n) in enumerate(zip(uploads, ROWS), 1)]
    arrays, metrics = strategy.aggregate_train(number, replies)
    assert metrics is not None
    return numpy(arrays), metrics


def means(uploads):
    return {key: sum(n / sum(ROWS) * x[key].astype(np.float64) for n, x in zip(ROWS, uploads)) for key in uploads[0]}


def ideal(uploads, name):
    return sum(n / sum(ROWS) * product(x, name, ALPHA / R) for n, x in zip(ROWS, uploads))


def test_fedit_is_what_flowers_fedavg_does_and_its_error_is_said():
    uploads = [state(k) for k in range(3)]
    ours, metrics = one_round("fedit", uploads, state(9))
    plain = FedAvg()
    requests = asked(plain, state(9), 3)
    theirs = numpy(plain.aggregate_train(1, [reply(requests[k], x, n) for k, (x, n) in enumerate(zip(uploads, ROWS), 1)])[0])
    assert list(ours) == list(state(9))
    for key in theirs:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=1e-6)
    mean = means(uploads)
    errors = [
        np.linalg.norm(product(mean, name, ALPHA / R) - ideal(uploads, name)) / np.linalg.norm(ideal(uploads, name))
        for name in LAYERS
    ]
    assert metrics["aggregation-error"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert metrics["aggregation-error-max"] == pytest.approx(max(errors), rel=1e-5)
    assert metrics["aggregation-rank"] == R
    assert metrics["replies-refused"] == 0


@pytest.mark.parametrize("name", ["flexlora", "best_rank"])
def test_the_best_pair_of_the_rank_is_the_truncated_svd_of_the_dense_mean(name):
    uploads = [state(k) for k in range(3)]
    ours, metrics = one_round(name, uploads, state(9))
    for layer in LAYERS:
        U, s, Vh = np.linalg.svd(ideal(uploads, layer))
        best = (U[:, :R] * s[:R]) @ Vh[:R]
        assert np.linalg.norm(product(ours, layer, ALPHA / R) - best) <= 1e-5 * np.linalg.norm(best)
    assert 0 < metrics["aggregation-error"] < one_round("fedit", uploads, state(9))[1]["aggregation-error"]


def test_florist_keeps_the_energy_it_is_told_and_at_most_the_common_rank():
    # One direction in common: all energy is in rank 1, and the rest is there to be trained.
    common, first = state(9), state(1)
    for name in LAYERS:
        first[f"{PREFIX}{name}.lora_B.weight"][:, 1:] = 0
    ours, metrics = one_round({"name": "florist", "energy": 0.999}, [first, first, first], common)
    assert metrics["aggregation-rank"] == 1
    assert metrics["aggregation-error"] < 1e-5
    for name in LAYERS:
        A, B = (ours[f"{PREFIX}{name}.lora_{factor}.weight"] for factor in "AB")
        assert A.shape[0] == B.shape[1] == R
        assert not B[:, 1:].any()
        assert (np.linalg.norm(A[1:], axis=1) > 0.1).all()


def test_lora_fair_without_regularization_is_the_best_B_for_the_mean_A():
    uploads = [state(k) for k in range(3)]
    ours, _ = one_round({"name": "lora_fair", "regularization": 0.0}, uploads, state(9))
    for name in LAYERS:
        A = means(uploads)[f"{PREFIX}{name}.lora_A.weight"]
        best = ideal(uploads, name) @ np.linalg.pinv(A) @ A
        assert np.linalg.norm(product(ours, name, ALPHA / R) - best) <= 1e-5 * np.linalg.norm(best)


def test_flora_na_is_a_combination_of_factors_that_errs_less_than_their_means():
    uploads = [state(k) for k in range(3)]
    ours, metrics = one_round("flora_na", uploads, state(9))
    for name in LAYERS:
        for factor in "AB":
            key = f"{PREFIX}{name}.lora_{factor}.weight"
            basis = np.stack([x[key].ravel() for x in uploads], axis=1).astype(np.float64)
            fitted = basis @ np.linalg.lstsq(basis, ours[key].ravel().astype(np.float64), rcond=None)[0]
            assert np.linalg.norm(fitted - ours[key].ravel()) <= 1e-5 * np.linalg.norm(fitted)
    assert metrics["aggregation-error"] < one_round("fedit", uploads, state(9))[1]["aggregation-error"]


@pytest.mark.parametrize("name", SENDS_BOTH)
def test_every_method_gives_what_umbel_aggregate_gives_of_the_same_adapters(name):
    uploads = [state(k, head=False) for k in range(3)]
    ours, metrics = one_round(name, uploads, state(9, head=False))
    tensors = [{key: torch.from_numpy(x) for key, x in own.items()} for own in uploads]
    theirs, _, report = umbel.aggregate(tensors, [{"peft_type": "LORA", **LORA}] * 3, method=name, weights=ROWS, rank=R)
    for layer in LAYERS:
        expected = product(theirs, layer, 1.0)
        assert np.linalg.norm(product(ours, layer, ALPHA / R) - expected) <= 1e-5 * np.linalg.norm(expected)
    errors = [own["error"] for own in report["layers"].values()]
    assert metrics["aggregation-error"] == pytest.approx(np.mean(errors), rel=1e-3)


@pytest.mark.parametrize("name", ["ffa_lora", "fedsvd"])
def test_methods_that_train_B_alone_are_exact_and_refuse_who_trained_A(name, caplog):
    common, uploads = state(9), [state(k) for k in range(3)]
    for own in uploads[:2]:
        own.update({key: x for key, x in common.items() if "lora_A" in key})
    strategy = as_strategy(name, LORA)
    requests = asked(strategy, common, 3)
    assert requests[1].content["config"]["train-factors"] == ["lora_B"]
    with caplog.at_level(logging.WARNING, "flwr"):
        arrays, metrics = strategy.aggregate_train(1, [reply(requests[k], x, 2) for k, x in enumerate(uploads, 1)])
    assert metrics is not None
    assert metrics["replies-refused"] == 1
    assert metrics["aggregation-error-max"] < 1e-6
    assert "node 3" in caplog.text
    assert "lora_A is not what was sent" in caplog.text
    for layer in LAYERS:
        expected = sum(product(x, layer, ALPHA / R) for x in uploads[:2]) / 2
        assert np.linalg.norm(product(numpy(arrays), layer, ALPHA / R) - expected) <= 1e-5 * np.linalg.norm(expected)


def test_rolora_says_which_factor_is_trained_in_which_round():
    strategy = as_strategy("rolora", LORA)
    said = [asked(strategy, state(9), 2, number)[1].content["config"]["train-factors"] for number in (1, 2, 3)]
    assert said == [["lora_B"], ["lora_A"], ["lora_B"]]


@pytest.mark.parametrize(
    ("lora", "scales"),
    [
        ({"r": R, "lora_alpha": ALPHA, "use_rslora": True}, (ALPHA / R**0.5,) * 2),
        ({"r": R, "lora_alpha": 5, "alpha_pattern": {"query": 7}}, (7 / R, 5 / R)),
    ],
)
def test_scales_come_from_the_configuration_and_do_not_change_what_is_averaged(lora, scales):
    uploads = [state(k) for k in range(3)]
    strategy = as_strategy("best_rank", lora)
    requests = asked(strategy, state(9), 3)
    arrays, _ = strategy.aggregate_train(1, [reply(requests[k], x) for k, x in enumerate(uploads, 1)])
    for layer, scale in zip(LAYERS, scales):
        U, s, Vh = np.linalg.svd(sum(product(x, layer, scale) for x in uploads) / 3)
        best = (U[:, :R] * s[:R]) @ Vh[:R]
        assert np.linalg.norm(product(numpy(arrays), layer, scale) - best) <= 1e-5 * np.linalg.norm(best)


@pytest.mark.parametrize("name", [name for name in usable() if name in ("flexlora", "florist")])
def test_clients_of_a_rank_of_their_own_count_with_their_scale_and_get_their_rank(name):
    method = {"name": name, "energy": 1.0} if name == "florist" else name
    strategy, small, alpha = as_strategy(method, LORA), 2, 5
    requests = asked(strategy, state(9), 2)
    uploads = [state(1), state(2, rank=small)]
    replies = [reply(requests[1], uploads[0], 1), reply(requests[2], uploads[1], 1, {"lora_alpha": alpha})]
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert metrics is not None
    assert metrics["replies-refused"] == 0
    later = {k: numpy(message.content["arrays"]) for k, message in asked(strategy, numpy(arrays), 2, 2).items()}
    for layer in LAYERS:
        mean = product(uploads[0], layer, ALPHA / R) / 2 + product(uploads[1], layer, alpha / small) / 2
        U, s, Vh = np.linalg.svd(mean)
        for rank, sent, scale in ((R, later[1], ALPHA / R), (small, later[2], alpha / small)):
            best = (U[:, :rank] * s[:rank]) @ Vh[:rank]
            assert sent[f"{PREFIX}{layer}.lora_A.weight"].shape[0] == rank
            assert np.linalg.norm(product(sent, layer, scale) - best) <= 1e-5 * np.linalg.norm(best)
    np.testing.assert_array_equal(later[1][HEAD], later[2][HEAD])


def broken(**changes: np.ndarray) -> dict[str, np.ndarray]:
    return {**state(1), **{f"{PREFIX}layer.0.query.lora_{key}.weight": x for key, x in changes.items()}}


def raw(data: bytes, stype: str = "numpy.ndarray") -> ArrayRecord:
    arrays = dict(record(state(1)))
    arrays[HEAD] = Array("float32", (4, 5), stype, data)
    return ArrayRecord(arrays)


def saved(x: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, x, allow_pickle=True)
    return file.getvalue()


def header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


class Boom:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


NAN = np.full((R, 7), np.nan, np.float32)
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nan": (broken(A=NAN), {}, "NaN, infinity"),
    "huge": (broken(A=np.full((R, 7), 1e30, np.float32)), {}, "values beyond"),
    "d_in": (broken(A=np.ones((R, 6), np.float32)), {}, "wanted"),
    "one-factor-of-another-rank": (broken(A=np.ones((2, 7), np.float32)), {}, "has rank 2, sent was 3"),
    "larger-rank": (state(1, rank=4), {}, r"shape \(4, 7\)"),
    "smaller-rank": (state(1, rank=2), {}, "needs one rank, mixed ranks are for"),
    "missing": ({k: x for k, x in state(1).items() if "lora_B" not in k}, {}, "tensors missing: .*lora_B"),
    "unknown": ({**state(1), "more": np.ones(3, np.float32)}, {}, "unknown: 'more'"),
    "head-of-another-shape": ({**state(1), HEAD: np.ones((4, 4), np.float32)}, {}, "parameters that are not factors differ"),
    "head-nan": ({**state(1), HEAD: np.full((4, 5), np.inf, np.float32)}, {}, "NaN, infinity"),
    "no-rows": (state(1), {"rows": 0}, "it has 0 rows"),
    "negative-rows": (state(1), {"rows": -4}, "it has -4 rows"),
    "nan-rows": (state(1), {"rows": float("nan")}, "it has nan rows"),
    "rows-in-a-list": (state(1), {"rows": [5]}, "no number under|most have"),
    "other-metrics": (state(1), {"loss": 1.0}, "most have 'num-examples'"),
    "integers": (broken(A=np.ones((R, 7), np.int64)), {}, "holds <i8"),
    "pickle": (raw(pickle.dumps(Boom())), {}, "not in numpy's format"),
    "pickle-in-numpy": (raw(saved(np.array([Boom()], dtype=object))), {}, r"holds \|O"),
    "other-format": (raw(b"x", "torch"), {}, "serialized as 'torch'"),
    "announces-terabytes": (raw(header((10**6, 10**6))), {}, "wanted"),
    "truncated": (raw(saved(np.ones((4, 5), np.float32))[:-4]), {}, "do not fit"),
    "too-long": (raw(saved(np.ones((4, 5), np.float32)) + b"xxxx"), {}, "do not fit"),
    "archive": (raw(b"PK\x03\x04" + b"\0" * 60), {}, "not in numpy's format"),
    "alpha": (state(1), {"config": {"lora_alpha": -1.0}}, "lora_alpha is -1.0"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_reply_is_refused_with_its_reason_and_the_round_goes_on(what, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays, options, said = REFUSED[what]
    good = [state(5), state(6)]
    strategy = as_strategy("fedit", LORA)
    requests = asked(strategy, state(9), 3)
    replies = [reply(requests[1], good[0], 2), reply(requests[2], arrays, **options), reply(requests[3], good[1], 6)]
    with caplog.at_level(logging.WARNING, "flwr"):
        got, metrics = strategy.aggregate_train(1, replies)
    assert metrics is not None
    assert metrics["replies-refused"] == 1
    assert "refused the reply of node 2" in caplog.text
    assert re.search(said, caplog.text)
    for key, x in numpy(got).items():
        np.testing.assert_allclose(x, 0.25 * good[0][key] + 0.75 * good[1][key], rtol=0, atol=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_replies_without_records_or_with_errors_are_left_out():
    strategy = as_strategy("fedit", LORA)
    requests = asked(strategy, state(9), 4)
    for request in requests.values():
        request.metadata.__dict__["_message_id"] = "x"
    replies = [
        _reply(requests[1], RecordDict()),
        Message(Error(0, "died"), reply_to=requests[2]),
        _reply(requests[3], RecordDict({"metrics": MetricRecord({"num-examples": 3})})),
        reply(requests[4], state(5)),
    ]
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert metrics is not None
    assert metrics["replies-refused"] == 2
    np.testing.assert_allclose(numpy(arrays)[HEAD], state(5)[HEAD])


def test_where_nobody_is_left_the_round_gives_nothing_as_with_fedavg():
    strategy = as_strategy("fedit", LORA)
    requests = asked(strategy, state(9), 2)
    assert strategy.aggregate_train(1, [reply(requests[k], broken(A=NAN)) for k in (1, 2)]) == (None, None)
    assert strategy.aggregate_train(2, []) == (None, None)


def test_a_client_of_another_rank_that_does_not_say_its_scale_is_told_how(caplog):
    strategy = as_strategy("flexlora", LORA)
    requests = asked(strategy, state(9), 2)
    with caplog.at_level(logging.WARNING, "flwr"):
        strategy.aggregate_train(1, [reply(requests[1], state(1)), reply(requests[2], state(2, rank=2))])
    assert "so its scale is its own; add to the reply: ConfigRecord({'lora_alpha'" in caplog.text


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("fed_sb", "trains or sends G"),
        ("ravan", "trains or sends R"),
        ("fedsa_lora", "leaves B with each client"),
        ("flora", "changes the frozen weights"),
        ("fedex_lora", "changes the frozen weights"),
        ("exact", "changes the frozen weights"),
        ({"name": "florist", "adopt": "merge"}, "changes the frozen weights"),
        ("hetlora", "works at the client"),
        ("power", "asks every client more than once in a round"),
    ],
)
def test_methods_that_need_more_of_a_client_are_refused_with_those_that_do_not(name, why):
    with pytest.raises(MethodError, match=rf"{why}.*here work best_rank, fedit, .*umbel run --engine flower"):
        as_strategy(name, LORA)


def test_every_method_of_umbel_is_either_taken_or_refused_with_a_reason():
    for name in names():
        if name in usable():
            assert isinstance(as_strategy(name, LORA), AdapterStrategy)
        else:
            with pytest.raises(MethodError, match="as_strategy"):
                as_strategy(name, LORA)


def test_hetlora_that_cuts_nothing_at_the_client_is_taken():
    ours, _ = one_round({"name": "hetlora", "gamma": 1.0, "weights": "rows"}, [state(k) for k in range(3)], state(9))
    for key, x in means([state(k) for k in range(3)]).items():
        np.testing.assert_allclose(ours[key], x, rtol=0, atol=1e-5)


@dataclass(frozen=True)
class Half(Method):
    """A method of somebody's own."""

    collect = Mean

    def combine(self, got: Factors, held: Factors) -> Download:
        return Download(factors={"A": got["A"], "B": got["B"] / 2})


def test_a_method_of_ones_own_is_taken_as_it_is():
    uploads = [state(k) for k in range(3)]
    ours, _ = one_round(Half(), uploads, state(9))
    for key, x in means(uploads).items():
        np.testing.assert_allclose(ours[key], x / 2 if "lora_B" in key else x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("lora", "common", "said"),
    [
        ({"r": 4, "lora_alpha": 8}, state(9), "rank 3, its r and rank_pattern say 4"),
        (LORA, {"weights": np.ones((2, 2), np.float32)}, "does not begin with"),
        (LORA, {**state(9), f"{PREFIX}layer.0.query.lora_magnitude_vector": np.ones(10, np.float32)}, "DoRA"),
        (LORA, {**state(9), HEAD: np.ones((4, 5), np.int32)}, "holds <i4"),
    ],
)
def test_what_the_serverapp_gives_is_checked_before_anything_is_sent(lora, common, said):
    with pytest.raises(FolderError, match=said):
        asked(as_strategy("fedit", lora), common, 2)


@pytest.mark.parametrize("lora", [{**LORA, "use_dora": True}, {**LORA, "init_lora_weights": "pissa"}, {"peft_type": "IA3"}])
def test_what_is_not_plain_lora_is_refused_at_once(lora):
    with pytest.raises(FolderError):
        as_strategy("fedit", lora)


def test_flowers_own_options_are_flowers():
    strategy = as_strategy("fedit", LORA, fraction_train=0.5, min_train_nodes=1, min_available_nodes=1)
    assert len(asked(strategy, state(9), 4)) == 2
    with pytest.raises(TypeError):
        as_strategy("fedit", LORA, fraction_fit=0.5)


def _model(folder: Path) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    layers, heads = ["query", "value", "intermediate.dense"], ["pooler", "classifier"]
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=layers, modules_to_save=heads)
    return get_peft_model(base, config), config


def _read(model: Any) -> ArrayRecord:
    from peft import get_peft_model_state_dict

    return ArrayRecord(get_peft_model_state_dict(model, save_embedding_layers=False))


def _batch(folder: Path, seed: int, rows: int) -> dict[str, torch.Tensor]:
    from transformers import AutoTokenizer

    texts = tiny.texts(rows, seed)
    encoded = AutoTokenizer.from_pretrained(folder)([row["text"] for row in texts], padding=True, return_tensors="pt")
    encoded.pop("token_type_ids", None)
    return {**encoded, "labels": torch.tensor([list(tiny.TOPICS).index(row["label"]) for row in texts])}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_whole_run_of_flowers_simulation_learns(tmp_path):
    from flwr.simulation import run_simulation
    from peft import set_peft_model_state_dict

    folder = tiny.bert(tmp_path)
    client, server, results = ClientApp(), ServerApp(), []

    @client.train()
    def _(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        model, _ = _model(folder)
        set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(40):
            loss = model(**_batch(folder, 100 * int(context.node_config["partition-id"]) + step, 24)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": 24, "loss": float(loss)})
        return Message(RecordDict({"arrays": _read(model), "metrics": metrics}), reply_to=message)

    @server.main()
    def _(grid: Grid, context: Context) -> None:
        model, config = _model(folder)
        batch = _batch(folder, 7, 90)

        def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
            set_peft_model_state_dict(model, arrays.to_torch_state_dict())
            with torch.no_grad():
                right = model.eval()(**batch).logits.argmax(-1) == batch["labels"]
            return MetricRecord({"accuracy": float(right.float().mean())})

        strategy = as_strategy("flora_na", config, fraction_evaluate=0.0)
        results.append(strategy.start(grid, _read(model), num_rounds=2, evaluate_fn=evaluate))

    run_simulation(server, client, 2, backend_config={"client_resources": {"num_cpus": 1.0, "num_gpus": 0.0}})
    (result,) = results
    accuracy = [result.evaluate_metrics_serverapp[number]["accuracy"] for number in (0, 1, 2)]
    assert accuracy[-1] > accuracy[0] + 0.2
    for number in (1, 2):
        metrics = result.train_metrics_clientapp[number]
        assert metrics["replies-refused"] == 0
        assert 0 < metrics["aggregation-error"] <= metrics["aggregation-error-max"] < 1
        assert metrics["aggregation-rank"] == 4
