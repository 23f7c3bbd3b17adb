"""Memory, traffic and time of a prompt on the devices of a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

from ...attention.errors import FarspanError
from ..mechanisms.layout import zigzag
from ..mechanisms.volume import Choice, Geometry, choose, decode_volume, padded, volumes, window_volume
from .device import Device
from .job import Job, LayerShape
from .simulate import Work, simulate

RESERVED = 0.05  # of a device's memory, for the runtime's own context, workspaces and fragmentation
_SAMPLES = 16  # chunks of a chunked prefill that are replayed; the others lie between two of them

# --- memory --------------------------------------------------------------------------------------


@lru_cache(1024)
def stored_rows(length: int, ranks: int, window: int | None = None) -> int:
    """Positions that the fullest rank keeps of a prompt's ``length``, or of its last ``window``."""
    layout = zigzag(0, length, ranks).layout().cut(max(0, length - (window or length)), length)
    return max(layout.count(rank) for rank in range(ranks))


def memory(job: Job) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by purpose, and what is alive at the peak of a layer."""
    model, e = job.model, job.model.element_size
    kv, spare = 0, 0
    for layer, count in _layers(job).items():
        rows = stored_rows(job.length, job.ranks, layer.window)
        size = count * job.batch * model.geometry(layer, job.tensor).kv
        kv, spare = kv + rows * size, spare + max(256, rows // 8) * size  # as KVStore grows
    found = {
        "weights": -(-job.weights // job.tensor),
        "kv_cache": kv,
        "room_to_grow": spare,
        "transient": 0,
        "logits": job.batch * model.vocab * (e + 4),  # of the last position, and in float32
        "reserved": int(RESERVED * job.memory),
    }
    geometry = model.geometry(_widest(job), job.tensor)
    tokens = job.batch * padded(job.call(0)[0], job.ranks) // job.ranks
    wide = 4 * geometry.num_heads * (geometry.head_dim + 1)  # the partial that is merged into, in float32
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
    return found, {"attention": attention, "brought_together": held, "mlp": mlp}


def choices(job: Job) -> list[Choice]:
    """What each call of the prefill takes in a layer that sees everything."""
    found, transient = memory(job)
    own = max(transient["attention"], transient["mlp"])
    left = max(0, job.memory - sum(found.values()) + found["transient"] - own)
    return [
        _choose(job, job.model.geometry(_widest(job), job.tensor), new, past, left) for new, past in job.calls
    ]


def _widest(job: Job) -> LayerShape:
    """The layer whose attention needs most."""
    return max(job.model.layers, key=lambda layer: (layer.window is None, layer.num_heads * layer.head_dim))


def _fetched(job: Job, geometry: Geometry) -> int:
    """Bytes held where keys are fetched: room for all of them, and what each rank asked for, a byte a key."""
    return job.batch * job.length * (geometry.kv + job.ranks * geometry.num_kv_heads)


def _choose(job: Job, geometry: Geometry, new: int, past: int, left: int) -> Choice:
    """``left``: bytes for what is brought together; where nothing is left at all, no limit is looked at."""
    memory = left if left > 0 else None
    choice = choose(
        geometry, job.ranks, new, past, local_ranks=job.local_ranks, memory=memory, batch=job.batch
    )
    if selective(job) and job.mechanism != "ulysses" and job.ranks > 1:
        reason = (
            f"{job.prefill} selects in prefill, and only keys that some query of a rank selected are moved."
        )
        volume = _bits(job, geometry, new, past) + choice.volumes["gather"]
        more = {**choice.volumes, "fetch": volume}, {**choice.held, "fetch": _fetched(job, geometry)}
        return Choice("fetch", reason, *more, choice.refused)
    first = job.mechanism == "pass_q" and past == 0 and job.num_calls > 1  # there is nothing to pass by yet
    if job.mechanism in ("auto", choice.mechanism) or job.ranks == 1 or first:
        return choice
    if job.mechanism in choice.refused:
        raise FarspanError(f"{job.mechanism} cannot be used: {choice.refused[job.mechanism]}.")
    reason = f"{job.mechanism} was asked for; auto would say: {choice.reason}"
    return Choice(job.mechanism, reason, choice.volumes, choice.held, choice.refused)


# --- what travels --------------------------------------------------------------------------------


def _layers(job: Job) -> Mapping[LayerShape, int]:
    return Counter(job.model.layers)


def _reach(layer: LayerShape, job: Job) -> int | None:
    """Keys that a query of the prefill reads at most from its own back, by the model's window or the
    method's declaration, sinks counted in; None: any."""
    window = job.prefill_cost.reach if layer.window is None else layer.window
    return window if window is not None and window < job.length else None


def selective(job: Job) -> bool:
    """Whether the prefill's method leaves keys out."""
    return job.prefill_cost.density < 1


def _bits(job: Job, geometry: Geometry, new: int, past: int) -> int:
    """Bytes that tell the other ranks which keys are wanted."""
    return (job.ranks - 1) * job.batch * geometry.num_kv_heads * -(-(past + new) // 8)


def _layer_sent(job: Job, layer: LayerShape, mechanism: str, new: int, past: int) -> int | None:
    """Bytes that a rank sends for one layer of one call, at most; None where the mechanism is not
    possible."""
    geometry = job.model.geometry(layer, job.tensor)
    if window := _reach(layer, job):
        return window_volume(geometry, job.ranks, new, window, past, batch=job.batch)
    u = job.local_ranks if 1 < job.local_ranks < job.ranks else None
    found = volumes(geometry, job.ranks, new, past, ulysses=u, batch=job.batch)
    if mechanism == "fetch":
        return found["gather"] + _bits(job, geometry, new, past)
    if mechanism == "pass_q" and past == 0:
        return found["gather"]
    return found.get(mechanism)


def prefill_sent(job: Job, mechanisms: list[str]) -> int | None:
    """Over the whole prefill, a mechanism for each call; None where one is not possible."""
    total = 0
    for layer, count in _layers(job).items():
        for mechanism, (new, past) in zip(mechanisms, job.calls, strict=True):
            one = _layer_sent(job, layer, mechanism, new, past)
            if one is None:
                return None
            total += count * one
    return total


def least_sent(job: Job, travelled: int) -> int:
    """Of ``travelled`` bytes of the prefill those that are sent where every query selects the same keys. Of
    the keys in a window all travel."""
    reach = job.prefill_cost.reach
    if reach is not None and reach < job.length:
        return travelled
    return round(travelled * job.prefill_cost.last / job.length)


def decode_sent(job: Job) -> int:
    """Partials of every layer, and for a method that ranks single keys each rank's candidates for the cut, 8
    bytes each."""
    stored = stored_rows(job.length, job.ranks)
    candidates = 8 * min(stored, job.decode_cost.candidates)
    total = 0.0
    for index, layer in enumerate(job.model.layers):
        geometry = job.model.geometry(layer, job.tensor)
        total += decode_volume(geometry, job.ranks, batch=job.batch)
        if index >= job.decode.dense_layers and layer.window is None:
            total += (job.ranks - 1) * job.batch * geometry.num_kv_heads * candidates
    return round(total)


def decode_reads(job: Job) -> tuple[int, int]:
    """Bytes of K and V that a rank reads for one token, and bytes that it reads to decide."""
    method = job.decode_cost
    rows = {layer: stored_rows(job.length, job.ranks, layer.window) for layer in _layers(job)}
    kv, selection = 0.0, 0.0
    for index, layer in enumerate(job.model.layers):
        size = job.batch * rows[layer] * job.model.geometry(layer, job.tensor).kv
        if layer.window is not None or index < job.decode.dense_layers:
            kv += size
        else:
            kv, selection = kv + size * method.density, selection + size * method.selection
    return round(kv), round(selection)


# --- time ----------------------------------------------------------------------------------------


def work(job: Job, layer: LayerShape) -> Work:
    """One layer of a rank's share of the heads, for the replay."""
    window, density = _reach(layer, job), job.prefill_cost.density
    if layer.window is not None:
        density = 1.0
    elif window is not None:  # of the keys within reach, not of all
        density = job.prefill_cost.keys / (window - window * (window - 1) / (2 * job.length))
    return Work(
        geometry=job.model.geometry(layer, job.tensor),
        parameters=job.model.layer_parameters // len(job.model.layers) // job.tensor,
        window=window,
        density=density,
    )


def sequence_device(job: Job) -> Device:
    """The device as one of the sequence's ranks: a node holds as many of them as groups of ``tensor`` fit."""
    return replace(job.device, per_node=job.local_ranks)


def prefill_seconds(job: Job, taken: list[Choice]) -> float:
    """All layers and calls, and the head for the last position; of many calls some are replayed, and those
    between lie on straight lines."""
    last = job.num_calls - 1
    every = sorted({round(i * last / _SAMPLES) for i in range(_SAMPLES + 1)})
    device = sequence_device(job)
    local = job.local_ranks if 1 < job.local_ranks < job.ranks else None
    times = []
    for i in every:
        new, past = job.call(i)
        total = 0.0
        for layer, count in _layers(job).items():
            shape = work(job, layer)
            name = taken[i].mechanism
            if name == "fetch" or shape.window:  # of a selection, as if everything had been selected
                name = "fetch" if shape.window and job.ranks > 1 else "gather"
            u = local if name == "usp" else None
            trace = simulate(name, shape, device, job.ranks, new, past, ulysses=u, batch=job.batch)
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
    size = job.batch * padded(new, job.ranks) // job.ranks * job.model.hidden * job.model.element_size
    inside = job.tensor <= job.device.per_node
    link = job.device.link_bandwidth if inside else job.device.node_bandwidth
    latency = job.device.latency if inside else job.device.node_latency
    steps = 2 * (job.tensor - 1)
    return 2 * (job.device.launch + steps * (latency + size / job.tensor / link))


def _head_seconds(job: Job) -> float:
    weights = job.model.vocab * job.model.hidden * job.model.element_size / job.tensor
    return job.device.launch + weights / job.device.bandwidth


def decode_seconds(job: Job, read: int) -> float:
    """Weights and keys at the memory's speed, one collective for each layer. A lower bound: what it takes to
    start the kernels, beyond one for each layer, is not in it."""
    device, layers = sequence_device(job), len(job.model.layers)
    bytes_per_parameter = job.weights / job.model.parameters
    weights = job.model.layer_parameters * bytes_per_parameter / job.tensor
    hops = [n % device.per_node == 0 for n in range(1, job.ranks)]
    latency = sum(device.node_latency if far else device.latency for far in hops)
    slowest = device.node_bandwidth if job.ranks > device.per_node else device.link_bandwidth
    meeting = 0.0 if job.ranks == 1 else layers * (device.launch + latency) + decode_sent(job) / slowest
    return (
        (weights + read) / device.bandwidth
        + layers * (device.launch + _tensor_seconds(job, job.ranks))
        + meeting
        + _head_seconds(job)
    )
