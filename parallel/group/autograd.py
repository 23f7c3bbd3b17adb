"""Collectives with a gradient.

Every rank must reach them in backward, in the same order. So their results must stay in the graph of the
loss, also on a rank that has computed nothing but split padding (``mechanisms.layout.Split``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .comm import Ranks


def gather(x: Tensor, ranks: Ranks, name: str = "all_gather") -> Tensor:
    """x, of the same shape on every rank -> [P, *x.shape].

    Backward: a reduce-scatter, summed in float32 at least; counted as ``name`` + "_backward".
    """
    return _Gather.apply(x, ranks, name)


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
