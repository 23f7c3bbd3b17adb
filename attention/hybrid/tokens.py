"""The tokens of a call, with each row's padding behind its other tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .mixer import Rotary


class Tokens:
    """The tokens of a call in an order in which recurrences and convolutions never meet padding: each row's
    real tokens come first and in their order, so that they directly follow the state; padding is zero.

    hidden: [B, T, hidden]. rotary: cos and sin [B or 1, T, R] in the same order, or None. real: [B, T] bool,
    and count [B], the number of real tokens of a row; both None where no token is padding.
    """

    def __init__(self, hidden: Tensor, mask: Tensor | None, rotary: Rotary | None) -> None:
        self.hidden, self.rotary = hidden, rotary
        self.real: Tensor | None = None
        self.count: Tensor | None = None
        if mask is None:
            return
        self._order = torch.sort(~mask, dim=1, stable=True).indices
        self.count = mask.sum(1)
        self.real = torch.arange(mask.shape[1], device=mask.device) < self.count[:, None]
        self.hidden = torch.where(self.real[..., None], rows(hidden, self._order), 0)
        if rotary is not None:
            cos, sin = (rows(x.expand(len(mask), -1, -1), self._order) for x in rotary)
            self.rotary = cos, sin

    def place(self, out: Tensor) -> Tensor:
        """out [B, T, ...] of these tokens, in the order of the call."""
        return out if self.real is None else rows(out, self._order.argsort(1))


def rows(x: Tensor, places: Tensor) -> Tensor:
    """x [B, S, ...] at places [B, R] -> [B, R, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], places]


def follow(before: Tensor, x: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a row keeps of its last n tokens, extended by a call -> (before and x side by side [B, n + T, ...]
    in the dtype of x, the last n of them that are not padding).

    before: [B, n, ...], the last n of the tokens before. x: [B, T, ...], of which the first count [B] are
    real; all of them for None.
    """
    n = before.shape[1]
    both = torch.cat([before.to(x.dtype), x], 1)
    if count is None:
        last = both[:, both.shape[1] - n :]
    else:
        last = rows(both, count[:, None] + torch.arange(n, device=x.device))
    return both, last.to(before.dtype, copy=True)  # no view, which would keep the whole call in memory


def shifted(before: Tensor, x: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor]:
    """The token before each token: before [B, 1, ...], x [B, T, ...] -> (the inputs one token earlier, [B, T,
    ...], and the last of them that is not padding). count: as in ``follow``."""
    both, after = follow(before, x, count)
    return both[:, :-1], after
