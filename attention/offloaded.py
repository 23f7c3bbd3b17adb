"""Keys and values that lie in another memory than the queries: host memory, or files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import Unsupported
from .kv import KV

MOST_COPIED = 1 << 14  # positions that may be copied to the device at once, where an operation needs them all
BLOCK_BYTES = 1 << 25  # of the blocks in which all positions are read


class Bridge(Protocol):
    """Brings keys and values from the memory of a store to the device of the queries.

    tier: the name of that memory. device: that of the queries. reaches: whether operations on the device can
    read the memory as it is, so that nothing needs to be copied.
    """

    tier: str
    device: torch.device
    reaches: bool

    def gather(self, far: KV, rows: Tensor) -> KV:
        """``far`` at rows [B, Hkv, R] of each KV head, on the device."""
        ...

    def at(self, far: KV, heads: Tensor, positions: Tensor) -> KV:
        """[R, 1, N] on the device: positions [R, N] of the KV heads ``heads`` [R], where B = 1."""
        ...

    def copied(self, far: KV) -> KV:
        """All of ``far`` on the device."""
        ...

    def stream(self, far: KV, size: int) -> Iterator[KV]:
        """``far`` on the device, in parts of at most ``size`` positions, of which two are there at a time."""
        ...


class Offloaded(KV):
    """Keys and values ``far`` [B, Hkv, T], in any format, whose tensors lie in another memory.

    ``gather`` and ``at`` bring chosen rows to the device, and ``blocks`` all of them, a part at a time. What
    has no use for parts gets all of them by ``k``, ``v``, ``dense`` and ``map``; these raise Unsupported
    where that would copy more than MOST_COPIED positions. recent: the last positions, which are still on the
    device; a slice of these alone is a KV like any other.
    """

    __slots__ = ("bridge", "far", "recent")

    def __init__(self, far: KV, bridge: Bridge, recent: KV | None = None) -> None:
        super().__init__(*far.stored)
        self.far, self.bridge = far, bridge
        self.recent = None if recent is None or not recent.length else recent

    @property
    def elsewhere(self) -> str | None:
        return None if self.bridge.reaches else self.bridge.tier

    def on_device(self) -> KV:
        if self.bridge.reaches:
            return self.far
        if self.recent is None:
            return self.bridge.copied(self.far)
        past = self.far[:, :, : self._past]
        if not past.length:
            return self.recent
        parts = zip(self.bridge.copied(past).stored, self.recent.stored, strict=True)
        return type(self.far)(*[torch.cat(x, 2) for x in parts])

    def gather(self, rows: Tensor) -> KV:  # type: ignore[override]
        return self.bridge.gather(self.far, rows)

    def at(self, heads: Tensor, positions: Tensor) -> KV:
        return self.bridge.at(self.far, heads, positions)

    def blocks(self) -> Iterator[KV]:
        few = max(256, BLOCK_BYTES // max(1, self.batch * self.num_kv_heads * self.row_nbytes))
        if self.length <= few:
            yield self.on_device()
            return
        if self._past:
            yield from self.bridge.stream(self.far[:, :, : self._past], few)
        if self.recent is not None:
            yield self.recent

    def map(self, change: Callable[[Tensor], Tensor]) -> KV:  # type: ignore[override]
        return self._few().map(change)

    def __getitem__(self, index: Any) -> KV:  # type: ignore[override]
        parts = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(part, slice) for part in parts):
            return self._few()[index]  # chosen rows are copied
        far, recent = self.far[index], self.recent
        if recent is None:
            return Offloaded(far, self.bridge)
        if len(parts) == 3:
            begin, end, step = parts[2].indices(self.length)
            if step != 1:
                return Offloaded(far, self.bridge)
            if begin >= self._past:
                return recent[(*parts[:2], slice(begin - self._past, max(begin, end) - self._past))]
            recent = recent[(*parts[:2], slice(0, max(0, end - self._past)))]
        else:
            recent = recent[index]
        return Offloaded(far, self.bridge, recent)

    @property
    def _past(self) -> int:
        """How many positions are in the other memory alone."""
        return self.length - (0 if self.recent is None else self.recent.length)

    def _few(self) -> KV:
        if not self.bridge.reaches and self._past > MOST_COPIED:
            raise Unsupported(
                f"An operation needs all {self.length:,} keys of a layer at once",
                [
                    f"{self._past:,} of them lie in {self.bridge.tier} memory, of which at most "
                    f"{MOST_COPIED:,} are copied at a time",
                    "a method that selects by summaries, such as double_sparsity or quest, a prompt in one "
                    "call, or storage='device' avoids that",
                ],
            )
        return self.on_device()

    @property
    def k(self) -> Tensor:
        return self._few().k

    @property
    def v(self) -> Tensor:
        return self._few().v

    def dense(self) -> tuple[Tensor, Tensor]:
        return self._few().dense()

    @property
    def device(self) -> torch.device:
        return self.bridge.device

    @property
    def format(self) -> str:  # type: ignore[override]
        return self.far.format

    @property
    def key_parts(self) -> int:  # type: ignore[override]
        return self.far.key_parts

    def load_function(self) -> Any:  # type: ignore[override]
        return self.far.load_function()

    @property
    def dtype(self) -> torch.dtype:
        return self.far.dtype

    @property
    def value_dtype(self) -> torch.dtype:
        return self.far.value_dtype

    @property
    def head_dim(self) -> int:
        return self.far.head_dim

    @property
    def value_dim(self) -> int:
        return self.far.value_dim
