"""The Routing Transformer as trained: shared queries and keys, and centroids learned beside them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize

from ..errors import SpecError
from ..kv import KV
from ..ops import kernel
from ..ops.autocast import without_autocast
from ..softmax import Softmax
from .geometry import Geometry
from .growing import Growing, places
from .mixer import Mixer, Rotary, State
from .straight_through import with_loss

_ROWS = 256  # queries whose scores are in memory at a time


class RoutingFull(Mixer):
    """A token belongs to the centroid with the largest x . mu and reads the ``w`` tokens with the largest x
    . mu of this centroid (Routing Transformer, 2003.05997). One projection gives its query and its key, x,
    behind a LayerNorm without scale.

    Each head has ``clusters`` centroids, random vectors of length 1 at first. They and the tokens' vectors,
    scaled to length 1, are drawn together by ``commitment`` times the mean squared distance of a token and
    its centroid. ``with_loss`` adds that loss in training: there is no other gradient of the choice.

    Departures: a query reads itself and the top w - 1 of the tokens before it, where each centroid of the
    paper takes its top w of the whole sequence, later tokens too, and a token in no cluster gets nothing.
    Centroids follow the gradient of that loss, where the paper moves means in the forward pass. All heads
    route; the paper has heads with a window beside them. No RoPE. The state is keys and values of all query
    heads and all tokens.

    Raises SpecError for clusters or w below 1, and for a commitment below 0.
    """

    name: ClassVar[str] = "routing_full"
    title: ClassVar[str] = "Routing Transformer, as trained"
    paper: ClassVar[str] = "2003.05997"
    from_geometry: ClassVar[bool] = True
    ordered: ClassVar[bool] = False
    discrete: ClassVar[bool] = True

    def __init__(
        self, geometry: Geometry, *, clusters: int = 16, w: int = 64, commitment: float = 1e-4
    ) -> None:
        super().__init__()
        if min(clusters, w) < 1 or not 0 <= commitment < torch.inf:
            raise SpecError(
                "routing_full takes clusters and w of at least 1 and a commitment of at least 0; got "
                f"{clusters=}, {w=}, {commitment=}."
            )
        size, heads = geometry.head_dim, geometry.num_heads
        self.hidden_size, self.shape = geometry.hidden_size, (heads, size)
        self.w, self.commitment, self.scale = w, commitment, geometry.softmax_scale
        self.qk_proj, self.v_proj = (
            nn.Linear(self.hidden_size, heads * size, geometry.bias) for _ in range(2)
        )
        self.o_proj = nn.Linear(heads * size, self.hidden_size, geometry.out_bias)
        self.centroids = nn.Parameter(normalize(torch.randn(heads, clusters, size), dim=2))

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ()

    @property
    def growing(self) -> tuple[Growing, ...]:
        return (Growing(shape=self.shape, dtype=self.qk_proj.weight.dtype),) * 2

    def forward(
        self,
        hidden: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, State]:
        keys, values, tokens = state or self.initial_state(len(hidden), hidden.device)
        at = places(tokens, mask, hidden.shape[1])
        hidden = torch.where(at.real[..., None], hidden, 0)
        x, v = (p(hidden).unflatten(2, self.shape) for p in (self.qk_proj, self.v_proj))
        x = layer_norm(x, self.shape[1:]).to(v.dtype)
        part, _ = self.growing
        keys, values = part.append(keys, x, at), part.append(values, v, at)
        q, k, v = (y.transpose(1, 2) for y in (x, keys, values))
        cluster, loss = self._cluster(q, at.real)
        near = self._near(k)
        outs = []
        for i in range(0, q.shape[2], _ROWS):
            read = self._read(near, cluster[:, :, i : i + _ROWS], at.position[:, i : i + _ROWS])
            stored = KV(k.to(q.dtype), v.to(q.dtype))
            outs.append(kernel.attend(q[:, :, i : i + _ROWS], stored, Softmax(self.scale), mask=read).out)
        out = self.o_proj(torch.cat(outs, 2).transpose(1, 2).flatten(2).to(hidden.dtype))
        return with_loss(out, loss) if self.training else out, (keys, values, at.end)

    @without_autocast
    def _near(self, x: Tensor) -> Tensor:
        """x . mu of x [B, H, n, D] and all centroids, [B, H, C, n]. It has no gradient."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.centroids.detach().to(wide) @ x.detach().to(wide).mT

    def _cluster(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """The centroid [B, H, T] of each of x [B, H, T, D], and their loss over the tokens that are
        ``real``."""
        cluster = self._near(x).argmax(2)
        heads = torch.arange(x.shape[1], device=x.device)[:, None]
        mine = self.centroids[heads, cluster].to(torch.promote_types(x.dtype, torch.float32))
        apart = (normalize(x.to(mine.dtype), dim=3) - mine).square().sum(3)
        return cluster, self.commitment * (apart * real[:, None]).sum() / (real.sum() * x.shape[1]).clamp(
            min=1
        )

    def _read(self, near: Tensor, cluster: Tensor, position: Tensor) -> Tensor:
        """[B, H, T, n] bool: the keys that queries of ``cluster`` [B, H, T] at ``position`` [B, T] read."""
        index = torch.arange(near.shape[3], device=near.device)
        scores = near.gather(2, cluster[..., None].expand(-1, -1, -1, len(index)))
        seen = (index <= position[..., None])[:, None]
        own = (index == position[..., None])[:, None]
        scores = scores.masked_fill(~seen, -torch.inf).masked_fill(own, torch.inf)
        best = scores.topk(min(self.w, len(index)), 3).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(3, best, True) & seen
