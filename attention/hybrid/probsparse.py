"""ProbSparse attention: the queries that differ most among keys attend, the others take a mean."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import SpecError
from ..kv import KV
from ..ops import kernel
from ..softmax import Softmax
from .geometry import Geometry
from .growing import Growing, Places, places
from .mixer import Rotary, State
from .projections import Projected
from .query_measure import query_measure, sampled


class ProbSparse(Projected):
    """Query t of a head attends to its earlier keys and its own where its measure M_t is one of the
    largest; its output is the mean of these values otherwise (Informer's causal form, 2012.07436).

    M = max_j s_j - sum_j s_j / n over u(n) = factor * ceil(ln n) of the n keys that it may read, s being
    the scaled scores. A query attends if fewer than u(n) of the n - 1 queries before it measure as much.
    The choice has no gradient.

    Departures: the paper ranks all queries of a sequence, later ones too, and samples from all keys, so that
    the output of a token depends on the tokens behind it, which no language model may; the sampled keys are
    evenly spaced, where the paper draws them; the code of the paper has sums in place of means.

    The state is the keys and values of all tokens, the measures of all queries and the sum of the values.

    Raises SpecError for a factor below 1.
    """

    name: ClassVar[str] = "probsparse"
    title: ClassVar[str] = "ProbSparse attention (Informer)"
    paper: ClassVar[str] = "2012.07436"
    from_geometry: ClassVar[bool] = True
    ordered: ClassVar[bool] = False
    discrete: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, *, factor: int = 5) -> None:
        super().__init__(geometry)
        if factor < 1:
            raise SpecError(f"probsparse takes a factor of at least 1; got {factor}.")
        self.factor = factor

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.key_shape,)

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.promote_types(self.o_proj.weight.dtype, torch.float32)

    @property
    def growing(self) -> tuple[Growing, ...]:
        key = Growing(shape=self.key_shape, dtype=self.k_proj.weight.dtype)
        return key, key, Growing(shape=(self.geometry.num_heads,), dtype=self.state_dtype)

    def forward(
        self,
        hidden: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, State]:
        total, keys, values, measures, count = state or self.initial_state(len(hidden), hidden.device)
        at = places(count, mask, hidden.shape[1])
        q, k, v = self.project(torch.where(at.real[..., None], hidden, 0), rotary)
        sums = total[:, None] + torch.where(at.real[..., None, None], v, 0).to(total.dtype).cumsum(1)
        parts = self.growing
        keys, values = (
            part.append(x, new, at) for part, x, new in zip(parts, (keys, values), (k, v), strict=False)
        )
        q, seen = q.transpose(1, 2), at.position.clamp(min=0) + 1  # how many keys a query may read
        k, v = (pad(x, (0, 0, 0, 0, 0, int(x.shape[1] == 0))).transpose(1, 2) for x in (keys, values))
        measure = query_measure(q.detach(), k.detach(), seen, self.factor, self.geometry.softmax_scale)
        measures = parts[2].append(measures, measure.transpose(1, 2), at)
        exact = self._chosen(measure, measures, at)
        mean = (sums / seen[..., None, None]).transpose(1, 2).repeat_interleave(q.shape[1] // k.shape[1], 1)
        out = self._attend(q, k, v, exact, mean, at.position)
        out = self.o_proj(out.transpose(1, 2).flatten(2).to(hidden.dtype))
        return out, (sums[:, -1].clone(), keys, values, measures, at.end)

    def _chosen(self, measure: Tensor, measures: Tensor, at: Places) -> Tensor:
        """[B, H, T] bool: whether a query attends. measure: [B, H, T] of the call, measures: [B, n, H] of
        all."""
        index = torch.arange(measures.shape[1], device=measure.device)
        above = measures.transpose(1, 2)[:, :, None] >= measure[..., None]
        earlier = (index < at.position[..., None])[:, None]
        return (above & earlier).sum(3) < sampled(at.position + 1, self.factor)[:, None]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, exact: Tensor, mean: Tensor, position: Tensor
    ) -> Tensor:
        """``mean`` [B, H, T, D] with attention in the place of the queries that are ``exact`` [B, H, T]."""
        most = max(1, int(exact.sum(2).max()))
        at = exact.int().topk(most, 2).indices  # [B, H, m], some of them not exact where other rows have more
        full = at[..., None].expand(-1, -1, -1, q.shape[3])
        read = position[:, None].expand_as(exact).gather(2, at)
        seen = torch.arange(k.shape[2], device=q.device) <= read[..., None]
        folded = [kernel.fold_groups(x, k.shape[1]) for x in (q.gather(2, full), seen)]
        stored, softmax = KV(k.to(q.dtype), v.to(q.dtype)), Softmax(self.geometry.softmax_scale)
        part = kernel.attend(folded[0], stored, softmax, mask=folded[1], wide=True)
        out = kernel.unfold_groups(part, q.shape[1], most).out.to(mean.dtype)
        return mean.scatter(2, full, torch.where(exact.gather(2, at)[..., None], out, mean.gather(2, full)))
