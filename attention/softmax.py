"""How a layer turns q k^T into weights: one value for scale, soft-cap, window and sinks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Softmax:
    """What the model's config says about the softmax of one layer.

    scale: factor of q k^T. softcap: c bends the scaled logits to c * tanh(logits / c); None: no bending.
    window: size of the model's own sliding window, the query itself included; None: full attention.
    sinks: [H] logits of the learned attention sinks; None: there are none.

    Operations apply ``scale`` and ``softcap``. The window and the sinks belong to the layer's call: the layer
    hands the window to an operation as its own argument, and merges the sinks once, after all key sets.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None
