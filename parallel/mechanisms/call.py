"""What one call of one layer over ranks is given, and what it says of how data moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ...attention.kv import KV
from ...attention.softmax import Softmax
from ..group.mesh import Mesh
from .layout import Layout, Split
from .volume import Geometry


class Call(NamedTuple):
    """What the layers of one forward call share.

    split: how its new tokens are shared out, or None where every rank computes all of them. past, total:
    positions before the call and after it. start, starts: each row's first valid position, on the device and
    on the host. memory: bytes that every rank can spare for one layer's attention; None: nobody has looked.
    """

    split: Split | None
    past: int
    total: int
    start: Tensor | None = None
    starts: list[int] | None = None
    memory: int | None = None


class Rows(NamedTuple):
    """Keys and values [B, Hkv, n] that this rank holds, and whose positions they are."""

    kv: KV
    layout: Layout

    def before(self, position: int, rank: int) -> Rows:
        """Those of earlier positions than ``position``."""
        n = self.layout.below(rank, position)
        return Rows(self.kv[:, :, :n], self.layout.cut(0, position))


@dataclass
class Travel:
    """How one layer call moved data. mechanism: its name, and why it; sent: bytes that this rank sent;
    dense_bytes: what the mechanism that sends least for dense attention sends, by its formula."""

    mechanism: str
    why: str = ""
    sent: int = 0
    dense_bytes: int = 0


@dataclass(frozen=True)
class Share:
    """A rank's part of one layer's prefill.

    q [B, H, split.rows, D], k, v [B, Hkv, split.rows, D]: what it has computed; rows: everything it holds,
    those included. softmax: how the layer turns q k^T into weights.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Rows
    call: Call
    mesh: Mesh
    softmax: Softmax

    @property
    def split(self) -> Split:
        """How the call's tokens are shared out."""
        assert self.call.split is not None
        return self.call.split

    @property
    def rank(self) -> int:
        """This rank."""
        return self.mesh.ranks.rank

    @property
    def past(self) -> Rows:
        """What the rank held before the call."""
        return self.rows.before(self.call.past, self.rank)

    @property
    def geometry(self) -> Geometry:
        """The layer, as formulas see it."""
        width = self.k.shape[3] + self.v.shape[3]
        return Geometry(self.q.shape[1], self.k.shape[1], width // 2, self.k.element_size())
