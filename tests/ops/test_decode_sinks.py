"""``decode`` with sinks beside its window, and with a length that is on the device."""

from __future__ import annotations

import pytest
import torch

from farspan.attention.kv import KV
from farspan.attention.ops.decode import decode
from farspan.attention.softmax import Softmax

from .tools import Run, assert_law_5, assert_reference, brute_mask, every_run, make_qkv, oracle


@every_run()
@pytest.mark.parametrize(
    ("tq", "tk", "room", "d", "window", "sinks", "starts", "softcap"),
    [
        (1, 300, 333, 64, None, 0, None, None),
        (1, 1, 300, 128, None, 0, None, None),  # all splits but one are empty
        (1, 300, 333, 80, 40, 5, [0, 37], None),
        (1, 129, 900, 64, 40, 70, [0, 30], 5.0),  # the sinks reach into the window of the second row
        (1, 60, 64, 64, 100, 4, None, None),  # all keys are in the window
        (5, 150, 150, 64, 40, 4, [0, 107], None),
        (16, 40, 64, 64, 3, 9, None, None),
    ],
)
def test_decode(
    tq: int, tk: int, room: int, d: int, window: int | None, sinks: int, starts: list[int] | None,
    softcap: float | None, run: Run,
) -> None:  # fmt: skip
    q, k, v = make_qkv(2, 8, 2, tq, tk, d, dtype=run.dtype, roomy=False, starts=starts)
    mask = brute_mask(tq, tk, starts or [0, 0], window=window, sinks=sinks)
    unread = ~mask.any(2)[:, 0]  # [B, Tk]
    for x in (k, v):
        x.masked_fill_(unread[:, None, :, None], torch.nan)
    rest = torch.full((2, 2, room - tk, d), torch.nan, dtype=run.dtype)
    kv = KV(torch.cat([k, rest], 2), torch.cat([v, rest], 2))
    how = {"window": window, "sinks": sinks, "start": None if starts is None else torch.tensor(starts)}
    how["length"] = torch.tensor([tk], dtype=torch.int32)
    softmax = Softmax(d**-0.5, softcap)
    truth = oracle(q, k, v, mask, scale=softmax.scale, softcap=softcap)
    reference = decode(q, kv, softmax, **how, impl="reference")
    assert_reference(reference, truth)
    moved = {name: run.to(x) if isinstance(x, torch.Tensor) else x for name, x in how.items()}
    assert_law_5(decode(run.to(q), run.to(kv), softmax, **moved, impl=run.impl), reference, truth)


def test_sinks_need_a_window() -> None:
    q, k, v = make_qkv(1, 4, 2, 1, 20, 8)
    with pytest.raises(ValueError, match="decode takes sinks, at least 0, beside a window"):
        decode(q, KV(k, v), Softmax(1.0), sinks=3)
