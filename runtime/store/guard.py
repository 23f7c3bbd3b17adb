"""What packing does to attention, measured when a store packs for the first time.

Some models have key channels so large that few bits ruin them (transformers issue 35185). Such channels are
kept as they are; where that is not enough, the layer says so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...attention.attend import DECODE_ROWS
from ...attention.kv import KV
from ...attention.ops import kernel
from ...attention.packing import OUTLIERS, Packing
from ...attention.softmax import Softmax
from .buffers import Buffers
from .memory import Memory
from .packed import Packed, no_channels

BOUND = 0.2  # of the relative error of attention
_ROWS = 8  # queries that are sampled


class Guard:
    """error: the relative error of attention over packed keys and values, |packed - plain| / |plain| over the
    outputs of some queries of the call that packed first, the largest of any row of the batch; None before
    that."""

    def __init__(self) -> None:
        self.error: float | None = None
        self._told = False

    def pack(
        self,
        buffers: Buffers,
        q: Tensor,
        softmax: Softmax,
        start: Tensor | None,
        places: Callable[[torch.device], Tensor],
    ) -> None:
        """Pack the whole groups of ``buffers`` before the window, at the end of a call of queries q
        [B, H, Tq, D] at the last positions. start: [B], where rows begin; None: no row is padded. places:
        makes the positions [length] of what is stored."""
        packed, kv = buffers.packed, buffers.kv
        assert packed is not None
        count = (buffers.unpacked - packed.packing.window) // packed.group * packed.group
        if kv is None or count <= 0:
            return
        valid = None if start is None else places(start.device) >= start[:, None]
        if packed.channels is None:
            packed.channels = self.choose(q, kv, softmax, packed.packing, valid)
        now = slice(packed.length, packed.length + count)
        buffers.pack(count, None if valid is None else valid[:, now], DECODE_ROWS)

    @torch.no_grad()
    def choose(self, q: Tensor, kv: KV, softmax: Softmax, packing: Packing, valid: Tensor | None) -> Tensor:
        """The channels [B, Hkv, 1, C] of keys that stay as they are: none where the error is within the
        bound.

        q [B, H, Tq, D] are the queries of the last positions of kv, which is plain. valid: [B, T] bool, False
        at padding; None: there is none.
        """
        (b, h, tq, _), hkv, t = q.shape, kv.num_kv_heads, kv.length
        count = min(_ROWS, tq)
        rows = (torch.arange(count, device=q.device) + 1) * tq // count - 1
        some = kernel.fold_groups(q[:, :, rows], hkv)
        mask = torch.arange(t, device=q.device) <= (t - tq + rows)[:, None]
        mask = mask.expand(b, -1, -1)  # [B, rows, T]
        if valid is not None:
            mask = mask & valid[:, None]
        mask = mask.repeat(1, h // hkv, 1)[:, None]
        want = kernel.attend(some, kv, softmax, mask=mask, wide=True).out

        def error(channels: Tensor) -> float:
            packed = self._packed(kv, packing, valid, channels)
            got = kernel.attend(some, packed, softmax, mask=mask, wide=True).out
            wrong, all_of = ((x.double() ** 2).flatten(1).sum(1) for x in (got - want, want))
            return float((wrong / all_of.clamp(min=1e-300)).max() ** 0.5)

        channels = no_channels(kv.stored[0])
        self.error = error(channels)
        if self.error > BOUND and kv.head_dim > OUTLIERS:
            scale = self._packed(kv, packing, valid, channels).stored[1].double()[..., : kv.head_dim]
            weight = some.double().square().mean(2) * scale.square().mean(2)
            largest = weight.topk(OUTLIERS).indices.sort(-1).values[:, :, None]
            better = error(largest)
            if better < self.error:
                channels, self.error = largest, better
        return channels

    @staticmethod
    def _packed(kv: KV, packing: Packing, valid: Tensor | None, channels: Tensor) -> KV:
        """kv as a store will hold it."""
        count = (kv.length - packing.window) // packing.group * packing.group
        packed = Packed(packing, Memory())
        packed.channels = channels
        packed.append(kv.k[:, :, :count], kv.v[:, :, :count], None if valid is None else valid[:, :count])
        return packed.followed_by(kv[:, :, count:])

    def finding(self, bits: int) -> str | None:
        """A sentence on an error above the bound, once."""
        if self._told or self.error is None or self.error <= BOUND:
            return None
        self._told = True
        return (
            f"{bits} bits change attention by {self.error:.0%} on sampled queries of the first prompt, "
            f"although the {OUTLIERS} largest key channels of each head are kept as they are: give the layer "
            "a storage with more bits, or leave storage out."
        )
