"""``block_max``, one tile of queries and keys at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

_ROWS = 256  # queries of a tile, or one block if that is more
_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 27}  # of a tile, over all heads: 16 and 512 MiB


@torch.no_grad()
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
    b, h, tq, d = q.shape
    hkv, past = k.shape[1], k.shape[2] - tq
    grouped = q.reshape(b, hkv, h // hkv, tq, d)
    norm = lse.to(wide).reshape(b, hkv, h // hkv, tq, 1)

    def tiles(row: int, rows: slice) -> Callable[[slice], Tensor]:
        queries = (grouped[row, :, :, rows].to(wide) * scale).flatten(1, 2)  # [Hkv, G * rows, D]

        def tile(cols: slice) -> Tensor:
            logits = queries @ k[row, :, cols].to(wide).transpose(-1, -2)
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            return logits.unflatten(1, (h // hkv, -1)).sub_(norm[row, :, :, rows])

        return tile

    pooled = block_maxima(tiles, norm, tq, past, block_q, block_k, start)
    pooled = pooled.exp_()  # the largest of exponentials is the exponential of the largest
    return pooled.flatten(1, 2) if heads == "each" else pooled.amax(2)


def block_maxima(
    tiles: Callable[[int, slice], Callable[[slice], Tensor]],
    like: Tensor,
    tq: int,
    past: int,
    block_q: int,
    block_k: int,
    start: Tensor | None,
) -> Tensor:
    """Maximum over the visible pairs of each block -> [B, Hkv, G, Nq, Nk], -inf where there is none.

    tiles(b, queries)(keys) gives the values [Hkv, G, queries, keys] of row b; it may be asked for pairs that
    are not causal, never for the padding. ``like`` [B, Hkv, G, ...] has the type and heads of the values.
    """
    b, hkv, group = like.shape[:3]
    out = like.new_full((b, hkv, group, -(-tq // block_q), -(-(past + tq) // block_k)), -torch.inf)
    tall = block_q * max(1, _ROWS // block_q)
    broad = _LOGITS.get(like.device.type, _LOGITS["cpu"]) // (hkv * group * tall)
    broad = block_k * max(1, broad // block_k)
    for row, first in enumerate([0] * b if start is None else start.tolist()):
        begin = max(0, first - past)
        for a in range(begin, tq, tall):
            z = min(a + tall, tq)
            tile = tiles(row, slice(a, z))
            for c in range(first, past + z, broad):
                e = min(c + broad, past + z)
                values = tile(slice(c, e))
                if e > past + a + 1:
                    position = torch.arange(past + a, past + z, device=like.device)[:, None]
                    values = values.masked_fill(torch.arange(c, e, device=like.device) > position, -torch.inf)
                n, j = (a - begin) // block_q, (c - first) // block_k
                pooled = _pool(_pool(values, block_k).transpose(2, 3), block_q).transpose(2, 3)
                out[row, :, :, n : n + pooled.shape[2], j : j + pooled.shape[3]] = pooled
    return out


def _pool(x: Tensor, block: int) -> Tensor:
    """Maximum of every ``block`` values along the last dimension."""
    x = pad(x, (0, -x.shape[-1] % block), value=-torch.inf)
    return x.unflatten(-1, (-1, block)).amax(-1)
