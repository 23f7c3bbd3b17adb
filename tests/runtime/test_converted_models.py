"""Converted models: saved and loaded by transformers' own functions, generated with, patched, and refused
without farspan."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import farspan
from farspan import FarspanError, Unsupported
from farspan.attention.hybrid import Geometry, mixers, parse_mixer
from farspan.attention.hybrid.mixer import Mixer
from farspan.parallel.planner.cost import memory
from farspan.parallel.planner.device import DEVICES
from farspan.parallel.planner.job import Job
from farspan.runtime import hf
from farspan.runtime.hf.config import read_shape

from . import toy_mixer  # noqa: F401  (registers the mixer)
from .small_models import COMMON, Feed, close, decode, logits, make, padded, prompt, snapshot

SPEC = "toy:bound=0.5"
# by architecture, the layers that are replaced: full attention, at least one of which stays
LAYERS = {"llama": (0, 2), "qwen2": (1,), "qwen3": (0, 1), "phi3": (0,), "qwen3_moe": (2,), "gemma3": (3,)}


def convert(model: Any, layers: tuple[int, ...], folder: Path) -> dict[int, Mixer]:
    """Save the model with mixers that start from its attention. Returns the mixers."""
    info, made = hf.inspect_model(model), {}
    for index in layers:
        made[index] = parse_mixer(SPEC, hf.geometry_of(info, index))
        made[index].initialise_from(hf.attention_weights(info, index))
    hf.save_converted(info, made, SPEC, folder)
    return made


def load(folder: Path) -> Any:
    config = hf.read_config(folder)
    return hf.class_of_config(config).from_pretrained(folder, config=config).eval()


@pytest.fixture(params=list(LAYERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_folder_loads_generates_and_takes_patches(name: str, tmp_path: Path) -> None:
    """Logits are those of the model in which the same mixers stand in for attention; rows of a padded batch
    are the rows alone; a patch works on the layers that are left, and leaves nothing behind."""
    original = make(name)
    before = snapshot(original)
    made = convert(original, LAYERS[name], tmp_path)
    assert snapshot(original) == before
    model, ids, inputs = load(tmp_path), prompt(1, 40), padded((25, 18))
    undo = hf.stand_in(hf.inspect_model(original), made)
    want = logits(original, ids, use_cache=False)
    for step in reversed(undo):
        step()
    assert snapshot(original) == before and not torch.allclose(logits(original, ids), want)
    assert torch.equal(logits(model, ids, use_cache=False), want)
    info = hf.inspect_model(model)
    assert [i for i, kind in enumerate(info.kinds) if kind == "linear_attention"] == list(LAYERS[name])

    tokens = decode(model, inputs, new=8)
    for row, length in enumerate((25, 18)):
        alone = inputs["input_ids"][row : row + 1, -length:]
        assert torch.equal(decode(model, alone, new=8)[0], tokens[row])
    beams = decode(model, inputs, new=6, num_beams=3)
    assert torch.equal(beams, decode(model, inputs, new=6, num_beams=3, use_cache=False))
    drawn = []
    for cached in (True, False):
        torch.manual_seed(3)
        drawn.append(decode(model, inputs, new=6, do_sample=True, use_cache=cached))
    assert torch.equal(*drawn)
    feed = Feed(model, ids, torch.ones_like(ids))
    parts = torch.cat([feed(21), feed(1), feed(18)], 1)
    assert torch.allclose(parts, logits(model, ids), atol=1e-4)

    attends = [i for i in info.attention if info.kinds[i] == "full_attention"]
    if attends:
        state, state_dict = snapshot(model), list(model.state_dict())
        with farspan.patch(model, "quest:k=16,page=8,dense_layers=0", prefill_chunk=20) as patched:
            decode(model, inputs, new=8)
            report = patched.report()
        assert [layer.layer for layer in report.layers] == attends
        assert report.summary["decode_density"] < 1
        assert all(report.untouched[i] == "the model's own mixer toy" for i in LAYERS[name])
        assert snapshot(model) == state and list(model.state_dict()) == state_dict
        assert torch.equal(decode(model, inputs, new=8), tokens)
        with farspan.patch(model, "dense"):
            assert torch.equal(decode(model, inputs, new=8), tokens)


def test_copies_pickles_saves_again_and_half_precision(tmp_path: Path) -> None:
    convert(make("llama"), (0, 2), tmp_path / "a")
    model, ids = load(tmp_path / "a"), prompt(1, 30)
    want = logits(model, ids)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.layers[0].self_attn.gain.zero_()
    assert torch.equal(logits(model, ids), want) and not torch.equal(logits(copied, ids), want)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), ids), want)
    model.save_pretrained(tmp_path / "b")
    names = ("config.json", "model.safetensors", "generation_config.json")
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    half = type(model).from_pretrained(tmp_path / "b", config=model.config, dtype=torch.bfloat16)
    assert half.model.layers[0].self_attn.decay.tolist() == pytest.approx([-0.1, -0.2, -0.3, -0.4], rel=1e-2)
    assert (logits(half, ids).float() - want).abs().max() < 0.1 * want.abs().max()


def test_every_mixer_is_saved_and_loaded(tmp_path: Path) -> None:
    """With each registered mixer: the logits are those of the mixer that was saved, and steps with a cache
    those of the whole text."""
    original, ids = make("llama"), prompt(1, 70)
    info = hf.inspect_model(original)
    for spec in mixers():
        torch.manual_seed(0)
        mixer = parse_mixer(spec, hf.geometry_of(info, 1))
        mixer.initialise_from(hf.attention_weights(info, 1))
        hf.save_converted(info, {1: mixer}, spec, tmp_path / spec)
        undo = hf.stand_in(info, {1: mixer})
        want = logits(original, ids, use_cache=False)
        for step in reversed(undo):
            step()
        model = load(tmp_path / spec)
        assert torch.equal(logits(model, ids, use_cache=False), want), spec
        feed = Feed(model, ids, torch.ones_like(ids))
        parts = torch.cat([feed(66), feed(1), feed(3)], 1)
        assert (parts - want).abs().max() <= 2e-4 * want.abs().max(), spec


def test_gradients_reach_a_loaded_mixer(tmp_path: Path) -> None:
    convert(make("llama"), (1,), tmp_path)
    model = load(tmp_path).train()
    model(prompt(1, 20), labels=prompt(1, 20)).loss.backward()
    mixer = model.model.layers[1].self_attn
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in mixer.parameters())


def test_the_cache_is_not_cropped(tmp_path: Path) -> None:
    convert(make("llama"), (0,), tmp_path)
    model = load(tmp_path)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        decode(model, prompt(1, 20), prompt_lookup_num_tokens=4)
    feed = Feed(model, prompt(1, 20), torch.ones(1, 20, dtype=torch.long))
    feed(20)
    with pytest.raises(FarspanError, match="state of a mixer cannot be cropped"):
        feed.cache.crop(-2)
    with pytest.raises(FarspanError, match="takes a 2-D attention mask"):
        model(prompt(1, 4), attention_mask=torch.ones(1, 1, 4, 4))


def test_without_farspan_a_folder_is_refused(tmp_path: Path) -> None:
    """transformers in a process that cannot import farspan names it, by the Auto classes and by the class of
    the original."""
    convert(make("llama"), (0, 2), tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["model_type"] == "farspan_llama" and about["architectures"] == ["FarspanLlamaForCausalLM"]
    assert about["farspan_mixers"] == [SPEC, None, SPEC]
    code = (
        "import sys; sys.modules['farspan'] = None; sys.path = [p for p in sys.path if p]\n"
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
        "for kind in (AutoModelForCausalLM, LlamaForCausalLM):\n"
        f"    try: kind.from_pretrained({str(tmp_path)!r}); print('loaded')\n"
        "    except Exception as error: print(repr(str(error)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    first, second = done.stdout.splitlines()
    assert "has model type `farspan_llama` but Transformers does not recognize" in first
    assert "layer_types" in second and "farspan_linear_attention" in second


def tiny(family: str, **settings: Any) -> Any:
    """A random model of a family that ``make`` does not know, with 4 layers."""
    config = getattr(transformers, f"{family}Config")(**{**COMMON, "num_hidden_layers": 4, **settings})
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def test_layers_without_rope(tmp_path: Path) -> None:
    """SmolLM3 has no RoPE in every fourth layer. There a mixer with an exact window that covers everything
    is the attention, and not elsewhere; in place, under a patch, and reloaded."""
    model, ids, spec = tiny("SmolLM3"), prompt(1, 30), "gated_linear:window=32"
    info, want = hf.inspect_model(model), logits(model, ids)
    made = {i: parse_mixer(spec, hf.geometry_of(info, i)) for i in (2, 3)}
    for i, mixer in made.items():
        mixer.initialise_from(hf.attention_weights(info, i))
    hf.save_converted(info, made, spec, tmp_path)
    assert close(logits(load(tmp_path), ids), want)
    with farspan.patch(model, mixers=made):
        assert close(logits(model, ids), want)


def test_layer_types_under_another_name(tmp_path: Path) -> None:
    """Nemotron-H saves them as layers_block_type."""
    model = make("nemotron_h")
    convert(model, (3,), tmp_path)
    kinds = json.loads((tmp_path / "config.json").read_text())["layers_block_type"]
    assert kinds == ["linear_attention", "full_attention", "mlp", "farspan_linear_attention"]
    assert load(tmp_path).config.layers_block_type == model.config.layers_block_type


def test_the_plan_counts_states_that_grow(tmp_path: Path) -> None:
    """Sigmoid attention keeps keys and values as attention does, in the dtype of the model: its state after
    1,000 tokens has the size of the cache that it replaces, and the counts of tokens."""
    info = hf.inspect_model(make("llama"))
    hf.save_converted(info, {1: parse_mixer("sigmoid", hf.geometry_of(info, 1))}, "sigmoid", tmp_path)
    for dtype, size in (("auto", 4), ("bfloat16", 2)):
        shape = read_shape(tmp_path, dtype)
        assert shape.mixer_growth == shape.mixer_kv == 2 * 2 * 16 * size
        device = DEVICES["H100"]
        job = Job(model=shape, device=device, length=1000, gpus=1, memory=device.memory, weights=0)
        assert memory(job)[0]["states"] == 1000 * shape.mixer_kv + shape.mixer_states


def test_geometry_and_weights_of_attention() -> None:
    """A mixer that is plain causal attention by the weights computes what the model's attention does."""
    for name, index in (("phi3", 0), ("qwen3", 1), ("gemma3", 1), ("qwen2", 2)):
        model = make(name)
        info = hf.inspect_model(model)
        g, w = hf.geometry_of(info, index), hf.attention_weights(info, index)
        seen: list[Any] = []
        hook = info.attention[index].register_forward_hook(
            lambda m, args, kwargs, out, seen=seen: seen.append((kwargs, out[0])), with_kwargs=True
        )
        logits(model, prompt(1, 15), use_cache=False)
        hook.remove()
        [(kwargs, want)] = seen
        assert torch.allclose(attention(g, w, kwargs), want, atol=1e-5), name
    assert g == Geometry(
        hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, bias=True, scale=0.25, eps=1e-6
    )


def attention(g: Geometry, w: dict[str, Any], kwargs: Any) -> torch.Tensor:
    x, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]

    def heads(name: str) -> torch.Tensor:
        y = torch.nn.functional.linear(x, w[f"{name}_proj.weight"], w.get(f"{name}_proj.bias"))
        y = y.view(1, x.shape[1], -1, g.head_dim).transpose(1, 2)
        if name == "v":
            return y
        if g.qk_norm:
            y = y * (y.square().mean(-1, keepdim=True) + g.eps).rsqrt() * w[f"{name}_norm.weight"]
        a, b = y.chunk(2, -1)
        return y * cos + torch.cat([-b, a], -1) * sin

    q, k, v = heads("q"), heads("k"), heads("v")
    k, v = (y.repeat_interleave(g.num_heads // g.num_kv_heads, 1) for y in (k, v))
    scores = (q @ k.transpose(2, 3) * g.softmax_scale).masked_fill(
        ~torch.ones(x.shape[1], x.shape[1]).tril().bool(), -torch.inf
    )
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return torch.nn.functional.linear(out, w["o_proj.weight"], w.get("o_proj.bias"))


def test_what_cannot_be_converted() -> None:
    info = hf.inspect_model(make("olmo2"))
    with pytest.raises(Unsupported, match="its q_norm is not one over the numbers of a head"):
        hf.geometry_of(info, 0)
    info = hf.inspect_model(make("gpt_oss"))  # cos and sin of half the numbers that are rotated
    with pytest.raises(Unsupported, match=r"its sinks would be lost.*; its RoPE is not that of Llama"):
        hf.geometry_of(info, 1)
    for family in ("Cohere", "Glm"):  # neighbours are rotated
        with pytest.raises(Unsupported, match="its RoPE is not that of Llama"):
            hf.geometry_of(hf.inspect_model(tiny(family)), 0)
    with pytest.raises(Unsupported, match="it applies RoPE only under a condition"):
        hf.geometry_of(hf.inspect_model(tiny("Exaone4")), 3)
    info = hf.inspect_model(make("qwen3_next"))
    with pytest.raises(Unsupported, match="its q_proj has 128 outputs, not 4 heads of 16"):
        hf.geometry_of(info, 1)
    with pytest.raises(Unsupported, match=r"its layers \[0\] have no full attention"):
        hf.converted_config(hf.inspect_model(make("gemma3")), {0: SPEC})
