"""Block summaries, whole on every rank: each rank computes those of its own keys, then all are gathered.

A summary is hundreds of times smaller than the keys that it describes. With all of them every rank selects as
one device does, by absolute block number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...attention.sources import Sources
from ...attention.summary import Summaries, Summary, by_start
from ..group.comm import Ranks
from .edges import Beyond, beyond
from .gather import gather_rows
from .layout import Layout, Span, Split


def extend(
    summary: Summary,
    shared: Summaries,
    k: Tensor,
    held: Layout,
    recent: Tensor,
    starts: list[int] | None,
    ranks: Ranks,
) -> Tensor:
    """Summarise the keys after the first ``shared.done``, where every rank has the newest keys.

    k [B, Hkv, n, D]: the keys that this rank holds by ``held``. recent [B, Hkv, t, D]: the keys of the last t
    positions, the same on every rank. -> recent; where the open block begins before it, with the keys from
    there on, which are gathered from the ranks.
    """
    total, begin = held.length, shared.open(summary, starts)
    known = total - recent.shape[2]
    if begin < known:
        layout = held.cut(begin, known)
        a, b = held.below(ranks.rank, begin), held.below(ranks.rank, known)
        recent = torch.cat([gather_rows(k[:, :, a:b], layout, ranks, "open_block"), recent], 2)
        known = begin
    shared.extend(summary, Sources({"keys": recent[:, :, begin - known :]}), begin, starts)
    return recent


def extend_split(
    summary: Summary,
    shared: Summaries,
    k: Tensor,
    past: Layout,
    past_k: Tensor,
    split: Split,
    starts: list[int] | None,
    ranks: Ranks,
) -> None:
    """Summarise the new keys of all ranks. k [B, Hkv, split.rows, D]: those that this rank has computed of
    ``split``. past_k [B, Hkv, n, D]: the keys of earlier calls that this rank holds by ``past``."""
    size = summary.block
    assert size is not None, "a summary of single keys stays on their rank"
    firsts = starts or [0] * k.shape[0]
    if shared.done(summary) < split.begin and past.length:  # no method has used this summary since
        recent = past_k.new_empty(*past_k.shape[:2], 0, past_k.shape[3])
        extend(summary, shared, past_k, past, recent, starts, ranks)
    opened = min(shared.open(summary, starts), split.begin)
    head = k[:, :, :0]
    if opened < split.begin:
        a = past.below(ranks.rank, opened)
        head = gather_rows(past_k[:, :, a:], past.cut(opened, split.begin), ranks, "open_block")
    tails = _tails(size, k, split, firsts, ranks)
    plan = {
        chunk: [(*_blocks(size, chunk, split.begin, first), first, rows) for first, rows in by_start(firsts)]
        for chunks in split.chunks
        for chunk in chunks
    }
    room = max(count for parts in plan.values() for _, count, _, _ in parts)
    like = summary.compute(Sources({"keys": k[:, :, :1]}))
    mine = like.new_zeros(len(split.chunks[0]), *like.shape[:2], room, like.shape[3])
    for i, (slot, chunk) in enumerate(_every_slot(split, ranks.rank)):
        keys, at = k[:, :, slot], chunk[0]
        if chunk[0] == split.begin:
            keys, at = torch.cat([head, keys], 2), opened
        if chunk in tails:
            keys = torch.cat([keys, tails[chunk].after], 2)
        for block, count, first, rows in plan[chunk]:
            begin = first + block * size - at
            if count:
                entries = summary.compute(Sources({"keys": keys[rows][:, :, begin : begin + count * size]}))
                mine[i][rows, :, : entries.shape[2]] = entries
    every = ranks.all_gather(mine, "summaries")  # [P, chunks, B, Hkv, room, width]
    buffer = shared.room(summary, like, k.shape[0], split.end)
    for rank, chunks in enumerate(split.chunks):
        for i, chunk in enumerate(chunks):
            for block, count, _, rows in plan[chunk]:
                buffer[rows, :, block : block + count] = every[rank, i][rows, :, :count]


def _every_slot(split: Split, rank: int) -> list[tuple[slice, Span]]:
    return [
        (slice(i * split.width, i * split.width + b - a), (a, b))
        for i, (a, b) in enumerate(split.chunks[rank])
    ]


def _blocks(block: int, chunk: Span, begin: int, first: int) -> tuple[int, int]:
    """(the number of the first, the count) of the blocks whose summaries the rank of a chunk computes: those
    that begin in the chunk, and for the call's first chunk the block that was open before the call. The row
    of the batch begins at position ``first``."""
    a, b = chunk
    if a >= b or first >= b:
        return 0, 0
    low = max(a - first, 0)
    number = low // block if a == begin else -(-low // block)
    return number, max(0, -(-(b - first) // block) - number)


def _tails(size: int, k: Tensor, split: Split, firsts: list[int], ranks: Ranks) -> dict[Span, Beyond]:
    """By chunk, the keys after it that its last block takes in. Nothing is sent where blocks end with
    chunks."""
    chunks = [chunk for rank in range(split.size) for _, chunk in split.slots(rank)]
    if all((a - first) % size == 0 or a <= first for a, _ in chunks for first in firsts):
        return {}
    return beyond(k, 0, size - 1, split, ranks, "edges")[0]
