"""What a cache costs while it grows: decoding must not copy it at every token."""

from __future__ import annotations

from itertools import pairwise

import torch
from small_models import prompt, shared

import farspan
from farspan.runtime.hf import returned_cache, with_cache


def test_decoding_copies_the_cache_seldom() -> None:
    """transformers' own cache has another buffer after every token; ours, once in a hundred or more."""
    model, steps = shared("llama"), 400
    moved = {}
    for spec in (None, "dense"):
        patch = farspan.patch(model, spec) if spec else None
        with torch.no_grad():
            cache = returned_cache(model(prompt(1, 40), use_cache=True))
            places = [cache.layers[0].keys.data_ptr()]
            for token in prompt(1, steps).T:
                cache = returned_cache(model(token[None], use_cache=True, **with_cache(model, cache)))
                places.append(cache.layers[0].keys.data_ptr())
        if patch:
            patch.remove()
        moved[spec] = sum(a != b for a, b in pairwise(places))
    assert moved[None] > steps // 2 and moved["dense"] <= steps // 100
