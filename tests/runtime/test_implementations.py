"""Which implementation each operation takes on this machine, and why it does not take the others."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil

import pytest
import torch

from farspan.attention import ops
from farspan.attention.errors import FarspanError
from farspan.attention.ops.dispatch import OWN
from farspan.runtime.implementations import operations, why_not


def implementations() -> list[set[str]]:
    """The names in every table of implementations under attention/ops."""
    found = []
    for folder in pkgutil.iter_modules(ops.__path__):
        if folder.ispkg and importlib.util.find_spec(f"{ops.__name__}.{folder.name}.api"):
            api = importlib.import_module(f"{ops.__name__}.{folder.name}.api")
            tables = [value for value in vars(api).values() if isinstance(value, dict) and "eager" in value]
            assert tables, f"{folder.name} has no table of implementations"
            found += [set(table) for table in tables]
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_operation_and_implementation_is_listed(dtype: torch.dtype) -> None:
    found = operations(dtype, 64, torch.device("cpu"))
    tables = [set(one["against"]) for one in found]
    wanted = implementations()
    assert all(table in tables for table in wanted)
    # The three ways to select are one operation with one table each.
    assert len(wanted) == len(tables) + 2 and len({one["op"] for one in found}) == len(found)
    for one in found:
        assert one["auto"] == "eager", "on a CPU"
        assert one["against"]["eager"] == one["against"]["reference"] == []
        assert all(reasons for name, reasons in one["against"].items() if name not in OWN)
        for reasons in one["against"].values():
            assert all(isinstance(reason, str) and len(reason.split()) > 3 for reason in reasons)


def test_reasons_are_said_once() -> None:
    against = {"eager": [], "triton": ["there is no GPU", "and no interpreter"]}
    found = [
        {"op": "a", "auto": "eager", "against": against | {"library": []}},
        {"op": "b", "auto": "eager", "against": against},
    ]
    measured = 'can run; "auto" takes it where "farspan tune" measured it faster'
    assert why_not(found) == [
        ("triton", "a, b", "there is no GPU; and no interpreter"),
        ("library", "a", measured),
    ]


def test_an_odd_head_is_refused() -> None:
    with pytest.raises(FarspanError, match="Heads have an even size, at least 2; got 7"):
        operations(torch.float32, 7, torch.device("cpu"))
