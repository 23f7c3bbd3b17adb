"""Stores that drop keys which have summaries: the same results as with all keys, in less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import DynamicCache

import farspan
from farspan.attention.attend import DECODE_ROWS
from farspan.attention.errors import FarspanError
from farspan.runtime.store.store import KVStore

CORES = "core_context:g=4,s=16"
SPECS = [CORES, "combiner:span=8", "combiner:form=logsparse,span=2,largest=16", "descriptors:chunk=16,pool=4"]
HOW: dict[str, Any] = {
    "max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "output_logits": True,
    "return_dict_in_generate": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama(initializer_range=0.15).double()


def keeping_all(kept: bool) -> Any:
    """A context in which stores drop nothing, if ``kept``."""
    return mock.patch.object(KVStore, "forget", lambda self, needed: None) if kept else nullcontext()


def ids_of(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(rows + length))


def stores(cache: Any) -> list[KVStore]:
    return [layer.store for layer in cache.layers]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 6},
        {"padded": True},
        {"padded": True, "num_beams": 2, "num_return_sequences": 2},
        {"chunk": 40},
    ],
    ids=str,
)
def test_generate(model: Any, spec: str, how: dict[str, Any]) -> None:
    how = dict(how)
    ids = ids_of(3 if (padded := how.pop("padded", False)) else 1, 150)
    if "prompt_lookup_num_tokens" in how:
        ids = torch.cat([ids[:, :50]] * 3, 1)  # candidates that are found, and mostly rejected
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :61], mask[2, :143] = 0, 0
    chunk = how.pop("chunk", None)
    results = []
    for kept in (True, False):
        with keeping_all(kept), farspan.patch(model, spec, prefill_chunk=chunk) as patched:
            results.append(model.generate(ids, attention_mask=mask, **HOW | how))
            report = patched.report()
    want, got = results
    assert torch.equal(got.sequences, want.sequences)
    assert max((a - b).abs().max() for a, b in zip(got.logits, want.logits, strict=True)) < 1e-9
    if got.past_key_values is not None:
        assert got.past_key_values.get_seq_length() == want.past_key_values.get_seq_length()
        for store in stores(got.past_key_values):
            assert store.dropped > 60 and store.needed is not None
            assert store.length <= store.needed + 2 * DECODE_ROWS + store.needed // 8
    assert report.layers[0].stored_bytes > 0


@pytest.mark.parametrize("spec", [f"{CORES} + {SPECS[3]}", f"{SPECS[3]} + {CORES}"])
def test_two_methods_with_summaries_of_their_own(model: Any, spec: str) -> None:
    """Each one summarises what was read before its call, so keys that one does not need are kept."""
    ids, results = ids_of(1, 200), []
    for kept in (True, False):
        cache, found = DynamicCache(config=model.config), []
        with keeping_all(kept), farspan.patch(model, spec), torch.no_grad():
            for a, b in ((0, 90), *((i, i + 1) for i in range(90, 150)), (150, 199), (199, 200)):
                found.append(model(ids[:, a:b], past_key_values=cache).logits)
        results.append(torch.cat(found, 1))
    assert torch.equal(*results)


class Feed:
    """Plain calls of a padded batch on one cache, and their logits."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache, self.at = model, DynamicCache(config=model.config), 0
        self.ids = ids_of(3, 260)
        self.mask = torch.ones_like(self.ids)
        self.mask[1, :33] = 0
        self.logits: list[torch.Tensor] = []

    def __call__(self, *counts: int) -> None:
        for n in counts:
            if n < 0:
                self.cache.crop(n)
            else:
                ids, mask = self.ids[:, self.at : self.at + n], self.mask[:, : self.at + n]
                out = self.model(ids, attention_mask=mask, past_key_values=self.cache)
                self.logits.append(out.logits)
            self.at += n

    def rows(self, rows: list[int]) -> None:
        """The same rows of the tokens as of the cache."""
        self.ids, self.mask = self.ids[rows], self.mask[rows]


@pytest.mark.parametrize("spec", SPECS)
def test_rows_and_crops(model: Any, spec: str) -> None:
    """Reorder, repeat, select, copies, and crops of as many tokens as assisted decoding takes back."""
    logits = []
    for kept in (True, False):
        with keeping_all(kept), farspan.patch(model, spec), torch.no_grad():
            feed = Feed(model)
            feed(150, 9, 8, -1, 1, 9, 8, -16, 1, 9, 8, -7, 1, 9, 8, -3, 1)
            feed.cache.reorder_cache(torch.tensor([2, 1, 0]))
            feed.rows([2, 1, 0])
            feed(2)
            feed.cache.batch_select_indices(torch.tensor([1, 2]))
            feed.rows([1, 2])
            feed(2)
            feed.cache.batch_repeat_interleave(2)
            feed.rows([0, 0, 1, 1])
            before = copy.deepcopy(feed.cache)
            feed(5, -5)
            feed.cache = before
            feed(5)
            assert feed.cache.get_seq_length() == feed.at
            assert (stores(feed.cache)[0].dropped > 0) == (not kept)
            feed.cache.reset()
            assert stores(feed.cache)[0].dropped == feed.cache.get_seq_length() == 0
            feed.at = 0
            feed(40)
        logits.append(feed.logits)
    for want, got in zip(*logits, strict=True):
        assert (got - want).abs().max() < 1e-9


def test_what_a_cache_with_dropped_keys_refuses(model: Any) -> None:
    ids = ids_of(1, 300)
    with farspan.patch(model, CORES), torch.no_grad():
        cache = model(ids[:, :200]).past_key_values
        with pytest.raises(FarspanError, match=r"cannot be cropped by 60 of 200 tokens, because the keys of"):
            cache.crop(-60)
        assert cache.get_seq_length() == 200
        mask = torch.ones(1, 201, dtype=torch.long)
        mask[0, :5] = 0
        with pytest.raises(FarspanError, match="Another attention mask was given for"):
            model(ids[:, 200:201], attention_mask=mask, past_key_values=copy.deepcopy(cache))
    sentence = r"This cache keeps summaries in place of its first \d+ keys, and a layer needs"
    for spec in ("dense", "core_context:g=4,s=128"):
        with farspan.patch(model, spec), pytest.raises(FarspanError, match=sentence):
            model(ids[:, 200:201], past_key_values=copy.deepcopy(cache))
    with (
        farspan.patch(model, "core_context:g=8,s=16"),
        pytest.raises(FarspanError, match=r"[Ss]tart a new cache"),
    ):
        model(ids[:, 200:201], past_key_values=copy.deepcopy(cache))
    with pytest.raises(FarspanError, match=sentence):
        model(ids[:, 200:201], past_key_values=copy.deepcopy(cache))
    with farspan.patch(model, CORES, parallel=None), torch.no_grad():
        model(ids[:, 200:201], past_key_values=cache)
        assert cache.get_seq_length() == 201


def test_layers_of_unequal_length_are_refused(model: Any) -> None:
    """transformers crops layer by layer, so a refused crop leaves the layers before it cropped."""
    ids = ids_of(1, 201)
    with farspan.patch(model, CORES, layers={0: "dense"}), torch.no_grad():
        cache = model(ids[:, :200]).past_key_values
        with pytest.raises(FarspanError, match="cannot be cropped by 60"):
            cache.crop(-60)
        with pytest.raises(FarspanError, match="layers of this cache hold 140 to 200 tokens, because a crop"):
            model(ids[:, 200:], past_key_values=cache)


def test_cores_of_a_cache_that_another_method_filled(model: Any) -> None:
    ids = ids_of(1, 201)
    with farspan.patch(model), torch.no_grad():
        cache = model(ids[:, :200]).past_key_values
    with farspan.patch(model, CORES), pytest.raises(FarspanError, match="filled under another patch"):
        model(ids[:, 200:], past_key_values=cache)


def test_combiner_refuses_a_crop_beyond_the_queries_that_it_keeps(model: Any) -> None:
    ids = ids_of(1, 501)
    with farspan.patch(model, "combiner"), keeping_all(True), torch.no_grad():
        cache = model(ids[:, :500]).past_key_values
        with pytest.raises(
            FarspanError, match=r"from 500 to 370 .* from position 320 on, and the cache keeps"
        ):
            cache.crop(-130)
        assert cache.get_seq_length() == 500
        cache.crop(-52)  # to the end of a span
        model(ids[:, 448:450], past_key_values=cache)


@pytest.mark.parametrize(
    "how",
    [
        {"prefill": CORES},
        {"decode": CORES},
        {"spec": CORES, "measure_mass": True},
        {"spec": CORES, "crossover": 1000},
    ],
    ids=str,
)
def test_nothing_is_dropped_while_something_reads_it(model: Any, how: dict[str, Any]) -> None:
    """The dense method of the other phase, measuring, and dense attention below a crossover."""
    how = dict(how)
    with farspan.patch(model, how.pop("spec", None), **how), torch.no_grad():
        cache = model(ids_of(1, 200)).past_key_values
        model(ids_of(1, 1), past_key_values=cache)
    assert all(store.dropped == 0 and store.length == 201 for store in stores(cache))


@pytest.mark.parametrize(
    ("spec", "tokens", "queries", "share"),
    [
        ("core_context:g=16,s=256", 8192 / 16 + 256 + 16, 0, 0.13),
        ("combiner:span=64", 8192 / 64 + 64, 2 * 64, 0.12),
        ("combiner:form=logsparse,span=64", 2 * 8192 / 64 + 1024 + 5 * 64, 2 * 1024, 0.8),
        ("combiner:form=logsparse,span=1", 2 * 8192 + 1024, 2 * 1024, 3.0),
        ("descriptors:chunk=256,pool=16", 8192 / 16 + 2 * 256, 0, 0.15),
    ],
)
def test_bytes_of_8192_tokens(
    tiny_llama: Callable[..., Any], spec: str, tokens: float, queries: int, share: float
) -> None:
    """Summaries, the last keys and the last queries, with what the buffers have to spare; in the report and
    in its text. tokens, queries: how many are kept. share: of what dense attention keeps."""
    model = tiny_llama(max_position_embeddings=8300)
    ids, row = ids_of(1, 8192), 2 * 2 * 16 * 4  # bytes of a token's keys and values in a layer
    with farspan.patch(model, spec, prefill_chunk=1024) as patched, torch.no_grad():
        cache = model(ids, logits_to_keep=1).past_key_values
        for token in ids[0, :20]:
            model(token[None, None], past_key_values=cache)
        report = patched.report()
    assert cache.get_seq_length() == 8212
    for layer, store in zip(report.layers, stores(cache), strict=True):
        assert layer.stored_bytes == store.nbytes
        assert layer.dense_stored_bytes == 8212 * row
        assert store.nbytes <= row * (1.2 * tokens + 4 * DECODE_ROWS + 64) + 4 * 8 * 16 * queries
    totals = report.summary
    assert share / 2 < totals["kv_bytes_stored"] / totals["kv_bytes_stored_dense"] < share
    assert ("stored: " in str(report)) == (share < 1)  # the text names savings only
