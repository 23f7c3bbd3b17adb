"""How many keys a layer's store keeps, by what the two methods of the layer declare."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .attend import DECODE_ROWS
from .method import PREFILL, AttentionMethod


def evicts(prefill: AttentionMethod, decode: AttentionMethod) -> bool:
    """Whether the store drops what ``decode`` evicts. A method of both phases evicts where it serves both."""
    return decode.evict and (PREFILL not in decode.phases or prefill == decode)


def keys_needed(
    prefill: AttentionMethod, decode: AttentionMethod, from_keys: Iterable[float] = ()
) -> int | None:
    """How many of the last keys a query of either phase needs, also while a row has fewer keys than the
    crossovers ``from_keys``; None: all. Methods with different summaries need all, since a summary is made
    when its own method is called, and of the calls before that too."""
    needed = [prefill.keys_needed, decode.keys_needed, *from_keys]
    finite = [int(count) for count in needed if count is not None and count < math.inf]
    if len(finite) < len(needed):
        return None
    kept = [{summary.key for summary in method.summaries} for method in (prefill, decode)]
    return max(finite) if kept[0] == kept[1] else None


def keys_kept(prefill: AttentionMethod, decode: AttentionMethod, phase: str, length: int) -> float:
    """How many keys of ``length`` positions a store on one device has after a call of ``phase``, the mean
    over the KV heads."""
    if evicts(prefill, decode):
        return decode.keys_left(phase, length)
    needed = keys_needed(prefill, decode)
    return length if needed is None else min(length, needed + DECODE_ROWS)
