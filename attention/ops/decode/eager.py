"""``decode`` on torch's own kernels: the heads of a group are rows of one call, so that each key is read
once."""

from __future__ import annotations

import torch
from torch import Tensor

from ...partial import Partial, merge
from .. import kernel


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    start: Tensor | None,
) -> Partial:
    h, tq, hkv, tk = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    low = 0
    if window is not None and window + tq - 1 < tk:  # no row sees further back than its own window
        low = tk - (window + tq - 1)
        k, v, tk = k[:, :, low:], v[:, :, low:], tk - low
        start = None if start is None else torch.clamp(start - low, min=0)
    folded = kernel.fold_groups(q, hkv)
    past = tk - tq
    bounded = window is not None and window < tk
    visible = None if start is None else torch.arange(tk, device=q.device) >= start[:, None]  # [B, Tk]
    if tq == 1 and not bounded:
        mask = None if visible is None else visible[:, None, None]
        part = kernel.attend(folded, k, v, scale=scale, mask=mask, softcap=softcap)
        return kernel.unfold_groups(part, h, tq)
    rows = torch.arange(past, tk, device=q.device)[:, None]
    cols = torch.arange(tk, device=q.device)[None]
    if bounded:
        assert window is not None
        mask = ((cols <= rows) & (cols > rows - window)).repeat(h // hkv, 1)[None, None]
        mask = mask if visible is None else mask & visible[:, None, None]
        part = kernel.attend(folded, k, v, scale=scale, mask=mask, softcap=softcap)
        return kernel.unfold_groups(part, h, tq)
    # The past is the same for every row; only the few new keys need a causal mask.
    square = (cols[:, past:] <= rows).repeat(h // hkv, 1)[None, None]
    mask = None
    if visible is not None:
        mask, square = visible[:, None, None, :past], square & visible[:, None, None, past:]
    before = kernel.attend(folded, k[:, :, :past], v[:, :, :past], scale=scale, mask=mask, softcap=softcap)
    new = kernel.attend(folded, k[:, :, past:], v[:, :, past:], scale=scale, mask=square, softcap=softcap)
    return kernel.unfold_groups(merge(before, new), h, tq)
