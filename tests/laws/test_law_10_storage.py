"""Law 10: where a cache keeps its keys and values changes no output: not a bit, where the keys are read in
one part, and rounding alone, where a dense call reads them in several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import farspan
from farspan.attention import offloaded
from farspan.attention.method import AttentionMethod

from .parameters import every_method
from .tools import Data, Stream

TIERS = ["disk:folder={}", "host:cached=40"]


@pytest.mark.parametrize("tier", TIERS)
@every_method()
def test_every_bit_is_that_of_the_device(bound: AttentionMethod, tier: str, tmp_path: Path) -> None:
    """A padded batch: a prompt in two calls, steps of one and two tokens, a crop, rows in another order."""
    data = Data.random(150, [0, 37], dtype=torch.float32)
    run = [Stream(bound, data, storage=storage) for storage in ("device", tier.format(tmp_path))]
    for cuts in ([64, 136, 137, 139], [134, 135]):
        here, there = (one.run(cuts) for one in run)
        assert torch.equal(here.out, there.out) and torch.equal(here.lse, there.lse)
        for one in run:
            one.store.reorder(torch.tensor([0, 0, 1]))
            one.store.select(torch.tensor([0, 2]))
            one.store.crop(6)
    assert [reads.pairs for reads in run[0].reads] == [reads.pairs for reads in run[1].reads]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("starts", [None, [0, 300]])
def test_dense_calls_in_parts(
    tier: str, starts: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64: a step and a chunk that read 900 keys, 256 at a time."""
    monkeypatch.setattr(offloaded, "BLOCK_BYTES", 1)
    method, data = farspan.parse_method("dense"), Data.random(912, starts)
    want = Stream(method, data).run([600, 900, 901, 912]).out
    error = []
    for storage in ("device", tier.format(tmp_path)):
        out = Stream(method, data.to(torch.float32), storage=storage).run([600, 900, 901, 912]).out
        error.append(float((out - want).abs().max()))
    assert error[1] <= 2 * error[0]
