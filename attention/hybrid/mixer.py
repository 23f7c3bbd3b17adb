"""The abstraction of a layer without a KV cache: hidden states and a recurrent state in, both out."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]
"""The state of a batch: one tensor for each of ``Mixer.state_shapes``, batch first."""

Rotary = tuple[Tensor, Tensor]
"""cos and sin [B or 1, T, rotated numbers] of the tokens' positions, as the layer's attention would get
them."""


class Mixer(nn.Module):
    """Base of the modules that may stand in place of a layer's ``self_attn`` (``patch(..., mixers=...)``).

    A mixer sees the layer's hidden states behind its norm, in the model's dtype, and returns what the layer
    adds to its residual. All that it keeps of earlier tokens is its state, whose size does not depend on
    their number. It never changes a state in place.

    It obeys three laws, which make chunked prefill, decode and batches right:

    - segments: ``forward`` over a sequence equals ``forward`` over its parts, the state handed on;
    - step: ``step`` equals ``forward`` over one token;
    - padding: tokens that ``mask`` hides change neither the state nor the outputs of other tokens.

    Parameters keep their names in the model's state dict: a mixer with a child ``q_proj`` in layer 3 has
    ``layers.3.self_attn.q_proj``, as the attention that it replaces.
    """

    name: ClassVar[str]  # for the report
    paper: ClassVar[str] = ""  # arXiv id
    hidden_size: int  # numbers of a hidden state

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of one row's state tensors, without the batch dimension."""
        raise NotImplementedError(f"{type(self).__name__} does not say what shapes its state has.")

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of the state: float32, because rounding adds up over a sequence."""
        return torch.float32

    @property
    def state_bytes(self) -> int:
        """Bytes of one row's state."""
        return sum(map(math.prod, self.state_shapes)) * self.state_dtype.itemsize

    def initial_state(self, batch: int, device: torch.device) -> State:
        """The state before the first token: zeros."""
        return tuple(
            torch.zeros((batch, *shape), dtype=self.state_dtype, device=device) for shape in self.state_shapes
        )

    def forward(
        self,
        hidden: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, State]:
        """hidden [B, T, hidden] -> (out [B, T, hidden], the state after the last token).

        state: after the tokens before; None before the first one. mask: [B, T] bool, False where a token is
        padding, left or right; None where there is none. Outputs at padding mean nothing. rotary: None in a
        model without RoPE.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no forward.")

    def step(self, hidden: Tensor, state: State, rotary: Rotary | None = None) -> tuple[Tensor, State]:
        """One token: hidden [B, hidden] -> (out [B, hidden], the state after it). By default ``forward``."""
        out, state = type(self).forward(self, hidden[:, None], state, None, rotary)
        return out[:, 0], state
