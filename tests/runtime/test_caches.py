"""Caches of a patched model: the user's own, several turns, copies, rows, state that has missed tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import (
    PAD,
    close,
    decode,
    padded,
    prompt,
    shared,
)
from transformers import DynamicCache

import farspan

SPARSE = "quest:k=16,page=4,dense_layers=0"
SELECTIVE = ["window:w=12,sinks=2", "recycled:k=16,stride=4", SPARSE, "block_topk:k=16,block=8"]


@pytest.fixture(params=["llama", "gemma2"])
def model(request):
    return shared(request.param)


def by_hand(model, inputs, cache, new=8):
    """Greedy decoding with plain calls and the user's own cache."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    step, tokens = ids, []
    for _ in range(new):
        with torch.no_grad():
            out = model(step, attention_mask=mask, past_key_values=cache, position_ids=_positions(mask, step))
        cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        tokens.append(step)
    return torch.cat(tokens, 1)


def _positions(mask, step):
    return (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]


@pytest.mark.parametrize("kind", ["none", "bare", "with config"])
def test_the_users_own_caches(model, kind):
    def cache():
        made = {"bare": DynamicCache, "with config": lambda: DynamicCache(config=model.config)}
        return None if kind == "none" else made[kind]()

    expected = by_hand(model, padded(), cache(), 20)
    assert torch.equal(expected, decode(model, padded(), 20))
    with farspan.patch(model):
        assert torch.equal(by_hand(model, padded(), cache(), 20), expected)
        if kind != "none":
            assert torch.equal(decode(model, padded(), 20, past_key_values=cache()), expected)
    with farspan.patch(model, SPARSE) as patched:
        sparse = by_hand(model, padded(), cache(), 20)
        assert torch.equal(sparse, decode(model, padded(), 20))
    assert patched.report().summary["decode_density"] < 1


def test_several_turns_in_one_cache(model):
    turns = [prompt(2, n, seed=n) for n in (30, 21, 5)]

    def talk(cache):
        said, past = [], torch.zeros(2, 0, dtype=torch.long)
        for turn in turns:
            past = torch.cat([past, turn], 1)
            out = model.generate(
                past,
                attention_mask=torch.ones_like(past),
                past_key_values=cache,
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=PAD,
                return_dict_in_generate=True,
            )
            said.append(out.sequences[:, past.shape[1] :])
            past, cache = out.sequences, out.past_key_values
        return torch.cat(said, 1)

    expected = talk(DynamicCache(config=model.config))
    with farspan.patch(model):
        assert torch.equal(talk(DynamicCache(config=model.config)), expected)
        assert torch.equal(talk(DynamicCache()), expected)
        assert torch.equal(talk(None), expected)
    for spec in SELECTIVE:
        with farspan.patch(model, spec) as patched:
            assert talk(DynamicCache(config=model.config)).shape == expected.shape
        assert min(v for k, v in patched.report().summary.items() if k.endswith("density")) < 1


def test_a_cache_outlives_the_patch():
    model, ids, more = shared("llama"), prompt(2, 40), prompt(2, 3, seed=5)
    with torch.no_grad():
        cache = model(ids, past_key_values=DynamicCache(config=model.config)).past_key_values
        expected = model(more, past_key_values=cache).logits
        for spec in ("dense", SPARSE, "recycled:k=16,stride=4"):
            with farspan.patch(model, spec):
                cache = model(ids).past_key_values
            assert close(model(more, past_key_values=cache).logits, expected)
            assert cache.get_seq_length() == 43
            cache.crop(-3)
            assert close(model(more, past_key_values=cache).logits, expected)
            with farspan.patch(model, "dense"):
                cache.crop(-3)
                assert close(model(more, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("first", ["unpatched", "dense", "recycled:k=16,stride=4", SPARSE])
@pytest.mark.parametrize("then", ["dense", "recycled:k=16,stride=4", SPARSE, "window:w=12,sinks=2"])
def test_a_prefix_cache_is_copied_and_used_again(model, first, then):
    """A prefix read in full under one patch, deep-copied, continues under another as if that had read it."""
    prefix, ends = prompt(1, 40), [prompt(1, n, seed=n) for n in (20, 3)]
    if then.startswith("recycled"):
        ends = ends[
            :1
        ]  # a shorter end continues the set that the prefix's last query chose, where there is one

    def continue_(cache, end):
        ids = torch.cat([prefix, end], 1)
        return decode(model, ids, 8, past_key_values=cache)

    def read():
        with torch.no_grad():
            return model(prefix, past_key_values=DynamicCache(config=model.config)).past_key_values

    with farspan.patch(model, decode=then):
        fresh = [continue_(read(), end) for end in ends]
    if first == "unpatched":
        cache = read()
    else:
        with farspan.patch(model, first):
            cache = read()
    before = [layer.keys.clone() for layer in cache.layers]
    copies = [copy.deepcopy(cache) for _ in ends]
    with farspan.patch(model, decode=then):
        for end, one, expected in zip(ends, copies, fresh, strict=True):
            again = copy.deepcopy(cache)
            assert torch.equal(continue_(one, end), expected)
            assert torch.equal(continue_(again, end), expected)
    assert all(torch.equal(layer.keys, old) for layer, old in zip(cache.layers, before, strict=True))
    assert cache.get_seq_length() == 40


def test_a_methods_state_is_dropped_when_it_missed_tokens():
    """A cache that an unpatched step has extended is a new one for the method: its next step is full."""
    model, ids, more = shared("llama"), prompt(1, 40), prompt(1, 1, seed=2)
    spec = "recycled:k=16,stride=1000"

    def step(cache):
        with torch.no_grad():
            return model(more, past_key_values=cache).logits

    with farspan.patch(model, spec), torch.no_grad():
        cache = model(ids).past_key_values
        step(cache)
    for _ in range(5):
        step(cache)  # unpatched
    plain = copy.deepcopy(cache)
    expected = step(plain)
    with farspan.patch(model, spec) as patched:
        assert close(step(cache), expected)
        assert patched.report().summary["decode_density"] == 1.0
        step(cache)
        assert patched.report().summary["decode_density"] < 1


@pytest.mark.parametrize("spec", ["dense", *SELECTIVE])
def test_inference_mode_and_no_grad_mix(model, spec):
    ids, more = prompt(2, 40), [prompt(2, 1, seed=s) for s in range(4)]

    def run(modes):
        cache = DynamicCache(config=model.config)
        out = []
        for mode, x in zip(modes, [ids, *more], strict=True):
            with mode():
                out.append(model(x, past_key_values=cache).logits)
                cache.reorder_cache(torch.tensor([1, 0]))
        return torch.cat(out, 1).clone()

    with farspan.patch(model, spec):
        expected = run([torch.no_grad] * 5)
        mixed = [torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad, torch.no_grad]
        assert torch.equal(run(mixed), expected)
        assert torch.equal(run([torch.no_grad, torch.inference_mode, *mixed[:3]]), expected)


def test_reset_and_reuse_of_a_cache(model):
    for spec in ("dense", *SELECTIVE):
        with farspan.patch(model, spec), torch.no_grad():
            expected = model(prompt(2, 40)).logits
            cache = model(prompt(3, 50, seed=4)).past_key_values
            cache.reset()
            assert cache.get_seq_length() == 0
            assert close(model(prompt(2, 40), past_key_values=cache).logits, expected)


@pytest.mark.parametrize("spec", ["dense", *SELECTIVE])
def test_rows_of_a_cache_follow_select_and_repeat(spec):
    model, ids, more = shared("llama"), padded(), [prompt(3, 1, seed=s) for s in range(6)]

    def run(rows, change):
        tokens = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}
        mask = tokens["attention_mask"]
        with torch.no_grad():
            cache = model(**tokens).past_key_values
            for x in more[:2]:
                mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], 1)
                model(x, attention_mask=mask, past_key_values=cache)
            change(cache)
            out, mask = [], mask[rows]
            for x in more[2:]:
                mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=mask.dtype)], 1)
                out.append(model(x[rows], attention_mask=mask, past_key_values=cache).logits)
        return torch.cat(out, 1)

    with farspan.patch(model, spec):
        plain = run([0, 1, 2], lambda cache: None)
        for rows, change in (
            ([2, 0], lambda cache: cache.batch_select_indices(torch.tensor([2, 0]))),
            ([0, 2], lambda cache: cache.batch_select_indices(torch.tensor([True, False, True]))),
            ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
            ([1, 1, 0], lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0]))),
        ):
            assert close(run(rows, change), plain[rows])
