"""One call of one layer's attention: ask the method, run one operation per key set, merge, count what was
read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .bands import attend_bands
from .index import Bands, BlockIndex, Index, Rescaled, TokenIndex, Window, causal_pairs
from .keys import Keys
from .kv import KV
from .mass import ATTENTION, SELECTION, Probe
from .method import DECODE, PREFILL, AttentionMethod
from .ops import kernel
from .ops.block_sparse import block_sparse
from .ops.decode import decode
from .ops.flash import flash
from .ops.gather_decode import gather_decode
from .partial import Partial, empty_partial, merge
from .rescaled import attend_rescaled

DECODE_ROWS = 16  # a call of at most this many queries on a store that is not empty is decode
TOO_SHORT = "the budget covers the length"
PREFILL_TILE = 64  # prefill queries that share one reading of a key, when bytes are counted
COUNTS = ("pairs", "causal_pairs", "kv_bytes", "dense_bytes", "selection_bytes")


@dataclass
class Reads:
    """What one call read, summed over the batch.

    pairs, causal_pairs: (query head, key) pairs read, and those that dense attention would read.
    kv_bytes, dense_bytes: bytes of K and V loaded, and those that dense attention would load. A decode query
    loads each of its keys; in prefill 64 queries share a load. selection_bytes: bytes that the method read to
    decide. What was read is a 0-dimensional tensor where only the device knows it yet.
    """

    pairs: int | Tensor = 0
    causal_pairs: int = 0
    kv_bytes: int | Tensor = 0
    dense_bytes: int = 0
    selection_bytes: int = 0
    reason: str | None = None  # why every visible key was read although the method is selective

    def __iadd__(self, other: Reads) -> Reads:
        """The counts of both; the reason stays."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


def attend(
    method: AttentionMethod,
    phase: str,
    q: Tensor,
    keys: Keys,
    *,
    impl: str = "auto",
    probe: Probe | None = None,
) -> tuple[Partial, Reads]:
    """Attention of q [B, H, Tq, D] over what ``method`` selects of ``keys``; out is in the dtype of q or
    float32. ``probe`` looks on."""
    if phase == DECODE:
        with _timed(probe, SELECTION, q):
            index = method.select_decode(q, keys)
        if probe is not None:
            probe.on_select(q, keys, index)
        with _timed(probe, ATTENTION, q):
            part, pairs = _run_decode(q, keys, index, impl)
        shared = index.tokens.shape[1] if isinstance(index, TokenIndex) else keys.kv.num_kv_heads
        reads = _count(q, keys, pairs, loads_shared_by=q.shape[1] // shared)
    elif phase in method.phases and _by_row(method, keys):
        return _prefill_rows(method, phase, q, keys, impl, probe)
    else:
        with _timed(probe, SELECTION, q):
            if method.last_queries:
                keys.prepared = method.prepare_prefill(q[:, :, -method.last_queries :], keys)
            index = method.select_prefill(q, keys)
        if probe is not None:
            probe.on_select(q, keys, index)
        with _timed(probe, ATTENTION, q):
            return run_prefill(method, q, keys, index, impl=impl)
    return part, explained(reads, method, phase, keys, index)


def _by_row(method: AttentionMethod, keys: Keys) -> bool:
    """Whether padding would take part in what ``method`` selects in prefill: on the left as keys, on the
    right as queries."""
    return any(keys.starts or ()) or (keys.ends is not None and method.tokens_ahead > 0)


def _timed(probe: Probe | None, stage: str, q: Tensor) -> AbstractContextManager[None]:
    return nullcontext() if probe is None else probe.timed(stage, q.device)


def tell(method: AttentionMethod, q: Tensor, keys: Keys) -> int:
    """Tell a decode method that a prefill call of queries q [B, H, Tq, D] has run: of them it is given the
    last ones, as many as it asks for. -> bytes that it has read."""
    wanted = method.observation_window
    if wanted is not None and wanted < keys.tq:
        q, keys = q[:, :, -wanted:], dataclasses.replace(keys, tq=wanted)
    method.on_prefill_end(q, keys)
    return keys.summary_bytes


def run_prefill(
    method: AttentionMethod,
    q: Tensor,
    keys: Keys,
    index: Index,
    *,
    rows: range | None = None,
    impl: str = "auto",
) -> tuple[Partial, Reads]:
    """Attention of prefill queries q [B, H, Tq, D] over what ``method`` has selected; ``rows``: the queries
    that count, where others only complete a block."""
    rows = range(keys.tq) if rows is None else rows
    part, pairs = _run_prefill(q, keys, index, rows, impl)
    shared_by = PREFILL_TILE * (q.shape[1] // keys.kv.num_kv_heads)
    reads = _count(q, keys, pairs, loads_shared_by=shared_by, rows=rows)
    return part, explained(reads, method, PREFILL, keys, index)


def explained(reads: Reads, method: AttentionMethod, phase: str, keys: Keys, index: Index) -> Reads:
    """``reads`` with what selection cost and, where a selective method has read everything, why."""
    reads.selection_bytes = keys.summary_bytes
    if index is None and phase in method.phases and method.selective:
        reads.reason = TOO_SHORT
    return reads


def _prefill_rows(
    method: AttentionMethod, phase: str, q: Tensor, keys: Keys, impl: str, probe: Probe | None
) -> tuple[Partial, Reads]:
    """A padded batch, row by row: each row gives exactly what it would give alone, and its padding costs
    nothing."""
    result, total = empty_partial(q, keys.kv.value_dim), Reads()
    out, lse = result.out, result.lse
    reasons = []
    for b in range(q.shape[0]):
        row = keys.row(b)
        if row.tq > 0:
            stop = (keys.length if keys.ends is None else keys.ends[b]) - keys.past
            its = (slice(b, b + 1), slice(None), slice(stop - row.tq, stop))
            part, reads = attend(method, phase, q[its], row, impl=impl, probe=probe)
            out[its], lse[its] = part.out.to(out.dtype), part.lse
            total += reads
            reasons.append(reads.reason)
    if reasons and all(reasons):
        total.reason = reasons[0]
    return Partial(out, lse), total


def _run_prefill(
    q: Tensor, keys: Keys, index: object, rows: range, impl: str
) -> tuple[Partial, int | Tensor | None]:
    if index is None:
        return flash(q, keys.kv, keys.softmax, start=keys.start, impl=impl), None
    if isinstance(index, Window):
        return _window(q, keys, index, impl, flash)
    if isinstance(index, Bands):
        pairs = index.pairs(keys.past + rows.start, keys.past + rows.stop) * q.shape[0] * q.shape[1]
        return attend_bands(q, keys, index, impl), pairs
    if isinstance(index, BlockIndex):
        part = block_sparse(q, keys.kv, index, keys.softmax, check=False, impl=impl)
        return part, _block_pairs(q, keys, index, rows)
    if isinstance(index, Rescaled):
        part = attend_rescaled(q, keys, index, impl)
        return part, None if index.read is None else _block_pairs(q, keys, index.read, rows)
    raise TypeError(
        "select_prefill answers with None, a Window, Bands, a BlockIndex or Rescaled; got "
        f"{type(index).__name__}."
    )


def _run_decode(q: Tensor, keys: Keys, index: object, impl: str) -> tuple[Partial, int | Tensor | None]:
    if index is None:
        return decode(q, keys.kv, keys.softmax, start=keys.start, impl=impl), None
    if isinstance(index, Window):
        return _window(q, keys, index, impl, decode)
    if not isinstance(index, TokenIndex):
        raise TypeError(
            f"select_decode answers with None, a Window or a TokenIndex; got {type(index).__name__}."
        )
    group = q.shape[1] // index.tokens.shape[1]
    if index.full is None or not bool(index.full.any()):
        used = index.tokens.numel() if index.counts is None else _total(index.counts)
        part = gather_decode(q, keys.kv, index, keys.softmax, check=False, impl=impl)
        return part, used * group
    if bool(index.full.all()):
        return decode(q, keys.kv, keys.softmax, start=keys.start, impl=impl), None
    return _mixed(q, keys, index, impl)


def _block_pairs(q: Tensor, keys: Keys, index: BlockIndex, rows: range) -> int | Tensor:
    return _total(index.pairs(q.shape[2], keys.length, rows)) * (q.shape[1] // index.blocks.shape[1])


def _total(counts: Tensor) -> int | Tensor:
    """Their sum; off the CPU it stays a tensor, since to read it would wait for the device."""
    return int(counts.sum()) if counts.device.type == "cpu" else counts.sum(dtype=torch.long)


def _window(
    q: Tensor, keys: Keys, index: Window, impl: str, op: Callable[..., Partial]
) -> tuple[Partial, int]:
    """Recent keys by the windowed kernel; sinks, where they lie outside the window, as a second small set."""
    b, h, tq, _ = q.shape
    local = op(q, keys.kv, keys.softmax, window=index.size, start=keys.start, impl=impl)
    starts = keys.starts or [0] * b
    pairs = sum(_window_pairs(keys.past, keys.length, first, index) for first in starts) * h
    sinks = min(index.sinks, keys.length)
    if sinks == 0 or keys.longest() <= index.size:
        return local, pairs
    device = q.device
    first = torch.tensor(starts, device=device)[:, None]
    places = first + torch.arange(sinks, device=device)  # [B, sinks]
    rows = torch.arange(keys.past, keys.length, device=device)
    mask = places[:, None, :] <= rows[:, None] - index.size  # [B, Tq, sinks]: left of the window
    hkv = keys.kv.num_kv_heads
    spread = places.clamp(max=keys.length - 1)[:, None].expand(-1, hkv, -1)
    part = kernel.attend(
        kernel.fold_groups(q, hkv),
        keys.kv.gather(spread),
        keys.softmax,
        mask=mask.repeat(1, h // hkv, 1)[:, None],
    )
    return merge(local, kernel.unfold_groups(part, h, tq)), pairs


def _window_pairs(past: int, length: int, first: int, index: Window) -> int:
    seen = torch.arange(max(past, first), length) - first + 1  # visible keys of each query of the row
    return int((seen.clamp(max=index.size) + (seen - index.size).clamp(0, index.sinks)).sum())


def _mixed(q: Tensor, keys: Keys, index: TokenIndex, impl: str) -> tuple[Partial, int]:
    """Rows of one call in different phases of a method: those that read everything are taken one at a time,
    in place."""
    assert index.full is not None
    h, hs = q.shape[1], index.tokens.shape[1]
    group, hkv = h // hs, keys.kv.num_kv_heads
    part = gather_decode(q, keys.kv, index, keys.softmax, check=False, impl=impl)
    out, lse = part.out.clone(), part.lse.clone()
    counts = (
        index.counts
        if index.counts is not None
        else torch.full_like(index.full, index.tokens.shape[3], dtype=torch.int)
    )
    pairs = int(torch.where(index.full, 0, counts).sum()) * group
    for b, s, t in index.full.nonzero().tolist():
        heads, kv = slice(s * group, (s + 1) * group), s * hkv // hs
        first, end = (keys.starts[b] if keys.starts else 0), keys.past + t + 1
        cut = (slice(b, b + 1), slice(kv, kv + 1), slice(first, end))
        one = decode(q[b : b + 1, heads, t : t + 1], keys.kv[cut], keys.softmax, impl=impl)
        out[b : b + 1, heads, t : t + 1], lse[b : b + 1, heads, t : t + 1] = one.out.to(out.dtype), one.lse
        pairs += (end - first) * group
    return Partial(out, lse), pairs


def _count(
    q: Tensor, keys: Keys, pairs: int | Tensor | None, *, loads_shared_by: int, rows: range | None = None
) -> Reads:
    b, h, tq, _ = q.shape
    rows = range(tq) if rows is None else rows
    causal = causal_pairs(len(rows), keys.past + rows.stop, keys.starts, b) * h
    return count_reads(q, keys.kv, causal if pairs is None else pairs, causal, loads_shared_by)


def count_reads(q: Tensor, kv: KV, pairs: int | Tensor, causal: int, loads_shared_by: int) -> Reads:
    """Reads of ``pairs`` out of ``causal`` (query head, key) pairs; ``loads_shared_by`` pairs share a load of
    their key. Of q and kv only the sizes are looked at."""
    per_key = kv.row_nbytes
    dense_share = loads_shared_by if loads_shared_by > 1 else q.shape[1] // kv.num_kv_heads
    return Reads(
        pairs=pairs,
        causal_pairs=causal,
        kv_bytes=pairs * per_key // loads_shared_by,
        dense_bytes=causal * per_key // dense_share,
    )
