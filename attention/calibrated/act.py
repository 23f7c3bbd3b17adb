"""ACT: attention sinks within the sequence give part of their attention to the other keys."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..block_maxima import EstimatesBlockMaxima
from ..calibration.act import HeadSearch
from ..checks import require
from ..cost import Cost, Queries
from ..errors import SpecError
from ..keys import Keys, State
from ..lookahead import Lookahead
from ..method import AttentionMethod, LayerInfo
from ..needs import Needs
from ..selection import BlockIndex, Index, Rescaled
from ..summary import Summary
from .columns import column_bound, column_means, column_means_of
from .kept_index import keep_index, kept_index

_SINKS = "act_sinks"
_ALL = 1 << 40  # more queries than any call has
_ROUNDING = 1e-3  # a bound may be too low by this share of the threshold


@dataclass(frozen=True, kw_only=True)
class ACT(AttentionMethod):
    """In chosen heads, attention sinks other than the first token keep ``beta`` of their attention, and the
    other keys of each query share the rest (ACT, 2406.15765).

    A key is a sink of a head where the mean of its column of the attention matrix, over the queries of the
    call that see it, is above ``threshold``; token 0 is never one. In each row the probabilities of sinks are
    multiplied by beta, and the others grow in proportion until the row sums to 1 again. This is a weight on
    two partial results, sinks and others, in their merge: no attention matrix is made.

    over: another prefill method whose attention is calibrated, as in ``act:over=(sale:threshold=1)``. It
    estimates block maxima, and only columns that can be sinks by ``column_bound`` are summed: no sink is
    missed where the maxima are true or too high. Rows are normalised over the keys that they read. Its recipe
    is its own ``recipe=``. Without ``over`` attention is dense and every column is summed.

    heads: "chosen", those of the recipe, which are found by their effect on a text's likelihood (``farspan
    calibrate --method act``); or "all". Layers ``first`` to ``last`` are calibrated, by default those of the
    paper's code for 32 layers. Decode is dense.

    Law 1 holds for beta = 1 and for threshold = 1, which change nothing. Law 3 does not hold: the sinks of
    each chunk of a prompt are found by its own queries. Other than in the paper, heads are chosen by the
    likelihood of a text instead of the accuracy on its tasks; its code takes the first sink that it finds for
    token 0.
    """

    name: ClassVar[str] = "act"
    title: ClassVar[str] = "ACT (attention calibration)"
    paper: ClassVar[str] = "2406.15765"

    over: EstimatesBlockMaxima | None = None
    beta: float = 0.4
    threshold: float = 0.1
    first: int = 2
    last: int = 30
    heads: str = "chosen"
    recipe: str = ""
    chosen: Tensor | None = field(default=None, repr=False, compare=False, metadata={"spec": False})

    def __post_init__(self) -> None:
        require(self, beta=(0.0, 1.0), threshold=(0.0, 1.0), heads=("chosen", "all"))
        require(self, first=(0, None), last=(self.first, None))
        if self.over is not None and not isinstance(self.over, EstimatesBlockMaxima):
            takes = "act goes over a method that estimates block maxima, such as sale"
            raise SpecError(f"{takes}; got over={self.over}: leave it out for dense attention, calibrated.")

    @property
    def lookahead(self) -> Lookahead:
        return Lookahead.prompt()

    @property
    def needs(self) -> Needs:
        """Its own, and those of ``over``, whose weights are the recipe's of ``over``."""
        under = Needs() if self.over is None else replace(self.over.needs, weights={})
        if self.heads == "all":
            return under | Needs(keys=True)
        return under | Needs(keys=True, weights={"heads": ("num_heads",)}, instead="take heads=all")

    def for_layer(self, layer: LayerInfo) -> AttentionMethod | None:
        inner = replace(layer, weights=layer.over_weights, over_weights=None)
        over = None if self.over is None else self.over.for_layer(inner)
        if not self.first <= layer.index <= self.last:
            return over
        if self.heads == "all":
            return replace(self, over=over)
        chosen = layer.own(layer.checked(self)["heads"])
        return replace(self, over=over, chosen=chosen.bool()) if bool(chosen.any()) else over

    def calibration(self, layer: LayerInfo, *, sure: float = 1.0) -> HeadSearch:
        """A head is chosen if calibrating it alone, over dense attention, lowers the mean negative
        log-likelihood of the text's windows by more than ``sure`` standard errors of that mean."""
        return HeadSearch(self, layer, sure)

    def reads(self, queries: Queries) -> Cost:
        """The pairs of the method underneath, which selects once and estimates its maxima once."""
        under = queries.cost() if self.over is None else self.over.reads(queries)
        return replace(under, selection=queries.raw_keys(queries.length) + 2 * under.selection)

    @property
    def block_multiple(self) -> int:
        return 1 if self.over is None else self.over.block_multiple

    @property
    def summaries(self) -> tuple[Summary, ...]:
        return () if self.over is None else self.over.summaries

    @property
    def last_queries(self) -> int:
        return _ALL

    @torch.no_grad()
    def prepare_prefill(self, q: Tensor, keys: Keys) -> State:
        """``act_sinks`` [B, H, Tk] bool, of each query head; what the method underneath prepares, and what it
        selects for the whole call."""
        found, heads = {}, torch.arange(q.shape[1], device=q.device)
        if self.over is not None and self.over.last_queries:
            found = self.over.prepare_prefill(q[:, :, -self.over.last_queries :], keys)
        if self.chosen is not None:
            heads = heads[self.chosen.to(q.device)]
        keys.prepared = found
        index = None if self.over is None else self.over.select_prefill(q, keys)
        if self.over is not None and isinstance(index, BlockIndex):
            bound = column_bound(self.over.block_maxima(q, keys), heads, keys)
            likely = bound > self.threshold * (1 - _ROUNDING)
            likely[..., 0] = False
            means = column_means_of(q, keys, heads, index, likely)
            found = found | keep_index(index, keys.past)
        else:
            means = column_means(q, keys, heads)
        sinks = torch.zeros(*q.shape[:2], keys.length, dtype=torch.bool, device=q.device)
        sinks[:, heads] = means > self.threshold
        sinks[..., 0] = False
        return found | {_SINKS: sinks}

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        sinks = keys.prepared[_SINKS]
        read: Index = None if self.over is None else kept_index(keys, sinks.shape[2])
        if read is None and self.over is not None:
            read = self.over.select_prefill(q, keys)
        assert read is None or isinstance(read, BlockIndex)
        return Rescaled(read=read, keys=sinks[..., : keys.length], factor=self.beta)
