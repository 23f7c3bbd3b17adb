"""An evaluation over the ranks of a launcher: all ranks run the model, the first one decides and writes.

Every rank runs the same loop. What could differ between ranks (the files on the disk, the free memory) is
decided by the first rank for all, so that every rank makes the same model calls in the same order.
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
from ..runtime.patched import Patched
from ..runtime.report import PhaseReport, Report

T = TypeVar("T")

_APART = "agree"  # collectives of this name are not counted in Mesh.sent


class Job:
    """The ranks of an evaluation; one rank if there is no launcher.

    parallel, storage: as `farspan.patch` takes them. `mesh` and `storage` are passed on to the patches. As a
    context manager it closes the mesh at the end, and an error on one rank ends all ranks. Raises
    FarspanError if the ranks do not meet, or if a sequence would be spread over only some of the launcher's
    ranks.
    """

    def __init__(self, model: Any, parallel: Any = None, storage: str | None = None):
        self.storage = storage
        self.mesh: Mesh | None = join(parallel, model.device)
        if self.mesh is not None and self.mesh.size != (world := torch.distributed.get_world_size()):
            self.mesh.close()
            raise FarspanError(
                f"An evaluation runs over all {world} ranks of the job, not over {self.mesh.size} of them: "
                "leave size out of ContextParallel."
            )

    @property
    def size(self) -> int:
        """The number of ranks."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def first(self) -> bool:
        """Whether this is the rank that decides and writes."""
        return self.mesh is None or self.mesh.rank == 0

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent to other ranks for the model so far."""
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
        """Call `make` on the first rank and return its result (JSON-able) on every rank.

        A FarspanError that it raises is raised on every rank.
        """
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
        sent = self.mesh.share(text)
        if error is not None:
            raise error
        if not self.first:
            value, sentence = json.loads(sent)
            if sentence is not None:
                raise FarspanError(sentence)
        return value  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """The values (JSON-able) of all ranks, by rank, on every rank."""
        if self.mesh is None:
            return [value]
        text = json.dumps(value).encode()
        length = torch.tensor([len(text)], device=self.mesh.device)
        lengths = self.mesh.ranks.all_gather(length, _APART)[:, 0].tolist()
        padded = bytearray(text.ljust(max(lengths)))  # JSON may end in spaces
        mine = torch.frombuffer(padded, dtype=torch.uint8).to(self.mesh.device)
        rows = self.mesh.ranks.all_gather(mine, _APART).cpu().numpy()
        return [json.loads(row.tobytes()) for row in rows]

    def agree(self, what: str, value: Any) -> None:
        """Check that every rank has reached `what` with the same value (compared as text).

        Between two such points the ranks' own work may not differ by more than their timeout.
        """
        if self.mesh is not None:
            self.mesh.agree({what: str(value)})

    def report(self, patched: Patched) -> Report:
        """The report of this rank with the counts of all ranks added up.

        Bytes sent are those of this rank. A dense fallback counts if it happened on all ranks.
        """
        mine = patched.report()
        every = self.gather([[_facts(part) for part in layer.phases.values()] for layer in mine.layers])
        for layer, of_ranks in zip(mine.layers, zip(*every, strict=True), strict=True):
            for (phase, part), facts in zip(layer.phases.items(), zip(*of_ranks, strict=True), strict=True):
                layer.phases[phase] = _summed(part, facts)
        return mine


def interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C caused the error. Over ranks, an interrupted model call raises a FarspanError."""
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt)


_COUNTS = ("pairs", "causal_pairs", "kv_bytes", "dense_bytes", "selection_bytes")


def _facts(part: PhaseReport) -> list[Any]:
    return [[getattr(part, name) for name in _COUNTS], part.fallbacks, part.implementations]


def _summed(part: PhaseReport, facts: Iterable[list[Any]]) -> PhaseReport:
    """The part over all ranks: the sums of the counts, every implementation, the fallbacks of all ranks."""
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
