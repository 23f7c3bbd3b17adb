"""Four-bit keys unpacked tile by tile, in cache, while their products are taken."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..block_max.eager import Tile, block_maxima
from ..torch_private import cpu_has_vnni, int8_matmul
from .storage import Int4, pack, round_rows, unpack

_TILE = 1 << 20  # numbers widened at a time, over all heads of a row


@torch.no_grad()
def quantise_int4(k: Tensor, block: int, *, start: Tensor | None) -> Int4:
    b, h, t, d = k.shape
    packed = torch.zeros(b, h, t, d // 2, dtype=torch.uint8, device=k.device)
    scale = torch.zeros(b, h, t, dtype=torch.float32, device=k.device)
    mean = torch.zeros(b, h, -(-t // block), d, dtype=k.dtype, device=k.device)
    step = block * max(1, _TILE // (h * d * block))
    for row, first in enumerate([0] * b if start is None else start.tolist()):
        for a in range(first, t, step):
            piece, at = k[row, :, a : a + step], slice(a, a + step)
            integers, scale[row, :, at], means = _round_blocks(piece, block)
            packed[row, :, at] = pack(integers.to(torch.int8))
            j = (a - first) // block
            mean[row, :, j : j + means.shape[1]] = means
    return Int4(packed=packed, scale=scale, mean=mean, block=block, start=start)


def _round_blocks(k: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """k [Hkv, T, D] -> integers of its shape, scales [Hkv, T], means [Hkv, ceil(T / block), D]."""
    t = k.shape[1]
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    filled = pad(k.to(wide), (0, 0, 0, -t % block)).unflatten(1, (-1, block))
    held = torch.full((filled.shape[1], 1), block, dtype=wide, device=k.device)
    held[-1] = t - (len(held) - 1) * block
    mean = (filled.sum(2) / held).to(k.dtype)
    integers, scale = round_rows((filled - mean.to(wide)[:, :, None]).flatten(1, 2)[:, :t], 7)
    return integers, scale[..., 0], mean


def int4_scores(q: Tensor, k4: Int4, *, scale: float) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    b, h, t, d = q.shape
    hkv, n = k4.mean.shape[1], k4.scale.shape[2]
    rows = (q.to(wide) * scale).reshape(b, hkv, -1, d)
    of_means = rows @ k4.mean.to(wide).transpose(-1, -2)  # [B, Hkv, G * T, blocks]
    block = k4.block_of()[:, None, None].expand(b, hkv, rows.shape[2], n)
    out = of_means.gather(3, block)
    step = max(256, _TILE // (b * hkv * d))
    for a in range(0, n, step):
        keys = unpack(k4.packed[:, :, a : a + step]).to(wide)
        product = rows @ keys.transpose(-1, -2)
        out[..., a : a + step] += product.mul_(k4.scale[:, :, None, a : a + step])
    if k4.start is not None:
        padding = torch.arange(n, device=q.device) < k4.start.to(q.device)[:, None]
        out = out.masked_fill(padding[:, None, None], 0)
    return out.view(b, hkv, h // hkv, t, n)


@torch.no_grad()
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
    hkv, past = k4.mean.shape[1], k4.scale.shape[2] - q.shape[2]
    starts = None if k4.start is None else k4.start.tolist()
    grouped, offset = (x.unflatten(1, (hkv, -1)) for x in (q, row_offset.to(wide)[..., None]))
    group = grouped.shape[2]
    # Integers are multiplied exactly either way, as bytes many times faster where the CPU can.
    bytes_do = q_bits is not None and q.device.type == "cpu" and cpu_has_vnni()

    def tile(row: int, rows: slice) -> Tile:
        queries = grouped[row, :, :, rows].to(wide).flatten(1, 2)  # [Hkv, G * rows, D]
        rounded, step = queries, torch.ones_like(queries[..., :1])
        if q_bits is not None:
            rounded, step = round_rows(queries, 2 ** (q_bits - 1) - 1)
        if bytes_do:
            rounded = rounded.to(torch.int8)
        first = 0 if starts is None else starts[row]

        def products(cols: slice) -> Tensor:
            keys = unpack(k4.packed[row, :, cols])
            if bytes_do:
                product = queries.new_empty(hkv, rounded.shape[1], keys.shape[1])
                for head, (a, b) in enumerate(zip(rounded, keys, strict=True)):
                    product[head].copy_(int8_matmul(a, b.T))
            else:
                product = rounded @ keys.to(wide).transpose(-1, -2)
            return product.mul_(k4.scale[row, :, None, cols]).unflatten(1, (group, -1))

        def logits(largest: Tensor, cols: slice) -> Tensor:
            j = slice((cols.start - first) // k4.block, -((first - cols.stop) // k4.block))
            of_means = queries @ k4.mean[row, :, j].to(wide).transpose(-1, -2)
            largest = (largest.flatten(1, 2).mul_(step).add_(of_means)).mul_(scale)
            if softcap is not None:
                largest = largest.div_(softcap).tanh_().mul_(softcap)
            return largest.unflatten(1, (group, -1)).sub_(offset[row, :, :, rows])

        return Tile(products, logits)

    pooled = block_maxima(tile, offset, q.shape[2], past, block_q, k4.block, k4.start)
    return pooled.flatten(1, 2)
