"""The contract: what a client trains and sends, how the server keeps it, and what comes back.

A federated LoRA method is one `Method`. Everything around it (transport, scale, orientation, heads, partial
participation, records) is settled elsewhere, so a method is little more than the paper's equations.

All factors are in units of ΔW: the scale α/r is already multiplied into B (into R where there is one), so that
ΔW = B A (or B R A) holds literally. A is r × d_in and B is d_out × r, whatever the layer class stores.
"""

# pyright: reportConstantRedefinition=false

import dataclasses
import difflib
import importlib
import pkgutil
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from umbel import algebra

Factors = dict[str, Tensor]
"""The named matrices of one layer: `{"A": r × d_in, "B": d_out × r}`, with `"R": r × r` between them for Fed-SB.

An R of r × b with b < r holds the r / b diagonal blocks of a block-diagonal R, one below the other. A factor of any other name
is no part of the adapter: it is said in a `message`, or given by a download for the next phase only."""

HELD = ("A", "B", "R")
"""Names of the factors that an adapter holds."""


class MethodError(ValueError):
    """What a method was given does not fit it; the message says what, got, allowed and what to do."""


@dataclass(frozen=True)
class Download:
    """What one layer of a client must do next.

    The parts apply in this order: `reset` starts the adapter afresh, `factors` overwrite those of the same
    name (others stay), `merge` adds a product to the frozen weight.

    Args:
        factors: Factors to overwrite, in units of ΔW. One that no adapter holds (not A, B or R) is given to those whose uploads
            were combined, for the `message` of the next phase, and to the server's next `combine`; then it is gone.
        merge: `(B, A)`, d_out × p and p × d_in; the frozen weight W becomes W + B A.
        reset: Start the adapter afresh (A random from this seed, B = 0). A method gives any number; the server
            mixes the run's seed, the round and the layer's name into it.
    """

    factors: Factors = field(default_factory=dict[str, Tensor])
    merge: tuple[Tensor, Tensor] | None = None
    reset: int | None = None

    def then(self, later: "Download") -> "Download":
        """Returns the one download that has the effect of this one followed by `later`.

        Factors supersede, merges add, a reset clears the factors before it, and what was given for one phase is over.

        >>> first = Download(factors={"A": torch.ones(1, 2)}, merge=(torch.ones(3, 1), torch.ones(1, 2)))
        >>> both = first.then(Download(merge=(torch.ones(3, 1), torch.ones(1, 2)), reset=7))
        >>> both.factors, both.reset, both.merge[0].shape
        ({}, 7, torch.Size([3, 2]))
        """
        return Download(
            factors=later.factors if later.reset is not None else {**self.lasting().factors, **later.factors},
            merge=algebra.add_products(self.merge, later.merge),
            reset=self.reset if later.reset is None else later.reset,
        )

    def lasting(self) -> "Download":
        """Returns the download without what is given for the next phase only.

        >>> Download(factors={"A": torch.ones(1, 2), "Q": torch.ones(3, 1)}).lasting().factors.keys()
        dict_keys(['A'])
        """
        return dataclasses.replace(self, factors={name: x for name, x in self.factors.items() if name in HELD})

    def cut(self, rank: int) -> "Download":
        """Returns the download for a client of a smaller rank: of a pair (A, B) only the first, most important directions.

        >>> Download(factors={"A": torch.ones(3, 2), "B": torch.ones(4, 3)}).cut(2).factors["B"].shape
        torch.Size([4, 2])
        """
        if not {"A", "B"} <= self.factors.keys() or self.factors["A"].shape[0] <= rank:
            return self
        pair = {"A": self.factors["A"][:rank].contiguous(), "B": self.factors["B"][:, :rank].contiguous()}
        return Download({**self.factors, **pair}, self.merge, self.reset)


class Collector(Protocol):
    """How the server keeps the uploads of one layer while they arrive, in the order in which it asked."""

    def add(self, factors: Factors, weight: float) -> None:
        """Folds in one client's factors; `weight` is its raw n_k > 0. Raises MethodError where they do not fit."""
        ...

    def done(self) -> Any:
        """Returns what `Method.combine` gets, with weights normalized to p_k = n_k / Σ n_j."""
        ...


class Mean:
    """Keeps the weighted mean Σ p_k X_k of every factor X: constant memory, one rank for all clients.

    The mean is updated in place of a sum, X̄ ← X̄ + (n_k / Σ_{j≤k} n_j) (X_k − X̄), so that one client, or
    clients that agree, are returned to the last bit.

    >>> mean = Mean()
    >>> mean.add({"A": torch.tensor([[0.0]])}, 1)
    >>> mean.add({"A": torch.tensor([[4.0]])}, 3)
    >>> mean.done()
    {'A': tensor([[3.]])}
    """

    def __init__(self) -> None:
        self._mean: Factors = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._total = 0.0

    def add(self, factors: Factors, weight: float) -> None:
        if not self._total:
            self._dtypes = {name: x.dtype for name, x in factors.items()}
            # At least float32, so that a mean of many bfloat16 uploads does not stand still.
            self._mean = {name: x.to(torch.promote_types(x.dtype, torch.float32), copy=True) for name, x in factors.items()}
            self._total = float(weight)
            return
        self._check(factors)
        self._total += weight
        for name, x in factors.items():
            self._dtypes[name] = torch.promote_types(self._dtypes[name], x.dtype)
            mean = self._mean[name] = self._mean[name].to(torch.promote_types(self._mean[name].dtype, x.dtype))
            mean.lerp_(x.to(mean.dtype), weight / self._total)

    def _check(self, factors: Factors) -> None:
        if factors.keys() != self._mean.keys():
            raise MethodError(f"sent {', '.join(factors) or 'nothing'}, others {', '.join(self._mean) or 'nothing'}")
        for name, mean in self._mean.items():
            if factors[name].shape != mean.shape:
                raise MethodError(
                    f"sent {name} of shape {tuple(factors[name].shape)}, others {tuple(mean.shape)}. "
                    f"This method averages factors and needs one rank; {taking_mixed_ranks()}"
                )

    def done(self) -> Factors:
        return {name: mean.to(self._dtypes[name]) for name, mean in self._mean.items()}


class Each:
    """Keeps every upload: `done` gives `[(factors, p_k), …]` in the order of asking. Takes mixed ranks."""

    def __init__(self) -> None:
        self.kept: list[tuple[Factors, float]] = []

    def add(self, factors: Factors, weight: float) -> None:
        self.kept.append((factors, float(weight)))

    def done(self) -> list[tuple[Factors, float]]:
        total = sum(n for _, n in self.kept)
        return [(factors, n / total) for factors, n in self.kept]


class Stack:
    """Keeps the stacks B = [B_1 … B_K] and A = [p_1 A_1; …; p_K A_K], whose product is Σ p_k B_k A_k exactly.

    Weights enter once, on A. Takes mixed ranks. Stacks wider than the matrix are added up to it on the way, and come back as
    (Σ p_k B_k A_k, I) or (I, Σ p_k B_k A_k): their sum and at most one stack as wide as the matrix are kept, whatever the
    number of clients.

    >>> stack = Stack()
    >>> stack.add({"B": torch.ones(3, 1), "A": torch.ones(1, 2)}, 1)
    >>> stack.add({"B": torch.ones(3, 1), "A": torch.ones(1, 2)}, 3)
    >>> stack.done()["A"]
    tensor([[0.2500, 0.2500],
            [0.7500, 0.7500]])
    """

    def __init__(self) -> None:
        self._each = Each()
        self._rank = 0
        self._total = 0.0
        self._dense: Tensor | None = None
        self._dtype: torch.dtype | None = None

    def add(self, factors: Factors, weight: float) -> None:
        self._each.add(factors, weight)
        self._total += weight
        self._rank += factors["A"].shape[0]
        own = torch.promote_types(factors["A"].dtype, factors["B"].dtype)
        self._dtype = own if self._dtype is None else torch.promote_types(self._dtype, own)
        if self._rank > min(factors["B"].shape[0], factors["A"].shape[1]):
            self._add_up()

    def _add_up(self) -> None:
        B, A = self._stacks(self._each.kept, 1.0)
        # Products in float32 or finer, their sum in float64: the roundings of a thousand clients would add up.
        work = torch.promote_types(torch.promote_types(B.dtype, A.dtype), torch.float32)
        B, A = B.to(work), A.to(work)
        self._dense = (B @ A).double() if self._dense is None else self._dense.add_(B @ A)
        self._each, self._rank = Each(), 0

    @staticmethod
    def _stacks(kept: list[tuple[Factors, float]], total: float) -> tuple[Tensor, Tensor]:
        B = torch.cat([factors["B"] for factors, _ in kept], dim=-1)
        return B, torch.cat([n / total * factors["A"] for factors, n in kept], dim=-2)

    def done(self) -> Factors:
        if self._dense is None:
            B, A = self._stacks(self._each.kept, self._total)
        else:
            if self._rank:
                self._add_up()
            B, A = algebra.dense_product((self._dense / self._total).to(self._dtype))
        return {"B": B, "A": A}


def stacked(layer: str, uploads: list[tuple[Factors, float]], name: str) -> Tensor:
    """Returns the clients' factors of one name, as `Each` gives them, as one tensor K × ….

    Raises:
        MethodError: They differ in shape, so the clients differ in rank.
    """
    shapes = sorted({tuple(factors[name].shape) for factors, _ in uploads})
    if len(shapes) > 1:
        got = ", ".join(map(str, shapes))
        raise MethodError(f"layer {layer!r}: clients sent {name} of shapes {got}; one rank is needed, {taking_mixed_ranks()}")
    return torch.stack([factors[name] for factors, _ in uploads])


def mean_of(uploads: list[tuple[Factors, float]]) -> Factors:
    """Returns the weighted mean of every factor of what `Each` gives, as `Mean` computes it.

    >>> mean_of([({"A": torch.tensor([[0.0]])}, 0.25), ({"A": torch.tensor([[4.0]])}, 0.75)])
    {'A': tensor([[3.]])}

    Raises:
        MethodError: The clients differ in rank.
    """
    mean = Mean()
    for factors, p in uploads:
        mean.add(factors, p)
    return mean.done()


def product(factors: Factors) -> tuple[Tensor, Tensor]:
    """Returns (B, A) whose product is the ΔW of one layer: (B, A), or (B R, A) where there is an R.

    >>> B, A = torch.eye(2), torch.eye(2)
    >>> product({"B": B, "R": torch.tensor([[2.0], [3.0]]), "A": A})[0]
    tensor([[2., 0.],
            [0., 3.]])
    """
    if "R" not in factors:
        return factors["B"], factors["A"]
    B, R = factors["B"], factors["R"]
    size = R.shape[-1]
    if R.shape[-2] == size:
        return B @ R, factors["A"]
    blocks = torch.einsum("...mhb,...hbc->...mhc", B.unflatten(-1, (-1, size)), R.unflatten(-2, (-1, size)))
    return blocks.flatten(-2), factors["A"]


class Method(ABC):
    """A federated LoRA method: a frozen dataclass whose fields are its options, with one function, `combine`.

    Class attributes:
        trains: Factors that have a gradient at the client. Empty: the client takes no steps and sends what `measures`
            says.
        sends: Factors that go up, or the names that `message` gives to what goes up in their place. A factor that is trained
            and not sent stays at the client, in its files, and so do heads and biases then: there is no common model, and the
            aggregation error means nothing. A method with a message of its own keeps nothing back.
        collect: How the server keeps uploads: `Mean`, `Each` or `Stack`.
        measures: What clients send where nothing is trained. "gradient" of the frozen weights: `("G",)` is dense,
            d_out × d_in, and `("A", "B")` its best product of the adapter's rank. "factors": what they hold, heads too.
            "update": one more `message` of what they trained in this round. Only those are asked whose upload was folded in
            the phase before, and the round is over when no such phase follows.
        mixed_ranks: Takes clients of different rank. Held factors then have the largest.
        whole: Clients of a smaller rank get pairs (A, B) whole, since their `message` needs them, and cut their own.
        by_rows: The aggregate is meant to be Σ p_k ΔW_k with p_k = n_k / Σ n_j. False where clients are weighed by more.
    """

    trains: ClassVar[tuple[str, ...]] = ("A", "B")
    sends: ClassVar[tuple[str, ...]] = ("A", "B")
    collect: ClassVar[type[Collector]] = Mean
    measures: ClassVar[Literal["gradient", "factors", "update"]] = "gradient"
    mixed_ranks: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    by_rows: ClassVar[bool] = True

    @property
    def keeps(self) -> tuple[str, ...]:
        """Factors that stay at the client: trained and not sent."""
        return () if self.speaks else tuple(name for name in self.trains if name not in self.sends)

    @property
    def speaks(self) -> bool:
        """True where clients send a `message` of their own making in the place of factors."""
        return type(self).message is not Method.message

    @property
    def continues(self) -> bool:
        """True for a phase that goes on with the round of the phase before."""
        return not self.trains and self.measures == "update"

    @property
    def exact(self) -> bool:
        """True where the method claims ΔW = Σ p_k ΔW_k; `check_method` holds it to that."""
        return False

    @property
    def together(self) -> bool:
        """True where layers must be combined in one call, since `combine_layers` lets them know of each other."""
        return type(self).combine_layers is not Method.combine_layers

    def plan(self, rounds: int) -> Iterable["Method"]:
        """Returns the phases of a run of `rounds` training rounds; a measurement comes on top of them."""
        return [self] * rounds

    def combine_layers(self, got: Mapping[str, Any], held: Mapping[str, Factors]) -> dict[str, Download]:
        """Combines all layers; overridden only where layers must know of each other.

        Args:
            got: Per layer what the collector's `done` gave.
            held: Per layer the factors that all clients held in common at the start of the round.
        """
        return {layer: self.combine(got[layer], held[layer]) for layer in got}

    @abstractmethod
    def combine(self, got: Any, held: Factors) -> Download:
        """Turns the uploads of one layer into what every client does next. Inputs are not modified."""

    # At the client; most methods leave all three as they are.

    def penalty(self, factors: Factors) -> Tensor | None:
        """Returns what one layer adds to a client's training loss, a scalar with a gradient; None adds nothing.

        Args:
            factors: The client's, in units of ΔW, as they stand at this step.
        """
        return None

    def trained(self, before: Factors, after: Factors) -> Factors:
        """Returns what a client holds of one layer after training, and sends: `after`, or fewer directions of it.

        Args:
            before: What it held when the round began, in units of ΔW.
            after: What training made of it.
        """
        return after

    def message(self, own: Factors, common: Factors) -> Factors:
        """Returns what a client sends of one layer, named as in `sends`: the factors themselves, unless a method says else.

        Its shapes depend on the layer and on `common` alone, not on the client's rank.

        Args:
            own: The client's factors after this round's training, in units of ΔW. Not to be modified.
            common: What all clients held when the round began, at the largest rank, and what the last phase's download gave.
        """
        return {name: own[name] for name in self.sends}


def blind_sum(method: Method, rounds: int = 4) -> str:
    """Says why sums over clients do not suffice to the server of a method, in words that follow its name; "" where they do.

    >>> blind_sum(load("fedit"))
    ''
    >>> blind_sum(load("florist"))
    "has the server stack every client's own A and B, and sums over clients do not tell it those"

    Args:
        method: The method.
        rounds: Of the run, whose phases are looked at.
    """
    return next((reason for phase in method.plan(rounds) if phase.sends and (reason := _needs_own(phase))), "")


def _needs_own(phase: Method) -> str:
    own = f"every client's own {' and '.join(phase.sends)}"
    if phase.collect is Stack:
        return f"has the server stack {own}, and sums over clients do not tell it those"
    if phase.collect is not Mean:
        return f"has the server look at {own} ({phase.collect.__name__}), and sums over clients do not tell it those"
    if not phase.by_rows:
        return f"weighs {own} by more than rows, which sums over clients do not tell"
    return ""


def bounded_sum(method: Method, public: bool = False, rounds: int = 4) -> str:
    """Says why clipping what each client changed, and noise on the mean, hide no client of a method; "" where they do.

    >>> bounded_sum(load("fed_sb", init="random")), bounded_sum(load("fed_sb", init="sign"), public=True)
    ('', '')

    Args:
        method: The method.
        public: Whether gradients that it measures are taken on rows that belong to nobody.
        rounds: Of the run, whose phases are looked at.
    """
    return next((reason for phase in method.plan(rounds) if phase.sends and (reason := _unbounded(phase, public))), "")


def _unbounded(phase: Method, public: bool) -> str:
    sent = " and ".join(phase.sends)
    if not phase.trains and phase.measures == "gradient":
        wanted = "give data.public, or choose a start that measures nothing"
        return "" if public else f"measures a gradient ({sent}) on every client's rows before any noise; {wanted}"
    own = _needs_own(phase)
    if own and phase.collect is Mean:
        return f"{own}: the weights would say what is to be hidden"
    if own:
        return (
            f"{own}: what one client changes there is its product B_k A_k, which a clip of changes of A and B does not bound, "
            "so noise would have to go on all d_out × d_in numbers of a layer, before anything is decomposed"
        )
    strange = [name for name in phase.sends if name not in ("A", "B", "R")]
    if strange:
        return f"sends {' and '.join(strange)}, which clients do not hold before, so there is no change of it to clip"
    return ""


def names() -> list[str]:
    """Returns the names of the methods that come with umbel: the files in `umbel/methods`."""
    import umbel.methods

    return sorted(module.name for module in pkgutil.iter_modules(umbel.methods.__path__))


def taking_mixed_ranks() -> str:
    """Says which of umbel's methods take clients of different rank.

    >>> taking_mixed_ranks().startswith("mixed ranks are for")
    True
    """
    return f"mixed ranks are for {', '.join(name for name in names() if find(name).mixed_ranks)}"


def find(name: str) -> type[Method]:
    """Returns the class of a method by its file name, `"florist"`, or by a module path, `"my_package.my_method"`.

    The module must define one `Method` whose class name is the file name without underscores, in any case.

    Raises:
        MethodError: No such method; the message names the nearest.
    """
    path = name if "." in name else f"umbel.methods.{name}"
    try:
        if not all(part.isidentifier() for part in path.split(".")):
            raise ModuleNotFoundError(name=path)
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(error.name + ".")):
            raise MethodError(f"method {name!r}: importing {path} failed: {error}") from error
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise MethodError(
            f"no method {name!r}. {hint}Known: {', '.join(names())}; or a module path such as 'my_package.my_method'"
        ) from None
    except (ImportError, SyntaxError) as error:
        raise MethodError(f"method {name!r}: importing {path} failed: {error}") from error
    wanted = path.rsplit(".", 1)[-1].replace("_", "").lower()
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Method) and value.__name__.lower() == wanted:
            return value
    raise MethodError(f"module {path!r} defines no Method class whose name is {wanted!r} in any case, e.g. FloRIST")


def load(name: str, **options: Any) -> Method:
    """Makes a method from its name and options.

    >>> load("florist", energy=0.9).energy
    0.9

    Raises:
        MethodError: Unknown name or option; the message names the nearest known one.
    """
    cls = find(name)
    known = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            allowed = ", ".join(known) or "none"
            raise MethodError(f"method {name!r} has no option {key!r}. {hint}Its options: {allowed}")
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # a method of somebody's own may name types that only a type checker imports
        hints = {}
    for key, value in options.items():
        if key in hints and not _is_a(value, hints[key]):
            wanted = str(getattr(hints[key], "__name__", hints[key])).replace("typing.", "")
            raise MethodError(f"method {name!r}: {key}: got {value!r}, wanted {wanted}")
    return cls(**options)


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of an option's type; true where the type is none of those that files and commands can say."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_is_a(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return any(type(value) is type(one) for one in typing.get_args(hint))  # which of them, the method says
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (str, bool, type(None)) else True
