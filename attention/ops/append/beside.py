"""What is kept beside keys and values, and takes the new key in."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...kv import KV


class Pages(NamedTuple):
    """entries [B, Hkv, P, 2 D]: the maximum and the minimum of each channel over the keys of a page. size:
    keys of a page. Pages are counted from each row's first position."""

    entries: Tensor
    size: int


class Labels(NamedTuple):
    """entries [B, Hkv, N, r]: the chosen channels of each key. channels [Hkv, r] int64: which ones."""

    entries: Tensor
    channels: Tensor


class Kept(NamedTuple):
    """A set of K keys per KV head: tokens [B, Hkv, K] int64, their positions; kv [B, Hkv, K], their keys and
    values. since [1] int32: the position of the token whose step has chosen the set.

    The n-th token after that one takes slot K - 1 - (n - 1) % K, so the last of the set is replaced first.
    """

    tokens: Tensor
    kv: KV
    since: Tensor
