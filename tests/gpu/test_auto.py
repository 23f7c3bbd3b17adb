"""What ``impl="auto"`` takes on CUDA: Triton where it serves the arguments better than torch does."""

from __future__ import annotations

import pytest
import torch

from farspan.attention.kv import KV
from farspan.attention.ops import kernel
from farspan.attention.ops.backends import Call, Machine, choose
from farspan.attention.ops.decode import decode
from farspan.attention.ops.dispatch import implementations
from farspan.attention.ops.flash import flash
from farspan.attention.ops.reference import masked_attention
from farspan.attention.softmax import Softmax

from ..ops.tools import assert_law_5, brute_mask, make_qkv, oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="these tests launch CUDA kernels; there is no CUDA device"
    ),
]


def test_auto() -> None:
    q, k, v = (torch.randn(1, heads, 64, 64, dtype=torch.float16, device="cuda") for heads in (4, 2, 2))
    new = q[:, :, -1:]
    with implementations() as seen:
        flash(q, KV(k, v), Softmax(0.1), window=20)
        decode(new, KV(k, v), Softmax(0.1))
    assert seen == {("flash", "triton"), ("decode", "triton")}
    square = Call(torch.float16, 64, 64, 64, causal=True, grouped=True)
    with implementations() as seen:
        flash(q, KV(k, v), Softmax(0.1))  # plain causal attention is torch's
        decode(new.double(), KV(k.double(), v.double()), Softmax(0.1))  # no kernel takes float64
    assert seen == {("flash", choose(square, Machine.of(q.device))), ("decode", "math")}
    with implementations() as seen:
        flash(q.clone().requires_grad_(), KV(k, v), Softmax(0.1), window=20)  # no kernel has its backward
    assert seen == {("flash", "math")}


def test_torch_prefers_the_same_kernel() -> None:
    """What ``scaled_dot_product_attention`` runs for the same call, as the profiler sees it."""
    q, k, v = (torch.randn(1, 4, 512, 128, dtype=torch.float16, device="cuda") for _ in range(3))
    name = choose(Call(torch.float16, 128, 128, 512, causal=True), Machine.of(q.device))
    operator = {"cudnn": "_scaled_dot_product_cudnn_attention"}.get(
        name, "_scaled_dot_product_flash_attention"
    )
    with torch.profiler.profile() as seen:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert f"aten::{operator}" in {event.key for event in seen.key_averages()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cudnn", "fa2", "efficient"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_kernel_of_torch_with_its_lse(
    backend: str, dtype: torch.dtype, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 5, rows that read nothing included; 333 keys, no multiple of what the kernels work on at a time."""
    heads = 4 if backend == "efficient" else 2
    q, k, v = make_qkv(2, 4, heads, 333, 333, 128, dtype=dtype)
    machine = Machine.of(torch.device("cuda"))
    if (masked and backend != "efficient") or (backend == "cudnn" and not machine.cudnn):
        pytest.skip(f"{backend} cannot run this here")
    mask = brute_mask(333, 333, [0, 0])
    if masked:
        mask = torch.rand(2, 1, 333, 333, generator=torch.Generator().manual_seed(1)) < 0.3
        mask[:, :, :50] = False
    monkeypatch.setattr(kernel.backends, "choose", lambda call, machine: backend)
    given = q.cuda(), KV(k.cuda(), v.cuda()), Softmax(128**-0.5)
    with torch.no_grad(), implementations() as seen:
        if masked:
            got = kernel.attend(*given, mask=mask.cuda())
        else:
            part = kernel.causal_of_groups(*given)
            assert part is not None
            got = part
    assert seen == {("attend", backend)}
    reference = masked_attention(q, k, v, mask, scale=128**-0.5)
    assert_law_5(got, reference, oracle(q, k, v, mask, scale=128**-0.5))
