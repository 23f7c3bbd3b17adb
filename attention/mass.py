"""How much of the true attention the keys that were read hold: the exact shares, on rows or blocks of it.

``recall`` takes a mask of the keys read and no selection, so that it also measures what is no selection.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from .causal import causal_mask
from .keys import Keys
from .ops.scores import scores
from .selection import Selection

SELECTION, ATTENTION = "selection", "attention"  # the stages of a call
_CPU, _DEVICE = 1 << 22, 1 << 26  # logits, or pairs of a mask, held at a time


class Probe(Protocol):
    """Called by ``attend`` around the stages of a call, to measure them."""

    def timed(self, stage: str, device: torch.device) -> AbstractContextManager[None]:
        """Around each ``stage`` of the call: ``SELECTION`` (prepare_prefill and select_*), ``ATTENTION``."""
        ...

    def on_select(self, q: Tensor, keys: Keys, selection: Selection) -> None:
        """Called after the selection for q [B, H, Tq, D]; for a padded prefill row by row, each without its
        padding. The selection may share tensors with the method's state, which later steps change."""
        ...


def sample_rows(tq: int, count: int) -> Tensor:
    """``count`` of the queries 0 .. tq - 1, all where there are no more: the last one of each of ``count``
    equal parts, int64.

    tq = 10, count = 4     . x . . x . x . . x     (queries 1, 4, 6 and 9)
    """
    if tq <= count:
        return torch.arange(tq)
    return (torch.arange(count) + 1) * tq // count - 1


@torch.no_grad()
def recall(q: Tensor, keys: Keys, rows: Tensor, read: Tensor) -> Tensor:
    """The share of the true attention of some queries that the keys they read hold.

    q [B, H, Tq, D], the call's; rows [R], which of them; read [B, 1 | Hkv | H, R, Tk] bool, the keys that
    these read (``Selection.to_mask``). -> [B, H, R] float32 (float64 for float64 q) in 0 .. 1: the sum over
    the read keys of the causal softmax over all keys, with the layer's scale and soft-cap, the padding left
    out; NaN for a query in the padding, which sees no key. A learned sink is no key and has no share.
    """
    hkv, (b, h) = keys.kv.num_kv_heads, q.shape[:2]
    parts: list[Tensor] = []
    first = 0
    for some in rows.split(_tile(q.device, b * h * keys.length)):
        logits = scores(q[:, :, some], keys.kv.k, keys.softmax)  # [B, Hkv, G, r, Tk]
        visible = causal_mask(keys.tq, keys.length, keys.start, b, q.device, some)
        logits = logits.masked_fill_(~visible[:, :, None], -torch.inf)
        held = _by_group(read[:, :, first : first + len(some)], hkv)
        first += len(some)
        shares = torch.logsumexp(logits.masked_fill(~held, -torch.inf), -1) - torch.logsumexp(logits, -1)
        parts.append(shares.exp().clamp(max=1).flatten(1, 2).movedim(2, 0))  # [r, B, H]
    return torch.cat(parts).movedim(0, 2)


def mass_recall(q: Tensor, keys: Keys, selection: Selection, rows: Tensor) -> Tensor:
    """``recall`` of the call's query rows ``rows`` [R] by the keys of ``selection``, exactly 1 where it reads
    every key; nothing of size Tq x Tk is made."""
    rows = rows.to(q.device)
    mask = selection.to_mask(keys.tq, keys.length, keys.start, q.shape[0], rows)
    if selection.reads_every_key:
        return torch.where(mask.any(-1), 1.0, torch.nan).expand(-1, q.shape[1], -1)
    return recall(q, keys, rows, mask)


def block_reads(
    selection: Selection, tq: int, tk: int, block_q: int, block_k: int, device: torch.device
) -> Tensor:
    """What share of the visible (query, key) pairs of each block a selection for one unpadded row reads.

    Query block n begins at the call's query n * block_q, key block j at position j * block_k, whatever blocks
    and order of keys the selection itself uses. -> [1 | Hkv | H, Nq, Nk] float32 in 0 .. 1, 0 where no pair
    is visible.
    """
    tall = block_q * max(1, _tile(device, selection.mask_heads * tk) // block_q)
    parts = []
    for rows in torch.arange(tq, device=device).split(tall):
        parts.append(_count(selection.to_mask(tq, tk, rows=rows)[0], block_q, block_k))
    return torch.cat(parts, 1) / visible_pairs(tq, tk, block_q, block_k).clamp(min=1).to(device)


def visible_pairs(tq: int, tk: int, block_q: int, block_k: int) -> Tensor:
    """Causal (query, key) pairs of each block of an unpadded row, as ``block_reads`` counts blocks: [Nq, Nk]
    int64."""

    def below(query: Tensor, key: Tensor) -> Tensor:
        """Pairs of the queries before ``query`` and the keys before ``key``."""
        short = torch.minimum(query, (key - past).clamp(min=0))  # queries that see past + 1, + 2, ... of them
        return short * past + short * (short + 1) // 2 + (query - short) * key

    past = tk - tq
    q = torch.arange(0, tq + block_q, block_q).clamp(max=tq)[:, None]
    k = torch.arange(0, tk + block_k, block_k).clamp(max=tk)[None]
    return below(q, k).diff(dim=0).diff(dim=1)


def _count(mask: Tensor, block_q: int, block_k: int) -> Tensor:
    """True entries of each block of a mask [H, R, Tk]."""
    mask = pad(mask, (0, -mask.shape[2] % block_k)).unflatten(2, (-1, block_k)).sum(3, dtype=torch.int32)
    mask = pad(mask, (0, 0, 0, -mask.shape[1] % block_q))
    return mask.unflatten(1, (-1, block_q)).sum(2, dtype=torch.int32)


def _by_group(mask: Tensor, hkv: int) -> Tensor:
    """A mask [B, 1 | Hkv | H, r, Tk] as it stands beside logits [B, Hkv, G, r, Tk]."""
    if mask.shape[1] <= hkv:
        return mask[:, :, None]
    return mask.unflatten(1, (hkv, -1))


def _tile(device: torch.device, row: int) -> int:
    """How many rows of ``row`` numbers are held at a time."""
    return max(1, (_CPU if device.type == "cpu" else _DEVICE) // max(row, 1))
