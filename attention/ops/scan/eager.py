"""``scan`` in chunks of tokens: matrix products inside a chunk, one state carried from chunk to chunk.

With g's sums inside a chunk, p_i = g_0 + .. + g_i (from its first token), r_j = g_(j+1) + .. + g_last (to its
last) and d_ij = g_(j+1) + .. + g_i, a chunk that starts from the state S gives

    out_i = exp(p_i) S^T q_i + sum_(j <= i) exp(d_ij) (q_i . k_j) x_j
    S'    = exp(p_last) S + sum_j exp(r_j) k_j x_j^T

where x = v without beta. With beta, x solves the unit triangular system (arXiv 2412.06464, the WY form)

    x_i + beta_i sum_(j < i) exp(d_ij) (k_i . k_j) x_j = beta_i (v_i - exp(p_i) S^T k_i)

Every exponent is a sum of decays, never a difference of two sums, so it is at most 0 and keeps its digits
however strong the decay is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

_SPAN = 1 << 18  # numbers of one tensor of a span: its chunks are computed side by side, in cache


class _How(NamedTuple):
    scale: float
    chunk: int


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
    wide = torch.promote_types(v.dtype, torch.float32)
    rows = len(v) if cu_seqlens is None else len(cu_seqlens) - 1
    if state is None:
        state = v.new_zeros(rows, v.shape[1], k.shape[3], v.shape[3], dtype=wide)
    else:
        state = state.to(wide)
    how = _How(scale, chunk)
    if cu_seqlens is None:
        return _Scan.apply(how, mask, q, k, v, log_decay, beta, state)
    sizes = cu_seqlens.diff().tolist()
    tokens = [
        [None] * rows if x is None else x.split(sizes, 1 if x is mask else 2)
        for x in (mask, q, k, v, log_decay, beta)
    ]
    parts = [_Scan.apply(how, *each) for each in zip(*tokens, state.split(1), strict=True)]
    return torch.cat([out for out, _ in parts], 2), torch.cat([end for _, end in parts])


class _Scan(torch.autograd.Function):
    """Spans of chunks, one after another. The backward computes each span again from the state before it, so
    that what is kept is the inputs and one state a span."""

    @staticmethod
    def forward(ctx: Any, how: _How, mask: Tensor | None, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tokens, state = inputs
        v, befores = tokens[2], []
        out, end = torch.empty_like(v), state.clone()
        for span in _spans(v, state.shape[2], how.chunk):
            if any(ctx.needs_input_grad):
                befores.append(end)
            of_span, end = _span(how, end, *(_of(x, span) for x in (mask, *tokens)))
            out[:, :, span] = of_span
        ctx.how = how
        ctx.save_for_backward(mask, *tokens, *befores)
        return out, end

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor, dstate: Tensor) -> tuple[Any, ...]:
        mask, *tokens = ctx.saved_tensors[:6]
        befores = ctx.saved_tensors[6:]
        wanted = ctx.needs_input_grad[2:7]
        grads = [torch.empty_like(x) if w else None for x, w in zip(tokens, wanted, strict=True)]
        spans = _spans(tokens[2], dstate.shape[2], ctx.how.chunk)
        for span, before in zip(reversed(spans), reversed(befores), strict=True):
            with torch.enable_grad():
                start = before.detach().requires_grad_()
                leaves = [_of(x, span) for x in tokens]
                leaves = [
                    x.detach().requires_grad_() if w else x for x, w in zip(leaves, wanted, strict=True)
                ]
                result = _span(ctx.how, start, _of(mask, span), *leaves)
            needed = [start, *(x for x, w in zip(leaves, wanted, strict=True) if w)]
            dstate, *found = torch.autograd.grad(result, needed, (dout[:, :, span], dstate))
            for grad, of_span in zip((x for x in grads if x is not None), found, strict=True):
                grad[:, :, span] = of_span
        return None, None, *grads, dstate


def _of(x: Any, span: slice) -> Any:
    """The span's tokens of mask [B, T] or of x [B, H, T, ...]."""
    if x is None:
        return None
    return x[:, span] if x.dim() == 2 else x[:, :, span]


def _spans(v: Tensor, dk: int, chunk: int) -> list[slice]:
    b, h, t, dv = v.shape
    chunk = _chunk(t, chunk)
    size = chunk * max(1, _SPAN // max(1, b * h * chunk * max(chunk, dk, dv)))
    return [slice(a, min(a + size, t)) for a in range(0, t, size)]


def _chunk(t: int, chunk: int) -> int:
    """The power of two that chunks of ``chunk`` tokens are rounded down to, smaller for a few tokens."""
    return min(1 << (chunk.bit_length() - 1), 1 << max(0, t - 1).bit_length())


def _span(
    how: _How,
    state: Tensor,
    mask: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition for a few chunks -> (out [B, H, T, Dv], state). Heads are [Hq, G] inside, where q and k
    have [Hq, 1], and tokens [N, C]."""
    t, heads = v.shape[2], (q.shape[1], -1)
    chunk = _chunk(t, how.chunk)

    def chunks(x: Tensor) -> Tensor:
        x = x.to(state.dtype)
        if mask is not None:  # padding has keys of 0 and no decay
            real = mask[:, None] if x.dim() == 3 else mask[:, None, :, None]
            x = torch.where(real, x, 0)
        if t % chunk:
            x = pad(x, (*(0, 0) * (x.dim() - 3), 0, -t % chunk))
        return x.unflatten(2, (-1, chunk)).unflatten(1, heads)

    q, k, v = chunks(q) * how.scale, chunks(k), chunks(v)
    reads, writes, decay, weights, kept = q, k, None, None, None
    if log_decay is None:
        pairs = (q @ k.mT).tril()
    elif log_decay.dim() == 4:
        pairs, before, after = _by_channel(q, k, chunks(log_decay))
        reads, writes = q * before.exp(), k * after.exp()
        decay = before[..., -1, :, None].exp()
    else:
        decays = chunks(log_decay)
        between = _between(decays)
        before, after = (between[..., 0] + decays[..., :1]).exp()[..., None], between[..., -1, :].exp()
        weights = between.exp()
        pairs = ((q @ k.mT) * weights).tril()
        reads, writes, decay = q * before, k * after[..., None], before[..., -1:, :]
    x = v
    if beta is not None:
        strength = chunks(beta)[..., None]
        among = k @ k.mT if weights is None else (k @ k.mT) * weights
        right = k if log_decay is None else k * before
        sides = torch.cat((strength * v, strength * right), -1)
        system = (strength * among).tril(-1)
        x, kept = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True).split(
            (v.shape[-1], k.shape[-1]), -1
        )
    added = writes.mT @ x  # with beta, x is so far what it would be from a state of zeros
    state = state.unflatten(1, heads)
    lost = None if kept is None else writes.mT @ kept
    befores = []
    for n in range(added.shape[3]):
        befores.append(state)
        left = state if decay is None else state * decay[:, :, :, n]
        left = left if lost is None else left - lost[:, :, :, n] @ state
        state = left + added[:, :, :, n]
    held = torch.stack(befores, 3)
    if kept is not None:
        x = x - kept @ held
    out = reads @ held + pairs @ x
    return out.flatten(3, 4).flatten(1, 2)[:, :, :t], state.flatten(1, 2)


def _between(decays: Tensor) -> Tensor:
    """d_ij of decays [..., C] -> [..., C, C], 0 above the diagonal."""
    c = decays.shape[-1]
    return decays[..., None].expand(*decays.shape, c).tril(-1).cumsum(-2)


def _by_channel(q: Tensor, k: Tensor, decays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums over channels of exp(d_ij) q_i k_j [..., C, C], p and r [..., C, Dk], of q and k [..., C, Dk].

    Blocks of 1, 2, 4 .. tokens are joined two by two. d_ij from the left block's token j to the right block's
    token i is r_j of the left block plus p_i of the right one.
    """
    pairs = (q * k).sum(-1)[..., None, None].expand(*decays.shape[:-1], 1, 1)
    q, k = q.expand_as(decays), k.expand_as(decays)
    before, after = decays, torch.zeros_like(decays)
    size, chunk = 1, decays.shape[-2]
    while size < chunk:
        two = (-1, 2, size)
        _, right_q = q.unflatten(-2, two).unbind(-3)
        left_k, _ = k.unflatten(-2, two).unbind(-3)
        left_p, right_p = before.unflatten(-2, two).unbind(-3)
        left_r, right_r = after.unflatten(-2, two).unbind(-3)
        across = (right_q * right_p.exp()) @ (left_k * left_r.exp()).mT
        left, right = pairs.unflatten(-3, (-1, 2)).unbind(-3)
        pairs = torch.cat((pad(left, (0, size)), torch.cat((across, right), -1)), -2)
        before = torch.cat((left_p, right_p + left_p[..., -1:, :]), -2).flatten(-3, -2)
        after = torch.cat((left_r + right_p[..., -1:, :], right_r), -2).flatten(-3, -2)
        size *= 2
    return pairs.squeeze(-3), before, after
