"""Where rows begin may be any view: every kernel reads it as it is, and not what lies beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.attention.kv import KV
from farspan.attention.ops.block_max import block_max
from farspan.attention.ops.block_sparse import block_sparse
from farspan.attention.ops.decode import decode
from farspan.attention.ops.flash import flash
from farspan.attention.ops.int4_scores import int4_block_max, int4_scores, quantise_int4
from farspan.attention.ops.pool import pool
from farspan.attention.softmax import Softmax

from .test_block_sparse import random_blocks
from .tools import make_qkv

STARTS, T, D = [0, 9, 23], 40, 16
SOFTMAX = Softmax(0.25)


def _block_sparse(q: Tensor, kv: KV, start: Tensor) -> Any:
    index = random_blocks(3, 2, T, T, 16, 16, 2, starts=STARTS)
    object.__setattr__(index, "start", start)
    q, k, v = (x.clone().requires_grad_() for x in (q, kv.k, kv.v))
    part = block_sparse(q, KV(k, v), index, SOFTMAX, impl="triton")
    (part.out.sum() + part.lse[:, :, -1].sum()).backward()
    return *part, q.grad, k.grad, v.grad


def _int4(q: Tensor, kv: KV, start: Tensor) -> Any:
    k4 = quantise_int4(kv.k, 16, start=start, impl="triton")
    lse = torch.zeros(q.shape[:3])
    estimate = int4_block_max(q, k4, lse, SOFTMAX, block_q=16, q_bits=8, impl="triton")
    return k4.packed, k4.scale, int4_scores(q[:, :, -1:], k4, scale=0.25, impl="triton"), estimate


OPS: dict[str, Callable[[Tensor, KV, Tensor], Any]] = {
    "flash": lambda q, kv, start: flash(q, kv, SOFTMAX, start=start, impl="triton"),
    "decode": lambda q, kv, start: decode(q[:, :, -1:], kv, SOFTMAX, start=start, impl="triton"),
    "block_sparse": _block_sparse,
    "block_max": lambda q, kv, start: [
        block_max(
            q, kv.k, torch.zeros(q.shape[:3]), SOFTMAX, block_q=16, block_k=16, start=start, impl="triton"
        )
    ],
    "int4": _int4,
    "pool": lambda q, kv, start: [pool(kv.k, 16, mode="mean", start=start, impl="triton")],
}


@pytest.mark.parametrize("op", OPS)
def test_a_start_with_strides_is_a_start(op: str) -> None:
    pytest.importorskip("triton")
    q, k, v = make_qkv(3, 4, 2, T, T, D, roomy=False)
    wide = torch.full((3, 2), 31)
    wide[:, 0] = torch.tensor(STARTS)
    assert wide[:, 0].stride() == (2,)
    same = torch.tensor([9]).expand(3)
    for view in (wide[:, 0], same):
        got = OPS[op](q, KV(k, v), view)
        want = OPS[op](q, KV(k, v), view.clone())
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
