from __future__ import annotations

import torch
from torch import Tensor

from ...softmax import Softmax
from ..dispatch import Impls, LazyImpl, run
from . import eager, reference

IMPLS: Impls = {
    "reference": reference.scores,
    "eager": eager.scores,
    "triton": LazyImpl(__package__, "scores"),
}


_PLAIN = Softmax(1.0)


def scores(q: Tensor, k: Tensor, softmax: Softmax = _PLAIN, *, impl: str = "auto") -> Tensor:
    """Logits q k^T of q [B, H, T, D] against k [B, Hkv, N, D] -> [B, Hkv, G, T, N] in float32, with the scale
    and the soft-cap of ``softmax``.

    Products of 16-bit inputs are accumulated and returned in float32 (no rounding to the input type), without
    a float32 copy of k and without expanding it to query heads. Raises ValueError for shapes that do not fit.
    """
    if q.shape[0] != k.shape[0] or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(f"scores got q {list(q.shape)} and k {list(k.shape)}, which do not fit together.")
    logits: Tensor = run("scores", IMPLS, impl, q, k, scale=softmax.scale)
    softcap = softmax.softcap
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
