"""Decode attention over the keys that one rank holds: a stretch of the recent ones, or some behind a mask.

``keys`` may hold every key (one device) or this rank's share of them: kv [B, Hkv, N] has the keys held,
in the order of their positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..keys import Keys
from ..ops import kernel
from ..ops.decode import decode
from ..partial import Partial, empty_partial, merge


def attend_recent(q: Tensor, keys: Keys, window: int | None) -> Partial:
    """Attention of q [B, H, Tq, D] over the keys held that each query sees, or over those of its last
    ``window``.

    The keys that all queries see need no mask. At most Tq - 1 keys at either end differ between queries.
    """
    first, last = keys.past, keys.length - 1
    hi, end = keys.held(first + 1), keys.held(last + 1)
    low = lo = 0
    if window is not None:
        low, lo = keys.held(max(0, first - window + 1)), keys.held(max(0, last - window + 1))
    lo = min(lo, hi)
    parts = [_attend_all(q, keys, lo, hi)]
    for a, b in ((low, lo), (hi, end)):
        if a < b:
            places = keys.places()[a:b]
            seen = places <= query_positions(keys)[:, None]
            if window is not None:
                seen &= places > query_positions(keys)[:, None] - window
            if keys.start is not None:
                seen = seen & (places >= keys.start[:, None, None])
            parts.append(attend_masked(q, keys, a, b, seen))
    return merge(*parts)


def attend_masked(q: Tensor, keys: Keys, a: int, b: int, seen: Tensor) -> Partial:
    """Attention of q [B, H, Tq, D] over rows a .. b - 1 of the keys held, where ``seen`` [Tq, b - a] or [B,
    Tq, b - a] is true."""
    h, tq, hkv = q.shape[1], q.shape[2], keys.kv.num_kv_heads
    mask = (seen if seen.dim() == 3 else seen[None]).repeat(1, h // hkv, 1)[:, None]
    part = kernel.attend(kernel.fold_groups(q, hkv), keys.kv[:, :, a:b], keys.softmax, mask=mask)
    return kernel.unfold_groups(part, h, tq)


def query_positions(keys: Keys) -> Tensor:
    """[Tq] int64, the positions of the call's queries."""
    return torch.arange(keys.past, keys.length, device=keys.kv.device)


def count_visible(keys: Keys) -> Tensor:
    """[B, Tq] int64 on the CPU: how many of the keys held each query sees."""
    return torch.tensor(
        [
            [max(0, keys.held(row + 1) - keys.held(first)) for row in range(keys.past, keys.length)]
            for first in keys.starts or [0] * keys.kv.batch
        ]
    )


def _attend_all(q: Tensor, keys: Keys, a: int, b: int) -> Partial:
    """Attention over rows a .. b - 1 of the keys held, for every query alike: the queries of a group are
    heads of one call."""
    if a == b:
        return empty_partial(q, keys.kv.value_dim)
    batch, h, tq, d = q.shape
    start = None
    if keys.starts is not None:
        at = [min(max(keys.held(first) - a, 0), b - a) for first in keys.starts]
        start = torch.tensor(at, device=q.device) if any(at) else None
    part = decode(
        q.reshape(batch, h * tq, 1, d),
        keys.kv[:, :, a:b],
        keys.softmax,
        start=start,
    )
    return Partial(part.out.reshape(batch, h, tq, -1), part.lse.reshape(batch, h, tq))
