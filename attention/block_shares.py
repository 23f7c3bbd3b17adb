"""The share of the queries' attention that each block of keys holds, summed from tiles of a softmax."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from .ops.scores import scores
from .softmax import Softmax

_TILE = {"cpu": 1 << 20, "cuda": 1 << 27}  # probabilities held at a time


def block_shares(q: Tensor, k: Tensor, seen: Tensor, block_q: int, block_k: int, softmax: Softmax) -> Tensor:
    """Softmax over the keys that each query sees, summed over blocks of keys and blocks of queries.

    q [1, H, T, D], k [1, Hs, N, D], Hs KV heads or query heads; seen [T] int64 on the host, ascending: query
    t sees the first ``seen[t]`` keys, and where that is 0 its share is 0. -> [1, Hs, H / Hs, Nq, Nk] float32
    (float64 for float64 q); a query block of n queries has n in all. Nothing of size T x N is made.
    """
    length, (nq, nk) = k.shape[2], (-(-q.shape[2] // block_q), -(-k.shape[2] // block_k))
    cols, here = torch.arange(length, device=q.device), seen.to(q.device, non_blocking=True)
    most = _TILE.get(q.device.type, _TILE["cpu"])
    step = block_q * max(1, most // (q.shape[1] * block_q * length))
    tiles = []
    for a in range(0, q.shape[2], step):
        rows = seen[a : a + step]
        end = min(length, max(1, -(-int(rows[-1]) // block_k)) * block_k)  # whole blocks of keys
        logits = scores(q[:, :, a : a + step], k[:, :, :end], softmax)
        visible = here[a : a + step, None]
        share = torch.softmax(logits.masked_fill_(cols[:end] >= visible, -torch.inf), -1)
        if int(rows[0]) == 0:  # some query sees nothing
            share = share.masked_fill(visible == 0, 0)
        share = pad(share, (0, -end % block_k, 0, -len(rows) % block_q))
        share = share.unflatten(4, (-1, block_k)).sum(5).unflatten(3, (-1, block_q)).sum(4)
        tiles.append(pad(share, (0, nk - share.shape[4])))
    shares = torch.cat(tiles, 3)
    assert shares.shape[3] == nq
    return shares


def antidiagonal_shares(
    q: Tensor, k: Tensor, seen: Tensor, stride: int, block: int, softmax: Softmax
) -> Tensor:
    """The shares that XAttention (2503.16428) estimates from antidiagonals of the attention map.

    A tile of S = ``stride`` queries and S keys is scored by the mean logit on its antidiagonal: its last
    query with its first key, the one before with the second, and so on, every query and every key once.

        S = 4      k 0 1 2 3
                 q 0       x
                   1     x
                   2   x
                   3 x

    Softmax over the tiles of keys that a tile of queries sees gives each its share, and a block of ``block``
    keys has the share of its tiles, summed over the tiles of a block of ``block`` queries.

    q [1, H, T, D], k [1, Hs, N, D]; seen [ceil(T / S)] int64 on the host: how many tiles of keys each tile of
    queries sees. S divides ``block``. -> [1, Hs, H / Hs, Nq, Nk], of a total of block / S per query block.
    """
    k = pad(k, (0, 0, 0, -k.shape[2] % block)).unflatten(2, (-1, stride)).flatten(3)  # [1, Hs, N / S, S D]
    # In reverse order each query meets the key on its antidiagonal in the same place.
    q = pad(q, (0, 0, 0, -q.shape[2] % stride)).unflatten(2, (-1, stride)).flip(3).flatten(3)
    per = block // stride
    return block_shares(q, k, seen, per, per, replace(softmax, scale=softmax.scale / stride))
