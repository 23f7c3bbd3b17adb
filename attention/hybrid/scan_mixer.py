"""The base of mixers that are a scan between computations on each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.scan import scan, scan_step
from .mixer import Rotary, State, Transition
from .passing import scan_advance, scan_transition
from .projections import Projected
from .tokens import Tokens


class Recurrence(NamedTuple):
    """The arguments of ``scan``. k, v, log_decay and beta may have fewer heads than q: then each is shared by
    a group of heads of q, as keys and values are in attention, and so is its state."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None = None
    scale: float = 1.0

    def in_one_dtype(self) -> Recurrence:
        """q and k in the dtype of v, which kernels need: under autocast, norms and softmax return float32."""
        return self._replace(q=self.q.to(self.v.dtype), k=self.k.to(self.v.dtype))


Local = tuple[Tensor, ...]


class ScanMixer(Projected):
    """``inputs`` -> scan -> ``outputs``. Nothing but the scan and the local states looks at other tokens.

    The state is the scan's state [Hs, Dk, Dv] of each row, and the local states: what the mixer keeps of its
    last ``halo`` tokens.
    """

    halo = 0

    @property
    def scan_shape(self) -> tuple[int, int, int]:
        """The shape of one row's state of the scan."""
        return self.geometry.num_kv_heads, self.key_dim, self.value_dim

    @property
    def local_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of one row's local states. By default there are none."""
        return ()

    def inputs(self, tokens: Tokens, local: Local) -> tuple[Recurrence, Local, Local]:
        """The scan's arguments, the local states after the tokens, and what ``outputs`` is called with.
        local: the local states before the tokens."""
        raise NotImplementedError(f"{type(self).__name__} defines no inputs of its scan.")

    def outputs(self, out: Tensor, tokens: Tokens, kept: Local) -> Tensor:
        """out [B, H, T, Dv] of the scan -> [B, T, hidden]."""
        raise NotImplementedError(f"{type(self).__name__} defines no outputs.")

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.scan_shape, *self.local_shapes)

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.promote_types(self.o_proj.weight.dtype, torch.float32)

    def forward(
        self,
        hidden: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, State]:
        before, *local = state or self.initial_state(hidden.shape[0], hidden.device)
        tokens = Tokens(hidden, mask, rotary)
        recurrence, after, kept = self.inputs(tokens, tuple(local))
        out, s = run(recurrence.in_one_dtype(), before, tokens.real)
        return tokens.place(self.outputs(out, tokens, kept)), (s, *after)

    def transition(
        self, hidden: Tensor, state: State, mask: Tensor | None = None, rotary: Rotary | None = None
    ) -> Transition:
        return self.shard(hidden, state, mask, rotary)[0]

    def shard(
        self, hidden: Tensor, state: State, mask: Tensor | None = None, rotary: Rotary | None = None
    ) -> tuple[Transition, Callable[[State], Tensor]]:
        tokens = Tokens(hidden, mask, rotary)
        x, after, kept = self.inputs(tokens, state[1:])
        x = x.in_one_dtype()

        def outputs(before: State) -> Tensor:
            return tokens.place(self.outputs(run(x, before[0], tokens.real)[0], tokens, kept))

        change = scan_transition(x.k, x.v, x.log_decay, beta=x.beta, mask=tokens.real)
        return (*change, *after), outputs

    def advance(self, state: State, transition: Transition) -> State:
        change, own, *local = transition
        return (scan_advance(state[0], change, own), *local)

    def first_sizes(self) -> Tensor:
        """[H]: the root mean squares with which normalised heads begin in the place of attention: a fiftieth
        of those of their values for white hidden states. What an untrained scan adds is noise, and heads as
        large as values raise the loss far above that of the model without the layer."""
        g = self.geometry
        size = self.v_proj.weight.detach().unflatten(0, (g.num_kv_heads, -1)).square().sum(2).mean(1).sqrt()
        return size.repeat_interleave(g.num_heads // g.num_kv_heads) / 50


def run(x: Recurrence, state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scan, or one step of it for a token without padding -> (out [B, H, T, Dv], the state after it)."""
    if mask is None and x.q.shape[2] == 1:
        q, k, v = (y[:, :, 0] for y in (x.q, x.k, x.v))
        g, beta = (None if y is None else y[:, :, 0] for y in (x.log_decay, x.beta))
        out, state = scan_step(q, k, v, g, state=state, beta=beta, scale=x.scale)
        return out[:, :, None], state
    group = x.q.shape[1] // x.k.shape[1]

    def spread(y: Tensor) -> Tensor:  # over the heads of q that share it
        return y.repeat_interleave(group, 1) if group > 1 else y

    k, v, state = spread(x.k), spread(x.v), spread(state)
    g, beta = (None if y is None else spread(y) for y in (x.log_decay, x.beta))
    out, state = scan(x.q, k, v, g, beta=beta, scale=x.scale, state=state, mask=mask)
    return out, state[:, ::group].contiguous()
