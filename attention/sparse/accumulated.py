"""The attention that every key has received so far, kept in the state of a method."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..eviction import Eviction, stay
from ..keys import Keys
from ..ops.scores import scores
from ..received import attention_received


def accumulated(keys: Keys, length: int, like: Tensor) -> Tensor:
    """[B, Hkv, more than length], with room to grow, in float32 or as wide as ``like``; the last entry takes
    what does not count."""
    old = keys.state.get("scores")
    if old is None or old.shape[2] <= length:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        room = length + max(64, length // 8)
        new = torch.zeros(*keys.kv.shape[:2], room, dtype=wide, device=like.device)
        if old is not None:
            new[..., : old.shape[2]] = old
        keys.state["scores"] = new
    return keys.state["scores"]


def accumulate_all(q: Tensor, keys: Keys, length: int) -> Tensor:
    """Add the attention of queries q [B, H, n, D], those of the last n of ``length`` positions, which read
    every key before them. -> ``accumulated``."""
    sums = accumulated(keys, length, q)
    sums[..., :length] += attention_received(q, keys, length).sum(2)
    return sums


def accumulate(q: Tensor, keys: Keys, tokens: Tensor, counts: Tensor | None) -> Tensor:
    """Add the attention of the query q [B, H, 1, D] to the keys that it reads: tokens [B, Hkv, K], of which
    the first ``counts`` [B] count (None: all). -> their rows [B, Hkv, K, D], of the keys that are here."""
    sums = accumulated(keys, keys.length, q)
    if keys.peers is None:
        rows = keys.kv.gather(tokens).k
        logits = scores(q, rows, keys.softmax)[:, :, :, 0]  # [B, Hkv, G, K]
    else:
        places = pad(keys.places(), (0, 1), value=keys.length)
        here = torch.searchsorted(places, tokens)
        elsewhere = places[here] != tokens
        last = keys.kv.length - 1
        empty = q.new_zeros(*tokens.shape, keys.kv.head_dim)
        rows = keys.kv.gather(here.clamp(max=last)).k if last >= 0 else empty
        logits = scores(q, rows, keys.softmax)[:, :, :, 0]
        logits = keys.peers.sum(logits.masked_fill(elsewhere[:, :, None], 0))
    keys.summary_bytes += rows.numel() * rows.element_size()
    if counts is not None:
        none = torch.arange(tokens.shape[2], device=q.device) >= counts[:, None, None]
        logits = logits.masked_fill(none[:, :, None], -torch.inf)
        tokens = tokens.masked_fill(none, sums.shape[2] - 1)
    share = torch.softmax(logits, -1).sum(2)
    sums.scatter_(2, tokens, sums.gather(2, tokens) + share)
    return rows


def keep(heavy: Tensor, recent: int, keys: Keys) -> Eviction:
    """The eviction of all but the heavy hitters [B, Hkv, h] and the last ``recent`` keys."""
    slots, h = stay(heavy, recent, keys), heavy.shape[2]
    sums = pad(keys.state["scores"].gather(2, slots), (0, 1))
    first = torch.arange(h, device=heavy.device).expand(heavy.shape)
    if keys.start is not None:  # where short rows begin among the h + recent places
        first = first + (keys.start - keys.length + h + recent).clamp(min=0)[:, None, None]
    return Eviction(slots=slots, crop=0, state={"scores": sums, "heavy": first})
