"""PoNet for encoders: pooling over the whole text, its segments and three tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import SpecError
from .encoder import EncoderMixer
from .tokens import Tokens


class PoNetEncoder(EncoderMixer):
    """out_t = W_o ((g + S_t) ⊙ o_t + L_t) (PoNet, 2110.02442).

        g = sum_j softmax_j(mean(q) . k_j / sqrt(d)) k_j    of the whole row
        S_t = the largest s_j of t's segment, number by number
        L_t = the largest of l_(t-1), l_t, l_(t+1)

    q, k, s, l and o are projections of the hidden states; segments are ``segment`` tokens, counted from the
    row's first one, where the paper also has sentences. ``PoNet`` is the causal form.

    Raises SpecError for a segment below 1.
    """

    name: ClassVar[str] = "ponet_encoder"
    title: ClassVar[str] = "PoNet of an encoder"
    paper: ClassVar[str] = "2110.02442"

    def __init__(self, hidden_size: int, *, segment: int = 32) -> None:
        super().__init__()
        if segment < 1:
            raise SpecError(f"ponet_encoder takes segments of at least 1 token; got {segment}.")
        self.hidden_size, self.segment = hidden_size, segment
        self.in_proj = nn.Linear(hidden_size, 5 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens, length = Tokens(hidden, mask, None), hidden.shape[1]
        real = torch.ones_like(hidden[..., 0], dtype=torch.bool) if tokens.real is None else tokens.real
        wide = torch.promote_types(hidden.dtype, torch.float32)
        q, k, s, local, o = (x.to(wide) for x in self.in_proj(tokens.hidden).chunk(5, 2))
        hide = ~real[..., None]
        count = real.sum(1).clamp(min=1)[:, None]
        mean = q.masked_fill(hide, 0).sum(1) / count  # [B, hidden]
        scores = (k * mean[:, None]).sum(2, keepdim=True) / self.hidden_size**0.5
        weights = scores.masked_fill(hide, torch.finfo(wide).min).softmax(1)
        pooled = (weights * k).sum(1, keepdim=True)
        s, local = (x.masked_fill(hide, -torch.inf) for x in (s, local))
        rest = -length % self.segment
        segments = pad(s, (0, 0, 0, rest), value=-torch.inf).unflatten(1, (-1, self.segment)).amax(2)
        largest = segments.repeat_interleave(self.segment, 1)[:, :length]
        around = pad(local, (0, 0, 1, 1), value=-torch.inf)
        near = torch.stack([around[:, i : i + length] for i in range(3)]).amax(0)
        largest, near = (x.masked_fill(hide, 0) for x in (largest, near))  # of padding: -inf has no product
        y = (pooled + largest) * o + near
        return tokens.place(self.out_proj(y.to(hidden.dtype)))
