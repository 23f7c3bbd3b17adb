"""An evaluation over the ranks of a launcher: all of them do the model's work, the first decides and writes.

Every rank runs the same loop. Whatever a rank could see differently (what is on the disk, how much memory is
free) is decided in one place for all, so that every rank makes the same model calls in the same order.
"""

from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import reduce
from typing import Any, TypeVar

import torch

from ..attention.errors import FarspanError
from ..parallel.group.join import join
from ..parallel.group.mesh import Mesh
from ..runtime.patch import Patched, Report
from ..runtime.report import PhaseReport

T = TypeVar("T")

_APART = "agree"  # the name of collectives that Mesh.sent leaves out: what an evaluation says to itself


class Job:
    """The ranks that do an evaluation together; one alone where there is no launcher.

    parallel: as `farspan.patch` takes it; `mesh` is what patches are given. As a context manager it leaves
    the ranks at the end, and an error of one ends all of them. Raises FarspanError where the ranks do not
    come together, or where not all of the launcher's would share a sequence.
    """

    def __init__(self, model: Any, parallel: Any = None):
        self.mesh: Mesh | None = join(parallel, model.device)
        if self.mesh is not None and self.mesh.size != (world := torch.distributed.get_world_size()):
            self.mesh.close()
            raise FarspanError(
                f"An evaluation runs over all {world} ranks of the job, not over {self.mesh.size} of them: "
                "leave size out of ContextParallel."
            )

    @property
    def size(self) -> int:
        """How many ranks."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides and writes."""
        return self.mesh is None or self.mesh.rank == 0

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent to others for the model so far."""
        return 0 if self.mesh is None else self.mesh.sent()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self.mesh is None:
            return
        try:
            if error is not None:
                told = self.mesh.watch.failing(error)
                if isinstance(error, torch.OutOfMemoryError):
                    raise told from error
        finally:
            self.mesh.close()

    def decide(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first rank (JSON-able), on every rank; a FarspanError that it raises there
        is raised on all."""
        if self.mesh is None:
            return make()
        value: Any = None
        error: FarspanError | None = None
        if self.first:
            try:
                value = make()
            except FarspanError as raised:
                error = raised
        text = json.dumps([value, error and str(error)]).encode() if self.first else b""
        length = int(self.mesh.ranks.all_gather(self._numbers(len(text)), _APART)[0])
        sent = self.mesh.ranks.broadcast(self._bytes(text, length), 0, _APART)
        if error is not None:
            raise error
        if not self.first:
            value, sentence = _read(sent)
            if sentence is not None:
                raise FarspanError(sentence)
        return value  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """Every rank's value (JSON-able), on every rank."""
        if self.mesh is None:
            return [value]
        text = json.dumps(value).encode()
        lengths = self.mesh.ranks.all_gather(self._numbers(len(text)), _APART)[:, 0].tolist()
        rows = self.mesh.ranks.all_gather(self._bytes(text, max(lengths)), _APART)
        return [_read(row[:length]) for row, length in zip(rows, lengths, strict=True)]

    def agree(self, what: str, value: Any) -> None:
        """That every rank has come to `what` and has the same value (by its text). It keeps them in step:
        what they do for themselves in between must not differ by more than the ranks' timeout."""
        if self.mesh is not None:
            self.mesh.agree({what: str(value)})

    def report(self, patched: Patched) -> Report:
        """What all ranks have read together. Bytes sent stay this rank's; a call fell back where it did on
        all of them."""
        mine = patched.report()
        every = self.gather([[_facts(part) for part in layer.phases.values()] for layer in mine.layers])
        for layer, of_ranks in zip(mine.layers, zip(*every, strict=True), strict=True):
            for (phase, part), facts in zip(layer.phases.items(), zip(*of_ranks, strict=True), strict=True):
                layer.phases[phase] = _together(part, facts)
        return mine

    def _numbers(self, *numbers: int) -> torch.Tensor:
        assert self.mesh is not None
        return torch.tensor(numbers, dtype=torch.int64, device=self.mesh.device)

    def _bytes(self, text: bytes, room: int) -> torch.Tensor:
        assert self.mesh is not None
        padded = bytearray(text.ljust(room, b"\0"))
        return torch.frombuffer(padded, dtype=torch.uint8).to(self.mesh.device)


def interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C is behind it: over ranks, a model call that was interrupted ends in a FarspanError."""
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt)


_COUNTS = ("pairs", "causal_pairs", "kv_bytes", "dense_bytes", "selection_bytes")


def _facts(part: PhaseReport) -> list[Any]:
    return [[getattr(part, name) for name in _COUNTS], part.fallbacks, part.implementations]


def _together(part: PhaseReport, facts: Iterable[list[Any]]) -> PhaseReport:
    """The part of all ranks: what was read added up, what ran on any, fallbacks that all of them had."""
    counts, fallbacks, ran = zip(*facts, strict=True)
    implementations: dict[str, list[str]] = {}
    for op, impls in (item for one in ran for item in one.items()):
        implementations[op] = sorted({*implementations.get(op, ()), *impls})
    return replace(
        part,
        **dict(zip(_COUNTS, map(sum, zip(*counts, strict=True)), strict=True)),
        fallbacks=reduce(operator.and_, map(Counter, fallbacks)),
        implementations=implementations,
    )


def _read(row: torch.Tensor) -> Any:
    return json.loads(row.cpu().numpy().tobytes())
