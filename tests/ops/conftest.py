"""Fixtures of the operations' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_empty_buffers() -> Iterator[None]:
    """torch.empty is full of NaN, so that whoever reads what nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)
