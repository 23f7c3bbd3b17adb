"""Exact attention over the last tokens, beside a recurrence over the earlier ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..ops.autocast import without_autocast
from ..partial import Partial

_SCORES = 1 << 25  # scores in memory at a time; more where one block has more


@without_autocast
def window_attention(q: Tensor, keys: Tensor, values: Tensor, *, scale: float, valid: Tensor) -> Partial:
    """Softmax attention over the last n keys, the query's own among them, in float32 or wider.

    q: [B, H, T, D]. keys, values: [B, Hkv, n + T, D]; the first n are those before the call, of which row b
    has the last valid[b]. A block of queries meets n + block keys:

        n = 3:    keys -3 -2 -1  0  1  2
        query 0         .  x  x  x  .  .
              1         .  .  x  x  x  .
              2         .  .  .  x  x  x
    """
    b, h, t, d = q.shape
    hkv, n = keys.shape[1], keys.shape[2] - t
    wide = torch.promote_types(q.dtype, torch.float32)
    block = min(n, t)
    rest = -t % block
    if rest:
        q, keys, values = (pad(x, (0, 0, 0, rest)) for x in (q, keys, values))
    # [B, Hkv, blocks, G * block, D]: a group's queries stand side by side, so that no key is copied
    q = (scale * q).to(wide).reshape(b, hkv, h // hkv, -1, block, d).transpose(2, 3).flatten(3, 4)
    keys = keys.to(wide).unfold(2, n + block, block)  # [B, Hkv, blocks, D, n + block]
    values = values.to(wide).unfold(2, n + block, block)
    place = torch.arange(n + block, device=q.device)
    query = torch.arange(block, device=q.device)[:, None]
    seen = (place > query) & (place <= query + n)  # [block, n + block]
    begin = torch.arange(0, t + rest, block, device=q.device)[:, None]  # place of each block's first key
    there = (begin + place) >= n - valid[:, None, None]  # [B, blocks, n + block]
    step = max(1, _SCORES // (b * h * block * (n + block)))  # blocks that are computed side by side
    outs, lses = [], []
    for parts in zip(*(x.split(step, 2) for x in (q, keys, values)), there.split(step, 1), strict=True):
        of_q, of_keys, of_values, of_there = parts
        hidden = ~(seen & of_there[:, :, None])[:, None, :, None]  # [B, 1, blocks, 1, block, n + block]
        scores = (of_q @ of_keys).unflatten(3, (-1, block)).masked_fill(hidden, -torch.inf)
        lses.append(scores.logsumexp(-1))
        outs.append((scores - lses[-1][..., None]).exp().flatten(3, 4) @ of_values.mT)
    out = torch.cat(outs, 2).unflatten(3, (-1, block)).transpose(2, 3)  # [B, Hkv, G, blocks, block, Dv]
    lse = torch.cat(lses, 2).transpose(2, 3)
    return Partial(out.reshape(b, h, -1, out.shape[5])[:, :, :t], lse.reshape(b, h, -1)[:, :, :t])
