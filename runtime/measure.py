"""Measuring while a patched model runs: how much true attention was read, and what selection cost in
seconds."""

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

ROWS = 16  # of a layer and call that measure_mass=True samples

Observer = Callable[[Tensor, Keys, Selection], None]


@dataclass
class Measured:
    """What was measured of one layer in one phase, summed over calls.

    rows: query rows sampled; mass [H]: the share of the true attention of each that was read, summed over
    them, by query head. Seconds are of the clock, a device's queue drained.
    """

    rows: int = 0
    mass: list[float] = field(default_factory=list)
    selection_seconds: float = 0.0  # of choosing what to read
    attention_seconds: float = 0.0  # of reading it

    @property
    def head_recall(self) -> list[float] | None:
        """Mean share by query head; None before the first row."""
        return [mass / self.rows for mass in self.mass] if self.rows else None

    @property
    def recall(self) -> float | None:
        """Mean share over heads and rows; None before the first row."""
        heads = self.head_recall
        return sum(heads) / len(heads) if heads else None

    def add(self, shares: Tensor) -> None:
        """Take in the shares [B, H, R] of a call's rows; NaN where a row is padding."""
        counted = ~shares[:, 0].isnan()
        mass = shares.double().nansum((0, 2)).tolist()
        self.rows += int(counted.sum())
        self.mass = [a + b for a, b in zip(self.mass or [0.0] * len(mass), mass, strict=True)]

    def snapshot(self) -> Measured:
        """A copy that counts no further."""
        return replace(self, mass=list(self.mass))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "mass_recall": self.recall,
            "mass_recall_by_head": self.head_recall,
            "mass_rows": self.rows,
            "selection_seconds": self.selection_seconds,
            "attention_seconds": self.attention_seconds,
        }


@dataclass
class Meter:
    """Looks on at the calls of one layer in one phase (a ``Probe``), into ``measured``.

    rows: how many queries of a prefill call are sampled (``sample_rows``); at decode all are. observer:
    called after every selection, for a padded batch row by row.
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
        with implementations():  # what measures is no part of what the call ran
            self.measured.add(mass_recall(q, keys, selection, sample_rows(keys.tq, count)))
            if self.observer is not None:
                self.observer(q, keys, selection)


def rows_to_measure(measure_mass: bool | int) -> int:
    """How many rows of a prefill call the option asks for; 0: nothing is measured. Raises FarspanError."""
    if isinstance(measure_mass, bool):
        return ROWS if measure_mass else 0
    rows = whole_number(measure_mass)
    if rows is None or rows < 1:
        raise FarspanError(
            f"measure_mass is True or a number of query rows per layer and call, at least 1; got "
            f"{measure_mass!r}."
        )
    return rows


def _drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
