"""Several models, blocks and threads; what is left after an error, and what is saved."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from small_models import (
    close,
    decode,
    logits,
    make,
    padded,
    prompt,
    shared,
    snapshot,
)
from transformers import LlamaForCausalLM

import farspan

SPARSE = "quest:k=16,page=4,dense_layers=0"


def test_models_that_share_a_config_are_apart():
    a = make("llama")
    b, c = LlamaForCausalLM(a.config).eval(), LlamaForCausalLM(a.config).eval()
    for other in (b, c):
        other.load_state_dict(a.state_dict())
    assert a.config is b.config is c.config
    expected = decode(c, padded())
    alone = {}
    for spec in ("window:w=12,sinks=2", SPARSE):
        with farspan.patch(a, spec):
            alone[spec] = decode(a, padded())
    before = snapshot(c)
    with farspan.patch(a, "window:w=12,sinks=2") as first:
        second = farspan.patch(b, SPARSE)
        assert snapshot(c) == before
        for _ in range(2):
            assert torch.equal(decode(a, padded()), alone["window:w=12,sinks=2"])
            assert torch.equal(decode(b, padded()), alone[SPARSE])
            assert torch.equal(decode(c, padded()), expected)
        assert first.report().summary["prefill_density"] < 1 == second.report().summary["prefill_density"]
    assert torch.equal(decode(a, padded()), expected)
    assert torch.equal(decode(b, padded()), alone[SPARSE])  # the other patch is still there
    second.remove()
    assert torch.equal(decode(b, padded()), expected)
    assert snapshot(c) == before


def test_nested_with_blocks_of_two_models():
    a, b = shared("llama"), shared("qwen3")
    expected = decode(a, padded()), decode(b, padded())
    before = snapshot(a), snapshot(b)
    with farspan.patch(a, SPARSE) as outer:
        sparse = decode(a, padded())
        with farspan.patch(b, "window:w=12,sinks=2") as inner:
            assert torch.equal(decode(a, padded()), sparse)
            outer.remove()
            assert torch.equal(decode(a, padded()), expected[0])
            decode(b, padded())
        assert inner.report().summary["decode_density"] < 1
        assert torch.equal(decode(b, padded()), expected[1])
    assert (snapshot(a), snapshot(b)) == before


def test_threads_share_a_patched_model():
    model = shared("llama")
    batches = [padded((41 - i, 29 + i), seed=i) for i in range(4)]
    with farspan.patch(model, SPARSE):
        expected = [decode(model, batch, 12) for batch in batches]
        got: list = [None] * len(batches)

        def work(i):
            got[i] = [decode(model, batches[i], 12) for _ in range(3)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for runs, one in zip(got, expected, strict=True):
        assert runs is not None and all(torch.equal(run, one) for run in runs)


def test_an_error_in_the_middle_leaves_the_patch_usable():
    model, ids = shared("llama"), prompt(1, 40)
    with farspan.patch(model, SPARSE):
        expected = decode(model, ids)
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decode(model, ids)
        hook.remove()
        assert torch.equal(decode(model, ids), expected)


def test_a_patched_model_is_not_copied_but_saved(tmp_path):
    model = make("llama")
    with farspan.patch(model, SPARSE):
        with pytest.raises(farspan.FarspanError, match="remove"):
            copy.deepcopy(model)
        model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert close(logits(again.eval(), prompt()), logits(model, prompt()))
    assert copy.deepcopy(model).config.to_dict() == model.config.to_dict()
