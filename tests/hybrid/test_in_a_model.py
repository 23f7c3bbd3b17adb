"""Every registered mixer in a layer of a tiny Llama."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farspan
from farspan.attention.hybrid import Geometry

from ..runtime.small_models import decode, make, padded
from .tools import SPECS
from .tools import make as mixer_of

GEOMETRY = Geometry(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)


@pytest.fixture(scope="module")
def model() -> Any:
    return make("llama").double()


@pytest.mark.parametrize("spec", SPECS)
def test_rows_of_a_padded_batch_are_the_rows_alone(model: Any, spec: str) -> None:
    """Prefilled whole or in chunks, of which some are padding only; decoded from the state or without any."""
    inputs = padded((25, 11))
    mixer = mixer_of(spec, GEOMETRY)
    with farspan.patch(model, mixers={1: mixer}, prefill_chunk=6) as patched:
        tokens = decode(model, inputs, new=6)
        report = patched.report()
    assert report.mixers[0].mixer == mixer.name
    assert report.mixers[0].state_bytes == mixer.state_bytes_after(30)
    with farspan.patch(model, mixers={1: mixer}):
        for row in range(2):
            ids = inputs["input_ids"][row, inputs["attention_mask"][row].bool()][None]
            alone = decode(model, ids, new=6, use_cache=False)
            assert torch.equal(tokens[row], alone[0])
