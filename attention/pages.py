"""Choosing pages of keys by Quest's bound, and the keys of chosen pages, for methods that select pages at
decode."""

from __future__ import annotations

import torch
from torch import Tensor

from .budget import select_topk
from .gqa import group_scores
from .ops.scores import scores
from .selection import TokenIndex
from .softmax import Softmax


def page_bounds(q: Tensor, entries: Tensor, softmax: Softmax) -> Tensor:
    """[B, Hkv, G, Tq, P]: upper bounds of the logits of q [B, H, Tq, D] in each page, the sum over channels
    of max(q min, q max). entries [B, Hkv, P, 2 D]: the maximum and the minimum of each channel of a page."""
    # max(q min, q max) per channel is q+ max + q- min, so the bound is one product.
    signed = torch.cat([q.clamp(min=0), q.clamp(max=0)], -1)
    return scores(signed, entries, softmax)


def best_pages(
    logits: Tensor,
    size: int | Tensor,
    max_size: int,
    page: int,
    gqa_reduce: str,
    *,
    length: int,
    start: Tensor | None,
) -> TokenIndex:
    """The keys of the pages with the highest ``logits`` [B, Hkv, G, Tq, P], which are changed in place, for
    the last Tq queries of ``length`` positions. The query's own page is always among them.

    size: the budget in keys, one number or [B or 1, 1, Tq], at most ``max_size``: whole pages within it are
    read, at least one, and all pages of a query that it covers. start: [B], the first position of each row;
    None: 0. The P pages reach up to the last position.
    """
    tq, max_pages = logits.shape[3], -(-max_size // page)
    if tq == 1 and start is None:  # the query's own page is the last one
        assert isinstance(size, int)
        logits[..., -1] = -torch.inf
        ranked = group_scores(logits, None, gqa_reduce)
        ranked[..., -1] = torch.inf
        number = ranked.shape[-1] if size >= length else max(1, size // page)
        chosen, _ = select_topk(ranked, number, max_pages, every=True)
        return last_page_tokens(chosen, page, length)
    first = 0 if start is None else start[:, None, None, None]
    rows = torch.arange(length - tq, length, device=logits.device)[:, None]
    before = rows[None, None] - first  # [B or 1, 1, Tq, 1], keys before a query in its row
    own = before // page
    # Only pages before its own are ranked: that one is read anyway and may hold later candidates.
    earlier = torch.arange(logits.shape[-1], device=logits.device) < own
    ranked = group_scores(logits, earlier[:, 0], gqa_reduce)
    ranked = ranked.scatter(3, own.expand(*ranked.shape[:3], 1), torch.inf)
    if isinstance(size, int) and size % page == 0:
        pages: int | Tensor = size // page
    else:
        seen = before[..., 0] + 1
        whole = max(1, size // page) if isinstance(size, int) else (size // page).clamp(min=1)
        pages = torch.where(seen <= size, -(-seen // page), whole)
    chosen, counts = select_topk(ranked, pages, max_pages)  # [B, Hs, Tq, M]
    return page_tokens(chosen, counts, page, first, rows)


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
