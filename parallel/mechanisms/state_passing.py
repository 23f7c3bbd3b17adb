"""State passing: a mixer over contiguous shards of one sequence.

    rank r:  halo -> the local parts of the state before its shard
             its shard -> a transition            all-gather, of a size that does not depend on the length
             state before the call, advanced by the transitions of ranks 0 .. r - 1 -> its state -> its
             outputs

Every rank advances the state through all P transitions in the order of the ranks. So the state after the call
is bit for bit the same on every rank, and later single tokens need no traffic. Sent per rank and layer, for
transitions of n bytes a row (a state and its decay, say) and hidden states of h bytes with RoPE's c bytes:

    (P - 1) * B * (halo * (h + c) + n)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...attention.hybrid.mixer import Mixer, Rotary, State
from ..group.autograd import gather_many
from ..group.comm import Ranks
from .layout import Split


def pass_state(
    mixer: Mixer,
    hidden: Tensor,
    state: State | None,
    mask: Tensor | None,
    rotary: Rotary | None,
    split: Split,
    ranks: Ranks,
    forward: Callable[..., Any] | None = None,
) -> tuple[Tensor, State]:
    """``mixer.forward`` over one call whose tokens are divided among ranks by ``split``, one chunk a rank.

    hidden [B, split.rows, hidden], rotary [B or 1, split.rows, any]: what this rank has computed. state: that
    before the call, the same on every rank; None before the first token. mask: [B, T] bool for all tokens of
    the call, False at padding; None where there is none. forward: the mixer's forward, where an attribute of
    the module hides it. -> (out [B, split.rows, hidden], zero at split padding; the state after the call, the
    same on every rank). Differentiable in hidden and in the mixer's parameters.
    """
    run = forward or mixer.forward
    (((begin, end),), batch) = split.chunks[ranks.rank], hidden.shape[0]
    if mask is None:
        mask = hidden.new_ones(1, split.end - split.begin, dtype=torch.bool).expand(batch, -1)
    if begin == end:  # one token, as padding, so that this rank takes part
        count, mine = 1, mask.new_zeros(batch, 1)
    else:
        count, mine = end - begin, mask[:, begin - split.begin : end - split.begin]
    x, turn = hidden[:, :count], None if rotary is None else _cut(rotary, count)
    before = state or mixer.initial_state(batch, hidden.device)
    local, halo = _local(mixer, run, x, before, mine, turn, mask[:, : begin - split.begin], ranks)
    padded = None if bool(mine.all()) else mine
    every = gather_many(mixer.transition(x, local, padded, turn), ranks, "transitions")
    after = before
    for rank in range(ranks.size):
        if rank == ranks.rank:
            before = after
        after = mixer.advance(after, tuple(part[rank] for part in every))
    out = run(x, before, padded, turn)[0][:, : end - begin]
    out = torch.nn.functional.pad(out, (0, 0, 0, split.rows - out.shape[1]))
    # Rank 0 reads nothing of what the others send, but takes part in the backward of the collectives.
    return out + sum(g[..., :0].sum().to(out) for g in (*halo, *every) if g.requires_grad), after


def _local(
    mixer: Mixer,
    run: Callable[..., Any],
    x: Tensor,
    state: State,
    mine: Tensor,
    rotary: Rotary | None,
    earlier: Tensor,
    ranks: Ranks,
) -> tuple[State, list[Tensor]]:
    """The state before this rank's shard, right in its local parts and counts alone; and what the ranks have
    sent for it.

    x, mine, rotary: the shard's tokens, which of them are no padding, and their RoPE. state: that before the
    call. earlier [B, n]: which tokens of the call before the shard are no padding.
    """
    halo, seen = mixer.halo, earlier.sum(1)
    assert halo is not None, "patch() refuses a mixer without a halo"
    if halo == 0:
        return mixer.skip(state, seen), []
    parts = [x, *(_each_row(part, x) for part in rotary or ())]
    tails = [_last(part, mine, halo) for part in parts]
    every = gather_many([*tails, _last(mine[..., None], mine, halo)], ranks, "halo")
    if ranks.rank == 0:
        return state, every
    *before, real = (part[: ranks.rank].transpose(0, 1).flatten(1, 2) for part in every)
    real = real[..., 0]
    tokens, *turn = (_last(part, real, halo) for part in before)
    real = _last(real[..., None], real, halo)[..., 0]
    at = (turn[0], turn[1]) if turn else None
    return run(tokens, mixer.skip(state, seen - real.sum(1)), real, at)[1], every


def _last(x: Tensor, real: Tensor, count: int) -> Tensor:
    """The last ``count`` tokens of x [B, n, any] that are ``real`` [B, n], in their order; before them, where
    a row has fewer, others."""
    short = max(0, count - x.shape[1])
    x, real = torch.nn.functional.pad(x, (0, 0, short, 0)), torch.nn.functional.pad(real, (short, 0))
    at = real.sort(dim=1, stable=True).indices[:, -count:]
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))


def _each_row(x: Tensor, like: Tensor) -> Tensor:
    return x.expand(like.shape[0], -1, -1)


def _cut(rotary: Rotary, count: int) -> Rotary:
    return rotary[0][:, :count], rotary[1][:, :count]
