"""Law 5: implementations agree; error <= 2 x the error of the same-dtype reference, both against float64."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from farspan.attention.method import AttentionMethod

from ..interpreter import overflow_unchecked
from .parameters import every_method
from .tools import Data, Stream, decode_cuts, recorded, replayed

CUTS = [100, *decode_cuts(140, 6), 150]
INTERPRETED = [100, *decode_cuts(140, 2), 145]  # one step scores, one recycles; two splits of keys


@every_method()
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("eager", torch.float32), ("eager", torch.bfloat16), ("triton", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("starts", [None, [0, 33, 110]])
def test_attend(bound: AttentionMethod, impl: str, dtype: torch.dtype, starts: list[int] | None) -> None:
    """The same selections, run by each implementation (Triton's under its interpreter, whose bf16 is
    wrong)."""
    cuts = INTERPRETED if impl == "triton" else CUTS
    data = Data.random(cuts[-1], starts, dtype=dtype)
    unchecked = overflow_unchecked if impl == "triton" else nullcontext
    with recorded(bound) as seen, unchecked():
        got = Stream(bound, data, impl=impl).run(cuts)
    if not bound.selective:
        seen = []
    results = []
    for inputs in (data, data.to(torch.float64)):
        stream = Stream(bound, inputs, impl="reference")
        if seen:
            with replayed(bound, seen):
                results.append(stream.run(cuts))
        else:
            results.append(stream.run(cuts))
    reference, truth = results
    empty = truth.lse == -torch.inf
    eps = torch.finfo(torch.float32).eps
    # torch's own 16-bit kernel takes exponentials to 20 bits, which shows in its lse (about 6e-5)
    low = torch.finfo(dtype).eps / 32 if dtype == torch.bfloat16 else 0.0
    for name, tiny in (("out", 0.0), ("lse", low)):
        e, r, t = (getattr(p, name).double()[~empty] for p in (got, reference, truth))
        error, allowed = (e - t).abs().max(), 2 * (r - t).abs().max() + 4 * eps + tiny
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


@every_method()
@pytest.mark.parametrize("starts", [None, [0, 33, 110]])
def test_selections_do_not_depend_on_the_implementation(
    bound: AttentionMethod, starts: list[int] | None
) -> None:
    data = Data.random(150, starts)
    masks = []
    for impl in ("reference", "eager"):
        with recorded(bound) as seen:
            Stream(bound, data, impl=impl).run(CUTS)
        masks.append([s.mask() for s in seen])
    assert len(masks[0]) == len(masks[1])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))
