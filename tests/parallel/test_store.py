"""What ranks keep of a sequence: crops, windows, turns, caches that outlive a patch; and how evenly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import farspan
from farspan.attention.selection import BlockIndex, TokenIndex
from farspan.attention.softmax import Softmax
from farspan.runtime.store.shard import ShardStore
from farspan.runtime.store.storage import parse_storage

from .jobs import BLOCK, Case, model_of, prompts, random_ids, stepped, stepped_over_ranks
from .world import World

SPARSE = "block_topk:k=32,block=16 + quest:k=16,page=4,dense_layers=0"


def assert_steps(world: World, sizes: tuple[int, ...], cases: list[Case]) -> None:
    for size in sizes:
        ranks = world.run(stepped_over_ranks, size, cases)
        for i, case in enumerate(cases):
            want = stepped(case)
            for rank, got in enumerate(done[i] for done in ranks):
                assert got["seen"] == want["seen"]
                for step, (a, b) in enumerate(zip(got["logits"], want["logits"], strict=True)):
                    error = (a - b).abs().max()
                    assert error < 1e-8, (
                        f"call {step} differs by {error:.1e} on rank {rank} of {size}: {case}"
                    )


@pytest.mark.parametrize("spec", ["dense", SPARSE, "recycled:k=24,stride=4"])
def test_crops_and_further_prompts(spec: str, world: World):
    """Assisted decoding crops; a further prompt meets blocks that were open, cropped, or never summarised."""
    cases = [
        Case(spec=spec, calls=(61, 1, 5, -3, 1, 9, -9, 2, 40, -20, 1, 1)),
        Case(spec=spec, lengths=(1, 1), calls=(40, 1, 1, -41, 3, 61, 1)),
        Case(spec=spec, lengths=(1, 1, 1), calls=(3, 17, 16, -1, 33, 1)),
    ]
    assert_steps(world, (2, 4), cases)


@pytest.mark.parametrize("spec", ["core_context:g=4,s=16", "combiner:span=8", "descriptors:chunk=16,pool=4"])
def test_keys_that_have_summaries_are_dropped(spec: str, world: World):
    """Further prompts and crops as on one device, which drops keys, too; no rank keeps more than its part."""
    calls = (161, 1, 5, -3, 1, 9, -9, 2, 40, -12, 1, 1)
    cases = [Case(spec=spec, calls=calls), Case(spec=spec, lengths=(1, 1), calls=(90, 1, 70, -16, 1, 30, 1))]
    assert_steps(world, (2, 3), cases)
    for case in cases:
        [ranks] = zip(*world.run(stepped_over_ranks, 3, [case]), strict=True)
        for rows in zip(*(got["rows"] for got in ranks), strict=True):
            assert sum(rows) <= 20 + 16 + BLOCK


@pytest.mark.parametrize("spec", ["snapkv:k=24,window=8,evict=true", "h2o:k=15,evict=true"])
def test_keys_that_are_evicted(spec: str, world: World):
    """Further prompts and crops as on one device; the ranks keep equally many of the keys that are left."""
    crop = () if spec.startswith("h2o") else (1, 1, -2, 1)
    cases = [
        Case(spec=spec, calls=(161, 1, 5, 1, *crop, 90, 1, 3, 1)),
        Case(spec=spec, lengths=(1, 1), calls=(90, 1, 1, 70, 1, 5, 1)),
    ]
    assert_steps(world, (2, 3), cases)
    for i, case in enumerate(cases):
        want = stepped(case)["rows"]
        ranks = [done[i]["rows"] for done in world.run(stepped_over_ranks, 2, cases)]
        for kept, *rows in zip(want, *ranks, strict=True):
            assert sum(rows) == kept < 40
            assert max(rows) - min(rows) <= BLOCK


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "mistral"])
def test_sliding_layers_after_a_crop(name: str, world: World):
    """What lies before the window is dropped in blocks, and stays dropped when the sequence is cut back."""
    cases = [
        Case(model=name, calls=(61, 1, 12, -11, 1, 1, 2, 1, 1), parallel={"block": block}) for block in (4, 8)
    ]
    cases.append(Case(model=name, lengths=(1, 1), calls=(61, 9, -5, 1, 30, 7, -6, 1, 1)))
    for size in (2, 3):
        ranks = world.run(stepped_over_ranks, size, cases)
        for i, case in enumerate(cases):
            want = _whole(case)
            for rank, got in enumerate(done[i] for done in ranks):
                for a, b in zip(got["logits"], want, strict=True):
                    assert (a - b).abs().max() < 1e-8, f"rank {rank} of {size}: {case}"


def _whole(case: Case) -> list[torch.Tensor]:
    """The same logits without a cache: every call reads the whole sequence. (transformers' own sliding layers
    cannot be cropped beyond their window.)"""
    model = model_of(case)
    ids = random_ids(case)
    logits, at = [], 0
    with farspan.patch(model), torch.no_grad():
        for n in case.calls:
            at += n
            if n > 0:
                logits.append(model(ids[:, :at], use_cache=False).logits[:, at - n :])
    return logits


def test_ranks_hold_equal_shares(world: World):
    """Over many short prompts and chunks too, at most a block above the average."""
    cases = [
        Case(calls=(20,) * 7),
        Case(spec="block_topk:k=32,block=16", calls=(241,), patch={"prefill_chunk": 32}),
        Case(spec="block_topk:k=32,block=16", calls=(20, 1, 1, 33, 1, 47, 1, 25)),
        Case(calls=(7, *(1,) * 60)),
    ]
    for size in (2, 3, 4):
        for done in world.run(stepped_over_ranks, size, cases):
            for case, got in zip(cases, done, strict=True):
                block_multiple = 16 if "block_topk" in case.spec else BLOCK
                total = got["seen"]
                assert all(rows <= total / size + block_multiple for rows in got["rows"]), (got["rows"], case)


def test_every_byte_is_in_the_report(world: World):
    case = Case(model="gemma3", spec="block_topk:k=32,block=16", calls=(241, 1, 1))
    reports = [got["report"] for [got] in world.run(stepped_over_ranks, 3, [case])]
    assert sum(report.traffic.get("rearrange", 0) for report in reports) > 0  # of the sliding layers
    for report in reports:
        assert 0 < report.summary["sent_bytes"] < sum(report.traffic.values())
    plain = Case(spec=SPARSE, calls=(241, 1, 1))
    for [got] in world.run(stepped_over_ranks, 3, [plain]):
        report = got["report"]
        others = report.traffic["hidden"] + report.traffic["agree"]
        assert report.summary["sent_bytes"] == sum(report.traffic.values()) - others
        assert str(report).count("in all") == 1


def with_two_patches(group: Any) -> bool:
    """A cache goes on under a new patch over the same ranks."""
    case = Case()
    model, (ids, _) = model_of(case), prompts(case)
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    config = farspan.ContextParallel(mesh=group)
    with farspan.patch(model, parallel=config):
        out = model.generate(ids, return_dict_in_generate=True, **how)
    more = torch.cat([out.sequences, ids[:, :30]], 1)
    with farspan.patch(model, parallel=config):
        second = model.generate(more, past_key_values=out.past_key_values, **how)
    with farspan.patch(model):
        return torch.equal(second, model.generate(more, **how))


def test_a_cache_outlives_its_patch(world: World):
    assert all(world.run(with_two_patches, 3))


# --- by brute force ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [2, 4], ids=["per KV head", "per head"])
@pytest.mark.parametrize("ordered", [False, True])
def test_needed_keys(heads: int, ordered: bool):
    draw = torch.Generator().manual_seed(heads)
    kv, tk, tq, block = 2, 61, 24, 8
    marks = torch.rand(2, heads, -(-tq // 8), -(-tk // block), generator=draw) < 0.4
    counts = marks.sum(-1).int()
    blocks = torch.argsort(~marks, dim=-1, stable=True).int()
    order = torch.stack([torch.randperm(tk, generator=draw) for _ in range(2 * heads)]).view(2, heads, tk)
    index = BlockIndex(
        blocks=blocks, counts=counts, block_q=8, block_k=block, key_order=order if ordered else None
    )
    read = index.to_mask(tq, tk).unflatten(1, (kv, -1)).any(2).any(2)  # [B, Hkv, Tk]
    got = index.needed((tk - tq, tk), [0, 0], kv, torch.device("cpu"))
    assert not bool((read & ~got).any()), "a key that is read is not fetched"
    # A block is fetched whole; what is fetched besides lies in a block that is read.
    places = order if ordered else torch.arange(tk).expand(2, heads, tk)
    whole = torch.zeros(2, heads, tk, dtype=torch.bool)
    for b in range(2):
        for h in range(heads):
            for j in marks[b, h].any(0).nonzero()[:, 0].tolist():
                whole[b, h, places[b, h, j * block : (j + 1) * block]] = True
    assert torch.equal(got, whole.unflatten(1, (kv, -1)).any(2))


def test_localised_tokens():
    draw = torch.Generator().manual_seed(3)
    tokens = torch.stack([torch.randperm(50, generator=draw)[:12] for _ in range(6)]).view(1, 2, 3, 12)
    counts = torch.randint(0, 13, (1, 2, 3), generator=draw).int()
    places = torch.tensor([*range(4, 11), 30, 31, 49])
    index = TokenIndex(tokens=tokens, counts=counts).localised(places)
    for s in range(2):
        for t in range(3):
            want = sorted(set(tokens[0, s, t, : counts[0, s, t]].tolist()) & set(places.tolist()))
            assert index.number()[0, s, t] == len(want)
            assert places[index.tokens[0, s, t, : len(want)]].tolist() == want


@pytest.mark.parametrize("rank", [0, 1])
def test_padding_has_no_part_in_the_groups_of_a_rank(rank: int):
    """A rank has blocks of 16 positions in turn. Whatever stands in the padding, the real keys of a group are
    off by half a step of their own range at most."""
    draw = torch.Generator().manual_seed(rank)
    k, v, q = (torch.randn(2, 2, 160, 32, generator=draw) for _ in range(3))
    k[1, :, :72] = 1e4
    store: Any = ShardStore(
        SimpleNamespace(size=2, rank=rank), 16, storage=parse_storage("int8:group=16,window=0")
    )
    mine = store.take_shared(k, v)
    store.pack(q, Softmax(32**-0.5), torch.tensor([0, 72]))
    assert store.kv.packed == len(mine) == 80 and torch.equal(store.places(k.device), mine)
    error = (store.kv.dense()[0] - k[:, :, mine]).abs()
    real = mine >= torch.tensor([0, 72])[:, None]
    assert 0 < error.transpose(1, 2)[real].max() <= 0.5 * 1.01 * (k[0].max() - k[0].min()) / 255
