"""benchmarks.evals_overhead: seconds are given to the part that ran, and the parts exist."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import evals_overhead
from farspan.evals.ruler import Ruler


def test_seconds_belong_to_the_innermost_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes on by one second at each look."""
    ticks = itertools.count()
    monkeypatch.setattr(evals_overhead.time, "perf_counter", lambda: float(next(ticks)))
    parts = evals_overhead.Parts()
    inner = parts.counted("inner", lambda: None)
    outer = parts.counted("outer", inner)

    def steps() -> Iterator[int]:
        yield 1
        inner()
        yield 2

    outer()
    assert parts.seconds == {evals_overhead.OTHER: 1, "outer": 2, "inner": 1}
    assert list(parts.counted("steps", steps)()) == [1, 2]
    assert sum(parts.seconds.values()) == next(ticks) - 1
    assert parts.seconds["inner"] == 2 and parts.seconds["steps"] == 5


def test_every_part_of_an_evaluation_is_counted(smollm2_tokenizer: Any, tiny_llama: Any) -> None:
    model = tiny_llama(vocab_size=49152, seed=0, max_position_embeddings=512)
    asked = Ruler(lengths=[512], tasks=["niah_single_1"], samples=1)
    seconds = evals_overhead.measured(model, smollm2_tokenizer, asked, ["dense", "quest:k=64"], 1)
    assert set(seconds) == {*evals_overhead.PARTS, "model", evals_overhead.OTHER}
    assert min(seconds.values()) > 0
