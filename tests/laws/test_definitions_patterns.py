"""Static patterns and Routing Transformer against their definitions, written apart (naive_patterns.py), on
random queries and keys and on those of SmolLM2."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import farspan
from farspan.attention.causal import causal_mask
from farspan.attention.errors import FarspanError
from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.method import AttentionMethod
from farspan.attention.selection import Band, Bands
from farspan.attention.softmax import Softmax

from . import naive, naive_patterns
from .test_definitions import SCALE, G, reads
from .tools import HKV, Data, H, Stream, layer_info, recorded

# --- token by token ---------------------------------------------------------------------------------------

TOKENS: list[tuple[str, dict[str, Any]]] = [
    ("dilated", {"w": 5, "dilation": 3, "sinks": 0}),
    ("dilated", {"w": 9, "dilation": 4, "sinks": 6}),
    ("dilated", {"w": 1, "dilation": 7, "sinks": 1}),
    ("dilated", {"w": 12, "dilation": 1, "sinks": 2}),
    ("strided", {"w": 8, "stride": 8, "sinks": 0}),
    ("strided", {"w": 3, "stride": 5, "sinks": 4}),
    ("strided", {"w": 11, "stride": 4, "sinks": 0}),
    ("strided", {"w": 6, "stride": 3, "reach": 31, "sinks": 2}),
    ("strided", {"w": 6, "stride": 9, "reach": 8, "sinks": 0}),
]


@pytest.mark.parametrize(("name", "settings"), TOKENS, ids=str)
@pytest.mark.parametrize("cuts", [[90, 91, 92, 100], [37, 61, 90, 91, 92, 100], [20, 23, 90, 91, 92]])
@pytest.mark.parametrize("starts", [None, [0, 13, 84]])
def test_exactly_the_pattern_is_read(
    name: str, settings: dict[str, Any], cuts: list[int], starts: list[int] | None
) -> None:
    """Prefill whole and in chunks, decode of one query and of several: sets, outputs and counts."""
    method = farspan.methods()[name](**settings)
    known = {"reach": None} | settings if name == "strided" else settings
    assert_tokens_are_read(method, Data.random(cuts[-1], starts), cuts, known)


def test_exactly_the_pattern_is_read_on_smollm2(smollm2_layers: list[Data]) -> None:
    for name, settings in (
        ("dilated", {"w": 9, "dilation": 4, "sinks": 6}),
        ("strided", {"w": 6, "stride": 9, "reach": None, "sinks": 2}),
    ):
        for data in smollm2_layers:
            method = farspan.methods()[name](**settings)
            assert_tokens_are_read(method, data.first(140), [60, 137, 138, 140], settings)


def assert_tokens_are_read(
    method: AttentionMethod, data: Data, cuts: list[int], settings: dict[str, Any]
) -> None:
    stream, starts = Stream(method, data), data.starts
    heads, group = data.q.shape[1], data.q.shape[1] // data.k.shape[1]
    for a, z in zip([0, *cuts], cuts, strict=False):
        with recorded(method) as seen:
            part = stream.call(z)
        selections = iter(seen)
        total = 0
        together = seen[0].phase == "decode" or not starts
        for b, first in enumerate(starts or [0]):
            begin = max(a, first)
            if begin >= z:
                continue
            got = None if together else reads(next(selections), b, 0, heads)
            if together:
                got = reads(seen[0], b, first, heads)[begin - a :]
            assert got is not None
            for i, sets in zip(range(begin - first, z - first), got, strict=True):
                want = getattr(naive_patterns, method.name)(i, **settings)
                total += len(want) * heads
                for h in range(heads):
                    assert sets[h] == want, f"query {i} of row {b}"
                    k, v = (x[b, h // group, first:] for x in (data.k, data.v))
                    out = naive.attention(data.q[b, h, first + i], k, v, want, data.scale)
                    assert (part.out[b, h, first + i - a] - out).abs().max() < 1e-12
        assert stream.reads[-1].pairs == total


def test_bands_count_their_pairs_without_a_mask() -> None:
    for bands, sinks in (
        ((Band(1, 0, 7),), 0),
        ((Band(3, 0, 21),), 5),
        ((Band(1, 0, 6), Band(4, 8, None)), 3),
        ((Band(2, 4, 5),), 40),
        ((Band(2, 4, 4),), 1),
    ):
        index = Bands(bands=bands, sinks=sinks)
        for begin, end in ((0, 1), (0, 33), (20, 33), (32, 33)):
            assert index.pairs(begin, end) == int(index.to_mask(end - begin, end, None, 1).sum())


def test_keys_that_ranks_must_fetch_for_bands() -> None:
    """Against the union of what the chunk's queries read."""
    for bands, sinks in (
        ((Band(5, 0, 35),), 0),
        ((Band(1, 0, 3), Band(7, 7, None)), 2),
        ((Band(4, 8, 17),), 0),
    ):
        index = Bands(bands=bands, sinks=sinks)
        for begin, end in ((0, 40), (17, 40), (38, 40), (39, 40)):
            for first in (0, 9):
                if first > begin:
                    continue
                mask = index.to_mask(end - begin, end, torch.tensor([first]), 1)
                got = index.needed((begin, end), [first], HKV, torch.device("cpu"))
                assert torch.equal(got, mask.any(2).expand(-1, HKV, -1)), (bands, begin, end, first)


def test_many_sinks_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit a tile is taken in several; later ones need no mask."""
    from farspan.attention.selection import bands

    method = farspan.methods()["dilated"](w=4, dilation=2, sinks=30)
    data = Data.random(150)
    want = Stream(method, data).call(150)
    monkeypatch.setattr(bands, "_PAIRS", 30 * G * 16)
    got = Stream(method, data).call(150)
    assert (got.out - want.out).abs().max() < 1e-12
    assert (got.lse - want.lse).abs().max() < 1e-12


def test_gradients_of_a_dilated_pattern() -> None:
    """Training goes through the classes and their merge: against a dense softmax under the mask."""
    method = farspan.methods()["strided"](w=5, stride=4, sinks=2)
    data = Data.random(40)
    leaves = [x.clone().requires_grad_() for x in (data.q, data.k, data.v)]
    target = torch.randn(1, H, 40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    part = Stream(method, Data(*leaves)).call(40)
    got = torch.autograd.grad((part.out * target).sum() + part.lse.sum(), leaves)
    mask = method.bands.to_mask(40, 40, None, 1)
    q, k, v = leaves
    logits = q @ k.repeat_interleave(G, 1).transpose(2, 3) * SCALE
    logits = logits.masked_fill(~mask, -torch.inf)
    out = torch.softmax(logits, -1) @ v.repeat_interleave(G, 1)
    want = torch.autograd.grad((out * target).sum() + logits.logsumexp(-1).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-10


# --- block by block ---------------------------------------------------------------------------------------

GIVEN = torch.rand(19, 19, generator=torch.Generator().manual_seed(2)) < 0.25
BLOCKS: list[tuple[str, dict[str, Any]]] = [
    ("a_shape", {"w": 20, "sinks": 4, "block": 8}),
    ("a_shape", {"w": 17, "sinks": 9, "block": 8}),
    ("a_shape", {"w": 1, "sinks": 0, "block": 8}),
    ("block_static", {"block": 8}),
    ("block_static", {"block": 8, "stride": 4}),
    ("block_static", {"block": 8, "stride": 8, "w": 18, "sinks": 3}),
    ("block_static", {"block": 8, "pattern": "given", "mask": GIVEN}),
]


@pytest.mark.parametrize(("name", "settings"), BLOCKS, ids=str)
@pytest.mark.parametrize("cuts", [[150], [64, 150], [37, 90, 150]], ids=["whole", "aligned", "unaligned"])
@pytest.mark.parametrize("starts", [None, [0, 21, 120]])
def test_exactly_the_blocks_are_read(
    name: str, settings: dict[str, Any], cuts: list[int], starts: list[int] | None
) -> None:
    assert_blocks_are_read(farspan.methods()[name](**settings), Data.random(150, starts), cuts)


def test_exactly_the_blocks_are_read_on_smollm2(smollm2_layers: list[Data]) -> None:
    for name, settings in BLOCKS:
        method = farspan.methods()[name](**settings)
        for data in smollm2_layers:
            assert_blocks_are_read(method, data.first(150), [61, 150])


def assert_blocks_are_read(method: Any, data: Data, cuts: list[int]) -> None:
    stream = Stream(method, data)
    for a, z in zip([0, *cuts], cuts, strict=False):
        with recorded(method) as seen:
            stream.call(z)
        rows = [first for first in data.starts or [0] if first < z]
        for first, selection in zip(rows, seen, strict=True):
            begin, end = max(a, first) - first, z - first
            index = selection.index
            if index is None:
                assert bool((selection.mask() == causal_mask(end - begin, end, None, 1)).all())
                assert end <= method.w + method.sinks
                continue
            # Query blocks are counted from the row's first position, wherever the prompt is cut.
            for n, at in enumerate(range(begin // 8 * 8, end, 8)):
                queries = range(at, min(at + 8, end))
                want = naive_patterns.a_shape(queries, w=method.w, sinks=method.sinks, block=8)
                if method.name == "block_static":
                    i = at // 8
                    if method.mask is None:
                        want |= naive_patterns.butterfly(i, method.stride)
                    else:
                        want |= {j for j in range(i + 1) if bool(GIVEN[i, j])}
                for head in range(data.k.shape[1]):
                    count = int(index.counts[0, head, n])
                    assert index.blocks[0, head, n, :count].tolist() == sorted(want), f"query block {n}"


def test_the_butterfly_of_flash_attention_in_full() -> None:
    """16 blocks, from one factor matrix per binary digit: block i meets i with that digit flipped."""
    method = farspan.methods()["block_static"](block=8)
    with recorded(method) as seen:
        Stream(method, Data.random(128)).call(128)
    got = seen[0].mask()[0, 0, 7::8, ::8].int()
    want = torch.eye(16, dtype=torch.int)
    for digit in range(4):
        factor = torch.zeros(16, 16, dtype=torch.int)
        for i in range(16):
            factor[i, i ^ (1 << digit)] = 1
        want |= factor
    assert torch.equal(got, want.tril())


# --- clusters ---------------------------------------------------------------------------------------------

ROUTING = [
    {"k": 40, "clusters": 4, "segment": 16, "block": 8, "window": 8, "sinks": 2},
    {"k": 33, "clusters": 6, "segment": 25, "block": 8, "window": 1, "sinks": 0, "gqa_reduce": "none"},
    {"k": 30, "clusters": 10, "segment": 10, "block": 16, "window": 13, "sinks": 1, "gqa_reduce": "max"},
    {"k": 20, "clusters": 3, "segment": 10, "block": 1, "window": 4, "sinks": 0, "gqa_reduce": "none"},
    {"k": 64, "clusters": 1, "segment": 16, "block": 16, "window": 16, "sinks": 0},
]


def clustered(data: Data) -> Data:
    """Keys around five directions, each KV head its own, and queries drawn to one of them at a time."""
    generator = torch.Generator().manual_seed(5)
    n, d = data.k.shape[2:]
    centres = 3 * torch.randn(HKV, 5, d, generator=generator, dtype=torch.float64)
    which = torch.randint(5, (HKV, n), generator=generator)
    k = data.k + torch.stack([centres[h, which[h]] for h in range(HKV)])
    topic = torch.arange(n) // 30 % 5
    q = data.q + torch.stack([centres[h // G, topic] for h in range(H)])
    return Data(q, k, data.v, data.starts)


@pytest.mark.parametrize("settings", ROUTING, ids=str)
@pytest.mark.parametrize("cuts", [[150], [64, 150], [37, 90, 150]], ids=["whole", "aligned", "unaligned"])
@pytest.mark.parametrize("starts", [None, [0, 21, 120]])
@pytest.mark.parametrize("peaked", [False, True])
def test_routing(settings: dict[str, Any], cuts: list[int], starts: list[int] | None, peaked: bool) -> None:
    data = Data.random(150, starts)
    assert_routed(farspan.methods()["routing"](**settings), clustered(data) if peaked else data, cuts)


def test_routing_on_smollm2(smollm2_layers: list[Data]) -> None:
    for settings in (
        {"k": 120, "clusters": 8, "segment": 64, "block": 32, "window": 32},
        {"k": 90, "clusters": 5, "segment": 50, "block": 16, "window": 16, "gqa_reduce": "none"},
    ):
        for data in smollm2_layers:
            assert_routed(farspan.methods()["routing"](**settings), data, [200, 512])


def learned_routing(settings: dict[str, Any]) -> Any:
    """``routing`` with random centroids, not all of length 1."""
    torch.manual_seed(7)
    method = farspan.methods()["routing"](centroids="learned", **settings).for_training(layer_info())
    assert method is not None and method.module is not None
    with torch.no_grad():
        method.module.centroids *= 0.5 + torch.rand(HKV, settings["clusters"], 1)
    return method


@pytest.mark.parametrize("settings", ROUTING, ids=str)
@pytest.mark.parametrize("starts", [None, [0, 21, 120]])
def test_routing_to_learned_centroids(settings: dict[str, Any], starts: list[int] | None) -> None:
    assert_routed(learned_routing(settings), clustered(Data.random(150, starts)), [37, 90, 150])


def test_what_centroids_learn() -> None:
    """The loss and its gradient against the definition, with a centroid that nothing belongs to; by descent
    the loss falls, and every centroid gets members."""
    method = learned_routing({"k": 40, "clusters": 5, "segment": 16, "block": 8, "window": 8})
    module = method.module.double()
    with torch.no_grad():
        module.centroids[0, 3] *= 0.01
    data = clustered(Data.random(60, [0, 0]))
    keys = Keys(kv=KV(data.k, data.v), tq=60, softmax=Softmax(0.25))
    loss = method.distillation_loss(data.q, keys)
    (got,) = torch.autograd.grad(loss, module.centroids)
    mu = module.centroids.detach().clone().requires_grad_()
    # One row that has the tokens of both.
    whole = naive_patterns.commitment(
        data.q.transpose(0, 1).flatten(1, 2), data.k.transpose(0, 1).flatten(1, 2), mu
    )
    (want,) = torch.autograd.grad(whole, mu)
    assert abs(loss - whole) < 1e-12 and (got - want).abs().max() < 1e-12 and bool(want[0, 3].any())
    steps = torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.0)
    for _ in range(150):
        steps.zero_grad()
        now = method.distillation_loss(data.q, keys)
        now.backward()
        steps.step()
    assert now < 0.5 * loss
    unit = torch.nn.functional.normalize(
        torch.cat([data.q.unflatten(1, (HKV, G)).flatten(2, 3), data.k], 2), dim=3
    )
    used = (unit @ module.centroids.transpose(1, 2)).argmax(3)
    assert all(len(used[:, h].unique()) == 5 for h in range(HKV))


def assert_routed(method: Any, data: Data, cuts: list[int]) -> None:
    stream = Stream(method, data)
    heads, kv_heads = data.q.shape[1], data.k.shape[1]
    group = heads // kv_heads
    known = {f: getattr(method, f) for f in ("clusters", "segment", "block", "window", "sinks", "gqa_reduce")}
    chosen = swapped = 0
    for a, z in zip([0, *cuts], cuts, strict=False):
        with recorded(method) as seen:
            stream.call(z)
        rows = [(b, first) for b, first in enumerate(data.starts or [0]) if first < z]
        for (b, first), selection in zip(rows, seen, strict=True):
            begin = max(a, first)
            if selection.index is None:
                assert z - first <= method.k
                continue
            index = selection.index
            assert index.block_k == 1
            shared = heads // index.blocks.shape[1]
            for head in range(kv_heads):
                want = naive_patterns.routing(
                    data.q[b, head * group : head * group + group, begin:z],
                    data.k[b, head, first:z],
                    past=begin - first,
                    k_tokens=method.k,
                    learned=None if method.module is None else method.module.centroids[head],
                    **known,
                )
                assert index.blocks.shape[2] == len(want)
                for n, per_head in enumerate(want):
                    for g in range(group):
                        h = (head * group + g) // shared
                        count = int(index.counts[0, h, n])
                        got = index.blocks[0, h, n, :count].tolist()
                        read, near = per_head[g]
                        assert got == sorted(set(got)) and len(got) == len(read)
                        # A cluster of two has its centroid in their middle: they tie but for rounding.
                        values = [near[j] for j in set(got) ^ read]
                        tied = not values or max(values) - min(values) < 1e-12
                        assert tied, f"row {b}, head {h}, block {n}"
                        swapped += len(values)
                        chosen += len(got) < begin - first + n * method.block
    assert chosen > swapped


def test_ties_of_routing_go_to_the_lowest_position() -> None:
    """All keys alike: one centroid takes them all, and the first are read."""
    method = farspan.methods()["routing"](k=26, clusters=4, segment=16, block=8, window=8, sinks=0)
    same = torch.ones(1, H, 80, 16).double()
    with recorded(method) as seen:
        Stream(method, Data(same, same[:, :HKV], same[:, :HKV])).call(80)
    for n, begin in ((4, 32), (9, 72)):
        row = seen[0].index.blocks[0, 0, n].tolist()
        assert row == [*range(11), *range(begin - 7, begin + 8)]


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("strided", {"w": 8, "stride": 4, "reach": 5}, "reach of at least w; got reach=5, w=8"),
        ("dilated", {"dilation": 0}, "dilation a whole number, at least 1; got 0"),
        ("block_static", {"pattern": "given"}, "mask=...)"),
        ("block_static", {"mask": GIVEN}, "only there"),
        ("block_static", {"pattern": "given", "mask": GIVEN[:3]}, "got [3, 19] of torch.bool"),
        ("block_static", {"pattern": "given", "mask": GIVEN.float()}, "of torch.float32"),
        ("block_static", {"pattern": "star"}, "butterfly or given"),
        ("routing", {"clusters": 300}, "clusters can be at most segment; got clusters=300, segment=256"),
        ("routing", {"k": 300}, "here 324"),
        ("routing", {"k": 1000, "window": 1000}, "here 1068"),
    ],
)
def test_bad_settings_are_refused(name: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(farspan.SpecError, match=re.escape(says)):
        farspan.methods()[name](**settings)


def test_a_mask_that_is_too_small_is_refused() -> None:
    method = farspan.methods()["block_static"](block=8, pattern="given", mask=GIVEN)
    with pytest.raises(FarspanError, match="mask of 19 blocks of 8 tokens, which is 152 tokens"):
        Stream(method, Data.random(153)).call(153)
