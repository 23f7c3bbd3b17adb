"""PoNet: pooling in place of attention, over the text, its segments and a few tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import SpecError
from ..partial import Partial
from .geometry import Geometry
from .mixer import Mixer, Rotary, State
from .prefix_softmax import prefix_softmax
from .tokens import Tokens, follow


class PoNet(Mixer):
    """out_t = W_o ((g_t + S_t) ⊙ o_t + L_t) (PoNet, 2110.02442, made causal).

        g_t = sum_(j <= t) softmax_j(mean(q_1 .. q_j) . k_j / sqrt(d)) k_j
        S_t = the largest s_j of the tokens j <= t of t's segment, number by number
        L_t = the largest of l_(t-2), l_(t-1), l_t

    q, k, s, l and o are projections of the hidden states; segments are ``segment`` tokens, counted from the
    row's first one, where the paper also has sentences. The paper's g is of the whole text, with the mean
    over all q; here each key is weighed by the mean at its own token, so that the state has a constant
    size: the sum of q, the softmax, the maxima of the open segment, the last two l and the number of
    tokens. ``PoNetEncoder`` is the paper's. Nothing of an attention's weights fits it.

    Raises SpecError for a segment below 1.
    """

    name: ClassVar[str] = "ponet"
    title: ClassVar[str] = "PoNet"
    paper: ClassVar[str] = "2110.02442"
    from_geometry: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, *, segment: int = 32) -> None:
        super().__init__()
        if segment < 1:
            raise SpecError(f"ponet takes segments of at least 1 token; got {segment}.")
        size = self.hidden_size = geometry.hidden_size
        self.segment = segment
        self.in_proj = nn.Linear(size, 5 * size)
        self.out_proj = nn.Linear(size, size)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        size = self.hidden_size
        return (size,), (1,), (1, size), (size,), (2, size), ()

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.promote_types(self.out_proj.weight.dtype, torch.float32)

    def initial_state(self, batch: int, device: torch.device) -> State:
        total, lse, g, largest, last, count = super().initial_state(batch, device)
        lse, largest, last = (torch.full_like(x, -torch.inf) for x in (lse, largest, last))
        return total, lse, g, largest, last, count

    def forward(
        self,
        hidden: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, State]:
        total, lse, g, largest, last, count = state or self.initial_state(len(hidden), hidden.device)
        tokens, wide = Tokens(hidden, mask, None), total.dtype
        length = hidden.shape[1]
        q, k, s, local, o = (x.to(wide) for x in self.in_proj(tokens.hidden).chunk(5, 2))
        number = count[:, None] + torch.arange(1, length + 1, device=hidden.device)
        sums = torch.cat([total[:, None], q], 1).cumsum(1)
        scores = (sums[:, 1:] / number[..., None] * k).sum(2) / self.hidden_size**0.5
        pooled, after = prefix_softmax(scores[:, None], k[:, None], Partial(g, lse), tokens.real)
        inside = ((number - 1) % self.segment).long()  # a token's place in its segment
        maxima = segment_maxima(torch.cat([largest[:, None], s], 1), inside)
        near, last = follow(last, local, tokens.count)
        peak = torch.stack([near[:, i : i + length] for i in range(3)]).amax(0)
        out = self.out_proj(((pooled[:, 0] + maxima[:, 1:]) * o + peak).to(hidden.dtype))
        total, largest = (follow(x[:, :1], x[:, 1:], tokens.count)[1][:, 0] for x in (sums, maxima))
        count = count + (length if tokens.count is None else tokens.count)
        return tokens.place(out), (total, after.lse, after.out, largest, last, count)


def segment_maxima(x: Tensor, inside: Tensor) -> Tensor:
    """Prefix maxima within segments: x [B, 1 + T, C], of which the first is the maximum of the segment that
    is open before the tokens; inside [B, T], the tokens' places in their segments. Log2(longest segment)
    steps."""
    reach, shift = inside.max(), 1
    while shift <= reach and shift < x.shape[1]:
        within = (inside >= shift)[..., None]
        earlier = torch.where(within[:, shift - 1 :], x[:, :-shift], -torch.inf)
        x = torch.cat([x[:, :shift], torch.maximum(x[:, shift:], earlier)], 1)
        shift *= 2
    return x
