"""A2Mamba in one dimension: each token reads an average of the states around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import SpecError
from ..ops.scan import scan
from .geometry import Geometry
from .mamba2 import Mamba2
from .mixer import Mixer, Rotary, State
from .tokens import Tokens, follow


class A2Mamba(Mixer):
    """Mamba-2 whose token t reads, in place of its own state, an average of the states of earlier tokens
    (A2Mamba's mixer, 2507.16624, causal and in one dimension):

        S̃_t = sum_(l in 0 .. w - 1) a_tl S_(t - l) / 2 + sum_(l in 0, r .. (w - 1) r) b_tl S_(t - l) / 2
        y_t = S̃_t^T C_t + D x_t, then as Mamba-2

    a_t and b_t are softmax maps of each head over its window of w = ``window`` tokens, and over every
    ``dilation`` = r-th token; both are of one query and one key. The paper's windows are of pixels around
    one and have no order. Before the first token states are zero, with the key zero. What the two maps are
    weighed by is our choice. y needs no state but for a scan of each lag with the queries of later tokens.
    The state of the scan is that of the token (w - 1) r before the last one, and what the tokens since then
    give to it is kept beside it.

    Raises SpecError for a window, a dilation or a conv below 1.
    """

    name: ClassVar[str] = "a2mamba"
    title: ClassVar[str] = "A2Mamba"
    paper: ClassVar[str] = "2507.16624"
    from_geometry: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, *, window: int = 3, dilation: int = 3, conv: int = 4) -> None:
        super().__init__()
        if min(window, dilation) < 1:
            raise SpecError(
                f"a2mamba takes a window and a dilation of at least 1; got {window=}, {dilation=}."
            )
        self.hidden_size = geometry.hidden_size
        self.mamba = Mamba2(geometry, conv=conv)
        self.heads, self.size = self.mamba.heads, geometry.head_dim
        self.windows = [range(window), range(0, window * dilation, dilation)]
        self.reach = (window - 1) * dilation
        self.map_proj = nn.Linear(self.hidden_size, 2 * self.heads * self.size, bias=False)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        kept = (self.reach, self.heads)
        return (*self.mamba.state_shapes, (*kept, self.size), (*kept, self.size), (*kept, self.size), kept)

    @property
    def state_dtype(self) -> torch.dtype:
        return self.mamba.state_dtype

    def forward(
        self,
        hidden: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, State]:
        before, conv, *kept = state or self.initial_state(len(hidden), hidden.device)
        tokens, length = Tokens(hidden, mask, None), hidden.shape[1]
        x, (conv,), given = self.mamba.inputs(tokens, (conv,))
        x = x.in_one_dtype()
        assert x.log_decay is not None
        asked, keys = (y.unflatten(2, (self.heads, -1)) for y in self.map_proj(tokens.hidden).chunk(2, 2))
        made = (keys, x.k.transpose(1, 2), x.v.transpose(1, 2), x.log_decay.transpose(1, 2))
        followed = [follow(a, b, tokens.count) for a, b in zip(kept, made, strict=True)]
        keys, k, v, g = (both.transpose(1, 2).contiguous() for both, _ in followed)  # [B, H, reach + T, ...]
        shares = self._shares(asked.transpose(1, 2), keys)
        entering = (x.q, *(y[:, :, :length] for y in (k, v, g)))
        after = scan(*entering, state=before, mask=tokens.real)[1]
        out = torch.zeros((), dtype=shares[0].dtype, device=hidden.device)
        for lag, share in shares.items():
            begin = self.reach - lag
            read = scan(pad(x.q, (0, 0, begin, lag)), k, v, g, state=before)[0][:, :, begin : begin + length]
            out = out + share[..., None] * read
        out = tokens.place(self.mamba.outputs(out.to(x.v.dtype), tokens, given))
        return out, (after, conv, *(last for _, last in followed))

    def _shares(self, q: Tensor, keys: Tensor) -> dict[int, Tensor]:
        """By lag, the share [B, H, T] of the state so many tokens ago. q: [B, H, T, d], keys: [B, H, reach
        + T, d]."""
        wide, length = self.state_dtype, q.shape[2]
        found: dict[int, Tensor] = {}
        for lags in self.windows:
            scores = [
                (q * keys[:, :, self.reach - lag : self.reach - lag + length]).to(wide).sum(3) for lag in lags
            ]
            for lag, share in zip(lags, (torch.stack(scores) / self.size**0.5).softmax(0) / 2, strict=True):
                found[lag] = found[lag] + share if lag in found else share
        return found

    def initialise_from(self, weights: Mapping[str, Tensor]) -> None:
        self.mamba.initialise_from(weights)
