"""Stores that drop what a method evicts, each KV head its own keys: the same results as with all keys, in
less memory. The methods read as with ``evict=false``, except in a further prompt
(tests/laws/test_definitions_head_budgets.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import farspan
from farspan import FarspanError, Recipe
from farspan.attention.kv import KV
from farspan.attention.method import AttentionMethod
from farspan.runtime import hf
from farspan.runtime.store.storage import Storage

from .test_freed_memory import HOW, Feed, ids_of, stores

SPECS = [
    "duo:streaming=0.75,sinks=3,recent=20",
    "duo:streaming=1.0,sinks=0,recent=9",
    "snapkv:k=24,window=8",
    "h2o:k=15",
]
ALPHAS = ((0.2, 0.9), (0.3, 0.1))  # by layer and KV head: streaming=0.75 leaves one retrieval head


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama(initializer_range=0.15).double()


def recipe_of(model: Any) -> Recipe:
    tensors = {f"layers.{i}.alpha": torch.tensor(row) for i, row in enumerate(ALPHAS)}
    return Recipe(method="duo", geometry=hf.inspect_model(model).geometry, settings={}, tensors=tensors)


def patched(model: Any, spec: str, *, evict: bool = True, **how: Any) -> Any:
    recipe = recipe_of(model) if spec.startswith("duo") else None
    return farspan.patch(model, replace(farspan.parse_method(spec), evict=evict), recipe=recipe, **how)


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return all(bool((a - b).abs().max() < 1e-9) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3}, {"padded": True}, {"padded": True, "num_beams": 2}, {"padded": True, "chunk": 40}],
    ids=str,
)
def test_generate(model: Any, spec: str, how: dict[str, Any]) -> None:
    how = dict(how)
    ids = ids_of(3 if (padded := how.pop("padded", False)) else 1, 150)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :61], mask[2, :133] = 0, 0
    chunk = how.pop("chunk", None)
    results, reports = [], []
    for evict in (False, True):
        with patched(model, spec, evict=evict, prefill_chunk=chunk) as patch:
            results.append(model.generate(ids, attention_mask=mask, **HOW | how))
            reports.append(patch.report())
    want, got = results
    assert torch.equal(got.sequences, want.sequences)
    assert same(got.logits, want.logits)
    for name in ("prefill_density", "decode_density", "kv_bytes_read", "kv_bytes_dense"):
        assert reports[0].summary[name] == reports[1].summary[name]
    kept, freed = (report.summary["kv_bytes_stored"] for report in reports)
    assert freed < 0.75 * kept
    if got.past_key_values is not None:
        for store in stores(got.past_key_values):
            assert store.total == want.past_key_values.get_seq_length() and store.evicted_by


@pytest.mark.parametrize("spec", SPECS)
def test_rows_copies_and_resets(model: Any, spec: str) -> None:
    logits = []
    for evict in (False, True):
        with patched(model, spec, evict=evict), torch.no_grad():
            feed = Feed(model)
            feed(90, 1, 1, 1)
            feed.cache.reorder_cache(torch.tensor([2, 1, 0]))
            feed.rows([2, 1, 0])
            feed(1, 5)
            feed.cache.batch_select_indices(torch.tensor([1, 2]))
            feed.rows([1, 2])
            feed(1)
            feed.cache.batch_repeat_interleave(2)
            feed.rows([0, 0, 1, 1])
            before = copy.deepcopy(feed.cache)
            feed(5)
            feed.at -= 5
            feed.cache = before
            feed(4, 1)
            assert feed.cache.get_seq_length() == feed.at
            feed.cache.reset()
            assert all(not s.evicted_by and s.total == s.nbytes == 0 for s in stores(feed.cache))
            feed.at = 0
            feed(60, 1)
        logits.append(feed.logits)
    assert same(logits[1], logits[0])


def test_duo_gives_back_what_assisted_decoding_takes(model: Any) -> None:
    ids = torch.cat([ids_of(1, 50)] * 3, 1)  # candidates that are found, and mostly rejected
    for spec in SPECS[:2]:
        results = []
        for evict in (False, True):
            with patched(model, spec, evict=evict):
                results.append(model.generate(ids, **HOW, prompt_lookup_num_tokens=6))
                logits = []
                with torch.no_grad():
                    feed = Feed(model)
                    feed(150, 9, 8, -16, 1, 9, -7, 1, 1)
                    logits += feed.logits
                results.append(logits)
        assert torch.equal(results[2].sequences, results[0].sequences)
        assert same(results[3], results[1])


@pytest.mark.parametrize("spec", SPECS)
def test_crops(model: Any, spec: str) -> None:
    with patched(model, spec), torch.no_grad():
        cache = model(ids_of(1, 200)).past_key_values
        for token in ids_of(1, 6)[0]:
            model(token[None, None], past_key_values=cache)
        copied = copy.deepcopy(cache)
        cropped = 1 if spec.startswith("h2o") else 60
        with pytest.raises(FarspanError, match=rf"cannot be cropped by {cropped} of 206 tokens, because \w+"):
            cache.layers[0].crop(-cropped)
        assert cache.get_seq_length() == 206
        copied.crop(-206)
        assert all(not store.evicted_by and store.total == 0 for store in stores(copied))
        if not spec.startswith("h2o"):
            cache.crop(-6)
            assert cache.get_seq_length() == 200
            model(ids_of(1, 1), past_key_values=cache)


@pytest.mark.parametrize("spec", SPECS)
def test_what_a_cache_with_evicted_keys_refuses(model: Any, spec: str) -> None:
    ids = ids_of(1, 300)
    with patched(model, spec), torch.no_grad():
        cache = model(ids[:, :200]).past_key_values
        model(ids[:, 200:201], past_key_values=cache)
        mask = torch.ones(1, 202, dtype=torch.long)
        mask[0, :5] = 0
        with pytest.raises(FarspanError, match="Another attention mask was given for"):
            model(ids[:, 201:202], attention_mask=mask, past_key_values=copy.deepcopy(cache))
    others: list[Any] = [lambda: farspan.patch(model), lambda: patched(model, spec, measure_mass=True)]
    says = r"This cache has the keys that \w+:.* has not evicted"
    for other in others:
        with other(), pytest.raises(FarspanError, match=says):
            model(ids[:, 201:202], past_key_values=copy.deepcopy(cache))
    with pytest.raises(FarspanError, match="has not evicted, and no others: use it with that method"):
        model(ids[:, 201:202], past_key_values=copy.deepcopy(cache))


def test_a_recipe_of_other_heads_is_refused(model: Any) -> None:
    ids, spec = ids_of(1, 300), "duo:streaming=0.25,sinks=3,recent=20"
    with patched(model, spec), torch.no_grad():  # head 1 of layer 1 streams
        cache = model(ids[:, :200]).past_key_values
    tensors = {"layers.0.alpha": torch.ones(2), "layers.1.alpha": torch.tensor([0.1, 0.5])}
    other = replace(recipe_of(model), tensors=tensors)
    with farspan.patch(model, spec, recipe=other), pytest.raises(FarspanError, match="Other KV heads of"):
        model(ids[:, 200:201], past_key_values=cache)


class Elsewhere(KV):
    """Another format."""


@pytest.mark.parametrize("spec", SPECS)
def test_where_nothing_can_be_dropped(model: Any, spec: str) -> None:
    says = r"farspan cannot run \w+:.* with evict=true: no single key can be dropped from a cache"
    with pytest.raises(FarspanError, match=says):
        patched(model, spec, storage=Storage(format=Elsewhere, spec="else"))
    if spec.startswith("duo"):
        with pytest.raises(
            FarspanError, match="over ranks all KV heads of a layer hold equally many keys: give"
        ):
            patched(model, spec, parallel="auto")
    with pytest.raises(FarspanError, match="static= does not serve"):
        patched(model, spec, static=300)


@pytest.mark.parametrize("how", [{"measure_mass": True}, {"crossover": 1000}], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_nothing_is_dropped_while_something_reads_it(model: Any, spec: str, how: dict[str, Any]) -> None:
    with patched(model, spec, **how), torch.no_grad():
        cache = model(ids_of(1, 200)).past_key_values
        model(ids_of(1, 1), past_key_values=cache)
    assert all(not store.evicted_by and store.length == 201 for store in stores(cache))


@pytest.mark.parametrize("spec", SPECS)
def test_nothing_is_dropped_that_a_gradient_needs(model: Any, spec: str) -> None:
    logits = []
    for evict in (False, True):
        with patched(model, spec, evict=evict):
            cache = model(ids_of(1, 100)).past_key_values
            for token in ids_of(1, 3)[0]:
                logits.append(model(token[None, None], past_key_values=cache).logits.detach())
        assert all(store.length == 103 for store in stores(cache))
    assert same(logits[3:], logits[:3])


def test_duo_drops_nothing_beside_another_prefill(model: Any) -> None:
    with farspan.patch(model, f"dense + {SPECS[0]}", recipe=recipe_of(model)), torch.no_grad():
        cache = model(ids_of(1, 200)).past_key_values
        model(ids_of(1, 1), past_key_values=cache)
    assert not any(store.evicted_by for store in stores(cache))


def test_a_prefill_method_over_what_is_left(model: Any) -> None:
    """Blocks of a further prompt are counted over the stored keys, as in a sequence of these alone."""
    spec, ids = "block_topk:k=16,block=8 + snapkv:k=16,window=8,evict=true", ids_of(1, 260)
    with farspan.patch(model, spec) as patch, torch.no_grad():
        cache = model(ids[:, :200]).past_key_values
        model(ids[:, 200:201], past_key_values=cache)
        assert [store.length for store in stores(cache)] == [17, 17]
        patch.reset_report()
        model(ids[:, 201:], past_key_values=cache)
        phase = patch.report().layers[0].phases["prefill"]
    heads = model.config.num_attention_heads
    assert phase.causal_pairs == heads * sum(range(202, 261))
    assert 0 < phase.pairs <= heads * sum(min(16 + 8, n) for n in range(18, 77))


@pytest.mark.parametrize(
    ("spec", "share"),
    [
        ("duo:streaming=0.5,sinks=4,recent=60", 0.55),
        ("snapkv:k=512,window=32", 512 / 8192 + 0.02),
        ("h2o:k=512", 512 / 8192 + 0.1),  # with 8 bytes of scores for each key of 128
    ],
)
def test_bytes_of_8192_tokens(tiny_llama: Callable[..., Any], spec: str, share: float) -> None:
    model: Any = tiny_llama(max_position_embeddings=8300)
    ids, row = ids_of(1, 8192), 2 * 2 * 16 * 4  # bytes of a token's keys and values in a layer
    with patched(model, spec, prefill_chunk=1024) as patch, torch.no_grad():
        cache = model(ids, logits_to_keep=1).past_key_values
        for token in ids[0, :3]:
            model(token[None, None], past_key_values=cache)
        report = patch.report()
    total = sum(store.nbytes for store in stores(cache))
    assert [layer.stored_bytes for layer in report.layers] == [store.nbytes for store in stores(cache)]
    assert total == report.summary["kv_bytes_stored"] <= share * 2 * 8195 * row
    assert report.summary["kv_bytes_stored_dense"] == 2 * 8195 * row


def test_methods_declare_whether_they_evict() -> None:
    evicting = {name for name, cls in farspan.methods().items() if cls().evict}
    assert evicting == {"duo"}
    able = {name for name, cls in farspan.methods().items() if cls.eviction is not AttentionMethod.eviction}
    assert able == {"duo", "h2o", "snapkv"}
