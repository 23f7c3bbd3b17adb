"""Formats in other memories, caches that go from one storage to another, and emptied caches."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import DynamicCache

import farspan
from farspan.attention.softmax import Softmax
from farspan.attention.summary import Summaries
from farspan.runtime.store.shard import ShardStore
from farspan.runtime.store.storage import parse_storage
from farspan.runtime.store.store import KVStore

from .small_models import decode, logits, make, padded, prompt, shared
from .test_tiers import open_files, resident

INT8 = "int8:group=16,window=8"
QUEST = "quest:k=16,page=4,dense_layers=0"
EVERY = ["device", INT8, "host", "disk:folder={}", f"{INT8}+disk:folder={{}}", f"{INT8}+host"]


def call(store: KVStore, count: int, batch: int = 2, starts: list[int] | None = None) -> torch.Tensor:
    """A call of a layer with random keys, which are returned."""
    k = torch.randn(batch, 2, count, 32)
    store.append(k, torch.randn(batch, 2, count, 32))
    store.align(starts, store.total)
    start = None if starts is None else torch.tensor(starts)
    store.pack(torch.randn(batch, 4, count, 32), Softmax(32**-0.5), start)
    store.settle()
    return k


def close_to(got: torch.Tensor, want: torch.Tensor, storage: str) -> bool:
    """Equal, or within the rounding of int8."""
    return bool((got - want).norm() <= (0.03 if "int8" in storage else 1e-5) * want.norm())


@pytest.mark.parametrize("memory", ["host", "disk:folder={}"])
@pytest.mark.parametrize("spec", ["dense", QUEST])
def test_a_format_in_another_memory(spec: str, memory: str, tmp_path: Path) -> None:
    """Beams, padding, chunks and assisted decoding give the tokens of the format on the device."""
    model, assistant = shared("llama"), make("llama", seed=1)
    ways: Any = ({"num_beams": 3, "prefill_chunk_size": 16}, {"assistant_model": assistant})
    for inputs, how in zip((padded(), prompt()), ways, strict=True):
        with farspan.patch(model, spec, storage=INT8):
            want = decode(model, inputs, 24, **how)
        with farspan.patch(model, spec, storage=f"{INT8}+{memory.format(tmp_path)}"):
            assert torch.equal(decode(model, inputs, 24, **how), want)


@pytest.mark.parametrize("storage", EVERY)
def test_a_model_that_is_not_patched_goes_on(storage: str, tmp_path: Path) -> None:
    model, ids, cache = shared("llama"), prompt(1, 60), DynamicCache()
    with farspan.patch(model, storage=storage.format(tmp_path)):
        logits(model, ids[:, :50], past_key_values=cache)
    got = [logits(model, ids[:, a:b], past_key_values=cache) for a, b in ((50, 57), (57, 58), (58, 60))]
    assert close_to(torch.cat(got, 1), logits(model, ids)[:, 50:], storage)


@pytest.mark.parametrize("first", EVERY)
@pytest.mark.parametrize("then", ["device", INT8, "disk:folder={}"])
def test_from_one_storage_to_another(first: str, then: str, tmp_path: Path) -> None:
    model, ids, cache = shared("llama"), prompt(1, 60), DynamicCache()
    with farspan.patch(model, storage=first.format(tmp_path)):
        logits(model, ids[:, :50], past_key_values=cache)
    with farspan.patch(model, storage=then.format(tmp_path)):
        got = logits(model, ids[:, 50:], past_key_values=cache)
    assert close_to(got, logits(model, ids)[:, 50:], first + then)


def test_packed_rows_stay_in_their_files(tmp_path: Path) -> None:
    """Another order, other numbers of rows and a copy leave every buffer in a file, whose pages are not in
    the memory of the process. The bytes are those of the files."""
    store = KVStore(parse_storage(f"{INT8}+disk:folder={tmp_path}"))
    k = call(store, 900)
    for rows in ([1, 0], [0, 0, 1], [2]):
        store.reorder(torch.tensor(rows))
        k = k[rows]
        assert open_files(tmp_path) == 2 + 4  # those of no outliers are empty
    other = copy.deepcopy(store)
    assert open_files(tmp_path) == 12
    call(store, 1, batch=1)
    assert resident(tmp_path) == 0
    assert other.kv is not None and (other.kv.k - k).norm() < 0.01 * k.norm()
    buffers = store.buffers
    assert buffers.packed is not None
    held = sum(x.nbytes for x in (*buffers.tensors, *buffers.packed.buffers))
    assert store.tiers == {"device": 0, "disk": held}


def test_forgetting_copies_whole_groups_alone() -> None:
    """Until a whole group can go, nothing is copied."""
    store = KVStore(parse_storage("int8:group=64,window=0"))
    call(store, 300)
    places = set()
    for _ in range(128):
        call(store, 1)
        store.forget(100)
        assert store.buffers.packed is not None
        places.add(tuple(x.data_ptr() for x in store.buffers.packed.buffers[:4]))
        assert 100 <= store.length < 100 + 16 + 64 + 16
    assert len(places) <= 6


@pytest.mark.parametrize("how", [{}, {"storage": INT8}, {"static": 64}], ids=str)
def test_an_emptied_cache_serves_another_batch(how: dict[str, Any]) -> None:
    """Also one that has been cropped to nothing, and whose rows were changed meanwhile."""
    model, ids = shared("llama"), prompt(3, 20)
    with farspan.patch(model, **how):
        want, cache = logits(model, ids), DynamicCache()
        for rows in (slice(0, 3), slice(1, 2), slice(0, 2)):
            assert torch.allclose(logits(model, ids[rows], past_key_values=cache), want[rows], atol=1e-4)
            cache.crop(-20)
            cache.reorder_cache(torch.tensor([4, 4, 0]))
            cache.batch_repeat_interleave(2)
            assert cache.get_seq_length() == 0


def test_shared_summaries_of_ranks_are_counted() -> None:
    """The bytes by tier have what every rank keeps of the keys of all."""
    ranks: Any = SimpleNamespace(size=2, rank=0)
    store = ShardStore(ranks, 16)
    k = torch.randn(1, 2, 40, 32)
    store.take_shared(k, k)
    alone = store.nbytes
    store.shared = cast(Summaries, SimpleNamespace(nbytes=100))
    assert store.nbytes == alone + 100 == store.tiers["device"] > alone > 0


def test_storages_are_read() -> None:
    folder = "/data/a+b/c+d"
    storage = parse_storage(f"int8+disk:folder={folder}")
    assert storage.memory.folder == folder and storage.packing is not None  # type: ignore[attr-defined]
    assert parse_storage("int8") == parse_storage("int8+device") == parse_storage("device+int8")
    for spec in ("host:cached=-1", "disk:cached=-1"):
        with pytest.raises(farspan.SpecError, match="keeps cached = 0 rows or more of each KV head"):
            parse_storage(spec)


def test_a_saved_cache_does_not_depend_on_the_memory(tmp_path: Path) -> None:
    model, ids, cache = shared("llama"), prompt(1, 60), DynamicCache()
    with farspan.patch(model, QUEST, storage=f"{INT8}+disk:folder={tmp_path / 'a'}"):
        logits(model, ids[:, :50], past_key_values=cache)
        farspan.save_cache(model, cache, ids, tmp_path / "saved")
        want = logits(model, ids[:, 50:], past_key_values=cache)
    for storage in (INT8, f"{INT8}+disk:folder={tmp_path / 'b'}"):
        with farspan.patch(model, QUEST, storage=storage):
            found = farspan.load_cache(model, tmp_path / "saved")
            assert torch.equal(logits(model, ids[:, 50:], past_key_values=found.cache), want)
    with farspan.patch(model, QUEST), pytest.raises(farspan.FarspanError, match="here it is plain"):
        farspan.load_cache(model, tmp_path / "saved")
