"""A store in 8 or 4 bits: what it holds after every change, what it costs, and models that generate on it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import farspan
from farspan.attention.kv import KV
from farspan.attention.quantised import Quantised
from farspan.attention.softmax import Softmax
from farspan.runtime.store.storage import parse_storage
from farspan.runtime.store.store import KVStore

from ..ops.quantised import rounded
from .small_models import MORE_HYBRIDS, RECURRENT, Feed, decode, make, padded, prompt, shared

GROUP, WINDOW, D = 16, 8, 32
STORAGES = pytest.mark.parametrize(
    "storage", [f"int8:group={GROUP},window={WINDOW}", "int4:group=16,window=8"]
)


def numbers(length: int, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, 2, length, D, generator=draw) for _ in range(2))
    return k, v


def append(store: KVStore, k: Tensor, v: Tensor, starts: list[int] | None = None) -> None:
    """One call of a layer."""
    store.append(k, v)
    store.align(starts, store.total)
    start = None if starts is None else torch.tensor(starts)
    store.pack(torch.randn(k.shape[0], 4, k.shape[2], D), Softmax(D**-0.5), start)


def filled(storage: str, k: Tensor, v: Tensor, calls: list[int], starts: list[int] | None = None) -> KVStore:
    store, at = KVStore(parse_storage(storage)), 0
    for count in calls:
        append(store, k[:, :, at : at + count], v[:, :, at : at + count], starts)
        at += count
    return store


def dense(store: KVStore) -> tuple[Tensor, Tensor]:
    assert store.kv is not None
    return store.kv.dense()


def packed(store: KVStore) -> int:
    return store.kv.packed if isinstance(store.kv, Quantised) else 0


@STORAGES
@pytest.mark.parametrize("calls", [[150], [60, 1, 1, 30, 58], [1] * 150])
def test_what_it_holds(storage: str, calls: list[int]) -> None:
    """However keys arrive, groups lie at multiples of their size, and the last ones are as they were."""
    k, v = numbers(150)
    store = filled(storage, k, v, calls, [0, 21])
    count = packed(store)
    assert count % GROUP == 0 and WINDOW <= 150 - count < WINDOW + GROUP
    got_k, got_v = dense(store)
    bits = store.storage.packing.bits
    for row, first in ((0, 0), (1, 21)):
        assert torch.equal(got_k[row, :, count:], k[row, :, count:])
        assert torch.equal(got_v[row, :, count:], v[row, :, count:])
        for begin in range(first - first % GROUP, count, GROUP):
            rows = slice(max(begin, first), begin + GROUP)
            for c in (0, 17):
                want = rounded(k[row, 1, rows, c], bits).float()
                torch.testing.assert_close(got_k[row, 1, rows, c], want)
        want = torch.stack([rounded(v[row, 0, t], bits) for t in range(first, count)]).float()
        torch.testing.assert_close(got_v[row, 0, first:count], want)


@STORAGES
def test_a_call_reads_its_own_keys_as_they_are(storage: str) -> None:
    k, v = numbers(100)
    store = KVStore(parse_storage(storage))
    store.append(k, v)
    assert type(store.kv) is KV and torch.equal(store.kv.k, k)
    store.pack(torch.randn(2, 4, 100, D), Softmax(1.0))
    store.append(k, v)
    assert torch.equal(dense(store)[0][:, :, 100:], k)


@STORAGES
@pytest.mark.parametrize("left", [149, 140, 100, 96, 7, 0])
def test_crop(storage: str, left: int) -> None:
    """Also into a group, whose rest comes back as it was rounded."""
    k, v = numbers(170)
    store = filled(storage, k[:, :, :150], v[:, :, :150], [150])
    before = [x.clone() for x in dense(store)]
    store.crop(150 - left)
    assert store.total == left
    if left:
        for got, want in zip(dense(store), before, strict=True):
            torch.testing.assert_close(got, want[:, :, :left])
    append(store, k[:, :, 150:], v[:, :, 150:])
    got = dense(store)
    assert store.total == left + 20
    count = packed(store)
    assert count % GROUP == 0 and left + 20 - count < WINDOW + GROUP
    assert torch.equal(got[0][:, :, max(left, count) :], k[:, :, 150 + max(0, count - left) :])


@STORAGES
def test_rows_of_the_batch(storage: str) -> None:
    k, v = numbers(100, batch=3)
    store = filled(storage, k, v, [90, 10], [0, 21, 5])
    whole = [x.clone() for x in dense(store)]
    other = copy.deepcopy(store)
    for change, rows in (
        (lambda s: s.reorder(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda s: s.select(torch.tensor([True, False, True])), [0, 2]),
        (lambda s: s.repeat(2), [0, 0, 1, 1, 2, 2]),
    ):
        one = copy.deepcopy(store)
        change(one)
        for got, want in zip(dense(one), whole, strict=True):
            assert torch.equal(got, want[rows])
        append(one, k[rows][:, :, :40], v[rows][:, :, :40])
        assert one.total == 140 and packed(one) == 128
    other.reset()
    assert other.kv is None and other.nbytes == 0
    assert torch.equal(dense(store)[0], whole[0]), "copies are apart"


@STORAGES
def test_forget(storage: str) -> None:
    """Old groups are dropped as a whole, and their memory is released."""
    k, v = numbers(400)
    store = filled(storage, k[:, :, :300], v[:, :, :300], [300])
    held, want = store.nbytes, dense(store)[0].clone()
    store.forget(64)
    assert store.dropped % GROUP == 0 and store.total == 300 and 80 <= store.length < 80 + GROUP
    assert torch.equal(dense(store)[0], want[:, :, store.dropped :])
    for at in range(300, 400):
        append(store, k[:, :, at : at + 1], v[:, :, at : at + 1])
        store.forget(64)
    assert store.total == 400 and store.length <= 64 + 16 + 16 + GROUP
    error = (dense(store)[0] - k[:, :, store.dropped :]).abs().max()
    assert error < (0.02 if storage.startswith("int8") else 0.3)
    assert store.nbytes < held or storage.startswith("int4")


@pytest.mark.parametrize(("storage", "share"), [("int8", 0.54), ("int4", 0.32)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bytes(storage: str, share: float, head_dim: int) -> None:
    """At 32K, of what bfloat16 takes, the residual window included."""
    x = torch.randn(1, 1, 32768, head_dim).bfloat16()
    plain, store = KVStore(), KVStore(parse_storage(storage))
    for one in (plain, store):
        one.append(x, x)
        one.pack(torch.randn(1, 1, 4, head_dim).bfloat16(), Softmax(head_dim**-0.5))
    assert store.kv.nbytes <= share * plain.kv.nbytes
    assert store.nbytes <= share * plain.nbytes
    held = sum(x.untyped_storage().nbytes() for x in {y.data_ptr(): y for y in store.kv.stored}.values())
    assert held == store.nbytes


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 16},
}


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon_h1", "qwen3_next"])
@pytest.mark.parametrize("way", WAYS)
def test_while_nothing_is_packed_tokens_are_the_same(name: str, way: str) -> None:
    model = shared(name)
    want = decode(model, padded(), 12, **WAYS[way])
    with farspan.patch(model, storage="int4"):
        assert torch.equal(decode(model, padded(), 12, **WAYS[way]), want)


@pytest.mark.parametrize("name", ["llama", "gemma2", *RECURRENT, *MORE_HYBRIDS])
def test_logits_stay_close(name: str) -> None:
    """int8 with most keys packed: in steps, and in a chunk on packed keys. int4 has a bound, too."""
    model, ids, mask = shared(name), padded()["input_ids"], padded()["attention_mask"]
    more = prompt(3, 40, seed=9)
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    real = mask.bool()
    errors = []
    for storage in (None, "int8:window=8,group=16", "int4:window=8,group=16"):
        with farspan.patch(model, storage=storage) as patched:
            feed = Feed(model, ids, mask)
            logits = torch.cat([feed(41), feed(20), *[feed(1) for _ in range(20)]], 1)[real]
            report = patched.report().to_dict()
        if storage is None:
            want, bytes_of_all = logits, report["layers"][-1]["decode"]["kv_bytes"]
        else:
            errors.append(float((logits - want).square().mean().sqrt() / want.std()))
            if name == "llama":
                assert report["layers"][-1]["decode"]["kv_bytes"] < 0.8 * bytes_of_all
    assert 0 < errors[0] < 0.05 and errors[0] < errors[1] < 0.6


def test_a_model_after_a_crop() -> None:
    """The same tokens again after a crop into packed groups, as in assisted decoding."""
    model, cache, ids = shared("llama"), DynamicCache(), prompt(2, 60)
    with farspan.patch(model, storage="int8:window=0,group=16"), torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
        want = model(ids[:, 40:], past_key_values=cache).logits[:, 5:]
        cache.crop(-15)
        got = model(ids[:, 45:], past_key_values=cache).logits
    assert (got - want).square().mean().sqrt() < 0.05 * want.std()


def test_a_copied_cache_goes_on_alike() -> None:
    model, cache = shared("llama"), DynamicCache(config=shared("llama").config)
    with farspan.patch(model, "quest:k=16,page=4,dense_layers=0", storage="int8:window=8,group=16"):
        decode(model, prompt(), 30, past_key_values=cache)
        other, token = copy.deepcopy(cache), prompt(1, 1, seed=5)
        with torch.no_grad():
            a = model(token, past_key_values=cache).logits
            b = model(token, past_key_values=other).logits
    assert torch.equal(a, b)


def test_refused() -> None:
    model = shared("llama")
    with pytest.raises(farspan.FarspanError, match="groups of 16, 32, 64"):
        farspan.patch(model, storage="int8:group=10")
    with pytest.raises(farspan.FarspanError, match="storage"):
        farspan.patch(model, storage="int8", static=64)
    with (
        farspan.patch(model, storage="int8"),
        pytest.raises(farspan.FarspanError, match="which no gradient can follow"),
    ):
        model(prompt(), use_cache=True).logits.sum().backward()


def with_large_channels(pairs: int) -> Any:
    """A model whose keys have a large constant part in some channels, as in Qwen2. RoPE turns it, so a group
    of positions spans both signs."""
    model = make("qwen2", seed=3)
    with torch.no_grad():
        for layer in model.model.layers:
            bias = layer.self_attn.k_proj.bias.view(-1, 16)
            bias[:, :pairs] = 60.0
            layer.self_attn.q_proj.bias.zero_()
    return model


@pytest.mark.parametrize(("pairs", "strict"), [(0, True), (1, True), (8, False), (8, True)])
def test_the_guard(pairs: int, strict: bool) -> None:
    """Few large channels are kept as they are and attention is right; many are named with the number."""
    model, cache = with_large_channels(pairs), DynamicCache()
    ids = prompt(2, 100)
    with farspan.patch(model, storage="int4:window=8,group=16", strict=strict), torch.no_grad():
        if pairs == 8 and strict:
            with pytest.raises(farspan.FarspanError, match=r"In layer \d, 4 bits change attention by \d+%"):
                model(ids, past_key_values=cache)
            return
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            model(ids, past_key_values=cache)
    told = [str(x.message) for x in seen if "4 bits" in str(x.message)]
    assert bool(told) == (pairs == 8)
    store = cache.layers[0].store
    channels = store.kv.stored[7]
    assert channels.shape[3] == (0 if pairs == 0 else 4)
    if pairs == 1:
        assert bool(((channels == 0) | (channels == 8)).sum(-1).eq(2).all()), "the pair that RoPE turns"
        assert store.guard.error < 0.15
