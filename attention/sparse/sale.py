"""SALE: blocks kept where a four-bit estimate of some logit is large against what is read anyway."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocks import Grid
from ..cost import Cost, Queries
from ..errors import FarspanError, SpecError
from ..index import BlockIndex, Index
from ..keys import Keys
from ..kv import KV
from ..method import AttentionMethod, LayerInfo, require
from ..ops.block_sparse import block_sparse
from ..ops.flash import flash
from ..ops.int4_scores import int4_block_max
from ..ops.select import by_threshold
from ..partial import add_sinks
from ..softmax import Softmax
from ..summary import Int4Keys, Summary

DENSE = 1e-4  # a head with a threshold no higher is dense
_TILE = {"cpu": 1 << 20, "cuda": 1 << 26}  # logits of the first pass held at a time


@dataclass(frozen=True, kw_only=True)
class SALE(AttentionMethod):
    """Blocks of ``block_q`` queries and ``block_k`` keys in which the estimated attention of some pair is not
    small against that of the sink and the local keys (SALE, 2505.24179).

    First pass, exact: of the first block of keys and of those with the last ``local`` keys of a query block,
    each query's row max m and row sum l. Second: of all others the logits s with keys in four bits; a pair's
    relative attention score is exp(s - m) / l, and a block is read, besides those of the first pass, if for
    some pair it reaches the head's threshold tau. Compared are logarithms, s - (m + log l) and log tau.

    tau is calibrated per head (``farspan calibrate --method sale``) and comes in the recipe, or is
    ``threshold`` for all; a head with tau <= 1e-4 reads everything. So do queries that see no more than
    ``dense_below`` keys, wherever a prompt is cut (the authors': calls of no more than 1,024 queries).

    Keys are rounded around the mean of their block, which is added back exactly: the paper's mean of all keys
    changes with every new key. Queries keep their mean and are rounded to ``q_bits``, 8 where the paper has 4
    and subtracts the mean (None: not at all). Every pair is estimated, so there must be four-bit arithmetic
    for this to be fast; on the CPU there is none. Decode is dense.
    """

    name: ClassVar[str] = "sale"
    title: ClassVar[str] = "SALE"
    paper: ClassVar[str] = "2505.24179"
    lookahead: ClassVar[str] = "block_q - 1"
    needs_recipe: ClassVar[bool] = True  # but not with a threshold
    reads_keys: ClassVar[bool] = True

    threshold: float | None = None
    block_q: int = 64
    block_k: int = 32
    local: int = 128
    dense_below: int = 1024
    q_bits: int | None = 8
    recipe: str = ""
    log_tau: Tensor | None = field(default=None, repr=False, compare=False, metadata={"spec": False})

    def __post_init__(self) -> None:
        require(self, threshold=(0.0, None), block_q=(1, None), block_k=(1, None), dense_below=(0, None))
        require(self, local=(self.block_q, None))
        if self.q_bits not in (4, 8, None):
            raise SpecError(f"sale takes q_bits = 4, 8 or none; got {self.q_bits}.")
        object.__setattr__(self, "needs_recipe", self.threshold is None)

    def for_layer(self, layer: LayerInfo) -> AttentionMethod | None:
        if self.threshold is not None:
            tau = torch.full((layer.num_heads,), self.threshold)
        else:
            if layer.weights is None or "thresholds" not in layer.weights:
                raise FarspanError(
                    f"sale needs a recipe with thresholds for layer {layer.index}: make one with 'farspan "
                    "calibrate --method sale' and pass recipe=PATH, or give threshold= for all heads."
                )
            tau = layer.own(layer.weights["thresholds"])
        if tau.shape != (layer.num_heads,):
            raise FarspanError(
                f"This recipe has thresholds for {len(tau)} heads in layer {layer.index}, the model has "
                f"{layer.num_heads}: it was made for another model."
            )
        return self.with_thresholds(tau)

    def with_thresholds(self, tau: Tensor) -> SALE:
        """Serving heads with these thresholds [H]."""
        return replace(self, log_tau=torch.where(tau <= DENSE, 0, tau.double()).log())

    def calibration(self, layer: LayerInfo, *, start: float = 0.008, error: float = 0.4) -> ThresholdSearch:
        """Thresholds begin at ``start`` and are halved until a query's output is off dense attention's by
        less than ``error`` on average, the sum over its numbers.

        The defaults are the authors', for heads of 128 and prompts far longer than 4K. None ever exceeds
        ``start``: SmolLM2 reads 0.53 of 4K tokens so, and 0.29 from start=0.25, error=1.2."""
        return ThresholdSearch(self, layer, start, error)

    @property
    def block_multiple(self) -> int:
        return math.lcm(self.block_q, self.block_k)

    @property
    def summaries(self) -> tuple[Summary, ...]:
        return (Int4Keys(self.block_k),)

    def reads(self, queries: Queries) -> Cost:
        dense = self.threshold is not None and self.threshold <= DENSE
        if dense or self._covers(queries.length):
            return queries.cost()
        first_pass = queries.raw_keys(self.block_k + queries.length)
        return queries.cost(selection=first_pass + queries.entries(*self.summaries), exact=False)

    def _covers(self, length: int) -> bool:
        return length <= max(self.dense_below, self.block_k)

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        assert self.log_tau is not None, "for_layer was not called"
        if self._covers(keys.length) or not bool(self.log_tau.isfinite().any()):
            return None
        return self.keep(self.estimate(q, keys), keys)

    def estimate(self, q: Tensor, keys: Keys) -> Tensor:
        """The largest log of a relative attention score in each block, [1, H, Nq, Nk]; inf where the first
        pass has read it, -inf where nobody sees it."""
        largest, read = self._estimate(q, keys)
        return largest.masked_fill_(read, torch.inf)

    def block_maxima(self, q: Tensor, keys: Keys) -> tuple[Tensor, int, int]:
        """Estimates for all blocks, those of the first pass too: its row sum is no more than the whole, so
        that what rounding does to the logits is all that can make them too low."""
        return self._estimate(q, keys)[0].clamp_(max=0), self.block_q, self.block_k

    def _estimate(self, q: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """The largest log of a relative attention score in each block [1, H, Nq, Nk], and which blocks the
        first pass has read [Nq, Nk]."""
        grid = Grid.of(keys, self.block_q, self.block_k)
        near = (grid.end - self.local).clamp_(min=0) // self.block_k
        kept = Int4Keys(self.block_k)
        k4 = kept.keys(keys.summary(kept), keys.kv)
        largest = int4_block_max(
            q,
            k4,
            self._first_pass(q, keys, grid, near),
            keys.softmax,
            block_q=self.block_q,
            q_bits=self.q_bits,
        )
        return largest, grid.between(near, grid.last) | (grid.cols == 0)

    def keep(self, largest: Tensor, keys: Keys) -> BlockIndex:
        """What passes of ``estimate``'s."""
        assert self.log_tau is not None
        grid = Grid.of(keys, self.block_q, self.block_k)
        limit = self.log_tau.to(largest)[:, None].repeat(1, len(grid.end))
        limit[:, grid.end <= self.dense_below] = -torch.inf
        blocks, counts = by_threshold(largest, limit[None])
        return BlockIndex(blocks=blocks.int(), counts=counts, block_q=self.block_q, block_k=self.block_k)

    def _first_pass(self, q: Tensor, keys: Keys, grid: Grid, near: Tensor) -> Tensor:
        """m + log l [B, H, Tq] of each query over the first block and the blocks from ``near`` [Nq] on."""
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        device, rows, block, size = q.device, q.shape[2], self.block_q, self.block_k
        first = max(0, keys.past + 1 - self.local) // size * size
        k = torch.cat([keys.read_keys(0, size), keys.read_keys(first, keys.length)], 2)
        batch, hkv = k.shape[:2]
        q = pad(q, (0, 0, 0, -rows % block)).unflatten(1, (hkv, -1)).unflatten(3, (-1, block))
        k, q = k.flatten(0, 1), q.flatten(0, 1)  # the rows of a batch one below the other
        # Of each query block's keys the first block comes first, then as many as its near blocks can have.
        width = min(self.local + size - 1, keys.length)
        sink = torch.arange(size, device=device)
        step = max(1, _TILE.get(device.type, _TILE["cpu"]) // (grid.block_q * len(q) * q.shape[1] * width))
        parts = []
        for a in range(0, len(near), step):
            row = grid.begin[a : a + step, None] + torch.arange(block, device=device)  # [n, block_q]
            at = near[a : a + step, None] * size
            col = at + torch.arange(width, device=device)  # [n, width]
            place = torch.cat(
                [sink.expand(len(at), -1), (col - first).clamp_(max=keys.length - 1 - first) + size], 1
            )
            seen = torch.cat([sink.where(at > 0, keys.length), col], 1)[:, None] <= row[..., None]
            tile = (
                q[:, :, a : a + step].transpose(1, 2).to(wide) * keys.softmax.scale
            )  # [B Hkv, n, G, block_q, D]
            logits = tile.flatten(2, 3) @ k[:, place].to(wide).transpose(2, 3)
            if keys.softmax.softcap is not None:
                logits = logits.div_(keys.softmax.softcap).tanh_().mul_(keys.softmax.softcap)
            logits = logits.unflatten(2, (-1, block)).masked_fill_(~seen[:, None], -torch.inf)
            parts.append(logits.logsumexp(-1))
        return torch.cat(parts, 1).transpose(1, 2).flatten(2)[..., :rows].reshape(batch, -1, rows)


class ThresholdSearch:
    """``thresholds`` [H] float32, one per query head, 0 for a dense one: what all windows of a text allow."""

    before_rope = False

    def __init__(self, method: SALE, layer: LayerInfo, start: float, error: float) -> None:
        if not all(isinstance(x, int | float) and 0 < x < math.inf for x in (start, error)):
            raise FarspanError(
                f"sale takes start and error, finite numbers above 0; got start={start!r}, error={error!r}."
            )
        sizes = {name: getattr(method, name) for name in ("block_q", "block_k", "local", "q_bits")}
        self.settings: dict[str, Any] = {"start": start, "error": error, **sizes}
        self._method, self._error = method, error
        self._tau = torch.full((layer.num_heads,), start, dtype=torch.float64)
        self._seen: bool | None = None

    def observe(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax) -> None:
        if softmax.window is not None:
            return  # such a layer is left as it is
        # Queries that read everything whatever the thresholds are say nothing of these.
        skip = self._method.dense_below // self._method.block_q * self._method.block_q
        if q.shape[2] <= max(self._method.dense_below, self._method.local, self._method.block_k):
            self._seen = self._seen or False
            return
        self._seen = True
        keys = Keys(kv=KV(k, v), tq=q.shape[2], softmax=softmax)
        dense, sinks = flash(q, keys.kv, softmax), softmax.sinks
        if sinks is not None:
            dense = add_sinks(dense, sinks)
        largest, looking = self._method.estimate(q, keys), self._tau > 0
        while bool(looking.any()):
            index = self._method.with_thresholds(self._tau).keep(largest, keys)
            index = replace(index, counts=index.counts.masked_fill(~looking.to(q.device)[:, None], 0))
            part = block_sparse(q, keys.kv, index, softmax, check=False)
            if sinks is not None:
                part = add_sinks(part, sinks)
            off = (part.out.float() - dense.out.float())[0, :, skip:].abs().sum(-1).mean(-1).cpu()
            looking &= off >= self._error
            self._tau[looking] /= 2
            looking &= self._tau > DENSE
        self._tau[self._tau <= DENSE] = 0

    def weights(self) -> dict[str, Tensor]:
        if self._seen is False:
            raise FarspanError(
                f"sale is dense in windows of up to {self._method.dense_below} tokens and found no "
                "thresholds: give a longer text, more tokens or a larger window."
            )
        return {"thresholds": self._tau.float()}
