"""The frozen base model and its tokenizer, loaded once per process."""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from umbel import config as configuration
from umbel.client import data
from umbel.config import Config, ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PooledClassifier(nn.Module):
    """A linear head on the mean of an encoder's last hidden states over the tokens that are not padding.

    Stock heads read one token (BERT's [CLS]); sentence encoders were trained with the mean.

    Args:
        backbone: An encoder, `AutoModel`.
        labels: Classes.
    """

    def __init__(self, backbone: nn.Module, labels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.config: Any = backbone.config
        self.classifier = nn.Linear(self.config.hidden_size, labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        """Returns `.logits`, batch × labels."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return SimpleNamespace(logits=self.classifier((hidden * weight).sum(1) / weight.sum(1).clamp(min=1)))


@dataclass
class Base:
    """What every client of this process shares.

    Args:
        model: The frozen model, with a fresh head where the task has one.
        tokenizer: Its tokenizer, with a padding token.
        path: Where it was loaded from: a folder or a hub name.
        heads: Modules that the checkpoint does not have: new with the task, to be trained whole.
    """

    model: nn.Module
    tokenizer: Any
    path: str
    heads: list[str]


def source(model: configuration.Model) -> str:
    """Returns the folder or hub name that Transformers loads from."""
    found = data.locate(model.name)
    return str(found) if found is not None else model.name


def _where(model: configuration.Model) -> dict[str, Any]:
    """Returns what Transformers must know to load a model besides its folder or name."""
    given = {"gguf_file": model.gguf_file, "revision": model.revision}
    return {key: value for key, value in given.items() if value}


def load(config: Config, labels: int, seed: int | None = None) -> Base:
    """Loads model and tokenizer; a new head's weights come from the seed.

    Args:
        config: The run's.
        labels: Classes of the head (classification).
        seed: The run's if not given.

    Raises:
        ConfigError: There is no such model.
    """
    # Without a hub every look-up there only costs time; a hub name still works from the local cache.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from transformers import AutoTokenizer

    path = source(config.model)
    where = _where(config.model)
    try:
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(config.seed if seed is None else seed)
            tokenizer = AutoTokenizer.from_pretrained(path, **where)
            model, heads = _model(config, path, labels, where)
    except (OSError, ValueError) as error:
        known = data.locate(config.model.name) is not None
        where_to = "" if known else "It is no folder here, so a hub was asked. Give a folder, or pkg:<package>/<path>. "
        raise ConfigError(f"model.name = {config.model.name!r} cannot be loaded. {where_to}{error}") from error
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and config.data.max_length > longest:
        raise ConfigError(f"data.max_length: got {config.data.max_length}, allowed by this model: at most {longest}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    # GGUF weights are plain tensors after loading; these marks would make Transformers treat them as quantized.
    if where.get("gguf_file"):
        model.hf_quantizer, model.is_quantized = None, False  # type: ignore[assignment]
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    model.requires_grad_(False)
    model.eval()
    return Base(model, tokenizer, path, heads)


def _model(config: Config, path: str, labels: int, where: dict[str, Any]) -> tuple[Any, list[str]]:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    options: dict[str, Any] = {"dtype": DTYPES[config.model.dtype], "output_loading_info": True, **where}
    if config.task.kind != "classification":
        causal: Any = AutoModelForCausalLM
        model, info = causal.from_pretrained(path, **options)
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise ConfigError(f"model.name = {config.model.name!r} is no causal language model: it has no {missing} …")
        return model, []
    if config.model.pooling == "mean":
        backbone, _ = AutoModel.from_pretrained(path, **options)
        return PooledClassifier(backbone, labels), ["classifier"]
    model, info = AutoModelForSequenceClassification.from_pretrained(path, num_labels=labels, **options)
    # Also what stands between encoder and classifier in some architectures: left random, it would not be in the result.
    new = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    return model, sorted({key.rpartition(".")[0] for key in new})


def fingerprint(config: Config) -> str:
    """Returns the hash of the base model's files, or the hub name with its revision."""
    from umbel.record import sha256

    found = data.locate(config.model.name)
    if found is None:
        return f"hub:{config.model.name}@{config.model.revision or 'main'}"
    return sha256(Path(found) / config.model.gguf_file if config.model.gguf_file else Path(found))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences Transformers' progress bars and its report on newly made heads, which are what we asked for."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # Some of its bars go to the terminal whatever the setting; failures come as exceptions, not there.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def skeleton(config: Config, labels: int) -> Base:
    """Returns the model without its weights, on the meta device: what is adapted and how large it is, before it is loaded.

    The names in a folder's safetensors files say which modules of a classifier are new; without such files (a hub name, a
    GGUF file, a configuration alone) all outside the encoder is taken to be. There is no tokenizer.

    Args:
        config: The run's.
        labels: Classes of the head (classification).

    Raises:
        ConfigError: There is no such model.
    """
    path = source(config.model)
    where = _where(config.model)
    try:
        with quiet(), torch.random.fork_rng():
            if config.model.gguf_file or not _has_weights(path):
                model, heads = _from_configuration(config, path, labels, where)
            else:
                model, heads = _model(config, path, labels, {**where, "device_map": "meta"})
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name = {config.model.name!r}: no configuration of a model can be read there; give a folder with "
            f"config.json, pkg:<package>/<path>, or a name that the local cache has. {error}"
        ) from error
    model.requires_grad_(False)
    model.eval()
    return Base(model, None, path, heads)


def _has_weights(path: str) -> bool:
    """Whether there are weights whose names can be read without them; a hub's would have to be fetched first."""
    return Path(path).is_dir() and any(Path(path).glob("*.safetensors"))


def _from_configuration(config: Config, path: str, labels: int, where: dict[str, Any]) -> tuple[Any, list[str]]:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    known = AutoConfig.from_pretrained(path, **where)
    dtype = DTYPES[config.model.dtype]
    with torch.device("meta"):
        if config.task.kind != "classification":
            return AutoModelForCausalLM.from_config(known, dtype=dtype), []
        if config.model.pooling == "mean":
            return PooledClassifier(AutoModel.from_config(known, dtype=dtype), labels), ["classifier"]
        known.num_labels = labels
        model = AutoModelForSequenceClassification.from_config(known, dtype=dtype)
    new = [key for key, _ in model.named_parameters() if not key.startswith(f"{model.base_model_prefix}.")]
    return model, sorted({key.rpartition(".")[0] for key in new})
