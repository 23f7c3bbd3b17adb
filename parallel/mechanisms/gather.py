"""Moves keys and values between ranks: all of them, a range of positions, or only the selected ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..group.autograd import gather as gather_with_gradient
from ..group.comm import Ranks
from .layout import Layout, Split


def gather_rows(x: Tensor, layout: Layout, ranks: Ranks, name: str) -> Tensor:
    """x [..., n, D], the entries that this rank holds by ``layout`` -> [..., N, D], those of all ranks in the
    order of positions.

    Sends P - 1 times as many entries as the fullest rank holds.
    """
    counts = [layout.count(rank) for rank in range(ranks.size)]
    padded = torch.nn.functional.pad(x, (0, 0, 0, max(counts) - x.shape[-2]))
    every = gather_with_gradient(padded, ranks, name)
    pieces = []
    for rank, spans in enumerate(layout.spans):
        at = 0
        for a, b in spans:
            pieces.append((a, every[rank].narrow(-2, at, b - a)))
            at += b - a
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda pair: pair[0])], -2)


def gather_all(
    k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, past: Layout, split: Split, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """All-gather pass-KV (2411.01783): k, v [B, Hkv, split.rows, D] just computed and the stored past_k,
    past_v [B, Hkv, n, D] -> the keys and values [B, Hkv, split.end, D] of every position. Differentiable in
    k, v.
    """
    width = k.shape[-1]
    new = split.joined(gather_with_gradient(torch.cat([k, v], -1), ranks, "gather"))
    if past.length:
        new = torch.cat([gather_rows(torch.cat([past_k, past_v], -1), past, ranks, "gather"), new], -2)
    return new[..., :width], new[..., width:]


def fetch(
    wanted: Tensor, k: Tensor, v: Tensor, layout: Layout, into_k: Tensor, into_v: Tensor, ranks: Ranks
) -> None:
    """Fill into_k, into_v [B, Hkv, T, D] at the positions that ``wanted`` [B, Hkv, T] marks on this rank.

    k, v [B, Hkv, n, D]: what this rank holds by ``layout``. First ``wanted`` travels as bits, then each
    marked (position, KV head) once to every rank that wants it and does not hold it; nothing else.
    """
    me, width = ranks.rank, k.shape[-1]
    length = wanted.shape[-1]
    requests = ranks.all_gather(_pack_bits(wanted), "selection")  # [P, B, Hkv, ceil(T / 8)]
    places = [layout.cut(0, length).positions(rank, k.device) for rank in range(ranks.size)]
    mine = places[me]
    into_k[:, :, mine], into_v[:, :, mine] = k[:, :, : mine.shape[0]], v[:, :, : mine.shape[0]]
    rows = torch.cat([k, v], -1)
    out, send, receive = [], [], []
    for rank in range(ranks.size):
        here = _unpack_bits(requests[rank], length)[:, :, mine].nonzero(as_tuple=True) if rank != me else None
        out.append(rows[here] if here is not None else rows.new_empty(0, rows.shape[-1]))
        send.append(out[-1].shape[0])
        receive.append(int(wanted[:, :, places[rank]].sum()) if rank != me else 0)
    arrived = ranks.all_to_all(torch.cat(out), send, receive, "fetch").split(receive)
    for rank in range(ranks.size):
        if rank != me:
            b, h, n = wanted[:, :, places[rank]].nonzero(as_tuple=True)
            into_k[b, h, places[rank][n]] = arrived[rank][:, :width]
            into_v[b, h, places[rank][n]] = arrived[rank][:, width:]


def regathered(x: Tensor, layout: Layout, slots: Tensor, into: Layout, ranks: Ranks) -> Tensor:
    """x [B, H, n, D], what this rank holds by ``layout`` -> what it holds by ``into`` of the entries that
    ``slots`` [B, H, N], the same on every rank, names: position j of row b and head h is slots[b, h, j] of
    before."""
    me, device = ranks.rank, x.device
    holder, place = slots.new_empty(2, layout.length)
    for rank in range(ranks.size):
        held = layout.positions(rank, device)
        holder[held], place[held] = rank, torch.arange(held.shape[0], device=device)
    new = [slots[:, :, into.positions(rank, device)] for rank in range(ranks.size)]
    out = []
    for wanted in new:
        b, h, n = (holder[wanted] == me).nonzero(as_tuple=True)
        out.append(x[b, h, place[wanted[b, h, n]]])
    source = [holder[new[me]] == rank for rank in range(ranks.size)]
    receive = [int(theirs.sum()) for theirs in source]
    arrived = ranks.all_to_all(torch.cat(out), [part.shape[0] for part in out], receive, "evict")
    result = x.new_empty(*new[me].shape, x.shape[3])
    for theirs, part in zip(source, arrived.split(receive), strict=True):
        result[theirs] = part
    return result


def _pack_bits(mask: Tensor) -> Tensor:
    """[..., T] bool -> [..., ceil(T / 8)] uint8."""
    bits = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (bits << _places(mask.device)).sum(-1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor, length: int) -> Tensor:
    return (packed[..., None] >> _places(packed.device) & 1).flatten(-2)[..., :length].bool()


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def rearranged(x: Tensor, layout: Layout, into: Layout, ranks: Ranks) -> Tensor:
    """x [B, H, n, D], what this rank holds by ``layout`` -> what it holds by ``into``, whose positions are
    among those of ``layout``."""
    device, me = x.device, ranks.rank
    old = [layout.positions(rank, device) for rank in range(ranks.size)]
    new = [into.positions(rank, device) for rank in range(ranks.size)]
    out = [x[:, :, torch.isin(old[me], wanted)].movedim(2, 0) for wanted in new]
    source = [torch.isin(new[me], theirs) for theirs in old]
    arrived = ranks.all_to_all(
        torch.cat(out), [part.shape[0] for part in out], [int(mine.sum()) for mine in source], "rearrange"
    )
    result = x.new_empty(*x.shape[:2], new[me].shape[0], x.shape[3])
    at = torch.cat([mine.nonzero()[:, 0] for mine in source])
    result[:, :, at] = arrived.movedim(0, 2)
    return result
