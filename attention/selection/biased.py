"""Attention with a number added to the logits of each key."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..keys import Keys
from ..kv import KV
from ..ops.gather_decode import gather_decode
from ..partial import Partial, empty_partial
from ..softmax import Softmax
from .base import Pairs, Selection, total
from .tokens import TokenIndex

_ROOM = 8  # numbers added to queries and keys; head sizes stay multiples of 8


@dataclass(frozen=True, kw_only=True)
class Biased(Selection):
    """The keys of ``read``, with ``bias`` added to the scaled logits of each query, before a soft-cap.

    bias: [B, Hkv, N] in float32 or wider, of the keys that are here, of each KV head; the query heads of a
    group share it. Gradients flow to it in prefill.

    Every operation serves it: with the bias as one more number of a key, and a constant as that of a query,
    the product of query and key holds the bias. Where keys are 16-bit numbers, the bias is a sum of three. It
    is clamped to what the keys' type holds: to about +-65504 (between 46,000 and 93,000, by the scale) where
    they are float16. Biases beyond that, also infinite ones, count as equal.

    Keys, queries and values grow by 8 numbers. On CUDA, where a tile holds a power of two of them, that
    doubles the tile of the usual sizes: 136 numbers take a tile of 256.
    """

    called: ClassVar[str] = "Biased"

    read: Selection
    bias: Tensor

    def run_prefill(self, q: Tensor, keys: Keys, rows: range, impl: str) -> tuple[Partial, Pairs]:
        bias = self.bias[:, :, : keys.length]
        more = replace(keys, kv=_with_bias(keys.kv, bias, keys.softmax))
        part, pairs = self.read.run_prefill(_with_constant(q, keys.softmax), more, rows, impl)
        return _narrowed(part, keys.kv), pairs

    def run_decode(self, q: Tensor, keys: Keys, impl: str) -> tuple[Partial, Pairs]:
        if isinstance(self.read, TokenIndex):
            return self._run_tokens(q, keys, self.read, impl)
        more = replace(keys, kv=_with_bias(keys.kv, self.bias, keys.softmax))
        part, pairs = self.read.run_decode(_with_constant(q, keys.softmax), more, impl)
        return _narrowed(part, keys.kv), pairs

    def run_decode_here(self, q: Tensor, keys: Keys) -> tuple[Partial, Pairs]:
        if isinstance(self.read, TokenIndex):
            return self._run_tokens(q, keys, self.read.localised(keys.places()), "auto")
        more = replace(keys, kv=_with_bias(keys.kv, self.bias, keys.softmax))
        part, pairs = self.read.run_decode_here(_with_constant(q, keys.softmax), more)
        return _narrowed(part, keys.kv), pairs

    def _run_tokens(self, q: Tensor, keys: Keys, index: TokenIndex, impl: str) -> tuple[Partial, Pairs]:
        """Attention over single keys, index [B, Hkv, Tq, K]: they are gathered first, so that no other key is
        copied."""
        if index.tokens.shape[3] == 0:  # a rank may hold none of them
            return empty_partial(q, keys.kv.value_dim), 0
        rows = index.tokens.flatten(2)
        kv = _with_bias(keys.kv.gather(rows), self.bias.gather(2, rows), keys.softmax)
        places = torch.arange(rows.shape[2], device=q.device).view(index.tokens.shape[2:])
        here = replace(index, tokens=places.expand_as(index.tokens))
        part = gather_decode(_with_constant(q, keys.softmax), kv, here, keys.softmax, check=False, impl=impl)
        return _narrowed(part, keys.kv), total(index.number(), q.shape[1] // index.tokens.shape[1])

    def needed(
        self, chunk: tuple[int, int], starts: list[int], kv_heads: int, device: torch.device
    ) -> Tensor:
        return self.read.needed(chunk, starts, kv_heads, device)

    def to_mask(
        self, tq: int, tk: int, start: Tensor | None = None, batch: int = 1, rows: Tensor | None = None
    ) -> Tensor:
        """As ``Selection.to_mask``: the mask of ``read``."""
        return self.read.to_mask(tq, tk, start, batch, rows)

    @property
    def mask_heads(self) -> int:
        return self.read.mask_heads

    @property
    def reads_every_key(self) -> bool:
        return self.read.reads_every_key

    def loads_shared_by(self, num_heads: int, num_kv_heads: int) -> int:
        return self.read.loads_shared_by(num_heads, num_kv_heads)


def _constant(softmax: Softmax) -> float:
    """The number of a query that meets the bias: the power of two nearest 1 / scale, which every type has."""
    return 2.0 ** round(-math.log2(softmax.scale))


def _with_constant(q: Tensor, softmax: Softmax) -> Tensor:
    """Queries [..., D] -> [..., D + 8]."""
    return pad(q, (0, _ROOM), value=_constant(softmax))


def _with_bias(kv: KV, bias: Tensor, softmax: Softmax) -> KV:
    """Plain keys and values of kv [B, Hkv, N] with bias [B, Hkv, N] in the keys; values get zeros, so that
    both have one size."""
    k, v = kv.dense()
    wide = torch.promote_types(k.dtype, torch.float32)
    # the products with the constant stay finite in ``wide``
    most = min(torch.finfo(k.dtype).max, torch.finfo(wide).max / (8 * max(1.0, _constant(softmax))))
    rest = (bias.to(wide) / (softmax.scale * _constant(softmax))).clamp(-most, most)
    parts = []
    for _ in range(3 if k.dtype.itemsize < 4 else 1):
        parts.append(rest.to(k.dtype))
        rest = rest - parts[-1].to(rest.dtype)
    added = pad(torch.stack(parts, -1), (0, _ROOM - len(parts)))
    return KV(torch.cat([k, added], -1), pad(v, (0, _ROOM)))


def _narrowed(part: Partial, kv: KV) -> Partial:
    return Partial(part.out[..., : kv.value_dim], part.lse)
