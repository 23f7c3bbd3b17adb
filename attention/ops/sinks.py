"""The first keys of each row, which are read besides a window."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kv import KV
from ..partial import Partial, merge
from ..softmax import Softmax
from . import kernel


def with_sinks(
    local: Partial,
    q: Tensor,
    kv: KV,
    softmax: Softmax,
    *,
    window: int,
    sinks: int,
    start: Tensor | None,
    starts: list[int] | None,
) -> Partial:
    """``local``, the attention of q [B, H, Tq, D] within the window, with the first ``sinks`` keys of each
    row that lie before the window as a second, small set of keys.

    Queries are the last Tq positions of kv [B, Hkv, Tk]. start: [B], the first position of each row, and
    ``starts``, the same on the host; None where no row is padded.
    """
    b, h, tq, _ = q.shape
    hkv, tk, starts = kv.num_kv_heads, kv.length, starts or [0]
    sinks = min(sinks, tk)
    if sinks == 0 or tk - min(starts) <= window:
        return local
    first, mask = kv[:, :, :sinks], None
    overlap = max(starts) + sinks > tk - tq + 1 - window  # of some query's window
    if overlap or start is not None:
        places = torch.arange(sinks, device=q.device)[None]
        places = places if start is None else places + start[:, None]  # [B or 1, sinks]
        first = kv.gather(places.clamp(max=tk - 1)[:, None].expand(b, hkv, -1))
    if overlap:
        rows = torch.arange(tk - tq, tk, device=q.device)[:, None]
        mask = places[:, None] <= rows - window  # [B or 1, Tq, sinks]
        mask = mask.repeat(1, h // hkv, 1)[:, None]
    part = kernel.attend(kernel.fold_groups(q, hkv), first, softmax, mask=mask)
    return merge(local, kernel.unfold_groups(part, h, tq))
