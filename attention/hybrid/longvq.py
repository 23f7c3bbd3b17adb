"""LongVQ: attention to a codebook that stands for all earlier keys, and to a window of the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, silu

from ..errors import SpecError
from ..ops.autocast import without_autocast
from ..partial import Partial, merge
from .gated_norm import ONE
from .geometry import Geometry
from .mixer import Rotary, State
from .moving_average import moving_average
from .projections import Projected
from .scan_mixer import Recurrence, run
from .straight_through import straight_through
from .tokens import Tokens, follow
from .window import window_attention


class LongVQ(Projected):
    """One softmax over the last w keys and, for all earlier ones, over the ``codes`` vectors c of a codebook
    (LongVQ, 2404.11163), with a gate:

        out = W_o (a ⊙ SiLU(G x)), a = attention with keys k_j in the window and c_z(j) before it

    z(j) is the code nearest to k_j. A code's number of tokens and the sum of their values are all that is
    kept of them, so that the state is of constant size. Keys are projected from an exponential moving
    average of the hidden states, with a learned decay of each channel, queries and values from the hidden
    states themselves.

    The paper's details that we have not verified, and our choices: one codebook for each KV head, learned
    like any weight; the gradient of the choice of a code is that of softmax(-|k - c|^2) (straight-through);
    keys enter the codebook as they leave the window; no RoPE, and no bias by distance in the window. From
    attention it begins without the average and with gates of 1.

    Raises SpecError for codes or a window below 1.
    """

    name: ClassVar[str] = "longvq"
    title: ClassVar[str] = "LongVQ"
    paper: ClassVar[str] = "2404.11163"
    from_geometry: ClassVar[bool] = True
    discrete: ClassVar[bool] = True
    rotates = False

    def __init__(self, geometry: Geometry, *, codes: int = 64, window: int = 32) -> None:
        super().__init__(geometry)
        if min(codes, window) < 1:
            raise SpecError(f"longvq takes codes and a window of at least 1; got {codes=}, {window=}.")
        self.window = window
        self.codebook = nn.Parameter(torch.randn(geometry.num_kv_heads, codes, geometry.head_dim))
        self.decay = nn.Parameter(torch.linspace(-2, 2, geometry.hidden_size))  # sigmoid of it: what is kept
        self.gate = nn.Linear(geometry.hidden_size, self.o_proj.in_features)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        heads, codes, size = self.codebook.shape
        kept = (self.window, heads, size)
        return (self.hidden_size,), (heads, codes, size + 1), kept, kept, (1,)

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
        average, sums, *window, seen = state or self.initial_state(len(hidden), hidden.device)
        tokens, length, n = Tokens(hidden, mask, None), hidden.shape[1], self.window
        x, keep = tokens.hidden.to(average.dtype), self.decay.to(average.dtype).sigmoid()
        smooth = moving_average(x, average, keep)
        average = follow(average[:, None], smooth, tokens.count)[1][:, 0]
        q, *made = self.project(tokens.hidden, None, smooth.to(hidden.dtype))
        followed = [follow(a, b, tokens.count) for a, b in zip(window, made, strict=True)]
        q, keys, values = (y.transpose(1, 2).to(average.dtype) for y in (q, *(both for both, _ in followed)))
        exact = window_attention(q, keys, values, scale=self.geometry.softmax_scale, valid=seen[:, 0])
        left = torch.arange(length, device=hidden.device) >= n - seen  # whether a token leaves the window
        coded = self._nearest(keys[:, :, :length]) * left[:, None, :, None]
        values = torch.cat([values[:, :, :length], torch.ones_like(values[:, :, :length, :1])], 3)
        past, sums = self._of_codes(q, coded, values, sums, tokens.real)
        y = merge(exact, past).out.transpose(1, 2).flatten(2).to(hidden.dtype)
        seen = (seen + (length if tokens.count is None else tokens.count[:, None])).clamp(max=n)
        out = tokens.place(self.o_proj(y * silu(self.gate(tokens.hidden))))
        return out, (average, sums, *(after for _, after in followed), seen)

    @without_autocast
    def _nearest(self, k: Tensor) -> Tensor:
        """k [B, Hkv, T, D] -> 1 at the nearest code, 0 elsewhere, [B, Hkv, T, codes]."""
        apart = (k[..., None, :] - self.codebook.to(k)[:, None]).square().sum(-1)
        return straight_through(one_hot(apart.argmin(3), apart.shape[3]).to(k), (-apart).softmax(3))

    @without_autocast
    def _of_codes(
        self, q: Tensor, coded: Tensor, values: Tensor, sums: Tensor, real: Tensor | None
    ) -> tuple[Partial, Tensor]:
        """Attention of q [B, H, T, D] to the codes, each as often as it has tokens, and the sums after
        them."""
        codes = self.codebook.to(q).repeat_interleave(q.shape[1] // len(self.codebook), 0)
        logits = q @ codes.mT * self.geometry.softmax_scale
        most = logits.detach().amax(3)
        out, sums = run(Recurrence((logits - most[..., None]).exp(), coded, values, None), sums, real)
        total = out[..., -1]
        none = total <= 0
        safe = total.masked_fill(none, 1)
        lse = (safe.log() + most).masked_fill(none, -torch.inf)
        return Partial(out[..., :-1] / safe[..., None], lse), sums

    def initialise_from(self, weights: Mapping[str, Tensor]) -> None:
        super().initialise_from(weights)
        nn.init.constant_(self.decay, -8)
        nn.init.zeros_(self.gate.weight), nn.init.constant_(self.gate.bias, ONE)
