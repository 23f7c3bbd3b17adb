"""Whether the CPU computes in bf16."""

from __future__ import annotations

import platform

from .torch_private import cpu_has_amx, cpu_has_bf16_dots


def bf16_is_slow() -> bool:
    """Whether this is an x86 processor without instructions for bf16. It converts every number on the way, so
    that float32 products are several times faster. Other processors are taken to have them."""
    return platform.machine() in ("x86_64", "AMD64") and not (cpu_has_bf16_dots() or cpu_has_amx())
