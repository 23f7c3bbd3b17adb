"""Attention of a few rows over packed keys and values that are not decoded.

A channel c of the keys of one group is zero_c + scale_c code_c, so

    q . k = sum_c q_c zero_c + sum_c (q_c scale_c) code_c

and a value is zero + scale code, whose zero and scale are those of its position. So per group there is one
query more, and per value one factor on its weight, in place of a product for each number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import Packing, unpack
from ..partial import Partial
from ..softmax import Softmax

_LINES = torch.contiguous_format


class Rows:
    """The running softmax (arXiv:2205.14135) of rows q [B, H, R, D] over packed keys of as many heads, head
    by head, so that decoded numbers stay in a core's cache."""

    def __init__(self, q: Tensor, softmax: Softmax, value_dim: int) -> None:
        b, h, r, _ = q.shape
        self._q = q.to(torch.promote_types(q.dtype, torch.float32)) * softmax.scale
        self._softcap = softmax.softcap
        self._peak = self._q.new_full((b, h, r, 1), -1e30)  # of a row that reads nothing: no inf - inf
        self._total = torch.zeros_like(self._peak)
        self._out = self._q.new_zeros(b, h, r, value_dim)
        self._room = self._q.new_empty(0)  # for decoded numbers, used again and again

    def read(self, stored: tuple[Tensor, ...], packing: Packing, mask: Tensor | None) -> None:
        """Take in whole groups, the tensors of ``Quantised.stored``. mask: as in ``kernel.attend``."""
        b, h, r, d = self._q.shape
        hidden = None if mask is None else ~mask.expand(b, h, r, -1)
        need = stored[0].shape[2] * max(d, self._out.shape[3])
        if self._room.numel() < need:
            self._room = self._q.new_empty(need)
        for i in range(b):
            for j in range(h):
                one = [x[i, j] for x in stored]
                self._head(i, j, one, packing, None if hidden is None else hidden[i, j])

    def _head(self, i: int, j: int, stored: list[Tensor], packing: Packing, hidden: Tensor | None) -> None:
        k_codes, k_steps, v_codes, v_steps, _, _, outliers, channels = stored
        logits = self._logits(self._q[i, j], k_codes, k_steps, outliers, channels[0], packing)
        if self._softcap is not None:
            logits.div_(self._softcap).tanh_().mul_(self._softcap)
        if hidden is not None:
            logits[:, logits.shape[1] - hidden.shape[1] :].masked_fill_(hidden, -torch.inf)
        peak, total, out = self._peak[i, j], self._total[i, j], self._out[i, j]
        higher = torch.maximum(peak, logits.amax(-1, keepdim=True))
        fade = peak.sub_(higher).exp_()
        weights = logits.sub_(higher).exp_()
        total.mul_(fade).add_(weights.sum(-1, keepdim=True))
        out.mul_(fade).add_(self._values(weights, v_codes, v_steps, packing))
        peak.copy_(higher)

    def part(self) -> Partial:
        """The attention over all that was read."""
        none = self._total == 0
        out = self._out / self._total.masked_fill(none, 1)
        lse = (self._peak + self._total.log()).masked_fill(none, -torch.inf)
        return Partial(out, lse[..., 0])

    def _logits(
        self, q: Tensor, codes: Tensor, steps: Tensor, outliers: Tensor, channels: Tensor, packing: Packing
    ) -> Tensor:
        """q [R, D] times the keys of one head -> [R, N]."""
        extra = None
        if channels.shape[0]:
            extra = q[:, channels] @ outliers.to(q.dtype).t()
            q = q.index_fill(1, channels, 0)
        scale, zero = (x.contiguous() for x in steps.to(q.dtype).chunk(2, -1))  # [groups, D]
        numbers = self._numbers(codes, packing).view(len(steps), packing.group, -1)
        # Broadcast along the groups alone, a product runs over long lines of numbers.
        scaled = (
            q[:, None].expand(-1, len(steps), -1).clone(memory_format=_LINES).mul_(scale)
        )  # [R, groups, D]
        products = torch.bmm(scaled.transpose(0, 1), numbers.transpose(1, 2))  # [groups, R, group]
        logits = (products.transpose(0, 1) + (q @ zero.t())[..., None]).flatten(1)
        return logits if extra is None else logits.add_(extra)

    def _values(self, weights: Tensor, codes: Tensor, steps: Tensor, packing: Packing) -> Tensor:
        """weights [R, N] times the values of one head -> [R, Dv]."""
        scale, zero = steps.t().to(weights.dtype, memory_format=_LINES).chunk(2)
        groups = len(scale)
        numbers = self._numbers(codes, packing).unflatten(1, (groups, -1)).transpose(0, 1)
        sums = torch.bmm(weights * scale[:, None], numbers)  # [groups, R, Dv / groups]
        return sums.add_((zero @ weights.t())[..., None]).transpose(0, 1).flatten(1)

    def _numbers(self, codes: Tensor, packing: Packing) -> Tensor:
        """Codes [N, any] as numbers [N, D]."""
        width = codes.shape[1] * 8 // packing.bits
        return unpack(codes, packing.bits, self._room[: len(codes) * width].view(len(codes), width))
