"""Gradients: dense ones are the model's own, sparse ones are those of the keys that are read."""

from __future__ import annotations

import itertools

import pytest
import torch
from small_models import (
    make,
    padded,
    prompt,
)

import farspan


def gradients(model, batch, **how):
    # The first token of a row would be told from padding, which is nobody's business.
    labels = batch["input_ids"].masked_fill(batch["attention_mask"].cumsum(1) <= 1, -100)
    model.zero_grad()
    loss = model(**batch, labels=labels, **how).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), grads


def assert_same_gradients(got, expected):
    assert torch.allclose(got[0], expected[0], rtol=1e-5)
    assert set(got[1]) == set(expected[1])
    for name, grad in expected[1].items():
        assert (got[1][name] - grad).norm() <= 1e-4 * max(grad.norm(), 1e-3), name


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen3"])
def test_dense_gradients_are_the_models_own(name, use_cache):
    model, batch = make(name).train(), padded((40, 33))
    expected = gradients(model, batch, use_cache=use_cache)
    with farspan.patch(model):
        assert_same_gradients(gradients(model, batch, use_cache=use_cache), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, batch = make("llama").train(), padded((40, 33))
    expected = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for spec in ("dense", "block_topk:k=4096", "block_topk:k=none,fraction=1.0,block=8"):
        with farspan.patch(model, spec):
            assert_same_gradients(gradients(model, batch), expected)


@pytest.mark.parametrize(
    "spec",
    [
        "core_context:g=4,s=16",
        "combiner:span=8",
        "combiner:form=logsparse,span=2,largest=16",
        "descriptors:chunk=8,pool=4",
    ],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_gradients_of_several_calls_on_one_cache_of_summaries(spec, rows):
    """They are those of one call over the same tokens, whose losses are summed alike."""
    from transformers import DynamicCache

    model, batch = make("llama").train(), padded((100, 87)[:rows])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    weights = torch.randn(*ids.shape, 128, generator=torch.Generator().manual_seed(1)) * mask[..., None]
    grads = []
    with farspan.patch(model, spec):
        for bounds in ([0, 50, 77, 100], [0, 100]):
            cache, loss = DynamicCache(config=model.config), torch.zeros(())
            for a, z in itertools.pairwise(bounds):
                logits = model(ids[:, a:z], attention_mask=mask[:, :z], past_key_values=cache).logits
                loss = loss + (logits * weights[:, a:z]).sum()
            model.zero_grad()
            loss.backward()
            grads.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    assert_same_gradients(*grads)


def test_sparse_gradients_are_those_of_the_masked_model():
    """The unpatched model under a 4-D mask of the same pairs is the oracle."""
    from farspan.attention.selection import Window

    model, ids = make("llama").train(), prompt(2, 40)
    allowed = Window(size=12, sinks=2).to_mask(40, 40, None, 2)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
    loss.backward()
    expected = loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}
    with farspan.patch(model, "window:w=12,sinks=2"):
        got = gradients(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert_same_gradients(got, expected)


def test_block_topk_gradients_are_those_of_its_own_blocks(monkeypatch):
    """What the method chose, as a 4-D mask per layer on the unpatched model, gives the same gradients."""
    from farspan.attention.sparse.block_topk import BlockTopK

    model, ids = make("llama", num_hidden_layers=1).train(), prompt(2, 64)
    chosen = []
    select = BlockTopK.select_prefill

    def spy(self, q, keys):
        index = select(self, q, keys)
        chosen.append(index.to_mask(q.shape[2], keys.length))
        return index

    monkeypatch.setattr(BlockTopK, "select_prefill", spy)
    with farspan.patch(model, "block_topk:k=24,block=8") as patched:
        got = gradients(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert patched.report().summary["prefill_density"] < 1
    allowed = torch.cat(chosen).repeat_interleave(4 // chosen[0].shape[1], 1)  # one mask per query head
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    model.set_attn_implementation("eager")
    loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
    loss.backward()
    assert_same_gradients(got, (loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
