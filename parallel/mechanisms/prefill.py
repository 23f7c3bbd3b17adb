"""Prefill of a call whose tokens are divided among ranks.

Dense attention runs by the mechanism that sends least. For a selective method only the selected keys move
(selected.py).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

from ...attention.attend import PREFILL_TILE, Reads, attend, count_reads, run_prefill
from ...attention.causal import causal_pairs
from ...attention.dense import Dense
from ...attention.keys import Keys
from ...attention.kv import KV
from ...attention.method import PREFILL, AttentionMethod
from ...attention.partial import Partial
from ...attention.selection import EveryKey
from ...attention.sources import IN_NO_CACHE
from ...attention.summary import Summaries
from ..group.mesh import Mesh
from .call import LocalCall, Travel
from .gather import gather_all
from .layout import Layout, Split, contiguous, usp_split, zigzag
from .pass_q import pass_q
from .ring import ring
from .selected import Result, selected
from .ulysses import ulysses
from .usp import usp
from .volume import Choice, PrefillCall, choose, refusals

_DENSE = Dense()


def make_split(
    mesh: Mesh,
    past: int,
    total: int,
    block_multiple: int,
    held: Layout | None = None,
    in_order: bool = False,
) -> Split:
    """How the tokens past .. total - 1 are divided among the ranks of ``mesh``. held: the layout of the
    tokens that the ranks hold already. in_order: one chunk a rank in the order of the ranks, because a layer
    passes a state along the sequence; otherwise a zigzag, which balances causal attention."""
    if in_order:
        return contiguous(past, total, mesh.ranks.size, block_multiple)
    if mesh.ulysses is not None and mesh.ring is not None:
        return usp_split(past, total, mesh.ulysses.size, mesh.ring.size, block_multiple)
    return zigzag(past, total, mesh.ranks.size, block_multiple, held)


def prefill(
    method: AttentionMethod, local: LocalCall, shared: Summaries, window: int | None
) -> tuple[Partial, Reads, Travel]:
    """Attention of this rank's queries over the keys of all ranks.

    shared: the entries, for all keys, of the summaries that ``method`` declares. window: the model's own
    sliding window, which then takes the method's place; None: there is none. The Reads count what this rank's
    queries read.
    """
    choice = _auto_choice(local)
    if window is None and (PREFILL not in method.phases or not method.selective):
        part, reads, travel = _dense(local, choice)
    elif window is None and local.mesh.config.mechanism == "ulysses" and not _splits_groups(method, local):
        part, reads = _over_heads(method, local)
        travel = Travel("ulysses", "asked for")
    else:
        part, reads = selected(method, local, shared, window)
        travel = Travel("fetch", "only keys that a query of the rank has selected are moved")
        if method.needs.keys and window is None:
            travel = Travel("gather", f"{method.name} reads every key to select")
        if window is None and local.mesh.config.mechanism == "ulysses":
            travel.why += f"; ulysses was asked for, but {_splits_groups(method, local)}"
    travel.dense_bytes = min(choice.volumes.values())
    return part, reads, travel


_cached_choice = lru_cache(maxsize=256)(choose)


def _auto_choice(local: LocalCall) -> Choice:
    """The mechanism that "auto" chooses for dense attention."""
    past, mesh = local.past.layout, local.mesh
    call = PrefillCall(
        mesh.ranks.size,
        local.call.total - local.call.past,
        local.call.past,
        past_rows=max(past.count(rank) for rank in range(past.size)),
        ulysses=mesh.ulysses.size if mesh.ulysses is not None else None,
        batch=local.q.shape[0],
        in_order=len(local.split.chunks[0]) == 1,
    )
    return _cached_choice(local.geometry, call, local.call.memory)


def _dense(local: LocalCall, choice: Choice) -> tuple[Partial, Reads, Travel]:
    q, k, v, split, call, mesh = local.q, local.k, local.v, local.split, local.call, local.mesh
    travel = _mechanism(local, choice)
    if travel.mechanism == "ulysses":
        return *_over_heads(_DENSE, local), travel
    past = local.past
    past_k, past_v = past.kv.dense()
    if travel.mechanism == "gather":
        keys, values = gather_all(k, v, past_k, past_v, past.layout, split, mesh.ranks)
        result = Result(q, v.shape[3])
        result.keep_in_graph(keys, values)
        for slot, (a, b) in split.slots(local.rank):
            visible = Keys(
                kv=KV(keys[:, :, :b], values[:, :, :b]),
                tq=b - a,
                softmax=local.softmax,
                start=call.start,
                starts=call.starts,
                evicted=call.evicted,
            )
            result.write(slice(None), slot, run_prefill(_DENSE, q[:, :, slot], visible, EveryKey()))
        return result.part, result.reads, travel
    how: dict[str, Any] = {"softmax": local.softmax, "starts": call.starts}
    how |= {"past": past.layout, "past_k": past_k, "past_v": past_v}
    if travel.mechanism == "usp":
        assert mesh.ulysses is not None and mesh.ring is not None
        backend = mesh.config.backend
        out, lse = usp(q, k, v, split, mesh.ulysses, mesh.ring, with_lse=True, backend=backend, **how)
        assert lse is not None
        part = Partial(out, lse)
    else:
        part = {"ring": ring, "pass_q": pass_q}[travel.mechanism](q, k, v, split, mesh.ranks, **how)
    b, h = q.shape[:2]
    chunks = [chunk for _, chunk in split.slots(local.rank)]
    pairs = sum(causal_pairs(e - a, e, call.starts, b) for a, e in chunks) * h
    causal = pairs + sum(call.evicted or ()) * sum(e - a for a, e in chunks) * h
    return part, count_reads(q, KV(k, v), pairs, causal, PREFILL_TILE * (h // k.shape[1])), travel


def _mechanism(local: LocalCall, choice: Choice) -> Travel:
    """The mechanism of the configuration where it can serve these heads; otherwise gather. For "auto", the
    one of ``choice``."""
    mesh, wanted = local.mesh, local.mesh.config.mechanism
    if wanted == "auto":
        return Travel(choice.mechanism, choice.reason)
    u = mesh.ulysses.size if mesh.ulysses is not None else None
    refused = refusals(local.geometry, mesh.ranks.size, local.call.past, u)
    if wanted not in refused:
        return Travel(wanted, "asked for")
    return Travel("gather", f"{wanted} was asked for, but {refused[wanted]}")


def _splits_groups(method: AttentionMethod, local: LocalCall) -> str | None:
    """Why ``method`` would select something else on a part of the heads than on all of them; None: it would
    not."""
    geometry, size = local.geometry, local.mesh.ranks.size
    if geometry.num_kv_heads % size:
        kv_heads = geometry.num_kv_heads
        return f"{size} ranks do not divide {kv_heads} KV heads, whose query heads select together"
    if method.couples_heads or method.needs.recipe or method.needs.inputs or method.module is not None:
        return f"{method.name} needs all heads of the layer"
    if any(summary.reads & IN_NO_CACHE for summary in method.summaries):
        return f"{method.name} selects by queries of earlier calls"
    return None


def _over_heads(method: AttentionMethod, local: LocalCall) -> tuple[Partial, Reads]:
    """Ulysses: ``method`` runs as on one device, on this rank's heads."""
    call, past = local.call, local.past
    past_k, past_v = past.kv.dense()
    counted: list[Reads] = []

    def run(q: Tensor, k: Tensor, v: Tensor) -> Partial:
        visible = Keys(
            kv=KV(k, v),
            tq=q.shape[2],
            start=call.start,
            starts=call.starts,
            evicted=call.evicted,
            softmax=local.softmax,
        )
        part, reads = attend(method, PREFILL, q, visible)
        counted.append(reads)
        return part

    out, lse = ulysses(
        local.q,
        local.k,
        local.v,
        local.split,
        local.mesh.ranks,
        run,
        past=past.layout,
        past_k=past_k,
        past_v=past_v,
        with_lse=True,
        backend=local.mesh.config.backend,
    )
    assert lse is not None
    return Partial(out, lse), counted[0]
