"""How the cache of one device may keep keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...attention.attend import DECODE_ROWS

DEVICE, HOST, DISK = "device", "host", "disk"
BLOCK = 4096  # positions of a lower tier that are on the device at a time where all are read


@dataclass(frozen=True)
class Stored:
    """A value of ``patch(storage=)``. bits: those of a number; None: as the model computes. group: keys that
    share a scale and a zero in each channel. of_value: numbers of a value that share them. window: the last
    positions, which are not rounded. tier: the memory that has the keys and values."""

    name: str
    bits: int | None = None
    group: int = 1
    of_value: int = 1
    window: int = 0
    tier: str = DEVICE

    def size(self, rows: float, head_dim: int, element_size: int) -> float:
        """Bytes of ``rows`` keys and values of one KV head, or of so many on the mean."""
        recent = rows if self.bits is None else min(rows, self.window)
        return recent * 2 * head_dim * element_size + self._packed(rows - recent, head_dim, element_size)

    def room(self, rows: float, head_dim: int, element_size: int) -> float:
        """The most bytes that the buffers of KVStore take for ``rows``, with their room to grow."""
        if self.bits is None:
            return self.size(rows + max(256, rows // 8), head_dim, element_size)
        recent = self.window + self.group + DECODE_ROWS
        packed = max(0, rows - self.window)
        packed += max(256, packed // 8)
        return recent * 2 * head_dim * element_size + self._packed(packed, head_dim, element_size)

    def _packed(self, rows: float, head_dim: int, element_size: int) -> int:
        """Bytes of ``rows`` that are rounded."""
        if self.bits is None:
            return 0
        shared = head_dim if head_dim % self.of_value else self.of_value
        steps = 2 * element_size * (1 / self.group + 1 / shared)  # a scale and a zero in the model's dtype
        return round(rows * head_dim * (2 * self.bits / 8 + steps))


_INT8 = Stored("int8", 8, group=64, of_value=128, window=128)
_INT4 = Stored("int4", 4, group=32, of_value=32, window=128)
PLAIN = Stored("device")
STORAGES = {
    stored.name: stored
    for stored in (
        PLAIN,
        _INT8,
        _INT4,
        Stored("host", tier=HOST),
        replace(_INT4, name="int4+host", tier=HOST),
        Stored("disk", tier=DISK),
        replace(_INT4, name="int4+disk", tier=DISK),
    )
}
