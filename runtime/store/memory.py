"""Where the buffers of a store lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The memory of the device on which keys and values are computed. Another memory is a
    subclass, whose fields are its parameters.

    tier: its name in a spec of ``patch(storage=)``.
    """

    tier: ClassVar[str] = "device"

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A buffer of this shape, of the dtype of ``like``, whose contents are undefined. It may be written
        inside and outside of inference mode."""
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=like.dtype, device=like.device)
