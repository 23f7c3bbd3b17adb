"""What gates are trained towards: where the model's own attention lies, per block of keys or on sampled
rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..keys import Keys
from ..ops.block_max import block_max
from ..ops.flash import flash
from ..ops.scores import scores

_TILE = {"cpu": 1 << 22, "cuda": 1 << 27}  # probabilities held at a time


@torch.no_grad()
def block_truth(q: Tensor, keys: Keys, block_q: int, block_k: int, heads: str = "each") -> Tensor:
    """The largest attention probability of each block, every row normalised to the sum 1 (SeerAttention,
    arXiv:2410.13276; heads="group": the maximum over the query heads of a group too, as in
    SeerAttention-R, arXiv:2506.08889).

    q [B, H, T, D] are all queries of the window ``keys``. -> [B, H | Hkv, ceil(T / block_q),
    ceil(T / block_k)] float32. Nothing of size T x T is made.
    """
    lse = flash(q, keys.kv, keys.softmax, start=keys.start).lse
    largest = block_max(
        q, keys.kv.k, lse, keys.softmax, block_q=block_q, block_k=block_k, start=keys.start, heads=heads
    )
    return largest / largest.sum(-1, keepdim=True).clamp(min=torch.finfo(largest.dtype).tiny)


@torch.no_grad()
def attention_of_rows(q: Tensor, keys: Keys, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The teacher's attention of some queries of a window, in tiles of a bounded size.

    q [B, H, T, D] are all queries of the window ``keys``, of which no row is padded; rows [R], which of them.
    -> (the queries [n] of a tile; their probabilities [B, Hkv, G, n, T] float32, float64 for float64 q).
    Nothing of size T x T is made.
    """
    rows = rows.to(q.device)
    k, place = keys.kv.k.to(q.dtype), torch.arange(keys.length, device=q.device)
    most = _TILE.get(q.device.type, _TILE["cpu"])
    for some in rows.split(max(1, most // (q.shape[0] * q.shape[1] * keys.length))):
        logits = scores(q[:, :, some], k, keys.softmax)
        yield some, logits.masked_fill_(place > some[:, None], -torch.inf).softmax(-1)


@torch.no_grad()
def row_truth(q: Tensor, keys: Keys, rows: Tensor, block: int, heads: str) -> Tensor:
    """The largest attention probability of some queries in each block of keys, every row normalised to the
    sum 1 (heads="each"; heads="group": the maximum over the query heads of a group too, as in
    SeerAttention-R, arXiv:2506.08889).

    As ``attention_of_rows``. -> [B, Hkv, G | 1, R, ceil(T / block)] float32 (float64 for float64 q).
    """
    parts = []
    for _, share in attention_of_rows(q, keys, rows):
        share = pad(share, (0, -keys.length % block)).unflatten(4, (-1, block))
        largest = share.amax(-1)
        parts.append(largest.amax(2, keepdim=True) if heads == "group" else largest)
    largest = torch.cat(parts, 3)
    return largest / largest.sum(-1, keepdim=True)


def kl_of_rows(log_gate: Tensor, truth: Tensor) -> Tensor:
    """The KL divergence of a gate from the truth: summed over blocks, meaned over all rows. A scalar.

    log_gate [..., N]: log-probabilities of the gate, -inf only where truth is 0. truth [..., N]: rows of the
    sum 1. The papers mean over blocks as well, so their loss and learning rate depend on the length.
    """
    apart = torch.where(truth > 0, truth * (truth.clamp(min=1e-30).log() - log_gate), 0.0)
    return apart.sum(-1).mean()
