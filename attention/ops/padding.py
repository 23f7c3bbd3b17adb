"""Left-padded batches, row by row."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..kv import KV
from ..partial import Partial, empty_partial

Run = Callable[[int, Tensor, KV], Partial]


def by_row(q: Tensor, kv: KV, start: Tensor | list[int], run: Run) -> Partial:
    """``run(b, q, kv)`` on each row with its padding cut off: a row costs, and gives, what it would alone.

    q [B, H, Tq, D] are the last Tq positions of kv [B, Hkv, Tk]; row b begins at start[b]. Queries in
    the padding give (0, -inf), and what lies in the padding of kv is never read.
    """
    past, tq = kv.length - q.shape[2], q.shape[2]
    whole = empty_partial(q, kv.value_dim)
    for b, first in enumerate(start if isinstance(start, list) else start.tolist()):
        begin = max(0, first - past)
        if begin < tq:
            row = slice(b, b + 1)
            part = run(b, q[row, :, begin:], kv[row, :, first:])
            whole.out[row, :, begin:] = part.out.to(q.dtype)
            whole.lse[row, :, begin:] = part.lse
    return whole
