"""PBS-Attn: keys sorted by importance within segments, so that fewer blocks hold what a query block needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..cost import Cost, Queries
from ..errors import SpecError
from ..gqa import reduce_group
from ..index import BlockIndex, Index
from ..keys import Keys, State
from ..method import AttentionMethod, require
from ..ops.pool import pool
from ..ops.rows import gather_rows
from ..ops.scores import scores
from ..ops.select import by_mass, by_threshold
from ..received import attention_received

_TILE = 1 << 21  # antidiagonal probabilities held at a time


@dataclass(frozen=True, kw_only=True)
class PBS(AttentionMethod):
    """Block-sparse attention over keys in another order (PBS-Attn, 2510.21270).

    Within each complete segment of S = ``segment`` keys, keys and values are put in order of their
    importance, highest first: the mean attention that the call's last b = ``block`` queries pay them. Blocks
    of b queries and of b keys so ordered are scored as softmax(q_mean . k_mean / sqrt(D)) over the blocks of
    earlier segments, and the smallest set that holds ``mass`` of it is read, besides the block with token 0
    and, whole, the query block's own segment (both segments where a cache has put the query blocks off the
    segments' grid). What a query sees goes by position, never by order.

    select: "mean", or "antidiagonal" for XAttention's scores (2503.16428) in the new order: the softmax over
    sums of q . k along every ``stride``-th antidiagonal, added up per block.
    gqa_reduce: whether the heads of a group have one order and one selection, by the "sum" or the "max" of
    their importances and scores, or each its own ("none", the paper's, which repeats keys to query heads).

    The importances need every raw key: they are read once for them, in ``prepare_prefill``, and once for the
    means of the sorted blocks. A chunk of a prompt is judged by its own last queries, so that chunks read
    other keys than the prompt whole would (law 3 does not hold): each chunk the definition's. The official
    code has no causal mask in the importances and leaves the keys after the last complete segment out of
    their softmax, and pools a last query block that is not full as if zeros filled it; here all of that is
    exact.
    """

    name: ClassVar[str] = "pbs"
    title: ClassVar[str] = "PBS-Attn"
    paper: ClassVar[str] = "2510.21270"
    lookahead: ClassVar[str] = "prompt"
    reads_keys: ClassVar[bool] = True

    mass: float = 0.9
    block: int = 128
    segment: int = 256
    select: str = "mean"
    stride: int = 16
    gqa_reduce: str = "none"

    def __post_init__(self) -> None:
        require(self, mass=(1e-6, 1.0), block=(1, None), segment=(1, None), stride=(1, None))
        require(self, select=("mean", "antidiagonal"), gqa_reduce=("sum", "max", "none"))
        if self.segment % self.block:
            raise SpecError(
                f"pbs takes a segment of whole blocks; got segment={self.segment}, block={self.block}."
            )
        if self.select == "antidiagonal" and self.block % self.stride:
            raise SpecError(
                f"pbs takes a stride that divides the block; got stride={self.stride}, block={self.block}."
            )

    @property
    def block_multiple(self) -> int:
        return self.segment

    @property
    def last_queries(self) -> int:
        return self.block

    def reads(self, queries: Queries) -> Cost:
        if self._covers(queries.length):
            return queries.cost()
        return queries.cost(selection=queries.raw_keys(2 * queries.length), exact=False)

    def _covers(self, length: int) -> bool:
        return self.mass == 1 or length <= self.segment

    def prepare_prefill(self, q: Tensor, keys: Keys) -> State:
        """order [1, Hs, W] int32, of the W keys in complete segments; means [1, Hs, W / b, D] of its
        blocks."""
        whole = keys.length // self.segment * self.segment
        if self._covers(keys.length):
            return {}
        weight = attention_received(q, keys, keys.length)  # [1, Hkv, G, Tk]
        ranked = reduce_group(weight, self.gqa_reduce)[..., :whole].unflatten(2, (-1, self.segment))
        order = ranked.sort(dim=-1, descending=True, stable=True).indices
        order += torch.arange(0, whole, self.segment, device=q.device)[:, None]
        found = {"order": order.flatten(2).int()}
        if self.select == "mean":
            found["means"] = pool(self._sorted(keys, found["order"]), self.block, mode="mean")
        return found

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        block, per, device = self.block, self.segment // self.block, q.device
        tq, length = q.shape[2], keys.length
        nq, nk = -(-tq // block), -(-length // block)
        most = (keys.past + (nq - 1) * block) // self.segment * per  # key blocks of earlier segments
        if self.mass == 1 or most == 0:
            return None
        begins = keys.past + torch.arange(nq, device=device) * block
        first_own = begins // self.segment * per
        last_own = (torch.clamp(begins + block, max=length) - 1) // self.segment * per + per - 1
        cols = torch.arange(nk, device=device)
        earlier = cols[:most] < first_own[:, None]  # [Nq, most]
        whole = length // self.segment * self.segment
        order = keys.prepared["order"][..., :whole]
        estimate = self._mean_scores if self.select == "mean" else self._antidiagonal_scores
        chosen, counts = by_mass(estimate(q, keys, order[..., : most * block], earlier), self.mass)
        chosen = chosen.masked_fill(torch.arange(chosen.shape[3], device=device) >= counts[..., None], nk)
        read = torch.zeros(*counts.shape, nk + 1, dtype=torch.bool, device=device).scatter_(3, chosen, True)
        holds_first = cols == (order[..., : self.segment] == 0).int().argmax(-1, keepdim=True) // block
        own = (cols >= first_own[:, None]) & (cols <= last_own[:, None])
        read = read[..., :nk] | own | holds_first[:, :, None]
        blocks, counts = by_threshold(read.float(), 0.5)
        rest = torch.arange(whole, length, device=device, dtype=order.dtype).expand(*order.shape[:2], -1)
        return BlockIndex(
            blocks=blocks.int(),
            counts=counts,
            block_q=block,
            block_k=block,
            key_order=torch.cat([order, rest], 2),
        )

    def _sorted(self, keys: Keys, order: Tensor) -> Tensor:
        """The keys in another order, [1, Hs, W, D]."""
        k = keys.read_all_keys()
        hkv = k.shape[1]
        parts = [gather_rows(k, part) for part in order.unflatten(1, (hkv, -1)).unbind(2)]
        return torch.stack(parts, 2).flatten(1, 2)

    def _mean_scores(self, q: Tensor, keys: Keys, order: Tensor, earlier: Tensor) -> Tensor:
        """[1, Hs, Nq, most]: each head's share of its attention over the blocks of earlier segments."""
        means = keys.prepared["means"][:, :, : earlier.shape[1]]
        logits = scores(pool(q, self.block, mode="mean"), means, keys.softmax)
        shares = torch.softmax(logits.masked_fill_(~earlier, -torch.inf), -1).masked_fill_(~earlier, 0)
        return reduce_group(shares, self.gqa_reduce)

    def _antidiagonal_scores(self, q: Tensor, keys: Keys, order: Tensor, earlier: Tensor) -> Tensor:
        """The same by antidiagonals: of s = ``stride`` queries and s keys, the last query with the first
        key, and so on."""
        s, block, (nq, most) = self.stride, self.block, earlier.shape
        k = self._sorted(keys, order).unflatten(2, (-1, s)).flatten(3)  # [1, Hs, W / s, s D]
        q = pad(q, (0, 0, 0, -q.shape[2] % s)).unflatten(2, (-1, s)).flip(3).flatten(3)  # [1, H, Tq / s, s D]
        per = block // s
        step = max(1, _TILE // (q.shape[1] * per * k.shape[2]))  # query blocks at a time
        tiles = []
        for a in range(0, nq, step):
            last = min(a + step, nq) - 1
            seen = max(1, (keys.past + last * block) // self.segment * (self.segment // block))  # key blocks
            rows, hidden = q[:, :, a * per : (last + 1) * per], ~earlier[a : last + 1, :seen]
            logits = scores(
                rows, k[:, :, : seen * per], replace(keys.softmax, scale=keys.softmax.scale / s)
            )  # [1, Hs, G, rows, keys]
            hide = hidden.repeat_interleave(per, 0)[: rows.shape[2]].repeat_interleave(per, 1)
            share = torch.softmax(logits.masked_fill_(hide, -torch.inf), -1).unflatten(4, (seen, per)).sum(5)
            share = pad(share, (0, most - seen, 0, -rows.shape[2] % per)).unflatten(3, (-1, per)).sum(4)
            share = share.masked_fill_(~earlier[a : last + 1], 0)
            tiles.append(reduce_group(share, self.gqa_reduce))
        return torch.cat(tiles, 2)
