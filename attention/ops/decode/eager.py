"""``decode`` on torch's own kernels: the heads of a group are rows of one call, so that each key is read
once."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kv import KV
from ...partial import Partial, merge
from ...softmax import Softmax
from .. import kernel
from ..padding import by_row
from ..sinks import with_sinks


def decode(
    q: Tensor,
    kv: KV,
    softmax: Softmax,
    *,
    window: int | None,
    sinks: int,
    start: Tensor | None,
    length: Tensor | None,
) -> Partial:
    kv = kv if length is None else kv[:, :, : int(length)]
    if start is None:
        part = _rows(q, kv, softmax, window)
    else:
        part = by_row(q, kv, start, lambda _, q, kv: _rows(q, kv, softmax, window))
    if window is None or not sinks:
        return part
    starts = None if start is None else start.tolist()
    return with_sinks(part, q, kv, softmax, window=window, sinks=sinks, start=start, starts=starts)


def _rows(q: Tensor, kv: KV, softmax: Softmax, window: int | None) -> Partial:
    h, tq, hkv, tk = q.shape[1], q.shape[2], kv.num_kv_heads, kv.length
    if window is not None and window + tq - 1 < tk:  # no row sees further back than its own window
        low = tk - (window + tq - 1)
        kv, tk = kv[:, :, low:], tk - low
    folded = kernel.fold_groups(q, hkv)
    past = tk - tq
    bounded = window is not None and window < tk
    if tq == 1 and not bounded:
        part = kernel.attend(folded, kv, softmax)
        return kernel.unfold_groups(part, h, tq)
    rows = torch.arange(past, tk, device=q.device)[:, None]
    cols = torch.arange(tk, device=q.device)[None]
    if bounded:
        assert window is not None
        mask = ((cols <= rows) & (cols > rows - window)).repeat(h // hkv, 1)[None, None]
        part = kernel.attend(folded, kv, softmax, mask=mask)
        return kernel.unfold_groups(part, h, tq)
    # The past is the same for every row; only the few new keys need a causal mask.
    square = (cols[:, past:] <= rows).repeat(h // hkv, 1)[None, None]
    before = kernel.attend(folded, kv[:, :, :past], softmax)
    new = kernel.attend(folded, kv[:, :, past:], softmax, mask=square)
    return kernel.unfold_groups(merge(before, new), h, tq)
