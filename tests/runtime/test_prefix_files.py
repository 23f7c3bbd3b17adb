"""Caches that are saved to a folder and loaded again: the logits of an unbroken run, bit for bit."""

from __future__ import annotations

import copy
import json
import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import make, padded, prompt, recipe, shared
from torch import Tensor

import farspan
from farspan.attention.errors import FarspanError
from farspan.attention.hybrid import Geometry
from farspan.runtime import hf
from farspan.runtime.recipe import Recipe
from farspan.runtime.store.storage import Storage

from ..ops.doubled import Doubled
from .toy_mixer import Toy

SPECS = [
    "dense",
    "quest:k=16,page=4,dense_layers=0",
    "double_sparsity:k=16,dense_layers=0",
    "recycled:k=16,stride=4",
    "recycled:k=16,stride=4,dynamic=true",
    "snapkv:k=24,window=8",
    "h2o:k=24",
    "core_context:g=4,s=16",
    "combiner:span=8",
    "descriptors:chunk=16,pool=4",
    "seer_decode:k=24,block=8",
    "block_topk:k=16,block=8",
    "window:w=12,sinks=2",
]


def gates(spec: str) -> Any:
    """The recipe that a spec needs on the small Llama; None for most."""
    if spec.startswith("double"):
        return recipe("llama")
    if not spec.startswith("seer"):
        return None
    torch.manual_seed(0)
    method, info = farspan.parse_method(spec), hf.inspect_model(shared("llama"))
    modules = {i: method.for_training(info.layer_info(i)).module for i in info.attention}
    return Recipe.of_modules(method, modules, info.geometry, {})


def steps(model: Any, cache: Any, ids: Tensor, mask: Tensor, first: int) -> Tensor:
    """Logits of the tokens from ``first`` on, in one call for the next 5 and one call for each other."""
    found, edges = [], [first, first + 5, *range(first + 6, ids.shape[1] + 1)]
    for a, b in pairwise(edges):
        how = {
            "attention_mask": mask[:, :b],
            "position_ids": (mask[:, :b].cumsum(1) - 1).clamp(min=0)[:, a:b],
        }
        with torch.no_grad():
            found.append(model(ids[:, a:b], use_cache=True, **how, **hf.with_cache(model, cache)).logits)
    return torch.cat(found, 1)


def extended(ids: Tensor, count: int = 16) -> Tensor:
    return torch.cat([ids, prompt(ids.shape[0], count, seed=9)], 1)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("batch", ["one row", "padded"])
def test_a_loaded_cache_goes_on_as_an_unbroken_run(spec: str, batch: str, tmp_path: Path) -> None:
    """From the end of what was saved, and from the middle of it."""
    model = shared("llama")
    given = {"input_ids": prompt(1, 90)} if batch == "one row" else padded((90, 61))
    ids = given["input_ids"]
    mask = given.get("attention_mask", torch.ones_like(ids))
    longer, shorter = extended(ids), extended(ids[:, :78])
    ones = torch.ones(ids.shape[0], 16, dtype=torch.long)
    with farspan.patch(model, spec, recipe=gates(spec)):
        cache = hf.fill(model, ids, mask)
        farspan.save_cache(model, cache, ids, tmp_path, attention_mask=mask)
        loaded = farspan.load_cache(model, tmp_path)
        for tokens, past in ((longer, 90), (shorter, 78)):
            whole = torch.cat([mask[:, :past], ones], 1)
            unbroken = copy.deepcopy(cache)
            got = loaded.inputs(tokens, whole)
            if past < 90:
                unbroken.crop(past - 90)
            assert loaded.reused == past and not loaded.left
            ours = got[hf.cache_name(model)]
            want = steps(model, unbroken, tokens, whole, past)
            assert torch.equal(steps(model, ours, tokens, whole, past), want)
        assert loaded.cache.get_seq_length() == 90, "the prefix itself is not changed"


def test_keys_that_were_dropped_cannot_be_had_again(tmp_path: Path) -> None:
    model, ids = shared("llama"), prompt(1, 200)
    with farspan.patch(model, "core_context:g=4,s=16"):
        cache = hf.fill(model, ids, torch.ones_like(ids))
        assert cache.layers[0].store.dropped
        farspan.save_cache(model, cache, ids, tmp_path)
        loaded = farspan.load_cache(model, tmp_path)
        assert loaded.cache.layers[0].store.dropped == cache.layers[0].store.dropped
        given = loaded.inputs(ids[:, :100])
        assert loaded.reused == 0 and "cannot be cropped" in loaded.left and len(given) == 2
        assert len(loaded.inputs(extended(ids))) == 3 and loaded.reused == 200


def test_summaries_are_saved_complete(tmp_path: Path) -> None:
    """Prefill is dense under quest, so the pages are first read by a decode step, which computes none."""
    model, ids = shared("llama"), prompt(1, 90)
    with farspan.patch(model, "quest:k=16,page=4,dense_layers=0"):
        cache = hf.fill(model, ids, torch.ones_like(ids))
        assert cache.layers[0].store.summaries.nbytes == 0
        farspan.save_cache(model, cache, ids, tmp_path)
        [pages] = farspan.load_cache(model, tmp_path).cache.layers[0].store.summaries.held()["entries"]
    k = cache.layers[0].store.kv.k[:, :, :88].unflatten(2, (-1, 4))
    assert pages["done"] == 90 and pages["entries"].shape == (1, 2, 23, 32)
    assert torch.equal(pages["entries"][:, :, :22], torch.cat([k.amax(3), k.amin(3)], -1))


@pytest.mark.parametrize("spec", ["recycled:k=16,stride=4", "snapkv:k=24,window=8", "h2o:k=24"])
def test_the_state_counts(spec: str, tmp_path: Path) -> None:
    """Without the saved state the next logits would be others: the test above could fail."""
    model, ids = shared("llama"), prompt(1, 90)
    longer, mask = extended(ids), torch.ones(1, 106, dtype=torch.long)
    with farspan.patch(model, spec):
        cache = hf.fill(model, ids, mask[:, :90])
        farspan.save_cache(model, cache, ids, tmp_path)
        with_state = steps(model, copy.deepcopy(cache), longer, mask, 90)
        for layer in cache.layers:
            layer.store.states.clear()
        assert not torch.equal(steps(model, cache, longer, mask, 90), with_state)


@pytest.mark.parametrize("name", ["gemma2", "qwen3_next", "falcon_h1", "nemotron_h"])
def test_other_kinds_of_layers(name: str, tmp_path: Path) -> None:
    """Sliding windows and recurrent states are saved. They cannot be cropped, so a shorter prefix is of no
    use."""
    model, ids = make(name), prompt(1, 90)
    longer, mask = extended(ids), torch.ones(1, 106, dtype=torch.long)
    with farspan.patch(model, "quest:k=16,page=4,dense_layers=0"):
        cache = hf.fill(model, ids, mask[:, :90])
        farspan.save_cache(model, cache, ids, tmp_path)
        loaded = farspan.load_cache(model, tmp_path)
        ours = loaded.inputs(longer)[hf.cache_name(model)]
        assert torch.equal(steps(model, ours, longer, mask, 90), steps(model, cache, longer, mask, 90))
        loaded.inputs(ids[:, :50])
        assert loaded.reused == 0 and "cannot be cropped" in loaded.left
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}
        itself = loaded.inputs(longer, keep=False)[hf.cache_name(model)]
        assert itself is loaded.cache
        steps(model, itself, longer, mask, 90)
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_mixers(tmp_path: Path) -> None:
    model, ids = make("llama"), prompt(1, 90)
    longer, mask = extended(ids), torch.ones(1, 106, dtype=torch.long)
    toy = Toy(Geometry(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16))
    with farspan.patch(model, mixers={1: toy}):
        cache = hf.fill(model, ids, mask[:, :90])
        farspan.save_cache(model, cache, ids, tmp_path)
        ours = farspan.load_cache(model, tmp_path).inputs(longer)[hf.cache_name(model)]
        assert torch.equal(steps(model, ours, longer, mask, 90), steps(model, cache, longer, mask, 90))


@pytest.mark.parametrize(
    "how", [{"storage": Storage(format=Doubled, spec="doubled")}, {"static": 128}], ids=str
)
def test_other_stores(how: dict[str, Any], tmp_path: Path) -> None:
    model, ids = shared("llama"), prompt(1, 90)
    longer, mask = extended(ids), torch.ones(1, 106, dtype=torch.long)
    with farspan.patch(model, "quest:k=16,page=4,dense_layers=0", **how):
        cache = hf.fill(model, ids, mask[:, :90])
        farspan.save_cache(model, cache, ids, tmp_path)
        ours = farspan.load_cache(model, tmp_path).inputs(longer)[hf.cache_name(model)]
        assert torch.equal(steps(model, ours, longer, mask, 90), steps(model, cache, longer, mask, 90))


def test_a_cache_of_many_turns(tmp_path: Path) -> None:
    """What a loaded cache has grown by is saved and loaded again."""
    model, ids, mask = shared("llama"), prompt(1, 90), torch.ones(1, 106, dtype=torch.long)
    longer = extended(ids)
    with farspan.patch(model, "recycled:k=16,stride=4"):
        cache = hf.fill(model, ids[:, :40], mask[:, :40])
        for a, b in ((40, 60), (60, 90)):
            farspan.save_cache(model, cache, ids, tmp_path)
            cache = farspan.load_cache(model, tmp_path).inputs(ids[:, :b])[hf.cache_name(model)]
            steps(model, cache, ids[:, :b], mask[:, :b], a)
        unbroken = hf.fill(model, ids[:, :40], mask[:, :40])
        for a, b in ((40, 60), (60, 90)):
            steps(model, unbroken, ids[:, :b], mask[:, :b], a)
        assert torch.equal(steps(model, cache, longer, mask, 90), steps(model, unbroken, longer, mask, 90))


# --- what it belongs to ------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, smollm2: Any) -> Path:
    model, ids = shared("llama"), prompt(1, 40)
    with farspan.patch(model, "quest:k=16,page=4"):
        cache = hf.fill(model, ids, torch.ones_like(ids))
        return farspan.save_cache(model, cache, ids, tmp_path / "saved", tokenizer=smollm2[1])


def refusal(
    model: Any, path: Path, spec: str = "quest:k=16,page=4", tokenizer: Any = None, **how: Any
) -> str:
    with farspan.patch(model, spec, **how), pytest.raises(FarspanError) as error:
        farspan.load_cache(model, path, tokenizer=tokenizer)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_model_tokenizer_or_method(saved: Path, smollm2: Any) -> None:
    assert "its model is model_type llama" in refusal(make("llama", num_hidden_layers=2), saved)
    assert "its hash of the model's weights is" in refusal(make("llama", seed=1), saved)
    stretched = make("llama", rope_theta=5000.0)
    assert "its hash of the model's configuration is" in refusal(stretched, saved)
    one = make("llama")
    with torch.no_grad():
        one.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    assert "another model: its hash of the model's weights" in refusal(one, saved)
    llama = shared("llama")
    said = refusal(llama, saved, "quest:k=20,page=4")
    assert "its method is dense in layers 0-1; dense + quest:k=16,page=4 in layers 2" in said
    assert "here it is dense in layers 0-1; dense + quest:k=20,page=4 in layers 2" in said
    assert "its method is" in refusal(llama, saved, "dense")
    doubled = Storage(format=Doubled, spec="doubled")
    assert "its storage is plain, and here it is doubled" in refusal(llama, saved, storage=doubled)
    other = copy.deepcopy(smollm2[1])
    other.add_tokens(["<new>"])
    assert "another tokenizer" in refusal(llama, saved, tokenizer=other)
    with farspan.patch(llama, "quest:k=16,page=4"):
        farspan.load_cache(llama, saved, tokenizer=smollm2[1])
    with pytest.raises(FarspanError, match="not patched"):
        farspan.load_cache(llama, saved)


def test_another_calibration(tmp_path: Path) -> None:
    model, ids, spec = shared("llama"), prompt(1, 40), "double_sparsity:k=16,group_factor=4,dense_layers=0"
    with farspan.patch(model, spec, recipe=recipe("llama", "qk")):
        farspan.save_cache(model, hf.fill(model, ids, torch.ones_like(ids)), ids, tmp_path)
    said = refusal(model, tmp_path, spec, recipe=recipe("llama", "k"))
    assert "another calibration or training of the method" in said


# --- what is in the folder ---------------------------------------------------------------------------------


def test_a_folder_without_a_whole_cache(saved: Path, tmp_path: Path) -> None:
    llama = shared("llama")
    assert "There is no saved cache" in refusal(llama, tmp_path / "nowhere")
    layer = next(saved.glob("layer-001-*"))
    content = layer.read_bytes()
    layer.write_bytes(content[:-1])
    assert f"{layer.name} is missing or has another size" in refusal(llama, saved)
    layer.unlink()
    assert "is missing" in refusal(llama, saved)
    layer.write_bytes(bytes(len(content)))
    assert "cannot be read" in refusal(llama, saved)
    layer.write_bytes(content)
    index = saved / "cache.json"
    about = json.loads(index.read_text())
    for text in ("", "[]", "{}", json.dumps({**about, "files": 3})):
        index.write_text(text)
        assert "cannot be read" in refusal(llama, saved)
    index.write_text(json.dumps({**about, "format": 99}))
    assert "has format 99" in refusal(llama, saved)


def test_a_full_disk_keeps_the_cache_that_was_there(saved: Path) -> None:
    model, ids = shared("llama"), prompt(1, 3000, seed=3)
    before = sorted(file.name for file in saved.iterdir())
    with farspan.patch(model, "quest:k=16,page=4"):
        cache = hf.fill(model, ids[:, :500], torch.ones_like(ids[:, :500]))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(FarspanError, match=r"could not be written to .*: give a folder"):
                farspan.save_cache(model, cache, ids, saved)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert sorted(file.name for file in saved.iterdir()) == before
        assert farspan.load_cache(model, saved).tokens.shape == (1, 40)
        blocked = saved / "cache.json" / "below"
        with pytest.raises(FarspanError, match="could not be written"):
            farspan.save_cache(model, cache, ids, blocked)


KILLED = """
import sys, os, signal, torch
sys.path.insert(0, {here!r})
from small_models import make, prompt
import farspan, safetensors.torch
from farspan.runtime import hf
model, ids, write = make("llama"), prompt(1, 60), safetensors.torch.save_file
def slow(tensors, file):
    write(tensors, file)
    if "layer-001" in str(file):
        os.kill(os.getpid(), signal.SIGKILL)
safetensors.torch.save_file = slow
with farspan.patch(model, "quest:k=16,page=4"):
    farspan.save_cache(model, hf.fill(model, ids, torch.ones_like(ids)), ids, {folder!r})
"""


@pytest.mark.parametrize("there", [False, True], ids=["a new folder", "over a cache"])
def test_a_save_that_is_killed(there: bool, saved: Path, tmp_path: Path) -> None:
    """It leaves what was there before, and the next save clears its files away."""
    folder = saved if there else tmp_path / "new"
    code = KILLED.format(here=str(Path(__file__).parent), folder=str(folder))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    left = sorted(file.name for file in folder.iterdir())
    assert len([name for name in left if name.startswith("layer-001")]) == 1 + there
    model, ids = shared("llama"), prompt(1, 40)
    if there:
        with farspan.patch(model, "quest:k=16,page=4"):
            assert farspan.load_cache(model, folder).tokens.shape == (1, 40)
    else:
        assert "There is no saved cache" in refusal(model, folder)
    with farspan.patch(model, "quest:k=16,page=4"):
        farspan.save_cache(model, hf.fill(model, ids, torch.ones_like(ids)), ids, folder)
        assert torch.equal(farspan.load_cache(model, folder).tokens, ids)
    assert len(list(folder.iterdir())) == 1 + 1 + 3  # the index, the tokens, three layers


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model, ids = shared("llama"), prompt(1, 40)
    with torch.no_grad():
        plain = hf.returned_cache(model(ids, use_cache=True))
    with farspan.patch(model):
        cache = hf.fill(model, ids, torch.ones_like(ids))
        with pytest.raises(FarspanError, match="holds 40 tokens, and 39 were given"):
            farspan.save_cache(model, cache, ids[:, :39], tmp_path)
        with pytest.raises(FarspanError, match="not filled by a patched model"):
            farspan.save_cache(model, plain, ids, tmp_path)
    with pytest.raises(FarspanError, match="not patched"):
        farspan.save_cache(model, cache, ids, tmp_path)
