"""The one abstraction a method implements.

A method is a frozen dataclass of its hyper-parameters that answers which keys each query reads
(``select_prefill``, ``select_decode``). Causality, grouped heads, padding, soft-cap, sinks, storage, kernels,
merging and accounting are shared. Subclassing registers the method under its ``name``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from .calibration.protocol import Calibration
from .cost import DECODE, PREFILL, Cost, Queries
from .errors import FarspanError
from .eviction import Eviction
from .keys import Keys, State
from .kv import KV
from .lookahead import Lookahead
from .needs import Needs
from .selection import Index
from .softmax import Softmax
from .static_step import StaticKeys, StaticStep
from .summary import Summary

_REGISTRY: dict[str, type[AttentionMethod]] = {}
_HERE = __name__.rpartition(".")[0] + "."  # the package whose folders are the families


@dataclass(frozen=True)
class LayerInfo:
    """What a method may know of the layer it will serve.

    hidden_size: numbers of a hidden state; num_layers: layers of the model; 0 where it is not known.
    scale: the factor of q k^T in the layer's softmax; None: 1 / sqrt(head_dim).
    weights: the recipe's tensors for this layer, by name. tensors: those of all layers, by their names in the
    recipe. over_weights: ``weights`` of the method that this one goes over. Under tensor parallelism the head
    counts are those of rank ``tp_rank`` out of ``tp_size``; the tensors of a recipe are the whole layer's.
    """

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    weights: Mapping[str, Tensor] | None = None
    tp_size: int = 1
    tp_rank: int = 0
    tensors: Mapping[str, Tensor] | None = None
    over_weights: Mapping[str, Tensor] | None = None
    hidden_size: int = 0
    num_layers: int = 0
    scale: float | None = None

    def checked(self, method: AttentionMethod) -> Mapping[str, Tensor]:
        """``weights``, with those that ``method.needs`` declares. Raises FarspanError where one is missing or
        has another shape."""
        weights, needs = self.weights or {}, method.needs
        for name, shape in needs.weights.items():
            if name not in weights:
                instead = f", or {needs.instead}" if needs.instead else ""
                raise FarspanError(
                    f"{method.name} needs a recipe with the {name} of layer {self.index}: make one with "
                    f"{method.recipe_maker} and pass {method.recipe_given}{instead}."
                )
            shared = dict.fromkeys(("num_heads", "num_kv_heads"), self.tp_size)
            wanted = [getattr(self, x) * shared.get(x, 1) if isinstance(x, str) else x for x in shape]
            given = list(weights[name].shape)
            fits = [size is None or size == had for size, had in zip(wanted, given, strict=False)]
            if len(wanted) != len(given) or not all(fits):
                raise FarspanError(
                    f"This recipe has {name} of the sizes {given} in layer {self.index}, the model needs "
                    f"{wanted}: it was made for another model."
                )
        return weights

    def own(self, per_head: Tensor) -> Tensor:
        """This rank's part of a tensor whose first dimension is all the layer's query or KV heads."""
        return per_head.chunk(self.tp_size)[self.tp_rank]


@dataclass(frozen=True, kw_only=True)
class AttentionMethod:
    """Base of every method. Subclasses are frozen, keyword-only dataclasses whose fields are the
    hyper-parameters. A field may take the place of a property below, such as ``dense_layers`` or
    ``recipe``."""

    name: ClassVar[str]
    title: ClassVar[str]  # as the paper calls it
    family: ClassVar[str]  # the folder of its file, "baseline" for dense; "custom" outside farspan
    paper: ClassVar[str] = ""  # arXiv id
    phases: ClassVar[frozenset[str]]  # those whose select_* it has, the others are dense; both if it has none
    selective: ClassVar[bool]  # whether it has one
    trained_with: ClassVar[tuple[str, ...]] = ()  # the fields that its weights depend on; a recipe keeps them

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

    # --- what it declares ---------------------------------------------------------------------------------

    @property
    def lookahead(self) -> Lookahead:
        """How many later tokens may take part in the selection for a prefill query."""
        return Lookahead()

    @property
    def needs(self) -> Needs:
        """What it needs besides queries, summaries and positions."""
        return Needs()

    @property
    def module(self) -> nn.Module | None:
        """The method's trainable parameters in one layer, which ``for_layer`` makes or takes from the recipe;
        None for a method without any."""
        return None

    @property
    def summaries(self) -> tuple[Summary, ...]:
        """The summaries that ``keys.summary`` can be called with; the store keeps no others."""
        return ()

    @property
    def keys_needed(self) -> int | None:
        """How many of the last keys a query may need, its own and those of the summaries' open blocks
        included; None: all. Where both methods of a layer need some only, and have the same summaries, its
        store drops the others."""
        return None

    @property
    def evict(self) -> bool:
        """Whether stores drop the keys that it evicts, as ``eviction`` says. That takes a cache of plain
        numbers in the memory of the device."""
        return False

    @property
    def evicts_in_some_heads(self) -> bool:
        """Whether ``eviction`` may name some KV heads of a layer alone, which then hold fewer keys than the
        others. That takes a cache on one device."""
        return False

    @property
    def last_queries(self) -> int:
        """How many of a prefill call's last queries ``prepare_prefill`` receives; 0: it is not called."""
        return 0

    @property
    def observation_window(self) -> int | None:
        """How many of a prefill call's last queries ``on_prefill_end`` receives; None: all of them."""
        return 1

    @property
    def block_multiple(self) -> int:
        """Prefill chunks are rounded to a multiple of this many tokens."""
        return 1

    @property
    def anchored_queries(self) -> bool:
        """Whether it pools queries in blocks that are counted from the row's first position. Otherwise they
        are counted from the first query of a call, which may begin inside a block."""
        return False

    @property
    def couples_heads(self) -> bool:
        """Whether it decides something for all KV heads of a layer jointly. Such a method cannot run under
        tensor parallelism, where a rank holds only some of them."""
        return False

    @property
    def dense_layers(self) -> int:
        """Layers below this one are left dense."""
        return 0

    @property
    def over(self) -> AttentionMethod | None:
        """The method that this one goes over, which has a recipe of its own; None for most methods."""
        return None

    @property
    def recipe(self) -> str:
        """The path of its own recipe, which comes before the one that ``patch`` is given; "" for none."""
        return ""

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the files besides a recipe that its parameters name: other contents, another method."""
        return ()

    # --- how it is bound to a layer -----------------------------------------------------------------------

    def for_layer(self, layer: LayerInfo) -> AttentionMethod | None:
        """This method as layer ``layer`` runs it, or None where the method itself leaves the layer dense."""
        return None if layer.index < self.dense_layers else self

    @property
    def recipe_maker(self) -> str:
        """The call that makes its recipe, for errors: training, its calibration, or saving its module."""
        if self.trains:
            own: Any = self
            return f"'farspan train {dataclasses.replace(own, recipe='') if self.recipe else own}'"
        if type(self).calibration is AttentionMethod.calibration:
            return f"patched.recipe({self.name!r}).save(PATH)"
        return f"'farspan calibrate --method {self.name}'"

    @property
    def recipe_given(self) -> str:
        """How to name its recipe, for errors: to ``patch``, or also in its spec where it has the field."""
        named = "recipe" in {field.name for field in dataclasses.fields(self)}
        return "recipe=PATH" + (f", or '{self.name}:recipe=PATH'" if named else "")

    def calibration(self, layer: LayerInfo, *args: Any, **options: Any) -> Calibration:
        """What learns the weights of ``layer`` that this method needs. Raises FarspanError for a method that
        needs none and for options it cannot take."""
        raise FarspanError(f"{self.name} is not calibrated: it learns nothing from a text.")

    # --- how it is trained --------------------------------------------------------------------------------

    @property
    def trains(self) -> bool:
        """Whether its module is trained on a frozen model, by ``distillation_loss`` or ``blended``."""
        own, base = type(self), AttentionMethod
        return self.observes or self.blends or own.distillation_loss is not base.distillation_loss

    @property
    def observes(self) -> bool:
        """Whether what a window teaches can be kept, so that one pass of the model serves many steps."""
        return type(self).loss_of is not AttentionMethod.loss_of

    @property
    def blends(self) -> bool:
        """Whether its module is trained by what ``blended`` makes of the model's answers."""
        return type(self).blended is not AttentionMethod.blended

    def for_training(self, layer: LayerInfo) -> AttentionMethod | None:
        """This method with a new ``module`` for ``layer``, at the weights that training begins with; None
        where it leaves the layer dense. ``layer.weights`` is None. Raises FarspanError for a method that is
        not trained."""
        raise FarspanError(f"{self.name} is not trained: it has no weights that a text could teach.")

    def distillation_loss(self, q: Tensor, keys: Keys) -> Tensor:
        """The loss of ``module`` on one window of a text, a scalar with a gradient in its parameters.

        q [B, H, T, D] are all queries of the window, keys its keys and values, from the model's own dense
        attention; no row is padded. ``keys.inputs`` feeds what ``needs`` names, queries and keys before RoPE
        in float32. The loss is a mean over rows and queries, so that it does not depend on B or T."""
        return self.loss_of(self.observed(q, keys))

    def blended(self, q: Tensor, kv: KV, softmax: Softmax) -> Tensor:
        """The attention [B, H, T, D] of a window in training, differentiable in ``module``: the layer's
        output goes on through the model, whose last hidden states have the loss. q [B, H, T, D] are all
        queries of the window."""
        raise FarspanError(f"{self.name} is not trained: it has no weights that a text could teach.")

    def observed(self, q: Tensor, keys: Keys) -> State:
        """What ``loss_of`` needs of one window, without a gradient and independent of ``module``. It should
        be small beside the keys, such as pooled queries and keys: training keeps it for later steps."""
        raise FarspanError(f"{self.name} is not trained: it has no weights that a text could teach.")

    def loss_of(self, observed: State) -> Tensor:
        """The ``distillation_loss`` of one window, from what ``observed`` has returned for it."""
        raise FarspanError(f"{self.name} is not trained: it has no weights that a text could teach.")

    # --- what it reads ------------------------------------------------------------------------------------

    def cost(self, phase: str, length: int, *, head_dim: int = 128, element_size: int = 2) -> Cost:
        """What a layer that it serves reads in a phase at a length, by its own declaration. head_dim: numbers
        of a key; element_size: bytes of a number."""
        queries = Queries(phase=phase, length=length, head_dim=head_dim, element_size=element_size)
        return self.reads(queries) if self.selective and phase in self.phases else queries.cost()

    def reads(self, queries: Queries) -> Cost:
        """Declares what ``queries`` of a phase that it selects in read. A method that declares nothing may
        read every key, and counts as dense."""
        return queries.cost(exact=False)

    def prepare_prefill(self, q: Tensor, keys: Keys) -> State:
        """Called once per prefill call, before ``select_prefill``, with its last ``last_queries`` queries
        q [B, H, n, D] and all its keys. What it returns is ``keys.prepared`` in ``select_prefill``, which may
        be called with some of the call's queries."""
        return {}

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        """Which keys each prefill query reads; None means all. q [1, H, Tq, D]: it is called for each row of
        a padded batch."""
        return None

    def on_prefill_end(self, q: Tensor, keys: Keys) -> None:
        """Called after a prefill call, to set up state from its last ``observation_window`` queries
        q [B, H, n, D], fewer if the call has fewer."""

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        """Which keys each decode query reads, one selection per query. q [B, H, Tq, D], Tq <= 16; None means
        all."""
        return None

    def eviction(self, keys: Keys, phase: str) -> Eviction | None:
        """Called after a call of ``phase`` that this method has served for all rows, where ``evict`` is true:
        which of the keys stay; None: all. It keeps ``keys.state`` true of these."""
        return None

    def keys_left(self, phase: str, length: int) -> float:
        """How many keys of ``length`` positions are left after a call of ``phase``, where ``evict`` is true:
        the mean over the KV heads. Unless a method says otherwise, those are the keys that the last query has
        read."""
        return self.cost(phase, length).last

    @property
    def has_static_step(self) -> bool:
        """Whether it has a ``static_step`` at its parameters."""
        return type(self).static_step is not AttentionMethod.static_step

    def static_step(self, keys: StaticKeys) -> StaticStep | None:
        """The fused step by which it serves the next token on a store of fixed size, where all rows can take
        it; None: the token is served by ``select_decode``. It is called on the host and changes nothing."""
        return None

    def __str__(self) -> str:
        changed = [
            f"{f.name}={f'({value})' if isinstance(value, AttentionMethod) else value}"
            for f in dataclasses.fields(self)
            if f.repr and (value := getattr(self, f.name)) != f.default
        ]
        return self.name + (":" + ",".join(changed) if changed else "")


def registered() -> dict[str, type[AttentionMethod]]:
    """The methods defined so far, by name; ``spec.methods`` defines farspan's own first."""
    return dict(sorted(_REGISTRY.items()))


def _selected_phases(cls: type[AttentionMethod]) -> frozenset[str]:
    """The phases whose ``select_*`` the class does not have from the base."""
    own = {
        PREFILL: cls.select_prefill is not AttentionMethod.select_prefill,
        DECODE: cls.select_decode is not AttentionMethod.select_decode,
    }
    return frozenset(phase for phase, overridden in own.items() if overridden)
