"""What a method declares that it needs, and what a call feeds it besides the stored keys and values.

A learned gate scores blocks by queries and keys before RoPE, or by the layer's hidden states. None of these
is in a KV cache. The runtime catches them at the layer's attention module, only where some method of the
layer needs them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .errors import FarspanError

Undo = Callable[[Tensor, Tensor], Tensor]
"""(x [B, heads, n, D], positions [B, n]) -> x as it was before RoPE at these positions, in the dtype of x."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method needs besides queries, summaries and positions.

    keys: raw keys in prefill (``prepare_prefill`` or ``select_prefill`` reads them).
    queries_before_rope, keys_before_rope, hidden_states: what ``Keys.inputs`` has in every call. Summaries of
    keys before RoPE need ``keys_before_rope``, too.
    early_hidden_states: the layer whose attention module's hidden states ``Keys.inputs`` has in every call,
    the method's own layer or an earlier one; None: not needed.
    sentence_ends: whether ``distillation_loss`` needs ``Keys.inputs.sentence_ends``. Only training feeds it.
    weights: the tensors that ``for_layer`` takes from a recipe, by name, each with its shape. A dimension is
    a number, the name of a head count or size of ``LayerInfo`` (of the whole layer, also under tensor
    parallelism), or None for any size. A method with weights cannot run without a recipe.
    instead: what a user can do instead of giving a recipe, for the error.
    """

    keys: bool = False
    queries_before_rope: bool = False
    keys_before_rope: bool = False
    hidden_states: bool = False
    early_hidden_states: int | None = None
    sentence_ends: bool = False
    weights: Mapping[str, tuple[int | str | None, ...]] = field(default_factory=dict)
    instead: str = ""

    @property
    def recipe(self) -> bool:
        """Whether the method takes weights from a recipe."""
        return bool(self.weights)

    @property
    def before_rope(self) -> bool:
        """Whether RoPE has to be undone."""
        return self.queries_before_rope or self.keys_before_rope

    @property
    def inputs(self) -> bool:
        """Whether calls must feed ``Keys.inputs``."""
        return self.before_rope or self.hidden_states or self.early_hidden_states is not None

    def __or__(self, other: Needs) -> Needs:
        """What either of two methods needs. Raises FarspanError where they need hidden states of different
        earlier layers."""
        both = (self.early_hidden_states, other.early_hidden_states)
        early = {layer for layer in both if layer is not None}
        if len(early) > 1:
            raise FarspanError(
                f"The methods of a layer need hidden states of the layers {sorted(early)}, and a call keeps "
                "those of one earlier layer: give both methods the same one."
            )
        return Needs(
            keys=self.keys or other.keys,
            queries_before_rope=self.queries_before_rope or other.queries_before_rope,
            keys_before_rope=self.keys_before_rope or other.keys_before_rope,
            hidden_states=self.hidden_states or other.hidden_states,
            early_hidden_states=next(iter(early), None),
            sentence_ends=self.sentence_ends or other.sentence_ends,
            weights={**self.weights, **other.weights},
            instead=self.instead or other.instead,
        )


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one call of a layer feeds a method. A method reads the parts that its ``needs`` name.

    q, k: the call's own queries [B, H, Tq, D] and keys [B, Hkv, Tq, D], after RoPE. hidden: [B, Tq, hidden].
    length: Tk, the number of positions, the call's own included. places: [B, n], the position ids by which
    the last n of them were rotated, n = Tk on one device and Tq over ranks. frequencies: [R], descending, of
    the layer's RoPE: pair i is rotated by ``frequencies[i]`` radians per position. places, frequencies and
    ``undo`` are None where the layer has no RoPE. early: [B, Tq, hidden], hidden states of an earlier layer.
    ends: [B, Tq] bool, in training alone: the tokens that end a sentence.
    """

    needs: Needs
    q: Tensor
    k: Tensor
    hidden: Tensor
    length: int
    places: Tensor | None = None
    undo: Undo | None = None
    frequencies: Tensor | None = None
    early: Tensor | None = None
    ends: Tensor | None = None

    @property
    def tq(self) -> int:
        """Number of the call's own positions."""
        return self.q.shape[2]

    @property
    def queries_before_rope(self) -> Tensor:
        """[B, H, Tq, D]: behind the norm that some layers have for queries, before RoPE."""
        self._check("queries_before_rope")
        return self._before_rope(self.q, self.length - self.tq)

    @property
    def keys_before_rope(self) -> Tensor:
        """[B, Hkv, Tq, D] of the call's own positions: behind the norm that some layers have for keys, before
        RoPE."""
        self._check("keys_before_rope")
        return self._before_rope(self.k, self.length - self.tq)

    @property
    def hidden_states(self) -> Tensor:
        """[B, Tq, hidden], as the layer's attention module gets them, which is behind the layer's norm."""
        self._check("hidden_states")
        return self.hidden

    @property
    def early_hidden_states(self) -> Tensor:
        """[B, Tq, hidden], as the attention module of the layer that ``needs`` names gets them. Raises
        FarspanError outside a call of the whole decoder, as when gradient checkpointing repeats a layer."""
        self._check("early_hidden_states")
        if self.early is None:
            raise FarspanError(
                f"This call has no hidden states of layer {self.needs.early_hidden_states}: they are kept "
                "while the whole decoder runs, so call the whole model, without gradient checkpointing."
            )
        return self.early

    @property
    def sentence_ends(self) -> Tensor:
        """[B, Tq] bool, the tokens that end a sentence. Raises FarspanError outside training."""
        self._check("sentence_ends")
        if self.ends is None:
            raise FarspanError("This call has no sentence ends: only 'farspan train' feeds them.")
        return self.ends

    @property
    def positions(self) -> Tensor | None:
        """[B, Tq], the position ids of the call's own tokens; None where the layer has no RoPE."""
        return None if self.places is None else self.places[:, self.places.shape[1] - self.tq :]

    def stored_before_rope(self, k: Tensor, first: int) -> Tensor:
        """Stored keys k [B, Hkv, n, D] of positions first .. first + n - 1, as they were before RoPE.

        They are computed from the stored keys and their position ids. A second copy of all keys would take
        half as much memory as the cache. A copy of the last block alone is lost when a crop opens an earlier
        block. Stored keys and position ids follow every crop, reorder, copy and padding of the cache.
        """
        self._check("keys_before_rope")
        return self._before_rope(k, first)

    def part(self, rows: slice, first: int = 0, end: int | None = None) -> Inputs:
        """The inputs of ``rows`` of the batch, whose keys are cut to positions first .. end - 1."""
        end, past = self.length if end is None else end, self.length - self.tq
        base = 0 if self.places is None else self.length - self.places.shape[1]
        own = slice(max(first - past, 0), max(end - past, 0))
        return dataclasses.replace(
            self,
            q=self.q[rows, :, own],
            k=self.k[rows, :, own],
            hidden=self.hidden[rows, own],
            early=None if self.early is None else self.early[rows, own],
            ends=None if self.ends is None else self.ends[rows, own],
            length=end - first,
            places=None if self.places is None else self.places[rows, max(first - base, 0) : end - base],
        )

    def last(self, count: int) -> Inputs:
        """The inputs of the last ``count`` of the call's own positions."""
        if count == self.tq:
            return self
        own = slice(self.tq - count, self.tq)
        q, k, hidden = self.q[:, :, own], self.k[:, :, own], self.hidden[:, own]
        early, ends = (None if x is None else x[:, own] for x in (self.early, self.ends))
        return dataclasses.replace(self, q=q, k=k, hidden=hidden, early=early, ends=ends)

    def own(self) -> dict[str, Tensor]:
        """The parts that ``needs`` name, and what undoes RoPE in them, of the call's own positions; by name,
        each [B, any, Tq, any]."""
        parts = {}
        if self.needs.queries_before_rope:
            parts["q"] = self.q
        if self.needs.keys_before_rope:
            parts["k"] = self.k
        if self.needs.hidden_states:
            parts["hidden"] = self.hidden[:, None]
        if self.needs.early_hidden_states is not None:
            parts["early"] = self.early_hidden_states[:, None]
        if (positions := self.positions) is not None:
            parts["places"] = positions[:, None, :, None]
        return parts

    def of(self, own: Mapping[str, Tensor], length: int) -> Inputs:
        """The inputs of a call whose ``own`` is given, and which ends after ``length`` positions. What
        ``needs`` do not name has no numbers in it."""
        n = next(iter(own.values())).shape[2]
        nothing = self.q.new_empty(*self.q.shape[:2], n, 0)
        hidden, early, places = (own.get(name) for name in ("hidden", "early", "places"))
        return dataclasses.replace(
            self,
            q=own.get("q", nothing),
            k=own.get("k", nothing),
            hidden=nothing[:, 0] if hidden is None else hidden[:, 0],
            early=None if early is None else early[:, 0],
            length=length,
            places=None if places is None else places[:, 0, :, 0],
        )

    def _before_rope(self, x: Tensor, first: int) -> Tensor:
        if self.undo is None or self.places is None:
            return x
        first -= self.length - self.places.shape[1]
        return self.undo(x, self.places[:, first : first + x.shape[2]])

    def _check(self, name: str) -> None:
        declared = getattr(self.needs, name)
        if declared is None or declared is False:
            raise FarspanError(f"A method reads {name} and does not declare it: add it to its needs.")
