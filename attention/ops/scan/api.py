from __future__ import annotations

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..dispatch import Impls, LazyImpl, run
from . import eager, reference

IMPLS: Impls = {
    "reference": reference.scan,
    "eager": eager.scan,
    "triton": LazyImpl(__package__, "scan"),
    "fla": LazyImpl(__package__, "scan", "fla"),
}


@without_autocast
def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    scale: float = 1.0,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A linear recurrence over tokens -> (out [B, H, T, Dv] in the dtype of v, the state after the last token
    [B, H, Dk, Dv] in float32, or float64 for float64 inputs).

        S_t = exp(g_t) S_(t-1) + k_t v_t^T                         without beta
        S_t = A + beta_t k_t (v_t - A^T k_t)^T, A = exp(g_t) S_(t-1)    with beta (the delta rule)
        out_t = scale * S_t^T q_t

    q, k: [B, Hq, T, Dk], where Hq divides H: head h of v reads head h // (H / Hq) of q and k. v: [B, H, T,
    Dv]. log_decay g: [B, H, T], one number a head (Mamba-2's SSD, arXiv 2405.21060, with k = B, v = Δ x, q =
    C, g = Δ A; retention, 2307.08621), or [B, H, T, Dk], one a channel of k (gated linear attention,
    2312.06635); at most 0; None: no decay. beta: [B, H, T], with a decay per head or none (gated DeltaNet,
    2412.06464). state: the state before the first token; None: zeros. mask: [B, T] bool, False where a token
    is padding: such a token leaves the state as it was, and its output is zero. cu_seqlens: [N + 1] integers
    from 0 to T, ascending, with B = 1: N sequences stand side by side, and the states are [N, H, Dk, Dv].
    chunk: tokens that are computed in parallel. Gradients reach every input and the state.

    Raises ValueError for shapes that do not fit together.
    """
    _check(q, k, v, log_decay, beta)
    b, h, t, dv = v.shape
    if cu_seqlens is not None and (b != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2):
        raise ValueError(
            f"scan takes cu_seqlens [N + 1] for a batch of 1; got {list(cu_seqlens.shape)} and a "
            f"batch of {b}."
        )
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":  # elsewhere it would wait for the device
        bounds = cu_seqlens.tolist()
        if bounds != sorted(bounds) or bounds[0] != 0 or bounds[-1] != t:
            raise ValueError(f"scan takes cu_seqlens from 0 to T = {t}, ascending; got {bounds}.")
    rows = b if cu_seqlens is None else len(cu_seqlens) - 1
    if state is not None and state.shape != (rows, h, k.shape[3], dv):
        raise ValueError(
            f"scan takes a state of [{rows}, {h}, {k.shape[3]}, {dv}] here; got {list(state.shape)}."
        )
    if mask is not None and (mask.shape != (b, t) or mask.dtype != torch.bool):
        raise ValueError(f"scan takes a boolean mask [{b}, {t}]; got {list(mask.shape)} of {mask.dtype}.")
    if chunk < 1:
        raise ValueError(f"scan takes chunks of at least 1 token; got {chunk}.")
    return run(
        "scan", IMPLS, impl, q, k, v, log_decay, beta=beta, scale=scale, state=state, mask=mask,
        cu_seqlens=cu_seqlens, chunk=chunk,
    )  # fmt: skip


@without_autocast
def scan_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor,
    beta: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """:func:`scan` over one token: q, k [B, Hq, Dk], v [B, H, Dv], log_decay [B, H] or [B, H, Dk], beta [B,
    H], state [B, H, Dk, Dv] -> (out [B, H, Dv], the state after the token). The given state is not written
    to. q may also have G heads for each state, [B, H * G, Dk]; then out is [B, H * G, Dv]."""
    heads = v.shape[1]
    q, k = (x.to(state.dtype).repeat_interleave(max(1, heads // x.shape[1]), 1) for x in (q, k))
    x = v.to(state.dtype)
    if log_decay is not None:
        decay = log_decay.to(state.dtype).exp()
        state = state * (decay[..., None] if decay.dim() == 3 else decay[..., None, None])
    if beta is not None:
        x = beta.to(state.dtype)[..., None] * (x - (k[..., None, :] @ state).squeeze(-2))
    state = state + k[..., None] * x[..., None, :]
    out = q.unflatten(1, (heads, -1)) @ state  # [B, H, G, Dv]
    return (scale * out.flatten(1, 2)).to(v.dtype), state


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> None:
    given = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 4 or v.dim() != 4 or q.shape != k.shape or q.shape[::2] != v.shape[::2]:
        raise ValueError(f"scan takes q, k [B, Hq, T, Dk] and v [B, H, T, Dv]; got {given}.")
    if q.shape[1] == 0 or v.shape[1] % q.shape[1]:
        raise ValueError(f"scan needs a whole number of heads of v per head of q and k; got {given}.")
    heads = v.shape[:3]
    if log_decay is not None and log_decay.shape not in (heads, (*heads, q.shape[3])):
        raise ValueError(
            f"scan takes log_decay [B, H, T] = {list(heads)} or [B, H, T, Dk]; got {list(log_decay.shape)}."
        )
    if beta is not None and beta.shape != heads:
        raise ValueError(f"scan takes beta [B, H, T] = {list(heads)}; got {list(beta.shape)}.")
    if beta is not None and log_decay is not None and log_decay.dim() == 4:
        raise ValueError("scan takes beta with a log_decay per head, or with none; got one per channel.")
