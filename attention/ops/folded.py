"""Attention of a few rows over packed keys and values that are not decoded.

A channel c of the keys of one group is zero_c + scale_c code_c, so

    q . k = sum_c q_c zero_c + sum_c (q_c scale_c) code_c

and a value is zero + scale code, whose zero and scale are those of its position. So per group there is one
query more, and per value one factor on its weight, in place of a product for each number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..packing import Packing, unpack
from ..partial import Partial
from ..softmax import Softmax
from .torch_private import wide_product

_LINES = torch.contiguous_format
_FOUR = 4  # torch's small products of 4 rows take less time than those of 3


class Rows:
    """The running softmax (arXiv:2205.14135) of rows q [B, H, R, D] over packed keys of as many heads. Codes
    become numbers head by head, so that decoded numbers stay in a core's cache."""

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
        need = stored[0].shape[2] * max(self._q.shape[3], self._out.shape[3])
        if self._room.numel() < need:
            self._room = self._q.new_empty(need)
        hidden = None if mask is None else ~mask.expand(*self._q.shape[:3], -1)
        for i in range(len(self._q)):
            self._sequence(i, [x[i] for x in stored], packing, None if hidden is None else hidden[i])

    def _sequence(self, i: int, stored: list[Tensor], packing: Packing, hidden: Tensor | None) -> None:
        """Take in the keys and values of all heads of one sequence."""
        k_codes, k_steps, v_codes, v_steps, _, _, outliers, channels = stored
        logits = self._logits(self._q[i], k_codes, k_steps, outliers, channels, packing)
        if self._softcap is not None:
            logits.div_(self._softcap).tanh_().mul_(self._softcap)
        if hidden is not None:
            logits[..., logits.shape[2] - hidden.shape[2] :].masked_fill_(hidden, -torch.inf)
        peak, total, out = self._peak[i], self._total[i], self._out[i]
        higher = torch.maximum(peak, logits.amax(-1, keepdim=True))
        fade = peak.sub_(higher).exp_()
        weights = logits.sub_(higher).exp_()
        total.mul_(fade).add_(weights.sum(-1, keepdim=True))
        self._add_values(out.mul_(fade), weights, v_codes, v_steps, packing)
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
        """q [H, R, D] times the keys -> [H, R, N]."""
        h, r, d = q.shape
        extra = None
        if channels.shape[2]:
            places = channels.expand(-1, r, -1)
            extra = q.gather(2, places) @ outliers.to(q.dtype).transpose(1, 2)
            q = q.scatter(2, places, 0)
        scale, zero = steps.to(q.dtype).chunk(2, -1)  # [H, groups, D]
        zeros = (q @ zero.transpose(1, 2))[..., None]  # [H, R, groups, 1]
        rows = pad(q, (0, 0, 0, -r % _FOUR))[:, :, None]
        logits = q.new_empty(h, r, scale.shape[1], packing.group)
        for i in range(h):
            numbers = self._numbers(codes[i], packing).view(-1, packing.group, d)
            scaled = (rows[i] * scale[i]).transpose(0, 1)  # [groups, R, D], long lines in memory
            products = torch.bmm(scaled, numbers.transpose(1, 2))[:, :r]  # [groups, R, group]
            torch.add(products.transpose(0, 1), zeros[i], out=logits[i])
        return logits.flatten(2) if extra is None else extra.add_(logits.flatten(2))

    def _add_values(
        self, out: Tensor, weights: Tensor, codes: Tensor, steps: Tensor, packing: Packing
    ) -> None:
        """Add weights [H, R, N] times the values to out [H, R, Dv]."""
        scale, zero = steps.transpose(1, 2).to(weights.dtype, memory_format=_LINES).chunk(2, 1)
        groups = scale.shape[1]  # of the numbers of a value
        sums = out.unflatten(2, (groups, -1)).transpose(1, 2)  # [H, groups, R, Dv / groups]
        sums += (zero @ weights.transpose(1, 2))[..., None]
        for i in range(len(weights)):
            numbers = self._numbers(codes[i], packing).unflatten(1, (groups, -1)).transpose(0, 1)
            sums[i] += wide_product(weights[i] * scale[i, :, None], numbers)

    def _numbers(self, codes: Tensor, packing: Packing) -> Tensor:
        """Codes [N, any] as numbers [N, D]."""
        width = codes.shape[1] * 8 // packing.bits
        return unpack(codes, packing.bits, self._room[: len(codes) * width].view(len(codes), width))
