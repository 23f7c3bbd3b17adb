"""Measure a patched model while it runs: the fraction of the true attention that was read, and the seconds of
the selection."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..attention.checks import whole_number
from ..attention.errors import FarspanError
from ..attention.keys import Keys
from ..attention.mass import mass_recall, sample_rows
from ..attention.method import DECODE
from ..attention.ops.dispatch import implementations
from ..attention.selection import Selection

ROWS = 16  # number of queries that measure_mass=True samples, for each layer and call

Observer = Callable[[Tensor, Keys, Selection], None]


@dataclass
class Measured:
    """The measured values of one layer in one phase, summed over calls.

    rows: number of sampled queries.
    mass [H]: for each query head, the fraction of the true attention that was read, summed over the sampled
    queries.
    selection_seconds, attention_seconds: wall-clock seconds of the selection and of the attention over the
    selected keys. The device is synchronised before and after.
    """

    rows: int = 0
    mass: list[float] = field(default_factory=list)
    selection_seconds: float = 0.0
    attention_seconds: float = 0.0

    @property
    def head_recall(self) -> list[float] | None:
        """The mean fraction for each query head; None before the first sampled query."""
        return [mass / self.rows for mass in self.mass] if self.rows else None

    @property
    def recall(self) -> float | None:
        """The mean fraction over heads and queries; None before the first sampled query."""
        heads = self.head_recall
        return sum(heads) / len(heads) if heads else None

    def add(self, fractions: Tensor) -> None:
        """Add the fractions [B, H, R] of the sampled queries of a call; NaN where a query is padding."""
        counted = ~fractions[:, 0].isnan()
        mass = fractions.double().nansum((0, 2)).tolist()
        self.rows += int(counted.sum())
        self.mass = [a + b for a, b in zip(self.mass or [0.0] * len(mass), mass, strict=True)]

    def snapshot(self) -> Measured:
        """A copy; later calls do not change it."""
        return replace(self, mass=list(self.mass))

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON-compatible values."""
        return {
            "mass_recall": self.recall,
            "mass_recall_by_head": self.head_recall,
            "mass_rows": self.rows,
            "selection_seconds": self.selection_seconds,
            "attention_seconds": self.attention_seconds,
        }


@dataclass
class Meter:
    """A ``Probe`` that measures the calls of one layer in one phase and adds the values to ``measured``.

    rows: number of queries of a prefill call that are sampled (``sample_rows``); at decode all are.
    observer: called after every selection; in a padded batch, once for each row.
    """

    measured: Measured
    phase: str
    rows: int
    observer: Observer | None = None

    @contextmanager
    def timed(self, stage: str, device: torch.device) -> Iterator[None]:
        _drain(device)
        start = time.perf_counter()
        yield
        _drain(device)
        name = f"{stage}_seconds"
        setattr(self.measured, name, getattr(self.measured, name) + time.perf_counter() - start)

    def on_select(self, q: Tensor, keys: Keys, selection: Selection) -> None:
        count = keys.tq if self.phase == DECODE else self.rows
        with implementations():  # the operations of the measurement are not counted for the call
            self.measured.add(mass_recall(q, keys, selection, sample_rows(keys.tq, count)))
            if self.observer is not None:
                self.observer(q, keys, selection)


def rows_to_measure(measure_mass: bool | int) -> int:
    """The number of queries of a prefill call that the option samples; 0: nothing is measured. Raises
    FarspanError for a value that is not allowed."""
    if isinstance(measure_mass, bool):
        return ROWS if measure_mass else 0
    rows = whole_number(measure_mass)
    if rows is None or rows < 1:
        raise FarspanError(
            f"measure_mass is True, False or a number of queries per layer and call, at least 1; got "
            f"{measure_mass!r}."
        )
    return rows


def _drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
