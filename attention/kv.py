"""Keys and values in the format they are stored in.

Stores, ``Keys`` and operations pass keys and values as one ``KV``. This class is the plain format. Another
format is a subclass in a file of its own, which overrides what its docstring lists, and one load function for
the Triton kernels (``ops/load/plain.py`` has the plain one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .ops.rows import gather_each
from .partial import Partial
from .softmax import Softmax


class KV:
    """Keys k [B, Hkv, T, D] and values v [B, Hkv, T, Dv], stored as they are.

    stored: the tensors that hold them, each [B, Hkv, T, any], those of the keys first. An index or a view is
    the same index or view of each of them; nothing is copied where torch copies nothing.

    Another format overrides ``format`` (its name), ``key_parts`` (how many of ``stored`` hold keys),
    ``encode``, ``k``, ``v`` and ``load_function``; also ``dtype``, ``value_dtype``, ``head_dim`` and
    ``value_dim`` where they differ from those of the stored tensors. A format that must not be decoded as a
    whole sets ``streams`` and defines ``attend``. A gradient in k and v needs a format
    whose ``encode``, ``k`` and ``v`` are differentiable.
    """

    __slots__ = ("stored",)
    format: ClassVar[str] = "plain"
    key_parts: ClassVar[int] = 1
    streams: ClassVar[bool] = False

    def __init__(self, *stored: Tensor) -> None:
        self.stored = stored

    @classmethod
    def encode(cls, k: Tensor, v: Tensor) -> Self:
        """Plain keys and values, in this format."""
        return cls(k, v)

    @property
    def k(self) -> Tensor:
        """The keys as plain numbers [B, Hkv, T, D]."""
        return self.stored[0]

    @property
    def v(self) -> Tensor:
        """The values as plain numbers [B, Hkv, T, Dv]."""
        return self.stored[1]

    @staticmethod
    def load_function() -> Any:
        """The Triton function that loads rows in this format; see ``ops/load/plain.py``."""
        from .ops.load.plain import load_plain

        return load_plain

    @property
    def dtype(self) -> torch.dtype:
        """The type of ``k``."""
        return self.stored[0].dtype

    @property
    def value_dtype(self) -> torch.dtype:
        """The type of ``v``."""
        return self.stored[self.key_parts].dtype

    @property
    def head_dim(self) -> int:
        """D, the numbers of a key."""
        return self.stored[0].shape[3]

    @property
    def value_dim(self) -> int:
        """Dv, the numbers of a value."""
        return self.stored[self.key_parts].shape[3]

    def dense(self) -> tuple[Tensor, Tensor]:
        """Plain keys and values, for what must have them."""
        return self.k, self.v

    def gather(self, rows: Tensor) -> Self:
        """The keys and values at rows [B, Hkv, R] (positions, 0 <= r < T) of each KV head: T becomes R."""
        return type(self)(*gather_each(self.stored, rows))

    def attend(
        self, q: Tensor, softmax: Softmax, *, causal: bool, mask: Tensor | None, wide: bool
    ) -> Partial:
        """``kernel.attend``, decoding only a part of the positions at a time; of formats that stream."""
        raise NotImplementedError

    def at(self, heads: Tensor, rows: Tensor) -> KV:
        """Plain keys and values [R, 1, N] at positions rows [R, N] of KV heads [R], of a single row of the
        batch."""
        return KV(*self.map(lambda x: x[0][heads[:, None], rows][:, None]).dense())

    @property
    def elsewhere(self) -> str | None:
        """The memory in which the rows lie, where operations on ``device`` cannot read them as they are; see
        ``offloaded.py``."""
        return None

    def on_device(self) -> KV:
        """All of them on ``device``."""
        return self

    def blocks(self) -> Iterator[KV]:
        """All of them on ``device``, in parts of consecutive positions, in their order."""
        yield self

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """``change`` of each stored tensor, which keeps the last dimension as it is."""
        return type(self)(*map(change, self.stored))

    def __getitem__(self, index: Any) -> Self:
        """The part at ``index`` of the first three dimensions (rows, KV heads, positions), four-dimensional
        again."""
        return type(self)(*[x[index] for x in self.stored])

    def strides(self) -> tuple[tuple[int, ...], ...]:
        """The strides of each stored tensor."""
        return tuple([x.stride() for x in self.stored])

    @property
    def shape(self) -> torch.Size:
        """[B, Hkv, T]."""
        return self.stored[0].shape[:3]

    @property
    def aligned(self) -> bool:
        """Whether the stored tensors belong together: four dimensions, of which three are equal."""
        shape = self.shape
        return not [x for x in self.stored if x.dim() != 4 or x.shape[:3] != shape]

    @property
    def batch(self) -> int:
        """B."""
        return self.stored[0].shape[0]

    @property
    def num_kv_heads(self) -> int:
        """Hkv."""
        return self.stored[0].shape[1]

    @property
    def length(self) -> int:
        """T, the number of positions."""
        return self.stored[0].shape[2]

    @property
    def device(self) -> torch.device:
        return self.stored[0].device

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient may flow back into keys or values."""
        return any(x.requires_grad for x in self.stored)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values as they are stored."""
        return sum(x.numel() * x.element_size() for x in self.stored)

    @property
    def key_nbytes(self) -> int:
        """Bytes of all keys as they are stored."""
        return sum(x.numel() * x.element_size() for x in self.stored[: self.key_parts])

    @property
    def row_nbytes(self) -> int:
        """Bytes of one key and its value, of one KV head, as they are stored."""
        return sum([x.shape[3] * x.element_size() for x in self.stored])

    @property
    def plain_row_nbytes(self) -> int:
        """The same in the plain format."""
        return self.head_dim * self.dtype.itemsize + self.value_dim * self.value_dtype.itemsize

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(str(list(x.shape)) for x in self.stored)})"
