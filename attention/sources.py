"""What summaries are computed from, and what is kept of it between calls.

Keys and values are in the store. Queries and hidden states are in no cache, so the latest of them are kept
beside the summaries that read them: those of the blocks that later tokens still complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .errors import FarspanError
from .kv import KV
from .needs import Inputs

Source = Literal[
    "keys",
    "values",
    "queries",
    "keys_before_rope",
    "hidden_states",
    "early_hidden_states",
    "positions",
]
IN_NO_CACHE: frozenset[Source] = frozenset({"queries", "hidden_states", "early_hidden_states"})


class Sources:
    """What a summary reads of a range of T positions.

    tensors: by name, each [B, any, T, any]; hidden states are [B, 1, T, hidden], positions [B, 1, T, 1].
    """

    def __init__(self, tensors: Mapping[Source, Tensor]) -> None:
        self.tensors = dict(tensors)

    @property
    def keys(self) -> Tensor:
        """[B, Hkv, T, D], after RoPE."""
        return self._named("keys")

    @property
    def values(self) -> Tensor:
        """[B, Hkv, T, Dv]."""
        return self._named("values")

    @property
    def queries(self) -> Tensor:
        """[B, H, T, D], after RoPE."""
        return self._named("queries")

    @property
    def keys_before_rope(self) -> Tensor:
        """[B, Hkv, T, D], behind the norm that some layers have for keys."""
        return self._named("keys_before_rope")

    @property
    def hidden_states(self) -> Tensor:
        """[B, T, hidden], as the layer's attention module gets them."""
        return self._named("hidden_states")[:, 0]

    @property
    def early_hidden_states(self) -> Tensor:
        """[B, T, hidden], as the attention module of the earlier layer in the method's needs gets them."""
        return self._named("early_hidden_states")[:, 0]

    @property
    def positions(self) -> Tensor:
        """[B, T] int64, the position ids by which queries and keys were rotated."""
        return self._named("positions")[:, 0, :, 0]

    @property
    def length(self) -> int:
        """T."""
        return next(iter(self.tensors.values())).shape[2]

    @property
    def batch(self) -> int:
        """B."""
        return next(iter(self.tensors.values())).shape[0]

    def cut(self, begin: int = 0, end: int | None = None, rows: slice | list[int] = slice(None)) -> Sources:
        """Those of the positions begin .. end - 1 of the range, of some rows of the batch."""
        return Sources({name: x[rows][:, :, begin:end] for name, x in self.tensors.items()})

    def map(self, change: Callable[[Tensor], Tensor]) -> Sources:
        """``change`` of each tensor."""
        return Sources({name: change(x) for name, x in self.tensors.items()})

    def followed_by(self, *later: Sources) -> Sources:
        """These and those of the positions that follow."""
        return Sources(
            {name: torch.cat([x, *(s.tensors[name] for s in later)], 2) for name, x in self.tensors.items()}
        )

    def _named(self, name: Source) -> Tensor:
        if name not in self.tensors:
            raise FarspanError(
                f"A summary computes from {name} and does not declare it: add it to its reads."
            )
        return self.tensors[name]


@dataclass(frozen=True)
class Recent:
    """What is kept of the last positions before ``end``: tensors [B, any, n, any] by name."""

    tensors: Mapping[Source, Tensor] = field(default_factory=dict)
    end: int = 0

    def begin(self, name: Source) -> int:
        """The first position of which ``name`` is kept; ``end`` where it is not kept."""
        return self.end - (self.tensors[name].shape[2] if name in self.tensors else 0)

    def since(self, name: Source, first: int, end: int) -> Tensor:
        """Those of the positions first .. end - 1. Raises FarspanError where they are not kept."""
        begin = self.begin(name)
        if self.end != end or first < begin:
            what = name.replace("_", " ")
            raise FarspanError(
                f"A summary needs the {what} of the tokens from position {first} on, and this cache keeps "
                f"those from position {begin if self.end == end else end} on: it was cropped too far back, "
                "filled under another patch, or its mask was changed. Start a new cache."
            )
        return self.tensors[name][:, :, first - begin :]

    def followed_by(self, new: Mapping[Source, Tensor], past: int, keep: int) -> Recent:
        """The last ``keep`` of these and ``new``, which begin at position ``past``."""
        kept, end = {}, past
        for name, x in new.items():
            old = self.tensors.get(name) if self.end == past else None
            parts = [x] if old is None or x.shape[2] >= keep else [old, x]
            # a copy, so that the rest of the call's tensor is freed
            kept[name] = torch.cat([part[:, :, -keep:] for part in parts], 2)[:, :, -keep:].clone()
            end = past + x.shape[2]
        return Recent(kept, end)

    def preceded_by(self, name: Source, head: Tensor, known: int) -> Recent:
        """With the positions ``head`` of ``name``, the last of which is known - 1; these end there where
        nothing later is kept."""
        kept = {} if known > self.end else dict(self.tensors)
        kept[name] = torch.cat([head, kept[name]], 2) if name in kept else head
        return Recent(kept, max(known, self.end))

    def crop(self, length: int) -> Recent:
        """Without the positions at or after ``length``."""
        if length >= self.end:
            return self
        kept = {name: x[:, :, : max(0, x.shape[2] - (self.end - length))] for name, x in self.tensors.items()}
        return Recent(kept, length)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> Recent:
        """``change`` of the batch dimension of each tensor."""
        return Recent({name: change(x) for name, x in self.tensors.items()}, self.end)


_NOTHING = Recent()


@dataclass(frozen=True)
class Supply:
    """What one call of a layer has for summaries.

    kv: [B, Hkv, Tk - dropped], keys and values of all positions but the first ``dropped``. q: [B, H, Tq, D],
    the call's own queries. fed: the call's inputs. recent: what is kept of earlier calls.
    """

    kv: KV
    q: Tensor | None = None
    fed: Inputs | None = None
    recent: Recent = _NOTHING
    dropped: int = 0

    @property
    def length(self) -> int:
        """Tk, the number of positions."""
        return self.dropped + self.kv.length

    def sources(self, reads: Iterable[Source], first: int, end: int | None = None) -> Sources:
        """Those of the positions first .. end - 1; None: all from ``first`` on. Raises FarspanError for what
        the call does not have."""
        found: dict[Source, Tensor] = {}
        count = None if end is None else end - first
        for name in reads:
            if name == "keys":
                found[name] = self._kv(first)[:, :, :count].k
            elif name == "values":
                found[name] = self._kv(first)[:, :, :count].v
            elif name == "keys_before_rope":
                found[name] = self._inputs(name).stored_before_rope(self._kv(first)[:, :, :count].k, first)
            elif name == "positions":
                found[name] = self._positions(first)[:, :, :count]
            else:
                found[name] = self._since(name, first)[:, :, :count]
        return Sources(found)

    def own(self, names: Iterable[Source]) -> dict[Source, Tensor]:
        """``names`` out of queries and hidden states, of the call's own positions."""
        return {name: self._own(name) for name in names}

    def _kv(self, first: int) -> KV:
        if first < self.dropped:
            raise FarspanError(
                f"A summary needs the keys of the tokens from position {first} on, and this cache has "
                f"dropped those before position {self.dropped}: use it with the method that has filled it, "
                "or start a new cache."
            )
        return self.kv[:, :, first - self.dropped :]

    def _since(self, name: Source, first: int) -> Tensor:
        own = self._own(name)
        past = self.length - own.shape[2]
        if first >= past:
            return own[:, :, first - past :]
        return torch.cat([self.recent.since(name, first, past), own], 2)

    def _own(self, name: Source) -> Tensor:
        if name == "hidden_states":
            return self._inputs(name).hidden_states[:, None]
        if name == "early_hidden_states":
            return self._inputs(name).early_hidden_states[:, None]
        return self._inputs(name).q if self.q is None else self.q

    def _positions(self, first: int) -> Tensor:
        places = self._inputs("positions").places
        if places is None:
            raise FarspanError(
                "A summary reads positions in a layer that has none: its method must declare "
                "keys_before_rope or queries_before_rope in its needs, and the layer must have RoPE."
            )
        return places[:, None, first:, None].long()

    def _inputs(self, name: Source) -> Inputs:
        if self.fed is None:
            raise FarspanError(
                f"A summary reads {name} in a call that feeds none: its method must declare them in its "
                "needs, and run in a patched model."
            )
        return self.fed
