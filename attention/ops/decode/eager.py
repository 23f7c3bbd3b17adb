"""``decode`` on torch's own kernels: the heads of a group are rows of one call, so that each key is read
once."""

from __future__ import annotations

import torch
from torch import Tensor

from ...partial import Partial, merge
from .. import kernel
from ..padding import by_row


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
    if start is None:
        return _rows(q, k, v, scale, window, softcap)
    return by_row(q, k, v, start, lambda _, q, k, v: _rows(q, k, v, scale, window, softcap))


def _rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
) -> Partial:
    h, tq, hkv, tk = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    if window is not None and window + tq - 1 < tk:  # no row sees further back than its own window
        low = tk - (window + tq - 1)
        k, v, tk = k[:, :, low:], v[:, :, low:], tk - low
    folded = kernel.fold_groups(q, hkv)
    past = tk - tq
    bounded = window is not None and window < tk
    if tq == 1 and not bounded:
        part = kernel.attend(folded, k, v, scale=scale, softcap=softcap)
        return kernel.unfold_groups(part, h, tq)
    rows = torch.arange(past, tk, device=q.device)[:, None]
    cols = torch.arange(tk, device=q.device)[None]
    if bounded:
        assert window is not None
        mask = ((cols <= rows) & (cols > rows - window)).repeat(h // hkv, 1)[None, None]
        part = kernel.attend(folded, k, v, scale=scale, mask=mask, softcap=softcap)
        return kernel.unfold_groups(part, h, tq)
    # The past is the same for every row; only the few new keys need a causal mask.
    square = (cols[:, past:] <= rows).repeat(h // hkv, 1)[None, None]
    before = kernel.attend(folded, k[:, :, :past], v[:, :, :past], scale=scale, softcap=softcap)
    new = kernel.attend(folded, k[:, :, past:], v[:, :, past:], scale=scale, mask=square, softcap=softcap)
    return kernel.unfold_groups(merge(before, new), h, tq)
