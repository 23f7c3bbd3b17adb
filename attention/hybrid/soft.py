"""SOFT: attention with a Gaussian kernel and no softmax, by a few landmarks."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d

from ..errors import SpecError
from ..ops.autocast import without_autocast
from .encoder import EncoderMixer, by_length
from .tokens import Tokens

_STEPS = 20  # of Newton's iteration


class Soft(EncoderMixer):
    """out = W_o (C A^+ C^T V), where C_ij = exp(-|q_i - m_j|^2 / 2) is the similarity of token i and
    landmark j, and A that of two landmarks (SOFT, 2110.11945).

    Queries are the keys; ``landmarks`` of them, or as many as a row has tokens, are means of equal parts of
    a row. A^+ is the pseudo-inverse by Newton's iteration, Z <- 2 Z - Z A Z, of 20 steps. So the similarity
    of all pairs of tokens is approximated, without a sum over keys that would divide it. It is not causal:
    landmarks are made of all tokens.

    Raises SpecError for heads that do not divide hidden_size and for landmarks below 1.
    """

    name: ClassVar[str] = "soft"
    title: ClassVar[str] = "SOFT"
    paper: ClassVar[str] = "2110.11945"

    def __init__(self, hidden_size: int, *, heads: int = 1, landmarks: int = 16) -> None:
        super().__init__()
        if heads < 1 or hidden_size % heads or landmarks < 1:
            raise SpecError(
                f"soft takes landmarks of at least 1 and heads that divide hidden_size {hidden_size}; got "
                f"{landmarks=}, {heads=}."
            )
        self.hidden_size, self.heads, self.landmarks = hidden_size, heads, landmarks
        self.qk_proj, self.v_proj, self.o_proj = (nn.Linear(hidden_size, hidden_size) for _ in range(3))

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = Tokens(hidden, mask, None)
        both = torch.cat([self.qk_proj(tokens.hidden), self.v_proj(tokens.hidden)], 2)
        both = both.to(torch.promote_types(both.dtype, torch.float32))
        return tokens.place(self.o_proj(by_length(both, tokens.count, self._attend).to(hidden.dtype)))

    @without_autocast
    def _attend(self, both: Tensor) -> Tensor:
        """Queries and values side by side, [B, T, 2 hidden], to [B, T, hidden]."""
        q, v = both.unflatten(2, (2 * self.heads, -1)).transpose(1, 2).chunk(2, 1)  # [B, heads, T, D]
        count = min(self.landmarks, q.shape[2])
        means = adaptive_avg_pool1d(q.mT.flatten(0, 1), count).mT.unflatten(0, q.shape[:2])
        c = similarity(q, means)
        out = c @ (newton_inverse(similarity(means, means)) @ (c.mT @ v))
        return out.transpose(1, 2).flatten(2)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """exp(-|a_i - b_j|^2 / 2): a [..., N, D], b [..., M, D] -> [..., N, M]."""
    return (-(a[..., :, None, :] - b[..., None, :, :]).square().sum(-1) / 2).exp()


def newton_inverse(a: Tensor) -> Tensor:
    """The pseudo-inverse of symmetric matrices [..., M, M] whose eigenvalues are not negative."""
    z = 2 * a / a.abs().sum(-1).amax(-1)[..., None, None] ** 2
    for _ in range(_STEPS):
        z = 2 * z - z @ a @ z
    return z
