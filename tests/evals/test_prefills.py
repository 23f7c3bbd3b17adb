"""Which methods share a prefill in an evaluation, and that those which do not choose as under generate()."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import farspan
from farspan.evals import batch as forward
from farspan.evals.ranks import Job
from farspan.evals.shared import by_prefill, recipes, under_each
from farspan.runtime import shipped
from farspan.runtime.specs import resolve
from farspan.runtime.training.tuned import Tuned

from ..laws.gates import random_gates


def test_groups() -> None:
    specs = ["dense", "snapkv", "quest", "pbs + h2o", "pbs", "pbs + quest", "snapkv:k=64"]
    groups = [members for _, members in by_prefill(specs)]
    assert groups == [["dense", "quest"], ["snapkv"], ["pbs + h2o"], ["pbs", "pbs + quest"], ["snapkv:k=64"]]


def test_adapters_change_the_prefill_of_the_method_they_were_trained_under(
    tiny_llama: Any, tmp_path: Path
) -> None:
    model, spec = tiny_llama(), "recycled:k=24,stride=4"
    training = Tuned(model, farspan.parse_method(spec))
    with torch.no_grad():
        for p in training.parameters():
            p += 0.1
    path = training.recipe({}).save(tmp_path)
    training.close()
    specs = ["dense", "quest:k=16", spec]
    assert [members for _, members in by_prefill(specs, path)] == [["dense", "quest:k=16"], [spec]]
    assert list(recipes(specs, path)) == [spec]
    batch = forward.collate([list(range(3, 83))], 0, model.device)

    def keys(_: Any, started: Any) -> torch.Tensor:
        return started.take().layers[1].keys

    with Job(model, None) as job:
        found = dict(under_each(model, batch, specs, path, keys, job))
    assert torch.equal(found["dense"], found["quest:k=16"])
    assert not torch.equal(found["dense"], found[spec])


@pytest.mark.parametrize(
    "spec",
    [
        "snapkv:k=24,window=8",
        "h2o:k=24",
        "block_topk:k=32,block=8 + snapkv:k=24,window=8",
        "seer_decode:k=24,block=8",
        "chunkllm:k=24,fraction=none,boundary_layer=0",
    ],
)
def test_a_decode_method_is_told_of_the_prompt(spec: str, tiny_llama: Any) -> None:
    """The logits after the prompt are those of a plain call of the patched model."""
    model = tiny_llama(initializer_range=0.15)
    ids = torch.randint(3, 128, (1, 101), generator=torch.Generator().manual_seed(1))
    decode = resolve(spec)[1]
    recipe: Any = random_gates(decode, model) if decode.needs.recipe else None
    batch = forward.collate([ids[0].tolist()], 0, model.device)

    def step(_: Any, started: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(ids[:, -1:], past_key_values=started.take(), use_cache=True).logits

    with Job(model, None) as job:
        found = dict(under_each(model, batch, ["dense", spec], recipe, step, job))
    with farspan.patch(model, spec, recipe=recipe), torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        want = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits
    assert torch.equal(found[spec], want)
    assert not torch.equal(found["dense"], want), "nothing was left out, so that this test could not fail"


def test_a_recipe_goes_to_its_own_method_beside_a_shipped_one(
    tiny_llama: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """A prefill with a shipped recipe and a decode method with a recipe that is given, one by one and as a
    pair."""
    model, seer = tiny_llama(), "seer:block=8,fraction=0.4"
    random_gates(farspan.parse_method(seer), model).save(tmp_path / "seer" / "tiny")
    monkeypatch.setattr(shipped, "_FOLDER", tmp_path)
    shipped.recipe_folders.cache_clear()
    ids = list(range(3, 83))
    how: Any = {"method": "double_sparsity", "tokens": 80, "window": 80}
    made = farspan.calibrate(model, lambda *a, **k: {"input_ids": torch.tensor([ids])}, "any", **how)
    batch = forward.collate([ids], 0, model.device)
    decode = "double_sparsity:k=16,dense_layers=0"
    specs = ["dense", seer, decode, f"{seer} + {decode}"]

    def density(patched: Any, started: Any) -> float:
        return started.summary["prefill_density"]

    with Job(model, None) as job:
        found = dict(under_each(model, batch, specs, made, density, job))
    shipped.recipe_folders.cache_clear()
    assert found["dense"] == found[decode] == 1 and found[seer] == found[specs[3]] < 0.8
