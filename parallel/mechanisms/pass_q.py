"""Pass-Q: the queries of the new tokens visit the keys, which stay where they are.

Fewer bytes than moving K and V where the new tokens are few against what is stored.
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
from .rows import held, order


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
    """Causal attention of this rank's new tokens over what all ranks hold; only q, out and lse travel.

    q [B, H, split.rows, D], k, v [B, Hkv, split.rows, D] are this rank's computed rows; past_k, past_v
    [B, Hkv, n, D] its stored rows, described by ``past``; starts each row's first valid position; out_dtype
    that in which partial results travel (None: that of q). Differentiable in all five tensors. -> Partial in
    float32 (float64), merged in the order of ranks, (0, -inf) in filling and padding.

    Bytes sent: (P - 1) / P * T * H * (D (e + e_o) + 4), T the tokens of the call with filling, e_o the bytes
    of out_dtype. arXiv 2411.01783.
    """
    everyone, me = tuple(range(ranks.size)), (ranks.rank,)
    if past is not None and past_k is not None and past_v is not None:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    mine = order(split, past, me, k.device)
    every = order(split, None, everyone, q.device)
    everything = gather(q, ranks, "pass_q").permute(1, 2, 0, 3, 4).flatten(2, 3)  # [B, H, P * rows, D]
    part = blockwise(
        every.real(everything),
        held(split, None, everyone),
        mine.real(k),
        mine.real(v),
        held(split, past, me),
        softmax=softmax,
        starts=starts,
    )
    out = _return(every.back(part.out.to(out_dtype or q.dtype)), ranks)
    lse = _return(every.back(part.lse, -torch.inf), ranks)
    return merge(*(Partial(o.to(lse.dtype), s) for o, s in zip(out, lse, strict=True)))


def _return(x: Tensor, ranks: Ranks) -> Tensor:
    """x [B, H, P * rows, ...], the rows of every rank -> [P, B, H, rows, ...], those of this rank from
    everyone."""
    each = [1] * ranks.size
    return exchange(x.unflatten(2, (ranks.size, -1)).movedim(2, 0), each, each, ranks, "pass_q")
