"""RoPE, applied to heads that stand behind the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import SpecError
from .mixer import Rotary


def rotate(x: Tensor, rotary: Rotary | None) -> Tensor:
    """x [B, T, H, D] rotated by cos and sin [B or 1, T, R]: numbers i and i + R / 2 of a head are a pair, as
    in Llama, and those from R on stay as they are. Without rotary, x.

    Raises SpecError for R above D.
    """
    if rotary is None:
        return x
    cos, sin = (part[:, :, None].to(x.dtype) for part in rotary)
    size = cos.shape[3]
    if size > x.shape[3]:
        raise SpecError(
            f"RoPE over {size} numbers does not fit the mixer's heads of {x.shape[3]}: make the mixer with "
            "the head_dim of the attention."
        )
    first, second = x[..., :size].chunk(2, 3)
    turned = x[..., :size] * cos + torch.cat([-second, first], 3) * sin
    return torch.cat([turned, x[..., size:]], 3)
