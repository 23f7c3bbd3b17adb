"""Causality and left padding: which keys a query may see, as a mask and as a count."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(
    tq: int,
    tk: int,
    start: Tensor | None,
    batch: int,
    device: torch.device | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Boolean mask [B, 1, Tq, Tk]: query row i (position tk - tq + i) sees key j iff start[b] <= j <= its
    position. rows [R]: of these query rows alone, [B, 1, R, Tk].

    tq = 3, tk = 5          tq = 3, tk = 3, start = 1
      k 0 1 2 3 4             k 0 1 2
    q   x x x . .           q   . . .
        x x x x .               . x .
        x x x x x               . x x
    """
    if device is None:
        device = torch.device("cpu") if start is None else start.device
    places, cols = positions(tq, tk, device, rows)
    mask = (cols <= places)[None, None].expand(batch, 1, -1, -1)
    if start is not None:
        mask = mask & (cols[None] >= start.to(device)[:, None, None])[:, None]
    return mask


def positions(tq: int, tk: int, device: torch.device, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The positions of the queries of a call, [R, 1], and of the keys, [1, Tk]. The queries are the last tq
    of tk positions; rows [R]: only these queries of the call."""
    queries = torch.arange(tq, device=device) if rows is None else rows.to(device)
    return (tk - tq + queries)[:, None], torch.arange(tk, device=device)[None, :]


def causal_pairs(tq: int, tk: int, starts: list[int] | None, batch: int) -> int:
    """Number of causal (query, key) pairs per head, summed over the batch, queries in the padding left
    out."""
    past, total = tk - tq, 0
    if starts is None:
        return batch * (past + 1 + tk) * tq // 2
    for first in starts:
        # Visible keys of the first and of the last query that is not padding.
        lo, hi = max(past, first) - first + 1, tk - first
        total += (lo + hi) * (hi - lo + 1) // 2 if hi >= lo else 0
    return total
