"""Which of torch's own attention kernels serves a call on CUDA.

    name         what it is                              what it cannot do
    fa3, fa4     FlashAttention-3 and -4, where they     masks; heads wider than 256 (fa4: 128)
                 are activated in torch
    cudnn        cuDNN's attention                       masks; heads wider than 128
    fa2          FlashAttention-2, part of torch         masks; heads wider than 256
    efficient    memory-efficient attention, also        groups of query heads that share k and v
                 under a mask
    math         the definition, tile by tile            nothing; thousands of launches for long inputs

All but the last take float16 and bfloat16 alone. The order is torch's: cuDNN comes first on Hopper and
Blackwell, from its release 9.15.1 on (an older one is wrong where the length is no multiple of 128),
elsewhere FlashAttention. FlashAttention-3 and -4 come before both. Activating them,
``torch.nn.attention.activate_flash_attention_impl("FA3")``, changes torch's operators for the whole process,
so it is left to the user, whose wish it then is.

The switches of ``torch.backends.cuda`` and the context manager ``torch.nn.attention.sdpa_kernel`` hold here,
too. ``choose`` is a function of plain numbers, so that a table of tests covers every machine.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch.nn import attention

_HALF = (torch.float16, torch.bfloat16)
_FLASH = {"FA3": ((9,), 256), "FA4": ((9, 10), 128)}  # generations of GPUs, widest head


class Machine(NamedTuple):
    """What a device and the installed torch have.

    capability: of the device, such as (9, 0) for Hopper. cudnn: cuDNN's version as torch tells it, such as
    91501 for 9.15.1; 0 where there is none or its attention is switched off. flash: the FlashAttention in
    torch's operators: "FA2", "FA3" or "FA4"; "" where it is switched off. efficient: whether memory-efficient
    attention is switched on. deterministic: whether ``torch.use_deterministic_algorithms`` is on, with
    which torch refuses cuDNN's attention.
    """

    capability: tuple[int, int]
    cudnn: int = 0
    flash: str = "FA2"
    efficient: bool = True
    deterministic: bool = False

    @staticmethod
    def of(device: torch.device) -> Machine:
        """The machine of a CUDA device, as it is switched now. Nothing waits for the device."""
        cuda, cudnn = torch.backends.cuda, 0
        activated = getattr(attention, "current_flash_attention_impl", lambda: None)()  # not in every release
        deprioritized = os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1"
        if cuda.cudnn_sdp_enabled() and torch.version.hip is None and not deprioritized:
            cudnn = torch.backends.cudnn.version() or 0
        return Machine(
            capability=torch.cuda.get_device_capability(device),
            cudnn=cudnn,
            flash=(activated or "FA2") if cuda.flash_sdp_enabled() else "",
            efficient=cuda.mem_efficient_sdp_enabled(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


class Call(NamedTuple):
    """What is asked of a kernel: q, k and v of one ``dtype``, heads of ``head_dim`` numbers, values of
    ``value_dim``, over ``keys`` keys. causal: a square, without a mask. masked: a mask says which keys a
    query reads. grouped: several query heads share a head of k and v."""

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    keys: int
    causal: bool = False
    masked: bool = False
    grouped: bool = False


def choose(call: Call, machine: Machine) -> str:
    """The name of the kernel that serves ``call`` best on ``machine``, one of the table above."""
    if call.causal and call.masked:
        return "math"
    if not call.masked:
        flash = _flash(call, machine)
        if flash in ("fa3", "fa4"):
            return flash
        if _cudnn(call, machine):
            return "cudnn"
        if flash:
            return flash
    return "efficient" if _efficient(call, machine) else "math"


def _flash(call: Call, machine: Machine) -> str:
    """The name of the FlashAttention that serves the call, "" if none does."""
    if not machine.flash or call.dtype not in _HALF or machine.capability < (8, 0):
        return ""
    generations, widest = _FLASH.get(machine.flash, (None, 256))
    if generations is not None and machine.capability[0] not in generations:
        return ""
    fits = call.head_dim == call.value_dim <= widest and call.head_dim % 8 == 0
    return machine.flash.lower() if fits else ""


def _cudnn(call: Call, machine: Machine) -> bool:
    major, minor = machine.capability
    preferred = machine.cudnn > 91500 and major in (9, 10) and minor in (0, 3)
    widths = (call.head_dim, call.value_dim)
    fits = max(widths) <= 128 or widths == (192, 128)
    whole = call.head_dim % 8 == 0 and call.value_dim % 8 == 0
    return (
        preferred and fits and whole and call.dtype in _HALF and call.keys > 1 and not machine.deterministic
    )


def _efficient(call: Call, machine: Machine) -> bool:
    # Products of float32 are three of TF32 in this kernel, which is not known to keep law 5's bound.
    known = call.dtype in _HALF and (call.dtype != torch.bfloat16 or machine.capability >= (8, 0))
    whole = call.head_dim % 8 == 0 and call.value_dim % 8 == 0  # in units of 16 bytes
    return machine.efficient and not call.grouped and known and whole
