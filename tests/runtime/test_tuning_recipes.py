"""Recipes of fine-tuned attention: apart, merged, through files, and taken off again bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import close, decode, logits, make, padded, prompt, shared, snapshot

import farspan
from farspan import FarspanError, Recipe
from farspan.runtime.training.tuned import Tuned

IDS = prompt(2, 48)
SPEC = "block_topk:k=16,block=8"


def disturbed(
    model: Any, tune: str, spec: str = SPEC, start: Recipe | None = None
) -> tuple[Recipe, torch.Tensor]:
    """The recipe of random changes, and the logits of the model during its training."""
    training = Tuned(model, farspan.parse_method(spec), start, tune=tune, rank=3 if tune == "lora" else None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in training.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    seen = logits(model, IDS, use_cache=False)
    recipe = training.recipe({"steps": 0})
    training.close()
    return recipe, seen


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2"])
@pytest.mark.parametrize(("tune", "merge"), [("lora", False), ("lora", True), ("attention", False)])
def test_patch_puts_it_on_and_remove_takes_it_off(tmp_path: Path, name: str, tune: str, merge: bool) -> None:
    model = make(name)
    plain, generated = logits(model, IDS), decode(model, padded())
    recipe, want = disturbed(model, tune)
    recipe.save(tmp_path / "tuned")
    loaded = Recipe.load(tmp_path / "tuned")
    assert (loaded.method, loaded.adapters) == ("block_topk", recipe.adapters)
    before, weights = snapshot(model), {n: p.clone() for n, p in model.named_parameters()}
    with farspan.patch(model, SPEC, recipe=tmp_path / "tuned", merge=merge) as patched:
        got = logits(model, IDS, use_cache=False)
        decode(model, padded())
        assert patched.report().summary["prefill_density"] < 1
    assert not torch.allclose(want, plain, atol=1e-2)
    assert close(got, want) if merge else torch.equal(got, want)
    assert snapshot(model) == before
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert torch.equal(logits(model, IDS), plain) and torch.equal(decode(model, padded()), generated)


def test_the_sum_is_the_papers() -> None:
    """W + alpha / rank * b a, per projection."""
    model = make("llama")
    recipe, _ = disturbed(model, "lora")
    old = {n: p.clone() for n, p in model.named_parameters()}
    with farspan.patch(model, SPEC, recipe=recipe, merge=True):
        for index in range(3):
            for name in ("q_proj", "o_proj"):
                a, b = (recipe.tensors[f"adapters.{index}.{name}.{x}"] for x in "ab")
                assert a.shape[0] == b.shape[1] == 3
                weight = getattr(model.model.layers[index].self_attn, name).weight
                wanted = old[f"model.layers.{index}.self_attn.{name}.weight"] + 16 / 3 * b @ a
                assert torch.allclose(weight, wanted, atol=1e-5)
                assert weight.requires_grad


def test_a_model_converted_while_it_is_patched_stays_converted() -> None:
    model = make("llama")
    recipe, _ = disturbed(model, "lora")
    want = {n: p.double() for n, p in model.named_parameters()}
    patched = farspan.patch(model, SPEC, recipe=recipe, merge=True)
    model.double()
    patched.remove()
    assert all(torch.equal(p, want[n]) for n, p in model.named_parameters())


def test_adapters_beside_a_methods_own_weights() -> None:
    """A recipe that has both: the method's tensors are those it began with."""
    model = make("llama")
    spec = "sale:block_q=8,block_k=4,local=8,dense_below=0"
    text = "".join(chr(33 + (7 * i * i + i // 3) % 90) for i in range(300))

    def tokenizer(text: str, **how: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[3 + ord(c) % 120 for c in text[: how["max_length"]]]])}

    own = farspan.calibrate(model, tokenizer, text, method=spec, tokens=256, start=8.0, error=4.0)
    both, want = disturbed(model, "lora", spec, own)
    assert own.tensors.keys() < both.tensors.keys() and both.parameters == own.parameters
    with farspan.patch(model, spec, recipe=both):
        assert torch.equal(logits(model, IDS, use_cache=False), want)
    only = Recipe(
        **{**vars(both), "tensors": {n: x for n, x in both.tensors.items() if n.startswith("adapters.")}}
    )
    with pytest.raises(FarspanError, match="sale needs a recipe: make one"):
        farspan.patch(model, spec, recipe=only)


def test_what_is_refused() -> None:
    model = make("llama")
    recipe, _ = disturbed(model, "lora")
    before = snapshot(model)
    with pytest.raises(
        FarspanError, match="trained under block_topk, and the model is patched with dense and quest"
    ):
        farspan.patch(model, "quest:dense_layers=0", recipe=recipe)
    with pytest.raises(FarspanError, match=r"made for another model: num_layers 3 \(the model has 2"):
        farspan.patch(make("llama", num_hidden_layers=2), SPEC, recipe=recipe)
    with pytest.raises(FarspanError, match="merge=True was given, but no recipe has LoRA adapters"):
        farspan.patch(model, SPEC, merge=True)
    bent = Recipe(**{**vars(recipe), "tensors": {**recipe.tensors, "adapters.0.q_proj.a": torch.zeros(3, 5)}})
    with pytest.raises(FarspanError, match=r"has 0\.q_proj with .*a \[3, 5\].*it was made for another model"):
        farspan.patch(model, SPEC, recipe=bent)
    assert snapshot(model) == before
    with farspan.patch(shared("llama"), SPEC, recipe=recipe):
        pass


class Stop(Exception):
    pass


@pytest.mark.parametrize("tune", ["lora", "attention"])
def test_a_stopped_fine_tuning_ends_at_the_same_weights(tmp_path: Path, tune: str) -> None:
    """Through ``farspan.train``."""

    def tokenizer(text: str, **_: Any) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[3 + ord(c) % 120 for c in text]])}

    def train(out: str, progress: Any = None) -> Recipe:
        how: dict[str, Any] = {
            "steps": 4,
            "window": 64,
            "held_out": 1,
            "save_every": 2,
            "lr": 5e-3,
            "warmup": 1,
        }
        text = "".join(chr(33 + (7 * i * i + i // 3) % 90) for i in range(64 * 4))
        return farspan.train(
            model, tokenizer, SPEC, text, out=tmp_path / out, tune=tune, progress=progress, **how
        )

    def stop(step: Any) -> None:
        if step.done == 3:
            raise Stop

    model = make("llama")
    before = snapshot(model)
    whole = train("whole")
    with pytest.raises(Stop):
        train("cut", stop)
    again = train("cut")
    assert snapshot(model) == before
    assert whole.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(x, again.tensors[name]) for name, x in whole.tensors.items())
    first, last = whole.settings["held_out"]
    assert last["loss"] != first["loss"] and last["nll_dense"] == first["nll_dense"]
    with farspan.patch(model, SPEC, recipe=tmp_path / "cut"):
        pass
