"""Law 6, by heads: a rank that has a share of a layer's KV heads gives that share of the layer's output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from farspan.attention.method import AttentionMethod, LayerInfo
from farspan.attention.partial import Partial

from .tools import HKV, Data, H, Stream, assert_same, decode_cuts, every_method, layer_info


def _bound(method: AttentionMethod, layer: LayerInfo, made: Any) -> AttentionMethod:
    if made is not None:
        layer = made.for_layer(method, layer, made.geometry)
    served = method.for_layer(layer)
    assert served is not None
    return served


@every_method()
def test_a_share_of_the_heads(method: AttentionMethod, recipe: Callable[[AttentionMethod], Any]) -> None:
    if method.couples_heads:
        pytest.skip("it decides for all heads together, and is refused under tensor parallelism")
    data = Data.random(150, [0, 31])
    cuts, whole = decode_cuts(120, 30), layer_info()
    want = Stream(_bound(method, whole, recipe(method)), data).run(cuts)
    for share in range(HKV):
        heads, kv_head = slice(share * H // HKV, (share + 1) * H // HKV), slice(share, share + 1)
        part = dataclasses.replace(whole, num_heads=H // HKV, num_kv_heads=1, tp_size=HKV, tp_rank=share)
        hidden = data.q.transpose(1, 2).flatten(2)  # every rank has these whole
        mine = Data(data.q[:, heads], data.k[:, kv_head], data.v[:, kv_head], data.starts, hidden)
        got = Stream(_bound(method, part, recipe(method)), mine).run(cuts)
        assert_same(got, Partial(want.out[:, heads], want.lse[:, heads]))
