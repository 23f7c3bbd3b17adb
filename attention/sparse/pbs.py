"""PBS-Attn: keys sorted by importance within segments, so that fewer blocks hold what a query block needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..block_shares import antidiagonal_shares
from ..blocks import holding, index_of
from ..checks import require
from ..cost import Cost, Queries
from ..errors import SpecError
from ..gqa import gather_head_rows, reduce_group
from ..keys import Keys, State
from ..lookahead import Lookahead
from ..method import AttentionMethod
from ..needs import Needs
from ..ops.pool import pool
from ..ops.scores import scores
from ..received import attention_received
from ..selection import Index


@dataclass(frozen=True, kw_only=True)
class PBS(AttentionMethod):
    """Block-sparse attention over keys in another order (PBS-Attn, 2510.21270).

    Within each complete segment of S = ``segment`` keys, keys and values are sorted by importance, highest
    first: the mean attention that a key receives from the call's last b = ``block`` queries. Blocks of b
    queries and of b sorted keys are scored as softmax(q_mean . k_mean / sqrt(D)) over the blocks of earlier
    segments. The smallest set that holds ``mass`` of it is read. Besides, the block with token 0 and the
    whole segment of the query block are read (both segments where a query block lies in two, as after a
    cached prompt). Which keys a query sees depends on their positions, never on their order.

    select: "mean", or "antidiagonal" for XAttention's scores of the sorted keys (``antidiagonal_shares``).
    gqa_reduce: "sum" or "max" of the heads' importances and scores gives the heads of a group one order and
    one selection; with "none" each head has its own (the paper, which repeats keys to query heads).

    The importances need every raw key. Keys are read once for them, in ``prepare_prefill``, and once for the
    means of the sorted blocks. Each chunk of a prompt is sorted by its own last queries, so chunks read other
    keys than the whole prompt would (law 3 does not hold); each chunk follows the definition. The official
    code has no causal mask in the importances, leaves the keys after the last complete segment out of their
    softmax, and pools a last query block that is not full as if padded with zeros; here all of that is exact.
    """

    name: ClassVar[str] = "pbs"
    title: ClassVar[str] = "PBS-Attn"
    paper: ClassVar[str] = "2510.21270"

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
            given = f"segment={self.segment}, block={self.block}"
            raise SpecError(f"pbs takes a segment of whole blocks; got {given}.")
        if self.select == "antidiagonal" and self.block % self.stride:
            raise SpecError(
                f"pbs takes a stride that divides the block; got stride={self.stride}, block={self.block}."
            )

    @property
    def lookahead(self) -> Lookahead:
        return Lookahead.prompt()

    @property
    def needs(self) -> Needs:
        return Needs(keys=True)

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
        """order [1, Hs, W] int32 of the W keys in complete segments, means [1, Hs, W / b, D] of blocks."""
        whole = keys.length // self.segment * self.segment
        if self._covers(keys.length):
            return {}
        weight = attention_received(q, keys, keys.length)  # [1, Hkv, G, Tk]
        ranked = reduce_group(weight, self.gqa_reduce)[..., :whole].unflatten(2, (-1, self.segment))
        order = ranked.sort(dim=-1, descending=True, stable=True).indices
        order += torch.arange(0, whole, self.segment, device=q.device)[:, None]
        found = {"order": order.flatten(2).int()}
        if self.select == "mean":
            k = gather_head_rows(keys.read_all_keys(), found["order"])
            found["means"] = pool(k, self.block, mode="mean")
        return found

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        block, per, device, length = self.block, self.segment // self.block, q.device, keys.length
        begins = torch.arange(keys.past, length, block)  # of the query blocks, on the host
        first_own = begins // self.segment * per  # key blocks of earlier segments are before this one
        if self.mass == 1 or int(first_own[-1]) == 0:
            return None
        last_own = ((begins + block).clamp(max=length) - 1) // self.segment * per + per - 1
        whole, nk = length // self.segment * self.segment, -(-length // block)
        order = keys.prepared["order"][..., :whole]
        here = first_own.to(device, non_blocking=True)[:, None]
        shares = self._shares(q, keys, order[..., : int(first_own[-1]) * block], first_own, here)
        chosen = holding(shares, self.mass, nk)
        cols = torch.arange(nk, device=device)
        holds_first = cols == (order[..., : self.segment] == 0).int().argmax(-1, keepdim=True) // block
        own = (cols >= here) & (cols <= last_own.to(device, non_blocking=True)[:, None])
        read = chosen | own | holds_first[:, :, None]
        rest = torch.arange(whole, length, device=device, dtype=order.dtype).expand(*order.shape[:2], -1)
        return index_of(read, block, block, torch.cat([order, rest], 2))

    def _shares(self, q: Tensor, keys: Keys, order: Tensor, first_own: Tensor, here: Tensor) -> Tensor:
        """[1, Hs, Nq, blocks in ``order``]: each head's share of its attention over the key blocks before
        ``first_own`` [Nq], which is on the host; ``here`` [Nq, 1] is the same on the device of q."""
        if self.select == "antidiagonal":
            per = self.block // self.stride
            k = gather_head_rows(keys.read_all_keys(), order)
            seen = (first_own * per).repeat_interleave(per)[: -(-q.shape[2] // self.stride)]
            shares = antidiagonal_shares(q, k, seen, self.stride, self.block, keys.softmax)
        else:
            means = keys.prepared["means"][:, :, : order.shape[2] // self.block]
            later = torch.arange(means.shape[2], device=q.device) >= here
            logits = scores(pool(q, self.block, mode="mean"), means, keys.softmax)
            shares = torch.softmax(logits.masked_fill_(later, -torch.inf), -1).masked_fill_(later, 0)
        return reduce_group(shares, self.gqa_reduce)
