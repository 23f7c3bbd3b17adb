"""patch(): replace a model's attention, reversibly."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..attention.attend import DECODE_ROWS
from ..attention.checks import whole_number
from ..attention.errors import FarspanError, Unsupported
from ..attention.hybrid.mixer import Mixer
from ..attention.method import DECODE, PREFILL
from . import hf
from .bind import bind, check_all_run, check_evicting, check_no_decode, check_recipe, weighed
from .chunking import Chunking
from .crossover import crossovers, faster_kernels
from .layer import Layer
from .lora import adapters_of
from .measure import rows_to_measure
from .mixers import mixed_layers
from .patched import Patched
from .recipe import Recipe
from .session import Notices, Session
from .specs import Spec, per_layer, resolve, spelt
from .static_call import check_methods, checked_room
from .store.storage import DEVICE, Storage, storages


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
    storage: str | Storage | Mapping[int, str | Storage] | None = None,
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
    storage: how the cache keeps keys and values: a format, a memory, or both as "int8+disk"; a mapping gives
    it by layer number. Formats: as they are (the default); "int8" or "int4" (KIVI, 2402.02750: in groups of
    few bits, the last ``window`` tokens as they are; "int4:group=32,window=128"). Memories: "device" (the
    default), "host" (pinned memory beside a GPU), "disk:folder=PATH". No gradient flows through a cache in
    another storage than the default. Where few bits change attention too much, key channels are kept as they
    are, and a layer where that is not enough gives a warning, or with ``strict`` a FarspanError.

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
    stored = storages(storage, len(info.kinds))
    alone = {
        "parallel": parallel,
        "mixers": mixers,
        "measure_mass": measure_mass,
        "crossover": crossover,
        "storage": stored,
    }
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
    chosen = per_layer(methods, layers or {}, len(info.kinds), untouched)
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
    for i, (prefill_method, decode_method, _) in served.items():
        check_evicting(prefill_method, decode_method, stored.get(i, DEVICE), parallel is not None)
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
                "the options": str((strict, chunking, from_keys, faster, mesh.config, storage)),
                "the adapters": "" if adapters is None else f"{adapters.digest} {merge}",
                "the version of farspan": version("farspan"),
            }
        )
    for index, layer in bound.items():
        for gate in {m.module for m in layer.methods.values() if m.module is not None}:
            hf.place_beside(gate, info.attention[index])
    continues = partial(hf.continues_exactly, info)
    about = {"spec": spelt(*methods), "adapters": "" if adapters is None else adapters.digest}
    undo = hf.install(
        model, info, bound, session, chunking, block_multiple, mixed, continues, room, stored, about
    )
    if adapters is not None:
        undo += adapters.put_on(merge)
    if mesh is not None:
        undo.insert(0, mesh.close)
    name, shape = type(model).__name__, info.geometry
    return Patched(name, bound, untouched, undo, mesh, notices, shape, mixed, chunking, room, continues)
