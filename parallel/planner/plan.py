"""Plans a long prompt on a number of devices: memory of a device, bytes sent, seconds, and what does not fit.

It computes with the numbers of a model's config. docs/PLAN.md states the assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ...attention.errors import FarspanError
from ...attention.method import DECODE, PREFILL
from ..mechanisms.volume import MECHANISMS, Choice, readable
from .cost import (
    cache,
    choices,
    decode_reads,
    decode_seconds,
    decode_sent,
    least_sent,
    memory,
    prefill_seconds,
    prefill_sent,
)
from .job import Job

_MOST_CALLS = 1 << 14  # of the prefill


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The result of :func:`plan`.

    choice: the mechanism of the last call. mechanisms: those of all calls. memory: bytes of one device by
    purpose. transient: bytes in use at the peak of a layer, by part. sent: bytes that a rank sends over the
    whole prefill, by mechanism. sent_prefill: by the chosen mechanisms; sent_least: if all queries select the
    same keys. sent_decode: per token. read: bytes of K and V that a rank reads per token; selection_read:
    those that it reads to select. kept: bytes of keys and values on a device once the first token is there.
    longest: the longest prompt that fits, in tokens; 0: none. notes: what does not fit and what would help, a
    sentence each.
    """

    job: Job
    choice: Choice
    mechanisms: list[str]
    memory: dict[str, int]
    transient: dict[str, int]
    sent: dict[str, int]
    sent_prefill: int
    sent_least: int
    sent_decode: int
    read: int
    selection_read: int
    kept: int
    prefill_seconds: float
    decode_seconds: float
    longest: int
    notes: list[str] = field(default_factory=list)

    @property
    def needed(self) -> int:
        """Bytes of one device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a device has enough memory."""
        return self.needed <= self.job.memory

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for JSON."""
        job = self.job
        return {
            "model": job.model.name,
            "length": job.length,
            "positions": job.model.positions,
            "gpus": job.gpus,
            "ranks": job.ranks,
            "tensor_parallel": job.tensor,
            "batch": job.batch,
            "prefill_chunk": job.chunk,
            "method": {PREFILL: str(job.prefill), DECODE: str(job.decode)},
            "device": {"name": job.device.name, "memory": job.memory},
            "fits": self.fits,
            "longest_that_fits": self.longest,
            "memory": {**self.memory, "needed": self.needed},
            "transient": self.transient,
            "mechanism": self.choice.mechanism,
            "mechanisms": self.mechanisms,
            "reason": self.choice.reason,
            "refused": dict(self.choice.refused),
            "bytes_sent_per_rank": {
                "prefill": self.sent_prefill,
                "prefill_at_least": self.sent_least,
                "prefill_by_mechanism": self.sent,
                "decode_per_token": self.sent_decode,
            },
            "kv_cache_after_first_token": self.kept,
            "bytes_read_per_token": {"kv": self.read, "selection": self.selection_read},
            "seconds": {"prefill": self.prefill_seconds, "decode_per_token": self.decode_seconds},
            "notes": self.notes,
        }


def plan(job: Job) -> Plan:
    """Plan a run. Raises FarspanError where the job's mechanism cannot serve the model, or where there are
    too many chunks to count them one by one."""
    if job.num_calls > _MOST_CALLS:
        raise FarspanError(
            f"{job.length} tokens in chunks of {job.chunk} are {job.num_calls} chunks, and a plan takes "
            f"up to {_MOST_CALLS} chunks; give a --prefill-chunk of {-(-job.length // _MOST_CALLS)} or more."
        )
    parts, transient = memory(job)
    taken = choices(job)
    names = [name for name in MECHANISMS if name != "pass_q" or job.num_calls > 1]
    sent = {name: total for name in names if (total := prefill_sent(job, [name] * job.num_calls)) is not None}
    travelled = prefill_sent(job, [choice.mechanism for choice in taken])
    assert travelled is not None
    kv, selection = decode_reads(job)
    result = Plan(
        job=job,
        choice=taken[-1],
        mechanisms=sorted({choice.mechanism for choice in taken}),
        memory=parts,
        transient=transient,
        sent=sent,
        sent_prefill=travelled,
        sent_least=least_sent(job, travelled),
        sent_decode=decode_sent(job),
        read=kv,
        selection_read=selection,
        kept=cache(job, DECODE)[0],
        prefill_seconds=prefill_seconds(job, taken),
        decode_seconds=decode_seconds(job, kv, selection),
        longest=_longest(job),
    )
    result.notes.extend(_notes(result))
    return result


def fits(job: Job) -> bool:
    """Whether a device has enough memory for the job."""
    parts, _ = memory(job)
    return sum(parts.values()) <= job.memory


def _longest(job: Job) -> int:
    """The longest prompt that fits, a multiple of 1,024 tokens; beyond 64 such blocks within 1/64."""

    def holds(blocks: int) -> bool:
        return fits(replace(job, length=1024 * blocks))

    if not holds(1):
        return 0
    high = 2
    while holds(high):
        high *= 2
    low = high // 2
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return 1024 * low


def _notes(result: Plan) -> list[str]:
    job, parts = result.job, result.memory
    notes = _beyond_positions(job) + _mixers(job) + _in_order(job) + _evicting(result)
    if not result.fits:
        notes.append(
            f"It does not fit: a device needs {readable(result.needed)} and has {readable(job.memory)}."
        )
        room = job.memory - parts["reserved"]
        if parts["weights"] > room:
            notes.append(
                f"The weights alone, {readable(parts['weights'])} on each device, are more than the "
                f"{readable(room)} that can be used; {_more_tensor(job, room)}."
            )
        else:
            notes.extend(_remedies(result))
    phases = ((job.prefill, PREFILL), (job.decode, DECODE))
    for method, phase in phases:
        cost = job.prefill_cost if phase == PREFILL else job.decode_cost
        dense = f"{method} counts as dense in {phase}"
        if not cost.exact and cost.density < 1:
            notes.append(
                f"{method} counts as reading {100 * cost.density:.1f} % of the keys in {phase}, its upper "
                "bound: what it reads depends on the data."
            )
        elif not cost.exact:
            notes.append(f"{dense}: what it reads depends on the data.")
        elif method.selective and cost.density == 1:
            notes.append(f"{dense}: it reads every one of {job.length} tokens.")
    return notes


def _mixers(job: Job) -> list[str]:
    model = job.model
    if not model.mixers:
        return []
    kept = sum(model.geometry(layer).kv for layer in model.layers)
    even = "They save no memory"
    if (saved := model.mixer_kv - model.mixer_growth) > 0:
        tokens = -(-model.mixer_states // saved)
        even = f"Below {tokens} tokens their states take more memory than they save"
    return [
        f"Mixers replace attention in {model.mixers} of {model.mixers + len(model.layers)} layers, which "
        f"takes {readable(kept + model.mixer_growth)} a token instead of {readable(kept + model.mixer_kv)}. "
        f"{even}. Their recurrences are not in the seconds."
    ]


def _beyond_positions(job: Job) -> list[str]:
    model = job.model
    if model.positions is None or job.length <= model.positions:
        return []
    factor = -(-job.length // model.positions)
    stretched = factor if factor < 256 else job.length  # from 256 on, --rope takes a target length
    advice = (
        f"stretch them with --rope yarn:{stretched} where you run it"
        if model.stretchable
        else "they cannot be stretched, so use a model that has more"
    )
    return [
        f"{model.name} has {model.positions} positions, and {job.length} tokens are more: it "
        f"does not understand later tokens; {advice}."
    ]


def _evicting(result: Plan) -> list[str]:
    """What becomes of the cache where the method of the decode drops single keys."""
    job, notes = result.job, []
    if result.kept < result.memory["kv_cache"]:
        notes.append(f"At its first token {job.decode} drops all but {readable(result.kept)} of the cache.")
    if job.decode.evict and job.gpus == 1:
        notes.append(
            f"{job.decode} drops single keys, which no storage but 'device' can: the others need evict=false."
        )
    return notes


def _in_order(job: Job) -> list[str]:
    """The imbalance of attention where each rank has a contiguous shard."""
    if not job.model.in_order or job.ranks == 1:
        return []
    ranks = job.ranks
    last = sum(new * (past + new - new / (2 * ranks)) for new, past in job.calls)
    mean = sum(new * (past + new / 2) for new, past in job.calls)
    return [
        f"Layers with a recurrent state need the tokens in order, so each of the {ranks} ranks has a "
        f"contiguous shard, and in full attention the last one has {last / mean:.2f} times the mean work."
    ]


def _more_tensor(job: Job, room: int) -> str:
    for tensor in (2, 4, 8, 16, 32, 64):
        divides = all(x.num_heads % tensor == 0 == x.num_kv_heads % tensor for x in job.model.layers)
        if divides and tensor > job.tensor and job.weights / tensor < 0.8 * room:
            return f"divide them with --tensor-parallel {tensor}"
    return "no number of devices that divides the heads is enough: use smaller weights (--weights)"


def _remedies(result: Plan) -> list[str]:
    """Sentences: the longest chunk and the fewest devices with which it fits."""
    job, found = result.job, []
    chunks = [1 << n for n in range(17, 9, -1) if 1 << n < min(job.length, job.chunk or job.length)]
    if chunk := next((c for c in chunks if fits(replace(job, chunk=c))), None):
        found.append(f"It fits with --prefill-chunk {chunk}.")
    counts = [job.gpus * (1 << n) for n in range(1, 11)]
    if gpus := next((n for n in counts if n <= 4096 and fits(replace(job, gpus=n))), None):
        found.append(f"It fits on {gpus} GPUs.")
    if not found:
        parts = sorted(result.memory.items(), key=lambda item: -item[1])[:2]
        what = " and ".join(f"{readable(size)} of {name.replace('_', ' ')}" for name, size in parts)
        found.append(f"More devices do not help either. The largest parts are {what}.")
    if result.longest:
        found.append(f"Without changes, {result.longest} tokens fit.")
    return found
