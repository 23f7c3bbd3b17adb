"""Gradients of functions that jump, and losses of choices that have none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard``, exactly, with the gradient of ``soft`` (both of one shape)."""
    return hard.detach() + (soft - soft.detach())


def with_loss(out: Tensor, loss: Tensor) -> Tensor:
    """``out``. A backward pass that reaches it also computes the gradient of ``loss``, a number, with the
    factor 1: so a mixer has a loss of its own without a change of the training loop."""
    return _WithLoss.apply(out, loss)


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones_like(ctx.saved_tensors[0])
