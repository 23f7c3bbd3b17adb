"""A CUDA device that is not there: its tensors say that they are on CUDA, and the CPU holds their numbers.

Code that runs on such tensors takes the ways that it takes on a GPU, and the results are real numbers. What a
GPU would launch is counted, and so is whatever makes the host wait for it or copies from the host to it.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from farspan.attention.ops import backends
from farspan.attention.ops.dispatch import LazyImpl, implementations

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
HOPPER = backends.Machine(capability=(9, 0), cudnn=91600)
# Operators that launch nothing, besides those that torch itself calls views: they name the same memory, or
# allocate some.
FREE = {
    aten._unsafe_view, aten.lift_fresh, aten.detach, aten.alias, aten._reshape_alias,
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
}  # fmt: skip
# Operators that wait for the device, because what they return depends on its numbers.
READS = {
    aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.equal, aten.masked_select, aten._unique2,
    aten.unique_dim, aten.unique_consecutive,
}  # fmt: skip
# they read where an index is a mask
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# Launches of farspan's operations by their Triton kernels: those of many keys, where they are cut into splits
# and merged.
LAUNCHES = {"decode": 2, "gather_decode": 2}


def launches_nothing(func: Any) -> bool:
    """Whether an operator launches no kernel."""
    return func.is_view or func.overloadpacket in FREE


class Simulated(Tensor):
    """A tensor on the device that is not there. held: its numbers, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Simulated:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",  # to C++, which has no CUDA here
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} ran on a simulated tensor outside of its device")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Simulated({self.held!r})"


@dataclass
class Counts:
    """What a stretch of code has done.

    launches: kernels launched, by operator. free: operators that launch nothing. reads: operators that make
    the host wait for the device. uploads: copies from the host to the device.
    """

    launches: Counter[str] = field(default_factory=Counter)
    free: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class Device(TorchDispatchMode):
    """Runs what is inside on a device: "cuda", which is simulated, or "cpu", where launches are counted in
    the same way."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.simulated = device == "cuda"
        self.counts: Counts | None = None

    def put(self, x: Tensor) -> Tensor:
        """``x`` on the device."""
        return Simulated(x) if self.simulated else x

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which tensors of the device may be made and used."""
        calls = LazyImpl.__call__

        def call(impl: LazyImpl, *args: Any, **how: Any) -> Any:
            return self._kernels(impl, calls, *args, **how)

        with (
            patch.object(LazyImpl, "__call__", call),
            patch.object(torch.cuda, "device_of", lambda _: nullcontext()),
            patch.object(backends.Machine, "of", lambda _: HOPPER),
            # Without a driver torch makes no tensor on CUDA, except in this mode, which sees no operator
            # itself.
            FakeTensorMode() if self.simulated else nullcontext(),
            self,
        ):
            yield

    @contextmanager
    def counted(self, counts: Counts | None = None) -> Iterator[Counts]:
        """A context that is counted."""
        before, self.counts = self.counts, Counts() if counts is None else counts
        try:
            yield self.counts
        finally:
            self.counts = before

    def _kernels(self, impl: LazyImpl, calls: Any, *args: Any, **how: Any) -> Any:
        """An operation by its Triton kernels: their launches are counted, and its eager implementation
        computes."""
        if not self.simulated:
            return calls(impl, *args, **how)
        package, name = impl._place.rpartition(".")[0], impl._name
        if self.counts is not None:
            self.counts.launches[f"{name} (Triton)"] += LAUNCHES.get(name, 1)
            # they learn how long the lists are
            if name in ("by_mass", "by_threshold") and how["most"] is None:
                self.counts.reads[name] += 1
        with self.counted(Counts()), implementations():
            return getattr(importlib.import_module(f"{package}.eager"), name)(*args, **how)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        given = {id(x.held): x for x in tensors if isinstance(x, Simulated)}
        to = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if not given and (to is None or to.type == "cpu"):
            if not self.simulated:
                self._count(func, args, tensors, on_device=True)
            with _disable_current_modes():
                return func(*args, **kwargs)
        if (
            func.overloadpacket is aten._to_copy
            and given
            and to == CUDA
            and kwargs.get("dtype") in (None, args[0].dtype)
        ):
            return args[0]  # C++ takes it for a tensor of another device
        on_device = (
            isinstance(args[0], Simulated)
            if func.overloadpacket is aten.copy_
            else to is None or to.type != "cpu"
        )
        self._count(func, args, tensors, on_device)
        with _disable_current_modes():
            args, kwargs = tree_map_only(Simulated, lambda x: x.held, (args, kwargs))
            if to is not None:
                kwargs["device"] = torch.device("cpu")
            out = STAND_INS.get(func.overloadpacket, func)(*args, **kwargs)
            if not on_device:
                return out
            return tree_map_only(Tensor, lambda x: given[id(x)] if id(x) in given else Simulated(x), out)

    def _count(self, func: Any, args: Any, tensors: list[Tensor], on_device: bool) -> None:
        """on_device: whether the result is on the device."""
        if self.counts is None:
            return
        packet, kind = func.overloadpacket, self.counts.launches
        copied = packet in (aten._to_copy, aten.copy_)
        if launches_nothing(func):
            kind = self.counts.free
        elif not self.simulated:
            pass
        elif packet in READS or not on_device or (packet in INDEXED and any(map(_is_mask, args[1]))):
            kind = self.counts.reads
        elif any(not isinstance(x, Simulated) and (x.dim() or copied) for x in tensors):
            kind = self.counts.uploads
        kind[packet.__name__] += 1


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _on_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float) -> list[Tensor]:
    """CUDA's attention, (out, lse), by the CPU's kernel."""
    width, group = v.shape[3], q.shape[1] // k.shape[1]
    v = torch.nn.functional.pad(v, (0, q.shape[3] - width))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )
    return [out[..., :width], lse]


def _flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, *, scale: float
) -> Any:
    return *_on_cpu(q, k, v, None, causal, scale), None, None, 0, 0, None, None, None


def _cudnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: None,
    lse: bool,
    dropout: float,
    causal: bool = False,
    *,
    scale: float,
) -> Any:
    out, sums = _on_cpu(q, k, v, None, causal, scale)
    return out, sums[..., None], None, None, 0, 0, None, None, None


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool, *how: Any, scale: float
) -> Any:
    out, sums = _on_cpu(q, k, v, bias, how[1] if how else False, scale)
    return out, torch.nn.functional.pad(sums, (0, -q.shape[2] % 32)), None, None


STAND_INS = {
    aten._scaled_dot_product_flash_attention: _flash,
    aten._scaled_dot_product_cudnn_attention: _cudnn,
    aten._scaled_dot_product_efficient_attention: _efficient,
}
