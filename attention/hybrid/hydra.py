"""Hydra: a state-space mixer that reads a sequence in both directions, for encoders."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import SpecError
from ..ops.scan import scan
from .encoder import EncoderMixer

_EPS = 1e-5  # of the norm


class Hydra(EncoderMixer):
    """A quasiseparable mixer (arXiv 2407.09941): out = W_o (RMSNorm(M x) * SiLU(z)), with one matrix M [T, T]
    for each head:

        M_ij = C_(i-1) . B_j dt_j exp(A sum_(j < m < i) dt_m)        j < i    SSD, shifted by one token
        M_ii = (W_D x_i)_h + D_h                                     j = i
        M_ij = C'_(i+1) . B'_j dt'_j exp(A sum_(i < m < j) dt'_m)    j > i    the same from the right

    One projection gives z, x, and B, C, dt for each direction. x, B and C pass a depthwise convolution,
    centred on each token, and SiLU; dt = softplus(. + bias). A, the bias and D are numbers of a head, and
    both directions share A and the bias. Its cost is linear in T.

    expand: numbers of x per number of a hidden state. head_dim: numbers of a head of x. state: numbers of B
    and C. conv: tokens that the convolution spans.

    Raises SpecError for heads that do not divide x, for an even ``conv`` and for sizes below 1.
    """

    name: ClassVar[str] = "hydra"
    title: ClassVar[str] = "Hydra"
    paper: ClassVar[str] = "2407.09941"

    def __init__(
        self, hidden_size: int, *, expand: int = 2, head_dim: int = 64, state: int = 64, conv: int = 7
    ) -> None:
        super().__init__()
        width = expand * hidden_size
        if min(hidden_size, expand, head_dim, state, conv) < 1 or width % head_dim or conv % 2 == 0:
            raise SpecError(
                "Hydra takes sizes of at least 1, an odd conv, and a head_dim that divides expand * "
                f"hidden_size; got {expand=}, {hidden_size=}, {head_dim=}, {state=}, {conv=}."
            )
        self.hidden_size, self.width, self.head_dim, self.state = hidden_size, width, head_dim, state
        self.heads = heads = width // head_dim
        mixed = width + 4 * state  # x, and B and C of both directions
        self.in_proj = nn.Linear(hidden_size, width + mixed + 2 * heads, bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, conv, padding=conv // 2, groups=mixed)
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(step + (-(-step).expm1()).log())  # softplus of it is ``step``
        self.A_log = nn.Parameter(torch.zeros(heads))  # A = -1
        self.fc_D = nn.Linear(width, heads, bias=False)
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(width, eps=_EPS)
        self.out_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        z, mixed, dt = self.in_proj(hidden).split(
            [self.width, self.width + 4 * self.state, 2 * self.heads], 2
        )
        if mask is not None:
            # the convolution sees what it sees beyond the ends
            mixed = mixed.masked_fill(~mask[..., None], 0)
        mixed = F.silu(self.conv1d(mixed.transpose(1, 2)).transpose(1, 2))
        x, b, c, b_back, c_back = mixed.split([self.width, *[self.state] * 4], 2)

        def both(there: Tensor, back: Tensor) -> Tensor:  # one batch: the rows, and the rows from the right
            return torch.cat([there, back.flip(1)])

        dt = F.softplus(both(*dt.chunk(2, 2)).to(wide) + self.dt_bias.to(wide))  # [2B, T, heads]
        heads = x.unflatten(2, (self.heads, -1))
        values = both(heads, heads).to(wide) * dt[..., None]
        out, _ = scan(
            both(c, c_back)[:, None].to(wide),
            both(b, b_back)[:, None].to(wide),
            values.transpose(1, 2),
            (-self.A_log.to(wide).exp() * dt).transpose(1, 2),
            mask=None if mask is None else both(mask, mask),
        )
        there, back = F.pad(out, (0, 0, 1, 0))[:, :, :-1].transpose(1, 2).chunk(2)  # shifted by one token
        diagonal = (self.fc_D(x) + self.D).to(wide)
        y = there + back.flip(1) + heads.to(wide) * diagonal[..., None]
        return self.out_proj(self.norm(y.flatten(2).to(hidden.dtype)) * F.silu(z))
