"""Measure the length from which a method is faster than dense attention on this device."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.attend import DECODE_ROWS
from ..attention.dense import Dense
from ..attention.errors import FarspanError
from ..attention.method import DECODE, PREFILL, AttentionMethod, LayerInfo
from ..attention.softmax import Softmax
from . import hf
from .bind import serve
from .cache import KVStore
from .crossover import Measured, check_kept, geometry, keep
from .layer_call import LayerCall, LocalKeys
from .patch import resolve
from .recipe import Recipe

LENGTHS = {PREFILL: tuple(512 << i for i in range(6)), DECODE: tuple(1024 << i for i in range(8))}
_DENSE = Dense()
_ROUGHLY = 20.0  # seconds; a length at which one dense call would take longer is not measured


def tune(
    model: Any,
    specs: str | AttentionMethod | Sequence[str | AttentionMethod],
    *,
    lengths: Sequence[int] | None = None,
    recipe: Recipe | str | Path | None = None,
    repeats: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> list[Measured]:
    """Measure the crossover of each spec on the model's device and save it in the user's cache folder.

    The attention of one layer is timed on random tensors of the model's geometry, beside farspan's dense
    attention. The time includes the selection and, at decode, the append of the new token.
    ``patch(..., crossover="auto")`` then runs dense attention while there are fewer keys than the crossover.
    Layers of different geometries are measured separately.

    lengths: numbers of keys, ascending (default: 512 to 16K in prefill, 1K to 128K at decode). A length at
    which one dense call would take more than 20 s is not measured.
    repeats: number of timed calls. Method and dense are called in turn, and the median is taken.
    progress: called as ``progress(done, total)`` after each length.

    Raises FarspanError for repeats below 1, for lengths that are not ascending, and where no spec selects in
    any layer.
    """
    if repeats < 1:
        raise FarspanError(f"repeats is a number of timed calls, at least 1; got {repeats}.")
    if lengths is not None and (not lengths or sorted(set(lengths)) != list(lengths) or lengths[0] < 2):
        raise FarspanError(f"Lengths are ascending numbers of keys, at least 2; got {list(lengths)}.")
    check_kept()
    info = hf.inspect_model(model)
    specs = [specs] if isinstance(specs, str | AttentionMethod) else specs
    jobs = list(_jobs(info, specs, recipe))
    sizes_of = {phase: LENGTHS[phase] if lengths is None else lengths for phase in (PREFILL, DECODE)}
    total = sum(len(sizes_of[phase]) for _, phase, _, _ in jobs)
    steps = 0
    done: list[Measured] = []
    for spec, phase, method, layer in jobs:
        times: list[tuple[int, float, float]] = []
        for length in sizes_of[phase]:
            if not times or times[-1][1] * (length / times[-1][0]) ** 2 <= _ROUGHLY:
                times.append((length, *_compare(method, phase, layer, length, model, repeats)))
            steps += 1
            if progress:
                progress(steps, total)
        sizes, dense, seconds = (list(column) for column in zip(*times, strict=True))
        done.append(
            Measured(
                method=spec, phase=phase, layer=geometry(layer), lengths=sizes, dense=dense, seconds=seconds
            )
        )
    keep(done, model)
    return done


def _jobs(
    info: hf.ModelInfo, specs: Sequence[str | AttentionMethod], recipe: Recipe | str | Path | None
) -> Iterator[tuple[str, str, AttentionMethod, LayerInfo]]:
    """Yield (spec, phase, method bound to the layer, layer), once for each geometry that a method serves."""
    seen = set()
    for spec in specs:
        for phase, method in zip((PREFILL, DECODE), resolve(spec), strict=True):
            for index in info.attention:
                layer = info.layer_info(index)
                job = (str(method), phase, *geometry(layer).values())
                if not method.selective or info.kinds[index] == hf.SLIDING or job in seen:
                    continue
                served = serve(method, layer, recipe, info.geometry)
                if served is not None:
                    seen.add(job)
                    yield str(method), phase, served, layer
    if not seen:
        raise FarspanError(
            "There is nothing to measure: name at least one method other than dense, that some layer runs."
        )


def _compare(
    method: AttentionMethod, phase: str, layer: LayerInfo, length: int, model: Any, repeats: int
) -> tuple[float, float]:
    """Median seconds of (dense, method): a whole prefill, or one decode step averaged over several."""
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        runs = [_Run(m, phase, layer, length, model) for m in (_DENSE, method)]
        for repeat in range(repeats + 1):
            for run, seconds in zip(runs, times, strict=True):
                taken = run.timed()
                if repeat:  # the first call is a warm-up
                    seconds.append(taken)
    return statistics.median(times[0]), statistics.median(times[1])


class _Run:
    """One layer of a patched model on a store of random keys."""

    def __init__(self, method: AttentionMethod, phase: str, layer: LayerInfo, length: int, model: Any):
        self.phase, self.length, self.softmax = phase, length, Softmax(layer.head_dim**-0.5)
        period = method.cost(phase, length).period  # steps differ in cost, so a whole period is timed
        self.steps = 1 if phase == PREFILL else period if period > 1 else 4
        how: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        kv = (1, layer.num_kv_heads, length + self.steps, layer.head_dim)
        self.k, self.v = torch.randn(kv, **how), torch.randn(kv, **how)
        self.store = KVStore()
        self.store.append(self.k[:, :, :length], self.v[:, :, :length])
        if phase == PREFILL:
            self.call = LayerCall(method, _DENSE)
            self.q = torch.randn(1, layer.num_heads, length, layer.head_dim, **how)
            return
        self.call = LayerCall(_DENSE, method)
        self.q = torch.randn(1, layer.num_heads, self.steps, layer.head_dim, **how)
        # more than DECODE_ROWS queries are a prefill, which sets up state
        last = min(length, DECODE_ROWS + 1)
        self._attend(torch.randn(1, layer.num_heads, last, layer.head_dim, **how))
        self.states = self.store.states

    def _attend(self, q: Tensor) -> None:
        assert self.store.kv is not None
        self.call(LocalKeys(q, self.store.kv, self.softmax, store=self.store))

    def _step(self, step: int) -> None:
        at = slice(self.length + step, self.length + step + 1)
        self.store.append(self.k[:, :, at], self.v[:, :, at])
        self._attend(self.q[:, :, step : step + 1])

    def timed(self) -> float:
        """Seconds of a prefill, or the mean seconds of ``steps`` decode steps with their appends."""
        cuda = self.k.device.type == "cuda"
        if self.phase == PREFILL:
            self.store.summaries.clear()
            self.store.states.clear()
        else:  # undo the steps of the previous repeat
            self.store.crop(self.store.total - self.length)
            self.store.states = copy.deepcopy(self.states)
        if cuda:
            torch.cuda.synchronize(self.k.device)
        begin = time.perf_counter()
        if self.phase == PREFILL:
            self._attend(self.q)
        else:
            for step in range(self.steps):
                self._step(step)
        if cuda:
            torch.cuda.synchronize(self.k.device)
        return (time.perf_counter() - begin) / self.steps
