"""Bad input ends in one sentence that names what was given, and changes nothing."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from small_models import PAD, close, decode, logits, make, prompt, recipe, shared, snapshot

import farspan
from farspan import FarspanError, Recipe, SpecError, Unsupported
from farspan.attention.sparse.double_sparsity import DoubleSparsity
from farspan.attention.sparse.quest import Quest
from farspan.runtime import hf


def refused(kind, do, *says, model=None):
    """``do(model)`` raises ``kind``, one sentence that each of ``says`` matches, and changes nothing."""
    model = shared("llama") if model is None else model
    before = snapshot(model)
    with pytest.raises(kind) as error:
        done = do(model)
        if isinstance(done, farspan.Patched):  # wrongly taken: leave the model as it was for the next test
            done.remove()
    text = str(error.value)
    assert "\n" not in text and text.endswith("."), text
    for pattern in says:
        assert re.search(pattern, text), (pattern, text)
    assert snapshot(model) == before
    return text


# --- specs ------------------------------------------------------------------------------------------------

SPECS = {
    "recyled:k=512": ["no method 'recyled'", "did you mean 'recycled'"],
    "double-sparsity": ["no method 'double-sparsity'", "did you mean 'double_sparsity'"],
    "Dense": ["no method 'Dense'", "did you mean 'dense'"],
    "nonsense": ["no method 'nonsense'", "the methods are .*dense.*quest.*window"],
    "": ["no method ''", "the methods are"],
    "recycled:strid=10": ["recycled has no parameter 'strid'", "did you mean 'stride'", "it takes k, stride"],
    "recycled:512": ["recycled has no parameter '512'", "it takes k, stride"],
    "quest:budget=3": ["quest has no parameter 'budget'", "it takes k"],
    "dense:k=3": ["dense has no parameter 'k'", "it takes none"],
    "double_sparsity:channels=3": ["no parameter 'channels'"],
    "quest:k=0": ["quest takes k .*at least 1", "got 0"],
    "quest:k=-5": ["quest takes k .*at least 1", "got -5"],
    "quest:k=many": ["quest takes a whole number for k", "got 'many'"],
    "quest:k=12.5": ["quest takes a whole number for k", "got '12.5'"],
    "quest:k=nan": ["a whole number for k", "got 'nan'"],
    "quest:k=": ["quest needs a value for k", "got 'k='"],
    "quest:k": ["quest needs a value for k"],
    "quest:k=none": ["k=TOKENS or fraction=SHARE", "got neither"],
    "quest:k=16,fraction=0.5": ["k=TOKENS or fraction=SHARE", "got both"],
    "quest:k=none,fraction=1.5": ["fraction from .* to 1", "got 1.5"],
    "quest:k=none,fraction=nan": ["fraction from", "got nan"],
    "quest:k=4,k=5": ["parameter k twice"],
    "quest:page=0": ["page .*at least 1", "got 0"],
    "window:w=0": ["window takes w .*at least 1", "got 0"],
    "window:sinks=-1": ["window takes sinks .*at least 0", "got -1"],
    "recycled:stride=0": ["stride .*at least 1"],
    "recycled:dynamic=perhaps": ["true or false for dynamic", "got 'perhaps'"],
    "recycled:s=2": ["recycled takes s from -1.0 to 1.0", "got 2.0"],
    "quest:share=sum": ["no parameter 'share'", "called 'gqa_reduce' now"],
    "recycled:gqa_reduce=mean": ["gqa_reduce = sum or max", "got 'mean'"],
    "block_topk:block=0": ["block .*at least 1"],
    "dense + dense + dense": ["one prefill and one decode"],
    "quest + dense": ["quest has no prefill", "it serves decode"],
    "dense + block_topk": ["block_topk has no decode", "it serves prefill"],
    "dense + ": ["no method ''"],
    "act:first=9,last=8": ["act takes last a whole number, at least 9", "got 8"],
    "act:over=(sale": ["parenthesis of over=\\(sale in act is not closed"],
    "act:over=(sale:block_q=64,beta=0.5": ["parenthesis of over=\\(sale:block_q=64 in act is not closed"],
}


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_that_cannot_be_read(spec):
    refused(SpecError, lambda model: farspan.patch(model, spec), *SPECS[spec])
    if " + " not in spec:
        with pytest.raises(SpecError):
            farspan.parse_method(spec)


@pytest.mark.parametrize("spec", [3, b"dense", ["dense"], Quest])
def test_a_spec_that_is_no_spec(spec):
    refused(SpecError, lambda model: farspan.patch(model, spec), "A method is a string", "got ")


@pytest.mark.parametrize("k", [0, -1, "16", None, True, float("nan"), float("inf"), 12.5])
def test_a_method_object_checks_its_numbers(k):
    refused(SpecError, lambda _: Quest(k=k), "quest takes", "got ")


def test_specs_given_twice_or_in_the_wrong_phase():
    refused(
        SpecError, lambda m: farspan.patch(m, "dense", decode="quest"), "one spec for both phases, or prefill"
    )
    refused(SpecError, lambda m: farspan.patch(m, prefill="quest"), "quest has no prefill")
    refused(SpecError, lambda m: farspan.patch(m, decode="block_topk"), "block_topk has no decode")


@pytest.mark.parametrize(
    "layers", [{3: "dense"}, {-4: "dense"}, {"0": "dense"}, {0.0: "dense"}, {True: "dense"}, {None: "dense"}]
)
def test_layers_that_the_model_has_not(layers):
    given = re.escape(repr(next(iter(layers))))
    refused(SpecError, lambda m: farspan.patch(m, layers=layers), "from 0 to 2", f"got {given}")


def test_a_bad_spec_for_one_layer():
    refused(SpecError, lambda m: farspan.patch(m, "dense", layers={1: "quezt"}), "did you mean 'quest'")


@pytest.mark.parametrize("chunk", [0, -3, "512", 12.5, True])
def test_a_chunk_that_is_no_number_of_tokens(chunk):
    given = re.escape(repr(chunk))
    refused(FarspanError, lambda m: farspan.patch(m, prefill_chunk=chunk), "number of tokens", f"got {given}")


# --- recipes ----------------------------------------------------------------------------------------------


def test_hidden_states_of_a_layer_that_the_model_has_not():
    method = farspan.parse_method("chunkllm:boundary_layer=9")
    made = Recipe.of_modules(method, {}, hf.inspect_model(shared("llama")).geometry, {})
    refused(FarspanError, lambda m: farspan.patch(m, method, recipe=made), "at most 2 .* 3 layers; got 9")


def test_a_method_that_needs_calibration_without_a_recipe(tmp_path):
    ask = ["double_sparsity needs a recipe", "farspan calibrate", "recipe="]
    refused(FarspanError, lambda m: farspan.patch(m, "double_sparsity:k=16"), *ask)
    refused(FarspanError, lambda m: farspan.patch(m, layers={2: DoubleSparsity(k=16)}), *ask)
    missing = tmp_path / "none"
    says = [f"no recipe at {missing}", "farspan calibrate"]
    refused(FarspanError, lambda m: farspan.patch(m, f"double_sparsity:recipe={missing}"), *says)
    refused(FarspanError, lambda m: farspan.patch(m, "double_sparsity", recipe=missing), *says)


def test_a_recipe_for_another_model_or_method(tmp_path):
    right = recipe("llama")
    says = ["made for another model", r"model_type llama \(the model has qwen3\)"]
    refused(
        FarspanError,
        lambda m: farspan.patch(m, "double_sparsity", recipe=right),
        *says,
        model=shared("qwen3"),
    )
    path = right.save(tmp_path / "recipe")
    wide = make("llama", num_key_value_heads=4)
    for given in (right, path, str(path)):
        says = ["made for another model", r"num_kv_heads 2 \(the model has 4\)"]
        refused(
            FarspanError, lambda m, r=given: farspan.patch(m, "double_sparsity", recipe=r), *says, model=wide
        )
    deep = make("llama", num_hidden_layers=5)
    spec = f"double_sparsity:k=16,recipe={path}"
    refused(FarspanError, lambda m: farspan.patch(m, spec), r"num_layers 3 \(the model has 5\)", model=deep)
    other = dataclasses.replace(right, method="seer")
    says = ["recipe is for seer, not for double_sparsity"]
    refused(FarspanError, lambda m: farspan.patch(m, "double_sparsity", recipe=other), *says)


def test_a_recipe_for_several_methods_or_for_none():
    says = [
        "sale and double_sparsity need one each",
        "as 'sale:recipe=PATH \\+ double_sparsity:recipe=PATH'",
    ]
    for given in ("/nope", recipe("llama")):
        refused(FarspanError, lambda m, r=given: farspan.patch(m, "sale + double_sparsity", recipe=r), *says)
        refused(
            FarspanError, lambda m, r=given: farspan.patch(m, "pbs", recipe=r), r"no method needs one \(pbs\)"
        )
    layers = {0: "sale", 1: "act"}
    says = ["sale and act need one each", "as 'sale:recipe=PATH' and 'act:recipe=PATH'"]
    refused(FarspanError, lambda m: farspan.patch(m, layers=layers, recipe="/nope"), *says)
    spec = "act:heads=all,over=(sale)"
    says = ["sale needs a recipe", r"pass 'act:over=\(sale:recipe=PATH\)'"]
    refused(FarspanError, lambda m: farspan.patch(m, spec), *says)


def test_strict_refuses_a_method_that_no_layer_runs():
    says = ["No layer of this model runs quest:k=16,dense_layers=3", "strict=True"]
    refused(FarspanError, lambda m: farspan.patch(m, "quest:k=16,dense_layers=3", strict=True), *says)
    layers = {0: "quest:k=16"}
    refused(FarspanError, lambda m: farspan.patch(m, layers=layers, strict=True), "runs quest:k=16,")
    for spec, how in (("quest:k=16,dense_layers=2", {"strict": True}), ("quest:k=16,dense_layers=3", {})):
        farspan.patch(shared("llama"), spec, **how).remove()


def test_a_recipe_with_the_wrong_tensors():
    right = recipe("llama")
    short = dataclasses.replace(
        right, tensors={k: v for k, v in right.tensors.items() if "layers.2" not in k}
    )
    spec = "double_sparsity:k=16,dense_layers=0"
    refused(
        FarspanError,
        lambda m: farspan.patch(m, spec, recipe=short),
        "channels of layer 2",
        "farspan calibrate",
    )
    thin = dataclasses.replace(right, tensors={k: v[:1] for k, v in right.tensors.items()})
    says = [r"channels of the sizes \[1, 16\] in layer 0", r"\[2, 16\]", "another model"]
    refused(FarspanError, lambda m: farspan.patch(m, spec, recipe=thin), *says)


def test_a_recipe_that_cannot_be_read(tmp_path):
    for name, about in (("text", "not json"), ("old", '{"format": 0}'), ("odd", "[]")):
        path = recipe("llama").save(tmp_path / name)
        (path / "recipe.json").write_text(about)
        says = [f"recipe at {path}", "format 0" if name == "old" else "cannot be read"]
        refused(FarspanError, lambda m, p=path: farspan.patch(m, "double_sparsity", recipe=p), *says)
    path = recipe("llama").save(tmp_path / "torn")
    (path / "recipe.safetensors").write_bytes(b"half")
    refused(
        FarspanError, lambda m: farspan.patch(m, "double_sparsity", recipe=path), f"{path} cannot be read"
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(FarspanError, match=f"could not be written to {tmp_path}/file/recipe"):
        recipe("llama").save(tmp_path / "file" / "recipe")


# --- models -----------------------------------------------------------------------------------------------


def test_a_model_with_no_attention_that_is_served():
    says = ["cannot run quest:k=16 on MistralForCausalLM", "the model's own sliding window"]
    refused(Unsupported, lambda m: farspan.patch(m, "quest:k=16"), *says, model=shared("mistral"))


def test_patching_twice_and_removing_twice():
    model = make("llama")
    before = snapshot(model)
    patched = farspan.patch(model, "quest:k=16")
    tokens = decode(model, prompt())
    for spec in ("quest:k=16", "dense"):
        refused(
            FarspanError, lambda m, s=spec: farspan.patch(m, s), "patched already", r"remove\(\)", model=model
        )
    refused(FarspanError, lambda m: farspan.patch(m.model), "patched already", model=model)
    assert torch.equal(decode(model, prompt()), tokens)
    patched.remove()
    assert snapshot(model) == before
    refused(FarspanError, lambda _: patched.remove(), "removed already", model=model)
    with farspan.patch(model, "dense") as again:
        again.remove()  # leaving the block is no second removal
    assert snapshot(model) == before
    assert patched.report().summary["decode_density"] is not None  # the report outlives the patch


# --- masks ------------------------------------------------------------------------------------------------

ONES = torch.ones(2, 40, dtype=torch.long)


def zeros_at(*places):
    mask = ONES.clone()
    for row, start, end in places:
        mask[row, start:end] = 0
    return mask


MASKS = {
    "4-D": (torch.zeros(2, 1, 40, 40), ["2-D attention mask", "got a 4-D one"]),
    "3-D": (torch.ones(2, 40, 40), ["2-D attention mask", "got a 3-D one"]),
    "1-D": (torch.ones(40), ["2-D attention mask", "got a 1-D one"]),
    "too short": (
        ONES[:, :39],
        [r"is \[2, 39\] where \[2, 40\] is needed", "0 cached and 40 new tokens in 2 rows"],
    ),
    "too long": (torch.ones(2, 41), [r"is \[2, 41\] where \[2, 40\]"]),
    "one row": (ONES[:1], [r"is \[1, 40\] where \[2, 40\]"]),
    "a hole": (zeros_at((0, 3, 5)), ["zeros between ones in row 0", "padding on the left"]),
    "holes and padding": (zeros_at((1, 0, 4), (1, 20, 22), (1, 30, 40)), ["zeros between ones in row 1"]),
}


@pytest.mark.parametrize("chunk", [None, 20])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("case", MASKS)
def test_masks_that_are_not_left_padding(case, name, chunk):
    mask, says = MASKS[case]
    model, ids = shared(name), prompt(2, 40)
    with farspan.patch(model, prefill_chunk=chunk):
        expected = logits(model, ids)
        refused(FarspanError, lambda m: logits(m, ids, attention_mask=mask), *says, model=model)
        assert close(logits(model, ids), expected)


def test_a_mask_of_the_wrong_size_for_the_cache():
    model, ids = shared("llama"), prompt(2, 40)
    with farspan.patch(model, "window:w=12"), torch.no_grad():
        cache = model(ids).past_key_values
        step = ids[:, :1]
        says = [r"is \[2, 40\] where \[2, 41\] is needed", "40 cached and 1 new tokens"]
        refused(FarspanError, lambda m: m(step, attention_mask=ONES, past_key_values=cache), *says)
        assert cache.get_seq_length() == 40
        assert model(step, past_key_values=cache).logits.shape == (2, 1, 128)


RIGHT = zeros_at((1, 35, 40))
PADDED_RIGHT = ["zeros after ones in row 1", "padding on the right", "padding_side = 'left'", "ones_like"]


def test_right_padding_that_the_answer_would_go_on_from():
    model, ids = shared("llama"), prompt(2, 40)
    with farspan.patch(model, "window:w=12"), torch.no_grad():
        says = [*PADDED_RIGHT, "the returned logits would be those of the padding"]
        for rows in (1, 5):
            refused(
                FarspanError,
                lambda m, rows=rows: m(ids, attention_mask=RIGHT, logits_to_keep=rows),
                *says,
                model=model,
            )
        refused(FarspanError, lambda m: decode(m, {"input_ids": ids, "attention_mask": RIGHT}), *says)
        assert model(ids, attention_mask=RIGHT, logits_to_keep=6).logits.shape == (2, 6, 128)
        cache = model(ids).past_key_values
        step, mask = ids[:, :4], torch.cat([ONES, zeros_at((1, 2, 4))[:, :4]], 1)
        says = [*PADDED_RIGHT, "at most 16 tokens on a cache"]
        refused(FarspanError, lambda m: m(step, attention_mask=mask, past_key_values=cache), *says)
        assert cache.get_seq_length() == 40


POSITIONS = {
    "restarting": torch.arange(20).repeat(2),
    "repeated": torch.arange(20).repeat_interleave(2),
    "reversed": torch.arange(40).flip(0),
    "with a gap": torch.cat([torch.arange(20), torch.arange(90, 110)]),
}


@pytest.mark.parametrize("case", POSITIONS)
def test_packed_sequences_are_refused(case):
    model, ids = shared("llama"), prompt(1, 40)
    how = {"position_ids": POSITIONS[case][None], "use_cache": False}
    with farspan.patch(model):
        refused(FarspanError, lambda m: logits(m, ids, **how), "packed sequences", "does not serve")


@pytest.mark.parametrize("by", ["call", "config"])
def test_attention_that_is_not_causal_is_refused(by):
    model, ids = make("llama"), prompt(1, 40)
    how = {"use_cache": False} | ({"is_causal": False} if by == "call" else {})
    causal = logits(model, ids)
    with farspan.patch(model):
        if by == "config":  # before the patch, it is refused there
            model.config.is_causal = False
        refused(FarspanError, lambda m: logits(m, ids, **how), "is_causal=False", model=model)
    assert not close(logits(model, ids, **how), causal), "transformers attends to later tokens"


def test_a_mask_that_is_all_padding_or_none_is_served():
    model, ids = shared("llama"), prompt(2, 40)
    plain = logits(model, ids)
    blank = {"input_ids": ids, "attention_mask": zeros_at((1, 0, 40))}
    with farspan.patch(model):
        assert close(logits(model, ids, attention_mask=ONES), plain)
        assert close(logits(model, ids, attention_mask=ONES.bool()), plain)
        assert close(logits(model, ids, attention_mask=ONES.float()), plain)
        out = logits(model, blank)
        assert close(out[:1], plain[:1]) and not bool(out.isnan().any())


# --- calibration ------------------------------------------------------------------------------------------


def test_calibration_that_cannot_be_done():
    from small_models import tokens

    def calibrate(**how):
        return lambda m: farspan.calibrate(m, tokens, "text", **{"tokens": 96, **how})

    refused(FarspanError, calibrate(by="v"), "ranked by q, k, qk", "got 'v'")
    refused(FarspanError, calibrate(method="quest"), "quest is not calibrated")
    says = ["calibration of sale has no option by=", "it takes start=, error="]
    refused(FarspanError, calibrate(method="sale", by="qk"), *says)
    refused(FarspanError, calibrate(start=1.0, sure=1.0), "no option start= and no option sure=", "takes by=")
    for wrong in (float("nan"), float("inf"), -1.0, "1"):
        refused(FarspanError, calibrate(method="act", sure=wrong), "from 0 on", f"got sure={wrong!r}")
        refused(FarspanError, calibrate(method="sale", error=wrong), "finite numbers above 0", f"{wrong!r}")
        refused(FarspanError, calibrate(method="sale", start=wrong), "finite numbers above 0", f"{wrong!r}")
    refused(FarspanError, calibrate(tokens=10), "at least 64 tokens", "tokens=10")
    refused(FarspanError, calibrate(window=3), "at least 64 tokens", "window=3")
    short = lambda text, **_: {"input_ids": torch.full((1, 5), PAD)}  # noqa: E731
    refused(FarspanError, lambda m: farspan.calibrate(m, short, "text"), "text has 5 tokens", "at least 64")
    model = make("llama")
    with farspan.patch(model):
        refused(FarspanError, calibrate(), "patched already", model=model)


def test_a_bug_in_a_calibration_stays_a_bug(monkeypatch):
    from small_models import tokens

    monkeypatch.setattr(DoubleSparsity, "calibration", lambda self, layer, *, by="qk": len(by + 1))
    with pytest.raises(TypeError, match="concatenate"):
        farspan.calibrate(shared("llama"), tokens, "text", tokens=96)
