"""Attention of the queries of one call by one method: select, run one operation per key set, merge, count
what was read."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .keys import Keys
from .kv import KV
from .mass import ATTENTION, SELECTION, Probe
from .method import DECODE, PREFILL, AttentionMethod
from .partial import Partial, empty_partial
from .selection import Selection, as_selection
from .selection.base import Pairs, Tally
from .selection.every import dense_pairs

DECODE_ROWS = 16  # a call of at most this many queries on a store that is not empty is decode
TOO_SHORT = "the budget covers the length"
PREFILL_TILE = 64  # prefill queries that share one reading of a key, when bytes are counted


class OnDevice(NamedTuple):
    """Pairs that only the device knows, and the bytes of K and V that they load: ``row_nbytes`` for each
    ``loads_shared_by`` pairs."""

    pairs: Tally
    row_nbytes: int
    loads_shared_by: int


@dataclass
class Reads:
    """What one call read, summed over the batch.

    pairs, causal_pairs: (query head, key) pairs read, and those that dense attention would read.
    kv_bytes, dense_bytes: bytes of K and V loaded, and those that dense attention would load. A decode query
    loads each of its keys; in prefill 64 queries share a load. selection_bytes: bytes that the method has
    read to select. on_device: counts that are not in pairs and kv_bytes, because only the device knows them.
    """

    pairs: int = 0
    causal_pairs: int = 0
    kv_bytes: int = 0
    dense_bytes: int = 0
    selection_bytes: int = 0
    reason: str | None = None  # why every visible key was read although the method is selective
    on_device: tuple[OnDevice, ...] = ()

    def __iadd__(self, other: Reads) -> Reads:
        """Add the counts of ``other``; the reason stays."""
        self.pairs += other.pairs
        self.causal_pairs += other.causal_pairs
        self.kv_bytes += other.kv_bytes
        self.dense_bytes += other.dense_bytes
        self.selection_bytes += other.selection_bytes
        self.on_device += other.on_device
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
    """Attention of q [B, H, Tq, D] over what ``method`` selects of ``keys`` in ``phase``.

    -> (out in the dtype of q or in float32, with its lse; what was read). impl: which implementation of
    operations runs. probe: called around the stages of the call, where it is measured.
    """
    if phase == DECODE:
        if probe is None:
            selection = as_selection(method.select_decode(q, keys), DECODE)
            part, pairs = selection.run_decode(q, keys, impl)
        else:
            with probe.timed(SELECTION, q.device):
                selection = as_selection(method.select_decode(q, keys), DECODE)
            probe.on_select(q, keys, selection)
            with probe.timed(ATTENTION, q.device):
                part, pairs = selection.run_decode(q, keys, impl)
        shared_by = selection.loads_shared_by(q.shape[1], keys.kv.num_kv_heads)
        causal = dense_pairs(q, keys, range(keys.tq))
        reads = count_reads(q, keys.kv, pairs, causal, shared_by)
    elif phase in method.phases and _by_row(method, keys):
        return _prefill_rows(method, phase, q, keys, impl, probe)
    else:
        with _timed(probe, SELECTION, q):
            if method.last_queries:
                keys.prepared = method.prepare_prefill(q[:, :, -method.last_queries :], keys)
            selection = as_selection(method.select_prefill(q, keys), PREFILL)
        if probe is not None:
            probe.on_select(q, keys, selection)
        with _timed(probe, ATTENTION, q):
            return run_prefill(method, q, keys, selection, impl=impl)
    return part, explained(reads, method, phase, keys, selection)


def _by_row(method: AttentionMethod, keys: Keys) -> bool:
    """Whether each row must be served without its padding, which would have a part in what ``method`` selects
    in prefill: on the left as keys, on the right as queries."""
    return any(keys.starts or ()) or (keys.ends is not None and method.lookahead.tokens > 0)


def _timed(probe: Probe | None, stage: str, q: Tensor) -> AbstractContextManager[None]:
    return nullcontext() if probe is None else probe.timed(stage, q.device)


def run_prefill(
    method: AttentionMethod,
    q: Tensor,
    keys: Keys,
    selection: Selection,
    *,
    rows: range | None = None,
    impl: str = "auto",
) -> tuple[Partial, Reads]:
    """Attention of prefill queries q [B, H, Tq, D] over ``selection``, which ``method`` has made, and what
    that read. rows: the queries that are counted, where others only complete a block; None: all."""
    rows = range(keys.tq) if rows is None else rows
    part, pairs = selection.run_prefill(q, keys, rows, impl)
    shared_by = PREFILL_TILE * (q.shape[1] // keys.kv.num_kv_heads)
    reads = count_reads(q, keys.kv, pairs, dense_pairs(q, keys, rows), shared_by)
    return part, explained(reads, method, PREFILL, keys, selection)


def explained(reads: Reads, method: AttentionMethod, phase: str, keys: Keys, selection: Selection) -> Reads:
    """``reads`` with the bytes that selection has read and, where a selective method has read everything, the
    reason."""
    reads.selection_bytes = keys.summary_bytes
    whole = selection.dense and not any(keys.evicted or ())
    if whole and phase in method.phases and method.selective:
        reads.reason = TOO_SHORT
    return reads


def _prefill_rows(
    method: AttentionMethod, phase: str, q: Tensor, keys: Keys, impl: str, probe: Probe | None
) -> tuple[Partial, Reads]:
    """Prefill of a padded batch, row by row: each row gives exactly what it gives alone, and no operation
    runs on its padding."""
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


def count_reads(q: Tensor, kv: KV, pairs: Pairs, causal: int, loads_shared_by: int) -> Reads:
    """The ``Reads`` of ``pairs`` out of ``causal`` (query head, key) pairs, where ``loads_shared_by`` pairs
    share one load of their key. Only the sizes of q and kv are used."""
    per_key = kv.row_nbytes
    dense_share = loads_shared_by if loads_shared_by > 1 else q.shape[1] // kv.num_kv_heads
    reads = Reads(causal_pairs=causal, dense_bytes=causal * per_key // dense_share)
    if isinstance(pairs, Tally):
        reads.on_device = (OnDevice(pairs, per_key, loads_shared_by),)
    else:
        reads.pairs, reads.kv_bytes = pairs, pairs * per_key // loads_shared_by
    return reads
