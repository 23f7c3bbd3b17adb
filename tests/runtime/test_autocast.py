"""Mixed precision: under autocast attention is computed as torch's own attention computes it there."""

from __future__ import annotations

import copy

import pytest
import small_models
import torch

import farspan

SPARSE = "block_topk:k=32,block=16"
SELECTIVE = ["quest:k=16,page=4,dense_layers=0", "recycled:k=24,stride=3", SPARSE]


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@torch.no_grad()
def test_dense_logits_and_tokens():
    """Within the rounding that the model's own two attention functions show."""
    model = small_models.make("llama")
    batch = small_models.padded()
    valid = batch["attention_mask"].bool()
    with autocast():
        want = model(**batch).logits[valid]
        model.set_attn_implementation("eager")
        bound = 2 * (model(**batch).logits[valid] - want).abs().max()
        model.set_attn_implementation("sdpa")
        with farspan.patch(model):
            got = model(**batch).logits[valid]
            out = model.generate(**batch, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
            kept = {layer.keys.dtype for layer in out.past_key_values.layers}
    assert (got - want).abs().max() <= bound
    assert kept == {torch.bfloat16}


@pytest.mark.parametrize("spec", SELECTIVE)
def test_selective_methods_generate(spec: str):
    """With a budget that covers everything, the tokens of dense attention; else less is read."""
    model = small_models.make("llama")
    batch = small_models.padded()
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with autocast():
        with farspan.patch(model):
            want = model.generate(**batch, **how)
        every = spec.replace("k=32", "k=4096").replace("k=16", "k=4096").replace("k=24", "k=4096")
        with farspan.patch(model, every):
            assert torch.equal(model.generate(**batch, **how), want)
        with farspan.patch(model, spec) as patched:
            model.generate(**batch, **how)
    summary = patched.report().summary
    assert min(summary["prefill_density"], summary["decode_density"]) < 1


@pytest.mark.parametrize("spec", ["dense", SPARSE])
def test_gradients(spec: str):
    """As close to the exact ones as those of torch's own attention."""
    batch = small_models.padded()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    def gradient(model: torch.nn.Module, how: str | None, mixed: bool) -> torch.Tensor:
        model = copy.deepcopy(model).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            if how is None:
                model(**batch, labels=labels).loss.backward()
            else:
                with farspan.patch(model, how):
                    model(**batch, labels=labels).loss.backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters()])

    model = small_models.make("llama")
    exact = gradient(model.double(), spec, False)
    dense = gradient(model, None, False)
    model = model.float()
    theirs = (gradient(model, None, True) - dense).norm() / dense.norm()
    ours = (gradient(model, spec, True) - exact).norm() / exact.norm()
    assert ours <= 2 * theirs
