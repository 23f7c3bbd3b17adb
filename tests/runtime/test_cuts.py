"""Caches that are cut at marks: the logits are those of a cache that never held more, bit for bit."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from small_models import WINDOW, make, prompt
from torch import Tensor

import farspan
from farspan.attention.errors import FarspanError
from farspan.attention.hybrid import Geometry, parse_mixer
from farspan.runtime import hf
from farspan.runtime.prefixes import PrefixStore

from .toy_mixer import Toy

CUT = 40  # beyond the windows
QUEST = "quest:k=16,page=4,dense_layers=0"
GEOMETRY = Geometry(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
STATES = {  # bytes of the marks of some models: of states, and of the keys and values of windows
    "toy": 4 * 16 * 16 * 4,
    "mistral": 3 * (2 * 2 * (WINDOW - 1) * 16 * 4 + 8),
    "gemma3": 2 * (2 * 2 * (WINDOW - 1) * 16 * 4 + 8),
}


def patched(name: str) -> tuple[Any, Any]:
    """A model and its patch, with a method that keeps summaries in layers without a window."""
    if name not in ("toy", "scout", "sigmoid"):
        model = make(name)
        return model, farspan.patch(model, "dense" if name == "mistral" else QUEST)
    torch.manual_seed(0)
    model = make("llama")
    spec = {"scout": "scout:mixer=aaren,every=3", "sigmoid": "sigmoid:length=256"}.get(name)
    mixer = Toy(GEOMETRY) if spec is None else parse_mixer(spec, GEOMETRY)
    return model, farspan.patch(model, QUEST, mixers={1: mixer})


@torch.no_grad()
def logits(model: Any, ids: Tensor, cache: Any, first: int) -> Tensor:
    """Those of the tokens from ``first`` on: all but the last 5 in one call, and these one by one."""
    cuts, found = [first, *range(ids.shape[1] - 5, ids.shape[1] + 1)], []
    for a, b in pairwise(cuts):
        how = {"attention_mask": torch.ones_like(ids[:, :b]), "position_ids": torch.arange(a, b)[None]}
        found.append(model(ids[:, a:b], use_cache=True, **how, **hf.with_cache(model, cache)).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    "name", ["toy", "scout", "sigmoid", "qwen3_next", "falcon_h1", "nemotron_h", "mistral", "gemma3", "llama"]
)
def test_what_was_read_after_a_mark_leaves_no_trace(name: str) -> None:
    ids = prompt(1, 90)
    other = torch.cat([ids[:, :CUT], prompt(1, 50, seed=7)], 1)
    model, patch = patched(name)
    with patch:
        cache = hf.caches_of(model).empty()
        hf.extend(model, ids[:, :CUT], cache, start=0)
        marks = [hf.mark(cache)]
        assert marks[0].length == CUT and marks[0].nbytes == STATES.get(name, marks[0].nbytes)
        assert hf.needs_marks(cache) == (marks[0].nbytes > 0) == (name not in ("llama", "sigmoid"))
        before = copy.deepcopy(cache)
        hf.forget_states(before)
        for text in (ids, other, ids):
            want = logits(model, text, copy.deepcopy(before), CUT)
            assert torch.equal(logits(model, text, cache, CUT), want)
            anywhere = not hf.needs_marks(cache)
            assert hf.last_cut(cache, 70, marks) == (70 if anywhere else CUT)
            assert hf.last_cut(cache, 70, marks, step=16) == (64 if anywhere else 0)
            assert hf.last_cut(cache, 200, marks) == 90 and hf.last_cut(cache, 70) == (70 if anywhere else 0)
            hf.cut(cache, CUT, marks)
            assert hf.length_of(cache) == CUT


@pytest.mark.parametrize("name", ["toy", "qwen3_next", "falcon_h1", "gemma3"])
def test_a_cut_after_a_call_that_has_failed(name: str) -> None:
    ids, (model, patch) = prompt(1, 90), patched(name)
    with patch:
        cache = hf.caches_of(model).empty()
        hf.extend(model, ids[:, :CUT], cache, start=0)
        marks, want = [hf.mark(cache)], logits(model, ids, copy.deepcopy(cache), CUT)

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = hf.inspect_model(model).decoder.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            hf.extend(model, ids, cache, start=CUT)
        handle.remove()
        hf.cut(cache, CUT, marks)
        assert torch.equal(logits(model, ids, cache, CUT), want)


def test_a_copy_made_in_inference_mode_is_used_outside() -> None:
    """Later calls write the copied summaries in place."""
    ids, (model, patch) = prompt(1, 90), patched("llama")
    with patch:
        cache = hf.caches_of(model).empty()
        logits(model, ids[:, :CUT], cache, 0)
        hf.forget_states(cache)
        want = logits(model, ids, copy.deepcopy(cache), CUT)
        with torch.inference_mode():
            found = hf.cut_copy(cache, CUT)
        assert torch.equal(logits(model, ids, found, CUT), want)


def test_a_cut_that_is_refused_changes_nothing() -> None:
    ids, (model, patch) = prompt(1, 90), patched("qwen3_next")
    with patch:
        cache = hf.fill(model, ids[:, :60], torch.ones_like(ids[:, :60]))
        want = logits(model, ids, copy.deepcopy(cache), 60)
        with pytest.raises(FarspanError, match="cannot be cropped to 50 tokens"):
            hf.cut(cache, 50)
        assert torch.equal(logits(model, ids, cache, 60), want)


def test_a_store_counts_states_and_marks() -> None:
    """Keys and values of two layers, three copies of the state of the third, and the tokens."""
    ids, (model, patch), store = prompt(1, 90), patched("toy"), PrefixStore(10**8)
    with patch:
        cache = hf.caches_of(model).empty()
        marks = []
        for a, b in ((0, 40), (40, 90)):
            hf.extend(model, ids[:, :b], cache, start=a)
            marks.append(hf.mark(cache))
        rows = sum(layer.store.nbytes for i, layer in enumerate(cache.layers) if i != 1)
        assert store.put("", ids[0].tolist(), cache, marks)
        assert store.nbytes == rows + 3 * STATES["toy"] + 8 * 90
        assert not PrefixStore(store.nbytes - 1).put("", ids[0].tolist(), cache, marks)
