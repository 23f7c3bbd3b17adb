"""The private functions of torch that attention calls. No other module of this layer names them.

tests/test_private_apis.py checks each name and its signature in the installed release of torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LONG = 4096  # terms of a sum from which on oneDNN's product is faster, though starting it takes longer


def flash_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The CPU kernel behind ``scaled_dot_product_attention``, with its log-sum-exp.

    q [B, H, Tq, D], k, v [B, H, Tk, D], bias [B, H, Tq, Tk] or None -> (out [B, H, Tq, D], lse [B, H, Tq]).
    The public function returns no log-sum-exp, which merging partial results needs.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )


def flash_attention_cuda(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """FlashAttention as torch has it for CUDA, with its log-sum-exp: FlashAttention-2, or what
    ``torch.nn.attention.activate_flash_attention_impl`` has put in its place. Shapes as in
    :func:`flash_attention_cpu`, but k and v may have fewer heads, [B, Hkv, Tk, D]. The public
    ``scaled_dot_product_attention`` returns no log-sum-exp."""
    result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return result[0], result[1]


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """cuDNN's attention, with its log-sum-exp; shapes as in :func:`flash_attention_cuda`."""
    result = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return result[0], result[1].reshape(q.shape[:3])  # [B, H, Tq, 1] in every release so far


def efficient_attention(
    q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernel for CUDA, with its log-sum-exp; shapes as in :func:`flash_attention_cpu`.
    Rows of the bias begin at multiples of 8 numbers, and its last dimension has stride 1."""
    result = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, bias, True, 0.0, causal, scale=scale
    )
    return result[0], result[1][..., : q.shape[2]]  # its rows are filled up to a multiple of 32


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] int8 times b [K, N] int8 -> [M, N] int32. The public ``torch.matmul`` of int8 tensors wraps
    around at 8 bits."""
    return torch._int_mm(a, b)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """``torch.bmm`` of a [P, M, K] and b [P, K, N]. One long product of a few rows of float32 on the CPU is
    oneDNN's, which takes half the time of MKL's behind the public functions, and has no gradient."""
    plain = a.device.type == "cpu" and a.dtype == torch.float32 and b[0].is_contiguous()
    if len(a) == 1 and a.shape[2] >= _LONG and plain and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a[0], b[0].t(), None, "none", [], "")[None]
    return torch.bmm(a, b)


def cpu_has_vnni() -> bool:
    """Whether the CPU has dot products of int8 vectors. ``torch.cpu.get_capabilities`` is not in every
    supported release."""
    return bool(torch.cpu._is_vnni_supported())


def cpu_has_bf16_dots() -> bool:
    """Whether the CPU has AVX512_BF16, the dot products of bf16 vectors. ``torch.backends.cpu`` names the
    width of vectors only."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def cpu_has_amx() -> bool:
    """Whether the CPU multiplies bf16 matrices in AMX tiles. ``torch.backends.cpu`` names the width of
    vectors only."""
    return bool(torch.cpu._is_amx_tile_supported())


def refuse_uncompiled() -> None:
    """Raise an error where a compiled function has been compiled too often. By default torch then runs the
    uncompiled function, in silence; ``torch.compiler`` has no public switch for that."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def compile_errors() -> tuple[type[Exception], ...]:
    """What a compiled function raises where it cannot be compiled, or has been too often;
    ``torch.compiler`` has no public name for it."""
    return torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit


def version_of(x: Tensor) -> int:
    """How often x was changed in place; -1 for a tensor of inference mode, where torch does not count."""
    return -1 if x.is_inference() else x._version
