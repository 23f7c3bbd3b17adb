"""The bridges from the memory of a store to the device of the queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from ...attention.kv import KV
from ...attention.offloaded import Bridge
from ...attention.ops.rows import flat_places
from .hot_rows import HotRows

_WORKER = ThreadPoolExecutor(1, "farspan-prefetch")  # it starts no thread before it is used
Release = Callable[[Tensor], None]  # frees what reading a buffer has brought into the memory of the process


class StoreBridge(Bridge):
    """The bridge of one store."""

    def forget(self, lists: int) -> None:
        """Drop what is kept of rows, since rows have changed or lie elsewhere now. lists: the rows of the
        batch times KV heads of the store."""

    def arrive(self) -> None:
        """Wait for what ``Fetching.ahead`` has begun."""

    @property
    def nbytes(self) -> int:
        """Bytes on the device of what is kept of rows."""
        return 0


class InPlace(StoreBridge):
    """For a memory of tier ``tier`` that operations on ``device`` read as it is."""

    reaches = True

    def __init__(self, tier: str, device: torch.device, release: Release) -> None:
        self.tier, self.device, self._release = tier, device, release

    def gather(self, far: KV, rows: Tensor) -> KV:
        gathered = []
        for h in range(far.num_kv_heads):  # a row of few bytes brings a whole page, and those around it
            gathered.append(far[:, h : h + 1].gather(rows[:, h : h + 1]).stored)
            self._free(far)
        return type(far)(*[torch.cat(parts, 1) for parts in zip(*gathered, strict=True)])

    def at(self, far: KV, heads: Tensor, positions: Tensor) -> KV:
        return far.at(heads, positions)

    def copied(self, far: KV) -> KV:
        return far

    def stream(self, far: KV, size: int) -> Iterator[KV]:
        for a in range(0, far.length, size):
            yield far[:, :, a : a + size]
            self._free(far)

    def _free(self, far: KV) -> None:
        for x in far.stored:
            self._release(x)


class Fetching(StoreBridge):
    """For a memory of tier ``tier`` that the CPU reads and ``device`` does not: rows are copied. hot: those
    that stay on the device."""

    reaches = False

    def __init__(self, tier: str, device: torch.device, hot: HotRows, release: Release) -> None:
        self.tier, self.device, self.hot, self._release = tier, device, hot, release
        self._begun: Future[torch.cuda.Event] | None = None

    def ahead(self, run: Callable[[], None], given: tuple[Tensor, ...]) -> None:
        """Run ``run``, which reads ``given`` and brings rows here. On a GPU it runs in another thread and on
        a stream of its own, beside what follows."""
        self.arrive()
        if not _streams(self.device):
            run()
            return
        side = _side_stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        for x in given:
            x.record_stream(side)
        self._begun = _WORKER.submit(_on_stream, side, run)

    def arrive(self) -> None:
        begun, self._begun = self._begun, None
        if begun is not None:
            torch.cuda.current_stream(self.device).wait_event(begun.result())

    def gather(self, far: KV, rows: Tensor) -> KV:
        if (places := self._places(far, rows)) is None:
            return self._moved(far.gather(rows.cpu()))
        parts = self.hot.gather(places, _count(far), lambda new: self._fetch(far, new))
        return type(far)(*[x.view(*rows.shape, -1) for x in parts])

    def warm(self, far: KV, rows: Tensor) -> None:
        """Bring rows [B, Hkv, R] to the device before they are asked for."""
        if (places := self._places(far, rows)) is not None:
            self.hot.warm(places, _count(far), lambda new: self._fetch(far, new))

    def _places(self, far: KV, rows: Tensor) -> Tensor | None:
        """Where rows [B, Hkv, R] are among all rows of the buffers; None where they cannot be kept."""
        fit = self.hot.serves(rows.numel(), _count(far))
        return flat_places(far.stored[0], rows) if fit else None

    def at(self, far: KV, heads: Tensor, positions: Tensor) -> KV:
        return self._moved(far.at(heads.cpu(), positions.cpu()))

    def copied(self, far: KV) -> KV:
        return far.map(self._copy)

    def stream(self, far: KV, size: int) -> Iterator[KV]:
        parts = [far[:, :, a : a + size] for a in range(0, far.length, size)]
        if not _streams(self.device):
            for part in parts:
                yield self.copied(part)
            return
        present, side = torch.cuda.current_stream(self.device), _side_stream(self.device)
        side.wait_stream(present)
        ahead = self._copied_on(side, parts[0])
        for i in range(len(parts)):
            block = ahead
            present.wait_stream(side)
            if i + 1 < len(parts):
                ahead = self._copied_on(side, parts[i + 1])
            for x in block.stored:
                x.record_stream(present)
            yield block

    def forget(self, lists: int) -> None:
        self.arrive()
        self.hot.forget(lists)

    @property
    def nbytes(self) -> int:
        return self.hot.nbytes

    def _copied_on(self, stream: torch.cuda.Stream, part: KV) -> KV:
        with torch.cuda.stream(stream):
            return self.copied(part)

    def _fetch(self, far: KV, places: Tensor) -> list[Tensor]:
        here, rows = places.cpu(), []
        for x in far.stored:
            width = x.shape[3]
            flat = x.as_strided((_count(far), width), (width, 1), 0)
            out = x.new_empty(len(here), width, pin_memory=_streams(self.device))
            rows.append(self._to_device(torch.index_select(flat, 0, here, out=out)))
        return rows

    def _moved(self, kv: KV) -> KV:
        return kv.map(self._to_device)

    def _to_device(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)

    def _copy(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=self.device)
        copy_heads(out, x)
        self._release(x)
        return out


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@torch.no_grad()
def _on_stream(stream: torch.cuda.Stream, run: Callable[[], None]) -> torch.cuda.Event:
    """Run ``run`` on a stream. Returns what has happened when all of it is done."""
    with torch.cuda.stream(stream):
        run()
        return stream.record_event()


def copy_heads(out: Tensor, x: Tensor) -> None:
    """Copy x [B, Hkv, n, any] to ``out``, each head in one piece, so that a copy between a GPU and pinned
    memory needs no other memory. It may not have ended when this returns."""
    for to_row, row in zip(out, x, strict=True):
        for to, head in zip(to_row, row, strict=True):
            to.copy_(head, non_blocking=True)


def _count(far: KV) -> int:
    """How many rows the buffers have that ``far`` is a view of."""
    x = far.stored[0]
    return x.untyped_storage().nbytes() // (x.shape[3] * x.element_size())


def _streams(device: torch.device) -> bool:
    """Whether copies run on streams of their own: on a GPU that is there."""
    return device.type == "cuda" and torch.cuda.is_available()
