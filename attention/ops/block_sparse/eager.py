"""``block_sparse``: per query block, gather its key blocks and call the library's attention; nothing of size
Tq x Tk."""

from __future__ import annotations

import torch
from torch import Tensor

from ...index import BlockIndex
from ...partial import Partial, empty_partial
from .. import kernel
from ..padding import by_row
from ..rows import gather_rows


def block_sparse(
    q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, *, scale: float, softcap: float | None
) -> Partial:
    if index.start is None:
        return _rows(q, k, v, index.blocks, index.counts, index, index.key_order, scale, softcap)
    starts, key_order = index.start.tolist(), index.key_order

    def row(b: int, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        cut, first = slice(b, b + 1), starts[b]
        order = None if key_order is None else key_order[cut, :, first:] - first
        return _rows(q, k, v, index.blocks[cut], index.counts[cut], index, order, scale, softcap)

    return by_row(q, k, v, index.start, row)


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    counts: Tensor,
    index: BlockIndex,
    order: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Partial:
    b, h, tq, d = q.shape
    hkv, tk, hs = k.shape[1], k.shape[2], blocks.shape[1]
    block_q, block_k, past = index.block_q, index.block_k, k.shape[2] - q.shape[2]
    per_kv = hs // hkv  # 1 where the group shares a row, else the size of the group
    if tq == 0:
        return empty_partial(q, v.shape[-1])
    out = q.new_empty(b, h, tq, v.shape[-1])
    lse = torch.empty(
        b, h, tq, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32, device=q.device
    )
    inside = torch.arange(block_k, device=q.device)
    most = counts.amax((0, 1)).tolist()
    grouped = q.reshape(b, hs, h // hs, tq, d)
    for n in range(-(-tq // block_q)):
        a, z = n * block_q, min((n + 1) * block_q, tq)
        m = most[n]
        if m == 0:
            empty = empty_partial(q[:, :, a:z], v.shape[-1])
            out[:, :, a:z], lse[:, :, a:z] = empty.out, empty.lse
            continue
        used = torch.arange(m, device=q.device) < counts[:, :, n, None]  # [B, Hs, m]
        first = torch.where(used, blocks[:, :, n, :m].long(), blocks[:, :, n, :1].long())
        places = (first[..., None] * block_k + inside).reshape(b, hs, -1)  # [B, Hs, m * block_k]
        exists = (places < tk) & used.repeat_interleave(block_k, -1)
        places = places.clamp_(max=tk - 1)
        positions = places if order is None else order.expand(b, hs, tk).gather(2, places)
        rows = torch.arange(past + a, past + z, device=q.device)
        mask = exists[:, :, None] & (positions[:, :, None] <= rows[:, None])  # [B, Hs, rows, keys]
        # Keys that no row may see are swapped for one that is seen, so that what lies there cannot matter.
        seen = mask.any(2)
        anchor = torch.gather(positions, 2, seen.int().argmax(2, keepdim=True))
        positions = torch.where(seen, positions, anchor)
        spread = positions.reshape(b, hkv, -1)
        key = gather_rows(k, spread).view(b, hs, -1, d) if per_kv > 1 else gather_rows(k, spread)
        value = gather_rows(v, spread).view(b, hs, places.shape[2], -1)
        folded = grouped[:, :, :, a:z].reshape(b, hs, -1, d)
        part = kernel.attend(
            folded, key, value, scale=scale, mask=mask.repeat(1, 1, h // hs, 1), softcap=softcap
        )
        out[:, :, a:z] = part.out.view(b, h, z - a, -1)
        lse[:, :, a:z] = part.lse.view(b, h, z - a)
    return Partial(out, lse)
