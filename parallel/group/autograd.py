"""Collectives with a gradient.

Every rank must reach them in backward, in the same order. So their results must stay in the graph of the
loss, also on a rank that has computed nothing but split padding (``mechanisms.layout.Split``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .comm import Ranks, pack, unpack


def gather(x: Tensor, ranks: Ranks, name: str = "all_gather") -> Tensor:
    """x, of the same shape on every rank -> [P, *x.shape].

    Backward: a reduce-scatter, summed in float32 at least; counted as ``name`` + "_backward".
    """
    return _Gather.apply(x, ranks, name)


def gather_many(xs: Sequence[Tensor], ranks: Ranks, name: str = "all_gather") -> list[Tensor]:
    """Tensors of any dtypes, each of the same shape on every rank -> [P, *x.shape] of each, in one
    collective.

    Backward: one reduce-scatter, summed in float32 at least; counted as ``name`` + "_backward".
    """
    return list(_GatherMany.apply(ranks, name, *xs))


def exchange(
    x: Tensor, send: Sequence[int], receive: Sequence[int], ranks: Ranks, name: str = "all_to_all"
) -> Tensor:
    """x [sum(send), ...]: the first send[0] entries go to rank 0 and so on -> [sum(receive), ...].

    Backward: the inverse exchange, counted as ``name`` + "_backward".
    """
    return _Exchange.apply(x, send, receive, ranks, name)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, name: str) -> Tensor:
        ctx.ranks, ctx.name = ranks, name
        return ranks.all_gather(x, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        return ctx.ranks.reduce_scatter(grad.to(wide), f"{ctx.name}_backward").to(grad.dtype), None, None


class _GatherMany(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, name: str, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks, ctx.name, ctx.like = ranks, name, [x.dtype for x in xs]
        every = tuple(unpack(ranks.all_gather(pack(*xs), name), *xs))
        ctx.mark_non_differentiable(*(x for x in every if not x.is_floating_point()))
        return every

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wide = torch.float32
        places = [i for i, dtype in enumerate(ctx.like) if dtype.is_floating_point]
        for i in places:
            wide = torch.promote_types(wide, ctx.like[i])
        flat = torch.cat([grads[i].flatten(1).to(wide) for i in places], 1)
        parts = ctx.ranks.reduce_scatter(flat, f"{ctx.name}_backward").split(
            [grads[i][0].numel() for i in places]
        )
        found: list[Tensor | None] = [None] * len(ctx.like)
        for i, part in zip(places, parts, strict=True):
            found[i] = part.view(grads[i].shape[1:]).to(ctx.like[i])
        return None, None, *found


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: Sequence[int], receive: Sequence[int], ranks: Ranks, name: str
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.ranks, ctx.name = send, receive, ranks, name
        return ranks.all_to_all(x, send, receive, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = ctx.ranks.all_to_all(grad, ctx.receive, ctx.send, f"{ctx.name}_backward")
        return back, None, None, None, None
