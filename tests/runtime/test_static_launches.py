"""What a step of one layer dispatches on a GPU that is simulated: few launches, and nothing that waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from ..dispatch import PADDED, PROMPT, STEPS, WARM, count, tiny_methods
from ..simulated import Counts

BUDGET = {"dense": 4, "window": 4, "quest": 6, "double_sparsity": 6, "recycled": 4}
LAST = PROMPT + WARM + STEPS


@pytest.fixture(autouse=True)
def _poisoned_empty_buffers() -> Iterator[None]:
    """torch.empty is full of NaN, so that whoever reads what nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", BUDGET)
@pytest.mark.parametrize("starts", [None, PADDED])
def test_a_step_launches_few_kernels_and_waits_for_nothing(name: str, starts: list[int] | None) -> None:
    """A full step of recycled, one in ``stride``, launches more; it waits for nothing either."""
    method = tiny_methods()[name]
    _, steps, layer = count(method, "cuda", starts, LAST)
    assert not sum((step.reads + step.uploads for step in steps), Counter())
    launches = [kernels(step) for step in steps]
    assert sum(n <= BUDGET[name] for n in launches) >= len(steps) - len(steps) // 3, launches
    if name != "recycled":
        assert max(launches) <= BUDGET[name]
    _, _, grown = count(method, "cuda", starts)
    for got, want in zip(layer.results, grown.results, strict=True):
        assert (got - want).abs().max() <= 2e-2 * want.abs().max()  # bfloat16


def kernels(step: Counts) -> int:
    """The launches of a layer, without the one that sets the length for all layers."""
    return step.launches.total() - step.launches["fill_"]
