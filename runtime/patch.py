"""patch(): replace a model's attention, reversibly."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
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
from .bind import bind, check_all_run, check_no_decode, check_recipe, weighed
from .chunking import Chunking
from .crossover import crossovers, faster_kernels
from .layer import Layer
from .layer_numbers import by_layer
from .lora import adapters_of
from .measure import Observer, rows_to_measure
from .mixers import Mixed, mixed_layers
from .recipe import Recipe
from .report import LayerReport, Report
from .session import Notices, Session
from .static_call import check_methods, checked_room

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
    merge: bool = False,
    static: int | None = None,
) -> Patched:
    """Replace the attention of ``model`` by a method. ``generate`` and plain calls work as before.

    spec: a method object, ``"name:par=value,..."``, or two methods ``"PREFILL + DECODE"``, one per phase.
    A phase that the method does not have is dense. Without a spec both phases are dense, on farspan's
    storage.
    prefill, decode: the specs of the two phases, instead of ``spec``.
    layers: other specs for single layers, by layer number (a negative number counts from the last layer).
    strict: raise FarspanError where a layer would read every key because the call keeps no cache, and for a
    method that no layer runs (because of its ``dense_layers``, or of an act recipe that chooses no head).
    prefill_chunk: tokens per prefill step, rounded up to whole blocks of the methods. It limits the memory
    that long prompts need. No cut falls inside a block of queries of any row: a left-padded batch is cut up
    to the first row that does not begin at a whole block, and the rest runs in one call, with a warning.
    It is not used, with a warning, on a model whose recurrent layers do not continue exactly. A call is not
    cut if it needs gradients, keeps no cache, or has tensors that do not lie along its tokens; the report
    says so.
    recipe: a saved calibration or training for methods that need one and do not name it in their spec
    (``sale:recipe=PATH``). Adapters in it (``farspan train --tune``) change the attention's projections until
    ``remove``.
    crossover: use dense attention while there are fewer keys than this number. "auto" takes the number that
    ``farspan tune`` measured on this device. In a padded batch, each row's own number of keys counts. The
    report lists such calls as fallbacks. A decode method with state (snapkv, h2o, recycled) starts without it
    where generation crosses this number.
    parallel: a ContextParallel or "auto" shards the sequence and its KV cache over the ranks of a launcher
    (torchrun, accelerate, deepspeed). A torch DeviceMesh or accelerate's Accelerator names the ranks. Every
    rank makes the same calls and gets the same tokens; see docs/MULTI_GPU.md.
    measure_mass: measure in every call which fraction of the true attention falls on the keys read, and how
    many seconds the selection takes. True samples 16 queries of a prefill call; a number sets another count;
    at decode every query is measured. The values are in ``report``. Calls become slower. It works on one
    device only.
    mixers: ``Mixer`` modules by layer number. They replace the attention of the layer until ``remove``, and
    are moved to its device. The cache holds their state instead of keys. The state can be
    cropped only where it is keys and values alone (sigmoid).
    merge: add LoRA adapters of the recipe to the weights, which takes a copy of these; ``remove`` puts the
    old ones back. Without it they are computed beside the weights.
    static: make caches whose buffers hold this many positions, prompt and new tokens together, and never
    move. Each further token of a row then takes a few kernels a layer, without a wait for the device, and on
    CUDA they are captured in a graph and replayed. It serves dense, window, quest, double_sparsity and
    recycled without dynamic at decode, on one device, in models whose layers all have full attention. The
    padding is read with the prompt and taken to stay. Replays call no hooks of the modules in the decoder. A
    call beyond the positions raises FarspanError.

    Where ``farspan tune`` measured another library's kernels faster on this device, operations take them; but
    a decode step under ``static`` runs farspan's own.

    Returns Patched, a context manager that removes the patch at its end.

    Raises SpecError for a bad spec, and FarspanError for a model that is patched already. Raises Unsupported,
    with the reasons and before anything is changed, for a model that farspan cannot serve: its config rules
    it out, or a small copy of it computes something else under farspan. The copy is run once in a process,
    for a class that farspan's tests do not cover or under an untested release of transformers.
    """
    methods = resolve(spec, prefill, decode)
    info = hf.inspect_model(model)
    if hf.is_patched(model):
        raise FarspanError(
            "This model is patched already: call remove() on the first patch, then patch again."
        )
    alone = {"parallel": parallel, "mixers": mixers, "measure_mass": measure_mass, "crossover": crossover}
    room = checked_room(static, **alone)
    trial = hf.check_by_trial(info)
    if room is not None:
        hf.check_static(info, trial.foreign_keys)
    mixed = mixed_layers(mixers or {}, len(info.kinds), info.attention, info.config.hidden_size)
    untouched = {
        i: "the model's own sliding window" if kind == hf.SLIDING else "no attention in this layer"
        for i, kind in enumerate(info.kinds)
        if kind == hf.SLIDING or i not in info.attention
    }
    untouched |= {i: f"the model's own mixer {x.name}" for i, x in hf.mixers_of(info.decoder).items()}
    untouched |= {i: f"the mixer {one.mixer.name} replaces its attention" for i, one in mixed.items()}
    chosen = _per_layer(methods, layers or {}, len(info.kinds), untouched)
    chunk = None if prefill_chunk is None else whole_number(prefill_chunk)
    if prefill_chunk is not None and (chunk is None or chunk < 1):
        raise FarspanError(f"prefill_chunk is a number of tokens, at least 1; got {prefill_chunk!r}.")
    selective = sorted({str(m) for pair in chosen for m in pair if m.selective})
    if set(info.attention) <= set(untouched) and selective:
        raise Unsupported(
            f"farspan cannot run {' and '.join(selective)} on {type(model).__name__}",
            [
                "each of its attention layers has the model's own sliding window or a mixer, so there is no "
                "layer to patch"
            ],
        )
    if trial.foreign_keys:
        check_no_decode(type(model).__name__, [chosen[i] for i in info.attention if i not in untouched])
    check_recipe(recipe, chosen, info.geometry)
    adapters = adapters_of(recipe, chosen, info, merge)
    served = {
        i: bind(chosen[i], info.layer_info(i), recipe, info.geometry)
        for i in info.attention
        if i not in mixed
    }
    for prefill_method, decode_method, _ in served.values() if room is not None else ():
        check_methods(prefill_method, decode_method)
    at_work = {i: pair for i, pair in served.items() if i not in untouched}
    if strict:
        check_all_run(chosen, at_work)
    by_phase = {i: {PREFILL: pre, DECODE: dec} for i, (pre, dec, _) in at_work.items()}
    from_keys = {
        i: crossovers(by_phase[i], info.layer_info(i), model, crossover) if i in by_phase else {}
        for i in served
    }
    faster = faster_kernels(by_phase, info.layer_info, model)
    block_multiple = math.lcm(*(m.block_multiple for pair in chosen for m in pair))
    if chunk is not None and not hf.continues_exactly(info):
        warnings.warn(
            f"prefill_chunk is not used: in this release of transformers, layers of {type(model).__name__} "
            "without attention compute something else for a prompt in chunks than for the whole prompt.",
            stacklevel=2,
        )
        chunk = None
    chunking = None
    if chunk is not None:
        # A step of DECODE_ROWS tokens or fewer would be a decode step.
        tokens = -(-max(chunk, DECODE_ROWS + 1) // block_multiple) * block_multiple
        by_prompt = any(pre.lookahead.is_prompt for pre, _ in chosen)
        chunking = Chunking(tokens=tokens, block_multiple=block_multiple, by_prompt=by_prompt)
    measured = rows_to_measure(measure_mass)
    stateful = {i: one.mixer for i, one in mixed.items()} | hf.mixers_of(info.decoder)
    mesh = None if parallel is None else hf.join_ranks(model, info, parallel, stateful)
    if mesh is not None and measured:
        mesh.close()
        raise FarspanError(
            f"measure_mass was given for a model over {mesh.size} ranks, and attention mass is measured on "
            "one device only: leave measure_mass out, or patch without parallel in one process."
        )
    notices = Notices()
    session = Session(strict, mesh, notices)
    bound = {
        i: Layer(i, pre, dec, session, reasons, from_keys[i], faster.get(i, {}), measured)
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
                "the shard of the heads": str({(x.tp_rank, x.tp_size) for x in map(info.layer_info, served)}),
                "the methods": str([(weighed(a), weighed(b)) for a, b, _ in served.values()]),
                "the options": str((strict, chunking, from_keys, faster, mesh.config)),
                "the adapters": "" if adapters is None else f"{adapters.digest} {merge}",
                "the version of farspan": version("farspan"),
            }
        )
    for index, layer in bound.items():
        for gate in {m.module for m in layer.methods.values() if m.module is not None}:
            hf.place_beside(gate, info.attention[index])
    continues = partial(hf.continues_exactly, info)
    undo = hf.install(model, info, bound, session, chunking, block_multiple, mixed, continues, room)
    if adapters is not None:
        undo += adapters.put_on(merge)
    if mesh is not None:
        undo.insert(0, mesh.close)
    return Patched(type(model).__name__, bound, untouched, undo, mesh, notices, info.geometry, mixed)


class Patched:
    """A patch of one model. As a context manager it is removed at the end of the ``with`` block."""

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
        """The modules of methods that own parameters (gates), by layer and by the name of the method."""
        found: dict[int, dict[str, nn.Module]] = {}
        for index, layer in self._layers.items():
            for method in layer.methods.values():
                if method.module is not None:
                    found.setdefault(index, {})[method.name] = method.module
        return found

    def selective_layers(self) -> list[int]:
        """The layers in which the prefill method selects."""
        return [
            index
            for index, layer in self._layers.items()
            if index not in self._untouched and layer.prefill.selective
        ]

    def recipe(self, method: str, **settings: Any) -> Recipe:
        """A recipe of the present weights of the modules of ``method``, for ``patch(recipe=...)``.

        settings: how the weights were made; they are saved with the recipe. Raises FarspanError where no
        layer runs a method of this name that owns a module.
        """
        owners = {
            index: one
            for index, layer in self._layers.items()
            for one in layer.methods.values()
            if one.name == method and one.module is not None
        }
        if not owners:
            raise FarspanError(
                f"No layer of this patch has parameters of {method}: name a method that owns a module and "
                "that some layer runs."
            )
        gates = {index: one.module for index, one in owners.items() if one.module is not None}
        return Recipe.of_modules(next(iter(owners.values())), gates, self._geometry, settings)

    def report(self, *, measure_mass: bool = False) -> Report:
        """What each layer has read since the patch, or since ``reset_report``.

        measure_mass: whether to require the recall of attention mass. It is in the report of every patch that
        was made with measure_mass; for other patches this raises FarspanError.
        """
        if measure_mass and not all(layer.measure for layer in self._layers.values()):
            raise FarspanError(
                "This patch has measured no attention mass: patch the model with measure_mass=True, and call "
                "the model before report(measure_mass=True)."
            )
        for layer in self._layers.values():
            layer.settle()
        layers = [
            LayerReport(
                i,
                {phase: p.snapshot() for phase, p in layer.phases.items()},
                layer.stored,
                layer.dense_stored,
            )
            for i, layer in self._layers.items()
            if i not in self._untouched
        ]
        traffic = dict(self._sent() - self._sent_before)
        mixers = [replace(one.report) for one in self._mixed.values()]
        untouched = {i: why for i, why in self._untouched.items() if i not in self._mixed}
        return Report(self._name, layers, untouched, traffic, dict(self._notices), mixers)

    def watch(self, observers: Mapping[int, Observer]) -> None:
        """Call ``observer(q, keys, selection)`` after every selection of a layer. observers: by layer. The
        patch must have been made with measure_mass."""
        for index, observer in observers.items():
            self._layers[index].observer = observer

    def reset_report(self) -> None:
        """Set all counts of the report to zero."""
        for layer in self._layers.values():
            layer.clear_report()
        for mixer in self._mixed.values():
            mixer.clear_report()
        self._notices.clear()
        self._sent_before = self._sent()

    def _sent(self) -> Counter[str]:
        """All bytes that this rank has sent so far, by collective."""
        groups = [] if self._mesh is None else self._mesh.watch.groups
        return sum((ranks.sent for ranks in groups), Counter())

    def remove(self) -> None:
        """Undo the patch: config, hooks and modules are what they were. Raises FarspanError if it is removed.

        What the caller changed on ``model.config`` after patching stays changed, including an attention
        implementation. If another model shares the config, the changes apply to it from now on.
        """
        if self._undo is None:
            raise FarspanError("This patch is removed already: call remove() once, or use a with block.")
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
    """The (prefill, decode) methods of a spec, or of a spec for each phase. Raises SpecError for a bad
    spec."""
    if spec is not None and (prefill is not None or decode is not None):
        raise SpecError(
            "A spec was given together with prefill= or decode=: give one spec for both phases, or prefill= "
            "and decode= alone."
        )
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
            raise SpecError(
                f"{method.name} has no {phase}: it serves {' and '.join(sorted(method.phases))}. Give a "
                f"method that has {phase} (farspan methods lists them)."
            )
        chosen.append(method)
    return chosen[0], chosen[1]


def _per_layer(
    methods: tuple[AttentionMethod, AttentionMethod],
    overrides: Mapping[int, Spec],
    count: int,
    untouched: Mapping[int, str],
) -> list[tuple[AttentionMethod, AttentionMethod]]:
    chosen = [methods] * count
    for index, (name, spec) in by_layer("layers", overrides, count).items():
        chosen[index] = resolve(spec)
        reason = untouched.get(index)
        if reason and any(m.selective for m in chosen[index]):
            raise SpecError(
                f"layers= cannot give layer {name} a method: {reason}. Leave this layer out of layers=."
            )
    return chosen
