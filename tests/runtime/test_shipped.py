"""Recipes that farspan ships: found by a model's sizes and weights, small, and of known methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import farspan
from farspan import FarspanError, Recipe
from farspan.runtime import shipped

from ..laws.gates import random_gates
from .small_models import make, prompt

SPEC = "seer:block=8,fraction=0.3"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Any) -> Any:
    """A folder of shipped recipes with one of seer for the tiny llama."""
    random_gates(farspan.parse_method(SPEC), make("llama")).half().save(tmp_path / "seer" / "tiny")
    monkeypatch.setattr(shipped, "_FOLDER", tmp_path)
    shipped.recipe_folders.cache_clear()
    yield tmp_path
    shipped.recipe_folders.cache_clear()


def test_one_line_finds_the_recipe_of_a_model(folder: Path) -> None:
    model, ids = make("llama"), prompt(1, 80)
    with torch.no_grad(), farspan.patch(model, SPEC) as patched:
        model(ids)
        found = {i: named["seer"].k for i, named in patched.modules().items()}
        assert patched.report().summary["prefill_density"] < 0.7
    saved = Recipe.load(folder / "seer" / "tiny")
    assert found and all(torch.equal(x, saved.tensors[f"layers.{i}.k"]) for i, x in found.items())
    assert all(x.dtype == torch.float32 for x in saved.tensors.values())  # saved as float16
    with farspan.patch(model.to(torch.bfloat16), SPEC):  # the fingerprint bears the rounding
        pass


def test_a_model_of_other_weights_or_sizes_needs_its_own(folder: Path) -> None:
    other = make("llama", seed=1)
    says = r"needs a recipe: make one with 'farspan train seer:"
    for model in (other, make("llama", num_hidden_layers=2), make("qwen3")):
        with pytest.raises(FarspanError, match=says):
            farspan.patch(model, SPEC)
    with pytest.raises(FarspanError, match=says):  # gates of other blocks
        farspan.patch(make("llama"), "seer:block=16,fraction=0.3")
    with pytest.raises(FarspanError, match=r"made for another model: fingerprint"):
        farspan.patch(other, SPEC, recipe=folder / "seer" / "tiny")


def test_the_recipe_of_another_method_stands_beside_it(folder: Path) -> None:
    model, pair = make("llama"), f"{SPEC} + double_sparsity:k=16,dense_layers=0"
    how = {"method": "double_sparsity", "tokens": 64, "window": 64}
    made = farspan.calibrate(model, lambda *a, **k: {"input_ids": prompt(1, 64)}, "any", **how)
    with farspan.patch(model, pair, recipe=made) as patched:
        assert patched.modules()[0]["seer"] is not None
    both = random_gates(farspan.parse_method(SPEC), model)
    with pytest.raises(FarspanError, match=r"double_sparsity needs a recipe|need one each"):
        farspan.patch(model, pair, recipe=both)


def test_what_is_shipped_is_small_and_of_known_methods() -> None:
    size = 0
    for name, models in shipped.recipe_folders().items():
        for model, folder in models.items():
            recipe = Recipe.load(folder)
            assert recipe.method == name and name in farspan.methods()
            assert model in farspan.runtime.models.ALIASES
            trained = {"steps", "seed", "minutes", "text_sha256"}
            assert {"window"} | (trained if name != "duo" else {"tokens"}) <= recipe.settings.keys()
            assert recipe.geometry["fingerprint"]
            size += sum(file.stat().st_size for file in folder.iterdir())
    assert 0 < size < 10 << 20
