"""Whether kernels of another package can be called: what implementations that use one have in common."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor


def cannot_call(module: str, package: str, x: Tensor, majors: Sequence[int] = ()) -> list[str]:
    """Why ``module`` of the package on PyPI cannot be called with ``x``, one clause each. Its kernels take
    float16 and bfloat16 on CUDA. majors: the major compute capabilities that they are made for; none named:
    any."""
    reasons = []
    if not is_installed(module):
        reasons.append(f'{package} is not installed: "pip install {package}"')
    major = capability(x.device)
    if major is None:
        reasons.append(f"the tensors are on {x.device.type}, and its kernels run on CUDA")
    elif majors and major not in majors:
        made_for = " and ".join(f"{x}.x" for x in majors)
        reasons.append(
            f"its kernels are made for compute capability {made_for}, and the device has {major}.x"
        )
    if x.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"{x.dtype} is neither float16 nor bfloat16")
    return reasons


def is_installed(module: str) -> bool:
    """Whether ``module`` can be found. Of a module within a package, the package is imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # the package is missing, or it cannot be imported
        return False


def capability(device: torch.device) -> int | None:
    """The major compute capability of a CUDA device; None of another device."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
