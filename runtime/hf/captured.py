"""Decode steps on stores of fixed size, captured in CUDA graphs.

The decoder's call of one token is captured, not the whole model: ``generate`` stays as it is. transformers'
own way, its StaticCache with torch.compile, does not serve, because its layers attend to all positions of the
cache behind a mask and its graphs break at an attention function with phases, states and kernels of its own.

A graph reads its inputs from fixed memory, so the arguments of a call are copied into those of the captured
one. The first call of a kind runs as it is, which compiles and tunes the kernels, the second is captured, and
all further ones are replayed. A kind is what the launches depend on: the steps of the layers, the addresses
of all buffers, and the shapes of the arguments. Where a call needs other buffers (a new cache, another batch
size, a model that was moved), graphs of the old ones are dropped. On other devices every call runs as it is.

A replay runs no Python of the model. It follows PEFT's adapters, which are part of the kind, but calls no
hook of a module inside of the decoder, and does not see what else was changed in a module since the capture.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...attention.errors import Unsupported
from ..session import Session
from ..static_call import StaticCall
from .cache import StaticStoreLayer
from .hooks import replace_forward
from .models import SLIDING, STATELESS, ModelInfo
from .releases import given_cache


class Graph(NamedTuple):
    """A captured call. replay: run it again. output: what the call has returned; ``replay`` writes its
    tensors anew. release: free its memory."""

    replay: Callable[[], None]
    output: Any
    release: Callable[[], None]


def capture_on_cuda(run: Callable[[], Any]) -> Graph:
    """Capture what ``run`` launches on the present device; nothing of it is executed."""
    graph = torch.cuda.CUDAGraph()
    # Left to itself, torch captures on one stream of one device for the whole process, and a capture that
    # fails leaves that stream as the present one.
    stream = _stream(torch.cuda.current_device())
    with (
        _one_capture,
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        output = run()
    return Graph(graph.replay, output, graph.reset)


_one_capture = threading.Lock()  # torch allows one capture at a time in a process


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream of captures of a device."""
    return torch.cuda.Stream(device)


_MOST = 16  # kinds of calls whose graphs are kept

CAPTURE: dict[str, Callable[[Callable[[], Any]], Graph]] = {"cuda": capture_on_cuda}
"""By type of device, how a call is captured."""


class Captured(threading.local):
    """The graphs of one decoder: those of the present buffers. Each thread has its own."""

    def __init__(self, decoder: nn.Module) -> None:
        self._decoder = decoder
        self._pointers: tuple[int, ...] = ()
        self._graphs: dict[Any, _Held | None] = {}  # None: the call has run once, as it is
        self.refused = ""  # why calls cannot be captured

    @functools.cached_property
    def _adapted(self) -> Any:
        """A module that has PEFT's adapters at the first step; None without one."""
        return next((m for m in self._decoder.modules() if hasattr(m, "merged_adapters")), None)

    def call(
        self, step: StaticCall, capture: Callable[..., Graph], run: Callable[..., Any], call: Any
    ) -> Any:
        """The output of ``run(**call)``, by a replay where the same kind of call was captured."""
        weight = next(self._decoder.parameters(), None)
        pointers = (*step.pointers(), 0 if weight is None else weight.data_ptr())
        if pointers != self._pointers:
            self.release()
            self._pointers = pointers
        kind = step.names, _adapters(self._adapted), _kind(call)
        held = self._graphs.get(kind)
        if held is None and kind not in self._graphs:
            if len(self._graphs) >= _MOST:
                self.release()
                self._pointers = pointers
            self._graphs[kind] = None
            return run(**call)
        if held is None:
            try:
                held = self._graphs[kind] = _Held(capture, run, call)
            except RuntimeError as error:  # of an operation that cannot be captured
                self.release()
                self.refused = (str(error).strip().splitlines() or [type(error).__name__])[0]
                return run(**call)
        return held.replay(call)

    def release(self) -> None:
        """Drop all graphs, and free their memory."""
        for held in self._graphs.values():
            if held is not None:
                held.graph.release()
        self._graphs, self._pointers = {}, ()


class _Held:
    """A captured call with the memory of its arguments."""

    def __init__(self, capture: Callable[..., Graph], run: Callable[..., Any], call: dict[str, Any]) -> None:
        with torch.inference_mode(False):
            self._inputs = {name: x.clone() for name, x in call.items() if isinstance(x, Tensor)}
        cache = given_cache(call)
        with self._device():
            graph = capture(lambda: run(**call | self._inputs))
        # the output without the cache, which may be freed before the graph
        output = _mapped(graph.output, lambda x: _CACHE if x is cache else x)
        self.graph = graph._replace(output=output)

    def replay(self, call: dict[str, Any]) -> Any:
        """The output of a call. It is a copy, which later replays leave alone."""
        for name, x in self._inputs.items():
            x.copy_(call[name])
        with self._device():
            self.graph.replay()
        cache = given_cache(call)
        return _mapped(
            self.graph.output,
            lambda x: cache if x is _CACHE else x.clone() if isinstance(x, Tensor) else x,
        )

    def _device(self) -> Any:
        """The context of the device of the arguments; nothing on a CPU."""
        return torch.cuda.device_of(next(iter(self._inputs.values())))


_CACHE = object()  # stands for the cache of a call in the output of a captured one


def _mapped(output: Any, change: Callable[[Any], Any]) -> Any:
    """An output with ``change`` of each of its entries, those inside of tuples and lists included."""
    if isinstance(output, dict):
        return type(output)(**{name: _mapped(x, change) for name, x in output.items()})
    if isinstance(output, list | tuple):
        return type(output)(_mapped(x, change) for x in output)
    return change(output)


def check_static(info: ModelInfo, foreign_keys: bool) -> None:
    """Raise Unsupported for a model whose decode step is not the same for every token. foreign_keys: whether
    its attention is called with other keys than those of the cache."""
    reasons = [
        f"layers of type {kind!r} keep something that a cache of fixed size does not hold"
        for kind in sorted(set(info.kinds) - (set(STATELESS) - {SLIDING}))
    ]
    if "position_ids" not in inspect.signature(info.decoder.forward).parameters:
        reasons.append("its decoder takes no position_ids, so the position of a token comes from the host")
    types: list[Any] = [m.rope_type for m in info.decoder.modules() if hasattr(m, "rope_type")]
    named = {name for x in types for name in (x.values() if isinstance(x, dict) else [x])}
    reasons += [
        f"its RoPE of type {name!r} is computed on the host from the length of the call"
        for name in sorted(named & {"dynamic", "longrope"})
    ]
    if any(getattr(m, "attn_temperature_tuning", False) for m in info.attention.values()):
        reasons.append("its attention takes the position of a token from the length on the host")
    if foreign_keys:
        reasons.append("its attention is called with keys that are not those of the cache")
    if reasons:
        raise Unsupported(f"farspan cannot give {type(info.model).__name__} a cache by static=", reasons)


def run_steps(decoder: nn.Module, session: Session) -> Callable[[], None]:
    """Make the decoder run the steps that the session begins, captured where its device can. Returns the undo
    step, which frees the graphs."""
    graphs = Captured(decoder)

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        step = session.step
        if step is None:
            output = original(*args, **kwargs)
            _note_padding(given_cache(kwargs), session.ends is not None)
            return output
        capture = CAPTURE.get(step.stores[0].buffers.tensors[0].device.type)
        with step:
            if capture is None:
                return original(**kwargs)
            reason = graphs.refused or _uncaptured(decoder, step, kwargs)
            output = original(**kwargs) if reason else graphs.call(step, capture, original, kwargs)
            if reason := reason or graphs.refused:
                session.notice(
                    f"decode steps were not captured: {reason}",
                    f"The decode step of this model was not captured in a CUDA graph ({reason}), so every "
                    "token waits for the host: the results are the same, and slower.",
                )
            return output

    undo = replace_forward(decoder, forward)

    def remove() -> None:
        undo()
        graphs.release()

    return remove


def _note_padding(cache: Any, padded_right: bool) -> None:
    """Note in a cache whether its last call had padding on the right, so that no step can follow."""
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, StaticStoreLayer):
            layer.store.clock.padded_right = padded_right
            return  # the layers of a cache share their clock


def arguments_of_step(call: dict[str, Any], past: int, device: torch.device) -> dict[str, Any]:
    """The arguments of a step: without the mask, which it does not read, and with the position of its token,
    which the model would take from the length on the host."""
    call = {name: x for name, x in call.items() if name != "attention_mask"}
    if call.get("position_ids") is None:
        call["position_ids"] = torch.full((1, 1), past, device=device)
    return call


def _uncaptured(decoder: nn.Module, step: StaticCall, call: dict[str, Any]) -> str:
    """Why a call is not captured; "" where it is."""
    devices = {x.device for store in step.stores for x in store.buffers.tensors}
    devices |= {x.device for x in call.values() if isinstance(x, Tensor)}
    if len(devices) > 1:
        return "the model is on several devices"
    if decoder.training:
        return "the model is in training mode"
    if torch.is_autocast_enabled(next(iter(devices)).type):
        return "autocast is on"
    cache, plain = given_cache(call), (Tensor, bool, int, float, str, type(None))
    others = [name for name, x in call.items() if x is not cache and not isinstance(x, plain)]
    return f"the argument {others[0]!r} is of another type than tensors and numbers" if others else ""


def _adapters(module: Any) -> Any:
    """Which of PEFT's adapters are at work, by one of the modules that have them; None without adapters."""
    if module is None:
        return None
    return module.disable_adapters, tuple(module.active_adapters), tuple(module.merged_adapters)


def _kind(call: dict[str, Any]) -> Any:
    """What the launches of a call depend on besides the buffers of its cache."""
    cache = given_cache(call)
    return tuple(
        (name, (x.shape, x.dtype) if isinstance(x, Tensor) else None if x is cache else x)
        for name, x in sorted(call.items())
    )
