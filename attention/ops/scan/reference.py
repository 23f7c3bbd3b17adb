"""The definition of ``scan``: one token after another."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


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
    b, h, t, dv = v.shape
    group = h // q.shape[1]
    q, k = (x.to(wide).repeat_interleave(group, 1) for x in (q, k))
    bounds = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    outs, ends = [], []
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        rows = slice(None) if cu_seqlens is None else slice(n, n + 1)
        s = v.new_zeros(b, h, k.shape[3], dv, dtype=wide) if state is None else state[rows].to(wide)
        for i in range(begin, end):
            after, x = s, v[:, :, i].to(wide)
            if log_decay is not None:
                decay = log_decay[:, :, i].to(wide).exp()
                after = s * (decay[..., None] if decay.dim() == 3 else decay[..., None, None])
            if beta is not None:
                read = torch.einsum("bhk,bhkv->bhv", k[:, :, i], after)
                x = beta[:, :, i, None].to(wide) * (x - read)
            after = after + torch.einsum("bhk,bhv->bhkv", k[:, :, i], x)
            out = scale * torch.einsum("bhk,bhkv->bhv", q[:, :, i], after)
            if mask is not None:
                real = mask[:, i, None, None]
                out = torch.where(real, out, 0)
                after = torch.where(real[..., None], after, s)
            s = after
            outs.append(out)
        ends.append(s)
    out = torch.stack(outs, 2).to(v.dtype) if outs else v.new_zeros(v.shape)
    return out, torch.cat(ends)
