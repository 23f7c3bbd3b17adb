"""BlockIndex to and from FlexAttention's BlockMask (torch.nn.attention.flex_attention)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .errors import Unsupported
from .index import BlockIndex


def not_in_a_block_mask(index: BlockIndex) -> list[str]:
    """Why ``index`` has no BlockMask, one clause each."""
    reasons = []
    if index.start is not None and bool((index.start > 0).any()):
        reasons.append(
            "its rows are padded by different lengths, and a BlockMask has one grid of blocks for all"
        )
    if index.key_order is not None:
        reasons.append("it reorders the keys")
    if index.lead:
        reasons.append("its first query block began before the queries")
    return reasons


def to_block_mask(
    index: BlockIndex, tq: int, tk: int, num_heads: int, *, transposed: bool = True
) -> BlockMask:
    """The BlockMask [B, H, Tq, Tk] that reads what ``index`` reads for the last Tq of Tk positions, causally.

    Blocks that end before their query block begins are ``full`` ones (no mask_mod call). transposed: with the
    query blocks of each key block, which FlexAttention's backward needs.
    Raises Unsupported for an index with padding, a key order or a lead.
    """
    if reasons := not_in_a_block_mask(index):
        raise Unsupported("This BlockIndex has no BlockMask", reasons)
    past, block_q, block_k = tk - tq, index.block_q, index.block_k
    group = num_heads // index.blocks.shape[1]
    blocks = index.blocks.repeat_interleave(group, 1)
    counts = index.counts.repeat_interleave(group, 1)
    nq, m = blocks.shape[2:]
    width = -(-tk // block_k)  # FlexAttention asks for room for every block
    place = torch.arange(m, device=blocks.device)
    first = past + torch.arange(nq, device=blocks.device)[:, None] * block_q  # position of each first query
    last = torch.clamp(first + block_q, max=tk) - 1
    used = (place < counts[..., None]) & (blocks * block_k <= last)
    full = used & ((blocks + 1) * block_k <= first + 1)

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + past

    return BlockMask.from_kv_blocks(
        *_compact(blocks, used & ~full, width),
        *_compact(blocks, full, width),
        BLOCK_SIZE=(block_q, block_k),
        mask_mod=mask_mod,
        seq_lengths=(tq, tk),
        compute_q_blocks=transposed,
    )


def from_block_mask(mask: BlockMask, *, batch: int = 1, heads: int = 1) -> BlockIndex:
    """The BlockIndex of the blocks that a BlockMask [B, H, Tq, Tk] visits, full and partial.

    batch, heads: what a BlockMask for all rows or all heads (B or H of 1) is repeated to, as ``block_sparse``
    wants it: the KV heads, or the query heads. Its ``mask_mod`` is not looked at: within the blocks a
    BlockIndex is causal, queries being the last positions.
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
    counts, blocks = _compact(torch.arange(nk, device=chosen.device).expand(*shape, nk), chosen[..., :nk], nk)
    sizes = [wanted if have == 1 else have for wanted, have in zip((batch, heads), shape, strict=False)]
    blocks, counts = (x.expand(*sizes, *x.shape[2:]).contiguous() for x in (blocks, counts))
    return BlockIndex(blocks=blocks, counts=counts, block_q=block_q, block_k=block_k)


def _compact(blocks: Tensor, keep: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The kept of ``blocks`` [..., M] moved to the front, then zeros.

    -> counts [...] and blocks [..., width], int32.
    """
    order = torch.argsort((~keep).int(), dim=-1, stable=True)
    counts = keep.sum(-1, dtype=torch.int32)
    moved = blocks.gather(-1, order)
    moved = torch.where(torch.arange(moved.shape[-1], device=moved.device) < counts[..., None], moved, 0)
    if moved.shape[-1] < width:
        moved = torch.nn.functional.pad(moved, (0, width - moved.shape[-1]))
    return counts, moved.int().contiguous()
