"""CCA, Combiner and descriptors against their definitions, written apart (naive_chunked.py): outputs, and
what was read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import farspan
from farspan.attention.errors import SpecError
from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.method import DECODE, PREFILL
from farspan.attention.softmax import Softmax
from farspan.attention.sources import Supply
from farspan.runtime.layer_call import LayerCall, LocalKeys

from . import naive_chunked as naive
from .tools import HKV, D, Data, H, Stream, assert_same, decode_cuts, layer_info

G = H // HKV
CASES: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, list[int]]]] = {
    "core_context:g=4,s=16": lambda *x: naive.core_context(*x, 4, 16),
    "core_context:g=7,s=7": lambda *x: naive.core_context(*x, 7, 7),
    "core_context:g=1,s=5": lambda *x: naive.core_context(*x, 1, 5),
    "combiner:span=8": lambda *x: naive.combiner_fixed(*x, 8, False),
    "combiner:span=5,count_correction=true": lambda *x: naive.combiner_fixed(*x, 5, True),
    "combiner:form=logsparse,span=1": lambda *x: naive.combiner_logsparse(*x, 1, 1024, False),
    "combiner:form=logsparse,span=3,largest=13,count_correction=true": lambda *x: naive.combiner_logsparse(
        *x, 3, 13, True
    ),
    "descriptors:chunk=12,pool=4": lambda *x: naive.descriptors(*x, 12, 4, False),
    "descriptors:chunk=8,pool=8,count_correction=true": lambda *x: naive.descriptors(*x, 8, 8, True),
    "descriptors:chunk=5,pool=1": lambda *x: naive.descriptors(*x, 5, 1, False),
}


def defined(spec: str, row: Data) -> tuple[Tensor, list[int]]:
    """[H, N, D] of a row alone, and how much each of its queries reads."""
    outs, read = [], []
    for head in range(HKV):
        group = slice(head * G, (head + 1) * G)
        out, read = CASES[spec](row.q[0, group], row.k[0, head], row.v[0, head])
        outs.append(out)
    return torch.cat(outs), read


@pytest.mark.parametrize("spec", CASES)
@pytest.mark.parametrize(
    ("cuts", "starts"),
    [([80], None), ([37, 60, 61, 62, 70, 80], None), (decode_cuts(40, 40), [0, 22, 39]), ([50, 80], [0, 11])],
)
def test_outputs_and_counts(spec: str, cuts: list[int], starts: list[int] | None) -> None:
    """One device, whole prompts and calls of any length, candidates checked at once, padding."""
    data = Data.random(cuts[-1], starts, seed=4)
    stream = Stream(farspan.parse_method(spec), data)
    got, pairs = stream.run(cuts), 0
    for b, first in enumerate(starts or [0]):
        want, read = defined(spec, data.row(b))
        assert (got.out[b, :, first:] - want).abs().max() < 1e-10
        pairs += sum(read) * H
    assert sum(int(reads.pairs) for reads in stream.reads) == pairs


def test_logsparse_reads_one_span_for_each_bit() -> None:
    data = Data.random(40, seed=4)
    _, read = defined("combiner:form=logsparse,span=1", data)
    assert read == [1 + naive.bits_of(i) for i in range(40)]
    assert farspan.parse_method("combiner:form=logsparse,span=1").cost(DECODE, 40).keys == read[-1]


@pytest.mark.parametrize("spec", ["core_context:g=4,s=16", "combiner:span=20"])
def test_short_rows_are_dense(spec: str) -> None:
    """The law of these methods in place of a full budget."""
    dense = farspan.parse_method("dense")
    data = Data.random(19)
    want = Stream(dense, data).run([10, 18, 19])
    assert_same(Stream(farspan.parse_method(spec), data).run([10, 18, 19]), want)
    longer = Data.random(24)
    part = Stream(farspan.parse_method(spec), longer).run([24])
    assert (part.out - Stream(dense, longer).run([24]).out)[:, :, 21:].abs().max() > 1e-3


@pytest.mark.parametrize("spec", CASES)
def test_gradients(spec: str) -> None:
    """They flow through summaries, into queries, too: fine-tuning needs them."""
    method, gradients = farspan.parse_method(spec), []
    data = Data.random(30, seed=2)
    weights = torch.randn(1, H, 30, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def fast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        source = LocalKeys(q, KV(k, v), Softmax(data.scale))
        return LayerCall(method, method)(source).part(q, D).out

    def slow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([_group(q, k, v, head) for head in range(HKV)])[None]

    def _group(q: Tensor, k: Tensor, v: Tensor, head: int) -> Tensor:
        return CASES[spec](q[0, head * G : (head + 1) * G], k[0, head], v[0, head])[0]

    for run in (fast, slow):
        given = [x.clone().requires_grad_(True) for x in (data.q, data.k, data.v)]
        (run(*given) * weights).sum().backward()
        gradients.append([x.grad for x in given])
    for got, want in zip(*gradients, strict=True):
        assert got is not None and want is not None
        assert (got - want).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("core_context:g=16,s=40", "takes an s that g divides.* got g=16, s=40"),
        ("core_context:g=0", "takes g a whole number, at least 1"),
        ("descriptors:chunk=40,pool=16", "takes a chunk that pool divides.* got chunk=40, pool=16"),
        ("descriptors:pool=0", "takes pool a whole number, at least 1"),
        ("combiner:form=axial", "takes form = fixed or logsparse; got 'axial'"),
        (
            "combiner:form=logsparse,span=64,largest=8",
            "largest span of at least span=64 tokens; got largest=8",
        ),
    ],
)
def test_bad_parameters(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        farspan.parse_method(spec)


@pytest.mark.parametrize("spec", ["core_context:g=4,s=8", "combiner:span=8"])
def test_summaries_are_pooled_with_the_scale_of_the_layer(spec: str) -> None:
    """A scale of c does what 1 / sqrt(D) does to queries that are c * sqrt(D) times as large."""
    data, scale, outs = Data.random(40), 0.7, []
    for layer, q in ((scale, data.q), (None, data.q * scale * D**0.5)):
        method = farspan.parse_method(spec).for_layer(dataclasses.replace(layer_info(), scale=layer))
        source = LocalKeys(q, KV(data.k, data.v), Softmax(layer or data.scale))
        outs.append(LayerCall(method, method)(source).part(q, D).out)
    assert (outs[0] - outs[1]).abs().max() < 1e-10


def test_a_summary_of_a_layer_of_other_sizes() -> None:
    """Values may be narrower than keys, and the numbers of either half precision."""
    from farspan.attention.chunked.block_values import CoreTokens, read_entries

    q, k = torch.randn(1, 4, 20, 8).half(), torch.randn(1, 2, 20, 8).half()
    v = torch.randn(1, 2, 20, 6).half()
    keys = Keys(kv=KV(k, v), tq=20, softmax=Softmax(1.0), supply=Supply(KV(k, v), q))
    kv = read_entries(keys, CoreTokens(4))
    assert (kv.head_dim, kv.value_dim, kv.length, kv.dtype) == (8, 6, 5, torch.float16)
    part = farspan.parse_method("core_context:g=4,s=8").select_prefill(q, keys)
    assert part is not None and part.serves(PREFILL) and part.serves(DECODE)
