"""``estimate_topk`` by the operations of a growing store, on the entries up to the length. The length is read
on the host: on CUDA that is a wait."""

from __future__ import annotations

import torch
from torch import Tensor

from ...budget import select_topk
from ...gqa import group_scores
from ...lists import TokenLists
from ...pages import best_pages, page_bounds
from ...softmax import Softmax
from ..scores import scores


def estimate_topk(
    q: Tensor,
    entries: Tensor,
    softmax: Softmax,
    length: Tensor,
    k: int | None,
    *,
    fraction: float | None,
    page: int | None,
    channels: Tensor | None,
    reduce: str,
    start: Tensor | None,
) -> TokenLists:
    total = int(length)
    size, most = _budget(k, fraction, total, start)
    if page is not None:
        bounds = page_bounds(q, entries[:, :, : -(-total // page)], softmax)
        return best_pages(bounds, size, most, page, reduce, length=total, start=start)
    assert channels is not None
    b, h = q.shape[:2]
    spread = channels.repeat_interleave(h // entries.shape[1], 0)[None, :, None].expand(b, h, 1, -1)
    logits = scores(q.gather(3, spread), entries[:, :, :total], softmax)
    visible = None
    if start is not None:
        visible = (torch.arange(total, device=q.device) >= start[:, None])[:, None]
    tokens, counts = select_topk(group_scores(logits, visible, reduce), size, most)
    return TokenLists(tokens=tokens, counts=counts)


def _budget(
    k: int | None, fraction: float | None, total: int, start: Tensor | None
) -> tuple[int | Tensor, int]:
    """How many keys a row reads, a number or [B, 1, 1], and the most of it."""
    if fraction is None:
        assert k is not None
        return k, k
    if start is None:
        size = max(1, round(fraction * total))
        return size, size
    seen = (total - start[:, None, None]).double()
    return (seen * fraction).round().long().clamp(min=1), int(fraction * (total - int(start.min()))) + 1
