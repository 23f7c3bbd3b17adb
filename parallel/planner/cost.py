"""Memory, bytes sent and seconds of a prompt on the devices of a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

from ...attention.errors import FarspanError
from ...attention.kept import keys_kept
from ...attention.method import PREFILL
from ...attention.summary import count_entries, entry_bytes
from ..mechanisms.layout import contiguous, zigzag
from ..mechanisms.volume import Choice, Geometry, choose, decode_volume, padded, volumes, window_volume
from .device import Device
from .job import Job, LayerShape
from .simulate import Work, simulate
from .storages import BLOCK, DEVICE, DISK, HOST, PLAIN

RESERVED = 0.05  # of a device's memory, for the runtime's own context, workspaces and fragmentation
_SAMPLES = 16  # calls of a chunked prefill that are simulated; the others are interpolated

# --- memory --------------------------------------------------------------------------------------


@lru_cache(1024)
def stored_rows(length: int, ranks: int, window: int | None = None, in_order: bool = False) -> int:
    """Positions that the fullest rank keeps of a prompt of ``length`` tokens, or of its last ``window``,
    which are laid out anew. in_order: each rank keeps one contiguous shard."""
    split = contiguous if in_order and window is None else zigzag
    layout = split(0, length, ranks).layout().cut(max(0, length - (window or length)), length)
    return max(layout.count(rank) for rank in range(ranks))


def memory(job: Job) -> tuple[dict[str, int], dict[str, int]]:
    """-> (bytes of one device by purpose, bytes that are in use at the peak of a layer by part of it)."""
    model, e = job.model, job.model.element_size
    kv, spare, fetched = cache(job, PREFILL)
    summaries = _summaries(job)
    states = job.batch * (model.mixer_states + job.length * model.mixer_growth)  # the same on every rank
    found = {
        "weights": -(-job.weights // job.tensor),
        "kv_cache": kv,
        "room_to_grow": spare,
        **({"fetched": fetched} if fetched else {}),
        **({"summaries": summaries} if summaries else {}),
        **({"states": states} if model.mixers else {}),
        "transient": 0,
        "logits": job.batch * model.vocab * (e + 4),  # of the last position, and in float32
        "reserved": int(RESERVED * job.memory),
    }
    geometry = model.geometry(_widest(job), job.tensor)
    tokens = job.batch * padded(job.call(0)[0], job.ranks, in_order=job.model.in_order) // job.ranks
    wide = 4 * geometry.num_heads * (geometry.head_dim + 1)  # the partial result, in float32
    attention = tokens * (2 * model.hidden * e + 2 * geometry.query + geometry.kv + wide)
    mlp = tokens * (2 * model.hidden + 3 * -(-model.intermediate // job.tensor)) * e
    held = 0
    if job.ranks > 1:
        left = max(0, job.memory - sum(found.values()) - max(attention, mlp))
        last = job.num_calls - 1  # what is held grows with the past
        some = sorted({round(i * last / 2 / _SAMPLES) for i in range(2 * _SAMPLES + 1)})
        taken = [_choose(job, geometry, *job.call(i), left) for i in some]
        held = max(choice.held[choice.mechanism] for choice in taken)
        if any(_reach(layer, job) for layer in model.layers):
            held = max(held, _fetched(job, geometry))
    found["transient"] = max(attention + held, mlp)
    return found, {"attention": attention, "gathered": held, "mlp": mlp}


def cache(job: Job, phase: str) -> tuple[int, int, int]:
    """-> (bytes of keys and values on a device after a call of ``phase``, those for them to grow, those that
    are on the device at a time where another memory has the cache)."""
    e, kv, spare, fetched = job.model.element_size, 0.0, 0.0, 0.0
    for (layer, rows), count in _stores(job, phase).items():
        heads = job.batch * job.model.geometry(layer, job.tensor).num_kv_heads
        stored = PLAIN if layer.window is not None else job.storage
        if stored.tier == DEVICE:
            size = stored.size(rows, layer.head_dim, e)
            room = stored.room(rows, layer.head_dim, e)
            kv, spare = kv + count * heads * size, spare + count * heads * (room - size)
        else:  # for this layer and the next
            taken_in = min(rows, max(BLOCK, round(job.decode_cost.last)))
            fetched = max(fetched, 2 * heads * stored.size(taken_in, layer.head_dim, e))
    return round(kv), round(spare), round(fetched)


def elsewhere(job: Job) -> int:
    """Bytes of keys and values in a lower tier than the device."""
    if job.storage.tier == DEVICE:
        return 0
    total = 0.0
    for (layer, rows), count in _stores(job, PREFILL).items():
        if layer.window is None:
            heads = count * job.batch * job.model.geometry(layer, job.tensor).num_kv_heads
            total += heads * job.storage.room(rows, layer.head_dim, job.model.element_size)
    return round(total)


def _stores(job: Job, phase: str) -> Counter[tuple[LayerShape, float]]:
    """The layers, by their shape and by the positions whose keys and values the fullest rank keeps after a
    call of ``phase`` that ends the prompt: the mean over the KV heads."""
    stores: Counter[tuple[LayerShape, float]] = Counter()
    for index, layer in enumerate(job.model.layers):
        rows: float = stored_rows(job.length, job.ranks, layer.window, job.model.in_order)
        if layer.window is None and job.ranks == 1:
            rows = keys_kept(*job.methods(index), phase, job.length)
        stores[layer, rows] += 1
    return stores


def _summaries(job: Job) -> int:
    """Bytes of the summaries that the methods declare. Those that follow from a recipe are not known."""
    total = 0
    for index, layer in enumerate(job.model.layers):
        if layer.window is not None:
            continue
        methods = [method for method in job.methods(index) if not method.needs.weights]
        declared = {summary.key: summary for method in methods for summary in method.summaries}
        heads = job.batch * job.model.geometry(layer, job.tensor).num_kv_heads
        total += heads * sum(
            count_entries(s, job.length) * entry_bytes(s, layer.head_dim, job.model.element_size)
            for s in declared.values()
        )
    return total


def choices(job: Job) -> list[Choice]:
    """The mechanism of each call of the prefill, in a layer without a window."""
    found, transient = memory(job)
    own = max(transient["attention"], transient["mlp"])
    left = max(0, job.memory - sum(found.values()) + found["transient"] - own)
    return [
        _choose(job, job.model.geometry(_widest(job), job.tensor), new, past, left) for new, past in job.calls
    ]


def _widest(job: Job) -> LayerShape:
    """The layer whose attention needs most memory."""
    return max(job.model.layers, key=lambda layer: (layer.window is None, layer.num_heads * layer.head_dim))


def _fetched(job: Job, geometry: Geometry) -> int:
    """Bytes held where keys are fetched: memory for all keys, and a byte for each key that a rank may
    want."""
    return job.batch * job.length * (geometry.kv + job.ranks * geometry.num_kv_heads)


def _choose(job: Job, geometry: Geometry, new: int, past: int, left: int) -> Choice:
    """The mechanism of one call. left: bytes for what a mechanism holds; 0 or less: there is no limit, since
    nothing would fit."""
    choice = choose(geometry, job.prefill_call(new, past), left if left > 0 else None)
    if selective(job) and job.mechanism != "ulysses" and job.ranks > 1:
        reason = f"{job.prefill} selects in prefill, and only keys that a rank has selected are moved to it."
        volume = _bits(job, geometry, new, past) + choice.volumes["gather"]
        more = {**choice.volumes, "fetch": volume}, {**choice.held, "fetch": _fetched(job, geometry)}
        return Choice("fetch", reason, *more, choice.refused)
    first = job.mechanism == "pass_q" and past == 0 and job.num_calls > 1  # there are no stored keys yet
    if job.mechanism in ("auto", choice.mechanism) or job.ranks == 1 or first:
        return choice
    if job.mechanism in choice.refused:
        raise FarspanError(
            f"--mechanism {job.mechanism} cannot be used: {choice.refused[job.mechanism]}; give another one, "
            "or auto."
        )
    reason = f"{job.mechanism} was asked for; auto would choose: {choice.reason}"
    return Choice(job.mechanism, reason, choice.volumes, choice.held, choice.refused)


# --- bytes sent and read ------------------------------------------------------------------------


def _layers(job: Job) -> Mapping[LayerShape, int]:
    return Counter(job.model.layers)


def _reach(layer: LayerShape, job: Job) -> int | None:
    """The most keys that a query of the prefill reads, counted back from its own position, by the model's
    window or by the method's declaration (with sinks); None: no limit."""
    window = job.prefill_cost.reach if layer.window is None else layer.window
    return window if window is not None and window < job.length else None


def selective(job: Job) -> bool:
    """Whether the method of the prefill leaves keys out."""
    return job.prefill_cost.density < 1


def _bits(job: Job, geometry: Geometry, new: int, past: int) -> int:
    """Bytes that tell the other ranks which keys this rank wants."""
    return (job.ranks - 1) * job.batch * geometry.num_kv_heads * -(-(past + new) // 8)


def _layer_sent(job: Job, layer: LayerShape, mechanism: str, new: int, past: int) -> int | None:
    """The most bytes that a rank sends for one layer of one call; None where the mechanism is impossible."""
    geometry, call = job.model.geometry(layer, job.tensor), job.prefill_call(new, past)
    if window := _reach(layer, job):
        return window_volume(geometry, call, window)
    found = volumes(geometry, call)
    if mechanism == "fetch":
        return found["gather"] + _bits(job, geometry, new, past)
    if mechanism == "pass_q" and past == 0:
        return found["gather"]
    return found.get(mechanism)


def prefill_sent(job: Job, mechanisms: list[str]) -> int | None:
    """The same over the whole prefill, with a mechanism for each call."""
    total = 0
    for layer, count in _layers(job).items():
        for mechanism, (new, past) in zip(mechanisms, job.calls, strict=True):
            one = _layer_sent(job, layer, mechanism, new, past)
            if one is None:
                return None
            total += count * one
    return total


def least_sent(job: Job, travelled: int) -> int:
    """The part of the ``travelled`` bytes of the prefill that is sent if all queries select the same keys.
    Keys of a window are all sent."""
    reach = job.prefill_cost.reach
    if reach is not None and reach < job.length:
        return travelled
    return round(travelled * job.prefill_cost.last / job.length)


def decode_sent(job: Job) -> int:
    """Bytes that a rank sends for one token: the partials of every layer, and 8 bytes for each candidate of a
    method that ranks single keys."""
    stored = stored_rows(job.length, job.ranks, None, job.model.in_order)
    candidates = 8 * min(stored, job.decode_cost.candidates)
    total = 0.0
    for index, layer in enumerate(job.model.layers):
        geometry = job.model.geometry(layer, job.tensor)
        total += decode_volume(geometry, job.ranks, batch=job.batch)
        if index >= job.decode.dense_layers and layer.window is None:
            total += (job.ranks - 1) * job.batch * geometry.num_kv_heads * candidates
    return round(total)


def decode_reads(job: Job) -> tuple[int, int]:
    """-> (bytes of K and V that a rank reads for one token, bytes that it reads to select)."""
    method = job.decode_cost
    rows = {
        layer: stored_rows(job.length, job.ranks, layer.window, job.model.in_order) for layer in _layers(job)
    }
    kv, selection = 0.0, 0.0
    for index, layer in enumerate(job.model.layers):
        geometry = job.model.geometry(layer, job.tensor)
        size = job.batch * rows[layer] * geometry.kv
        if layer.window is not None:
            kv += size
            continue
        held = job.storage.size(rows[layer], layer.head_dim, job.model.element_size)
        stored = job.batch * geometry.num_kv_heads * held
        if index < job.decode.dense_layers:
            kv += stored
        else:
            kv, selection = kv + stored * method.density, selection + size * method.selection
    return round(kv), round(selection)


# --- time ----------------------------------------------------------------------------------------


def work(job: Job, layer: LayerShape) -> Work:
    """One layer with the heads of one device, for the simulation."""
    window, density = _reach(layer, job), job.prefill_cost.density
    if layer.window is not None:
        density = 1.0
    elif window is not None:  # a part of the keys within reach, not of all keys
        density = job.prefill_cost.keys / (window - window * (window - 1) / (2 * job.length))
    return Work(
        geometry=job.model.geometry(layer, job.tensor),
        parameters=job.model.layer_parameters // len(job.model.layers) // job.tensor,
        window=window,
        density=density,
    )


def sequence_device(job: Job) -> Device:
    """The device with the number of ranks of the sequence on one node: one for each group of ``tensor``
    devices."""
    return replace(job.device, per_node=job.local_ranks)


def prefill_seconds(job: Job, taken: list[Choice]) -> float:
    """Seconds of all layers and calls, and of the head for the last position. Of many calls some are
    simulated and the others interpolated."""
    last = job.num_calls - 1
    every = sorted({round(i * last / _SAMPLES) for i in range(_SAMPLES + 1)})
    device = sequence_device(job)
    times = []
    for i in every:
        new, past = job.call(i)
        total = 0.0
        for layer, count in _layers(job).items():
            shape = work(job, layer)
            name = taken[i].mechanism
            if name == "fetch" or shape.window:  # a selection counts as if all keys were selected
                name = "fetch" if shape.window and job.ranks > 1 else "gather"
            trace = simulate(name, shape, device, job.prefill_call(new, past))
            total += count * (trace.seconds + _tensor_seconds(job, new))
        times.append(total)
    seconds = times[0]
    for (i, a), (j, b) in pairwise(zip(every, times, strict=True)):
        seconds += sum(a + (b - a) * (n - i) / (j - i) for n in range(i + 1, j + 1))
    return seconds + _head_seconds(job)


def _tensor_seconds(job: Job, new: int) -> float:
    """Two all-reduces of a layer's activations inside a group of tensor parallelism."""
    if job.tensor == 1:
        return 0.0
    tokens = job.batch * padded(new, job.ranks, in_order=job.model.in_order) // job.ranks
    size = tokens * job.model.hidden * job.model.element_size
    inside = job.tensor <= job.device.per_node
    link = job.device.link_bandwidth if inside else job.device.node_bandwidth
    latency = job.device.latency if inside else job.device.node_latency
    steps = 2 * (job.tensor - 1)
    return 2 * (job.device.launch + steps * (latency + size / job.tensor / link))


def _head_seconds(job: Job) -> float:
    weights = job.model.vocab * job.model.hidden * job.model.element_size / job.tensor
    return job.device.launch + weights / job.device.bandwidth


def _seconds_of_keys(job: Job, kv: int) -> float:
    """Seconds to read ``kv`` bytes of keys and values: from the device's memory, and before that from the
    tier that has them to that memory."""
    device, tier = job.device, job.storage.tier
    below = {DEVICE: None, HOST: device.host_bandwidth, DISK: device.disk_bandwidth}[tier]
    return kv / device.bandwidth + (0.0 if below is None else kv / below)


def decode_seconds(job: Job, kv: int, selection: int) -> float:
    """Seconds of one token: weights, keys and what is read to select are read at the speed of the memory that
    has them, with one collective a layer. A lower bound: of starting kernels only one for each layer is
    counted. Keys and values of a lower tier are fetched while nothing else runs."""
    device, layers = sequence_device(job), len(job.model.layers)
    bytes_per_parameter = job.weights / job.model.parameters
    weights = job.model.layer_parameters * bytes_per_parameter / job.tensor
    hops = [n % device.per_node == 0 for n in range(1, job.ranks)]
    latency = sum(device.node_latency if far else device.latency for far in hops)
    slowest = device.node_bandwidth if job.ranks > device.per_node else device.link_bandwidth
    collectives = 0.0 if job.ranks == 1 else layers * (device.launch + latency) + decode_sent(job) / slowest
    return (
        (weights + selection) / device.bandwidth
        + _seconds_of_keys(job, kv)
        + layers * (device.launch + _tensor_seconds(job, job.ranks))
        + collectives
        + _head_seconds(job)
    )
