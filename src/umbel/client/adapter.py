"""read() and apply() on a PEFT model: the only place that knows scale, orientation and rank mismatch.

Outside this file factors are in units of ΔW (α/r multiplied into B, or into R), A is r × d_in and B is d_out × r.
"""

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from umbel import algebra, method
from umbel.config import ConfigError, Lora
from umbel.method import Download, Factors
from umbel.server import LayerShape, fresh_factors

NAME = "default"


class Blocks(nn.Module):
    """A block-diagonal R: r / b blocks of b × b, stored one below the other as r × b, and a scalar s_i for each.

    Args:
        like: Gives dtype and device.
        rank: r.
        size: b, which divides r.
    """

    def __init__(self, like: Tensor, rank: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(like.new_zeros(rank, size))
        self.s = nn.Parameter(like.new_ones(rank // size))

    def forward(self, x: Tensor) -> Tensor:
        """Returns R x: for each block s_i R_i x_i, in the shape of x, … × r."""
        size = self.weight.shape[1]
        R = self.weight.unflatten(0, (-1, size)) * self.s[:, None, None]
        return torch.einsum("...hb,hcb->...hc", x.unflatten(-1, (-1, size)), R.to(x.dtype)).flatten(-2)


class WithR(nn.Sequential):
    """B R in the place of LoRA's B: first R (r × r, or blocks), then B. PEFT computes A before and the scale after."""

    def __init__(self, B: nn.Linear, size: int) -> None:
        like, rank = B.weight.detach(), B.in_features
        R: nn.Module = Blocks(like, rank, size)
        if size == rank:
            R = nn.Linear(rank, rank, bias=False, device=like.device, dtype=like.dtype)
            nn.init.zeros_(R.weight)
        super().__init__()
        self.add_module("R", R)
        self.add_module("B", B)


class Adapter:
    """A LoRA adapter on a resident base model, and the products merged into that base.

    Args:
        base: The model; it is wrapped in place and given back by `remove`.
        lora: PEFT's options.
        heads: Modules that are new with the task and are trained whole, such as a classifier.
        seed: The run's.
    """

    def __init__(self, base: nn.Module, lora: Lora, heads: Sequence[str], seed: int) -> None:
        import peft

        self._check_targets(base, lora)
        options = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT says int and takes float
            lora_dropout=lora.lora_dropout,
            target_modules="all-linear" if "all-linear" in lora.target_modules else list(lora.target_modules),
            use_rslora=lora.use_rslora,
            rank_pattern=dict(lora.rank_pattern),
            alpha_pattern=dict(lora.alpha_pattern),
            fan_in_fan_out=_has_conv1d(base),
            modules_to_save=list(heads) or None,
        )
        with warnings.catch_warnings():
            # PEFT asks Transformers for names that are about to change; nothing a user could act on.
            warnings.simplefilter("ignore", FutureWarning)
            # A pattern that matches no layer is a mistake that would pass in silence.
            warnings.simplefilter("error", RuntimeWarning)
            try:
                self.model: Any = peft.get_peft_model(base, options)  # type: ignore[arg-type]
            except RuntimeWarning as warning:
                raise ConfigError(f"[lora]: {warning}") from None
        self._modules = {
            public_name(name): module
            for name, module in self.model.named_modules()
            if hasattr(module, "lora_A") and NAME in module.lora_A
        }
        self.layers = {name: self._shape(module) for name, module in self._modules.items()}
        self.plain_parameters = {
            public_name(name): p for name, p in self.model.named_parameters() if p.requires_grad and ".lora_" not in name
        }
        self._first_plain = {name: p.detach().clone() for name, p in self.plain_parameters.items()}
        self._scaling = {name: module.scaling[NAME] for name, module in self._modules.items()}
        self._pristine: dict[str, Tensor] = {}
        self.merged: dict[str, tuple[Tensor, Tensor]] = {}
        self._history = self._resident_history = ""
        self.restart(seed)

    @staticmethod
    def _check_targets(base: nn.Module, lora: Lora) -> None:
        found = {name.rpartition(".")[2] for name, m in base.named_modules() if isinstance(m, nn.Linear) or _is_conv1d(m)}
        for target in lora.target_modules:
            if target.rpartition(".")[2] not in found and target != "all-linear":
                raise ConfigError(
                    f"lora.target_modules: the model has no linear layer {target!r}. It has: {', '.join(sorted(found))}"
                )

    @staticmethod
    def _shape(module: Any) -> LayerShape:
        parameters = _parameters(module)
        A, B = parameters["A"], parameters["B"]
        return LayerShape(B.shape[0], A.shape[1], A.shape[0])

    def remove(self) -> nn.Module:
        """Takes the adapter off, restores the frozen weights and the head, and returns the base model."""
        self._set_base({}, "")
        # PEFT would leave the trained head in the base model, and the next run would start from it.
        for name, parameter in self.plain_parameters.items():
            parameter.data.copy_(self._first_plain[name])
        base = self.model.unload()
        if hasattr(base, "peft_config"):
            del base.peft_config
        return base.requires_grad_(False)

    # What is trained

    def trainable(self, trains: Iterable[str]) -> list[nn.Parameter]:
        """Lets the named factors and all plain parameters have a gradient, and nothing else.

        Returns:
            The factors' parameters; the plain ones are `plain_parameters`.
        """
        wanted = set(trains)
        self.model.requires_grad_(False)
        chosen: list[nn.Parameter] = []
        for module in self._modules.values():
            for name, parameter in _parameters(module).items():
                trained = name in wanted or (name == "s" and "R" in wanted)
                parameter.requires_grad_(trained)
                chosen += [parameter] if trained else []
        for parameter in self.plain_parameters.values():
            parameter.requires_grad_(bool(wanted))
        return chosen

    def frozen_weights(self) -> dict[str, nn.Parameter]:
        """Returns the weight under each adapter."""
        return {name: module.get_base_layer().weight for name, module in self._modules.items()}

    def oriented(self, layer: str, matrix: Tensor) -> Tensor:
        """Returns a matrix of the layer's frozen weight as d_out × d_in (Conv1D stores d_in × d_out), or back."""
        return matrix.T if _is_conv1d(self._modules[layer].get_base_layer()) else matrix

    # Between the model and the wire

    def scale(self, lora: Lora | None = None) -> None:
        """Gives every layer the scale of a client's own rank and alpha, or the usual one."""
        for name, module in self._modules.items():
            module.scaling[NAME] = self._scaling[name] if lora is None else lora.scale

    def restart(self, seed: int, own: Lora | None = None) -> None:
        """Starts the adapter, the head and the frozen weights afresh, as a client that never took part has them.

        Args:
            seed: The run's.
            own: The client's own rank and alpha, where clients differ.
        """
        self.scale(own)
        self._set_base({}, "")
        self._history, self.merged = "", {}
        with torch.no_grad():
            for name, parameter in self.plain_parameters.items():
                parameter.copy_(self._first_plain[name])
            for layer, shape in self.layers.items():
                _resize(self._modules[layer], shape.rank if own is None else own.rank)
                self._reset(layer, seed)

    def _reset(self, layer: str, seed: int) -> None:
        _carry_R(self._modules[layer], 0)
        self._write(layer, fresh_factors(layer, self._shape(self._modules[layer]), seed))

    def read(self, names: Iterable[str] = ("A", "B", "R")) -> dict[str, Factors]:
        """Returns copies of the named factors that are there, in units of ΔW, float32."""
        wanted = set(names)
        result: dict[str, Factors] = {}
        for layer, module in self._modules.items():
            result[layer] = {
                name: x.detach().to(torch.float32, copy=True) for name, x in _in_units(module).items() if name in wanted
            }
        return result

    def live(self) -> dict[str, Factors]:
        """Returns all factors in units of ΔW with their gradients, as training sees them."""
        return {layer: _in_units(module) for layer, module in self._modules.items()}

    @torch.no_grad()
    def write(self, factors: Mapping[str, Factors]) -> None:
        """Overwrites factors, in units of ΔW; a pair of another rank makes that the client's rank."""
        for layer, own in factors.items():
            self._write(layer, own)

    def read_plain(self) -> dict[str, Tensor]:
        """Returns copies of the trained parameters that are not factors, float32."""
        return {name: p.detach().to(torch.float32, copy=True) for name, p in self.plain_parameters.items()}

    @torch.no_grad()
    def apply(self, downloads: Mapping[str, Download], plain: Mapping[str, Tensor], own_rank: bool = True) -> None:
        """Does what the downloads say: reset, overwrite, merge; then overwrites the plain parameters.

        A pair (A, B) of another rank than this client's is truncated to its first r rows and columns (methods order them by
        importance), or padded: zero columns in B and fresh random rows in A, so that the product stays and gradients flow.

        Args:
            downloads: Per layer, in units of ΔW.
            plain: Parameters that are not factors.
            own_rank: False takes a pair at whatever rank it has, to score or publish the common model as it was sent.
        """
        for layer, download in downloads.items():
            if layer not in self._modules:
                raise ConfigError(f"layer {layer!r} is not adapted here; adapted: {', '.join(list(self._modules)[:4])} …")
            if download.reset is not None:
                self._reset(layer, download.reset)
            self._write(layer, self._fitted(layer, download.factors) if own_rank else download.factors)
            merged = algebra.add_products(self.merged.get(layer), download.merge)
            if download.merge is not None and merged is not None:
                self.merged[layer] = merged
                self._history = _hash(self._history, layer, *download.merge)
        self._set_base(self.merged, self._history)
        for name, value in plain.items():
            self.plain_parameters[name].copy_(value)

    def _fitted(self, layer: str, factors: Factors) -> Factors:
        rank = self._shape(self._modules[layer]).rank
        if "A" not in factors or factors["A"].shape[0] == rank:
            return factors
        if set(factors) != {"A", "B"}:
            raise ConfigError(
                f"layer {layer!r}: got rank {factors['A'].shape[0]} for {sorted(factors)}, this client has {rank}"
            )
        A, B = factors["A"][:rank], factors["B"][:, :rank]
        short = rank - A.shape[0]
        if short > 0:
            # Seeded by what was received, so that every client of this rank pads alike and a restart repeats it.
            seed = algebra.seed_of("pad", layer, _hash("", layer, A, B))
            A = torch.cat([A, algebra.fresh_A(short, A.shape[1], seed)])
            B = torch.cat([B, B.new_zeros(B.shape[0], short)], dim=1)
        return {"A": A, "B": B}

    def _write(self, layer: str, factors: Factors) -> None:
        module = self._modules[layer]
        if "A" in factors:
            _resize(module, factors["A"].shape[0])
        if "R" in factors:
            _carry_R(module, factors["R"].shape[1])
        parameters = _parameters(module)
        carrier = "R" if "R" in parameters else "B"
        for name, value in factors.items():
            parameters[name].data.copy_(value / module.scaling[NAME] if name == carrier else value)
        if "R" in factors and "s" in parameters:
            parameters["s"].data.fill_(1.0)

    def _set_base(self, merged: Mapping[str, tuple[Tensor, Tensor]], history: str) -> None:
        """Makes the resident frozen weights W₀ + B A; always from W₀, so that the way there leaves no trace in the bits."""
        if history == self._resident_history:
            return
        for layer, weight in self.frozen_weights().items():
            if layer not in self._pristine:
                if layer not in merged:
                    continue
                self._pristine[layer] = weight.detach().clone()
            total = self._pristine[layer].float()
            if layer in merged:
                B, A = merged[layer]
                total = total + self.oriented(layer, B @ A)
            weight.data.copy_(total)
        self._resident_history = history

    # A client's state, for swapping clients over one base model

    def state(self) -> tuple[str, dict[str, Tensor]]:
        """Returns all that distinguishes this client: (history of merges, tensors)."""
        tensors = {f"plain|{name}": x for name, x in self.read_plain().items()}
        for layer, module in self._modules.items():
            tensors |= {f"{layer}|{name}": p.detach().float().clone() for name, p in _parameters(module).items()}
        for layer, (B, A) in self.merged.items():
            tensors |= {f"{layer}|merge.B": B, f"{layer}|merge.A": A}
        return self._history, tensors

    @torch.no_grad()
    def set_state(self, history: str, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state`: raw parameters, not in units of ΔW, so that nothing is rounded."""
        merged: dict[str, dict[str, Tensor]] = {}
        for layer, module in self._modules.items():
            _resize(module, tensors[f"{layer}|A"].shape[0])
            _carry_R(module, tensors[f"{layer}|R"].shape[1] if f"{layer}|R" in tensors else 0)
        for key, value in tensors.items():
            layer, _, name = key.rpartition("|")
            if layer == "plain":
                self.plain_parameters[name].copy_(value)
            elif name.startswith("merge."):
                merged.setdefault(layer, {})[name] = value
            else:
                _parameters(self._modules[layer])[name].copy_(value)
        self.merged = {layer: (own["merge.B"], own["merge.A"]) for layer, own in merged.items()}
        self._history = history
        self._set_base(self.merged, history)

    def product(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns per layer (B, A): all that is added to the frozen weight, merges and adapter."""
        result: dict[str, tuple[Tensor, Tensor]] = {}
        for layer, factors in self.read().items():
            total = algebra.add_products(self.merged.get(layer), method.product(factors))
            assert total is not None
            result[layer] = total
        return result


def public_name(name: str) -> str:
    """Returns a module's or parameter's name as the stock model has it, without PEFT's and our own wrappers."""
    # Our head wraps the encoder inside PEFT in a run, and PEFT inside it when a result is read back.
    name = name.removeprefix("backbone.").removeprefix("base_model.model.").removeprefix("backbone.")
    return name.replace(f".modules_to_save.{NAME}", "")


def _parameters(module: Any) -> dict[str, nn.Parameter]:
    A, B = module.lora_A[NAME].weight, module.lora_B[NAME]
    if not isinstance(B, WithR):
        return {"A": A, "B": B.weight}
    R = B.get_submodule("R")
    found = {"A": A, "B": B.get_submodule("B").weight, "R": R.weight}
    return found | ({"s": R.s} if isinstance(R, Blocks) else {})  # type: ignore[return-value]


def _in_units(module: Any) -> Factors:
    """Returns a layer's factors in units of ΔW: the scale in R where there is one, else in B; s_i in its block of R."""
    parameters: dict[str, Tensor] = dict(_parameters(module))
    carrier = "R" if "R" in parameters else "B"
    parameters[carrier] = parameters[carrier] * module.scaling[NAME]
    s = parameters.pop("s", None)
    if s is not None:
        parameters["R"] = parameters["R"] * s.repeat_interleave(parameters["R"].shape[1])[:, None]
    return parameters


def _carry_R(module: Any, size: int) -> None:
    """Puts an R with blocks of this size between A and B (r: one block), or takes it away (0)."""
    B = module.lora_B[NAME]
    if isinstance(B, WithR):
        R: Any = B.get_submodule("R")
        if R.weight.shape[1] == size:
            return
        module.lora_B[NAME] = B.get_submodule("B")
    if size:
        module.lora_B[NAME] = WithR(module.lora_B[NAME], size)


def _resize(module: Any, rank: int) -> None:
    """Gives the factors another rank; the caller writes their values."""
    A = module.lora_A[NAME]
    if A.out_features == rank:
        return
    _carry_R(module, 0)
    B = module.lora_B[NAME]
    A.weight = nn.Parameter(A.weight.new_empty(rank, A.in_features))
    B.weight = nn.Parameter(B.weight.new_empty(B.out_features, rank))
    A.out_features = B.in_features = module.r[NAME] = rank


def _hash(history: str, layer: str, *tensors: Tensor) -> str:
    digest = hashlib.blake2b(f"{history}|{layer}".encode(), digest_size=16)
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _has_conv1d(model: nn.Module) -> bool:
    return any(_is_conv1d(module) for module in model.modules())
