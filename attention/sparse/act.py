"""ACT: attention sinks within the sequence give part of their attention to the other keys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..cost import Cost, Queries
from ..errors import FarspanError, SpecError
from ..index import BlockIndex, Index, Rescaled
from ..keys import Keys, State
from ..kv import KV
from ..method import AttentionMethod, LayerInfo, methods, require
from ..ops.block_sparse import block_sparse
from ..ops.flash import flash
from ..ops.scores import scores
from ..partial import add_sinks
from ..received import attention_received
from ..rescaled import HeadReads, attend_rescaled, of_heads
from ..softmax import Softmax
from ..summary import Summary

SINKS = "act_sinks"
_BLOCKS, _COUNTS, _SHAPE = "act_blocks", "act_counts", "act_shape"
_ALL = 1 << 40  # more queries than any call has
_PAIRS = 1 << 22  # of query and candidate looked at at a time
_ROUNDING = 1e-3  # of the threshold, by which a bound may be too low


@dataclass(frozen=True, kw_only=True)
class ACT(AttentionMethod):
    """Attention, calibrated: in chosen heads, the keys that draw attention without being the first one keep
    ``beta`` of it, and what a query reads besides them shares the rest (ACT, 2406.15765).

    A key t is a sink of a head where its column of the attention matrix A, of the queries of the call that
    see it, has a mean above ``threshold``; token 0 is none. Of each row, A of the sinks is multiplied by beta
    and the other entries grow in proportion until the row sums to 1 again. That is a weight on two partial
    results, sinks and others, as they are merged: no attention matrix is made.

    over: another prefill method, as in ``act:over=(sale:threshold=1)``, which estimates block maxima and
    whose attention is calibrated; without it attention is dense, and every column of a calibrated head is
    summed up. With it, only columns that could be sinks are: the mean of a column is no more than that of the
    maxima of the blocks it passes, a block counting by its queries. So no sink is missed where the maxima are
    true or too high. Rows are normalised over what they read. A recipe for it is its own ``recipe=``.

    heads: "chosen", those of the recipe, found by what each does to a text's likelihood when it alone is
    calibrated (``farspan calibrate --method act``); or "all". Layers ``first`` to ``last`` are calibrated, by
    default those of the paper's code for 32. Decode is dense.

    Law 1 holds for beta = 1 and for threshold = 1 alone, which change nothing of the attention calibrated.
    Law 3 does not hold: each chunk of a prompt is judged by its own queries. From the paper: heads are chosen
    by the likelihood of a text where it takes accuracy on its tasks; its code takes the first sink that it
    finds for token 0, here token 0 is meant.
    """

    name: ClassVar[str] = "act"
    title: ClassVar[str] = "ACT (attention calibration)"
    paper: ClassVar[str] = "2406.15765"
    lookahead: ClassVar[str] = "prompt"
    needs_recipe: ClassVar[bool] = True  # but not for all heads
    reads_keys: ClassVar[bool] = True

    over: AttentionMethod | None = None
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
        object.__setattr__(self, "needs_recipe", self.heads == "chosen")
        if self.over is not None and not _shows_maxima(type(self.over)):
            can = ", ".join(name for name, cls in methods().items() if _shows_maxima(cls))
            raise SpecError(
                f"act goes over a method that estimates block maxima, which is {can}; got over={self.over}: "
                "leave it out for dense attention, calibrated."
            )

    def for_layer(self, layer: LayerInfo) -> AttentionMethod | None:
        over, weights = self.over, layer.weights or {}
        if over is not None:
            inner = {n.removeprefix("over."): x for n, x in weights.items() if n.startswith("over.")}
            over = over.for_layer(replace(layer, weights=inner))
        if not self.first <= layer.index <= self.last:
            return over
        if self.heads == "all":
            return replace(self, over=over)
        if "heads" not in weights:
            raise FarspanError(
                f"act needs a recipe with the heads of layer {layer.index}: make one with 'farspan calibrate "
                "--method act' and pass recipe=PATH, or take heads=all."
            )
        chosen = layer.own(weights["heads"])
        if chosen.shape != (layer.num_heads,):
            raise FarspanError(
                f"This recipe has {len(chosen)} heads in layer {layer.index}, the model has "
                f"{layer.num_heads}: it was made for another model."
            )
        return replace(self, over=over, chosen=chosen.bool()) if bool(chosen.any()) else over

    def calibration(self, layer: LayerInfo, *, sure: float = 1.0) -> HeadSearch:
        """A head is chosen where calibrating it alone lowers the mean negative log-likelihood of the text's
        windows by more than ``sure`` standard errors of that mean; judged over dense attention."""
        return HeadSearch(self, layer, sure)

    def reads(self, queries: Queries) -> Cost:
        """Its own pairs are those of the method underneath, which selects once and shows its maxima once."""
        every = queries.raw_keys(queries.length)
        if self.over is None:
            return queries.cost(selection=every)
        under = self.over.reads(queries)
        return replace(under, selection=every + 2 * under.selection)

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
        """``act_sinks`` [B, H, Tk] bool, of each query head; what the method underneath finds, and what it
        selects for the whole call."""
        found, heads = {}, torch.arange(q.shape[1], device=q.device)
        if self.over is not None and self.over.last_queries:
            found = self.over.prepare_prefill(q[:, :, -self.over.last_queries :], keys)
        if self.chosen is not None:
            heads = heads[self.chosen.to(q.device)]
        keys.prepared = found
        index = None if self.over is None else self.over.select_prefill(q, keys)
        if isinstance(index, BlockIndex):
            means = self._means_of_candidates(q, keys, heads, index)
            shape = torch.tensor([keys.past, index.block_q, index.block_k])
            found = {**found, _BLOCKS: index.blocks, _COUNTS: index.counts, _SHAPE: shape}
        else:
            means = _means(q, keys, heads)
        sinks = torch.zeros(*q.shape[:2], keys.length, dtype=torch.bool, device=q.device)
        sinks[:, heads] = means > self.threshold
        sinks[..., 0] = False
        return {**found, SINKS: sinks}

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        sinks = keys.prepared[SINKS]
        read = None if self.over is None else self._read(self.over, q, keys, sinks.shape[2])
        return Rescaled(read=read, keys=sinks[..., : keys.length], factor=self.beta)

    def _read(self, over: AttentionMethod, q: Tensor, keys: Keys, total: int) -> BlockIndex | None:
        """What ``over`` selects: as prepare_prefill found it, where these are all the queries of its call, of
        ``total`` keys."""
        past, *shape = keys.prepared[_SHAPE].tolist() if _SHAPE in keys.prepared else [-1]
        if (past, total) == (keys.past, keys.length):
            blocks, counts = keys.prepared[_BLOCKS], keys.prepared[_COUNTS]
            return BlockIndex(blocks=blocks, counts=counts, block_q=shape[0], block_k=shape[1])
        index = over.select_prefill(q, keys)
        assert index is None or isinstance(index, BlockIndex)
        return index

    def _means_of_candidates(self, q: Tensor, keys: Keys, heads: Tensor, index: BlockIndex) -> Tensor:
        """``_means`` over what ``index`` names, 0 where the bound says that a key is no sink."""
        assert self.over is not None
        maxima, block_q, block_k = self.over.block_maxima(q, keys)
        bound = column_bound(maxima[:, heads].exp(), keys, block_q, block_k)
        likely = bound > self.threshold * (1 - _ROUNDING)
        likely[..., 0] = False
        means = torch.zeros_like(bound)
        keys.read_all_keys()
        group = q.shape[1] // keys.kv.num_kv_heads
        for b, i in likely.any(2).nonzero().tolist():
            h = heads[i : i + 1]
            one, kv = q[b : b + 1, h], keys.kv[b : b + 1, h // group]
            mine = of_heads(index, b, h, q.shape[1])
            lse = block_sparse(one, kv, mine, keys.softmax, check=False).lse[0, 0]
            columns = likely[b, i].nonzero()[:, 0]
            reads = HeadReads.of(mine, keys.past, keys.length)
            total = torch.zeros(len(columns), dtype=bound.dtype, device=q.device)
            for rows in _tiles(keys, len(columns)):
                logits = scores(one[:, :, rows - keys.past], kv[:, :, columns].k, keys.softmax)[0, 0, 0]
                share = (logits - lse[rows - keys.past, None]).exp()
                total += share.masked_fill(~reads.pairs(rows, columns), 0).sum(0)
            means[b, i, columns] = total / _watched(keys)[columns]
        return means


class HeadSearch:
    """``heads`` [H] bool, those to calibrate, and ``effects`` [H] float32, what calibrating each alone does
    to the mean negative log-likelihood, in nats per token, to first order.

    To first order the change is the product of the change of the head's output and the gradient in it, summed
    over the window: one forward and one backward call tell it for all heads of a model, where one call for
    each head would tell it exactly.
    """

    before_rope = False

    def __init__(self, method: ACT, layer: LayerInfo, sure: float) -> None:
        if not isinstance(sure, int | float) or not 0 <= sure < math.inf:
            raise FarspanError(f"act takes sure, a number of standard errors from 0 on; got sure={sure!r}.")
        self.settings: dict[str, Any] = {"sure": sure, "beta": method.beta, "threshold": method.threshold}
        self._method = replace(method, over=None, heads="all", chosen=None)
        self._sure, self._heads = sure, layer.num_heads
        self._served = method.first <= layer.index <= method.last
        self._change: Tensor | None = None  # of the window's output, [1, H, T, D]
        self._effects: list[Tensor] = []  # [H] of each window

    def observe(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax) -> None:
        self._change = None
        if softmax.window is not None or not self._served:
            return
        q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))
        keys = Keys(kv=KV(k, v), tq=q.shape[2], softmax=softmax)
        index = Rescaled(
            read=None, keys=self._method.prepare_prefill(q, keys)[SINKS], factor=self._method.beta
        )
        plain = flash(q, keys.kv, softmax)
        changed = attend_rescaled(q, keys, index, "auto")
        if softmax.sinks is not None:
            plain, changed = (add_sinks(part, softmax.sinks) for part in (plain, changed))
        self._change = changed.out - plain.out

    def observe_grad(self, gradient: Tensor) -> None:
        if self._change is not None:
            self._effects.append((gradient.to(self._change) * self._change).sum((0, 2, 3)).double().cpu())

    def weights(self) -> dict[str, Tensor]:
        if not self._effects:
            return {"heads": torch.zeros(self._heads, dtype=torch.bool), "effects": torch.zeros(self._heads)}
        effects = torch.stack(self._effects)  # [windows, H]
        mean, count = effects.mean(0), len(effects)
        error = effects.std(0) / count**0.5 if count > 1 else torch.zeros_like(mean)
        return {"heads": mean < -self._sure * error, "effects": mean.float()}


def _shows_maxima(cls: type[AttentionMethod]) -> bool:
    return cls.block_maxima is not AttentionMethod.block_maxima


def _watched(keys: Keys) -> Tensor:
    """[Tk]: how many queries of the call see each key."""
    return torch.arange(keys.length, 0, -1, device=keys.kv.device).clamp(max=keys.tq)


def _means(q: Tensor, keys: Keys, heads: Tensor) -> Tensor:
    """[B, n, Tk]: the mean of each column of the dense attention of query heads ``heads`` [n], over the
    queries that see its key."""
    kv = heads // (q.shape[1] // keys.kv.num_kv_heads)
    k = keys.read_all_keys()[:, kv]  # a KV head for each, as what is received is summed over its group
    own = Keys(kv=KV(k, k), tq=keys.tq, softmax=keys.softmax)
    return attention_received(q[:, heads], own, keys.length)[:, :, 0] / _watched(keys)


def column_bound(maxima: Tensor, keys: Keys, block_q: int, block_k: int) -> Tensor:
    """[B, n, Tk]: what the mean of each column, over the queries of the call that see its key, cannot exceed
    where ``maxima`` [B, n, Nq, Nk] are the largest entries of the blocks.

    That is the mean of the maxima of the blocks that the column passes, each counting by its queries that see
    the key. Of those in the query block where the key's own query stands that is a part, of all later ones
    the whole; so sums from each query block to the last are all it takes.
    """
    device, end = maxima.device, keys.length
    begins = torch.arange(keys.past, end, block_q, device=device)
    sizes = (end - begins).clamp(max=block_q)
    after = (maxima * sizes[:, None]).flip(2).cumsum(2).flip(2)  # of a query block and all later ones
    after = torch.nn.functional.pad(after, (0, 0, 0, 1))
    place = torch.arange(end, device=device)
    own = (place - keys.past).clamp(min=0) // block_q  # the query block it stands in, or the first
    part = begins[own] + sizes[own] - place.clamp(min=keys.past)
    col = place // block_k
    total = after[:, :, own + 1, col] + part * maxima[:, :, own, col]
    return total / _watched(keys)


def _tiles(keys: Keys, columns: int) -> Iterator[Tensor]:
    """The positions of the call's queries, as many at a time as may be looked at with so many columns."""
    step = max(1, _PAIRS // columns)
    for a in range(keys.past, keys.length, step):
        yield torch.arange(a, min(a + step, keys.length), device=keys.kv.device)
