"""transformers 5.24 renamed `past_key_values` to `cache`: both names work where transformers takes both, and
nothing that farspan does itself makes transformers warn of an old name."""

from __future__ import annotations

import inspect
import logging
import warnings

import pytest
import torch
from small_models import prompt
from transformers import DynamicCache, LlamaForCausalLM

import farspan
from farspan.attention.spec import methods
from farspan.evals import batch as forward
from farspan.runtime.hf import releases

from ..laws.gates import random_gates

RENAMED = "cache" in inspect.signature(LlamaForCausalLM.forward).parameters
NAMES = ("cache", "past_key_values") if RENAMED else ("past_key_values",)


def test_the_table_of_releases(tiny_llama):
    assert releases.newer_than_tested("5.99.0") and releases.newer_than_tested("6.0.0.dev0")
    assert not releases.newer_than_tested(f"{releases.TESTED[-1]}.9")
    assert releases.cache_name(tiny_llama()) == NAMES[0]


@pytest.mark.parametrize("spec", ["dense", "quest:fraction=1.0,page=4,dense_layers=0"])
@pytest.mark.parametrize("name", NAMES)
def test_a_cache_by_either_name(tiny_llama, name, spec):
    """Plain calls, `generate` and the decoder called by itself: farspan's storage is what the layers use."""
    model, ids, more = tiny_llama(), prompt(1, 40), prompt(1, 3, seed=1)

    def three(model):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            cache = DynamicCache(config=model.config)
            model(ids, **{name: cache})
            logits = model(more, **{name: cache}).logits
            kinds = {type(layer).__name__ for layer in cache.layers}
            joined = torch.cat([ids, more], 1)
            filled = DynamicCache(config=model.config)
            model(ids, **{name: filled})
            tokens = model.generate(joined, **{name: filled}, max_new_tokens=6, do_sample=False)
            inner = DynamicCache(config=model.config)
            hidden = model.model(joined, **{name: inner}).last_hidden_state
        return kinds, logits, tokens, hidden, inner.get_seq_length()

    plain = three(model)
    with farspan.patch(model, spec, strict=True):
        ours = three(model)
    assert plain[0] == {"DynamicLayer"} and ours[0] == {"KVStoreLayer"}
    torch.testing.assert_close(ours[1], plain[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(ours[2], plain[2])
    torch.testing.assert_close(ours[3], plain[3], atol=1e-5, rtol=1e-5)
    assert ours[4] == plain[4] == 43


@pytest.mark.skipif(not RENAMED, reason="this release of transformers has one name only")
def test_of_two_caches_the_one_that_transformers_takes_is_ours(tiny_llama):
    model, ids = tiny_llama(), prompt(1, 40)
    with farspan.patch(model, "dense"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        new, old = DynamicCache(config=model.config), DynamicCache(config=model.config)
        model.model(ids, cache=new, past_key_values=old)
    assert new.get_seq_length() == 40 and type(new.layers[0]).__name__ == "KVStoreLayer"
    assert old.get_seq_length() == 0


@pytest.mark.parametrize("spec", sorted(set(methods()) - {"act", "sale", "double_sparsity"}))
def test_no_warning_of_an_old_name(tiny_llama, caplog, spec):
    """`generate`, chunked prefill and what evaluations call (prefill, likelihood, greedy answers)."""
    model, ids = tiny_llama(), prompt(2, 60)
    method = methods()[spec]()
    recipe = random_gates(method, model) if method.needs.recipe else None
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        with warnings.catch_warnings(), farspan.patch(model, spec, prefill_chunk=32, recipe=recipe):
            warnings.simplefilter("error", FutureWarning)
            warnings.simplefilter("error", DeprecationWarning)
            model.generate(ids, max_new_tokens=4, do_sample=False)
            batch = forward.collate(ids.tolist(), 0, model.device)
            cache = forward.prefill(model, batch)
            forward.teacher_forced(model, batch, cache, [[5, 6, 7], [8, 9]], pad=0)
            forward.greedy(model, batch, forward.prefill(model, batch), max_new_tokens=3, pad=0, eos=[2])
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not [record for record in caplog.records if "deprecated" in record.getMessage()]
