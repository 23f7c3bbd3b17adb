"""Keys and values in 8 or 4 bits, with the recent ones as they are (KIVI, arXiv:2402.02750)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .kv import KV
from .ops import kernel
from .ops.folded import Rows
from .ops.rows import gather_each
from .packing import Packing, unpack, wide_of
from .partial import Partial, merge
from .softmax import Softmax

_FEW = 64  # up to so many rows, scales are folded into queries and weights
_NUMBERS = 1 << 20  # of one head, decoded at a time
Take = Callable[[tuple[Tensor, ...], Tensor], list[Tensor]]  # tensors at positions


class Quantised(KV):
    """Keys and values of which the first ``packed`` positions are rounded, and the later ones are not.

    stored: codes of keys [B, Hkv, packed, D * bits / 8] uint8 (in 4 bits, byte d holds the numbers d and
    D / 2 + d), their scales and zeros [B, Hkv, groups, 2 D], the same of values, [B, Hkv, packed, ...]; the
    recent keys and values [B, Hkv, recent, D]; outliers [B, Hkv, packed, C], which are channels of the keys
    as they are, and the numbers of these channels [B, Hkv, 1, C] int64.
    first: the place of the first position in its group.

    An index may have a slice of positions in its third place. What lies in the recent positions alone is a
    plain KV, and so is what is gathered, so that operations decode no more than they read.
    """

    __slots__ = ("first", "packing")
    key_parts: ClassVar[int] = 2
    streams: ClassVar[bool] = True

    def __init__(self, *stored: Tensor, packing: Packing, first: int = 0) -> None:
        super().__init__(*stored)
        self.packing, self.first = packing, first

    @property
    def format(self) -> str:  # type: ignore[override]
        """Its name, which kernels are tuned by."""
        return f"int{self.packing.bits}" + (" with outliers" if self.stored[7].shape[3] else "")

    @property
    def packed(self) -> int:
        """Number of positions that are rounded."""
        return self.stored[0].shape[2]

    @property
    def recent(self) -> KV:
        """The later positions, which are plain."""
        return KV(self.stored[4], self.stored[5])

    @property
    def k(self) -> Tensor:
        return self.dense()[0]

    @property
    def v(self) -> Tensor:
        return self.dense()[1]

    def dense(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values as numbers of ``dtype``; None: that of the model."""
        every = torch.arange(self.length, device=self.device)

        def take(tensors: tuple[Tensor, ...], rows: Tensor) -> list[Tensor]:
            return [x.index_select(2, rows) for x in tensors]

        return self._at(every, take, dtype).dense()

    def gather(self, rows: Tensor) -> KV:  # type: ignore[override]
        return self._at(rows, gather_each)

    def at(self, heads: Tensor, rows: Tensor) -> KV:
        def take(tensors: tuple[Tensor, ...], rows: Tensor) -> list[Tensor]:
            return [x[0][heads[:, None], rows][:, None] for x in tensors]

        part = self[:, heads[:1]]._with(*self.stored[:7], self.stored[7][:, heads].transpose(0, 1))
        return part._at(rows, take)

    def _at(self, rows: Tensor, take: Take, dtype: torch.dtype | None = None) -> KV:
        """Plain keys and values at positions ``rows``, of which ``take`` reads a tensor."""
        k_codes, k_steps, v_codes, v_steps, k_recent, v_recent, outliers, channels = self.stored
        kind, packed, recent = dtype or self.dtype, self.packed, k_recent.shape[2]
        inside = rows.clamp(max=packed - 1)
        kc, vc, vs, kept = take((k_codes, v_codes, v_steps, outliers), inside)
        (ks,) = take((k_steps,), (inside + self.first) // self.packing.group)
        wide = wide_of(kind)
        k, v = (
            unpack(x, self.packing.bits, x.new_empty(*x.shape[:-1], size, dtype=wide))
            for x, size in ((kc, self.head_dim), (vc, self.value_dim))
        )
        scale, zero = ks.to(wide).chunk(2, -1)
        k = k.mul_(scale).add_(zero).to(kind)
        if channels.shape[3]:
            k.scatter_(3, channels.expand(*k.shape[:3], -1), kept.to(kind))
        groups = v_steps.shape[3] // 2
        scale, zero = vs.to(wide)[..., None].chunk(2, -2)
        v = v.unflatten(-1, (groups, -1)).mul_(scale).add_(zero).flatten(-2).to(kind)
        if recent:
            late = take((k_recent, v_recent), (rows - packed).clamp(min=0))
            old = (rows < packed)[..., None]
            old = old if rows.dim() == 3 else old if rows.dim() == 1 else old[:, None]
            k, v = (torch.where(old, x, y.to(kind)) for x, y in zip((k, v), late, strict=True))
        return KV(k, v)

    def attend(
        self, q: Tensor, softmax: Softmax, *, causal: bool, mask: Tensor | None, wide: bool
    ) -> Partial:
        """``kernel.attend``, which decodes some positions at a time. For a few rows no number is decoded:
        a scale and a zero are applied to the query, or to the weights of the softmax, instead."""
        kind = torch.promote_types(q.dtype, torch.float32) if wide else q.dtype
        if causal:
            mask = torch.ones(self.length, self.length, dtype=torch.bool, device=q.device).tril_()
        few = q.shape[2] <= _FEW
        rows, parts = Rows(q, softmax, self.value_dim), []
        for begin, end in self._blocks():
            block, cut = self[:, :, begin:end], _cut(mask, begin, end, self.length)
            if few and block.packed and block.first == 0 and block.packed % self.packing.group == 0:
                rows.read(block.stored, self.packing, cut)
            else:
                plain = KV(*block.dense(torch.promote_types(q.dtype, torch.float32) if few else None))
                parts.append(kernel.attend(q, plain, softmax, mask=cut, wide=True))
        if self.stored[4].shape[2]:
            cut = _cut(mask, self.packed, self.length, self.length)
            parts.append(kernel.attend(q, self.recent, softmax, mask=cut, wide=True))
        part = merge(rows.part(), *parts)
        return Partial(part.out.to(kind), part.lse)

    def _blocks(self) -> list[tuple[int, int]]:
        """Ranges of packed positions that are decoded at a time: whole groups but for the first and last."""
        group = self.packing.group
        size = max(1, _NUMBERS // (self.head_dim * group)) * group
        head, whole = -self.first % group, (self.first + self.packed) // group * group - self.first
        edges = {0, min(head, self.packed), max(whole, 0), self.packed, *range(head, whole, size)}
        return list(pairwise(sorted(edges)))

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return self._with(*map(change, self.stored))

    def _with(self, *stored: Tensor) -> Self:
        return type(self)(*stored, packing=self.packing, first=self.first)

    def __getitem__(self, index: Any) -> Any:
        index = index if isinstance(index, tuple) else (index,)
        some = self._with(*[x[index[:2]] for x in self.stored])
        return some if len(index) < 3 else some._between(*index[2].indices(some.length))

    def _between(self, begin: int, end: int, step: int) -> KV:
        """Positions begin .. end - 1."""
        assert step == 1, "positions are cut out in their order"
        k_codes, k_steps, v_codes, v_steps, k_recent, v_recent, outliers, channels = self.stored
        packed, group = self.packed, self.packing.group
        late = slice(max(begin - packed, 0), max(end - packed, 0))
        recent = k_recent[:, :, late], v_recent[:, :, late]
        if begin >= min(packed, end):
            return KV(*recent)
        old = slice(begin, min(end, packed))
        groups = slice((self.first + begin) // group, -(-(self.first + old.stop) // group))
        return type(self)(
            k_codes[:, :, old], k_steps[:, :, groups], v_codes[:, :, old], v_steps[:, :, old], *recent,
            outliers[:, :, old], channels, packing=self.packing, first=(self.first + begin) % group,
        )  # fmt: skip

    def load_function(self) -> Any:  # type: ignore[override]
        from .ops.load import quantised

        name = f"load_int{self.packing.bits}" + ("_outliers" if self.stored[7].shape[3] else "")
        return getattr(quantised, name)

    def strides(self) -> tuple[tuple[int, ...], ...]:
        """Those of the stored tensors, and what else a kernel must know: the place of the first position in
        its group, the number of packed positions, the binary logarithm of a group, and the numbers of a value
        that share a scale."""
        group = self.packing.group.bit_length() - 1
        layout = self.first, self.packed, group, self.packing.value_group(self.value_dim)
        return (*super().strides(), layout)

    @property
    def aligned(self) -> bool:
        return self.stored[0].dim() == 4

    @property
    def dtype(self) -> torch.dtype:
        return self.stored[4].dtype

    @property
    def value_dtype(self) -> torch.dtype:
        return self.stored[5].dtype

    @property
    def head_dim(self) -> int:
        return self.stored[4].shape[3]

    @property
    def value_dim(self) -> int:
        return self.stored[5].shape[3]

    @property
    def length(self) -> int:
        return self.packed + self.stored[4].shape[2]

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.stored[0].shape[:2], self.length])

    @property
    def key_nbytes(self) -> int:
        return sum([self.stored[i].nbytes for i in (0, 1, 4, 6, 7)])

    @property
    def nbytes(self) -> int:
        return sum([x.nbytes for x in self.stored])

    @property
    def row_nbytes(self) -> int:
        """The mean over the positions, rounded down."""
        return self.nbytes // max(1, self.shape.numel())


def _cut(mask: Tensor | None, begin: int, end: int, length: int) -> Tensor | None:
    """The part of ``mask`` [..., M], for the last M of ``length`` keys, for keys begin .. end - 1."""
    first = length if mask is None else length - mask.shape[-1]
    return None if mask is None or end <= first else mask[..., max(begin, first) - first : end - first]
