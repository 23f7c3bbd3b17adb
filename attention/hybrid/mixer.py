"""The abstraction of a layer without the model's KV cache: hidden states and a state in, both out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .growing import Growing

State = tuple[Tensor, ...]
"""The state of a batch: one tensor for each part of ``Mixer.layout``, batch first."""

Rotary = tuple[Tensor, Tensor]
"""cos and sin [B or 1, T, rotated numbers] of the tokens' positions, as the layer's attention would get
them."""

Transition = tuple[Tensor, ...]
"""What a shard of a sequence does to a state: tensors of fixed shapes, batch first."""

_REGISTRY: dict[str, type[Mixer]] = {}


def registered() -> dict[str, type[Mixer]]:
    """Every mixer class that has a name, by name."""
    return dict(_REGISTRY)


class Mixer(nn.Module):
    """Base of the modules that may stand in place of a layer's ``self_attn`` (``patch(..., mixers=...)``).

    A mixer sees the layer's hidden states behind its norm, in the model's dtype, and returns what the layer
    adds to its residual. All that it keeps of earlier tokens is its state: parts whose size does not depend
    on their number (``state_shapes``), and, in few mixers, parts that grow with it (``growing``). It never
    changes a state in place.

    It obeys three laws, which make chunked prefill, decode and batches right:

    - segments: ``forward`` over a sequence equals ``forward`` over its parts, the state handed on;
    - step: ``step`` equals ``forward`` over one token;
    - padding: tokens that ``mask`` hides change neither the state nor the outputs of other tokens.

    A mixer of this package is made by ``Mixer(geometry, *, parameters)``: its hyper-parameters are the
    keyword-only parameters of ``__init__``, with a default each, which a spec names
    (``"gated_linear:window=64"``). It starts from the weights of the attention that it replaces
    (``initialise_from``). A class with a ``name`` is registered by being defined.

    A mixer that runs over ranks sets ``halo`` and defines ``transition`` and ``advance``. They obey a fourth
    law: for a sequence in two parts a and b, ``advance(state after a, transition(b))`` is the state after b.

    Parameters keep their names in the model's state dict: a mixer with a child ``q_proj`` in layer 3 has
    ``layers.3.self_attn.q_proj``, as the attention that it replaces.
    """

    name: ClassVar[str]  # for the report
    title: ClassVar[str] = ""  # as the paper calls it
    paper: ClassVar[str] = ""  # arXiv id
    from_geometry: ClassVar[bool] = False  # whether ``__init__`` takes a Geometry, so that a spec can name it
    # Whether outputs depend on the order of the tokens without RoPE.
    ordered: ClassVar[bool] = True
    # Whether a choice (a sign, the nearest of some vectors, the largest numbers) makes outputs jump: then
    # rounding may change some of them by much.
    discrete: ClassVar[bool] = False
    hidden_size: int  # numbers of a hidden state
    # Over how many earlier tokens of a row (none of them padding) the local parts of the state reach: the
    # inputs of a convolution, the keys of an exact window. None: the mixer does not run over ranks.
    halo: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            _REGISTRY[cls.name] = cls

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of one row's state tensors of constant size, without the batch dimension."""
        raise NotImplementedError(f"{type(self).__name__} does not say what shapes its state has.")

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of the state: float32, because rounding adds up over a sequence."""
        return torch.float32

    @property
    def growing(self) -> tuple[Growing, ...]:
        """The parts of the state that grow with the number of tokens: none by default."""
        return ()

    @property
    def layout(self) -> tuple[tuple[int, ...] | Growing, ...]:
        """The parts of a state in their order: those of constant size, those that grow, and, where some grow,
        the number of tokens of each row, [B] int64."""
        return (*self.state_shapes, *self.growing, *([()] if self.growing else []))

    @property
    def state_bytes(self) -> int:
        """Bytes of one row's state before its first token. Without growing parts they stay the same."""
        fixed = sum(map(math.prod, self.state_shapes)) * self.state_dtype.itemsize
        return fixed + (torch.int64.itemsize if self.growing else 0)

    def state_bytes_after(self, tokens: int) -> int:
        """Bytes of one row's state after ``tokens`` tokens."""
        return self.state_bytes + sum(part.bytes_after(tokens) for part in self.growing)

    def initial_state(self, batch: int, device: torch.device) -> State:
        """The state before the first token: zeros, and no entries in the parts that grow."""
        fixed = [torch.zeros((batch, *x), dtype=self.state_dtype, device=device) for x in self.state_shapes]
        grown = [torch.zeros((batch, 0, *x.shape), dtype=x.dtype, device=device) for x in self.growing]
        count = [torch.zeros(batch, dtype=torch.int64, device=device)] if grown else []
        return (*fixed, *grown, *count)

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

    def initialise_from(self, weights: Mapping[str, Tensor]) -> None:
        """Copy what can be used of the attention that this mixer replaces.

        weights: ``q_proj.weight`` [H * D, hidden], ``k_proj.weight`` and ``v_proj.weight`` [Hkv * D, hidden],
        ``o_proj.weight`` [hidden, H * D], and the biases, ``q_norm.weight`` and ``k_norm.weight`` where the
        attention has them. By default every tensor is copied for which this mixer has a parameter of the same
        name and shape.
        """
        own = dict(self.named_parameters())
        with torch.no_grad():
            for name, x in weights.items():
                if name in own and own[name].shape == x.shape:
                    own[name].copy_(x)

    @property
    def inner(self) -> Mixer | None:
        """A mixer whose outputs this one is computed from, and whose state stands first in that of this one;
        None by default. Over ranks, ``transition`` is called with the right state of the inner mixer, and
        returns nothing for it."""
        return None

    def skip(self, state: State, tokens: Tensor) -> State:
        """The state with ``tokens`` [B] int64 more tokens in its counts. By default the state, for a mixer
        that counts no tokens."""
        return state

    def transition(
        self, hidden: Tensor, state: State, mask: Tensor | None = None, rotary: Rotary | None = None
    ) -> Transition:
        """What hidden [B, T, hidden], a shard of a sequence, does to the state before it. mask, rotary: see
        ``forward``; a row may have no token that is not padding.

        state: right in its local parts (those that depend on the last ``halo`` tokens) and in its counts. Its
        other parts are unknown and must not be used.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no transition of a shard.")

    def shard(
        self, hidden: Tensor, state: State, mask: Tensor | None = None, rotary: Rotary | None = None
    ) -> tuple[Transition, Callable[[State], Tensor]]:
        """The ``transition`` of a shard, and a function that returns its outputs [B, T, hidden] by the state
        before it, right in all its parts. By default the function runs ``forward``; a mixer may define both
        together, so that what they share is computed once."""

        def outputs(before: State) -> Tensor:
            return type(self).forward(self, hidden, before, mask, rotary)[0]

        return self.transition(hidden, state, mask, rotary), outputs

    def advance(self, state: State, transition: Transition) -> State:
        """The state after a shard, by its ``transition`` and the state before it. Local parts and counts are
        those of the transition, which are right already."""
        raise NotImplementedError(f"{type(self).__name__} does not say how a transition changes a state.")
