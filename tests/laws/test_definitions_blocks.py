"""Methods that select blocks against their definitions, written apart (naive_blocks.py), on random queries
and keys and on those of SmolLM2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import farspan
from farspan.attention.attend import attend
from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.method import PREFILL, AttentionMethod, LayerInfo
from farspan.attention.softmax import Softmax
from farspan.attention.summary import Summaries

from . import naive_blocks as naive
from .tools import Data, Stream, layer_info, recorded

Definition = Callable[[Tensor, Tensor, int, int], naive.Blocks]  # q of a group, its keys, past, KV head
CUTS = {"whole": [150], "aligned": [64, 150], "unaligned": [37, 90, 150]}


def assert_as_defined(
    method: AttentionMethod,
    data: Data,
    cuts: list[int],
    define: Definition,
) -> list[float]:
    """Prefill in calls that end at ``cuts``: the blocks that each row and head reads are those that
    ``define`` names. -> the share of the visible blocks read, call by call."""
    summaries, shares = Summaries(), []
    start = None if data.starts is None else torch.tensor(data.starts)
    for a, z in zip([0, *cuts], cuts, strict=False):
        keys = Keys(
            kv=KV(data.k[:, :, :z], data.v[:, :, :z]),
            tq=z - a,
            softmax=Softmax(data.scale),
            start=start,
            summaries=summaries,
        )
        with recorded(method) as seen:
            attend(method, PREFILL, data.q[:, :, a:z], keys)
        rows = [(b, first) for b, first in enumerate(data.starts or [0]) if first < z]
        read = visible = 0
        for (b, first), selection in zip(rows, seen, strict=True):
            if selection.index is None:
                continue  # the budget covers the length: laws 1 and 3 are about that
            begin = max(a, first)
            got = _blocks(selection.index, data.q.shape[1])
            for head, q in enumerate(data.q[b, :, begin:z].unflatten(0, (data.k.shape[1], -1))):
                want = define(q, data.k[b, head, first:z], begin - first, head)
                for g in range(len(q)):
                    for n, per_head in enumerate(want):
                        h = head * len(q) + g
                        assert got[h][n] == sorted(per_head[g]), f"row {b}, head {h}, query block {n}"
                        read += len(per_head[g])
                        end = min((n + 1) * selection.index.block_q, z - begin) + begin - first
                        visible += -(-end // selection.index.block_k)
        shares.append(read / visible if visible else 1.0)
    return shares


def _blocks(index: Any, heads: int) -> list[list[list[int]]]:
    """[query head][query block] -> the key blocks named."""
    hs, nq = index.blocks.shape[1:3]
    number, counts = index.blocks[0].tolist(), index.counts[0].tolist()
    return [
        [number[h * hs // heads][n][: counts[h * hs // heads][n]] for n in range(nq)] for h in range(heads)
    ]


def peaked(n: int, starts: list[int] | None) -> Data:
    """Every query looks for a few keys alone, and so do its neighbours."""
    data = Data.random(n, starts, seed=4)
    generator = torch.Generator().manual_seed(5)
    group = data.q.shape[1] // data.k.shape[1]
    for t in range(n):
        target = int(torch.randint(0, t // 20 + 1, (1,), generator=generator)) * 20
        data.q[:, :, t] = 1.5 * data.k[:, :, target].repeat_interleave(group, 1) + 0.3 * data.q[:, :, t]
    return data


random_and_peaked = pytest.mark.parametrize(
    "make", [lambda n, starts: Data.random(n, starts, seed=3), peaked], ids=["random", "peaked"]
)


# --- XAttention -------------------------------------------------------------------------------------


def antidiagonal(method: Any, scale: float) -> Definition:
    names = ("stride", "block", "mass", "gqa_reduce")
    settings = {name: getattr(method, name) for name in names}
    return lambda q, k, past, _: naive.antidiagonal(q, k, past=past, scale=scale, **settings)


ANTIDIAGONAL = [
    {"mass": 0.9, "stride": 4, "block": 8},
    {"mass": 0.5, "stride": 8, "block": 8},
    {"mass": 0.6, "stride": 4, "block": 16, "gqa_reduce": "sum"},
    {"mass": 0.4, "stride": 1, "block": 8, "gqa_reduce": "max"},
    {"mass": 0.01, "stride": 4, "block": 16},
]


@pytest.mark.parametrize("settings", ANTIDIAGONAL, ids=str)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=list(CUTS))
@pytest.mark.parametrize("starts", [None, [0, 21, 120]])
@random_and_peaked
def test_antidiagonal(
    settings: dict[str, Any], cuts: list[int], starts: list[int] | None, make: Callable[..., Data]
) -> None:
    method, data = farspan.methods()["antidiagonal"](**settings), make(150, starts)
    assert_as_defined(method, data, cuts, antidiagonal(method, data.scale))


def test_antidiagonal_on_smollm2(smollm2_layers: list[Data]) -> None:
    method = farspan.methods()["antidiagonal"](block=32)
    for data in smollm2_layers:
        shares = assert_as_defined(method, data, [200, 512], antidiagonal(method, data.scale))
        assert shares[-1] < 0.95


# --- DHSA -------------------------------------------------------------------------------------------


def dhsa(method: Any, scale: float) -> Definition:
    names = ("block_q", "block_k", "local", "fraction", "gqa_reduce")
    settings = {name: getattr(method, name) for name in names} | {"k_tokens": method.k}
    rule = naive.dhsa if method.select == "mean" else naive.dhsa_vertical_slash
    return lambda q, k, past, _: rule(q, k, past=past, scale=scale, **settings)


CHUNKS: list[dict[str, Any]] = [
    {"fraction": 0.4, "block_q": 16, "block_k": 8, "local": 5},
    {"fraction": 0.5, "block_q": 16, "block_k": 4, "local": 20, "gqa_reduce": "sum"},
    {"k": 48, "fraction": None, "block_q": 8, "block_k": 8, "local": 1, "gqa_reduce": "max"},
    {"k": 40, "fraction": None, "block_q": 12, "block_k": 8, "local": 9},
    {"fraction": 0.01, "block_q": 8, "block_k": 16, "local": 17},
    {"select": "vertical_slash", "fraction": 0.4, "block_q": 16, "block_k": 8, "local": 5},
    {
        "select": "vertical_slash",
        "fraction": 0.3,
        "block_q": 8,
        "block_k": 4,
        "local": 20,
        "gqa_reduce": "sum",
    },
    {"select": "vertical_slash", "k": 48, "fraction": None, "block_q": 8, "block_k": 8, "gqa_reduce": "max"},
    {"select": "vertical_slash", "k": 27, "fraction": None, "block_q": 12, "block_k": 8, "local": 9},
]


@pytest.mark.parametrize("settings", CHUNKS, ids=str)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=list(CUTS))
@pytest.mark.parametrize("starts", [None, [0, 21, 120]])
@random_and_peaked
def test_dhsa(
    settings: dict[str, Any], cuts: list[int], starts: list[int] | None, make: Callable[..., Data]
) -> None:
    method, data = farspan.methods()["dhsa"](**settings), make(150, starts)
    assert_as_defined(method, data, cuts, dhsa(method, data.scale))


@pytest.mark.parametrize("select", ["mean", "vertical_slash"])
def test_dhsa_on_smollm2(smollm2_layers: list[Data], select: str) -> None:
    method = farspan.methods()["dhsa"](select=select, fraction=0.3, block_q=32, block_k=16)
    for data in smollm2_layers:
        shares = assert_as_defined(method, data, [200, 512], dhsa(method, data.scale))
        assert shares[-1] < 0.5


@pytest.mark.parametrize("cuts", CUTS.values(), ids=list(CUTS))
def test_dhsa_reads_the_last_keys_of_every_query(cuts: list[int]) -> None:
    method, data = farspan.methods()["dhsa"](fraction=0.05, block_q=16, block_k=8, local=13), Data.random(150)
    with recorded(method) as seen:
        Stream(method, data).run(cuts)
    for selection in seen:
        mask, past = selection.mask()[0], selection.tk - selection.tq
        for i in range(selection.tq):
            assert bool(mask[:, i, max(0, past + i - 12) : past + i + 1].all())
            assert bool(mask[:, i, : min(8, past + i + 1)].all()), "the first chunk"


# --- SALE -------------------------------------------------------------------------------------------


def sale(method: Any, tau: list[float], scale: float) -> Definition:
    """tau: by query head."""
    names = ("block_q", "block_k", "local", "dense_below", "q_bits")
    settings = {name: getattr(method, name) for name in names}

    def define(q: Tensor, k: Tensor, past: int, head: int) -> naive.Blocks:
        own = tau[head * len(q) : (head + 1) * len(q)]
        return naive.sale(q, k, past=past, tau=own, scale=scale, **settings)

    return define


PAIRS: list[dict[str, Any]] = [
    {"block_q": 8, "block_k": 4, "local": 8, "dense_below": 0},
    {"block_q": 16, "block_k": 8, "local": 30, "dense_below": 0, "q_bits": 4},
    {"block_q": 8, "block_k": 8, "local": 8, "dense_below": 40, "q_bits": None},
    {"block_q": 8, "block_k": 16, "local": 17, "dense_below": 0},
]


@pytest.mark.parametrize("settings", PAIRS, ids=str)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=list(CUTS))
@pytest.mark.parametrize("starts", [None, [0, 21, 120]])
@random_and_peaked
def test_sale(
    settings: dict[str, Any], cuts: list[int], starts: list[int] | None, make: Callable[..., Data]
) -> None:
    tau = [2.0, 0.5, 8.0, 1e-4, 3.0, 20.0, 0.0, 1.0]
    method, data = farspan.methods()["sale"](**settings), make(150, starts)
    method = method.for_layer(layer_info({"thresholds": torch.tensor(tau)}))
    assert method is not None
    assert_as_defined(method, data, cuts, sale(method, tau, data.scale))


def test_sale_on_smollm2(smollm2_layers: list[Data]) -> None:
    method = farspan.methods()["sale"](threshold=0.02, block_q=32, block_k=16, local=64, dense_below=0)
    for data in smollm2_layers:
        info = LayerInfo(index=0, num_heads=9, num_kv_heads=3, head_dim=64)
        served = method.for_layer(info)
        assert served is not None
        shares = assert_as_defined(served, data, [200, 512], sale(method, [0.02] * 9, data.scale))
        assert shares[-1] < 0.95
