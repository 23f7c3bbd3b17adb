"""A hash of tensors: whether two sets of weights are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """The first 16 hex digits of a hash of names, shapes, dtypes and bits; their order does not count."""
    found = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        bits = x.detach().cpu().contiguous().flatten().view(torch.uint8)
        found.update(f"{name} {list(x.shape)} {x.dtype}".encode() + bits.numpy().tobytes())
    return found.hexdigest()[:16]
