"""The keys of chosen pages, for methods that select pages of keys at decode."""

from __future__ import annotations

import torch
from torch import Tensor

from .selection import TokenIndex


def page_tokens(
    chosen: Tensor, counts: Tensor | None, page: int, first: Tensor | int, rows: Tensor
) -> TokenIndex:
    """The keys of the pages chosen [B, Hs, Tq, M] that queries at the positions rows [Tq, 1] see.

    chosen: numbers of pages of ``page`` keys, ascending, counted from each row's first position ``first``
    [B, 1, 1, 1] or 0. counts [B, Hs, Tq]: how many of them count, None for all. Every query's own page must
    be among them, and no later one.
    """
    tokens = (chosen[..., None] * page + torch.arange(page, device=chosen.device)).flatten(-2)
    tokens = tokens + first
    valid = tokens <= rows
    if counts is not None:
        used = torch.arange(chosen.shape[-1], device=chosen.device) < counts[..., None]
        valid = valid & used.repeat_interleave(page, -1)
    # Pages are in order, so only the last one of a row reaches past its query: the tokens to read come first.
    return TokenIndex.ragged(tokens, valid.sum(-1))


def last_page_tokens(chosen: Tensor, page: int, length: int) -> TokenIndex:
    """``page_tokens`` of one query, the last of ``length`` positions, whose row is not padded: its own page
    is the last one, so that the host knows how many keys there are."""
    tokens = (chosen[..., None] * page + torch.arange(page, device=chosen.device)).flatten(-2)
    return TokenIndex(tokens=tokens[..., : tokens.shape[-1] + -length // page * page + length])
