"""SALE's two passes: exact row sums over the first and the local blocks, four-bit logits of all blocks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocks import Grid
from ..keys import Keys
from ..ops.int4_scores import int4_block_max
from .int4_keys import Int4Keys

_TILE = {"cpu": 1 << 20, "cuda": 1 << 26}  # logits held at a time


def estimate_blocks(
    q: Tensor, keys: Keys, grid: Grid, local: int, q_bits: int | None
) -> tuple[Tensor, Tensor]:
    """The largest log of a relative attention score in each block [1, H, Nq, Nk], and which blocks the first
    pass has read, [Nq, Nk] bool: the first one and those with the last ``local`` keys of a query block."""
    near = (grid.end - local).clamp(min=0) // grid.block_k
    summary = Int4Keys(grid.block_k)
    k4 = summary.keys(keys.summary(summary), keys.kv)
    lse = _first_pass(q, keys, grid, near, local)
    largest = int4_block_max(q, k4, lse, keys.softmax, block_q=grid.block_q, q_bits=q_bits)
    return largest, grid.between(near, grid.last) | (grid.cols == 0)


def _first_pass(q: Tensor, keys: Keys, grid: Grid, near: Tensor, local: int) -> Tensor:
    """The log-sum-exp m + log l [B, H, Tq] of the logits of queries q [B, H, Tq, D] over the first block of
    keys and the blocks from ``near`` [Nq] on, which hold the last ``local`` keys of each query block."""
    softcap = keys.softmax.softcap
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    device, rows, block, size = q.device, q.shape[2], grid.block_q, grid.block_k
    first = max(0, keys.past + 1 - local) // size * size
    k = torch.cat([keys.read_keys(0, size), keys.read_keys(first, keys.length)], 2)
    batch, hkv = k.shape[:2]
    q = pad(q, (0, 0, 0, -rows % block)).unflatten(1, (hkv, -1)).unflatten(3, (-1, block))
    k, q = k.flatten(0, 1), q.flatten(0, 1)  # [B Hkv, ...]
    # Of each query block's keys the first block comes first, then as many as its near blocks can have.
    width = min(local + size - 1, keys.length)
    sink = torch.arange(size, device=device)
    step = max(1, _TILE.get(device.type, _TILE["cpu"]) // (grid.block_q * len(q) * q.shape[1] * width))
    parts = []
    for a in range(0, len(near), step):
        row = grid.begin[a : a + step, None] + torch.arange(block, device=device)  # [n, block_q]
        at = near[a : a + step, None] * size
        col = at + torch.arange(width, device=device)  # [n, width]
        place = torch.cat(
            [sink.expand(len(at), -1), (col - first).clamp_(max=keys.length - 1 - first) + size], 1
        )
        seen = torch.cat([sink.where(at > 0, keys.length), col], 1)[:, None] <= row[..., None]
        # [B Hkv, n, G, block_q, D]
        tile = q[:, :, a : a + step].transpose(1, 2).to(wide) * keys.softmax.scale
        logits = tile.flatten(2, 3) @ k[:, place].to(wide).transpose(2, 3)
        if softcap is not None:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        logits = logits.unflatten(2, (-1, block)).masked_fill_(~seen[:, None], -torch.inf)
        parts.append(logits.logsumexp(-1))
    return torch.cat(parts, 1).transpose(1, 2).flatten(2)[..., :rows].reshape(batch, -1, rows)
