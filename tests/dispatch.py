"""What one layer dispatches in a call: kernels launched, waits for the device, copies to it. On the CPU and
on a simulated GPU."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import farspan
from farspan.attention.method import DECODE, PREFILL, AttentionMethod
from farspan.attention.softmax import Softmax
from farspan.runtime.hf.cache import KVStoreLayer, StaticStoreLayer
from farspan.runtime.inputs import Given
from farspan.runtime.layer import Layer
from farspan.runtime.padding import Padding
from farspan.runtime.session import Session
from farspan.runtime.static_call import StaticCall
from farspan.runtime.store.static import Clock, StaticStore
from farspan.runtime.store.storage import parse_storage
from farspan.runtime.store.store import KVStore

from .laws.parameters import sparse_settings
from .laws.tools import HKV, THETA, D, Data, layer_info
from .simulated import Counts, Device

PROMPT, WARM, STEPS = 120, 2, 5  # tokens of the prompt; steps before any is counted; steps counted
PADDED = [0, 33]


def tiny_methods() -> dict[str, AttentionMethod]:
    """Every registered method by its name, with the first of the laws' parameters that need no
    calibration."""
    chosen = {}
    for name, cls in farspan.methods().items():
        settings = [cls(**setting) for setting in sparse_settings(cls)]
        chosen[name] = next((m for m in settings if bindable(m)), settings[0])
    return chosen


def bindable(method: AttentionMethod) -> bool:
    """Whether ``bound`` can make weights for a method."""
    return method.trains or method.needs.weights.keys() <= {"channels"}


def bound(method: AttentionMethod) -> AttentionMethod:
    """A method as a layer runs it, with random weights where it needs some."""
    torch.manual_seed(0)
    info, weights = layer_info(), {}
    if method.trains:
        trained = method.for_training(info)
        assert trained is not None and trained.module is not None
        weights = {
            n: torch.randn_like(x) * x.shape[-1] ** -0.5 for n, x in trained.module.state_dict().items()
        }
    elif method.needs.recipe:
        weights = {"channels": torch.stack([torch.randperm(D) for _ in range(HKV)])}
    served = method.for_layer(dataclasses.replace(info, weights=weights))
    assert served is not None
    return served


class OneLayer:
    """A patched layer on its own store, which is called with random queries, keys and values. static: the
    positions of a store of fixed size; None: it grows, and its memory is that of ``storage``."""

    def __init__(
        self,
        method: AttentionMethod,
        device: Device,
        starts: list[int] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        static: int | None = None,
        storage: str = "device",
    ) -> None:
        dense = farspan.parse_method("dense")
        self.method, self.device = bound(method), device
        if self.method.module is not None:
            _move(self.method.module, device)
        prefill, decode = (self.method if phase in method.phases else dense for phase in (PREFILL, DECODE))
        self.session = Session(strict=False)
        self.layer = Layer(0, prefill, decode, self.session)
        self.cache = KVStoreLayer(partial(KVStore, parse_storage(storage)))
        if static is not None:
            self.cache = StaticStoreLayer(partial(StaticStore, static, Clock()))
        self.data, self.starts = Data.random(PROMPT + WARM + STEPS, starts, dtype=dtype), starts
        self.start = None if starts is None else device.put(torch.tensor(starts))
        self.softmax = Softmax(self.data.scale)
        self.results: list[Tensor] = []

    def call(self, begin: int, end: int) -> Counts:
        """What the call of the tokens begin .. end - 1 dispatches, the update of the cache included."""
        put, session = self.device.put, self.session
        q, k, v = (put(x[:, :, begin:end].contiguous()) for x in (self.data.q, self.data.k, self.data.v))
        session.begin_call({0: self.cache.store}, Padding(self.start, self.starts), end)
        mask = put(torch.ones(len(q), end, dtype=torch.bool))
        needs = self.method.needs
        if needs.inputs:
            hidden = put(self.data.q[:, :, begin:end].transpose(1, 2).flatten(2))
            places = put(torch.arange(begin, end).expand(len(q), -1).contiguous())
            frequencies = put(THETA ** (-torch.arange(D // 2) / (D // 2)))
            early = None if needs.early_hidden_states is None else hidden
            session.given = Given(needs, hidden, places, frequencies=frequencies, early=early)
        tokens = torch.empty(len(q), end - begin, device="meta")
        session.step = StaticCall.of({0: self.layer}, lambda _: self.cache.store, tokens, True)
        with self.device.counted() as counts, session.step or nullcontext():
            self.cache.store.append(k, v)
            keys, values = self.cache.store.handles()
            out = self.layer(q, keys, values, mask, self.softmax)
        self.results.append(getattr(out, "held", out))
        return counts

    def prefill(self) -> Counts:
        return self.call(0, PROMPT)

    def steps(self, number: int = STEPS) -> list[Counts]:
        """The counts of each of ``number`` decode steps, after a few that are not counted."""
        return [self.call(at, at + 1) for at in range(PROMPT, PROMPT + WARM + number)][WARM:]


def _move(module: nn.Module, device: Device) -> None:
    """Put the parameters and buffers of a module on the device."""
    for part in module.modules():
        for name, x in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(device.put(x.detach()), requires_grad=False)
        for name, x in part.named_buffers(recurse=False):
            part._buffers[name] = device.put(x)


def count(
    method: AttentionMethod,
    device: str,
    starts: list[int] | None = None,
    static: int | None = None,
    steps: int = STEPS,
) -> tuple[Counts, list[Counts], Any]:
    """(prefill, decode steps, layer) of a method on "cpu" or on a simulated "cuda". static: positions of the
    cache, where it has a fixed size."""
    simulated = Device(device)
    with torch.no_grad(), simulated.running():
        dtype = torch.bfloat16 if simulated.simulated else torch.float32
        layer = OneLayer(method, simulated, starts, dtype, static)
        return layer.prefill(), layer.steps(steps), layer
