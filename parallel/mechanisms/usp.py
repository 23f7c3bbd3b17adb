"""Unified sequence parallelism: Ulysses inside groups of neighbouring ranks, a zigzag ring across the groups.

U = 2, R = 2     ranks 0 1: one group, exchange heads      ring 0 - 2: the first half of the heads
                 ranks 2 3: another                        ring 1 - 3: the other half
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...attention.softmax import Softmax
from ..group.comm import Ranks
from .layout import Layout, Split
from .order import held_spans, order
from .ring import Block, circulate
from .ulysses import to_heads, to_rows


def usp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    split: Split,
    ulysses: Ranks,
    ring: Ranks,
    *,
    softmax: Softmax,
    starts: list[int] | None = None,
    past: Layout | None = None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    with_lse: bool = False,
    backend: str = "torch",
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of this rank's new tokens over the keys of all ranks; ``split`` is a ``usp_split``.

    ulysses, ring: this rank's two groups, of U and R ranks. Its number in split and past is r * U + u. Other
    arguments and the result are those of :func:`~farspan.parallel.mechanisms.ulysses.ulysses`. Differentiable
    in all five tensors. Raises Unsupported where U does not divide the heads.

    Bytes sent: (U - 1) / U² * S / R * (2 H + 2 max(Hkv, U)) * D e by ``ulysses`` and
    (R - 1) / R * S * 2 ceil(Hkv / U) * D e by ``ring``. arXiv 2405.07719.
    """
    groups = [tuple(range(r * ulysses.size, (r + 1) * ulysses.size)) for r in range(ring.size)]
    mine = groups[ring.rank]
    q, k, v = to_heads(q, k, v, split, ulysses, mine, past, past_k, past_v, backend)
    queries, keys = order(split, None, mine, q.device), order(split, past, mine, k.device)
    rows = [sum(split.rows + (past.count(m) if past else 0) for m in group) for group in groups]
    blocks = [Block(held_spans(split, past, group), n) for group, n in zip(groups, rows, strict=True)]
    part = circulate(
        queries.real(q),
        held_spans(split, None, mine),
        keys.sorted(k),
        keys.sorted(v),
        blocks,
        ring,
        softmax=softmax,
        starts=starts,
    )
    out = to_rows(queries.back(part.out.to(q.dtype)), ulysses, backend)
    if not with_lse:
        return out, None
    return out, to_rows(queries.back(part.lse, -torch.inf)[..., None], ulysses, backend)[..., 0]
