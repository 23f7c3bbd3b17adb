"""``block_max``: the logits of a tile stay in registers, and only each block's largest leaves.

A tile is [BM queries, BN keys]. It holds PER_Q x PER_K whole blocks, or a part of one where a block is larger
than the tile: key parts are joined in the loop, query parts (``splits`` of them) after it.

              <- COLS ->            A block of block_k keys takes COLS >= block_k columns (a power of two) of
      ^     +----------+--------    a tile; a query block, or part of one, ROWS rows, once for each of the
    ROWS    |  block   |            MEMBERS heads pooled together. What is beyond its block, its row's last
      v     | (n, j)   | (n, j+1)   position or its row's end is -inf, and its key is not read.
            +----------+--------    exp(max(logit - lse)) is taken once per block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch


def unsupported(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float,
    block_q: int,
    block_k: int,
    softcap: float | None,
    start: Tensor | None,
    heads: str,
) -> list[str]:
    reasons = launch.cannot_read(q, k) + launch.no_gradient(q, k, lse)
    if heads == "group" and q.shape[1] // k.shape[1] > _tile(q.dtype, q.shape[3])[0]:
        reasons.append(f"a group of {q.shape[1] // k.shape[1]} query heads does not fit a tile")
    return reasons


def block_max(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float,
    block_q: int,
    block_k: int,
    softcap: float | None,
    start: Tensor | None,
    heads: str,
) -> Tensor:
    b, h, tq, d = q.shape
    hkv, tk = k.shape[1], k.shape[2]
    group = h // hkv if heads == "group" else 1
    bm, bn, warps, stages = _tile(q.dtype, d)
    members = triton.next_power_of_2(group)
    rows = min(triton.next_power_of_2(block_q), bm // members)
    cols = min(triton.next_power_of_2(block_k), bn)
    splits = triton.cdiv(block_q, rows)
    parts = triton.cdiv(tq, block_q) * splits  # query blocks, or parts of them
    out = torch.zeros(b, h // group, parts, triton.cdiv(tk, block_k), dtype=torch.float32, device=q.device)
    if out.numel():
        _block_max[(triton.cdiv(parts, bm // (rows * members)), b * (h // group))](
            q,
            k,
            lse,
            out,
            launch.row_starts(start, q.device),
            *q.stride(),
            *k.stride(),
            *lse.stride(),
            h // group,
            h // hkv,
            tq,
            tk,
            parts,
            out.shape[3],
            scale * 1.4426950408889634 if softcap is None else scale / softcap,
            0.0 if softcap is None else softcap * 1.4426950408889634,
            D=d,
            WIDE_D=launch.wide(d),
            GROUP=group,
            BLOCK_Q=block_q,
            SPLITS=splits,
            ROWS=rows,
            MEMBERS=members,
            PER_Q=bm // (rows * members),
            BLOCK_K=block_k,
            COLS=cols,
            PER_K=bn // cols,
            SOFTCAP=softcap is not None,
            num_warps=warps,
            num_stages=stages,
        )
    return out if splits == 1 else out.unflatten(2, (-1, splits)).amax(3)


def _tile(dtype: torch.dtype, d: int) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages). 16-bit: the query tile stays put and two key tiles are under way, at
    most 64 + 2 * 64 KB. float32 has no tensor cores here: small tiles, no spills."""
    if dtype == torch.float32:
        return (32, 32, 4, 2) if d > 128 else (64, 32, 4, 2) if d > 64 else (64, 64, 4, 2)
    return (128, 128, 8, 2) if d <= 128 else (128, 64, 8, 2)


@triton.jit
def _block_max(
    q_ptr,
    k_ptr,
    lse_ptr,
    out_ptr,
    start_ptr,
    q_b,
    q_h,
    q_t,
    q_d,
    k_b,
    k_h,
    k_t,
    k_d,
    lse_b,
    lse_h,
    lse_t,
    heads_out,
    per_kv,  # query heads per KV head
    tq,
    tk,
    parts,
    nk,
    inner,  # logits are inner * q k^T in base 2, or outer * tanh(inner * q k^T) with a soft-cap
    outer,
    D: tl.constexpr,
    WIDE_D: tl.constexpr,
    GROUP: tl.constexpr,  # query heads pooled together
    BLOCK_Q: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    MEMBERS: tl.constexpr,  # GROUP, rounded up to a power of two
    PER_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLS: tl.constexpr,
    PER_K: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    # The longest rows first: what is left at the end is short.
    first_part = (tl.num_programs(0) - 1 - tl.program_id(0)) * PER_Q
    batch = (tl.program_id(1) // heads_out).to(tl.int64)
    head = (tl.program_id(1) % heads_out) * GROUP  # the first query head
    past = tk - tq
    start = tl.zeros([], tl.int32)
    if start_ptr is not None:
        start = tl.load(start_ptr + batch).to(tl.int32)
    begin = tl.maximum(start - past, 0)

    at_m = tl.arange(0, PER_Q * MEMBERS * ROWS)
    part = first_part + at_m // (MEMBERS * ROWS)
    member = (at_m // ROWS) % MEMBERS
    inside = (part % SPLITS) * ROWS + at_m % ROWS  # place within the query block
    row = begin + (part // SPLITS) * BLOCK_Q + inside
    valid = (inside < BLOCK_Q) & (row < tq) & (part < parts) & (member < GROUP)
    row = tl.where(valid, row, -past - 1)  # sees nothing
    last = past + tl.max(row, 0)  # the last position that some row sees

    at_n = tl.arange(0, PER_K * COLS)
    at_d = tl.arange(0, WIDE_D)
    of_row, of_head = row.to(tl.int64), (head + member).to(tl.int64)
    q_rows = q_ptr + batch * q_b + (of_head * q_h + of_row * q_t)[:, None] + at_d[None, :] * q_d
    q = tl.load(q_rows, mask=valid[:, None] & (at_d[None, :] < D), other=0.0)
    lse = tl.load(lse_ptr + batch * lse_b + of_head * lse_h + of_row * lse_t, mask=valid, other=0.0)
    lse = lse.to(tl.float32) * launch.LOG2E
    k_base = k_ptr + batch * k_b + (head // per_kv).to(tl.int64) * k_h + at_d[:, None] * k_d

    out_part = first_part + tl.arange(0, PER_Q)
    out_rows = out_ptr + (tl.program_id(1).to(tl.int64) * parts + out_part[:, None]) * nk
    for j in range(0, tl.cdiv(last + 1 - start, BLOCK_K), PER_K):
        block = j + at_n // COLS
        best = tl.full([PER_Q, PER_K], -float("inf"), tl.float32)
        for piece in range(0, BLOCK_K, COLS):
            place = piece + at_n % COLS
            key = start + block * BLOCK_K + place
            seen = (place < BLOCK_K) & (key <= last)
            k_mask = seen[None, :] if D == WIDE_D else seen[None, :] & (at_d[:, None] < D)
            k = tl.load(k_base + key.to(tl.int64)[None, :] * k_t, mask=k_mask, other=0.0)
            visible = seen[None, :] & (key[None, :] <= past + row[:, None])
            logits = tl.dot(q, k, input_precision="ieee") * inner
            if SOFTCAP:
                logits = launch.tanh(logits) * outer
            logits = tl.where(visible, logits - lse[:, None], -float("inf"))
            top = tl.max(tl.reshape(logits, [PER_Q * MEMBERS * ROWS, PER_K, COLS]), 2)
            best = tl.maximum(best, tl.max(tl.reshape(top, [PER_Q, MEMBERS * ROWS, PER_K]), 1))
        columns = j + tl.arange(0, PER_K)
        mask = (out_part < parts)[:, None] & (columns < nk)[None, :]
        tl.store(out_rows + columns[None, :], tl.exp2(best), mask=mask)
