"""Prefill whose tokens are shared out over ranks: dense by the mechanism that sends least, selective by
moving what was selected (selected.py)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

from ...attention.attend import PREFILL_TILE, Reads, attend, count_reads, run_prefill
from ...attention.dense import Dense
from ...attention.index import causal_pairs
from ...attention.keys import Keys
from ...attention.kv import KV
from ...attention.method import PREFILL, AttentionMethod
from ...attention.partial import Partial
from ...attention.summary import Summaries
from ..group.mesh import Mesh
from .call import Share, Travel
from .gather import gather_all
from .layout import Layout, Split, usp_split, zigzag
from .pass_q import pass_q
from .ring import ring
from .selected import Result, selected
from .ulysses import ulysses
from .usp import usp
from .volume import Choice, Geometry, choose, refusals

_DENSE = Dense()


def make_split(mesh: Mesh, past: int, total: int, block_multiple: int, held: Layout | None = None) -> Split:
    """How the tokens past .. total - 1 are shared out over the ranks of ``mesh``, which hold ``held``."""
    if mesh.ulysses is not None and mesh.ring is not None:
        return usp_split(past, total, mesh.ulysses.size, mesh.ring.size, block_multiple)
    return zigzag(past, total, mesh.ranks.size, block_multiple, held)


def prefill(
    method: AttentionMethod, share: Share, shared: Summaries, window: int | None
) -> tuple[Partial, Reads, Travel]:
    """Attention of this rank's queries over the keys of all ranks.

    shared: the entries of the summaries that ``method`` declares, of all keys. window: the model's own,
    instead of the method. Reads counts what this rank's queries read.
    """
    best = _best(share)
    if window is None and (PREFILL not in method.phases or not method.selective):
        part, reads, travel = _dense(share, best)
    elif window is None and share.mesh.config.mechanism == "ulysses" and not _splits_groups(method, share):
        part, reads = _over_heads(method, share)
        travel = Travel("ulysses", "asked for")
    else:
        part, reads = selected(method, share, shared, window)
        travel = Travel("fetch", "only keys that some query of the rank selected are moved")
        if method.reads_keys and window is None:
            travel = Travel("gather", f"{method.name} reads every key to select")
        if window is None and share.mesh.config.mechanism == "ulysses":
            travel.why += f"; ulysses was asked for, but {_splits_groups(method, share)}"
    travel.dense_bytes = best.volumes[min(best.volumes, key=best.volumes.__getitem__)]
    return part, reads, travel


def _best(share: Share) -> Choice:
    """What ``auto`` takes for dense attention."""
    past, mesh = share.past.layout, share.mesh
    return _chosen(
        share.geometry,
        mesh.ranks.size,
        share.call.total - share.call.past,
        share.call.past,
        max(past.count(rank) for rank in range(past.size)),
        mesh.ulysses.size if mesh.ulysses is not None else None,
        share.call.memory,
        share.q.shape[0],
    )


@lru_cache(maxsize=256)
def _chosen(
    geometry: Geometry,
    ranks: int,
    new: int,
    past: int,
    past_rows: int,
    ulysses: int | None,
    memory: int | None,
    batch: int,
) -> Choice:
    return choose(
        geometry, ranks, new, past, past_rows=past_rows, local_ranks=ulysses, memory=memory, batch=batch
    )


def _dense(share: Share, best: Choice) -> tuple[Partial, Reads, Travel]:
    q, k, v, split, call, mesh = share.q, share.k, share.v, share.split, share.call, share.mesh
    travel = _mechanism(share, best)
    if travel.mechanism == "ulysses":
        return *_over_heads(_DENSE, share), travel
    past = share.past
    past_k, past_v = past.kv.dense()
    if travel.mechanism == "gather":
        keys, values = gather_all(k, v, past_k, past_v, past.layout, split, mesh.ranks)
        result = Result(q, v.shape[3])
        result.hang_on(keys, values)
        for slot, (a, b) in split.slots(share.rank):
            seen = Keys(
                kv=KV(keys[:, :, :b], values[:, :, :b]),
                tq=b - a,
                start=call.start,
                starts=call.starts,
                softmax=share.softmax,
            )
            result.put(slice(None), slot, run_prefill(_DENSE, q[:, :, slot], seen, None))
        return result.part, result.reads, travel
    how: dict[str, Any] = {"starts": call.starts, "past": past.layout, "past_k": past_k, "past_v": past_v}
    how["softmax"] = share.softmax
    if travel.mechanism == "usp":
        assert mesh.ulysses is not None and mesh.ring is not None
        backend = mesh.config.backend
        out, lse = usp(q, k, v, split, mesh.ulysses, mesh.ring, with_lse=True, backend=backend, **how)
        assert lse is not None
        part = Partial(out, lse)
    else:
        part = {"ring": ring, "pass_q": pass_q}[travel.mechanism](q, k, v, split, mesh.ranks, **how)
    b, h = q.shape[:2]
    pairs = sum(causal_pairs(e - a, e, call.starts, b) for _, (a, e) in split.slots(share.rank)) * h
    return part, count_reads(q, KV(k, v), pairs, pairs, PREFILL_TILE * (h // k.shape[1])), travel


def _mechanism(share: Share, best: Choice) -> Travel:
    """The mechanism that was asked for, where it can serve these heads, else the one that ``auto`` takes."""
    mesh, asked = share.mesh, share.mesh.config.mechanism
    if asked == "auto":
        return Travel(best.mechanism, best.reason)
    u = mesh.ulysses.size if mesh.ulysses is not None else None
    refused = refusals(share.geometry, mesh.ranks.size, share.call.past, u)
    if asked not in refused:
        return Travel(asked, "asked for")
    return Travel("gather", f"{asked} was asked for, but {refused[asked]}")


def _splits_groups(method: AttentionMethod, share: Share) -> str | None:
    """Why ``method`` would not select on some of the heads what it selects on all of them."""
    geometry, size = share.geometry, share.mesh.ranks.size
    if geometry.num_kv_heads % size:
        return f"{size} ranks do not divide {geometry.num_kv_heads} KV heads, whose groups choose together"
    if method.couples_heads or method.needs_recipe:
        return f"{method.name} knows the layer's heads as a whole"
    return None


def _over_heads(method: AttentionMethod, share: Share) -> tuple[Partial, Reads]:
    """Ulysses: any method runs as on one device, on this rank's heads."""
    call, past = share.call, share.past
    past_k, past_v = past.kv.dense()
    counted: list[Reads] = []

    def run(q: Tensor, k: Tensor, v: Tensor) -> Partial:
        seen = Keys(kv=KV(k, v), tq=q.shape[2], start=call.start, starts=call.starts, softmax=share.softmax)
        part, reads = attend(method, PREFILL, q, seen)
        counted.append(reads)
        return part

    out, lse = ulysses(
        share.q,
        share.k,
        share.v,
        share.split,
        share.mesh.ranks,
        run,
        past=past.layout,
        past_k=past_k,
        past_v=past_v,
        with_lse=True,
        backend=share.mesh.config.backend,
    )
    assert lse is not None
    return Partial(out, lse), counted[0]
