"""A set of keys that each KV head of a row keeps between full steps.

State: tokens [B, Hkv, k], the set in order of rank; clock [B, Hkv] int64 on the host, steps since the last
full one, -1 for a row without a set; q [B, H, D], the query of the last full step; k, v [B, Hkv, k, D], the
set's rows side by side, where no peers hold keys.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from ..budget import topk_positions
from ..gqa import group_scores
from ..keys import Keys
from ..ops.scores import scores


def enter(keys: Keys, position: int, size: int, ages: list[list[int]]) -> None:
    """Put the new key at ``position`` into every set of ``size`` keys, in place of the lowest-ranked key that
    is left; once all are replaced, in place of the oldest newcomer. ages: the numbers of ``clock``."""
    state = keys.state
    slots = [[size - 1 - (max(age, 1) - 1) % size for age in row] for row in ages]
    sources = {}
    if keys.peers is None:
        new = keys.kv[:, :, position : position + 1]
        sources = {"k": new.k, "v": new.v}
    runs = _alike(slots)
    for rows, slot in runs or ():
        state["tokens"][rows, :, slot] = position
        for name, source in sources.items():
            state[name][rows, :, slot] = source[rows, :, 0]
    if runs is not None:
        return
    places = torch.tensor(slots, device=keys.kv.device)[..., None]  # [B, Hkv, 1]
    state["tokens"].scatter_(2, places, position)
    for name, source in sources.items():
        state[name].scatter_(2, places[..., None].expand_as(source), source)


def choose(q: Tensor, keys: Keys, length: int, size: int, gqa_reduce: str, pool: int) -> Tensor:
    """[B, Hkv, size]: the keys with the highest attention of the query q [B, H, 1, D] at position length - 1,
    combined over the heads of a group and max-pooled over ``pool`` positions, highest first."""
    here, peers = keys.held(length), keys.peers
    places = keys.places()[:here]
    parts = [scores(q, k, keys.softmax) for k in keys.read_key_blocks(length)]
    logits = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    valid = _begun(places, keys.start)
    ranked = group_scores(logits, valid, gqa_reduce, peers)[:, :, 0]
    if pool > 1 and peers is not None:  # the neighbours of a key may be on other ranks
        ranked, peers = peers.gather(ranked, length), None
        valid = _begun(torch.arange(length, device=q.device), keys.start)
    return topk_positions(pooled(ranked, pool, valid), size, peers)


def pooled(ranked: Tensor, pool: int, valid: Tensor | None) -> Tensor:
    """The highest of the scores ranked [..., N] among the ``pool`` positions around each key; -inf where
    ``valid`` is False."""
    if pool == 1:
        return ranked
    highest = max_pool1d(ranked.flatten(0, -2), pool, stride=1, padding=pool // 2).view(ranked.shape)
    return highest if valid is None else highest.masked_fill(~valid, -torch.inf)


def _begun(places: Tensor, start: Tensor | None) -> Tensor | None:
    """[B, 1, N] bool: which of the positions ``places`` [N] are in a row; None: all."""
    return None if start is None else (places >= start[:, None])[:, None]


def drifted(q: Tensor, keys: Keys, clock: Tensor, qc: int, s: float, scope: str) -> Tensor:
    """[B, Hkv] bool, on the host: where the query-similarity schedule makes the step a full one. Every ``qc``
    steps of ``clock`` [B, Hkv] the query q [B, H, 1, D] is compared with that of the last full step; the mean
    cosine over the heads of a layer (scope "layer") or of a KV head is below ``s``."""
    compared = (clock % qc == 0) & (clock > 0)
    if not bool(compared.any()):
        return compared
    cosine = torch.cosine_similarity(q[:, :, 0].float(), keys.state["q"].float(), dim=-1)  # [B, H]
    cosine = cosine.unflatten(1, (keys.kv.num_kv_heads, -1)).mean(-1).cpu()  # [B, Hkv]
    if scope == "layer":
        cosine = cosine.mean(1, keepdim=True).expand_as(cosine)
    return compared & (cosine < s)


def replace_sets(q: Tensor, keys: Keys, length: int, tokens: Tensor, which: Tensor) -> None:
    """Make ``tokens`` [B, Hkv, k], chosen by the query q [B, H, 1, D] at position length - 1, the sets of the
    (row, KV head) pairs in ``which`` [B, Hkv] (bool, on the host)."""
    fresh = {
        "tokens": tokens,
        "clock": torch.zeros_like(which, dtype=torch.long),
        "q": q[:, :, 0].clone(),
    }
    if keys.peers is None:
        rows = keys.kv.gather(tokens)
        fresh |= {"k": rows.k, "v": rows.v}
    if keys.starts is not None:
        # Rows with fewer keys than the set have no set yet: they go on reading everything.
        short = torch.tensor([length - first <= tokens.shape[2] for first in keys.starts])
        fresh["clock"][short] = -1
    if bool(which.all()) or not keys.state:
        keys.state.update(fresh)
        return
    runs = _alike(which.tolist())
    for name, new in fresh.items():
        old = keys.state[name]
        if runs is not None:
            for some, replaced in runs:
                if replaced:
                    old[some] = new[some]
            continue
        chosen = which if name != "q" else which.repeat_interleave(old.shape[1] // which.shape[1], 1)
        chosen = chosen.to(old.device).view(*chosen.shape, *[1] * (old.dim() - 2))
        keys.state[name] = torch.where(chosen, new, old)


def _alike(rows: list[list[int]]) -> list[tuple[slice, int]] | None:
    """Neighbouring rows of values [B, Hkv] that have one value, each with it; None where the heads of some
    row differ. Rows are chosen by slices, because an index tensor would be copied to the device."""
    if any(value != row[0] for row in rows for value in row):
        return None
    found, at = [], 0
    for value, same in groupby(row[0] for row in rows):
        begin, at = at, at + len(list(same))
        found.append((slice(begin, at), value))
    return found
