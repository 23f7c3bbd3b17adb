"""What the CPU's instructions multiply. torch has private names for it, which are asked here alone."""

from __future__ import annotations

import platform

import torch


def has_bf16_dots() -> bool:
    """Whether the CPU has AVX512_BF16, the dot products of bf16 vectors."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def has_amx() -> bool:
    """Whether the CPU multiplies bf16 matrices in AMX tiles."""
    return bool(torch.cpu._is_amx_tile_supported())


def bf16_is_slow() -> bool:
    """Whether this is an x86 processor without instructions for bf16. It converts every number on the way, so
    that float32 products are several times faster. Other processors are taken to have them."""
    return platform.machine() in ("x86_64", "AMD64") and not (has_bf16_dots() or has_amx())
