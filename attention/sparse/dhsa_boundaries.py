"""DHSA's learned chunks of keys: a predictor of their boundaries, its loss, and tokens chosen by such
chunks."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity, linear, pad, rms_norm

from ..boundaries import highest_apart
from ..budget import select_topk
from ..calibration.truth import attention_of_rows
from ..gqa import group_scores
from ..keys import Keys
from ..mass import sample_rows
from ..method import LayerInfo
from ..ops.pool import pool, pool_segments
from ..ops.scores import scores
from ..selection import BlockIndex

WINDOW = 4  # keys on each side of a possible boundary
QUERIES = 128  # of a window of training, whose attention is compared
TILE = 1024  # positions that are scored at a time
_CPU, _DEVICE = 1 << 22, 1 << 26  # scores held at a time


class BoundaryPredictor(nn.Module):
    """Scores how well a chunk of keys may begin at each position, from the means l and r of the 4 keys before
    and of the 4 keys from it on, over all KV heads side by side: [l, r, |l - r|, l * r, cos(l, r)], through
    one hidden layer of ``dim``. l and r are scaled to the mean square 1, as keys of some models are large."""

    def __init__(self, layer: LayerInfo, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(4 * layer.num_kv_heads * layer.head_dim + 1, dim)
        self.out = nn.Linear(dim, 1)

    def forward(self, k: Tensor) -> Tensor:
        """k [B, Hkv, T, D] -> logits [B, T] of a boundary before each key; -inf where a side has fewer than 4
        keys."""
        b, _, t, _ = k.shape
        wide = torch.promote_types(k.dtype, self.out.weight.dtype)
        if t < 2 * WINDOW:
            return torch.full((b, t), -torch.inf, dtype=wide, device=k.device)
        tiles = range(0, t - 2 * WINDOW + 1, TILE)
        logits = torch.cat([self._tile(k[:, :, n : n + TILE + 2 * WINDOW - 1], wide) for n in tiles], 1)
        return pad(logits, (WINDOW, WINDOW - 1), value=-torch.inf)

    def _tile(self, k: Tensor, wide: torch.dtype) -> Tensor:
        """k [B, Hkv, n + 7, D] -> logits [B, n] of a boundary before each key with 4 keys on both sides."""
        means = k.transpose(1, 2).flatten(2).to(wide).unfold(1, WINDOW, 1).mean(-1)  # [B, n + 4, C]
        means = rms_norm(means, means.shape[-1:], eps=1e-6)
        left, right = means[:, :-WINDOW], means[:, WINDOW:]
        cosine = cosine_similarity(left, right, dim=-1)[..., None]
        features = torch.cat([left, right, (left - right).abs(), left * right, cosine], -1)
        hidden = linear(features, self.hidden.weight.to(wide), self.hidden.bias.to(wide)).relu()
        return linear(hidden, self.out.weight.to(wide), self.out.bias.to(wide))[..., 0]


def boundary_loss(predictor: BoundaryPredictor, q: Tensor, keys: Keys) -> Tensor:
    """The cross-entropy of the predictor's boundaries on one window, meaned over positions; a scalar.

    q [B, H, T, D] are all queries of the window. The attention that the 4 keys before a position and the 4
    from it on receive from later queries (all heads, sampled rows) is compared: the label is 1 minus the
    smaller over the larger, 0.5 where one is twice the other. Positions without later queries are left out.
    """
    logits = predictor(keys.kv.k)
    place = torch.arange(keys.length, device=q.device)
    known = (place >= WINDOW) & (place <= keys.length - WINDOW)
    sums = logits.new_zeros(2, *logits.shape)
    wide = q if q.dtype == torch.float64 else q.float()
    for rows, attention in attention_of_rows(wide, keys, sample_rows(keys.tq, QUERIES)):
        windows = attention.mean((1, 2)).unfold(2, WINDOW, 1).sum(-1)  # [B, n, T - 3]
        left, right = pad(windows, (WINDOW, -1)), pad(windows, (0, WINDOW - 1))  # [B, n, T]
        later = rows[:, None] >= place + WINDOW - 1  # the query sees all 8 keys
        sums += torch.stack([(side * later).sum(1) for side in (left, right)])
    larger, smaller = sums.amax(0), sums.amin(0)
    label = 1 - smaller / larger.clamp(min=1e-30)
    known = known & (larger > 0)
    return binary_cross_entropy_with_logits(logits[known], label[known])


def chunk_bounds(logits: Tensor, segment: int, least: int, apart: int) -> Tensor:
    """Where chunks begin and the last one ends: [B, S + 1] int64, ascending; equal neighbours are an empty
    chunk.

    logits [B, T] of boundaries; those above 0 are candidates. Every segment of ``segment`` positions has
    chunks of its own, at most segment / least of them: its best boundaries, of which none is ``apart`` or
    fewer positions from another or from the segment's edge. So they depend on this segment's keys alone.
    """
    length = logits.shape[1]
    split = pad(logits, (0, -length % segment), value=-torch.inf).unflatten(1, (-1, segment))
    place, edge = torch.arange(segment, device=logits.device), max(apart + 1, WINDOW)
    split = split.masked_fill((place < edge) | (place > segment - edge), -torch.inf)
    chosen = highest_apart(split, segment // least - 1, apart, 0.0)  # [B, segments, n]
    begins = torch.arange(split.shape[1], device=logits.device)[:, None] * segment
    return pad((pad(chosen, (1, 0)) + begins).flatten(1), (0, 1), value=length).clamp(max=length)


def tokens_by_chunks(
    q: Tensor,
    keys: Keys,
    bounds: Tensor,
    sizes: Tensor,
    *,
    block_q: int,
    first: int,
    local: int,
    usual: int,
    gqa_reduce: str,
) -> BlockIndex:
    """The tokens of the best chunks for each block of ``block_q`` queries q [B, H, T, D] of a call.

    bounds [B, S + 1] of the chunks, sizes [Nq]: tokens that a block of queries reads. Queries and keys of a
    chunk are represented by their mean times the square root of their number; all tokens of a chunk have its
    score, and a chunk that fits in part is read from its beginning on. The first ``first`` tokens, the last
    ``local`` of each query and the block's own are always read. usual: the length of a chunk whose score is a
    mean logit.
    """
    k, device = keys.read_all_keys(), q.device
    chunks = pool_segments(k, bounds, mode="length_normalised")  # [B, Hkv, S, D]
    queries = pool(q, block_q, mode="length_normalised")  # [B, H, Nq, D]
    softmax = replace(keys.softmax, scale=keys.softmax.scale / math.sqrt(block_q * usual))
    place = torch.arange(keys.length, device=device)
    number = torch.searchsorted(bounds[:, 1:].contiguous(), place.repeat(len(bounds), 1), right=True)
    begins = torch.arange(keys.past, keys.length, block_q, device=device)
    step = max(1, (_CPU if device.type == "cpu" else _DEVICE) // (q.shape[0] * q.shape[1] * keys.length))
    blocks, counts, most = [], [], int(sizes.max())
    for n in range(0, len(begins), step):
        begin = begins[n : n + step, None]
        near = (begin - (local - 1)).clamp(min=0)
        before = (bounds[:, None, :-1] < near) & (bounds.diff(dim=1) > 0)[:, None]  # [B, n, S]
        ranked = group_scores(scores(queries[:, :, n : n + step], chunks, softmax), before, gqa_reduce)
        ranked = ranked.gather(3, number[:, None, None].expand(*ranked.shape[:3], -1))  # [B, Hs, n, T]
        ranked = ranked.masked_fill((place < first) | (place >= near), torch.inf)
        ranked = ranked.masked_fill(place >= begin + block_q, -torch.inf)
        size = sizes[n : n + step].to(device).expand(ranked.shape[:3])
        chosen, count = select_topk(ranked, size, most)
        assert count is not None
        blocks.append(pad(chosen, (0, most - chosen.shape[3])).int())
        counts.append(count)
    return BlockIndex(blocks=torch.cat(blocks, 2), counts=torch.cat(counts, 2), block_q=block_q, block_k=1)
