"""One call of a patched layer whose keys are spread over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attention.attend import DECODE_ROWS, Reads, attend
from ..attention.keys import Keys
from ..attention.method import DECODE, PREFILL, AttentionMethod
from ..attention.ops.flash import flash
from ..attention.partial import Partial
from ..attention.summary import Summary
from ..parallel.call import Call, Rows, Share, Travel
from ..parallel.decode import decode
from ..parallel.entries import extend, extend_split
from ..parallel.gather import rearranged
from ..parallel.keys import ShardedKeys
from ..parallel.layout import Layout
from ..parallel.mesh import Mesh
from ..parallel.prefill import prefill
from ..parallel.selected import last_queries
from .shard import ShardStore

if TYPE_CHECKING:
    from .layer import Layer

_CALL = "_farspan_call"
_SHORT = "the prompt is so short that every rank computes it"


def carrier(call: Call, device: torch.device) -> Tensor:
    """A mask that takes ``call`` along to every layer, also when gradient checkpointing runs a layer again in
    backward. Of four dimensions: transformers hands such a mask on as it is and looks for no packed
    sequences."""
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    setattr(mask, _CALL, call)
    return mask


def carried(mask: Tensor | None) -> Call | None:
    """The call that came with the mask."""
    return getattr(mask, _CALL, None)


def spread(
    layer: Layer,
    method: AttentionMethod,
    phase: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    store: ShardStore,
    call: Call,
    mesh: Mesh,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Partial, Reads, Travel]:
    """Attention of q [B, H, n, D] over all ranks' keys, the new ones k, v [B, Hkv, n, D] included.

    The n tokens are this rank's share (``call.split``), or the same on every rank.
    """
    past = store.rows if store.keys is not None else _nothing(k, v, store)
    store.align(call.starts)
    store.window = window
    sent = mesh.sent()
    if call.split is None:
        store.take_shared(k, v)
    else:
        store.take_split(k, v, call.split)
    if window is None:
        _extend(layer, k, store, past, call, mesh)
    how: dict[str, Any] = {"scale": scale, "softcap": softcap}
    if call.split is not None:
        share = Share(q, k, v, store.rows, call, mesh, scale, softcap)
        part, reads, travel = prefill(method, share, store.shared, window)
    elif phase == DECODE:
        part, reads = decode(method, q, sharded_keys(q, store, call, method, scale, softcap), window)
        travel = Travel(
            "decode",
            "one collective of partial results a layer",
            dense_bytes=(mesh.ranks.size - 1) * _partial_bytes(q, v.shape[3]),
        )
    elif window is not None:
        part, reads = flash(q, k, v, window=window, start=call.start, **how), Reads()
        travel = Travel("none", _SHORT)
    else:  # everything there is has just been computed here
        everything = Keys(k=k, v=v, tq=q.shape[2], start=call.start, starts=call.starts, **how)
        part, reads = attend(method, PREFILL, q, everything)
        travel = Travel("none", _SHORT)
    if window is not None:
        _forget(store, window, call, mesh)
    elif phase == PREFILL and _told(layer.decode):
        wanted = layer.decode.told_queries
        n = call.total - call.past if wanted is None else min(wanted, call.total - call.past)
        last = q[:, :, -n:] if call.split is None else last_queries(share, n)
        layer.decode.after_prefill(last, sharded_keys(last, store, call, layer.decode, scale, softcap))
    travel.sent = mesh.sent() - sent
    return part, reads, travel


def sharded_keys(
    q: Tensor, store: ShardStore, call: Call, method: AttentionMethod, scale: float, softcap: float | None
) -> ShardedKeys:
    """The keys of all ranks, as a method that serves the last queries q [B, H, Tq, D] sees them."""
    rows = store.rows
    return ShardedKeys(
        k=rows.k,
        v=rows.v,
        tq=q.shape[2],
        scale=scale,
        softcap=softcap,
        start=call.start,
        starts=call.starts,
        state=store.state(str(method), call.past),
        summaries=store.summaries,
        total=store.total,
        layout=rows.layout,
        ranks=store.ranks,
        shared=store.shared,
    )


def _nothing(k: Tensor, v: Tensor, store: ShardStore) -> Rows:
    return Rows(k[:, :, :0], v[:, :, :0], store.layout)


def _forget(store: ShardStore, window: int, call: Call, mesh: Mesh) -> None:
    """Drop what lies before the window, in whole blocks, and deal what is left of a prompt out anew: its end
    was computed by few ranks. Assisted decoding may take back a few tokens, so their windows are kept,
    too."""
    low = max(0, call.total - window - DECODE_ROWS) // store.block * store.block
    low = max(low, store.layout.begin)  # after a crop, what was dropped before stays dropped
    if call.split is not None:
        kept = Layout.empty(mesh.ranks.size).dealt(low, call.total, store.block)
        k, v = (rearranged(x, store.layout, kept, mesh.ranks) for x in store.rows[:2])
        store.replace(Rows(k, v, kept))
    elif low > store.layout.begin:
        gone = store.layout.below(mesh.ranks.rank, low)
        rows = store.rows
        store.replace(Rows(rows.k[:, :, gone:], rows.v[:, :, gone:], rows.layout.cut(low, call.total)))


@torch.no_grad()
def _extend(layer: Layer, k: Tensor, store: ShardStore, past: Rows, call: Call, mesh: Mesh) -> None:
    """Bring the block summaries up to date that some method of the layer is going to select by."""
    wanted: dict[tuple, Summary] = {s.key: s for s in layer.decode.summaries if s.block > 1}
    if call.split is not None:
        wanted |= {s.key: s for s in layer.prefill.summaries}
    recent = k
    if call.split is None and store.recent is not None:
        recent = torch.cat([store.recent, k], 2)
    for summary in wanted.values():
        if call.split is None:
            recent = extend(
                summary, store.shared, store.rows.k, store.layout, recent, call.starts, mesh.ranks
            )
        else:
            extend_split(summary, store.shared, k, past.layout, past.k, call.split, call.starts, mesh.ranks)
    store.recent = None
    if call.split is None and wanted:
        store.recent = recent[:, :, -2 * max(s.block for s in wanted.values()) :]


def _told(method: AttentionMethod) -> bool:
    return type(method).after_prefill is not AttentionMethod.after_prefill


def _partial_bytes(q: Tensor, value_dim: int) -> int:
    """What a rank's partial of q [B, H, Tq, D] takes on its way."""
    return q[..., 0].numel() * (value_dim * q.element_size() + torch.finfo(torch.float32).bits // 8)
