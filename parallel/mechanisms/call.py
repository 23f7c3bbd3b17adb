"""The values that one call of one layer over ranks takes and returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ...attention.kv import KV
from ...attention.needs import Inputs
from ...attention.parts import Evicted
from ...attention.softmax import Softmax
from ..group.mesh import Mesh
from .layout import Layout, Split
from .volume import Geometry


class Call(NamedTuple):
    """What is the same for all layers of one forward call.

    split: how the new tokens are divided among the ranks; None where every rank computes all of them. past,
    total: positions before the call, and after it. start, starts: each row's first valid position, on the
    device and on the host. memory: bytes that every rank can spare for one layer's attention; None: unknown.
    evicted: by row, how many keys every KV head has evicted in a layer; positions are then counted over the
    keys that are left.
    """

    split: Split | None
    past: int
    total: int
    start: Tensor | None = None
    starts: list[int] | None = None
    memory: int | None = None
    evicted: list[int] | None = None

    def compacted(self, gone: int, evicted: Evicted) -> Call:
        """The call as a layer sees it that has ``evicted`` keys, where positions are ``gone`` lower."""
        starts, start = evicted.moved(self.starts, self.start, gone)
        return self._replace(
            split=None if self.split is None else self.split.earlier(gone),
            past=self.past - gone,
            total=self.total - gone,
            start=start,
            starts=starts,
            evicted=evicted.counts,
        )


class Shard(NamedTuple):
    """The keys and values [B, Hkv, n] that this rank holds, and the layout of all ranks' keys."""

    kv: KV
    layout: Layout

    def before(self, position: int, rank: int) -> Shard:
        """The part of the shard that lies before ``position``; ``rank`` is this rank."""
        n = self.layout.below(rank, position)
        return Shard(self.kv[:, :, :n], self.layout.cut(0, position))


@dataclass
class Travel:
    """How one call of a layer moved data.

    mechanism: its name. why: the reason for it. sent: bytes that this rank has sent. dense_bytes: bytes that
    dense attention would send by the mechanism that sends least, by its formula.
    """

    mechanism: str
    why: str = ""
    sent: int = 0
    dense_bytes: int = 0


@dataclass(frozen=True)
class LocalCall:
    """This rank's part of one layer's prefill.

    q [B, H, split.rows, D], k, v [B, Hkv, split.rows, D]: what the rank has computed in this call. shard: all
    keys and values that it holds, those of this call included. softmax: how the layer turns q k^T into
    weights. fed: the inputs of these rows, where a method needs them. labels: by the key of a summary, the
    labels [B, heads, total, width] of all positions.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    shard: Shard
    call: Call
    mesh: Mesh
    softmax: Softmax
    fed: Inputs | None = None
    labels: Mapping[tuple, Tensor] = field(default_factory=dict)

    @property
    def split(self) -> Split:
        """How the call's tokens are divided among the ranks."""
        assert self.call.split is not None
        return self.call.split

    @property
    def rank(self) -> int:
        """The number of this rank."""
        return self.mesh.ranks.rank

    @property
    def past(self) -> Shard:
        """The part of the shard that the rank held before the call."""
        return self.shard.before(self.call.past, self.rank)

    @property
    def geometry(self) -> Geometry:
        """The sizes of the layer, for the formulas of volume.py."""
        width = self.k.shape[3] + self.v.shape[3]
        return Geometry(self.q.shape[1], self.k.shape[1], width // 2, self.k.element_size())
