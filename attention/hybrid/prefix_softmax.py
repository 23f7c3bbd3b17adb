"""Softmax averages over the first 1, 2, 3, ... tokens, where a token's logit does not depend on who reads
it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.autocast import without_autocast
from ..partial import Partial, merge

_CHUNK = 64  # tokens that are weighed against each other in one product


def prefix_softmax(
    scores: Tensor, values: Tensor, before: Partial, mask: Tensor | None
) -> tuple[Tensor, Partial]:
    """scores [B, H, T], values [B, H, T, D] -> (for each token the average over it and the tokens before
    it, [B, H, T, D], and the partial of all tokens). before: of the tokens before, out [B, H, D] and lse
    [B, H]. mask: [B, T] bool, False at padding. Chunks are joined in O(log chunks) steps."""
    out, lse = before
    inside = chunks(scores, values, mask)  # [B, H, N, C]
    ends = Partial(inside.out[..., -1, :], inside.lse[..., -1])  # [B, H, N]
    past = prefixes(
        Partial(
            torch.cat([out[:, :, None], ends.out[:, :, :-1]], 2),
            torch.cat([lse[:, :, None], ends.lse[:, :, :-1]], 2),
        )
    )
    after = merge(*(Partial(x.out[:, :, -1], x.lse[:, :, -1]) for x in (past, ends)))
    spread = Partial(past.out[..., None, :].expand_as(inside.out), past.lse[..., None].expand_as(inside.lse))
    return merge(spread, inside).out.flatten(2, 3)[:, :, : scores.shape[2]], after


@without_autocast
def chunks(scores: Tensor, values: Tensor, mask: Tensor | None) -> Partial:
    """For every token the softmax over its chunk's tokens up to itself: scores [B, H, T], values [B, H, T, D]
    -> out [B, H, N, C, D], lse [B, H, N, C]. mask: [B, T] bool, False at padding."""
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
        values = values.masked_fill(~mask[:, None, :, None], 0)  # whatever is there: 0 * NaN is NaN
    room = -scores.shape[2] % _CHUNK
    scores = F.pad(scores, (0, room), value=-torch.inf).unflatten(2, (-1, _CHUNK))
    values = F.pad(values, (0, 0, 0, room)).unflatten(2, (-1, _CHUNK))
    peak = scores.detach().cummax(-1).values  # m
    peak = peak.masked_fill(peak == -torch.inf, 0)
    later = torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=scores.device).triu(1)
    weights = (scores[..., None, :] - peak[..., None]).masked_fill(later, -torch.inf).exp()
    total = weights.sum(-1)  # u
    none = total == 0
    safe = total.masked_fill(none, 1)
    return Partial((weights @ values) / safe[..., None], (peak + safe.log()).masked_fill(none, -torch.inf))


def prefixes(part: Partial) -> Partial:
    """The merges of the first 1, 2, 3, ... parts along dimension 2 (out [B, H, N, D], lse [B, H, N]), in
    log2(N) steps: each joins every part with the one ``shift`` before it (Hillis and Steele)."""
    out, lse = part
    shift = 1
    while shift < lse.shape[2]:
        joined = merge(
            Partial(out[:, :, :-shift], lse[:, :, :-shift]), Partial(out[:, :, shift:], lse[:, :, shift:])
        )
        out = torch.cat([out[:, :, :shift], joined.out], 2)
        lse = torch.cat([lse[:, :, :shift], joined.lse], 2)
        shift *= 2
    return Partial(out, lse)
