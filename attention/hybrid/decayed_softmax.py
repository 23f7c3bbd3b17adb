"""Softmax averages in which a token's weight decays with the distance, each channel for itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..partial import Partial

_CHUNK = 32  # tokens whose weights are computed side by side


def decayed_softmax(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, past: Partial, count: Tensor | None
) -> tuple[Tensor, Partial]:
    """Row t of the first result [B, T, C] is

        (sum_(i < t) e^(k_i - (t - 1 - i) w) v_i + e^(u + k_t) v_t) / (the same without v),

    and the second is the softmax over all tokens until the last one (out and lse [B, C]).

    k, v: [B, T, C], of which the first count [B] tokens of a row are real (all for None). w, u: [C]. past:
    the softmax over the tokens before."""
    mean, lse = past
    outs = []
    for a in range(0, k.shape[1], _CHUNK):
        keys, values = k[:, a : a + _CHUNK], v[:, a : a + _CHUNK]
        n = keys.shape[1]
        place = torch.arange(n, device=k.device)
        lag = (place[:, None] - 1 - place)[..., None]  # of a query's row and a key's column; -1 for its own
        logits = torch.where(lag < 0, (keys + u)[:, None], keys[:, None] - lag * w).masked_fill(
            lag < -1, -torch.inf
        )
        before = lse[:, None] - place[:, None] * w
        weights = torch.cat([before[:, :, None], logits], 2).softmax(2)
        outs.append(weights[:, :, 0] * mean[:, None] + (weights[:, :, 1:] * values[:, None]).sum(2))
        real = k.new_full((len(k),), n) if count is None else (count - a).clamp(0, n)
        behind = (real[:, None] - 1 - place)[..., None]
        ends = (keys - behind * w).masked_fill(behind < 0, -torch.inf)
        end = torch.cat([(lse - real[:, None] * w)[:, None], ends], 1)
        share = end.softmax(1)
        mean, lse = share[:, 0] * mean + (share[:, 1:] * values).sum(1), end.logsumexp(1)
    return torch.cat(outs, 1), Partial(mean, lse)
