"""The one abstraction a method implements, and how users name methods.

A method is a frozen dataclass of its hyper-parameters that answers which keys each query reads
(``select_prefill``, ``select_decode``). Causality, grouped heads, padding, soft-cap, sinks, storage, kernels,
merging and accounting are shared. Subclassing registers the method under its ``name``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from .cost import DECODE, PREFILL, Cost, Queries
from .errors import FarspanError, SpecError
from .index import Index
from .keys import Keys, State
from .softmax import Softmax
from .summary import Summary
from .whole import whole_number

_REGISTRY: dict[str, type[AttentionMethod]] = {}
_HERE = __name__.rpartition(".")[0] + "."  # the package whose folders are the families


@dataclass(frozen=True)
class LayerInfo:
    """What a method may know of the layer it will serve. ``weights``: the recipe's tensors for this layer, by
    name.

    Under tensor parallelism the head counts are those of rank ``tp_rank`` out of ``tp_size``; ``weights`` are
    the whole layer's."""

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    weights: Mapping[str, Tensor] | None = None
    tp_size: int = 1
    tp_rank: int = 0

    def own(self, per_head: Tensor) -> Tensor:
        """This rank's part of a tensor whose first dimension is all the layer's query or KV heads."""
        return per_head.chunk(self.tp_size)[self.tp_rank]


class Calibration(Protocol):
    """Learns one layer's weights by watching its dense attention over windows of a text.

    before_rope: whether it wants queries and keys as they are before RoPE. settings: how it learns, for the
    record.
    """

    @property
    def before_rope(self) -> bool: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def observe(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax) -> None:
        """One window of the text: q [1, H, T, D], k, v [1, Hkv, T, D], and how the layer turns q k^T into
        weights."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """What ``for_layer`` will find in ``LayerInfo.weights``."""
        ...


@runtime_checkable
class GradientCalibration(Calibration, Protocol):
    """One that also asks what a change of the layer's attention does to the likelihood of the text."""

    def observe_grad(self, gradient: Tensor) -> None:
        """The gradient, in the output [1, H, T, D] of the attention of the window observed last, of that
        window's mean negative log-likelihood."""
        ...


@dataclass(frozen=True, kw_only=True)
class AttentionMethod:
    """Base of every method. Subclasses are frozen, keyword-only dataclasses whose fields are the
    hyper-parameters."""

    name: ClassVar[str]
    title: ClassVar[str]  # as the paper calls it
    family: ClassVar[str]  # the folder of its file, "baseline" for dense; "custom" outside farspan
    paper: ClassVar[str] = ""  # arXiv id
    phases: ClassVar[frozenset[str]]  # those whose select_* it has, the others are dense; both if it has none
    selective: ClassVar[bool]  # whether it has one
    lookahead: ClassVar[str] = (
        "0"  # how far past a row its selection may have looked: "0", "block_q - 1" or "prompt"
    )
    needs_recipe: ClassVar[bool] = False
    reads_keys: ClassVar[bool] = False  # whether prepare_prefill or select_prefill asks for raw keys

    @property
    def tokens_ahead(self) -> float:
        """``lookahead`` as a number of tokens; inf for the whole prompt."""
        if self.lookahead == "prompt":
            return math.inf
        field, _, less = self.lookahead.partition(" - ")
        return getattr(self, field) - int(less) if less else int(field)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "phases" in cls.__dict__:
            raise ValueError(
                f"{cls.__qualname__} sets phases, which follow from the methods select_prefill and "
                "select_decode that it defines: leave phases out."
            )
        selected = _selected_phases(cls)
        cls.phases, cls.selective = selected or frozenset({PREFILL, DECODE}), bool(selected)
        if "family" not in cls.__dict__:
            inside = cls.__module__.startswith(_HERE)
            folder, below, _ = cls.__module__.removeprefix(_HERE).partition(".")
            cls.family = (folder if below else "baseline") if inside else "custom"
        if "name" in cls.__dict__:
            taken = _REGISTRY.get(cls.name)
            if taken is not None and taken.__qualname__ != cls.__qualname__:
                raise ValueError(
                    f"Two methods are called {cls.name!r}: {taken.__qualname__} and {cls.__qualname__}."
                )
            _REGISTRY[cls.name] = cls

    def for_layer(self, layer: LayerInfo) -> AttentionMethod | None:
        """This method as layer ``layer`` runs it, or None where the method itself leaves the layer dense."""
        return None if layer.index < self.dense_layers else self

    @property
    def dense_layers(self) -> int:
        """Layers below this one are left dense; usually a parameter of the method."""
        return 0

    def cost(self, phase: str, length: int, *, head_dim: int = 128, element_size: int = 2) -> Cost:
        """What a layer that it serves reads in a phase at a length, by its own declaration. head_dim: numbers
        of a key; element_size: bytes of a number."""
        queries = Queries(phase=phase, length=length, head_dim=head_dim, element_size=element_size)
        return self.reads(queries) if self.selective and phase in self.phases else queries.cost()

    def reads(self, queries: Queries) -> Cost:
        """Declares what ``queries`` of a phase that it selects in read. A method that declares nothing may
        read every key, and counts as dense."""
        return queries.cost(exact=False)

    def calibration(self, layer: LayerInfo, *args: Any, **options: Any) -> Calibration:
        """What learns the weights of ``layer`` that this method needs. Raises FarspanError for a method that
        needs none and for options it cannot take."""
        raise FarspanError(f"{self.name} is not calibrated: it learns nothing from a text.")

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        """Which keys each prefill query reads. q [1, H, Tq, D] (a padded batch is asked row by row); None
        means all."""
        return None

    def block_maxima(self, q: Tensor, keys: Keys) -> tuple[Tensor, int, int]:
        """Where a method estimates it: the natural log of the largest attention probability in each block of
        prefill queries and keys [1, H, Nq, Nk] (or a bound above it; -inf where nobody sees it), block_q,
        block_k."""
        raise NotImplementedError(f"{self.name} estimates no block maxima.")

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        """Which keys each decode query reads, one selection per query. q [B, H, Tq, D], Tq <= 16; None means
        all."""
        return None

    def on_prefill_end(self, q: Tensor, keys: Keys) -> None:
        """Called after a prefill call, to set up state from its last ``observation_window`` queries
        q [B, H, n, D], fewer if the call has fewer."""

    @property
    def observation_window(self) -> int | None:
        """How many of a prefill call's last queries ``on_prefill_end`` is given; None: all of them."""
        return 1

    @property
    def couples_heads(self) -> bool:
        """Whether it decides something for all KV heads of a layer together: then no rank may have but some
        of them, as tensor parallelism would have it."""
        return False

    @property
    def block_multiple(self) -> int:
        """Prefill chunks are rounded to a multiple of this many tokens."""
        return 1

    @property
    def last_queries(self) -> int:
        """How many of a prefill call's last queries ``prepare_prefill`` is asked about; 0: it is not
        asked."""
        return 0

    def prepare_prefill(self, q: Tensor, keys: Keys) -> State:
        """What the last queries q [B, H, n, D] of a call find among all its keys, for ``keys.prepared`` when
        ``select_prefill`` is asked about any of its queries."""
        return {}

    @property
    def summaries(self) -> tuple[Summary, ...]:
        """What ``select_prefill`` and ``select_decode`` ask ``keys.summary`` for; nothing else is to be
        had."""
        return ()

    def __str__(self) -> str:
        changed = [
            f"{f.name}={f'({value})' if isinstance(value, AttentionMethod) else value}"
            for f in dataclasses.fields(self)
            if f.repr and (value := getattr(self, f.name)) != f.default
        ]
        return self.name + (":" + ",".join(changed) if changed else "")


def _selected_phases(cls: type[AttentionMethod]) -> frozenset[str]:
    """The phases whose ``select_*`` the class does not have from the base."""
    own = {
        PREFILL: cls.select_prefill is not AttentionMethod.select_prefill,
        DECODE: cls.select_decode is not AttentionMethod.select_decode,
    }
    return frozenset(phase for phase, overridden in own.items() if overridden)


def methods() -> dict[str, type[AttentionMethod]]:
    """Every method there is, by name."""
    from . import dense, recycled, sparse  # noqa: F401  (importing a method registers it)

    return dict(sorted(_REGISTRY.items()))


def parse_method(spec: str | AttentionMethod) -> AttentionMethod:
    """A method from ``"name"`` or ``"name:par=value,par=value"``; a method object is returned as it is. A
    value that is itself a method with parameters stands in parentheses: ``"act:over=(sale:threshold=1)"``.

    Raises SpecError, naming the nearest known name, for an unknown method or parameter and for a value it
    cannot take.
    """
    if isinstance(spec, AttentionMethod):
        return spec
    if not isinstance(spec, str):
        raise SpecError(
            f"A method is a string such as 'recycled:k=512,stride=10' or a method object; got {spec!r}."
        )
    name, _, rest = spec.strip().partition(":")
    name = name.strip()
    known = methods()
    if name not in known:
        raise SpecError(
            f"There is no method {name!r}{_nearest(name, known)}; the methods are {', '.join(known)}."
        )
    cls = known[name]
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init and f.metadata.get("spec", True)}
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in _OUTSIDE.split(rest))):
        key, equals, text = (piece.strip() for piece in item.partition("="))
        if key in _RENAMED and _RENAMED[key] in fields:
            raise SpecError(f"{name} has no parameter {key!r}: it is called {_RENAMED[key]!r} now.")
        if key not in fields:
            takes = f"it takes {', '.join(fields)}" if fields else "it takes none"
            raise SpecError(f"{name} has no parameter {key!r}{_nearest(key, fields)}; {takes}.")
        if not equals or not text:
            raise SpecError(
                f"{name} needs a value for {key}, as in '{name}:{key}={fields[key].default}'; got {item!r}."
            )
        if key in values:
            raise SpecError(f"{name} got the parameter {key} twice in {spec!r}.")
        values[key] = _convert(name, key, text, hints[key])
    if values.keys() & _SIZES:  # a budget takes the place of the default one
        for other in (_SIZES | {"mass"}) & fields.keys():
            if type(None) in typing.get_args(hints[other]):
                values.setdefault(other, None)
    return cls(**values)


_RENAMED = {"share": "gqa_reduce"}  # parameters of earlier versions, by their names now
_SIZES = {"k", "fraction"}  # budgets that say how much is read
_OUTSIDE = re.compile(r",(?![^()]*\))")  # commas that stand outside of parentheses


def _convert(name: str, key: str, text: str, hint: Any) -> Any:
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    if text.lower() == "none" and type(None) in typing.get_args(hint):
        return None
    for kind in kinds:
        if kind is bool:
            if text.lower() in ("true", "false", "1", "0", "yes", "no"):
                return text.lower() in ("true", "1", "yes")
        elif kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        elif kind is str:
            return text
        elif kind is AttentionMethod:
            if text[0] == "(" and text[-1] != ")":
                raise SpecError(
                    f"The parenthesis of {key}={text} in {name} is not closed; write "
                    f"{key}=(METHOD:PAR=VALUE)."
                )
            return parse_method(text[1:-1] if text[0] == "(" and text[-1] == ")" else text)
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}
    raise SpecError(f"{name} takes {wanted.get(kinds[0], kinds[0])} for {key}; got {text!r}.")


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def require(method: AttentionMethod, **limits: tuple[float, float | None] | tuple[str, ...]) -> None:
    """Check fields against (lowest, highest or None) or a tuple of allowed strings; SpecError says what is
    allowed."""
    hints = typing.get_type_hints(type(method))
    for key, allowed in limits.items():
        value = getattr(method, key)
        if value is None:
            continue
        if isinstance(allowed[0], str):
            if value not in allowed:
                raise SpecError(
                    f"{method.name} takes {key} = {' or '.join(map(str, allowed))}; got {value!r}."
                )
            continue
        low, high = allowed
        kinds = typing.get_args(hints[key]) or (hints[key],)
        if (whole := whole_number(value)) is not None:
            value = whole
            object.__setattr__(method, key, whole)
        number = isinstance(value, int | float if float in kinds else int) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < low or (high is not None and value > high):
            bound = f"at least {low}" if high is None else f"from {low} to {high}"
            what = "" if float in kinds else "a whole number, "
            raise SpecError(f"{method.name} takes {key} {what}{bound}; got {value!r}.")
