"""What benchmarks.ops runs: each operation on random inputs, and beside it what a user would otherwise call.

The bytes of a run are those that must be moved at least (inputs read once, outputs written once), whatever it
moves; its operations are those of the pairs that it is asked for, two products of 2 D each where values are
read, whatever it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from farspan.attention.causal import causal_pairs
from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.method import AttentionMethod
from farspan.attention.ops.block_max import block_max
from farspan.attention.ops.block_sparse import block_sparse
from farspan.attention.ops.decode import decode
from farspan.attention.ops.gather_decode import gather_decode
from farspan.attention.ops.int4_scores import int4_block_max, int4_scores, quantise_int4
from farspan.attention.ops.pool import pool
from farspan.attention.ops.scores import scores
from farspan.attention.ops.select import by_mass, by_threshold, top_k
from farspan.attention.partial import Partial
from farspan.attention.selection import Index, TokenIndex
from farspan.attention.softmax import Softmax
from farspan.attention.sparse.block_topk import BlockTopK
from farspan.attention.sparse.double_sparsity import DoubleSparsity
from farspan.attention.sparse.quest import Quest
from farspan.attention.summary import Channels

from .ceilings import Ceilings
from .inputs import Run, Setting, percent, random_blocks, size_of
from .rivals import flex_run, gathered_decode, gathered_prefill, sdpa_runs


def block_sparse_case(setting: Setting, length: int, ceilings: Ceilings) -> Iterator[Run]:
    d, scale = setting.head_dim, setting.scale
    pairs = causal_pairs(length, length, None, 1)
    ceilings.check(flops=4 * d * setting.heads * pairs)
    q, k, v = setting.qkv(1, length, length)
    least = 2 * size_of(q) + size_of(k, v)
    yield from (
        Run(name=name, call=call, role="dense", flops=4 * d * setting.heads * pairs, bytes=least, memory=need)
        for name, call, need in sdpa_runs(q, k, v, causal=True)
    )
    for density in setting.densities:
        index, read = random_blocks(setting, length, density)
        about: dict[str, Any] = {
            "at": percent(density),
            "density": read / pairs,
            "flops": 4 * d * setting.heads * read,
            "bytes": least + size_of(index.blocks, index.counts),
        }

        chooser = BlockTopK(k=None, fraction=density, block=setting.block)
        blocks = length // setting.block
        yield Run(
            name="block_sparse",
            call=partial(block_sparse, q, KV(k, v), index, Softmax(scale), check=False),
            **about,
        )
        yield Run(
            name="selection",
            call=partial(_select_blocks, chooser, q, k, v, scale),
            role="selection",
            at=percent(density),
            flops=2 * d * setting.heads * blocks * blocks,
            bytes=size_of(q, k),
            memory=32 * setting.heads * blocks * blocks,
        )
        naive = partial(gathered_prefill, q, k, v, index, index.counts[0, 0].tolist())
        yield Run(name="gather + sdpa", call=naive, role="rival", **about)
        if setting.flex:
            flex = flex_run(q, k, v, index, scale)
            need = setting.heads * blocks * (8 * blocks + 30 * index.blocks.shape[3])
            yield Run(name="flex", call=flex, role="rival", memory=need, compiles=True, **about)


def _select_blocks(method: AttentionMethod, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Index:
    """Selection of one prefill: the keys are new, so they are pooled, too."""
    return method.select_prefill(q, Keys(kv=KV(k, v), tq=q.shape[2], softmax=Softmax(scale)))


def decode_case(setting: Setting, length: int, ceilings: Ceilings) -> Iterator[Run]:
    q, k, v, about = _one_step(setting, length, ceilings)
    yield Run(name="decode", call=partial(decode, q, KV(k, v), Softmax(setting.scale)), **about)
    yield from _dense_steps(q, k, v, about)

    def expanded() -> Tensor:
        wide_k, wide_v = (x.repeat_interleave(setting.group, 1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, wide_k, wide_v)

    yield Run(
        name="expand + sdpa", call=expanded, role="rival", memory=setting.group * size_of(k, v), **about
    )


def _one_step(
    setting: Setting, length: int, ceilings: Ceilings
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    row = setting.batch * setting.kv_heads * setting.head_dim * length * setting.dtype.itemsize
    ceilings.check(bytes=2 * row, memory=2 * row)
    q, k, v = setting.qkv(setting.batch, 1, length)
    flops = 4 * setting.head_dim * setting.heads * setting.batch * length
    return q, k, v, {"flops": flops, "bytes": 2 * size_of(q) + size_of(k, v)}


def _dense_steps(q: Tensor, k: Tensor, v: Tensor, about: dict[str, Any]) -> Iterator[Run]:
    for name, call, need in sdpa_runs(q, k, v, causal=False):
        yield Run(name=name, call=call, role="dense", memory=need, **about)


def gather_decode_case(setting: Setting, length: int, ceilings: Ceilings) -> Iterator[Run]:
    q, k, v, about = _one_step(setting, length, ceilings)
    yield Run(name="decode", call=partial(decode, q, KV(k, v), Softmax(setting.scale)), role="dense", **about)
    yield from _dense_steps(q, k, v, about)
    budgets = {percent(x): max(1, round(x * length)) for x in setting.densities}
    if setting.tokens < length:
        budgets[f"{setting.tokens} keys"] = setting.tokens
    keys = Keys(kv=KV(k, v), tq=1, softmax=Softmax(setting.scale))  # its summaries are kept, as between steps
    width = setting.head_dim // 4
    channels = torch.stack(
        [torch.randperm(setting.head_dim)[:width].sort().values for _ in range(setting.kv_heads)]
    )
    for at, size in budgets.items():
        tokens = torch.rand(setting.batch, setting.kv_heads, 1, length, device=setting.device)
        index = TokenIndex(tokens=tokens.topk(size).indices.sort().values)
        read = 2 * size_of(q) + size_of(index.tokens) + size_of(k, v) * size // length
        of_keys: dict[str, Any] = {
            "at": at,
            "density": size / length,
            "flops": about["flops"] * size / length,
        }

        yield Run(
            name="gather_decode",
            call=partial(gather_decode, q, KV(k, v), index, Softmax(setting.scale), check=False),
            bytes=read,
            **of_keys,
        )
        yield Run(
            name="gather + sdpa",
            call=partial(gathered_decode, q, k, v, index),
            role="rival",
            bytes=read,
            memory=setting.group * size_of(k, v) * size // length,
            **of_keys,
        )
        if size == length:
            continue  # nothing to select: the methods then read everything, densely
        how: tuple[tuple[AttentionMethod, int], ...] = (
            (DoubleSparsity(k=size, labels=Channels(channels)), size_of(k) * width // setting.head_dim),
            (Quest(k=size), 2 * size_of(k) // Quest.page),
        )
        for method, summary in how:
            yield Run(
                name=method.name,
                call=partial(method.select_decode, q, keys),
                role="selection",
                at=at,
                bytes=summary,
            )
            yield Run(
                name=f"{method.name} + gather_decode",
                call=partial(_step, method, q, keys),
                bytes=summary + read,
                **of_keys,
            )


def _step(method: AttentionMethod, q: Tensor, keys: Keys) -> Partial:
    """Selection and attention of one decode step."""
    index = method.select_decode(q, keys)  # a TokenIndex: the budget is below the number of keys
    return gather_decode(q, keys.kv, index, keys.softmax, check=False)


def pool_case(setting: Setting, length: int, ceilings: Ceilings) -> Iterator[Run]:
    x = setting.random(1, setting.kv_heads, length)
    for mode in ("mean", ("max", "min")):
        pooled = pool(x, setting.block, mode=mode)
        yield Run(
            name=f"pool {mode if isinstance(mode, str) else ', '.join(mode)}",
            call=partial(pool, x, setting.block, mode=mode),
            bytes=size_of(x, pooled),
        )
    yield Run(
        name="torch.mean",
        call=lambda: x.unflatten(2, (-1, setting.block)).mean(3),
        role="rival",
        bytes=size_of(x, x) * (1 + 1 / setting.block) / 2,
    )


def scores_case(setting: Setting, length: int, ceilings: Ceilings) -> Iterator[Run]:
    """One step's queries on every key, and pooled queries on pooled keys."""
    blocks = length // setting.block
    for name, batch, queries, n in (("", setting.batch, 1, length), (" pooled", 1, blocks, blocks)):
        out = batch * setting.heads * queries * n
        q, k, _ = setting.qkv(batch, queries, n)
        folded = q.reshape(batch, setting.kv_heads, -1, setting.head_dim)
        about: dict[str, Any] = {"flops": 2 * setting.head_dim * out, "memory": 4 * out}
        yield Run(
            name="scores" + name,
            call=partial(scores, q, k, Softmax(setting.scale)),
            bytes=size_of(q, k) + 4 * out,
            **about,
        )
        yield Run(  # rounds its result to the dtype of the inputs
            name="torch.matmul" + name,
            call=partial(torch.matmul, folded, k.transpose(-1, -2)),
            role="rival",
            bytes=size_of(q, k) + setting.dtype.itemsize * out,
            **about,
        )


def select_case(setting: Setting, length: int, ceilings: Ceilings) -> Iterator[Run]:
    """Keys of one step per KV head, and blocks of every block of queries (named "pooled")."""
    blocks = length // setting.block
    one = torch.randn(setting.batch, setting.kv_heads, 1, length, device=setting.device)
    many = torch.randn(1, setting.kv_heads, blocks, blocks, device=setting.device)
    for name, x in (("", one), (" pooled", many)):
        n = x.shape[-1]
        budgets = {percent(y): max(1, round(y * n)) for y in setting.densities if y < 1}
        if x is one and setting.tokens < n:
            budgets[f"{setting.tokens} keys"] = setting.tokens
        for at, size in budgets.items():
            about: dict[str, Any] = {"at": at, "density": size / n}
            about["bytes"] = size_of(x) + 8 * size * x.numel() // n
            yield Run(name="top_k" + name, call=partial(top_k, x, size), **about)
            yield Run(
                name="torch.topk" + name,
                call=partial(torch.topk, x, size, sorted=False),
                role="rival",
                **about,
            )
    shares = torch.softmax(3 * many, -1)
    most = max(1, blocks // 4)
    for name, call in (
        ("by_mass pooled", partial(by_mass, shares, 0.9)),
        ("by_threshold pooled", partial(by_threshold, many, 1.0)),
        ("by_mass pooled, at most a quarter", partial(by_mass, shares, 0.9, most=most)),
    ):
        yield Run(name=name, call=call, bytes=size_of(many))


def block_max_case(setting: Setting, length: int, ceilings: Ceilings) -> Iterator[Run]:
    products = setting.head_dim * setting.heads * causal_pairs(length, length, None, 1)
    blocks = length // setting.block
    ceilings.check(flops=2 * products, memory=4 * setting.heads * blocks * blocks)
    q, k, v = setting.qkv(1, length, length)
    lse = torch.log(torch.arange(1, length + 1.0, device=setting.device)) + torch.rand(
        1, setting.heads, length, device=setting.device
    )
    how: dict[str, Any] = {"softmax": Softmax(setting.scale), "block_q": setting.block}
    how["block_k"] = setting.block
    for heads, rows in (("each", setting.heads), ("group", setting.kv_heads)):
        yield Run(
            name=f"block_max per {'head' if heads == 'each' else heads}",
            call=partial(block_max, q, k, lse, heads=heads, **how),
            flops=2 * products,
            bytes=size_of(q, k, lse) + 4 * rows * blocks * blocks,
        )
    # What it costs beside the attention whose probabilities these are.
    for name, call, need in sdpa_runs(q, k, v, causal=True):
        about: dict[str, Any] = {"flops": 4 * products, "bytes": 2 * size_of(q) + size_of(k, v)}
        yield Run(name=name, call=call, role="dense", memory=need, **about)


def int4_scores_case(setting: Setting, length: int, ceilings: Ceilings) -> Iterator[Run]:
    """One step's queries on four-bit keys, beside whole ones; and the rounding of the keys."""
    q, k, _ = setting.qkv(setting.batch, 1, length)
    k4 = quantise_int4(k, setting.block)
    small, out = size_of(k4.packed, k4.scale, k4.mean), 4 * setting.batch * setting.heads * length
    flops = 2 * setting.head_dim * setting.heads * setting.batch * length
    yield Run(
        name="int4_scores",
        call=partial(int4_scores, q, k4, scale=setting.scale),
        flops=flops,
        bytes=small + size_of(q) + out,
    )
    yield Run(
        name="scores of whole keys",
        call=partial(scores, q, k, Softmax(setting.scale)),
        role="dense",
        flops=flops,
        bytes=size_of(q, k) + out,
    )
    yield Run(name="quantise_int4", call=partial(quantise_int4, k, setting.block), bytes=size_of(k) + small)


def int4_block_max_case(setting: Setting, length: int, ceilings: Ceilings) -> Iterator[Run]:
    """SALE's test of every block, beside the same maximum over whole keys."""
    products = setting.head_dim * setting.heads * causal_pairs(length, length, None, 1)
    blocks = length // setting.block
    ceilings.check(flops=2 * products, memory=4 * setting.heads * blocks * blocks)
    q, k, _ = setting.qkv(1, length, length)
    offset = torch.rand(1, setting.heads, length, device=setting.device)
    k4 = quantise_int4(k, setting.block)
    out = 4 * setting.heads * blocks * blocks
    for bits in (8, 4):
        yield Run(
            name=f"int4_block_max, q in {bits} bits",
            call=partial(
                int4_block_max,
                q,
                k4,
                offset,
                Softmax(setting.scale),
                block_q=setting.block,
                q_bits=bits,
            ),
            flops=2 * products,
            bytes=size_of(q, k4.packed, k4.scale, k4.mean, offset) + out,
        )
    yield Run(
        name="block_max of whole keys",
        call=partial(
            block_max, q, k, offset, Softmax(setting.scale), block_q=setting.block, block_k=setting.block
        ),
        role="dense",
        flops=2 * products,
        bytes=size_of(q, k, offset) + out,
    )


Case = Callable[[Setting, int, Ceilings], Iterator[Run]]

# operation -> its cases: what to call it in the output, the longest length on the CPU by default, the runs
CASES: dict[str, tuple[tuple[str, int, Case], ...]] = {
    "block_sparse": (("block_sparse", 16384, block_sparse_case),),
    "decode": (("decode", 131072, decode_case),),
    "gather_decode": (("gather_decode", 131072, gather_decode_case),),
    "pool": (("pool", 131072, pool_case),),
    "scores": (("scores", 131072, scores_case),),
    "select": (("select", 131072, select_case),),
    "block_max": (("block_max", 8192, block_max_case),),
    "int4_scores": (
        ("int4_scores", 131072, int4_scores_case),
        ("int4_block_max", 8192, int4_block_max_case),
    ),
}
