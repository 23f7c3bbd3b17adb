"""Calibration against a computation by hand, and a recipe's way through a file."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from small_models import close, decode, logits, make, padded, prompt, recipe, shared, snapshot, tokens

import farspan
from farspan import FarspanError, Recipe
from farspan.runtime import hf

TOKENS, PIECE = 96, 64  # as in small_models.recipe: two windows, the second one short


def rotate(x, cos, sin):
    """RoPE of x [B, H, T, D], written out: pairs of channel i and i + D / 2."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def by_hand(model, ids, by):
    """Rankings [Hkv, D] per layer of a Llama, from its weights alone."""
    c = model.config
    heads, kv, d, base = (
        c.num_attention_heads,
        c.num_key_value_heads,
        c.head_dim,
        c.rope_parameters["rope_theta"],
    )
    norm = lambda x, w: w * x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt()  # noqa: E731
    sums = [[torch.zeros(heads, d).double(), torch.zeros(kv, d).double()] for _ in model.model.layers]
    for a in range(0, ids.shape[1], PIECE):
        x = model.model.embed_tokens(ids[:, a : a + PIECE])
        t = x.shape[1]
        angle = torch.arange(t)[:, None] * base ** (-torch.arange(0, d, 2) / d)
        for layer, total in zip(model.model.layers, sums, strict=True):
            h, s = norm(x, layer.input_layernorm.weight), layer.self_attn
            q, k, v = (p(h).view(1, t, -1, d).transpose(1, 2) for p in (s.q_proj, s.k_proj, s.v_proj))
            turned = rotate(q, angle.cos(), angle.sin()), rotate(k, angle.cos(), angle.sin())
            for place, seen in enumerate(turned if by == "qk" else (q, k)):
                total[place] += seen.double().abs().sum((0, 2))
            k, v = turned[1].repeat_interleave(heads // kv, 1), v.repeat_interleave(heads // kv, 1)
            score = turned[0] @ k.transpose(2, 3) / math.sqrt(d)
            score = score.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf)
            x = x + s.o_proj((score.softmax(-1) @ v).transpose(1, 2).reshape(1, t, -1))
            h, m = norm(x, layer.post_attention_layernorm.weight), layer.mlp
            x = x + m.down_proj(torch.nn.functional.silu(m.gate_proj(h)) * m.up_proj(h))
    ranked = []
    for q, k in sums:
        q = q.unflatten(0, (kv, -1)).sum(1)
        ranked.append({"q": q, "k": k, "qk": q * k}[by])
    return ranked


@pytest.mark.parametrize("by", ["q", "k", "qk"])
def test_rankings_are_those_computed_by_hand(by):
    model = shared("llama")
    with torch.no_grad():
        expected = by_hand(model, tokens("any")["input_ids"], by)
    made = recipe("llama", by)
    assert made.settings["by"] == by and made.settings["tokens"] == TOKENS
    for index, score in enumerate(expected):
        channels = made.tensors[f"layers.{index}.channels"]
        assert channels.dtype == torch.int32 and channels.shape == score.shape
        assert torch.equal(channels.sort(-1).values, torch.arange(16).int().expand(2, -1))
        taken = score.gather(1, channels.long())
        assert bool(
            (taken[:, 1:] <= taken[:, :-1] * (1 + 1e-5)).all()
        )  # best first, within rounding of a tie


def test_the_three_rankings_differ():
    made = [recipe("llama", by).tensors["layers.1.channels"] for by in ("q", "k", "qk")]
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    "name, rope",
    [
        ("phi3", None),
        ("phi3", PARTIAL),
        ("qwen3", None),
        ("qwen3", YARN),
        ("gemma3", None),
        ("gpt_oss", None),
    ],
)
def test_rope_is_undone_also_behind_norms_and_fused_projections(name, rope, monkeypatch):
    """The q and k that a family's own ``apply_rotary_pos_emb`` is given are the oracle."""
    import inspect

    model = make(name) if rope is None else make(name, rope_parameters=rope)
    module = inspect.getmodule(type(model.model.layers[0].self_attn))
    apply, given = module.apply_rotary_pos_emb, []

    def spy(q, k, cos, sin, *args, **kwargs):
        given.append((q, k))
        return apply(q, k, cos, sin, *args, **kwargs)

    monkeypatch.setattr(module, "apply_rotary_pos_emb", spy)
    with torch.no_grad():
        for a in (0, PIECE):
            model(tokens("any")["input_ids"][:, a : min(a + PIECE, TOKENS)], use_cache=False)
    monkeypatch.undo()
    layers = len(given) // 2
    made = {by: farspan.calibrate(model, tokens, "any", by=by, tokens=TOKENS, window=PIECE) for by in "qk"}
    for index in range(layers):
        for place, by in enumerate("qk"):
            score = sum(given[index + half * layers][place].double().abs().sum((0, 2)) for half in (0, 1))
            score = score.unflatten(0, (2, -1)).mean(1)
            taken = score.gather(1, made[by].tensors[f"layers.{index}.channels"].long())
            assert bool((taken[:, 1:] <= taken[:, :-1] * (1 + 1e-4)).all()), (by, index)


def test_calibrating_leaves_the_model_as_it_was():
    model = shared("qwen3")
    before, expected = snapshot(model), logits(model, prompt())
    done = []
    farspan.calibrate(model, tokens, "any", tokens=96, window=64, progress=lambda a, b: done.append((a, b)))
    assert done == [(64, 96), (96, 96)]
    assert snapshot(model) == before
    assert torch.equal(logits(model, prompt()), expected)


def test_a_recipe_saved_and_loaded_is_the_same(tmp_path):
    made = recipe("llama")
    path = made.save(tmp_path / "deep" / "recipe")
    assert sorted(p.name for p in path.iterdir()) == ["recipe.json", "recipe.safetensors"]
    loaded = Recipe.load(path)
    assert (loaded.method, loaded.geometry, loaded.settings) == (made.method, made.geometry, made.settings)
    assert loaded.tensors.keys() == made.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], x) for name, x in made.tensors.items())
    model, expected = shared("llama"), []
    for how in ({"recipe": made}, {"recipe": loaded}, {"recipe": path}, {"recipe": str(path)}):
        with farspan.patch(model, "double_sparsity:k=16,dense_layers=0", **how):
            expected.append(decode(model, padded()))
    other = Recipe(method="sale", geometry=made.geometry, settings={}, tensors={})
    for recipe_of_others in (None, other):  # a method's own comes first, so that two may need one each
        with farspan.patch(
            model, f"double_sparsity:k=16,dense_layers=0,recipe={path}", recipe=recipe_of_others
        ):
            expected.append(decode(model, padded()))
    assert all(torch.equal(one, expected[0]) for one in expected)


def test_a_recipe_written_anew_is_read_anew(tmp_path):
    path = recipe("llama", "q").save(tmp_path)
    first = Recipe.load(path)
    recipe("llama", "k").save(tmp_path)
    again = Recipe.load(path)
    assert first.settings["by"] == "q" and again.settings["by"] == "k"
    assert torch.equal(again.tensors["layers.1.channels"], recipe("llama", "k").tensors["layers.1.channels"])


def test_the_calibrated_channels_choose_the_keys(monkeypatch):
    """A decode step's selection by brute force: the best k keys by the first D / 4 ranked channels alone."""
    from farspan.attention.sparse.double_sparsity import DoubleSparsity

    model, made, chosen = shared("llama"), recipe("llama"), []
    select = DoubleSparsity.select_decode

    def spy(self, q, keys):
        index = select(self, q, keys)
        chosen.append((q.clone(), keys.kv.k.clone(), index))
        return index

    monkeypatch.setattr(DoubleSparsity, "select_decode", spy)
    with farspan.patch(
        model, "double_sparsity:k=8,group_factor=4,dense_layers=1,gqa_reduce=none", recipe=made
    ):
        decode(model, prompt(1, 40), 2)
    assert len(chosen) == 2  # layers 1 and 2; layer 0 stays dense
    for layer, (q, k, index) in zip((1, 2), chosen, strict=True):
        for head in range(4):
            best = made.tensors[f"layers.{layer}.channels"][head // 2, :4].long()
            score = (q[0, head, 0, best] * k[0, head // 2][:, best]).sum(-1)
            expected = score.topk(8).indices.sort().values
            assert torch.equal(index.tokens[0, head, 0].sort().values, expected)


def test_layers_that_stay_dense_say_so():
    model = shared("llama")
    with farspan.patch(model, "double_sparsity:k=8,dense_layers=2", recipe=recipe("llama")) as patched:
        decode(model, prompt(1, 40), 4)
    densities = [layer.phases["decode"].density for layer in patched.report().layers]
    assert densities[:2] == [1.0, 1.0] and densities[2] < 0.3
    reason = "double_sparsity leaves this layer dense"
    told = [
        {phase: part.fallbacks for phase, part in layer.phases.items()} for layer in patched.report().layers
    ]
    assert all(layer["prefill"] == {} for layer in told), "prefill is dense by choice"
    assert [set(layer["decode"]) for layer in told] == [{reason}, {reason}, set()]
    with farspan.patch(model, "double_sparsity:k=4096,dense_layers=0", recipe=recipe("llama")):
        assert close(logits(model, prompt()), logits(make("llama"), prompt()))


TRAINED = [
    "chunkllm:boundary_layer=0",
    "dhsa:boundaries=learned",
    "duo",
    "dynamic_mask",
    "routing:centroids=learned",
    "seer",
    "seer_decode",
]


def begun(spec, seed=0):
    """A recipe of the weights that the training of a method begins with, on a small Llama."""
    torch.manual_seed(seed)
    method, info = farspan.parse_method(spec), hf.inspect_model(shared("llama"))
    modules = {i: method.for_training(info.layer_info(i)).module for i in info.attention}
    return Recipe.of_modules(method, modules, info.geometry, {})


@pytest.mark.parametrize("spec", TRAINED)
def test_a_trained_method_names_a_recipe_of_its_own(tmp_path, spec):
    """In its spec, and errors say so. Without one, its text is that of recipes made before."""
    method, model = farspan.parse_method(spec), shared("llama")
    assert str(method) == spec and "recipe" not in method.trained_with
    path = begun(spec, 1).save(tmp_path / "own")
    own = f"{spec}{',' if ':' in spec else ':'}recipe={path}"
    assert str(farspan.parse_method(own)).endswith(f"recipe={path}")
    with farspan.patch(model, spec, recipe=path):
        one = decode(model, prompt(2, 90), new=4)
    with farspan.patch(model, own):
        assert torch.equal(decode(model, prompt(2, 90), new=4), one)
    thin = dataclasses.replace(begun(spec), tensors={})
    for given in (None, thin):
        with pytest.raises(FarspanError, match=f"recipe=PATH, or '{method.name}:recipe=PATH'"):
            farspan.patch(model, method, recipe=given)


def test_every_trained_method_is_among_these():
    found = {name for name, cls in farspan.methods().items() if cls().trains}
    assert found <= {spec.partition(":")[0] for spec in TRAINED}


def test_two_trained_methods_name_a_recipe_each(tmp_path):
    paths = [begun(spec).save(tmp_path / spec) for spec in ("dynamic_mask", "seer_decode")]
    both = " + ".join(f"{path.name}:recipe={path}" for path in paths)
    with farspan.patch(shared("llama"), both.replace("dynamic_mask:", "dynamic_mask:w=70,")) as patched:
        decode(shared("llama"), prompt(2, 200), new=2)
        assert str(patched.report()).count("dynamic_mask") and str(patched.report()).count("seer_decode")
    with pytest.raises(FarspanError, match="dynamic_mask:recipe=PATH \\+ seer_decode:recipe=PATH"):
        farspan.patch(shared("llama"), "dynamic_mask + seer_decode", recipe=paths[0])


def test_the_command_that_makes_a_recipe_names_the_spec_without_a_recipe() -> None:
    for spec in ("seer:fraction=0.1", "dhsa:boundaries=learned", "seer_decode:block=16"):
        assert farspan.parse_method(f"{spec},recipe=/nope").recipe_maker == f"'farspan train {spec}'"
