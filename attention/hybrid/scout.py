"""SCOUT: a linear mixer, and attention over every tenth token of what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import SpecError
from ..kv import KV
from ..ops import kernel
from ..ops.autocast import without_autocast
from ..partial import Partial, merge
from ..softmax import Softmax
from .geometry import Geometry
from .growing import places
from .kept_keys import KeepsKeys
from .mixer import Mixer, Rotary, State
from .registry import parse_mixer

_ROWS = 512  # queries whose mask is in memory at a time


class Scout(KeepsKeys):
    """A linear mixer m, then attention over checkpoints (arXiv 2509.00935): tokens 9, 19, 29, ... of a row,
    counted from its first token, not from its padding. A query reads the checkpoints strictly before it and
    itself in one softmax; a query that is a checkpoint reads itself once. Keys are rotated at the tokens'
    true positions.

    The published block is norm, m, + / norm, MLP, + / norm, checkpoint attention, + / norm, second MLP, +. In
    place of one layer's ``self_attn`` this mixer returns m(x) + attention(RMSNorm(x + m(x))) for the layer's
    normed hidden states x, which stand for the residual that it does not see; the block's first MLP is left
    out, the layer's own MLP is the second. With mixer=none it is the checkpoint attention alone: then two
    layers, m in the first and scout:mixer=none in the second, are the published block.

    The state is that of m, and keys and values [B, n, Hkv, D] of the checkpoints in the dtype of the weights:
    1 / every of the KV cache of the attention replaced.

    mixer: the spec of m, with a state of constant size; in parentheses where it has several parameters. The
    paper takes Mamba or a window of 1,024 tokens. every: tokens per checkpoint.

    Raises SpecError for ``every`` below 1 and for a mixer that is unknown or whose state grows.
    """

    name: ClassVar[str] = "scout"
    title: ClassVar[str] = "SCOUT"
    paper: ClassVar[str] = "2509.00935"
    from_geometry: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, *, mixer: str | None = "mamba2", every: int = 10) -> None:
        super().__init__(geometry)
        if every < 1:
            raise SpecError(f"scout takes every = at least 1 token per checkpoint; got {every}.")
        self.every = every
        if mixer is not None and mixer[:1] + mixer[-1:] == "()":
            mixer = mixer[1:-1]
        self.mixer = None if mixer is None else parse_mixer(mixer, geometry)
        self.norm = nn.Identity() if mixer is None else nn.RMSNorm(geometry.hidden_size, geometry.eps)
        self.halo = 0 if self.mixer is None or self.mixer.halo is not None else None
        if self.mixer is not None and self.mixer.growing:
            raise SpecError(
                f"scout takes a mixer whose state has a constant size; the state of {mixer} grows: take "
                "another, such as mamba2."
            )

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return () if self.mixer is None else self.mixer.state_shapes

    @property
    def state_dtype(self) -> torch.dtype:
        return super().state_dtype if self.mixer is None else self.mixer.state_dtype

    @property
    def inner(self) -> Mixer | None:
        return self.mixer

    def initial_state(self, batch: int, device: torch.device) -> State:
        own = super().initial_state(batch, device)
        return own if self.mixer is None else (*self.mixer.initial_state(batch, device), *own[-3:])

    def initialise_from(self, weights: Mapping[str, Tensor]) -> None:
        """Both parts begin with the attention's weights."""
        super().initialise_from(weights)
        if self.mixer is not None:
            self.mixer.initialise_from(weights)

    def forward(
        self,
        hidden: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, State]:
        *inner, keys, values, tokens = state or self.initial_state(len(hidden), hidden.device)
        mixed, after = self._mix(hidden, tuple(inner), mask, rotary)
        q, k, v = self.project(self.norm(hidden + mixed) if self.mixer else hidden, rotary)
        at = places(tokens, mask, hidden.shape[1])
        part, _ = self.growing
        keys, values = part.append(keys, k, at), part.append(values, v, at)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, heads, T, D]
        stored = KV(keys.transpose(1, 2).to(q.dtype), values.transpose(1, 2).to(q.dtype))
        outs = []
        for a in range(0, q.shape[2], _ROWS):
            rows = slice(a, a + _ROWS)
            outs.append(
                self._attend(q[:, :, rows], k[:, :, rows], v[:, :, rows], stored, at.position[:, rows])
            )
        out = self.o_proj(torch.cat(outs, 2).transpose(1, 2).flatten(2).to(hidden.dtype))
        return mixed + out if self.mixer else out, (*after, keys, values, at.end)

    def keys_of(
        self, hidden: Tensor, state: State, mask: Tensor | None, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        mixed, _ = self._mix(hidden, state[:-3], mask, rotary)
        return self.project(self.norm(hidden + mixed) if self.mixer else hidden, rotary)[1:]

    def _mix(
        self, hidden: Tensor, state: State, mask: Tensor | None, rotary: Rotary | None
    ) -> tuple[Tensor, State]:
        """The linear mixer's output and its state; zeros and () without one."""
        if self.mixer is None:
            return torch.zeros_like(hidden), ()
        if hidden.shape[1] == 1 and mask is None:
            out, state = self.mixer.step(hidden[:, 0], state, rotary)
            return out[:, None], state
        return self.mixer(hidden, state, mask, rotary)

    @without_autocast
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, stored: KV, position: Tensor) -> Tensor:
        """One softmax over the checkpoints before each query and the query itself: q [B, H, T, D], k, v of
        the same tokens [B, Hkv, T, D], position [B, T] -> [B, H, T, D]."""
        h, hkv, t = q.shape[1], k.shape[1], q.shape[2]
        group, scale = h // hkv, self.geometry.softmax_scale
        read = position // self.every  # how many checkpoints are before the query
        stored = stored[:, :, : max(0, int(read.max()))]
        seen = torch.arange(stored.length, device=q.device) < read[..., None]
        seen = seen.repeat(1, group, 1)[:, None]  # [B, 1, G * T, n]
        past = kernel.attend(kernel.fold_groups(q, hkv), stored, Softmax(scale), mask=seen, wide=True)
        past = kernel.unfold_groups(past, h, t)
        k, v = (x.to(past.out.dtype).repeat_interleave(group, 1) for x in (k, v))
        return merge(past, Partial(v, (q.to(k.dtype) * k).sum(-1) * scale)).out
