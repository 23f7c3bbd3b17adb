"""The key source of a layer call whose sequence is sharded over ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..attention.attend import DECODE_ROWS, Reads
from ..attention.dense import Dense
from ..attention.keys import State
from ..attention.kv import KV
from ..attention.mass import Probe
from ..attention.method import DECODE, AttentionMethod
from ..attention.needs import Inputs
from ..attention.ops.flash import flash
from ..attention.partial import Partial
from ..attention.softmax import Softmax
from ..attention.some_rows import SomeRows
from ..attention.sources import Supply
from ..attention.summary import Summaries
from ..parallel.group.mesh import Mesh
from ..parallel.mechanisms.call import Call, LocalCall, Shard, Travel
from ..parallel.mechanisms.decode import decode
from ..parallel.mechanisms.gather import rearranged
from ..parallel.mechanisms.keys import ShardedKeys
from ..parallel.mechanisms.layout import Layout
from ..parallel.mechanisms.prefill import prefill
from ..parallel.mechanisms.selected import last_inputs, last_queries
from .inputs import Given
from .layer_call import LayerCall, LocalKeys, evict
from .padding import Padding
from .rows import Run
from .store.shard import ShardStore
from .supply_over_ranks import SupplyOverRanks

_CALL = "_farspan_call"
_SHORT = "the prompt is so short that every rank computes it"
_DENSE = Dense()


def carrier(call: Call, device: torch.device) -> Tensor:
    """A mask of one element that carries ``call`` to every layer. It also reaches a layer that gradient
    checkpointing runs again in the backward pass."""
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    setattr(mask, _CALL, call)
    return mask


def carried(mask: Tensor | None) -> Call | None:
    """The call that the mask carries; None without one."""
    return getattr(mask, _CALL, None)


class KeysOverRanks:
    """The keys of a layer call whose sequence is sharded over ranks (a ``KeySource``).

    q [B, H, n, D], k, v [B, Hkv, n, D]: this rank's part of the call's tokens, by ``call.split``. Without a
    split they are all tokens, the same on every rank.
    ends: the positions at which rows end; None without padding on the right.
    kept: whether ``store`` belongs to a cache, so that later calls read it.
    given: the inputs of the attention module, where a method of the layer needs them.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        store: ShardStore,
        call: Call,
        mesh: Mesh,
        softmax: Softmax,
        *,
        ends: list[int] | None,
        kept: bool,
        given: Given | None = None,
    ) -> None:
        self.q, self.k, self.v, self.store, self.mesh = q, k, v, store, mesh
        self.softmax, self.ends, self.kept = softmax, ends, kept
        self.past, self.total, self.start, self.starts = call.past, call.total, call.start, call.starts
        self.short, self.evicted = call.split is None and call.past > 0, bool(store.evicted_by)
        self.call = call if store.evicted is None else call.compacted(store.gone, store.evicted)
        self.states = store.states
        self._local: LocalCall | None = None  # for a call that is split
        self._gathered: Inputs | None = None
        self._sent = mesh.sent()
        self._fed = None if given is None else given.own(q, k)

    def require(self, needed: int | None, evicting: str) -> None:
        self.store.require(needed, self.past, evicting)

    def begin(self, layer: LayerCall) -> None:
        """Store the new keys and values, and update the summaries that the methods declare."""
        store, call, mesh = self.store, self.call, self.mesh
        supply = SupplyOverRanks(self.q, self.k, self.v, store, call, self._fed)
        supply.take()
        store.align(self.starts, self.total)
        supply.extend_blocks(layer.prefill, layer.decode)
        supply.extend_labels(layer.prefill, layer.decode)
        if call.split is not None:
            self._local = LocalCall(
                self.q,
                self.k,
                self.v,
                store.shard,
                call,
                mesh,
                self.softmax,
                fed=self._fed,
                labels=supply.gather_labels(layer.prefill),
            )

    def newly_sent(self) -> int:
        """Bytes that this rank has sent since the previous call of ``newly_sent``."""
        before, self._sent = self._sent, self.mesh.sent()
        return self._sent - before

    def keys(self, rows: slice, state: State, tq: int) -> ShardedKeys:
        every = _are_all(rows, self.q)
        keys = ShardedKeys(
            kv=self.store.shard.kv,
            tq=tq,
            softmax=self.softmax,
            start=self.call.start,
            starts=self.call.starts,
            ends=self.ends,
            evicted=self.call.evicted,
            state=state,
            summaries=self.store.summaries,
            total=self.call.total,
            layout=self.store.layout,
            ranks=self.store.ranks,
            shared=self.store.shared,
            fed=self._last_inputs(tq),
        )
        return keys if every else keys.some_rows(rows, state)

    def last_queries(self, count: int) -> Tensor:
        return self.q[:, :, -count:] if self._local is None else last_queries(self._local, count)

    def _last_inputs(self, count: int) -> Inputs | None:
        """The inputs of the last ``count`` positions of the whole call."""
        if self._fed is None or self._local is None:
            return None if self._fed is None else replace(self._fed, length=self.total).last(count)
        if self._gathered is None or self._gathered.tq != count:
            self._gathered = self._fed.of(last_inputs(self._local, count), self.total)
        return self._gathered

    def attend(
        self, method: AttentionMethod, run: Run, state: State, probe: Probe | None
    ) -> tuple[Partial, Reads, Travel | None]:
        """See ``KeySource.attend``. A call over ranks is not measured, so ``probe`` is None."""
        if self._local is not None:
            part, reads, travel = prefill(method, *_some_rows(self._local, self.store.shared, run.rows), None)
        elif run.phase == DECODE:
            q = self.q[run.rows]
            part, reads = decode(method, q, self.keys(run.rows, state, q.shape[2]), None)
            size = (self.mesh.ranks.size - 1) * _partial_bytes(q, self.v.shape[3])
            travel = Travel("decode", "one collective of partial results a layer", dense_bytes=size)
        else:  # the keys of these rows are all of this call, and every rank has computed them
            here = LocalKeys(
                self.q,
                KV(self.k, self.v),
                self.softmax,
                padding=_padding_within(self.call),
                fed=self._fed,
            )
            part, reads, _ = here.attend(method, run, state, None)
            travel = Travel("none", _SHORT)
        travel.sent = self.newly_sent()
        return part, reads, travel

    def evict(self, method: AttentionMethod, runs: list[Run]) -> None:
        evict(self, self.store, self.start, method, runs)

    def forget(self, needed: int) -> None:
        self.store.needed = needed
        _forget(self.store, needed, self.call, self.mesh)

    def pack(self, layer: LayerCall) -> None:
        self.store.pack(self.q, self.softmax, self.call.start)

    def attend_window(self, window: int) -> Partial:
        """Attention of all rows over the model's own sliding ``window``, in place of a layer call."""
        store, call = self.store, self.call
        store.needed = window
        SupplyOverRanks(self.q, self.k, self.v, store, call, None).take()
        store.align(self.starts, self.total)
        if call.split is not None:
            local = LocalCall(self.q, self.k, self.v, store.shard, call, self.mesh, self.softmax)
            part = prefill(_DENSE, local, store.shared, window)[0]
        elif call.past:
            keys = self.keys(slice(0, self.q.shape[0]), {}, self.q.shape[2])
            part = decode(_DENSE, self.q, keys, window)[0]
        else:
            part = flash(self.q, KV(self.k, self.v), self.softmax, window=window, start=call.start)
        _forget(store, window, call, self.mesh)
        store.pack(self.q, self.softmax, call.start)
        return part


def _padding_within(call: Call) -> Padding:
    """The starts of the rows, counted from the first token of the call."""
    if call.start is None or call.starts is None:
        return Padding()
    starts = [max(first - call.past, 0) for first in call.starts]
    return Padding((call.start - call.past).clamp(min=0), starts)


def _some_rows(local: LocalCall, shared: Summaries, rows: slice) -> tuple[LocalCall, Summaries]:
    """The local call and the summaries of all keys, for some rows of the batch."""
    if _are_all(rows, local.q):
        return local, shared
    call, start = local.call, None
    starts = None if call.starts is None else call.starts[rows]
    if starts is not None and any(starts):
        start = None if call.start is None else call.start[rows]
    q, k, v = (x[rows] for x in (local.q, local.k, local.v))
    shard = local.shard._replace(kv=local.shard.kv[rows])
    fed = None if local.fed is None else local.fed.part(rows)
    labels = {key: x[rows] for key, x in local.labels.items()}
    evicted = None if call.evicted is None else call.evicted[rows]
    call = call._replace(start=start, starts=None if start is None else starts, evicted=evicted)
    local = replace(local, q=q, k=k, v=v, shard=shard, call=call, fed=fed, labels=labels)
    return local, SomeRows(shared, Supply(KV(k, v)), None, rows)


def _forget(store: ShardStore, window: int, call: Call, mesh: Mesh) -> None:
    """Drop whole blocks of positions before the window.

    After a prompt, the rest is laid out block-cyclically again, since few ranks have computed its end.
    DECODE_ROWS more positions are kept, because assisted decoding may crop that many tokens. Once some are
    packed nothing more is dropped: groups cannot be cut at the borders of blocks.
    """
    if store.shard.kv.streams:
        return
    low = max(0, call.total - window - DECODE_ROWS) // store.block * store.block
    low = max(low, store.layout.begin)  # positions that were dropped before a crop stay dropped
    if call.split is not None:
        kept = Layout.empty(mesh.ranks.size).block_cyclic(low, call.total, store.block)
        kv = store.shard.kv.map(lambda x: rearranged(x, store.layout, kept, mesh.ranks))
        store.replace(Shard(kv, kept))
    elif low > store.layout.begin:
        gone = store.layout.below(mesh.ranks.rank, low)
        shard = store.shard
        store.replace(Shard(shard.kv[:, :, gone:], shard.layout.cut(low, call.total)))


def _are_all(rows: slice, x: Tensor) -> bool:
    """Whether ``rows`` names all rows of x [B, ...]."""
    return rows.stop - rows.start == x.shape[0]


def _partial_bytes(q: Tensor, value_dim: int) -> int:
    """Bytes of one rank's Partial of the queries q [B, H, Tq, D]."""
    return q[..., 0].numel() * (value_dim * q.element_size() + torch.finfo(torch.float32).bits // 8)
