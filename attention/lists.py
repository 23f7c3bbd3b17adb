"""Lists of keys to read: the plain data of a selection, which the operations take, and the conversion of
block lists to and from FlexAttention's BlockMask (torch.nn.attention.flex_attention)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from .causal import causal_mask, positions
from .errors import Unsupported
from .kv import KV

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, kw_only=True)
class BlockLists:
    """Key blocks read by each block of queries.

    blocks: [B, Hs, Nq, M] int32, key block numbers, ascending within the first ``counts`` entries; Hs is Hkv
            (the query heads of a group share a row) or H. Entries past the count are ignored.
    counts: [B, Hs, Nq] int32.
    key_order: [B, Hs, Tk] permutation of positions, for methods that reorder keys (None: natural order).
    lead:   by how many queries the first query block is shorter, as it began before the call; 0 in a padded
            batch.

    Query block n holds queries n * block_q - lead .. of this call, counted from the row's first valid
    position in it; key block j of row b begins at start[b] + j * block_k. Causality within the blocks is
    always by position.
    """

    blocks: Tensor
    counts: Tensor
    block_q: int
    block_k: int
    start: Tensor | None = None
    key_order: Tensor | None = None
    lead: int = 0

    def check(self, tk: int) -> None:
        """Raise ValueError where the counted blocks of a query block are not distinct, ascending blocks of
        Tk keys."""
        if self.block_q < 1 or self.block_k < 1:
            raise ValueError(
                f"A BlockIndex has blocks of at least 1 position; got {self.block_q} and {self.block_k}."
            )
        if not 0 <= self.lead < self.block_q or (self.lead and self.start is not None):
            raise ValueError(
                "A BlockIndex has a lead from 0 to block_q - 1, and 0 in a padded batch; got lead = "
                f"{self.lead} for block_q = {self.block_q}."
            )
        whole = [x for x in (self.blocks, self.counts, self.start, self.key_order) if x is not None]
        if any(x.is_floating_point() or x.dtype == torch.bool for x in whole):
            raise ValueError("A BlockIndex holds whole numbers; some tensor of it is of another kind.")
        m = self.blocks.shape[-1]
        place = torch.arange(m, device=self.blocks.device)
        used = place < self.counts[..., None]
        if bool((self.counts < 0).any()) or bool((self.counts > m).any()):
            raise ValueError(f"A BlockIndex with room for {m} blocks takes counts from 0 to {m}.")
        last = -(-tk // self.block_k)
        if bool((used & ((self.blocks < 0) | (self.blocks >= last))).any()):
            raise ValueError(
                f"A BlockIndex of {self.block_k} keys a block names blocks 0 to {last - 1} of {tk} keys; "
                "some block is outside."
            )
        falls = self.blocks[..., 1:] <= self.blocks[..., :-1]
        if bool((used[..., 1:] & falls).any()):
            raise ValueError(
                "A BlockIndex names each block of a query block once, in ascending order; some block comes "
                "twice or too late."
            )
        if self.key_order is not None:
            fits = self.key_order.shape == (*self.blocks.shape[:2], tk)
            every = torch.arange(tk, device=self.blocks.device)
            if not fits or not bool((self.key_order.sort(-1).values == every).all()):
                raise ValueError(
                    f"A BlockIndex's key_order holds, for each row and head of its blocks, every one of {tk} "
                    "positions once."
                )

    def to_mask(
        self, tq: int, tk: int, start: Tensor | None = None, batch: int = 1, rows: Tensor | None = None
    ) -> Tensor:
        """The pairs read, as a mask [B, Hs, Tq, Tk] bool; causality and padding included. rows [R]: only
        these queries of the call. start and batch are those of the lists."""
        b, hs, nq, m = self.blocks.shape
        device = self.blocks.device
        places, cols = positions(tq, tk, device, rows)  # [R, 1], [1, Tk]
        first = (
            torch.zeros(b, dtype=torch.long, device=device) if self.start is None else self.start.to(device)
        )
        row = places[:, 0] - first.clamp(min=tk - tq)[:, None]  # [B, R], within the call
        block = ((row + self.lead) // self.block_q).clamp(0, nq - 1)[:, None].expand(b, hs, -1)
        blocks = self.blocks.gather(2, block[..., None].expand(-1, -1, -1, m)).long()  # [B, Hs, R, M]
        used = torch.arange(m, device=device) < self.counts.gather(2, block)[..., None]
        nk = -(-tk // self.block_k)
        chosen = torch.zeros(*blocks.shape[:3], nk + 1, dtype=torch.bool, device=device)
        chosen.scatter_(3, torch.where(used, blocks, nk), True)  # slot nk collects the unused entries
        if self.key_order is None:
            ordered = cols.expand(b, hs, tk)
        else:
            ordered = torch.empty_like(self.key_order, dtype=torch.long)
            # The place of each position.
            ordered.scatter_(2, self.key_order.long(), cols.expand(b, hs, tk).clone())
        j = ((ordered - first[:, None, None]) // self.block_k).clamp(min=0)  # [B, Hs, Tk]
        mask = chosen.gather(3, j[:, :, None].expand(-1, -1, chosen.shape[2], -1))
        return mask & causal_mask(tq, tk, self.start, b, device, rows)

    def not_in_a_block_mask(self) -> list[str]:
        """Why this index has no BlockMask, one clause each."""
        reasons = []
        if self.start is not None and bool((self.start > 0).any()):
            reasons.append(
                "its rows are padded by different lengths, and a BlockMask has one grid of blocks for all"
            )
        if self.key_order is not None:
            reasons.append("it reorders the keys")
        if self.lead:
            reasons.append("its first query block began before the queries")
        return reasons

    def to_block_mask(self, tq: int, tk: int, num_heads: int, *, transposed: bool = True) -> BlockMask:
        """The BlockMask [B, H, Tq, Tk] of FlexAttention that reads the same pairs for the last Tq of Tk
        positions.

        Blocks that end before their query block begins are ``full`` ones (no mask_mod call). transposed: with
        the query blocks of each key block, which FlexAttention's backward needs.
        Raises Unsupported for an index with padding, a key order or a lead.
        """
        if reasons := self.not_in_a_block_mask():
            raise Unsupported("This BlockIndex has no BlockMask", reasons)
        from torch.nn.attention.flex_attention import BlockMask

        past = tk - tq
        # FlexAttention asks for room for every block.
        partial, full = self.partial_and_full(tq, tk, width=-(-tk // self.block_k))
        group = num_heads // self.blocks.shape[1]
        lists = [x.repeat_interleave(group, 1) for x in (*partial, *full)]

        def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key <= query + past

        return BlockMask.from_kv_blocks(
            lists[0],
            lists[1],
            lists[2],
            lists[3],
            BLOCK_SIZE=(self.block_q, self.block_k),
            mask_mod=mask_mod,
            seq_lengths=(tq, tk),
            compute_q_blocks=transposed,
        )

    def partial_and_full(
        self, tq: int, tk: int, *, width: int | None = None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The blocks within which causality decides, and those that a whole query block reads, for the last
        Tq of Tk positions of an index without padding, key order and lead.

        Each are counts [B, Hs, ceil(Tq / block_q)] and blocks [B, Hs, ceil(Tq / block_q), width] int32,
        ascending, zeros past the count. width: at least the most that count (default: the room of the index).
        Blocks that begin after the last query of their query block are in neither.
        """
        nq, block_q, block_k = -(-tq // self.block_q), self.block_q, self.block_k
        blocks, counts = self.blocks[:, :, :nq], self.counts[:, :, :nq, None]
        width = min(max(1, blocks.shape[3]), -(-tk // block_k)) if width is None else width
        place = torch.arange(blocks.shape[3], device=blocks.device)
        # The position of each first query, and of each last one.
        first = tk - tq + torch.arange(nq, device=blocks.device)[:, None] * block_q
        last = torch.clamp(first + block_q, max=tk) - 1
        used = (place < counts) & (blocks * block_k <= last)
        full = used & ((blocks + 1) * block_k <= first + 1)
        return _compact(blocks, used & ~full, width), _compact(blocks, full, width)

    @classmethod
    def from_block_mask(cls, mask: BlockMask, *, batch: int = 1, heads: int = 1) -> Self:
        """The index of the blocks that a BlockMask [B, H, Tq, Tk] visits, full and partial.

        batch, heads: what a BlockMask for all rows or all heads (B or H of 1) is repeated to, as
        ``block_sparse`` wants it: the KV heads, or the query heads. Its ``mask_mod`` is ignored: within the
        blocks an index is causal, and queries are the last positions.
        """
        block_q, block_k = mask.BLOCK_SIZE
        nk = -(-mask.seq_lengths[1] // block_k)
        shape = mask.kv_indices.shape[:3]
        chosen = torch.zeros(*shape, nk + 1, dtype=torch.bool, device=mask.kv_indices.device)
        lists = [(mask.kv_num_blocks, mask.kv_indices)]
        if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
            lists.append((mask.full_kv_num_blocks, mask.full_kv_indices))
        for number, indices in lists:
            used = torch.arange(indices.shape[-1], device=indices.device) < number[..., None]
            chosen.scatter_(3, torch.where(used, indices.long(), nk), True)
        counts, blocks = _compact(
            torch.arange(nk, device=chosen.device).expand(*shape, nk), chosen[..., :nk], nk
        )
        sizes = [wanted if have == 1 else have for wanted, have in zip((batch, heads), shape, strict=False)]
        blocks, counts = (x.expand(*sizes, *x.shape[2:]).contiguous() for x in (blocks, counts))
        return cls(blocks=blocks, counts=counts, block_q=block_q, block_k=block_k)


@dataclass(frozen=True, kw_only=True)
class TokenLists:
    """Single keys read by each decode query.

    tokens: [B, Hs, Tq, K] int64 absolute positions; Hs is Hkv or H. Entries past the count repeat a counted
            one, so that reading them is harmless, and are masked.
    counts: [B, Hs, Tq] int32, or None where all K entries count.
    full:   [B, Hs, Tq] bool, rows that read every visible key instead (their tokens are ignored), or None.
            It is best on the host: running the index reads it there.
    gathered: keys and values [B, Hs, K], the chosen rows already side by side in the order of ``tokens``,
            where the method keeps them (Tq = 1 only); or None.
    """

    tokens: Tensor
    counts: Tensor | None = None
    full: Tensor | None = None
    gathered: KV | None = None

    def check(self, tk: int) -> None:
        """Raise ValueError where a query's counted tokens are not distinct positions among Tk keys."""
        k = self.tokens.shape[-1]
        used = torch.ones_like(self.tokens, dtype=torch.bool)
        if self.counts is not None:
            if bool((self.counts < 0).any()) or bool((self.counts > k).any()):
                raise ValueError(f"A TokenIndex with room for {k} tokens takes counts from 0 to {k}.")
            used = torch.arange(k, device=self.tokens.device) < self.counts[..., None]
        if bool((used & ((self.tokens < 0) | (self.tokens >= tk))).any()):
            raise ValueError(f"A TokenIndex names positions 0 to {tk - 1}; some token is outside.")
        # Entries past the count get places of their own, so that only counted ones can meet.
        apart = torch.where(used, self.tokens, tk + torch.arange(k, device=self.tokens.device))
        ordered = apart.sort(-1).values
        if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
            raise ValueError("A TokenIndex names each token of a query once; some token comes twice.")

    def to_mask(
        self, tq: int, tk: int, start: Tensor | None = None, batch: int = 1, rows: Tensor | None = None
    ) -> Tensor:
        """The keys read, as a mask [B, Hs, Tq, Tk] bool. rows [R]: only these queries of the call. start:
        where rows begin, for those that read every visible key; batch is that of the lists."""
        some = slice(None) if rows is None else rows
        tokens = self.tokens[:, :, some]
        counts, full = (None if x is None else x[:, :, some] for x in (self.counts, self.full))
        device = tokens.device
        used = torch.ones_like(tokens, dtype=torch.bool)
        if counts is not None:
            used = torch.arange(tokens.shape[3], device=device) < counts[..., None]
        mask = torch.zeros(*tokens.shape[:3], tk + 1, dtype=torch.bool, device=device)
        mask.scatter_(3, torch.where(used, tokens, tk), True)
        mask = mask[..., :tk]
        if full is not None:
            full = full.to(device)
            visible = causal_mask(tq, tk, start, tokens.shape[0], device, rows)
            mask = torch.where(full[..., None], visible, mask)
        return mask


def _compact(blocks: Tensor, keep: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The kept of ``blocks`` [..., M] moved to the front, then zeros.

    -> counts [...] and blocks [..., width], int32.
    """
    order = torch.argsort((~keep).int(), dim=-1, stable=True)
    counts = keep.sum(-1, dtype=torch.int32)
    moved = blocks.gather(-1, order)
    moved = torch.where(torch.arange(moved.shape[-1], device=moved.device) < counts[..., None], moved, 0)
    moved = torch.nn.functional.pad(moved[..., :width], (0, max(0, width - moved.shape[-1])))
    return counts, moved.int().contiguous()
