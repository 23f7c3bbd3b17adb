"""``scan`` in Triton, forward and backward.

The kernels: segments.py cuts the tokens; recurrence.py is the recurrence and, with its operands in other
roles, its gradients; channels.py is what differs inside a chunk where channels decay; delta.py turns the
delta rule into the recurrence; decays.py is the gradient of the decays. Matrix products take the inputs'
dtype and sum in float32; states are float32. Every sum is made by one program in a fixed order, so that two
runs give the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import launch
from .kernels.channels import pairs, pairs_backward
from .kernels.decays import decay_gradients
from .kernels.delta import writes
from .kernels.recurrence import Tokens, borders, outputs
from .kernels.segments import Segments, cut


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *, beta: Tensor | None, **how: object
) -> list[str]:
    reasons = launch.cannot_read(q, k, v)
    for name, x in (("log_decay", log_decay), ("beta", beta)):
        if x is not None and x.dtype not in launch.DTYPES:
            reasons.append(f"{name} is {x.dtype}, none of float16, bfloat16 and float32")
    return reasons


class _How(NamedTuple):
    segments: Segments
    scale: float


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    beta: Tensor | None,
    scale: float,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    rows = len(v) if cu_seqlens is None else len(cu_seqlens) - 1
    if 0 in v.shape or k.shape[3] == 0:
        if state is None:
            return torch.zeros_like(v), v.new_zeros(
                rows, v.shape[1], k.shape[3], v.shape[3], dtype=torch.float32
            )
        return torch.zeros_like(v), state.float()
    return _Scan.apply(_How(cut(v, cu_seqlens, chunk), scale), mask, q, k, v, log_decay, beta, state)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, how: _How, mask: Tensor | None, *inputs: Any) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta, state = inputs
        heads, tokens = v.shape[1], Tokens(how.segments, g, mask)
        x = None
        if beta is not None:
            x, states = writes(tokens, k, v, beta, state)
        else:
            states = borders(tokens, k, v, state, heads)
        within = pairs(tokens, q, k, heads) if tokens.by_channel else None
        out = outputs(
            tokens, q, k, v if x is None else x, states, dtype=v.dtype, scale=how.scale, pairs=within
        )
        ctx.how = how
        ctx.save_for_backward(mask, q, k, v, g, beta, state, states, x)
        return out, states[how.segments.last()].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor, dstate: Tensor) -> tuple[Any, ...]:
        mask, q, k, v, g, beta, state, states, x = ctx.saved_tensors
        segments, scale = ctx.how
        tokens = Tokens(segments, g, mask)
        dout = dout.to(v.dtype)
        dbeta = None
        if beta is not None:
            found = _delta(tokens, q, k, v, beta, x, dout, states, dstate, scale)
            dq, dread, dwrite, dv, dbeta, dstates = found
        else:
            dq, dwrite, dv, dstates = _plain(tokens, q, k, v, dout, states, dstate, scale)
            dread = torch.zeros((), device=v.device)
        dg = None
        if ctx.needs_input_grad[5]:
            dg = decay_gradients(tokens, q, k, dq, dwrite - dread, states, dstates)
        own = scale * (dout.float() * (v if x is None else x).float()).sum(-1, keepdim=True)
        dq, dk = _summed(dq, own, k, mask), _summed(dwrite + dread, own, q, mask)
        start = dstates[segments.first()].to(state.dtype) if ctx.needs_input_grad[7] else None
        return None, None, dq, dk, dv, dg, dbeta, start


def _summed(grad: Tensor, own: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient of a head of q or k: of its group's heads, grad [B, H, T, Dk] and own [B, H, T, 1] times
    the other one, x [B, Hq, T, Dk], which is what a token reads of itself. The kernels leave that out: no
    decay touches it, and in the decays' gradients it would only be rounding."""
    grad, own = (y.unflatten(1, (x.shape[1], -1)) for y in (grad, own))
    if mask is not None:
        x, own = (torch.where(mask.view(len(mask), *(1,) * (y.dim() - 3), -1, 1), y, 0) for y in (x, own))
    return torch.addcmul(grad, own, x[:, :, None].float()).sum(2).to(x.dtype)


def _plain(
    tokens: Tokens,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    states: Tensor,
    dstate: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk [B, H, T, Dk] in float32, dv, and the states' gradients at the borders. dq and dk are less what
    a token reads of itself."""
    dstates = borders(tokens, q, dout, dstate, v.shape[1], v_scale=scale, reverse=True)
    within, in_q, in_k = None, None, None
    if tokens.by_channel:
        within = pairs(tokens, q, k, v.shape[1])
        in_q, in_k = pairs_backward(tokens, q, k, v, dout)
    dv = outputs(tokens, k, q, dout, dstates, dtype=v.dtype, v_scale=scale, reverse=True, pairs=within)
    dq = outputs(tokens, dout, v, k, states.mT, dtype=torch.float32, scale=scale, strict=True, extra=in_q)
    dk = outputs(
        tokens,
        v,
        dout,
        q,
        dstates.mT,
        dtype=torch.float32,
        v_scale=scale,
        reverse=True,
        strict=True,
        extra=in_k,
    )
    return dq, dk, dv, dstates


def _delta(
    tokens: Tokens,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    x: Tensor,
    dout: Tensor,
    states: Tensor,
    dstate: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk of what k reads, dk of what k writes [B, H, T, Dk] in float32, dv, dbeta, the states' gradients.
    dq and dk are less what q reads of its own token."""
    dx, dstates = writes(tokens, k, dout, beta, dstate, q=q, scale=scale, reverse=True)
    z = (-beta[..., None] * dx).to(v.dtype)  # the gradient of what x reads
    if tokens.mask is not None:
        z = torch.where(tokens.mask[:, None, :, None], z, 0)
    how: dict[str, Any] = {"dtype": torch.float32, "strict": True}
    dq = outputs(tokens, dout, x, k, states.mT, scale=scale, **how)
    read = outputs(tokens, z, x, k, states.mT, **how)
    written = outputs(tokens, x, dout, q, dstates.mT, v_scale=scale, reverse=True, **how)
    written += outputs(tokens, x, z, k, torch.zeros_like(dstates).mT, reverse=True, **how)
    held = outputs(tokens, k, k, x, states, **how)
    left = dx.float() * (v.float() - held)
    if tokens.mask is not None:
        left = torch.where(tokens.mask[:, None, :, None], left, 0)
    return dq, read, written, -z, left.sum(-1).to(beta.dtype), dstates
