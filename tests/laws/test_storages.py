"""The laws on quantised stores. Streams are in float64, so an output differs from the definition over the
numbers that the store holds by rounding in float64 alone: the rounding of the format is in both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farspan
from farspan.attention.keys import Keys
from farspan.attention.method import DECODE, AttentionMethod
from farspan.attention.partial import Partial
from farspan.attention.quantised import Quantised
from farspan.attention.sources import Supply
from farspan.attention.summary import Summaries

from ..parallel.jobs import TWO_LAYERS, Case, stepped, stepped_over_ranks
from ..parallel.world import World
from .parameters import full_settings, sparse_settings
from .tools import HKV, Data, H, Stream, assert_same, decode_cuts, recorded

GROUP = 16
STORAGES = pytest.mark.parametrize(
    "storage", [f"int8:group={GROUP},window=8", f"int4:group={GROUP},window=20"]
)
# Each way of reading keys once: everything, windows, pages, chosen tokens, labels, kept sets, blocks
# of keys in another order.
NAMES = ("dense", "window", "quest", "block_topk", "double_sparsity", "recycled", "h2o", "pbs")


def methods(settings: Any, *without: str) -> Any:
    registered, names = farspan.methods(), [name for name in NAMES if name not in without]
    cases = [pytest.param(registered[name](**settings(registered[name])[0]), id=name) for name in names]
    return pytest.mark.parametrize("method", cases)


def loads(mask: torch.Tensor) -> torch.Tensor:
    """A mask [B, 1 | Hkv | H, Tq, Tk] with a head for each time that a key is loaded."""
    return mask.expand(-1, max(HKV, mask.shape[1]), -1, -1)


def packed_positions(stream: Stream) -> int:
    kv = stream.store.kv
    assert isinstance(kv, Quantised), "nothing was packed"
    return kv.packed


@STORAGES
@methods(full_settings)
def test_law_1_a_full_budget_is_dense(bound: AttentionMethod, storage: str) -> None:
    data, cuts = Data.random(90, [0, 17, 61]), [40, *decode_cuts(75, 6), 90]
    dense = Stream(farspan.parse_method("dense"), data, storage=storage)
    assert_same(Stream(bound, data, storage=storage).run(cuts), dense.run(cuts))
    assert packed_positions(dense) >= 64


@STORAGES
@pytest.mark.parametrize("starts", [None, [0, 21, 95]])
@methods(sparse_settings, "recycled")
def test_laws_3_and_5_any_cuts_equal_the_definition(
    bound: AttentionMethod, storage: str, starts: list[int] | None
) -> None:
    """Eager operations, which read packed rows, against the definition over decoded numbers. Recycled keeps
    rows from before they are packed; its definition is below."""
    data, cuts = Data.random(160, starts), [60, 110, *decode_cuts(140, 6), 160]
    got = Stream(bound, data, storage=storage)
    want = Stream(bound, data, storage=storage, impl="reference")
    assert_same(got.run(cuts), want.run(cuts))
    assert packed_positions(got) >= 128


@STORAGES
@pytest.mark.parametrize("pool", [1, 3])
@pytest.mark.parametrize("starts", [None, [0, 21, 95]])
def test_recycled_reads_its_rows_as_they_were_when_they_entered(
    starts: list[int] | None, pool: int, storage: str
) -> None:
    """A full step reads what is stored before it, and the set that it chooses keeps these numbers; a token
    that enters later has its own. So a set has rows that the store has rounded since."""
    bound, data = farspan.parse_method(f"recycled:k=24,stride=7,pool={pool}"), Data.random(170, starts)
    stored: list[tuple[torch.Tensor, torch.Tensor]] = []  # all keys and values, as a call finds them
    sets: list[torch.Tensor] = []  # [B, Hkv, k], after the call

    def spied(name: str) -> Any:
        original = getattr(type(bound), name)

        def call(self: AttentionMethod, q: torch.Tensor, keys: Keys) -> Any:
            found = original(self, q, keys)
            stored.append(tuple(x.clone() for x in keys.kv.dense()))
            sets.append(keys.state["tokens"].clone())
            return found

        return call

    with pytest.MonkeyPatch.context() as patching:
        for name in ("select_decode", "on_prefill_end"):
            patching.setattr(type(bound), name, spied(name))
        stream, since = Stream(bound, data, storage=storage), 0
        stream.call(130)
        kept = [x.clone() for x in stored[0]]  # the rows of the sets at their positions
        for t in range(130, 170):
            with recorded(bound) as seen:
                got = stream.call(t + 1)
            full = seen[0].index.full
            assert (full is not None) is (t % 7 == 129 % 7)
            if full is not None:
                assert full.all()
                kept = [x.clone() for x in stored[-1]]
                read = torch.ones(len(data.q), HKV, t + 1, dtype=torch.bool)
            else:
                kept = [torch.cat([old, x[:, :, t:]], 2) for old, x in zip(kept, stored[-1], strict=True)]
                read = torch.zeros(len(data.q), HKV, t + 1, dtype=torch.bool).scatter_(2, sets[-1], True)
                rounded_since = (read[..., None] & (kept[0] != stored[-1][0])).any()
                since += int(rounded_since)
            for b, first in enumerate(starts or [0]):
                read[b, :, :first] = False
            assert_same(got, attention(data, t, *kept, read))
    assert since > 5 and packed_positions(stream) >= 128


def attention(data: Data, t: int, k: torch.Tensor, v: torch.Tensor, read: torch.Tensor) -> Partial:
    """Query t over the keys and values [B, Hkv, t + 1, D] that ``read`` names."""
    q = data.q[:, :, t].unflatten(1, (HKV, -1))
    logits = torch.einsum("bhgd,bhnd->bhgn", q, k) * data.scale
    logits = logits.masked_fill(~read[:, :, None], -torch.inf)
    out = torch.einsum("bhgn,bhnd->bhgd", logits.softmax(-1), v)
    return Partial(out.flatten(1, 2)[:, :, None], logits.logsumexp(-1).flatten(1, 2)[:, :, None])


@STORAGES
@methods(sparse_settings)
def test_law_4_a_row_alone_is_the_row_in_a_batch(bound: AttentionMethod, storage: str) -> None:
    """Rows that begin at a multiple of the group have the groups that they have alone. The padding before the
    others is in no group's scale, but their first group is shorter: see test_quantised_store.py."""
    starts, prompt, steps = [0, 2 * GROUP, 5 * GROUP], 130, 20
    data = Data.random(prompt + steps, starts)
    got = Stream(bound, data, storage=storage).run(decode_cuts(prompt, steps))
    for b, first in enumerate(starts):
        want = Stream(bound, data.row(b), storage=storage).run(decode_cuts(prompt - first, steps))
        assert_same(Partial(got.out[b : b + 1, :, first:], got.lse[b : b + 1, :, first:]), want)


@STORAGES
@methods(sparse_settings)
def test_law_7_summaries_are_those_of_the_keys_up_to_their_rounding(
    bound: AttentionMethod, storage: str
) -> None:
    """Summaries are computed from keys as they were appended; made anew, they are those of stored keys."""
    data, cuts = Data.random(120), [100, *range(101, 121)]
    kept, plain = Stream(bound, data, storage=storage), Stream(bound, data)
    for stream in (kept, plain):
        stream.run(cuts)
    supply = Supply(kept.store.kv)
    half_a_step = kept.store.kv.stored[1][..., : data.k.shape[3]].max() / 2
    for summary in bound.summaries:
        got = kept.store.summaries.get(summary, supply, None)
        exact = plain.store.summaries.get(summary, Supply(plain.store.kv), None)
        anew = Summaries().get(summary, supply, None)
        assert (got - exact).abs().max() <= half_a_step  # of a block that was open when it was packed
        assert (anew - exact).abs().max() <= half_a_step


@STORAGES
@pytest.mark.parametrize("starts", [None, [0, 33, 110]])
@methods(sparse_settings)
def test_law_8_what_is_reported_is_what_is_read(
    bound: AttentionMethod, storage: str, starts: list[int] | None
) -> None:
    data = Data.random(150, starts)
    stream, dense = Stream(bound, data, storage=storage), farspan.parse_method("dense")
    for cut in decode_cuts(130, 12):
        before = packed_positions(stream) if cut > 130 else 0
        with recorded(bound, dense) as seen:
            stream.call(cut)
        reads, heads = stream.reads[-1], [s.mask().shape[1] for s in seen]
        pairs = [int(s.mask().sum()) * H // n + s.entries() * H for s, n in zip(seen, heads, strict=True)]
        assert reads.pairs == sum(pairs)
        if seen[0].phase == DECODE and packed_positions(stream) == before:
            loaded = sum(int(loads(s.mask()).sum()) for s in seen)
            held = sum(x.nbytes for x in stream.store.kv.stored) // (data.q.shape[0] * HKV * cut)
            assert reads.kv_bytes == loaded * held


@STORAGES
@pytest.mark.parametrize("method", ["window:w=24", "quest:k=24,page=8,dense_layers=0", "recycled:k=24"])
def test_law_8_poison_where_the_index_does_not_point(method: str, storage: str) -> None:
    """NaN in the steps of values that no head reads changes no output."""
    bound, data, cuts = farspan.parse_method(method), Data.random(140), decode_cuts(130, 2)
    clean, poisoned = (Stream(bound, data, storage=storage) for _ in range(2))
    clean.run(cuts)
    poisoned.run(cuts)
    with recorded(bound) as seen:
        want = clean.call(133)
    read = loads(seen[-1].mask())[0].any(1)
    kv = poisoned.store.kv
    assert isinstance(kv, Quantised)
    unread = ~read[:, : kv.packed, None]
    assert unread.any()
    kv.stored[3][0].masked_fill_(unread, torch.nan)
    assert_same(poisoned.call(133), want)


@STORAGES
def test_law_6_over_ranks(world: World, storage: str) -> None:
    """Each rank rounds the positions that it holds in groups of its own, so that logits differ by what
    rounding costs. Ranks agree to the bit."""
    for spec in ("dense", "quest:k=32,page=8,dense_layers=0"):
        common = {"spec": spec, "overrides": TWO_LAYERS, "calls": (130, 1, 1, 60, *[1] * 20, -30, 1)}
        case = Case(patch={"storage": storage}, parallel={"block": GROUP}, **common)
        plain, alone = stepped(Case(**common))["logits"], stepped(case)
        ranks = [done[0] for done in world.run(stepped_over_ranks, 2, [case])]
        assert ranks[0]["seen"] == ranks[1]["seen"] == alone["seen"]
        costs = max((a - b).abs().max() for a, b in zip(alone["logits"], plain, strict=True))
        for i, want in enumerate(plain):
            got, other = (done["logits"][i] for done in ranks)
            assert torch.equal(got, other)
            # The first call reads its own keys, which are not rounded yet.
            assert (got - want).abs().max() <= (2 * costs if i else 1e-9)
