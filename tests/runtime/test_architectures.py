"""Every architecture against its own unpatched self: dense is exact, methods serve full attention only."""

from __future__ import annotations

import pytest
import torch
from small_models import (
    ALL_SLIDING,
    ARCHITECTURES,
    RECURRENT,
    WINDOW,
    close,
    decode,
    layer_kinds,
    logits,
    padded,
    prompt,
    recipe,
    served,
    shared,
    snapshot,
)
from transformers import DynamicCache

import farspan
from farspan.attention.selection import Window

NAMES = list(ARCHITECTURES)
SELECTIVE = [name for name in NAMES if name not in ALL_SLIDING]
LONG = 72  # tokens of the prompts that methods are asked to read part of

FULL_BUDGET = [
    "window:w=4096",
    "window:w=60,sinks=60",  # longer than the prompt only together
    "recycled:k=4096",
    "quest:k=4096,dense_layers=0",
    "quest:k=none,fraction=1.0,page=4,dense_layers=0",  # selects, and selects everything
    "double_sparsity:k=4096,dense_layers=0",
    "double_sparsity:k=none,fraction=1.0,dense_layers=0",
    "block_topk:k=4096",
    "block_topk:k=none,fraction=1.0,block=8",
]
SMALL_BUDGET = {
    "window:w=12,sinks=2": ("prefill", "decode"),
    "recycled:k=16,stride=5": ("decode",),
    "quest:k=16,page=4,dense_layers=0": ("decode",),
    "double_sparsity:k=16,dense_layers=0": ("decode",),
    "block_topk:k=16,block=8": ("prefill",),
    "block_topk:k=16,block=8 + quest:k=16,page=4,dense_layers=0": ("prefill", "decode"),
}


@pytest.mark.parametrize("name", NAMES)
def test_dense_forward_is_the_models_own(name):
    model, batch = shared(name), padded((50, 31, 44))
    before = snapshot(model)
    alone, rows = logits(model, prompt(2, 50)), logits(model, batch)
    with farspan.patch(model, "dense"):
        assert close(logits(model, prompt(2, 50)), alone)
        assert close(logits(model, prompt(2, 50), use_cache=False), alone)
        assert close(logits(model, batch), rows, batch["attention_mask"])
    assert snapshot(model) == before
    assert torch.equal(logits(model, prompt(2, 50)), alone)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", NAMES)
def test_dense_generates_the_same_tokens_past_the_window(name, how):
    model, batch = shared(name), padded()
    assert batch["input_ids"].shape[1] > WINDOW
    expected = decode(model, batch, WINDOW + 4, **how)
    with farspan.patch(model, "dense"):
        assert torch.equal(decode(model, batch, WINDOW + 4, **how), expected)


@pytest.mark.parametrize("name", NAMES)
def test_dense_chunked_prefill_is_the_prompt_cut_by_hand(name):
    model, batch, chunk = shared(name), padded((70, 41)), 24
    cache, by_hand = DynamicCache(config=model.config), []
    for a in range(0, 70, chunk):  # a recurrent layer's own rounding depends on the cut, so cut alike
        part = {"input_ids": batch["input_ids"][:, a : a + chunk]}
        part["attention_mask"] = batch["attention_mask"][:, : a + chunk]
        by_hand.append(logits(model, part, past_key_values=cache))
    whole, tokens = logits(model, batch), decode(model, batch)
    with farspan.patch(model, "dense", prefill_chunk=chunk):
        chunked = logits(model, batch)
        assert torch.equal(decode(model, batch), tokens)
    assert close(chunked, torch.cat(by_hand, 1), batch["attention_mask"])
    if name not in RECURRENT:
        assert close(chunked, whole, batch["attention_mask"])


@pytest.mark.parametrize("name", SELECTIVE)
def test_full_budget_is_dense(name):
    model, batch = shared(name), padded((LONG, 55))
    expected, tokens = logits(model, batch), decode(model, batch, 6)
    for spec in FULL_BUDGET:
        for by in ("q", "k", "qk") if spec.startswith("double_sparsity:k=none") else ("qk",):
            needed = recipe(name, by) if spec.startswith("double_sparsity") else None
            with farspan.patch(model, spec, recipe=needed) as patched:
                assert close(logits(model, batch), expected, batch["attention_mask"]), spec
                assert torch.equal(decode(model, batch, 6), tokens), (spec, by)
            assert patched.report().summary["decode_density"] == 1.0, spec


@pytest.mark.parametrize("name", SELECTIVE)
def test_small_budget_reads_less_where_it_serves(name):
    model, batch = shared(name), padded((LONG, 55))
    own = {"sliding_attention": "sliding window", "linear_attention": "no attention", "mlp": "no attention"}
    for spec, phases in SMALL_BUDGET.items():
        needed = recipe(name) if spec.startswith("double_sparsity") else None
        with farspan.patch(model, spec, recipe=needed) as patched:
            decode(model, batch, 8)
        report = patched.report()
        assert [layer.layer for layer in report.layers] == served(model)
        for layer in report.layers:
            for phase, done in layer.phases.items():
                assert done.calls > 0
                assert (done.density < 1) == (phase in phases), (spec, layer.layer, phase)
                assert (done.kv_bytes < done.dense_bytes) == (phase in phases), (spec, layer.layer, phase)
        for index, kind in enumerate(layer_kinds(model)):
            assert (index in report.untouched) == (kind in own)
            assert own.get(kind, "") in report.untouched.get(index, "")
        assert not set(phases) - {p for p in phases if report.summary[f"{p}_density"] < 1}


@pytest.mark.parametrize("name", SELECTIVE)
def test_window_is_the_models_own_attention_under_that_mask(name):
    """The unpatched model under a 4-D mask of that pattern is the oracle: scale, soft-cap, sinks included."""
    model, length = shared(name), LONG
    spec = Window(size=12, sinks=2)

    def additive(allowed):
        return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)

    masks = {
        "full_attention": additive(spec.to_mask(length, length, None, 2)),
        "sliding_attention": additive(Window(size=WINDOW).to_mask(length, length, None, 2)),
    }
    kinds = set(layer_kinds(model))
    mask = masks if "sliding_attention" in kinds else masks["full_attention"]
    ids = prompt(2, length)
    expected = logits(model, ids, attention_mask=mask, use_cache=False)
    with farspan.patch(model, spec=f"window:w={spec.size},sinks={spec.sinks}"):
        assert close(logits(model, ids), expected)
    assert not close(logits(model, ids), expected)


@pytest.mark.parametrize("name", SELECTIVE)
def test_rows_of_a_padded_batch_are_what_they_are_alone(name):
    model, batch = shared(name), padded((LONG, 55))
    for spec in SMALL_BUDGET:
        needed = recipe(name) if spec.startswith("double_sparsity") else None
        with farspan.patch(model, spec, recipe=needed):
            together = decode(model, batch, 8)
            for row, length in enumerate((LONG, 55)):
                alone = decode(model, batch["input_ids"][row : row + 1, LONG - length :], 8)
                assert torch.equal(together[row : row + 1], alone), (spec, row)


@pytest.mark.parametrize("spec", [spec for spec in SMALL_BUDGET if not spec.startswith("double")])
@pytest.mark.parametrize("name", ALL_SLIDING)
def test_a_model_of_sliding_layers_only_refuses_to_be_selective(name, spec):
    model = shared(name)
    before = snapshot(model)
    with pytest.raises(
        farspan.Unsupported, match="each of its attention layers has the model's own sliding window"
    ):
        farspan.patch(model, spec)
    assert snapshot(model) == before


def test_a_layer_that_is_not_served_cannot_be_given_a_method():
    for name, index, why in (("gemma2", 0, "sliding window"), ("qwen3_next", 2, "no attention")):
        model = shared(name)
        before = snapshot(model)
        with pytest.raises(farspan.SpecError, match=why):
            farspan.patch(model, "dense", layers={index: "quest:k=16"})
        assert snapshot(model) == before


def test_layers_can_have_methods_of_their_own():
    model = shared("llama")
    with farspan.patch(model, "window:w=12,sinks=2", layers={0: "dense", -1: "recycled:k=16"}) as patched:
        decode(model, prompt(1, LONG), 6)
    densities = [{k: p.density for k, p in layer.phases.items()} for layer in patched.report().layers]
    assert densities[0] == {"prefill": 1, "decode": 1}
    assert densities[1]["prefill"] < 1 and densities[1]["decode"] < 1
    assert densities[2]["prefill"] == 1 and densities[2]["decode"] < 1
