"""Pass-Q: the queries of the new tokens travel to the keys, which stay where they are.

This sends fewer bytes than moving K and V where there are few new tokens and many stored keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...attention.partial import Partial, merge
from ...attention.softmax import Softmax
from ..group.autograd import exchange, gather
from ..group.comm import Ranks
from .blockwise import blockwise
from .layout import Layout, Split
from .order import held_spans, order


def pass_q(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    split: Split,
    ranks: Ranks,
    *,
    softmax: Softmax,
    starts: list[int] | None = None,
    past: Layout | None = None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Partial:
    """Causal attention of this rank's new tokens over the keys of all ranks; only q, out and lse travel.

    q [B, H, split.rows, D], k, v [B, Hkv, split.rows, D]: what this rank has computed. past_k, past_v
    [B, Hkv, n, D]: what it has stored, by ``past``. starts: each row's first valid position. out_dtype: that
    in which partial results travel; None: that of q. Differentiable in all five tensors. -> Partial in
    float32 (float64), merged in the order of the ranks; (0, -inf) in padding and split padding.

    Bytes sent: (P - 1) / P * T * H * (D (e + e_o) + 4), where T counts the tokens of the call with split
    padding, and e_o the bytes of out_dtype. arXiv 2411.01783.
    """
    every_rank, me = tuple(range(ranks.size)), (ranks.rank,)
    if past is not None and past_k is not None and past_v is not None:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    mine = order(split, past, me, k.device)
    all_rows = order(split, None, every_rank, q.device)
    all_q = gather(q, ranks, "pass_q").permute(1, 2, 0, 3, 4).flatten(2, 3)  # [B, H, P * rows, D]
    part = blockwise(
        all_rows.real(all_q),
        held_spans(split, None, every_rank),
        mine.real(k),
        mine.real(v),
        held_spans(split, past, me),
        softmax=softmax,
        starts=starts,
    )
    out = _return(all_rows.back(part.out.to(out_dtype or q.dtype)), ranks)
    lse = _return(all_rows.back(part.lse, -torch.inf), ranks)
    return merge(*(Partial(o.to(lse.dtype), s) for o, s in zip(out, lse, strict=True)))


def _return(x: Tensor, ranks: Ranks) -> Tensor:
    """x [B, H, P * rows, ...], results for the rows of every rank -> [P, B, H, rows, ...], the results of
    every rank for this rank's rows."""
    each = [1] * ranks.size
    return exchange(x.unflatten(2, (ranks.size, -1)).movedim(2, 0), each, each, ranks, "pass_q")
