"""``estimate_topk`` by the operations of a growing store, on the entries up to the length. The length is read
on the host: on CUDA that is a wait."""

from __future__ import annotations

import torch
from torch import Tensor

from ...budget import select_topk
from ...gqa import group_scores
from ...lists import TokenLists
from ...pages import page_tokens
from ...softmax import Softmax
from ..scores import scores


def estimate_topk(
    q: Tensor,
    entries: Tensor,
    softmax: Softmax,
    length: Tensor,
    k: int,
    *,
    page: int | None,
    channels: Tensor | None,
    reduce: str,
    start: Tensor | None,
) -> TokenLists:
    total = int(length)
    if page is not None:
        return _of_pages(q, entries, softmax, total, k, page, reduce, start)
    assert channels is not None
    b, h = q.shape[:2]
    spread = channels.repeat_interleave(h // entries.shape[1], 0)[None, :, None].expand(b, h, 1, -1)
    logits = scores(q.gather(3, spread), entries[:, :, :total], softmax)
    visible = None
    if start is not None:
        visible = (torch.arange(total, device=q.device) >= start[:, None])[:, None]
    tokens, counts = select_topk(group_scores(logits, visible, reduce), k, k)
    return TokenLists(tokens=tokens, counts=counts)


def _of_pages(
    q: Tensor,
    bounds: Tensor,
    softmax: Softmax,
    total: int,
    k: int,
    page: int,
    reduce: str,
    start: Tensor | None,
) -> TokenLists:
    signed = torch.cat([q.clamp(min=0), q.clamp(max=0)], -1)
    logits = scores(signed, bounds[:, :, : -(-total // page)], softmax)
    rows = torch.tensor([[total - 1]], device=q.device)
    first: Tensor | int = 0 if start is None else start[:, None, None, None]
    own = (rows[None, None] - first) // page  # [B or 1, 1, 1, 1]
    earlier = torch.arange(logits.shape[-1], device=q.device) < own
    ranked = group_scores(logits, earlier[:, 0], reduce)
    ranked = ranked.scatter(3, own.expand(*ranked.shape[:3], 1), torch.inf)
    pages: int | Tensor = max(1, k // page)
    if k % page and start is not None:  # a row that k covers reads the rest of k's last page, too
        seen = total - start[:, None, None]
        pages = torch.where(k >= seen, -(-seen // page), pages)
    chosen, counts = select_topk(ranked, pages, -(-k // page))
    return page_tokens(chosen, counts, page, first, rows)
