"""Packed keys beside recurrent layers: of transformers' own hybrids, of converted models and of mixers in
place. The states are as they are; what attention keeps is rounded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import farspan
from farspan.attention.hybrid import parse_mixer
from farspan.runtime import hf

from .small_models import Feed, make, prompt, shared
from .test_converted_models import SPEC, convert, load

STORAGES = pytest.mark.parametrize("storage", ["int8:group=16,window=8", "int4:group=16,window=8"])
BOUND = {"int8": 0.05, "int4": 0.6}  # as in test_quantised_store.py


def fed(model: Any, ids: Tensor, storage: str | None, **how: Any) -> tuple[Tensor, Any]:
    """-> logits in steps and chunks, and the cache."""
    with farspan.patch(model, storage=storage, **how):
        feed = Feed(model, ids, torch.ones_like(ids))
        return torch.cat([feed(41), feed(20), *[feed(1) for _ in range(10)]], 1), feed.cache


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt() / b.std())


@STORAGES
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_converted_model(name: str, storage: str, tmp_path: Path) -> None:
    """One layer attends, two have mixers; gemma3 has layers with a window besides."""
    convert(make(name), (0, 2) if name == "llama" else (1,), tmp_path)
    model, ids = load(tmp_path), prompt(2, 71)
    (want, plain), (got, cache) = (fed(model, ids, x) for x in (None, storage))
    assert 0 < far(got, want) < BOUND[storage[:4]]
    assert torch.equal(got[:, :41], want[:, :41]), "a call reads its own keys as they are"
    packed = [x for x in cache.layers if isinstance(x, hf.KVStoreLayer)]
    assert len(packed) == 1 and packed[0].store.buffers.packed.length == 48
    assert hf.stored_bytes(cache) != hf.stored_bytes(plain)


@STORAGES
@pytest.mark.parametrize("spec", [SPEC, "scout:mixer=none,every=3"])
def test_where_no_layer_attends_nothing_changes(spec: str, storage: str) -> None:
    """Mixers have no packed keys, not even those that keep keys: the numbers are the same to the bit."""
    model, ids = shared("llama"), prompt(2, 71)
    info = hf.inspect_model(model)
    torch.manual_seed(0)
    mixers = {i: parse_mixer(spec, hf.geometry_of(info, i)) for i in range(3)}
    (want, _), (got, _) = (fed(model, ids, x, mixers=mixers) for x in (None, storage))
    assert torch.equal(got, want)


@STORAGES
@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_copies_rows_and_files(name: str, storage: str, tmp_path: Path) -> None:
    """A copy, the rows in another order and a saved cache go on to the bit as the cache itself does."""
    model, ids, more = shared(name), prompt(2, 60), prompt(2, 21, seed=3)

    def goes_on(cache: Any, rows: list[int]) -> Tensor:
        with torch.no_grad():
            return model(more[rows], **hf.with_cache(model, cache)).logits

    with farspan.patch(model, storage=storage):
        cache = hf.fill(model, ids, torch.ones_like(ids))
        farspan.save_cache(model, cache, ids, tmp_path)
        turned = copy.deepcopy(cache)
        turned.reorder_cache(torch.tensor([1, 0]))
        loaded = farspan.load_cache(model, tmp_path).cache
        copied = copy.deepcopy(cache)
        want = goes_on(cache, [0, 1])
        assert torch.equal(goes_on(copied, [0, 1]), want) and torch.equal(goes_on(loaded, [0, 1]), want)
        assert torch.allclose(goes_on(turned, [1, 0]), want[[1, 0]], atol=1e-5)
