"""``block_max``, one tile of queries and keys at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

_ROWS = 256  # queries of a tile, or one block if that is more
_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 27}  # of a tile, over all heads: 4 and 512 MiB


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

    def tile(row: int, rows: slice) -> Tile:
        queries = (grouped[row, :, :, rows].to(wide) * scale).flatten(1, 2)  # [Hkv, G * rows, D]

        def products(cols: slice) -> Tensor:
            return (queries @ k[row, :, cols].to(wide).transpose(-1, -2)).unflatten(1, (h // hkv, -1))

        def logits(largest: Tensor, cols: slice) -> Tensor:
            if softcap is not None:
                largest = largest.div_(softcap).tanh_().mul_(softcap)
            return largest.sub_(norm[row, :, :, rows])

        return Tile(products, logits)

    pooled = block_maxima(tile, norm, tq, past, block_q, block_k, start)
    pooled = pooled.exp_()  # the largest of exponentials is the exponential of the largest
    return pooled.flatten(1, 2) if heads == "each" else pooled.amax(2)


class Tile(NamedTuple):
    """What some queries of a row of the batch give. products: for keys (a slice of positions), [Hkv, G,
    queries, keys]; it may be asked for pairs that are not causal, never for the padding. value: what becomes
    of the largest in each block of these keys, [Hkv, G, queries, blocks] (overwritten), and rises with it.
    Work on every pair is what takes time; what rises with a product can wait until few are left."""

    products: Callable[[slice], Tensor]
    value: Callable[[Tensor, slice], Tensor]


def block_maxima(
    tile: Callable[[int, slice], Tile],
    like: Tensor,
    tq: int,
    past: int,
    block_q: int,
    block_k: int,
    start: Tensor | None,
) -> Tensor:
    """Largest value of the visible pairs of each block -> [B, Hkv, G, Nq, Nk], -inf where there is none.

    tile(b, queries): of row b. ``like`` [B, Hkv, G, ...] has the type and heads of the values.
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
            products, value = tile(row, slice(a, z))
            for c in range(first, past + z, broad):
                e = min(c + broad, past + z)
                values = products(slice(c, e))
                late = max(c, past + a + 1)  # from here on, not every query sees every key
                if e > late:
                    position = torch.arange(past + a, past + z, device=like.device)[:, None]
                    hidden = torch.arange(late, e, device=like.device) > position
                    values[..., late - c :].masked_fill_(hidden, -torch.inf)
                largest = _pool(values, block_k)
                blind = largest == -torch.inf
                largest = value(largest, slice(c, e)).masked_fill_(blind, -torch.inf)
                n, j = (a - begin) // block_q, (c - first) // block_k
                pooled = _pool(largest.transpose(2, 3), block_q).transpose(2, 3)
                out[row, :, :, n : n + pooled.shape[2], j : j + pooled.shape[3]] = pooled
    return out


def _pool(x: Tensor, block: int) -> Tensor:
    """Maximum of every ``block`` values along the last dimension."""
    if x.shape[-1] % block:  # pad copies where it has nothing to add, too
        x = pad(x, (0, -x.shape[-1] % block), value=-torch.inf)
    return x.unflatten(-1, (-1, block)).amax(-1)
