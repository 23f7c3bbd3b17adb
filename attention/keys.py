"""What a method sees of a layer's keys at one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .errors import FarspanError
from .kv import KV
from .needs import Inputs
from .parts import Evicted, PartedKV, of_heads
from .softmax import Softmax
from .some_rows import SomeRows
from .sources import Supply
from .summary import Summaries, Summary

State = dict[str, Tensor]


class Peers(Protocol):
    """The other ranks of a sequence whose keys are sharded; every rank calls these methods in the same
    order."""

    def softmax(self, logits: Tensor) -> Tensor:
        """logits [..., N] float32 of the keys of this rank -> their softmax over the keys of all ranks."""
        ...

    def candidates(self, ranked: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Scores [..., N] of the keys of this rank (-inf: not a candidate) -> scores and positions [..., M]
        of keys, ascending by position, among them the ``size`` highest of all ranks; the same on every
        rank."""
        ...

    def gather(self, x: Tensor, length: int) -> Tensor:
        """Numbers [..., N] of those of the first ``length`` keys that this rank holds -> [..., length], of
        all of them."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x [...] over all ranks; the same on every rank."""
        ...

    def share(self, count: int) -> range:
        """Those of ``count`` things that every rank has which this rank takes; each is one rank's."""
        ...


@dataclass(kw_only=True)
class Keys:
    """The keys and values of one layer, the new ones included, and what is kept beside them.

    kv:    [B, Hkv, Tk], a read-only view of the store; the queries of the call are the last ``tq``
           positions. Where ``peers`` hold keys too, only N of the Tk are here.
    dropped: how many of the first positions have no keys any more, since no method of the layer needs them;
           kv has those of the other positions.
    evicted: by row, how many keys every KV head has evicted, each its own; None where all are here. Positions
           are then counted over the keys that are left, of which a row has the last ones.
    start: [B], each row's first valid position under left padding, or None where no row is padded. It is Tk
           in a row that has no token yet; ``on_prefill_end`` may meet such a row, ``select_*`` never does.
    ends:  where each row ends under right padding, on the host, or None where no row is padded there;
           ``select_*`` never meets such a row.
    softmax: how the layer turns q k^T into weights. Its window is None: layers with one select nothing.
    state: tensors that a method keeps over time, batch first; empty after a crop, a reset and in a new cache.
    fed: what the call feeds besides keys and values, where some method of the layer needs it; methods read it
           as ``inputs``.
    supply: what summaries are computed from besides kv; None: ``fed``, as in a first call.
    """

    kv: KV
    tq: int
    softmax: Softmax
    dropped: int = 0
    evicted: Sequence[int] | None = None
    start: Tensor | None = None
    state: State = field(default_factory=dict)
    summaries: Summaries = field(default_factory=Summaries)
    summary_bytes: int = 0  # bytes of summaries and keys that selection has read in this call
    starts: list[int] | None = None  # ``start`` on the host
    ends: list[int] | None = None
    peers: Peers | None = None
    prepared: State = field(default_factory=dict)  # what prepare_prefill has found in the call
    fed: Inputs | None = field(default=None, repr=False)
    supply: Supply | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.start is not None and self.starts is None:
            self.starts = self.start.tolist()

    @property
    def length(self) -> int:
        """Tk, the number of positions."""
        return self.dropped + self.kv.length

    @property
    def start_here(self) -> Tensor | None:
        """``start``, counted from the first key of ``kv``."""
        return (
            self.start if self.start is None or not self.dropped else (self.start - self.dropped).clamp(min=0)
        )

    @property
    def past(self) -> int:
        """Position of the first query of the call."""
        return self.length - self.tq

    @property
    def inputs(self) -> Inputs:
        """Queries and keys before RoPE and hidden states of the call's queries. Raises FarspanError where the
        call feeds none: only calls of a patched model do, for methods whose ``needs`` name some."""
        if self.fed is None:
            raise FarspanError(
                "This call has no queries or keys before RoPE and no hidden states: only calls of a patched "
                "model feed them, to methods whose needs name them."
            )
        return self.fed.last(self.tq)

    def held(self, length: int) -> int:
        """How many of the first ``length`` keys are here; they come first."""
        return max(0, length - self.dropped)

    def longest(self) -> int:
        """Most keys that the call's last query sees in any row."""
        return self.length - (min(self.starts) if self.starts else 0)

    def fewest(self) -> int:
        """Fewest keys that the call's first query sees in any row."""
        return self.past + 1 - max(self.starts or (0,))

    def seen(self) -> Tensor:
        """[B or 1, 1, Tq] int64, how many keys each query sees."""
        count = torch.arange(self.past + 1, self.length + 1, device=self.kv.device)[None, None]
        return count if self.start is None else count - self.start[:, None, None]

    def entries(self, summary: Summary) -> Tensor:
        """Entries [B, Hkv, ceil(Tk / block), width] of a summary, up to date, to be attended to: they count
        as keys.

        Those of blocks are counted from the row's start. Of labels (block None) there are N, those of the
        keys that are here."""
        return self.summaries.get(summary, self._supply(), self.starts)

    def summary(self, summary: Summary, *, rows: Tensor | None = None) -> Tensor:
        """``entries`` to select by; what selection read is counted. rows [R] int64: of these rows of the
        batch alone."""
        entries = self.entries(summary)
        entries = entries if rows is None else entries[rows]
        self.summary_bytes += entries.numel() * entries.element_size()
        return entries

    def read_all_keys(self) -> Tensor:
        """The raw keys that are here, for a method that scores every one of them; the reading is counted."""
        self.summary_bytes += self.kv.key_nbytes
        return self.kv.k

    def read_key_blocks(self, end: int) -> Iterator[Tensor]:
        """The raw keys of the positions before ``end`` that are here, in parts where they lie in another
        memory; the reading of all keys is counted."""
        self.summary_bytes += self.kv.key_nbytes
        return (block.k for block in self.kv[:, :, : self.held(end)].blocks())

    def read_keys(self, first: int, end: int) -> Tensor:
        """The raw keys of positions first .. end - 1, for a method that scores these alone; the reading is
        counted."""
        kv = self.kv[:, :, self.held(first) : self.held(end)]
        self.summary_bytes += kv.key_nbytes
        return kv.k

    def places(self) -> Tensor:
        """[N] int64, the positions of the keys that are here."""
        return torch.arange(self.dropped, self.length, device=self.kv.device)

    def visible(self) -> Tensor | None:
        """[B or 1, Tq, N] bool: the keys here that each query sees; None where all do."""
        if self.tq == 1 and self.start is None:
            return None
        rows = torch.arange(self.past, self.length, device=self.kv.device)[None, :, None]
        first = 0 if self.start is None else self.start[:, None, None]
        cols = self.places()
        return (cols <= rows) & (cols >= first)

    def row(self, b: int) -> Keys:
        """Row b alone, its padding cut off: what the method would see if the row were not in a batch."""
        rows = slice(b, b + 1)
        first = 0 if self.starts is None else self.starts[b]
        end = self.length if self.ends is None else self.ends[b]
        summaries = SomeRows(self.summaries, self._supply(), self.starts, rows, first, end)
        if isinstance(self.kv, PartedKV):
            kv: KV = self.kv.row(b, first, end)
        else:
            kv = self.kv[rows, :, self.held(first) : self.held(end)]
        return Keys(
            kv=kv,
            dropped=max(0, self.dropped - first),
            evicted=None if self.evicted is None else self.evicted[rows],
            tq=max(0, end - max(first, self.past)),
            softmax=self.softmax,
            summaries=summaries,
            fed=None if self.fed is None else self.fed.part(rows, first, end),
        )

    def some_rows(self, rows: slice, state: State) -> Keys:
        """Some rows of the batch with what is kept of them, ``state``; their padding stays."""
        if rows == slice(0, self.kv.batch):
            return dataclasses.replace(self, state=state, summary_bytes=0)
        starts = None if self.starts is None else self.starts[rows]
        padded = starts is not None and any(starts)
        return dataclasses.replace(
            self,
            kv=self.kv[rows],
            evicted=None if self.evicted is None else self.evicted[rows],
            start=self.start[rows] if padded and self.start is not None else None,
            starts=starts if padded else None,
            ends=None if self.ends is None else self.ends[rows],
            state=state,
            summaries=SomeRows(self.summaries, self._supply(), self.starts, rows),
            summary_bytes=0,
            fed=None if self.fed is None else self.fed.part(rows),
            supply=None,
        )

    @property
    def parted(self) -> bool:
        """Whether some KV heads have other keys than the others."""
        return isinstance(self.kv, PartedKV)

    def check_evicting(self, heads: tuple[int, ...]) -> None:
        """Raise FarspanError where other KV heads than ``heads`` have evicted keys."""
        if isinstance(self.kv, PartedKV) and self.kv.evicting != heads:
            raise FarspanError(
                "Other KV heads of this cache have evicted keys than those of this method: use the cache "
                "with the recipe that has filled it, or start a new cache."
            )

    def of_heads(self, heads: tuple[int, ...]) -> Keys:
        """Some KV heads with the keys that they have; all that evict, or all the others."""
        if not isinstance(self.kv, PartedKV):
            return dataclasses.replace(self, kv=of_heads(self.kv, heads))
        part = next(part for part in self.kv.parts if part.heads == heads)
        return self.compacted(part.kv, part.evicted)

    def compacted(self, kv: KV, evicted: Evicted | None) -> Keys:
        """These keys where ``kv`` [B, heads, N] are those that are left."""
        gone = self.length - kv.length
        starts, start = self.starts, self.start
        if evicted is not None:
            starts, start = evicted.moved(starts, start, gone)
        return dataclasses.replace(
            self,
            kv=kv,
            dropped=0,
            evicted=None if evicted is None else evicted.counts,
            start=start,
            starts=starts,
            supply=None,
        )

    def _supply(self) -> Supply:
        if self.supply is None:
            return Supply(self.kv, fed=self.fed, dropped=self.dropped)
        given = self.supply
        return Supply(self.kv, given.q, given.fed, given.recent, self.dropped)
