"""Decode steps on a cache of fixed size, captured in CUDA graphs: the logits of a growing cache, no waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import farspan
from farspan.runtime.hf import captured, returned_cache, with_cache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="these tests capture CUDA graphs; there is no CUDA device"
    ),
]
KINDS = {  # how many kinds of steps there are from 150 to 174 keys
    "dense": 1,
    "window:w=160,sinks=4": 2,
    "quest:k=64,dense_layers=1": 1,
    "quest:k=160,page=8,dense_layers=0,gqa_reduce=none": 2,
    "double_sparsity:k=64,dense_layers=0": 1,
    "recycled:k=64,stride=6": 2,
}
PROMPT, STEPS = 150, 24


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama(hidden_size=512, initializer_range=0.08).cuda()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many calls were captured and how many replayed. A replay that waits for the device raises."""
    done: Counter[str] = Counter()

    def capture(run: Callable[[], Any]) -> captured.Graph:
        done["captured"] += 1
        graph = captured.capture_on_cuda(run)

        def replay() -> None:
            done["replayed"] += 1
            graph.replay()

        return graph._replace(replay=replay)

    monkeypatch.setitem(captured.CAPTURE, "cuda", capture)
    return done


@pytest.mark.parametrize("spec", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_replays_give_the_logits_of_a_growing_cache(
    model: Any, spec: str, padded: bool, captures: Counter[str]
) -> None:
    """Also a call that is replayed, its hooks included, waits for nothing."""
    ids = torch.randint(3, 128, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(0)).cuda()
    mask = torch.ones_like(ids)
    mask[1, : 40 if padded else 0] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    takes = {}
    if "double_sparsity" in spec:
        takes["recipe"] = farspan.calibrate(model, lambda *_, **__: {"input_ids": ids[:1]}, "", tokens=150)
    kinds, results = KINDS[spec], []
    for static in (None, PROMPT + STEPS):
        logits, cache = [], None
        with farspan.patch(model, spec, static=static, **takes) as patch, torch.no_grad():
            for begin, end in [(0, PROMPT), *((n, n + 1) for n in range(PROMPT, PROMPT + STEPS))]:
                part = slice(begin, end)
                how = {} if cache is None else with_cache(model, cache)
                replays = static is not None and begin >= PROMPT + STEPS - 3
                torch.cuda.set_sync_debug_mode("error" if replays else "default")
                try:
                    out = model(ids[:, part], mask[:, :end], positions[:, part], use_cache=True, **how)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                cache = returned_cache(out)
                logits.append(out.logits[:, -1])
            report = patch.report()
        assert not report.notices
        results.append((torch.stack(logits), report.summary["decode_density"]))
    (want, density), (got, same) = results
    assert density == same
    assert (got - want).abs().max() <= 1e-3 * want.abs().max()
    assert kinds <= captures["captured"] <= kinds + 1
    assert captures["replayed"] >= STEPS - 2 * (kinds + 1)


def test_generate_is_replayed(tiny_llama: Callable[..., Any], captures: Counter[str]) -> None:
    """In float16, greedy and sampled: of 40 tokens one comes from the prompt, one runs as it is."""
    model = tiny_llama(hidden_size=512, initializer_range=0.08).half().cuda()
    ids = torch.randint(3, 128, (1, PROMPT), generator=torch.Generator().manual_seed(1)).cuda()
    how = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}
    with farspan.patch(model, "quest:k=64,dense_layers=0", static=PROMPT + 40):
        greedy = model.generate(ids, do_sample=False, **how)
        assert captures["captured"] == 1 and captures["replayed"] == 38
        assert torch.equal(model.generate(ids, do_sample=False, **how), greedy)
        model.generate(ids, do_sample=True, **how)
    assert captures["replayed"] >= 3 * 37
