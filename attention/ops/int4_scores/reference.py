"""The definitions, key by key, and with every logit written out."""

from __future__ import annotations

import torch
from torch import Tensor

from ...causal import causal_mask
from ..block_max.reference import pool_blocks
from .storage import Int4, pack, round_rows


def quantise_int4(k: Tensor, block: int, *, start: Tensor | None) -> Int4:
    b, h, t, d = k.shape
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    packed = torch.zeros(b, h, t, d // 2, dtype=torch.uint8, device=k.device)
    scale = torch.zeros(b, h, t, dtype=torch.float32, device=k.device)
    mean = torch.zeros(b, h, -(-t // block), d, dtype=k.dtype, device=k.device)
    for row in range(b):
        first = 0 if start is None else int(start[row])
        for j, a in enumerate(range(first, t, block)):
            keys = k[row, :, a : a + block].to(wide)
            mean[row, :, j] = keys.mean(1).to(k.dtype)
            integers, step = round_rows(keys - mean[row, :, j, None].to(wide), 7)
            packed[row, :, a : a + block] = pack(integers.to(torch.int8))
            scale[row, :, a : a + block] = step[..., 0]
    return Int4(packed=packed, scale=scale, mean=mean, block=block, start=start)


def int4_scores(q: Tensor, k4: Int4, *, scale: float) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(wide).unflatten(1, (k4.mean.shape[1], -1))
    return grouped @ k4.dequantise().to(wide)[:, :, None].transpose(-1, -2) * scale


def int4_block_max(
    q: Tensor,
    k4: Int4,
    row_offset: Tensor,
    *,
    scale: float,
    block_q: int,
    softcap: float | None,
    q_bits: int | None,
) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    query, group = q.detach().to(wide), q.shape[1] // k4.mean.shape[1]
    rounded = query
    if q_bits is not None:
        integers, step = round_rows(query, 2 ** (q_bits - 1) - 1)
        rounded = integers * step
    block = k4.block_of()[:, None, :, None].expand(*k4.scale.shape, q.shape[3])
    mean = k4.mean.to(wide).gather(2, block)  # of each key's block
    varying = k4.integers().to(wide) * k4.scale[..., None]
    mean, varying = (x.repeat_interleave(group, 1).transpose(-1, -2) for x in (mean, varying))
    logits = (rounded @ varying + query @ mean) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    values = logits - row_offset.to(wide)[..., None]
    causal = causal_mask(q.shape[2], k4.scale.shape[2], k4.start, q.shape[0], q.device)
    return pool_blocks(values.masked_fill(~causal, -torch.inf), block_q, k4.block, k4.start, -torch.inf)
