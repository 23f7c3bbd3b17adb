"""The rows next to a rank's chunks, for blocks that the end of a chunk cuts in two."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..group.autograd import exchange
from ..group.comm import Ranks
from .layout import Span, Split


class Beyond(NamedTuple):
    """The rows [B, H, n, D] just before a chunk, and those just after it."""

    before: Tensor
    after: Tensor


def beyond(
    x: Tensor, low: int, high: int, split: Split, ranks: Ranks, name: str
) -> tuple[dict[Span, Beyond], Tensor]:
    """Up to ``low`` rows before and ``high`` rows after each of this rank's chunks, of x [B, H, split.rows,
    D].

    They come from the two neighbouring chunks alone, and each travels once. -> (the rows by chunk, all rows
    that have arrived, which must stay in the graph where there is one).
    """
    where = {
        chunk: (rank, slot.start) for rank in range(split.size) for slot, chunk in split.slots(rank)
    }  # by chunk: its rank, and the row of x at which it begins
    in_order = sorted(where)
    wanted: list[tuple[int, int, Span, int, Span]] = []  # (from, to, for chunk, side, positions)
    for i, chunk in enumerate(in_order):
        to = where[chunk][0]
        if low and i:
            a, b = in_order[i - 1]
            wanted.append((where[in_order[i - 1]][0], to, chunk, 0, (max(a, b - low), b)))
        if high and i + 1 < len(in_order):
            a, b = in_order[i + 1]
            wanted.append((where[in_order[i + 1]][0], to, chunk, 1, (a, min(b, a + high))))
    size, me = split.size, ranks.rank
    send, receive, out = [0] * size, [0] * size, []
    for source, to, _, _, (a, b) in sorted(wanted, key=lambda w: w[1]):
        if source == me:
            chunk, at = next((c, row) for c, (r, row) in where.items() if r == me and c[0] <= a and b <= c[1])
            out.append(x[:, :, at + a - chunk[0] : at + b - chunk[0]])
            send[to] += b - a
    mine = sorted((w for w in wanted if w[1] == me), key=lambda w: w[0])
    for source, _, _, _, (a, b) in mine:
        receive[source] += b - a
    packed = torch.cat(out, 2) if out else x[:, :, :0]
    arrived = exchange(packed.movedim(2, 0), send, receive, ranks, name).movedim(0, 2)
    parts = dict(
        zip(((w[2], w[3]) for w in mine), arrived.split([w[4][1] - w[4][0] for w in mine], 2), strict=True)
    )
    nothing = x[:, :, :0]
    found = {
        chunk: Beyond(parts.get((chunk, 0), nothing), parts.get((chunk, 1), nothing))
        for _, chunk in split.slots(me)
    }
    return found, arrived
