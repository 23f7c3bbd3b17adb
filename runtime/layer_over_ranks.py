"""One call of a patched layer whose keys are spread over ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attention.attend import DECODE_ROWS, attend
from ..attention.dense import Dense
from ..attention.keys import Keys
from ..attention.kv import KV
from ..attention.method import DECODE, PREFILL, AttentionMethod
from ..attention.ops.dispatch import implementations
from ..attention.ops.flash import flash
from ..attention.partial import Partial
from ..attention.softmax import Softmax
from ..attention.summary import SomeRows, Summaries, Summary
from ..parallel.group.mesh import Mesh
from ..parallel.mechanisms.call import Call, Rows, Share, Travel
from ..parallel.mechanisms.decode import decode
from ..parallel.mechanisms.entries import extend, extend_split
from ..parallel.mechanisms.gather import rearranged
from ..parallel.mechanisms.keys import ShardedKeys
from ..parallel.mechanisms.layout import Layout
from ..parallel.mechanisms.prefill import prefill
from ..parallel.mechanisms.selected import last_queries
from .rows import Done
from .shard import ShardStore

if TYPE_CHECKING:
    from .layer import Layer

_CALL = "_farspan_call"
_SHORT = "the prompt is so short that every rank computes it"
_DENSE = Dense()


def carrier(call: Call, device: torch.device) -> Tensor:
    """A mask of one number that takes ``call`` along to every layer, also when gradient checkpointing runs a
    layer again in backward."""
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    setattr(mask, _CALL, call)
    return mask


def carried(mask: Tensor | None) -> Call | None:
    """The call that came with the mask."""
    return getattr(mask, _CALL, None)


def spread(
    layer: Layer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    store: ShardStore,
    call: Call,
    mesh: Mesh,
    softmax: Softmax,
) -> list[Done]:
    """Attention of q [B, H, n, D] over all ranks' keys, the new ones k, v [B, Hkv, n, D] included.

    The n tokens are this rank's share (``call.split``), or the same on every rank.
    """
    sent = mesh.sent()
    past = _take(k, v, store, call)
    _extend(layer, k, store, past, call, mesh)
    short = call.split is None and call.past > 0
    ends = layer.session.ends_below(call.total)
    batch = layer.served(call.starts, q.shape[0], call.past, call.total, short, store.states, ends)
    share = None if call.split is None else Share(q, k, v, store.rows, call, mesh, softmax)
    done = []
    for run in batch.runs:
        method, rows = layer.method(run), run.rows
        with implementations() as ran:
            if share is not None:
                part, reads, travel = prefill(method, *_some_rows(share, store.shared, rows), None)
            elif run.phase == DECODE:
                state = {} if run.below else store.states.of(str(method), rows, call.past, call.total)
                keys = sharded_keys(q, store, call, softmax).some_rows(rows, state)
                part, reads = decode(method, q[rows], keys, None)
                size = (mesh.ranks.size - 1) * _partial_bytes(q[rows], v.shape[3])
                travel = Travel("decode", "one collective of partial results a layer", dense_bytes=size)
            else:  # every key of these rows has just been computed here
                here = Keys(kv=KV(k, v), tq=q.shape[2], softmax=softmax, **_padding_within(call))
                part, reads = attend(method, PREFILL, q[rows], here.some_rows(rows, {}))
                travel = Travel("none", _SHORT)
        sent, travel.sent = mesh.sent(), mesh.sent() - sent
        done.append(Done(run, part, reads, ran, travel))
    if batch.told and _told(layer.decode):
        wanted = layer.decode.observation_window
        n = call.total - call.past if wanted is None else min(wanted, call.total - call.past)
        last = q[:, :, -n:] if share is None else last_queries(share, n)
        keys = sharded_keys(last, store, call, softmax)
        for rows in batch.told:
            state = store.states.of(str(layer.decode), rows, call.past, call.total)
            layer.decode.on_prefill_end(last[rows], keys.some_rows(rows, state))
        travel.sent += mesh.sent() - sent
    return done


def spread_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    store: ShardStore,
    call: Call,
    mesh: Mesh,
    softmax: Softmax,
) -> Partial:
    """The same of a layer with the model's own sliding window."""
    window = softmax.window
    assert window is not None
    store.window = window
    _take(k, v, store, call)
    if call.split is not None:
        share = Share(q, k, v, store.rows, call, mesh, softmax)
        part = prefill(_DENSE, share, store.shared, window)[0]
    elif call.past:
        part = decode(_DENSE, q, sharded_keys(q, store, call, softmax), window)[0]
    else:
        part = flash(q, KV(k, v), softmax, window=window, start=call.start)
    _forget(store, window, call, mesh)
    return part


def _take(k: Tensor, v: Tensor, store: ShardStore, call: Call) -> Rows:
    """Store the new keys and values of a call. -> what this rank held before."""
    past = store.rows if store.kv is not None else Rows(KV(k[:, :, :0], v[:, :, :0]), store.layout)
    if call.split is None:
        store.take_shared(k, v)
    else:
        store.take_split(k, v, call.split)
    store.align(call.starts, call.total)
    return past


def _padding_within(call: Call) -> dict[str, Any]:
    """Where rows begin, counted from the call's first token."""
    if call.start is None or call.starts is None:
        return {}
    starts = [max(first - call.past, 0) for first in call.starts]
    return {"start": (call.start - call.past).clamp(min=0), "starts": starts}


def _some_rows(share: Share, shared: Summaries, rows: slice) -> tuple[Share, Summaries]:
    """A share, and the entries of all keys, of some rows of the batch."""
    if rows == slice(0, share.q.shape[0]):
        return share, shared
    call, start = share.call, None
    starts = None if call.starts is None else call.starts[rows]
    if starts is not None and any(starts):
        start = None if call.start is None else call.start[rows]
    q, k, v = (x[rows] for x in (share.q, share.k, share.v))
    held = share.rows._replace(kv=share.rows.kv[rows])
    call = call._replace(start=start, starts=None if start is None else starts)
    return replace(share, q=q, k=k, v=v, rows=held, call=call), SomeRows(
        shared, KV(share.k, share.v), None, rows
    )


def sharded_keys(q: Tensor, store: ShardStore, call: Call, softmax: Softmax) -> ShardedKeys:
    """The keys of all ranks, as a method that serves the last queries q [B, H, Tq, D] sees them."""
    rows = store.rows
    return ShardedKeys(
        kv=rows.kv,
        tq=q.shape[2],
        softmax=softmax,
        start=call.start,
        starts=call.starts,
        summaries=store.summaries,
        total=store.total,
        layout=rows.layout,
        ranks=store.ranks,
        shared=store.shared,
    )


def _forget(store: ShardStore, window: int, call: Call, mesh: Mesh) -> None:
    """Drop what lies before the window, in whole blocks, and deal what is left of a prompt out anew: its end
    was computed by few ranks. Assisted decoding may take back a few tokens, so their windows are kept,
    too."""
    low = max(0, call.total - window - DECODE_ROWS) // store.block * store.block
    low = max(low, store.layout.begin)  # after a crop, what was dropped before stays dropped
    if call.split is not None:
        kept = Layout.empty(mesh.ranks.size).block_cyclic(low, call.total, store.block)
        kv = store.rows.kv.map(lambda x: rearranged(x, store.layout, kept, mesh.ranks))
        store.replace(Rows(kv, kept))
    elif low > store.layout.begin:
        gone = store.layout.below(mesh.ranks.rank, low)
        rows = store.rows
        store.replace(Rows(rows.kv[:, :, gone:], rows.layout.cut(low, call.total)))


@torch.no_grad()
def _extend(layer: Layer, k: Tensor, store: ShardStore, past: Rows, call: Call, mesh: Mesh) -> None:
    """Bring the block summaries up to date that some method of the layer is going to select by."""
    asked = (*layer.decode.summaries, *(() if call.split is None else layer.prefill.summaries))
    wanted: dict[tuple, Summary] = {s.key: s for s in asked if s.block is not None}
    recent = k
    if call.split is None and store.recent is not None:
        recent = torch.cat([store.recent, k], 2)
    for summary in wanted.values():
        if call.split is None:
            recent = extend(
                summary, store.shared, store.rows.kv.k, store.layout, recent, call.starts, mesh.ranks
            )
        else:
            extend_split(
                summary, store.shared, k, past.layout, past.kv.k, call.split, call.starts, mesh.ranks
            )
    store.recent = None
    if call.split is None and wanted:
        store.recent = recent[:, :, -2 * max(s.block or 1 for s in wanted.values()) :]


def _told(method: AttentionMethod) -> bool:
    return type(method).on_prefill_end is not AttentionMethod.on_prefill_end


def _partial_bytes(q: Tensor, value_dim: int) -> int:
    """What a rank's partial of q [B, H, Tq, D] takes on its way."""
    return q[..., 0].numel() * (value_dim * q.element_size() + torch.finfo(torch.float32).bits // 8)
