"""ACT's choice of heads against differences of the likelihood itself, and its way into a patched model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import farspan
from farspan import FarspanError, Recipe
from farspan.attention.calibrated.act import ACT
from farspan.attention.calibration.act import HeadSearch
from farspan.attention.softmax import Softmax
from farspan.runtime import hf

from ..laws import naive_act
from . import small_models
from .small_models import logits, make, prompt, shared, snapshot

SPEC = "act:first=1,threshold=0.05"
HOW: dict[str, Any] = {"tokens": 192, "window": 96}


def tokens(text: str, **_: Any) -> dict[str, Tensor]:
    """Stands for a tokenizer: the same 192 tokens for every text."""
    return {"input_ids": prompt(1, 192, seed=3)}


def nll_with(model: Any, ids: Tensor, layer: int, head: int, size: float) -> float:
    """Mean negative log-likelihood where one head's output is ``size`` of the way to the calibrated one, by
    the definition."""
    info = hf.inspect_model(model)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softmax: Softmax) -> Tensor:
        out = []
        causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        for h in range(q.shape[1]):
            kv = h * k.shape[1] // q.shape[1]
            plain = naive_act.probabilities(q[0, h], k[0, kv], softmax.scale, softmax.softcap, causal)
            if h == head:
                new = naive_act.calibrated(plain, naive_act.sinks(plain, 0.05), 0.4)
                plain = plain + size * (new - plain)
            out.append(plain @ v[0, kv].double())
        return torch.stack(out, 1)[None].to(q.dtype)

    with farspan.patch(model, "dense"), torch.no_grad():
        undo = hf.replace_attention(info.attention[layer], attend)
        found = model(ids, use_cache=False).logits[0, :-1]
        undo()
    return float(cross_entropy(found, ids[0, 1:]))


def test_effects_are_derivatives_of_the_likelihood() -> None:
    model = make("llama").double()
    made = farspan.calibrate(model, tokens, "any", method=SPEC, **HOW)
    ids, step = tokens("any")["input_ids"], 1e-2
    windows = [ids[:, :96], ids[:, 96:192]]
    compared = 0
    for layer in range(3):
        effects, heads = (made.tensors[f"layers.{layer}.{name}"] for name in ("effects", "heads"))
        assert effects.shape == heads.shape == (4,) and heads.dtype == torch.bool
        if layer < 1:
            assert not bool(effects.any()) and not bool(heads.any())
            continue
        for head in range(4):
            slopes = [
                (nll_with(model, x, layer, head, step) - nll_with(model, x, layer, head, -step)) / (2 * step)
                for x in windows
            ]
            mean, error = sum(slopes) / 2, torch.tensor(slopes).std() / 2**0.5
            assert float(effects[head]) == pytest.approx(mean, rel=1e-2, abs=2e-5)
            assert bool(heads[head]) == bool(mean < -error)
            compared += abs(mean) > 1e-5
    assert compared > 4, "the case has too few sinks"
    assert made.method == "act" and made.settings["sure"] == 1.0 and made.settings["tokens"] == 192


@pytest.mark.parametrize(("sure", "chosen"), [(0.0, [1, 1, 0]), (1.0, [1, 0, 0]), (3.0, [0, 0, 0])])
def test_a_head_must_gain_more_than_its_error(sure: float, chosen: list[int]) -> None:
    """Effects of three heads in three windows: mean and standard error -2 and 1, -1 and 1.2, 0 and 0."""
    layer = farspan.attention.method.LayerInfo(2, 3, 1, 16)
    search = HeadSearch(ACT(), layer, sure)
    shift = torch.tensor([3**0.5, 1.2 * 3**0.5, 0.0])
    for much in (-1.0, 0.0, 1.0):
        search._effects.append(torch.tensor([-2.0, -1.0, 0.0]) + much * shift)
    assert search.weights()["heads"].int().tolist() == chosen
    assert search.weights()["effects"].tolist() == pytest.approx([-2.0, -1.0, 0.0], abs=1e-6)


def test_a_recipe_comes_back_from_its_file_and_reaches_its_heads_alone(tmp_path) -> None:
    model = shared("llama")
    made = farspan.calibrate(model, tokens, "any", method=SPEC, sure=0.0, **HOW)
    path, results = made.save(tmp_path / "recipe"), []
    for spec, how in ((SPEC, {"recipe": made}), (SPEC, {"recipe": path}), (f"{SPEC},recipe={path}", {})):
        with farspan.patch(model, prefill=spec, decode="window:w=20", **how) as patched:
            results.append(logits(model, prompt(1, 90)))
            assert patched.report().summary["prefill_density"] == 1.0
    assert all(torch.equal(one, results[0]) for one in results)
    with farspan.patch(model, "dense"):
        dense = logits(model, prompt(1, 90))
    assert (results[0] - dense).abs().max() > 1e-3
    none = {n: torch.zeros_like(x) for n, x in made.tensors.items()}
    none = Recipe(method="act", geometry=made.geometry, settings={}, tensors=none)
    with farspan.patch(model, SPEC, recipe=none):
        assert torch.equal(logits(model, prompt(1, 90)), dense)
    with pytest.raises(FarspanError, match="No layer of this model runs act"):
        farspan.patch(model, SPEC, recipe=none, strict=True)
    with pytest.raises(FarspanError, match="calibrate --method act"):
        farspan.patch(model, SPEC)


def test_the_method_underneath_has_a_recipe_of_its_own(tmp_path) -> None:
    model = shared("llama")
    sale = "block_q=8,block_k=4,local=8,dense_below=0"
    made = farspan.calibrate(model, tokens, "any", method=f"sale:{sale}", tokens=96, start=8.0, error=1.0)
    path = made.save(tmp_path / "sale")
    heads = farspan.calibrate(model, tokens, "any", method=SPEC, sure=0.0, **HOW)
    for own in ("heads=all", "heads=chosen"):
        spec = f"{SPEC},{own},over=(sale:{sale},recipe={path})"
        with farspan.patch(model, spec, recipe=heads if own == "heads=chosen" else None) as patched:
            got = logits(model, prompt(1, 90))
            density = patched.report().summary["prefill_density"]
        with farspan.patch(model, f"sale:{sale}", recipe=made) as patched:
            assert (got - logits(model, prompt(1, 90))).abs().max() > 1e-3
            assert 0.3 < density < 0.95
            assert patched.report().layers[0].phases["prefill"].pairs > 0
    with pytest.raises(FarspanError, match="calibrate --method sale"):
        farspan.patch(model, f"{SPEC},heads=all,over=(sale:{sale})")


def test_calibrating_leaves_the_model_as_it_was() -> None:
    for name in ("gpt_oss", "gemma2"):  # sliding layers beside full ones, with learned sinks or a soft-cap
        model = make(name)
        before, expected = snapshot(model), logits(model, prompt())
        made = farspan.calibrate(model, tokens, "any", method="act:first=0,threshold=0.03", **HOW)
        assert snapshot(model) == before and torch.equal(logits(model, prompt()), expected)
        assert all(p.grad is None for p in model.parameters())
        kept = [bool(made.tensors[f"layers.{i}.effects"].any()) for i in range(4)]
        assert kept == [False, True, False, True], "sliding layers are left as they are"


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(FarspanError, match="act has no option error=; it takes sure="):
        farspan.calibrate(shared("llama"), tokens, "any", method="act", error=1.0)


def test_from_the_command_line(tmp_path, smollm2) -> None:
    from farspan.cli import main

    folder, text, out = tmp_path / "model", tmp_path / "text.txt", tmp_path / "recipe"
    small_models.make("llama", vocab_size=49152).save_pretrained(folder)
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    smollm2[1].save_pretrained(folder)
    made = ["calibrate", "--model", str(folder), "--method", SPEC, "--text", str(text), "--tokens", "256"]
    with pytest.raises(SystemExit) as ended:
        main([*made, "--window", "128", "--sure", "0.5", "--out", str(out)])
    assert not ended.value.code
    about = json.loads((out / "recipe.json").read_text())
    assert about["method"] == "act"
    assert about["settings"]["sure"] == 0.5 and about["settings"]["window"] == 128
