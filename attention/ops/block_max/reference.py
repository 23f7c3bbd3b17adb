"""The definition of ``block_max``, with every probability written out."""

from __future__ import annotations

import torch
from torch import Tensor

from ...causal import causal_mask


def block_max(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float,
    block_q: int,
    block_k: int,
    softcap: float | None,
    start: Tensor | None,
    heads: str,
) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    b, h, tq, _ = q.shape
    hkv, tk = k.shape[1], k.shape[2]
    logits = (
        q.detach().to(wide) @ k.detach().to(wide).repeat_interleave(h // hkv, 1).transpose(-1, -2) * scale
    )
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    shares = torch.exp(logits - lse.detach().to(wide)[..., None])
    shares = shares.masked_fill(~causal_mask(tq, tk, start, b, q.device), 0)
    pooled = pool_blocks(shares, block_q, block_k, start, 0.0)
    return pooled if heads == "each" else pooled.unflatten(1, (hkv, h // hkv)).amax(2)


def pool_blocks(x: Tensor, block_q: int, block_k: int, start: Tensor | None, empty: float) -> Tensor:
    """Maximum over blocks of x [B, H, Tq, Tk] -> [B, H, Nq, Nk], ``empty`` where a block holds nothing."""
    b, h, tq, tk = x.shape
    nq, nk = -(-tq // block_q), -(-tk // block_k)
    out = x.new_full((b, h, nq, nk), empty)
    for row in range(b):
        first = 0 if start is None else int(start[row])
        begin = max(0, first - (tk - tq))
        for n in range(nq):
            for j in range(nk):
                a, c = begin + n * block_q, first + j * block_k
                if a < tq and c < tk:
                    out[row, :, n, j] = x[row, :, a : a + block_q, c : c + block_k].amax((1, 2))
    return out
