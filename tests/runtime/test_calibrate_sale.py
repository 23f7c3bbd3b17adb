"""SALE's thresholds against a search written apart, in float64, and their way into a patched model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import farspan
from farspan import FarspanError, Recipe
from farspan.attention.method import LayerInfo
from farspan.attention.needs import Needs
from farspan.runtime import hf

from ..laws import naive, naive_blocks
from . import small_models
from .small_models import logits, make, prompt, shared, snapshot, tokens

SETTINGS: dict[str, Any] = {"block_q": 8, "block_k": 4, "local": 8, "dense_below": 16}
SALE = "sale:" + ",".join(f"{name}={value}" for name, value in SETTINGS.items())
TOKENS, WINDOW = 96, 64  # a window of 64 tokens, and one of 32


def seen_by_layer(model: Any, ids: Tensor) -> dict[int, list[tuple[Tensor, Tensor, Tensor]]]:
    """q [H, T, D], k and v [Hkv, T, D] of every layer, window by window."""
    info = hf.inspect_model(model)
    seen: dict[int, list[Any]] = {i: [] for i in info.attention}
    with farspan.patch(model, "dense"), torch.no_grad():
        undo = [
            hf.observe(info, i, Needs(), lambda q, k, v, _, i=i: seen[i].append((q[0], k[0], v[0])))
            for i in info.attention
        ]
        for a in range(0, ids.shape[1], WINDOW):
            model(ids[:, a : a + WINDOW], use_cache=False)
        for step in undo:
            step()
    return seen


def off_by(q: Tensor, k: Tensor, v: Tensor, tau: float, scale: float) -> float:
    """Mean over the queries past ``dense_below`` of sum |sparse output - dense output|, one query head."""
    block_q, block_k = SETTINGS["block_q"], SETTINGS["block_k"]
    chosen = naive_blocks.sale(q[None], k, past=0, tau=[tau], q_bits=8, scale=scale, **SETTINGS)
    total, first = 0.0, SETTINGS["dense_below"] // block_q * block_q
    for t in range(first, len(q)):
        everything = set(range(t + 1))
        read = {j for j in everything if j // block_k in chosen[t // block_q][0]}
        sparse, dense = (naive.attention(q[t], k, v, keys, scale) for keys in (read, everything))
        total += float((sparse - dense).abs().sum())
    return total / (len(q) - first)


@pytest.mark.parametrize(("start", "error"), [(4.0, 2.0), (0.5, 0.3)])
def test_thresholds_are_those_of_a_search_by_hand(start: float, error: float) -> None:
    model = shared("llama")
    how = {"tokens": TOKENS, "window": WINDOW, "start": start, "error": error}
    made = farspan.calibrate(model, tokens, "any", method=SALE, **how)
    kinds = set()
    for index, windows in seen_by_layer(model, tokens("any")["input_ids"]).items():
        found = made.tensors[f"layers.{index}.thresholds"]
        assert found.shape == (4,) and found.dtype == torch.float32
        for head in range(4):
            tau = start
            for q, k, v in windows:
                while tau and off_by(q[head], k[head // 2], v[head // 2], tau, 0.25) >= error:
                    tau = 0.0 if tau / 2 <= 1e-4 else tau / 2
            assert float(found[head]) == pytest.approx(tau), f"layer {index}, head {head}"
            kinds.add(tau)
    assert len(kinds) > 1, "the case does not tell heads apart"
    assert made.method == "sale" and made.settings["error"] == error and made.settings["tokens"] == TOKENS


def test_an_error_that_nothing_meets_makes_dense_heads() -> None:
    model = shared("llama")
    made = farspan.calibrate(model, tokens, "any", method=SALE, tokens=96, start=8.0, error=1e-9)
    assert all(bool((x == 0).all()) for x in made.tensors.values())
    with farspan.patch(model, SALE, recipe=made) as patched:
        logits(model, prompt(1, 90))
        assert patched.report().summary["prefill_density"] == 1.0
    with farspan.patch(model, SALE + ",threshold=8") as patched:
        logits(model, prompt(1, 90))
        assert patched.report().summary["prefill_density"] < 0.6


def test_a_recipe_comes_back_from_its_file(tmp_path) -> None:
    model, results = shared("llama"), []
    made = farspan.calibrate(model, tokens, "any", method=SALE, tokens=96, start=8.0, error=1.0)
    path = made.save(tmp_path / "recipe")
    for how in ({"recipe": made}, {"recipe": path}, {}):
        spec = SALE if how else f"{SALE},recipe={path}"
        with farspan.patch(model, prefill=spec, decode="window:w=20", **how) as patched:
            results.append(logits(model, prompt(1, 90)))
            assert patched.report().summary["prefill_density"] < 0.95
    assert all(torch.equal(one, results[0]) for one in results)
    with pytest.raises(FarspanError, match="recipe is for sale, not for double_sparsity"):
        farspan.patch(model, "double_sparsity", recipe=Recipe.load(path))
    with pytest.raises(FarspanError, match="calibrate --method sale"):
        farspan.patch(model, SALE)


def test_calibrating_leaves_the_model_as_it_was() -> None:
    model = make("gpt_oss")  # sliding layers beside full ones, and learned sinks
    before, expected = snapshot(model), logits(model, prompt())
    made = farspan.calibrate(model, tokens, "any", method=SALE, tokens=96, start=8.0, error=0.5)
    assert snapshot(model) == before and torch.equal(logits(model, prompt()), expected)
    kept = [made.tensors[f"layers.{i}.thresholds"] for i in range(4)]
    assert [bool((x == 8).all()) for x in kept] == [True, False, True, False], "sliding layers keep the start"


def test_what_cannot_be_calibrated_is_refused() -> None:
    model = shared("llama")
    for options, says in (
        ({"method": "sale"}, "dense in windows of up to 1024 tokens"),
        ({"method": SALE, "error": 0.0}, "start and error, finite numbers above 0"),
        ({"method": SALE, "by": "qk"}, "sale has no option by"),
        ({"method": "dhsa"}, "dhsa is not calibrated"),
    ):
        with pytest.raises(FarspanError, match=says):
            farspan.calibrate(model, tokens, "any", **{"tokens": 96, **options})


def test_heads_shared_out_take_their_own_thresholds() -> None:
    weights = {"thresholds": torch.tensor([1.0, 2.0, 0.0, 4.0])}
    own = LayerInfo(0, num_heads=2, num_kv_heads=1, head_dim=16, weights=weights, tp_size=2, tp_rank=1)
    served = farspan.parse_method(SALE).for_layer(own)
    assert served.log_tau.exp().tolist() == pytest.approx([0.0, 4.0])
    with pytest.raises(FarspanError, match="made for another model"):
        farspan.parse_method(SALE).for_layer(LayerInfo(0, 6, 2, 16, weights=weights))


def test_from_the_command_line(tmp_path, smollm2) -> None:
    from farspan.cli import main

    folder, text, out = tmp_path / "model", tmp_path / "text.txt", tmp_path / "recipe"
    small_models.make("llama", vocab_size=49152).save_pretrained(folder)
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    smollm2[1].save_pretrained(folder)
    made = ["calibrate", "--model", str(folder), "--method", SALE, "--text", str(text), "--tokens", "256"]
    with pytest.raises(SystemExit) as ended:
        main([*made, "--window", "128", "--start", "0.05", "--error", "2.5", "--out", str(out)])
    assert not ended.value.code
    about = json.loads((out / "recipe.json").read_text())
    assert about["method"] == "sale"
    assert {"start": 0.05, "error": 2.5, "window": 128}.items() <= about["settings"].items()
