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

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ...attention.hybrid.mixer import Mixer, Rotary, State, Transition
from ..group.autograd import gather_many
from ..group.comm import Ranks
from .layout import Split

S = TypeVar("S", Tensor, tuple[Tensor, ...])


def pass_state(
    mixer: Mixer,
    hidden: Tensor,
    state: State | None,
    mask: Tensor | None,
    rotary: Rotary | None,
    split: Split,
    ranks: Ranks,
) -> tuple[Tensor, State]:
    """``mixer.forward`` over one call whose tokens are divided among ranks by ``split``, one chunk a rank.

    hidden [B, split.rows, hidden], rotary [B or 1, split.rows, any]: what this rank has computed. state: that
    before the call, the same on every rank; None before the first token. mask: [B, T] bool for all tokens of
    the call, False at padding; None where there is none. -> (out [B, split.rows, hidden], zero at split
    padding; the state after the call, the same on every rank). Differentiable in hidden and in the mixer's
    parameters.
    """
    (((begin, end),), batch) = split.chunks[ranks.rank], hidden.shape[0]
    if mask is None:
        mask = hidden.new_ones(1, split.end - split.begin, dtype=torch.bool).expand(batch, -1)
    if begin == end:  # one token, as padding, so that this rank takes part
        count, mine = 1, mask.new_zeros(batch, 1)
    else:
        count, mine = end - begin, mask[:, begin - split.begin : end - split.begin]
    x, turn = hidden[:, :count], None if rotary is None else _cut(rotary, count)
    before = state or mixer.initial_state(batch, hidden.device)
    padded = None if bool(mine.all()) else mine
    shard = _Shard(x, mine, padded, turn, mask[:, : begin - split.begin], ranks)
    before, after, outputs, gathered = _states(mixer, shard, before)
    out = outputs(before)[:, : end - begin]
    out = torch.nn.functional.pad(out, (0, 0, 0, split.rows - out.shape[1]))
    return keep_in_graph(out, *gathered), after


class _Shard(NamedTuple):
    """This rank's tokens. hidden [B, n, hidden], rotary: of them. real [B, n]: which of them are no padding;
    mask: the same, None where all are. earlier [B, m]: the same for the call's tokens before them."""

    hidden: Tensor
    real: Tensor
    mask: Tensor | None
    rotary: Rotary | None
    earlier: Tensor
    ranks: Ranks


def _states(
    mixer: Mixer, shard: _Shard, state: State
) -> tuple[State, State, Callable[[State], Tensor], list[Tensor]]:
    """The state before this rank's shard, the state after the call, the shard's outputs by the first, and
    what was gathered. state: that before the call."""
    inner_before: State = ()
    inner_after: State = ()
    gathered: list[Tensor] = []
    count = 0
    if mixer.inner is not None:
        count = len(mixer.inner.layout)
        inner_before, inner_after, _, gathered = _states(mixer.inner, shard, state[:count])
    local, halo = _local(mixer, shard, state)
    local = (*inner_before, *local[count:])
    transition, outputs = mixer.shard(shard.hidden, local, shard.mask, shard.rotary)
    if mixer.growing:
        transition = _equally_long(transition, shard.ranks)
    anchors = shard.hidden, *mixer.parameters()
    before, after, every = fold(state, transition, mixer.advance, shard.ranks, anchors)
    gathered += [*halo, *every]
    return (*inner_before, *before[count:]), (*inner_after, *after[count:]), outputs, gathered


def fold(
    state: S,
    transition: Transition,
    advance: Callable[[S, Transition], S],
    ranks: Ranks,
    anchors: Iterable[Tensor],
) -> tuple[S, S, list[Tensor]]:
    """All-gather the transitions of all shards -> (the state before this rank's shard, the state after the
    call, what was gathered). state: that before the call. advance: see ``Mixer.advance``. anchors: what
    the transitions of other ranks are computed from; if one requires a gradient, this rank takes part in the
    backward, whether it has tokens or not."""
    first, *others = transition
    every = gather_many([keep_in_graph(first, *anchors), *others], ranks, "transitions")
    before = after = state
    for rank in range(ranks.size):
        if rank == ranks.rank:
            before = after
        after = advance(after, tuple(part[rank] for part in every))
    return before, after, every


def pass_columns(
    x: Tensor, before: Tensor, split: Split, ranks: Ranks
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The halo of a convolution whose inputs this rank has. x: [B, channels, split.rows]; before: [B,
    channels, K], the last K inputs before the call. -> (the last K before this rank's shard, the last K of
    the call, what was gathered)."""
    width, layout = before.shape[2], split.layout()
    counts = [min(layout.count(rank), width) for rank in range(ranks.size)]
    end, mine = layout.count(ranks.rank), counts[ranks.rank]
    tail = torch.nn.functional.pad(x[:, :, end - mine : end], (width - mine, 0))
    every = gather_many([tail], ranks, "halo")
    columns = [part[:, :, width - count :] for part, count in zip(every[0], counts, strict=True)]
    shard = torch.cat([before, *columns[: ranks.rank]], 2)[:, :, -width:]
    return shard, torch.cat([before, *columns], 2)[:, :, -width:], every


def keep_in_graph(x: Tensor, *others: Tensor) -> Tensor:
    """x, whose backward reaches the others. A rank that reads nothing of a collective, or has nothing to
    send, takes part in its backward all the same: the other ranks wait for it."""
    return x + sum(one[None][:0].sum().to(x) for one in others if one.requires_grad)


def _equally_long(transition: Transition, ranks: Ranks) -> Transition:
    """The parts of a transition that grow with the tokens, padded to the longest of all ranks."""
    lengths = torch.tensor([x.shape[1] if x.dim() > 1 else 0 for x in transition])
    longest = ranks.all_gather(lengths.to(transition[0].device), "lengths").amax(0).tolist()
    return tuple(
        x
        if x.dim() < 2 or x.shape[1] == length
        else torch.cat([x, x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:])], 1)
        for x, length in zip(transition, longest, strict=True)
    )


def _local(mixer: Mixer, shard: _Shard, state: State) -> tuple[State, list[Tensor]]:
    """The state before this rank's shard, right in its local parts and counts alone; and what the ranks have
    sent for it. state: that before the call."""
    halo, seen, ranks = mixer.halo, shard.earlier.sum(1), shard.ranks
    assert halo is not None, "patch() refuses a mixer without a halo"
    if halo == 0:
        return mixer.skip(state, seen), []
    parts = [shard.hidden, *(x.expand(len(shard.hidden), -1, -1) for x in shard.rotary or ())]
    tails = [_last(part, shard.real, halo) for part in (*parts, shard.real[..., None])]
    every = gather_many(tails, ranks, "halo")
    if ranks.rank == 0:
        return state, every
    *before, real = (part[: ranks.rank].transpose(0, 1).flatten(1, 2) for part in every)
    tokens, *turn, real = (_last(part, real[..., 0], halo) for part in (*before, real))
    real = real[..., 0]
    at = (turn[0], turn[1]) if turn else None
    state = mixer.skip(state, seen - real.sum(1))
    return type(mixer).forward(mixer, tokens, state, real, at)[1], every


def _last(x: Tensor, real: Tensor, count: int) -> Tensor:
    """The last ``count`` tokens of x [B, n, any] that are ``real`` [B, n], in their order; before them, where
    a row has fewer, others."""
    short = max(0, count - x.shape[1])
    x, real = torch.nn.functional.pad(x, (0, 0, short, 0)), torch.nn.functional.pad(real, (short, 0))
    at = real.sort(dim=1, stable=True).indices[:, -count:]
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))


def _cut(rotary: Rotary, count: int) -> Rotary:
    return rotary[0][:, :count], rotary[1][:, :count]
