"""The formulas of what each mechanism sends, against the bytes that have travelled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from farspan.attention.kv import KV
from farspan.attention.ops.flash import flash
from farspan.attention.partial import empty_partial
from farspan.attention.selection import Window
from farspan.attention.softmax import Softmax
from farspan.parallel.group.comm import Ranks
from farspan.parallel.mechanisms.decode import merge_ranks
from farspan.parallel.mechanisms.gather import fetch, gather_all
from farspan.parallel.mechanisms.layout import Layout, usp_split, zigzag
from farspan.parallel.mechanisms.pass_q import pass_q
from farspan.parallel.mechanisms.ring import ring
from farspan.parallel.mechanisms.ulysses import ulysses, unsupported
from farspan.parallel.mechanisms.usp import usp
from farspan.parallel.mechanisms.volume import (
    Geometry,
    PrefillCall,
    decode_volume,
    padded,
    refusals,
    volumes,
    window_volume,
)
from farspan.parallel.planner.cost import stored_rows
from farspan.parallel.planner.job import LayerShape, ModelShape

from .world import World

LLAMA_405B = ModelShape(
    name="llama-405b", layers=(LayerShape(128, 8, 128),) * 126, hidden=16384, intermediate=53248,
    vocab=128256, parameters=405_853_388_800, layer_parameters=401_650_000_000,
)  # fmt: skip


def sent(group: Any, heads: int, kv_heads: int, dim: int, new: int, past: int, batch: int) -> dict[str, int]:
    """Bytes that this rank sends by each mechanism, at bfloat16."""
    ranks, rank = Ranks(group), Ranks(group).rank
    split, held = zigzag(past, past + new, ranks.size), zigzag(0, past, ranks.size).layout()
    layout = held if past else Layout.empty(ranks.size)

    def rows(heads: int, n: int) -> torch.Tensor:
        return torch.randn(batch, heads, n, dim).bfloat16()

    q, k, v = rows(heads, split.rows), rows(kv_heads, split.rows), rows(kv_heads, split.rows)
    old_k, old_v = rows(kv_heads, layout.count(rank)), rows(kv_heads, layout.count(rank))
    stored: dict[str, Any] = {"past": layout, "past_k": old_k, "past_v": old_v} if past else {}
    found = {}

    def count(name: str) -> None:
        found[name] = sum(ranks.sent.values())
        ranks.sent.clear()

    gather_all(k, v, old_k, old_v, layout, split, ranks)
    count("gather")
    ring(q, k, v, split, ranks, softmax=Softmax(1.0), **stored)
    count("ring")
    if not unsupported(heads, kv_heads, ranks.size):
        ulysses(q, k, v, split, ranks, lambda q, k, v: flash(q, KV(k, v), Softmax(1.0)), **stored)
        count("ulysses")
    pass_q(q, k, v, split, ranks, softmax=Softmax(1.0), **stored)
    count("pass_q")
    merge_ranks(empty_partial(q[:, :, :1]), q.dtype, ranks)
    count("decode")
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "new", "past", "batch"),
    [
        (12, 12, 64, 0, 1),
        (12, 4, 63, 0, 2),
        (8, 2, 250, 0, 1),
        (12, 1, 21, 0, 1),
        (6, 3, 1, 0, 1),
        (12, 4, 50, 96, 2),
        (12, 12, 7, 24, 1),
        (9, 3, 3, 120, 1),
    ],
)
def test_volumes_are_the_bytes_that_travel(
    world: World, size: int, heads: int, kv_heads: int, new: int, past: int, batch: int
):
    geometry = Geometry(heads, kv_heads, 8, 2)
    expected = volumes(geometry, PrefillCall(size, new, past, batch=batch))
    absent = refusals(geometry, size, past)
    for found in world.run(sent, size, heads, kv_heads, 8, new, past, batch):
        assert found.pop("decode") == decode_volume(geometry, size, batch=batch)
        passed = found.pop("pass_q")
        assert passed == expected.pop("pass_q", passed)
        assert found == expected
        assert ("ulysses" in found) == ("ulysses" not in absent)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("past", [1, 5, 61])
def test_an_uneven_past_is_padded_by_gather_alone(world: World, size: int, past: int):
    geometry = Geometry(6, 6, 8, 2)
    most = stored_rows(past, size)
    expected = volumes(geometry, PrefillCall(size, 10, past, past_rows=most))
    for found in world.run(sent, size, 6, 6, 8, 10, past, 1):
        assert found["gather"] == expected["gather"]
        assert found["ring"] <= expected["ring"] and found["ulysses"] <= expected["ulysses"]


def sent_by_usp(group: Any, new: int) -> int:
    """P = 4 as 2 x 2; the two subgroups are made of the whole job's ranks, as all its processes must do."""
    import torch.distributed as dist

    rank = dist.get_rank(group)
    pairs = [[0, 1], [2, 3], [0, 2], [1, 3]]
    groups = [dist.new_group(pair) for pair in pairs]
    inner, outer = groups[rank // 2], groups[2 + rank % 2]
    a, b = Ranks(inner), Ranks(outer)
    split = usp_split(0, new, 2, 2)
    q, k, v = (torch.randn(1, h, split.rows, 8).bfloat16() for h in (8, 2, 2))
    usp(q, k, v, split, a, b, softmax=Softmax(1.0))
    return sum(a.sent.values()) + sum(b.sent.values())


@pytest.mark.parametrize("new", [64, 37, 3])
def test_usp_volume(world: World, new: int):
    expected = volumes(Geometry(8, 2, 8, 2), PrefillCall(4, new, ulysses=2))["usp"]
    assert world.run(sent_by_usp, 4, new) == [expected] * 4


def sent_by_fetch(group: Any, new: int, window: int) -> int:
    ranks = Ranks(group)
    split = zigzag(0, new, ranks.size)
    k, v = (torch.randn(1, 2, split.layout().count(ranks.rank), 8).bfloat16() for _ in range(2))
    wanted = torch.zeros(1, 2, new, dtype=torch.bool)
    for _, chunk in split.slots(ranks.rank):
        wanted[:, :, : chunk[1]] |= Window(size=window).needed(chunk, [0], 2, k.device)
    into = torch.empty(1, 2, new, 8).bfloat16(), torch.empty(1, 2, new, 8).bfloat16()
    fetch(wanted, k, v, split.layout(), *into, ranks)
    return sum(ranks.sent.values())


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(("new", "window"), [(240, 8), (96, 100), (61, 5)])
def test_window_volume_bounds_what_a_rank_sends(world: World, size: int, new: int, window: int):
    """The mean over ranks: the formula leaves out that the ring of chunks has two ends and a turn."""
    geometry = Geometry(4, 2, 8, 2)
    mean = sum(world.run(sent_by_fetch, size, new, window)) / size
    most = window_volume(geometry, PrefillCall(size, new), window)
    bits = (size - 1) * 2 * -(-new // 8)
    assert mean <= most
    if window < new / (2 * size):
        assert mean - bits >= (most - bits) * (2 * size - 2) / (2 * size) - 1e-9


def test_published_formulas():
    """PARALLEL.md's, with S filled up to the split."""
    h, hkv, d, e = 32, 8, 128, 2
    geometry = Geometry(h, hkv, d, e)
    for p, u in ((2, None), (4, 2), (8, 4), (16, 8)):
        s = padded(1001, p)
        found = volumes(geometry, PrefillCall(p, 1001, ulysses=u))
        assert s >= 1001 and s % p == 0
        assert found["gather"] == found["ring"] == (p - 1) * s * 2 * hkv * d * e // p
        assert found["ulysses"] == (p - 1) * s * (2 * h + 2 * max(hkv, p)) * d * e // p**2
        if u:
            r = p // u
            inner = (u - 1) * (s // r) * (2 * h + 2 * max(hkv, u)) * d * e // u**2
            assert found["usp"] == inner + (r - 1) * s * 2 * -(-hkv // u) * d * e // r
        assert volumes(geometry, PrefillCall(p, 1001, 7))["pass_q"] == (p - 1) * s * h * (d * 2 * e + 4) // p
        assert decode_volume(geometry, p, tokens=3) == 3 * (p - 1) * h * (d * e + 4)
