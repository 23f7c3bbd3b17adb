"""Law 3: prefill in aligned chunks is prefill whole; other cuts give the definition on those cuts.

A method whose lookahead is "prompt" judges each call by that call's own last queries: for it every cut is one
of the other cuts, and ``prefill_chunk`` gives what feeding these chunks by hand gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from farspan.attention.method import DECODE, PREFILL, AttentionMethod

from .parameters import every_method
from .tools import Data, Stream, assert_same

N = 203


def _aligned(block_multiple: int, prompt: int) -> list[int]:
    """Cuts at multiples of the block_multiple, no chunk so short that it would be a decode step."""
    step = block_multiple * -(-17 // block_multiple)
    cuts = list(range(step, prompt - 17, 2 * step))
    return [*cuts, prompt]


@every_method(whole_prompt=False)
def test_aligned_chunks_equal_the_whole(bound: AttentionMethod) -> None:
    data = Data.random(N)
    steps = list(range(N - 9, N + 1))
    cuts = _aligned(bound.block_multiple, N - 10)
    assert len(cuts) > 2
    assert_same(Stream(bound, data).run([*cuts, *steps]), Stream(bound, data).run([N - 10, *steps]))


@every_method()
@pytest.mark.parametrize("cuts", [[37, 90, N], [17, 41, 110, 150, N], [100, 101, 150, N]])
@pytest.mark.parametrize("starts", [None, [0, 21, 95]])
def test_any_cuts_equal_the_definition(
    bound: AttentionMethod, cuts: list[int], starts: list[int] | None
) -> None:
    """Fast operations and kept summaries against references and summaries made anew, in float64."""
    data = Data.random(N, starts)
    assert_same(Stream(bound, data).run(cuts), Stream(bound, data, impl="reference", fresh=True).run(cuts))


@every_method(whole_prompt=False)
@pytest.mark.parametrize("chunk", [48, 41])
def test_model_with_prefill_chunk(
    model: Any, patched: Callable[..., Any], method: AttentionMethod, chunk: int
) -> None:
    """prefill_chunk= is rounded up to the block_multiple: generate gives and counts what it does whole."""
    ids = torch.randint(3, 128, (1, 190), generator=torch.Generator().manual_seed(0))
    how = {
        "max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    results, densities = [], []
    for setting in (None, chunk):
        with patched(method, prefill_chunk=setting) as patch:
            results.append(model.generate(ids, **how))
            densities.append(patch.report().summary)
    whole, chunked = results
    assert torch.equal(whole.sequences, chunked.sequences)
    assert max((a - b).abs().max() for a, b in zip(whole.logits, chunked.logits, strict=True)) < 1e-5
    for phase in (PREFILL, DECODE):
        assert densities[0][f"{phase}_density"] == pytest.approx(densities[1][f"{phase}_density"], rel=1e-12)


@every_method(whole_prompt=False)
def test_model_fed_by_hand(model: Any, patched: Callable[..., Any], method: AttentionMethod) -> None:
    ids = torch.randint(3, 128, (1, 190), generator=torch.Generator().manual_seed(0))
    with patched(method), torch.no_grad():
        whole = model(ids, use_cache=True)
        logits, cache = [], None
        for a, b in zip([0, 64, 96], [64, 96, 190], strict=True):
            output = model(ids[:, a:b], past_key_values=cache, use_cache=True)
            logits.append(output.logits)
            cache = output.past_key_values
        assert (torch.cat(logits, 1) - whole.logits).abs().max() < 1e-5
        assert cache.get_seq_length() == 190
        for step in range(5):  # what was set up at the end of prefill is the same too
            token = ids[:, step : step + 1]
            a = model(token, past_key_values=whole.past_key_values).logits
            b = model(token, past_key_values=cache).logits
            assert (a - b).abs().max() < 1e-5


@every_method()
def test_model_with_prefill_chunk_is_fed_these_chunks(
    model: Any, patched: Callable[..., Any], method: AttentionMethod
) -> None:
    ids = torch.randint(3, 128, (1, 230), generator=torch.Generator().manual_seed(0))
    size = method.block_multiple * -(-40 // method.block_multiple)
    with torch.no_grad():
        with patched(method, prefill_chunk=40):
            logits = model(ids, use_cache=True, logits_to_keep=1).logits
        with patched(method):
            cache = None
            for a in range(0, 230, size):
                output = model(ids[:, a : a + size], past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = output.past_key_values
    assert (logits - output.logits).abs().max() < 1e-5
