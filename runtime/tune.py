"""Measure from which length on a method is faster than dense attention on this device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.attend import attend
from ..attention.dense import Dense
from ..attention.errors import FarspanError
from ..attention.keys import Keys, State
from ..attention.kv import KV
from ..attention.method import DECODE, PREFILL, AttentionMethod, LayerInfo
from ..attention.softmax import Softmax
from ..attention.summary import Summaries
from . import hf
from .crossover import Measured, check_kept, geometry, keep
from .patch import resolve, serve
from .recipe import Recipe

LENGTHS = {PREFILL: tuple(512 << i for i in range(6)), DECODE: tuple(1024 << i for i in range(8))}
_ROUGHLY = 20.0  # seconds: lengths at which one dense call would take longer are left out


def tune(
    model: Any,
    specs: str | AttentionMethod | Sequence[str | AttentionMethod],
    *,
    lengths: Sequence[int] | None = None,
    recipe: Recipe | str | Path | None = None,
    repeats: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> list[Measured]:
    """Measure the crossover of each spec on the model's device and keep it in the user's cache folder.

    One layer's attention, selection included, on random tensors of the model's geometry, beside farspan's
    dense attention. ``patch(..., crossover="auto")`` then runs a method densely on fewer keys.

    lengths: numbers of keys, ascending (by default 512 to 16K in prefill, 1K to 128K at decode); those at
    which one dense call would pass 20 s are left out. repeats:
    timed calls, method and dense in turn, of which the median counts. ``progress(done, total)`` is called
    after each length. Layers of other geometries are measured apart.
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
    """(spec, phase, method as the layer runs it, layer): once for each geometry that a method serves."""
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
    runs = [_Run(m, phase, layer, length, model) for m in (Dense(), method)]
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for repeat in range(repeats + 1):
            for run, seconds in zip(runs, times, strict=True):
                taken = run.timed()
                if repeat:  # the first is a warm-up
                    seconds.append(taken)
    return statistics.median(times[0]), statistics.median(times[1])


class _Run:
    """Attention of one layer over random keys, as a patched layer would call it."""

    def __init__(self, method: AttentionMethod, phase: str, layer: LayerInfo, length: int, model: Any):
        self.method, self.phase, self.length = method, phase, length
        period = method.cost(phase, length).period  # of cheap and dear steps: a whole one is timed
        self.steps = 1 if phase == PREFILL else period if period > 1 else 4
        how: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        kv = (1, layer.num_kv_heads, length + self.steps, layer.head_dim)
        rows = length if phase == PREFILL else self.steps
        self.k, self.v = torch.randn(kv, **how), torch.randn(kv, **how)
        self.q = torch.randn(1, layer.num_heads, rows, layer.head_dim, **how)
        self.scale = layer.head_dim**-0.5
        self.summaries, self.state = Summaries(), State()
        if phase == DECODE:
            method.on_prefill_end(self.q[:, :, :1], self._keys(length, 1))
            self._step(0)  # takes the prompt into the summaries

    def _keys(self, length: int, tq: int) -> Keys:
        return Keys(
            kv=KV(self.k[:, :, :length], self.v[:, :, :length]),
            tq=tq,
            softmax=Softmax(self.scale),
            state=self.state,
            summaries=self.summaries,
        )

    def _step(self, step: int) -> Tensor:
        q = self.q[:, :, step : step + 1]
        return attend(self.method, DECODE, q, self._keys(self.length + step + 1, 1))[0].out

    def timed(self) -> float:
        cuda = self.k.device.type == "cuda"
        if self.phase == PREFILL:
            self.summaries, self.state = Summaries(), State()
        else:
            self.summaries.crop(self.length)
        if cuda:
            torch.cuda.synchronize(self.k.device)
        begin = time.perf_counter()
        if self.phase == PREFILL:
            attend(self.method, PREFILL, self.q, self._keys(self.length, self.length))
        else:
            for step in range(self.steps):
                self._step(step)
        if cuda:
            torch.cuda.synchronize(self.k.device)
        return (time.perf_counter() - begin) / self.steps
