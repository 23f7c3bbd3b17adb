"""``block_sparse``: per query block and index head, gather its key blocks and call the library's attention.

A row of work is one query block of one head of the index: the queries of all heads that share the index row,
folded into rows, against exactly the keys of its blocks. Blocks that end before the query block begins need
no mask; only the keys of the others, which come last, are masked by position.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...index import BlockIndex
from ...partial import Partial, empty_partial
from .. import kernel
from ..padding import by_row


def block_sparse(
    q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, *, scale: float, softcap: float | None
) -> Partial:
    starts = [0] * q.shape[0] if index.start is None else index.start.tolist()
    key_order = index.key_order

    def row(b: int, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        order = None if key_order is None else key_order[b, :, starts[b] :] - starts[b]
        return _row(q, k, v, index.blocks[b], index.counts[b], index, order, scale, softcap)

    return by_row(q, k, v, starts, row)


def _row(
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
    """One row of the batch without its padding: q [1, H, Tq, D], blocks [Hs, Nq, M], order [Hs, Tk]."""
    _, h, tq, d = q.shape
    hkv, tk, hs = k.shape[1], k.shape[2], blocks.shape[0]
    block_q, past, share = index.block_q, tk - tq, h // hs
    grouped = q[0].unflatten(0, (hs, share))  # [Hs, heads that share an index row, Tq, D]
    natural = order is None and index.block_k > 1
    number: Any = blocks.tolist() if natural else blocks
    used = counts.tolist()
    result = empty_partial(q, v.shape[3])
    out, lse = (x[0].unflatten(0, (hs, share)) for x in result)
    for n, a in enumerate(range(0, tq, block_q)):
        rows = min(block_q, tq - a)
        for s in range(hs):
            chosen = number[s][n][: used[s][n]]
            read = _natural if natural else functools.partial(_places, None if order is None else order[s])
            kv = s * hkv // hs
            key, value, mask = read(k[0, kv], v[0, kv], chosen, index.block_k, past + a, rows)
            if key.shape[0] == 0:
                continue
            part = kernel.attend(
                grouped[s, :, a : a + rows].reshape(1, 1, -1, d),
                key[None, None],
                value[None, None],
                scale=scale,
                mask=mask.repeat(share, 1)[None, None] if mask.shape[1] else None,
                softcap=softcap,
            )
            out[s, :, a : a + rows] = part.out.view(share, rows, -1)
            lse[s, :, a : a + rows] = part.lse.view(share, rows)
    return result


def _natural(
    k: Tensor, v: Tensor, chosen: list[int], block_k: int, first: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [N, D] of the chosen blocks that some of the queries ``first`` .. ``first + rows - 1``
    see, and which of the last M keys each query sees, [rows, M] bool; every query sees those before."""
    chosen = [j for j in chosen if j * block_k < first + rows]
    late = tuple(j * block_k - first for j in chosen if (j + 1) * block_k > first + 1)
    size = len(chosen) * block_k - (max(0, late[-1] + block_k - rows) if late else 0)
    blocks = torch.tensor(chosen, dtype=torch.long, device=k.device)
    return (
        _gather(k, blocks, block_k, size),
        _gather(v, blocks, block_k, size),
        _late_mask(late, block_k, rows, k.device),
    )


def _places(
    order: Tensor | None, k: Tensor, v: Tensor, chosen: Tensor, block_k: int, first: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same where blocks are of single keys, or of keys in another ``order`` [Tk]: what each query sees
    goes by position."""
    positions = chosen.long()
    if block_k > 1:
        positions = (positions[:, None] * block_k + torch.arange(block_k, device=k.device)).view(-1)
    if order is not None:
        positions = order[positions[positions < order.shape[0]]].long()
    common = positions[positions <= first]
    late = positions[(positions > first) & (positions < first + rows)]
    taken = torch.cat([common, late])
    mask = late <= torch.arange(first, first + rows, device=k.device)[:, None]
    return k.index_select(0, taken), v.index_select(0, taken), mask


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept for calls with gradients, too
def _late_mask(late: tuple[int, ...], block_k: int, rows: int, device: torch.device) -> Tensor:
    """Which of ``rows`` queries see which keys of the blocks that do not all end before the first of them.

    late: where those blocks begin, counted from the first query. -> [rows, keys before the last query's end].

        late = (0,)   x . . .      late = (-2, 2)   x x x . . .
        rows = 4      x x . .      rows = 4         x x x x . .
                      x x x .                       x x x x x .
                      x x x x                       x x x x x x
    """
    places = (
        torch.tensor(late, dtype=torch.long, device=device)[:, None] + torch.arange(block_k, device=device)
    ).view(-1)
    return places[places < rows] <= torch.arange(rows, device=device)[:, None]


def _gather(x: Tensor, blocks: Tensor, block_k: int, size: int) -> Tensor:
    """The first ``size`` of the keys x [Tk, D] in ``blocks``, one after another; whole blocks in one copy
    each."""
    t, d = x.shape
    if not x.is_contiguous():
        places = blocks.long()[:, None] * block_k + torch.arange(block_k, device=x.device)
        return x.index_select(0, places.view(-1)[:size])
    whole = size // block_k
    runs = x[: t // block_k * block_k].view(-1, block_k * d)
    taken = runs.index_select(0, blocks[:whole]).view(-1, d)
    if whole * block_k == size:
        return taken
    return torch.cat([taken, x.narrow(0, int(blocks[whole]) * block_k, size - whole * block_k)])
