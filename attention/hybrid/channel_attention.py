"""Channel attention: channels attend to channels, by how they vary together over the tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..errors import SpecError
from ..ops.autocast import without_autocast
from .encoder import EncoderMixer
from .tokens import Tokens


class ChannelAttention(EncoderMixer):
    """out = W_o (V softmax(K^T Q τ)) of each head (cross-covariance attention, 2106.09681).

    Q, K and V are projections [T, D] without a bias; each channel of Q and K is scaled to length 1 over the
    tokens of the row, so that K^T Q [D, D] are cosines; the softmax is over the channels of K, and τ a
    learned number of each head, 1 at first. The cost is linear in T. A token's output depends on the others
    through these D^2 numbers alone.

    Raises SpecError for heads that do not divide hidden_size.
    """

    name: ClassVar[str] = "channel_attention"
    title: ClassVar[str] = "Channel attention (XCiT)"
    paper: ClassVar[str] = "2106.09681"

    def __init__(self, hidden_size: int, *, heads: int = 1) -> None:
        super().__init__()
        if heads < 1 or hidden_size % heads:
            raise SpecError(
                f"channel_attention takes heads that divide hidden_size {hidden_size}; got {heads}."
            )
        self.hidden_size, self.heads = hidden_size, heads
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.tau = nn.Parameter(torch.ones(heads))

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = Tokens(hidden, mask, None)  # its padding is 0, and so are its q, k and v
        parts = self.qkv_proj(tokens.hidden).unflatten(2, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4).to(torch.promote_types(parts.dtype, torch.float32))
        out = self._attend(q, k, v).transpose(1, 2).flatten(2)
        return tokens.place(self.o_proj(out.to(hidden.dtype)))

    @without_autocast
    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cosines = normalize(k, dim=2).mT @ normalize(q, dim=2)  # [B, heads, D of k, D of q]
        return v @ (cosines * self.tau.to(q)[:, None, None]).softmax(2)
