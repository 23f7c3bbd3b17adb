"""Measure on this device the length from which a method is faster than dense attention, and the libraries
whose kernels are faster in it than farspan's."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.attend import DECODE_ROWS
from ..attention.dense import Dense
from ..attention.errors import FarspanError
from ..attention.method import DECODE, PREFILL, AttentionMethod, LayerInfo
from ..attention.ops.dispatch import OWN, explanations
from ..attention.softmax import Softmax
from . import hf
from .bind import serve
from .crossover import Measured, check_kept, geometry, keep
from .layer_call import Called, LayerCall, LocalKeys
from .recipe import Recipe
from .specs import resolve
from .store.store import KVStore

LENGTHS = {PREFILL: tuple(512 << i for i in range(6)), DECODE: tuple(1024 << i for i in range(8))}
_DENSE = Dense()
_ROUGHLY = 20.0  # seconds; a length at which one dense call would take longer is not measured
# By how much a library's result may differ: its output by so many roundings of the model's dtype, as a share
# of the largest number, and its log-sum-exp, which is float32. Another base of the logarithm makes 44 % of
# several units.
_ROUNDINGS, _OF_LSE = 8, 0.02


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
    The method is also timed with the kernels of each installed library that can run one of its operations
    (FlashAttention-4, FlexAttention, FlashInfer). Every later ``patch`` uses them in this method where they
    were faster. A library whose kernels fail, or give another result, is left out with a warning.
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
        rivals: list[dict[_Rival, float]] = []
        for length in sizes_of[phase]:
            if not times or times[-1][1] * (length / times[-1][0]) ** 2 <= _ROUGHLY:
                dense, own, others = _compare(method, phase, layer, length, model, repeats)
                times.append((length, dense, own))
                rivals.append(others)
            steps += 1
            if progress:
                progress(steps, total)
        done.append(
            Measured(
                method=spec,
                phase=phase,
                layer=geometry(layer),
                lengths=[length for length, _, _ in times],
                dense=[dense for _, dense, _ in times],
                seconds=[own for _, _, own in times],
                rivals=_by_operation(rivals),
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


_Rival = tuple[str, str]  # an operation, and the library that runs it


def _by_operation(rivals: list[dict[_Rival, float]]) -> dict[str, dict[str, list[float | None]]]:
    """By operation and library, the seconds at each length; None where it was not timed."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for op, name in sorted({rival for timed in rivals for rival in timed}):
        found.setdefault(op, {})[name] = [timed.get((op, name)) for timed in rivals]
    return found


def _compare(
    method: AttentionMethod, phase: str, layer: LayerInfo, length: int, model: Any, repeats: int
) -> tuple[float, float, dict[_Rival, float]]:
    """Median seconds of dense attention, of the method, and of the method with each library that can run one
    of its operations: a whole prefill, or one decode step averaged over several."""
    with torch.no_grad():
        dense, own = (_Run(m, phase, layer, length, model) for m in (_DENSE, method))
        dense.timed()  # a warm-up
        with explanations() as explained:
            own.timed()
        rivals: dict[_Rival, _Run] = {}
        for rival in sorted({(op, name) for op, _, reasons in explained for name in _libraries(reasons)}):
            run = _Run(method, phase, layer, length, model, rival)
            if own.agrees(run, rival):
                rivals[rival] = run
        runs = [dense, own, *rivals.values()]
        times: list[list[float]] = [[] for _ in runs]
        for _ in range(repeats):
            for run, seconds in zip(runs, times, strict=True):
                seconds.append(run.timed())
    medians = [statistics.median(seconds) for seconds in times]
    return medians[0], medians[1], dict(zip(rivals, medians[2:], strict=True))


def _libraries(reasons: dict[str, list[str]]) -> list[str]:
    """The libraries for which there is no reason against them."""
    return [name for name, against in reasons.items() if name not in OWN and not against]


class _Run:
    """One layer of a patched model on a store of random keys, the same in every run of a length. rival: an
    operation, and the library that runs it."""

    def __init__(
        self,
        method: AttentionMethod,
        phase: str,
        layer: LayerInfo,
        length: int,
        model: Any,
        rival: _Rival | None = None,
    ):
        if method.evict:  # its steps are undone, which evicted keys would not be
            method = replace(method, evict=False)  # type: ignore[call-arg]
        self.phase, self.length, self.softmax = phase, length, Softmax(layer.head_dim**-0.5)
        period = method.cost(phase, length).period  # steps differ in cost, so a whole period is timed
        self.steps = 1 if phase == PREFILL else period if period > 1 else 4
        how: dict[str, Any] = {"dtype": model.dtype, "device": model.device}
        how["generator"] = torch.Generator(model.device).manual_seed(length)
        faster = {} if rival is None else {phase: ((0, dict([rival])),)}
        kv = (1, layer.num_kv_heads, length + self.steps, layer.head_dim)
        self.k, self.v = torch.randn(kv, **how), torch.randn(kv, **how)
        self.store = KVStore()
        self.store.append(self.k[:, :, :length], self.v[:, :, :length])
        if phase == PREFILL:
            self.call = LayerCall(method, _DENSE, faster=faster)
            self.q = torch.randn(1, layer.num_heads, length, layer.head_dim, **how)
            return
        self.call = LayerCall(_DENSE, method, faster=faster)
        self.q = torch.randn(1, layer.num_heads, self.steps, layer.head_dim, **how)
        # more than DECODE_ROWS queries are a prefill, which sets up state
        last = min(length, DECODE_ROWS + 1)
        self._attend(torch.randn(1, layer.num_heads, last, layer.head_dim, **how))
        self.states = self.store.states

    def agrees(self, other: _Run, rival: _Rival) -> bool:
        """Whether ``other`` runs the library ``rival`` and computes what this run does; a warning where it
        fails or computes something else."""
        self._reset()
        truth = self._first().done[0].part
        op, name = rival
        try:
            done = other._first().done[0]
        except Exception as error:  # whatever a kernel of another package raises
            warnings.warn(f"{name} was not timed: its {op} failed with {error!r}.", stacklevel=4)
            return False
        if rival not in done.ran:
            return False
        off = float((done.part.out - truth.out).abs().max() / truth.out.abs().max())
        same = done.part.lse == truth.lse  # where both are -inf
        of_lse = float(torch.where(same, 0.0, (done.part.lse - truth.lse).abs()).max())
        if off <= _ROUNDINGS * torch.finfo(self.q.dtype).eps and of_lse <= _OF_LSE:
            return True
        text = f"its {op} differs from farspan's by {off:.1%}, and its log-sum-exp by {of_lse:.2g}"
        warnings.warn(f"{name} was not timed: {text}.", stacklevel=4)
        return False

    def _attend(self, q: Tensor) -> Called:
        assert self.store.kv is not None
        return self.call(LocalKeys(q, self.store.kv, self.softmax, store=self.store))

    def _step(self, step: int) -> Called:
        at = slice(self.length + step, self.length + step + 1)
        self.store.append(self.k[:, :, at], self.v[:, :, at])
        return self._attend(self.q[:, :, step : step + 1])

    def _first(self) -> Called:
        """A prefill, or the first decode step."""
        return self._attend(self.q) if self.phase == PREFILL else self._step(0)

    def _reset(self) -> None:
        """Undo the steps of the previous repeat."""
        if self.phase == PREFILL:
            self.store.summaries.clear()
            self.store.states.clear()
        else:
            self.store.crop(self.store.total - self.length)
            self.store.states = copy.deepcopy(self.states)

    def timed(self) -> float:
        """Seconds of a prefill, or the mean seconds of ``steps`` decode steps with their appends."""
        cuda = self.k.device.type == "cuda"
        self._reset()
        if cuda:
            torch.cuda.synchronize(self.k.device)
        begin = time.perf_counter()
        if self.phase == PREFILL:
            self._first()
        else:
            for step in range(self.steps):
                self._step(step)
        if cuda:
            torch.cuda.synchronize(self.k.device)
        return (time.perf_counter() - begin) / self.steps
