"""A store in another format than the plain one: a patched model generates what it generates on plain keys."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import farspan
from farspan.attention.kv import KV
from farspan.runtime.store.storage import Storage

from ..ops.doubled import Doubled
from .small_models import decode, make, padded, prompt, recipe, shared

SPECS = [
    "dense",
    "window:w=12,sinks=2",
    "quest:k=16,page=4,dense_layers=0",
    "double_sparsity:k=16,dense_layers=0",
    "block_topk:k=16,block=8",
    "recycled:k=16,stride=4",
    "h2o:k=16",
]
WAYS = {"greedy": {}, "beams": {"num_beams": 3}, "in chunks": {"prefill_chunk_size": 16}}


DOUBLED = Storage(format=Doubled, spec="doubled")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("way", WAYS)
def test_the_same_tokens(spec: str, way: str) -> None:
    model = shared("llama")
    learned = recipe("llama") if spec.startswith("double") else None
    with farspan.patch(model, spec, recipe=learned) as patched:
        want, plain = decode(model, padded(), 20, **WAYS[way]), patched.report().to_dict()
    with farspan.patch(model, spec, recipe=learned, storage=DOUBLED) as patched:
        assert torch.equal(decode(model, padded(), 20, **WAYS[way]), want)
        report = patched.report().to_dict()
    for a, b in zip(report["layers"], plain["layers"], strict=True):
        for phase in ("prefill", "decode"):
            assert a[phase]["pairs"] == b[phase]["pairs"]
            # A factor of 4 bytes goes with every key and value of 2 * 16 * 4; bytes are rounded down by call.
            assert a[phase]["kv_bytes"] * 128 == pytest.approx(b[phase]["kv_bytes"] * 132, rel=1e-2)


def test_sliding_layers_and_soft_cap() -> None:
    model = make("gemma2")
    want = decode(model, padded(), 20)
    with farspan.patch(model, storage=DOUBLED):
        assert torch.equal(decode(model, padded(), 20), want)


def test_what_the_store_holds() -> None:
    """Doubled keys, in the cache that generate() was given; transformers carries no decoded copy of them."""
    model, cache = shared("llama"), DynamicCache(config=shared("llama").config)
    with farspan.patch(model, storage=DOUBLED):
        decode(model, prompt(), 8, past_key_values=cache)
        store = cache.layers[0].store
        assert type(store.kv) is Doubled
        assert torch.equal(store.kv.stored[0], 2 * cache.layers[0].keys)
        k, v = store.handles()
        assert k.shape == cache.layers[0].keys.shape and k.untyped_storage().nbytes() <= 8
        assert store.holds(k) and not store.holds(cache.layers[0].keys)
        assert v.shape == cache.layers[0].values.shape


def test_assisted_decoding_crops_it() -> None:
    model, assistant = shared("llama"), make("llama", seed=1)
    want = decode(model, prompt(), 20)
    with farspan.patch(model, storage=DOUBLED):
        assert torch.equal(decode(model, prompt(), 20, assistant_model=assistant), want)


def test_layers_of_their_own() -> None:
    """A storage by layer, in a cache that transformers made without layers; another patch changes it."""
    model, cache = shared("llama"), DynamicCache()
    want = decode(model, prompt(), 8)
    with farspan.patch(model, storage={1: DOUBLED}):
        assert torch.equal(decode(model, prompt(), 8, past_key_values=cache), want)
    assert [type(layer.store.kv) for layer in cache.layers] == [KV, Doubled, KV]
    keys = cache.layers[1].keys.clone()
    with farspan.patch(model):
        model(want[:, -1:], past_key_values=cache)
    assert [type(layer.store.kv) for layer in cache.layers] == [KV, KV, KV]
    assert torch.equal(cache.layers[1].keys[:, :, :-1], keys)


@pytest.mark.parametrize(
    ("storage", "sentence"),
    [
        ("int3", "There is no storage 'int3'"),
        ("device:depth=3", "device has no parameter 'depth'; it takes none"),
        ("device+device", "one format and one memory"),
        ({9: "device"}, "storage= takes layer numbers from 0 to 2; got 9"),
        (3, "A storage is a string such as 'device'; got 3"),
    ],
)
def test_refused(storage: object, sentence: str) -> None:
    with pytest.raises(farspan.SpecError, match=sentence):
        farspan.patch(shared("llama"), storage=storage)
