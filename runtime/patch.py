"""patch(): swap a model's attention, reversibly."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from ..attention.attend import DECODE_ROWS
from ..attention.checks import whole_number
from ..attention.dense import Dense
from ..attention.errors import FarspanError, SpecError, Unsupported
from ..attention.hybrid.mixer import Mixer
from ..attention.method import DECODE, PREFILL, AttentionMethod
from ..attention.spec import parse_method
from ..parallel.group.mesh import Mesh
from . import hf
from .bind import bind, check_recipe, weighed
from .chunking import Chunking
from .crossover import crossovers
from .layer import Layer
from .measure import Observer, rows_to_measure
from .mixers import Mixed, mixed_layers
from .recipe import Recipe
from .report import LayerReport, Report
from .session import Notices, Session

__all__ = ["Patched", "Report", "patch", "resolve"]

Spec = str | AttentionMethod


def patch(
    model: Any,
    spec: Spec | None = None,
    *,
    prefill: Spec | None = None,
    decode: Spec | None = None,
    layers: Mapping[int, Spec] | None = None,
    strict: bool = False,
    prefill_chunk: int | None = None,
    recipe: Recipe | str | Path | None = None,
    crossover: int | str | None = None,
    parallel: Any = None,
    measure_mass: bool | int = False,
    mixers: Mapping[int, Mixer] | None = None,
) -> Patched:
    """Let ``model`` attend by a method; ``generate`` and plain calls go on working as they are.

    spec: a method object, ``"name:par=value,..."``, or ``"PREFILL + DECODE"``, two of them, one per phase.
    One method serves the phases it has; the other phase is dense. Nothing at all means dense, on farspan's
    storage.
    prefill, decode: the same by phase, instead of ``spec``.
    layers: other specs for single layers, by number (negative counts from the end).
    strict: raise FarspanError where a layer would silently read everything for want of a cache, and for a
    method that no layer runs (its own ``dense_layers``, or a recipe of act that chooses no head).
    prefill_chunk: tokens per prefill step (rounded up to what the methods' blocks need); bounds memory on
    long prompts. No cut falls inside a block of queries of any row: a left-padded batch is cut as far as
    its rows begin at whole blocks of each other, and what follows runs in one call, with a warning. Not
    used, with a warning, on a model whose recurrent layers do not continue exactly. A call that needs
    gradients, keeps no cache, or has tensors besides those of its tokens stays whole; the report says so.
    recipe: a saved calibration, for methods that need one and name none of their own (``sale:recipe=PATH``).
    crossover: run a method densely while there are fewer keys than this; "auto" takes the number that
    ``farspan tune`` measured on this device. In a padded batch each row goes by its own number of keys. Such
    calls are in the report with their reason. A decode method that remembers the prompt (snapkv, h2o,
    recycled) begins anew where generation crosses it.
    parallel: a ContextParallel, or "auto", spreads the sequence and its KV cache over the ranks of a launcher
    (torchrun, accelerate, deepspeed); a torch DeviceMesh or accelerate's Accelerator names the ranks. Every
    rank makes the same calls and gets the same tokens; docs/MULTI_GPU.md.
    measure_mass: measure at every call, on 16 of its queries (a number: on so many; at decode on all), the
    share of the true attention that the keys read hold, and the seconds of selection; ``report`` has them.
    Calls are slower for it. One device alone can measure.

    mixers: modules (``Mixer``) by layer number that take the place of the layer's attention until ``remove``;
    they are moved to its device. The cache holds their state instead of keys, which no call can crop.

    Returns Patched, a context manager that undoes itself. Raises SpecError for a bad spec, Unsupported (with
    reasons, before anything is changed) for a model that cannot be served: by its config, or because a small
    copy of it computes something else under farspan (tried once in a process for a class that farspan's tests
    do not cover, and for every class under an untested release of transformers). FarspanError for one that
    is patched already.
    """
    methods = resolve(spec, prefill, decode)
    info = hf.inspect_model(model)
    if hf.is_patched(model):
        raise FarspanError("This model is patched already: call remove() on that patch first.")
    trial = hf.check_by_trial(info)
    mixed = mixed_layers(mixers or {}, len(info.kinds), info.attention, info.config.hidden_size)
    untouched = {
        i: "the model's own sliding window" if kind == hf.SLIDING else "no attention in this layer"
        for i, kind in enumerate(info.kinds)
        if kind == hf.SLIDING or i not in info.attention
    }
    untouched |= {i: f"the mixer {one.mixer.name} stands in its place" for i, one in mixed.items()}
    chosen = _per_layer(methods, layers or {}, len(info.kinds), untouched)
    chunk = None if prefill_chunk is None else whole_number(prefill_chunk)
    if prefill_chunk is not None and (chunk is None or chunk < 1):
        raise FarspanError(f"prefill_chunk is a number of tokens, at least 1; got {prefill_chunk!r}.")
    selective = sorted({str(m) for pair in chosen for m in pair if m.selective})
    if set(info.attention) <= set(untouched) and selective:
        raise Unsupported(
            f"farspan cannot run {' and '.join(selective)} on {type(model).__name__}",
            [
                "every attention layer of it keeps its own sliding window or has a mixer, so no layer is "
                "left to patch"
            ],
        )
    if trial.foreign_keys:
        _check_no_decode(type(model).__name__, [chosen[i] for i in info.attention if i not in untouched])
    check_recipe(recipe, chosen)
    served = {
        i: bind(chosen[i], info.layer_info(i), recipe, info.geometry)
        for i in info.attention
        if i not in mixed
    }
    if strict:
        _check_all_run(chosen, {i: pair for i, pair in served.items() if i not in untouched})
    from_keys = {
        i: {}
        if i in untouched
        else crossovers({PREFILL: pair[0], DECODE: pair[1]}, info.layer_info(i), model, crossover)
        for i, (*pair, _) in served.items()
    }
    block_multiple = math.lcm(*(m.block_multiple for pair in chosen for m in pair))
    if chunk is not None and not hf.continues_exactly(info):
        warnings.warn(
            f"prefill_chunk is not used: the layers of {type(model).__name__} that are not attention do not "
            "continue a prompt exactly where it is cut, in this release of transformers.",
            stacklevel=2,
        )
        chunk = None
    chunking = None
    if chunk is not None:
        # A step of DECODE_ROWS tokens or fewer would be taken for decode.
        tokens = -(-max(chunk, DECODE_ROWS + 1) // block_multiple) * block_multiple
        by_prompt = any(pre.lookahead.is_prompt for pre, _ in chosen)
        chunking = Chunking(tokens=tokens, block_multiple=block_multiple, by_prompt=by_prompt)
    measured = rows_to_measure(measure_mass)
    mesh = None if parallel is None else hf.join_ranks(model, info, parallel)
    if mesh is not None and mixed:
        mesh.close()
        raise FarspanError(
            f"The state of a mixer is not passed between ranks, and this model is spread over {mesh.size}: "
            "leave mixers out, or patch without parallel in one process."
        )
    if mesh is not None and any(m.needs.inputs for pair in chosen for m in pair):
        mesh.close()
        fed = sorted({m.name for pair in chosen for m in pair if m.needs.inputs})
        raise FarspanError(
            f"{' and '.join(fed)} needs queries or keys before RoPE or hidden states, which are not passed "
            f"between ranks, and this model is spread over {mesh.size}: leave parallel out, in one process."
        )
    if mesh is not None and measured:
        mesh.close()
        raise FarspanError(
            f"Attention mass is measured on one device, and this model is spread over {mesh.size} ranks: "
            "leave out measure_mass, or patch without parallel in one process."
        )
    notices = Notices()
    session = Session(strict, mesh, notices)
    bound = {
        i: Layer(i, pre, dec, session, left_dense=reasons, from_keys=from_keys[i], measure=measured)
        for i, (pre, dec, reasons) in served.items()
    }
    if mesh is not None:
        block_multiple = math.lcm(
            block_multiple, *(s.block or 1 for pair in served.values() for m in pair[:2] for s in m.summaries)
        )
        mesh.agree(
            {
                "the model": f"{type(model).__name__} {info.geometry}",
                "the dtype of the model": str(sorted({str(p.dtype) for p in model.parameters()})),
                "the share of the heads": str({(x.tp_rank, x.tp_size) for x in map(info.layer_info, served)}),
                "the methods": str([(weighed(a), weighed(b)) for a, b, _ in served.values()]),
                "the options": str((strict, chunking, from_keys, mesh.config)),
                "the version of farspan": version("farspan"),
            }
        )
    for index, layer in bound.items():
        for gate in {m.module for m in layer.methods.values() if m.module is not None}:
            hf.place_beside(gate, info.attention[index])
    undo = hf.install(model, info, bound, session, chunking, block_multiple, mixed)
    if mesh is not None:
        undo.insert(0, mesh.close)
    return Patched(type(model).__name__, bound, untouched, undo, mesh, notices, info.geometry, mixed)


class Patched:
    """A patch in place. As a context manager it removes itself on leaving."""

    def __init__(
        self,
        model_name: str,
        layers: dict[int, Layer],
        untouched: dict[int, str],
        undo: list[Callable[[], None]],
        mesh: Mesh | None = None,
        notices: Counter[str] | None = None,
        geometry: Mapping[str, Any] | None = None,
        mixed: Mapping[int, Mixed] | None = None,
    ) -> None:
        self._name = model_name
        self._layers = layers
        self._untouched = untouched
        self._undo: list[Callable[[], None]] | None = undo
        self._mesh = mesh
        self._notices = Counter() if notices is None else notices
        self._geometry = dict(geometry or {})
        self._mixed = dict(mixed or {})
        self._sent_before = self._sent()

    def modules(self) -> dict[int, dict[str, nn.Module]]:
        """The modules of methods that own parameters (gates): by layer, by the name of the method."""
        found: dict[int, dict[str, nn.Module]] = {}
        for index, layer in self._layers.items():
            for method in layer.methods.values():
                if method.module is not None:
                    found.setdefault(index, {})[method.name] = method.module
        return found

    def recipe(self, method: str, **settings: Any) -> Recipe:
        """The weights of the modules of the method ``method``, as they are now, for ``patch(recipe=...)``.
        settings: how they were made, for the record. Raises FarspanError where it owns none."""
        gates = {index: named[method] for index, named in self.modules().items() if method in named}
        if not gates:
            raise FarspanError(
                f"No layer of this patch has parameters of {method}: name a method that owns a module and "
                "that some layer runs."
            )
        return Recipe.of_modules(method, gates, self._geometry, settings)

    def report(self, *, measure_mass: bool = False) -> Report:
        """What has been read since the patch, or since ``reset_report``; measured too, where the patch
        measures.

        measure_mass: insist on it. Raises FarspanError where the patch was made without.
        """
        if measure_mass and not all(layer.measure for layer in self._layers.values()):
            raise FarspanError(
                "This patch has measured no attention mass: patch the model with measure_mass=True, then ask "
                "for the report."
            )
        layers = [
            LayerReport(i, {phase: p.snapshot() for phase, p in layer.phases.items()})
            for i, layer in self._layers.items()
            if i not in self._untouched
        ]
        traffic = dict(self._sent() - self._sent_before)
        mixers = [replace(one.report) for one in self._mixed.values()]
        untouched = {i: why for i, why in self._untouched.items() if i not in self._mixed}
        return Report(self._name, layers, untouched, traffic, dict(self._notices), mixers)

    def watch(self, observers: Mapping[int, Observer]) -> None:
        """Call ``observer(q, keys, index)`` after every selection of its layer; for patches that measure."""
        for index, observer in observers.items():
            self._layers[index].observer = observer

    def reset_report(self) -> None:
        """Start counting anew."""
        for layer in self._layers.values():
            layer.clear_report()
        for mixer in self._mixed.values():
            mixer.clear_report()
        self._notices.clear()
        self._sent_before = self._sent()

    def _sent(self) -> Counter[str]:
        """Bytes that this rank has ever sent, by collective."""
        groups = [] if self._mesh is None else self._mesh.watch.groups
        return sum((ranks.sent for ranks in groups), Counter())

    def remove(self) -> None:
        """Undo the patch: config, hooks and modules are what they were. Raises FarspanError the second time.

        What was changed on ``model.config`` while patched stays changed, an attention implementation among
        it. A model that shares the config sees the changes from now on.
        """
        if self._undo is None:
            raise FarspanError("This patch has been removed already.")
        undo, self._undo = self._undo, None
        for step in reversed(undo):
            step()

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *_: object) -> None:
        if self._undo is not None:
            self.remove()


def resolve(
    spec: Spec | None, prefill: Spec | None = None, decode: Spec | None = None
) -> tuple[AttentionMethod, AttentionMethod]:
    """The (prefill, decode) methods that a spec stands for. Raises SpecError."""
    if spec is not None and (prefill is not None or decode is not None):
        raise SpecError("Give one spec for both phases, or prefill= and decode=, not all of them.")
    if isinstance(spec, str) and " + " in spec:
        parts = spec.split(" + ")
        if len(parts) != 2:
            raise SpecError(
                f"A spec joins one prefill and one decode method, as in 'block_topk + quest'; got {spec!r}."
            )
        prefill, decode, spec = parts[0], parts[1], None
    dense = Dense()
    if spec is not None:
        method = parse_method(spec)
        return (
            method if PREFILL in method.phases else dense,
            method if DECODE in method.phases else dense,
        )
    chosen = []
    for phase, given in ((PREFILL, prefill), (DECODE, decode)):
        method = dense if given is None else parse_method(given)
        if phase not in method.phases:
            raise SpecError(f"{method.name} has no {phase}: it serves {' and '.join(sorted(method.phases))}.")
        chosen.append(method)
    return chosen[0], chosen[1]


def _per_layer(
    methods: tuple[AttentionMethod, AttentionMethod],
    overrides: Mapping[int, Spec],
    count: int,
    untouched: Mapping[int, str],
) -> list[tuple[AttentionMethod, AttentionMethod]]:
    chosen = [methods] * count
    given: dict[int, object] = {}  # by layer, the number it was named by
    for name, spec in overrides.items():
        number = whole_number(name)
        if number is None or not -count <= number < count:
            raise SpecError(f"layers= takes layer numbers from 0 to {count - 1}; got {name!r}.")
        index = number % count
        if index in given:
            raise SpecError(
                f"layers= names layer {index} twice, as {given[index]!r} and {name!r}: keep one of them."
            )
        given[index], chosen[index] = name, resolve(spec)
        reason = untouched.get(index)
        if reason and any(m.selective for m in chosen[index]):
            raise SpecError(f"layers= cannot give layer {name} a method: {reason}.")
    return chosen


def _check_no_decode(model: str, chosen: Sequence[tuple[AttentionMethod, AttentionMethod]]) -> None:
    """Refuse a decode method where every call is a prefill; a method of both phases runs as that."""
    dense = Dense()
    never = sorted({str(decode) for prefill, decode in chosen if decode not in (prefill, dense)})
    if never:
        raise Unsupported(
            f"farspan cannot run {' and '.join(never)} at decode on {model}",
            [
                "its attention is given keys that are not the cache's own, so every call is a prefill: "
                "choose a prefill method or dense"
            ],
        )


def _check_all_run(
    chosen: Sequence[tuple[AttentionMethod, AttentionMethod]],
    served: Mapping[int, tuple[AttentionMethod, AttentionMethod, Any]],
) -> None:
    for place in (0, 1):
        for method in {str(chosen[i][place]): chosen[i][place] for i in served}.values():
            if not any(chosen[i][place] == method and served[i][place].name == method.name for i in served):
                raise FarspanError(
                    f"No layer of this model runs {method}, as its own parameters or its recipe have it, and "
                    "strict=True forbids that: change them, or leave strict out."
                )
