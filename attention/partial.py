"""Partial attention results and the one way to combine them.

Softmax attention over a set of keys is a pair: the normalised output and the log of the softmax denominator.
Two disjoint key sets combine exactly, which is what chunks, sinks, local windows and sharded caches all rest
on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention of some queries over one set of keys.

    out: [B, H, Tq, D], the softmax-normalised output over this set; zeros where the set is empty.
    lse: [B, H, Tq] float32 (float64 in references), natural log of the sum of exponentiated logits; -inf
    where empty.
    """

    out: Tensor
    lse: Tensor


def empty_partial(q: Tensor, value_dim: int | None = None) -> Partial:
    """The partial over no keys for queries ``q`` [B, H, Tq, D]: output zeros, lse -inf."""
    out = q.new_zeros(*q.shape[:-1], q.shape[-1] if value_dim is None else value_dim)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return Partial(out, torch.full(q.shape[:-1], -torch.inf, dtype=lse_dtype, device=q.device))


def merge(*parts: Partial) -> Partial:
    """Combine partials over disjoint key sets into the partial over their union.

    The sum is taken in float32 (float64 if a part has it), in the order given, so that every rank that merges
    the same parts gets bit-equal results. Empty sets, (0, -inf), merge without NaN in value and in gradient.
    The output dtype is that of the accumulation; a single part is returned as it is.
    """
    if not parts:
        raise ValueError("merge needs at least one partial.")
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([p.lse for p in parts])  # [P, B, H, Tq]
    peak = lses.detach().amax(0)
    peak = peak.masked_fill(peak == -torch.inf, 0)  # exp(-inf - -inf) would be NaN
    weights = torch.exp(lses - peak)
    total = weights.sum(0)
    none = total == 0
    safe = total.masked_fill(none, 1)
    out = None
    for part, weight in zip(parts, (weights / safe)[..., None], strict=True):
        term = part.out.to(lses.dtype) * weight
        out = term if out is None else out + term
    assert out is not None
    lse = (peak + torch.log(safe)).masked_fill(none, -torch.inf)
    return Partial(out, lse)


def add_sinks(part: Partial, sinks: Tensor) -> Partial:
    """Let learned attention sinks (``s_aux`` [H], logits of a key with a zero value) share the softmax.

    To be applied exactly once per query, after every key set has been merged.
    """
    lse = sinks.to(part.lse)[None, :, None].expand_as(part.lse)
    return merge(part, Partial(torch.zeros_like(part.out), lse))
