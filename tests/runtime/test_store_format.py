"""A store in another format than the plain one: a patched model generates what it generates on plain keys."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import farspan
from farspan.runtime.cache import KVStore

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


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVStore, "format", Doubled)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("way", WAYS)
def test_the_same_tokens(spec: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared("llama")
    learned = recipe("llama") if spec.startswith("double") else None
    with farspan.patch(model, spec, recipe=learned) as patched:
        want, plain = decode(model, padded(), 20, **WAYS[way]), patched.report().to_dict()
    monkeypatch.setattr(KVStore, "format", Doubled)
    with farspan.patch(model, spec, recipe=learned) as patched:
        assert torch.equal(decode(model, padded(), 20, **WAYS[way]), want)
        report = patched.report().to_dict()
    for a, b in zip(report["layers"], plain["layers"], strict=True):
        for phase in ("prefill", "decode"):
            assert a[phase]["pairs"] == b[phase]["pairs"]
            # A factor of 4 bytes goes with every key and value of 2 * 16 * 4; bytes are rounded down by call.
            assert a[phase]["kv_bytes"] * 128 == pytest.approx(b[phase]["kv_bytes"] * 132, rel=1e-2)


def test_sliding_layers_and_soft_cap(doubled: None) -> None:
    model = make("gemma2")
    want = decode(model, padded(), 20)
    with farspan.patch(model):
        assert torch.equal(decode(model, padded(), 20), want)


def test_what_the_store_holds(doubled: None) -> None:
    """Doubled keys, in the cache that generate() was given; transformers carries no decoded copy of them."""
    model, cache = shared("llama"), DynamicCache(config=shared("llama").config)
    with farspan.patch(model):
        decode(model, prompt(), 8, past_key_values=cache)
        store = cache.layers[0].store
        assert type(store.kv) is Doubled
        assert torch.equal(store.kv.stored[0], 2 * cache.layers[0].keys)
        k, v = store.handles()
        assert k.shape == cache.layers[0].keys.shape and k.untyped_storage().nbytes() <= 8
        assert store.holds(k) and not store.holds(cache.layers[0].keys)
        assert v.shape == cache.layers[0].values.shape


def test_assisted_decoding_crops_it(doubled: None) -> None:
    model, assistant = shared("llama"), make("llama", seed=1)
    want = decode(model, prompt(), 20)
    with farspan.patch(model):
        assert torch.equal(decode(model, prompt(), 20, assistant_model=assistant), want)
