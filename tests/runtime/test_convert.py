"""Conversion: its losses and measures against the same by hand, stops and resumes, and bad input."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

import farspan
from farspan import FarspanError, SpecError, Unsupported
from farspan.runtime import hf
from farspan.runtime.conversion.align import Aligned
from farspan.runtime.conversion.choose import Measured, most_needed, parse_layers
from farspan.runtime.conversion.heal import Healed
from farspan.runtime.conversion.probe import probe_texts, retrieval_loss
from farspan.runtime.conversion.student import Student
from farspan.runtime.training import checkpoint
from farspan.runtime.training.windows import cut_windows

from . import toy_mixer  # noqa: F401  (registers the mixer)
from .small_models import logits, make, prompt, snapshot
from .test_train import text, tokenizer

WINDOW = 64


class Plain:
    """accelerate's backward, without accelerate."""

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def convert(model: Any, out: Path, **how: Any) -> dict[str, Any]:
    given = {"steps_align": 4, "steps_heal": 4, "window": WINDOW, "held_out": 2, "save_every": 2, **how}
    prose = given.pop("prose", text())
    return farspan.convert(model, tokenizer, given.pop("mixer", "toy"), prose, out=out, **given)


def load(folder: Path) -> Any:
    config = hf.read_config(folder)
    return hf.class_of_config(config).from_pretrained(folder, config=config).eval()


def outputs(model: Any, ids: Tensor) -> dict[int, tuple[Any, Tensor]]:
    """The arguments and the output of each attention."""
    seen, hooks = {}, []
    for i, layer in enumerate(model.model.layers):

        def keep(module: Any, args: Any, kwargs: Any, out: Any, i: int = i) -> None:
            seen[i] = kwargs, out[0]

        hooks.append(layer.self_attn.register_forward_hook(keep, with_kwargs=True))
    logits(model, ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def test_stage_1_is_the_relative_error_of_each_layer() -> None:
    model, ids = make("llama"), prompt(1, 50)
    student = Student(model, "toy", [0, 2])
    aligned = Aligned(student)
    loss = aligned.backward(ids, Plain())
    errors = []
    for i, mixer in student.mixers.items():
        kwargs, want = outputs(model, ids)[i]
        got, _ = mixer(kwargs["hidden_states"], rotary=kwargs["position_embeddings"])
        errors.append((got - want).square().mean() / want.square().mean())
    found = aligned.evaluate(ids)
    assert torch.allclose(loss, torch.stack(errors).mean(), rtol=1e-5)
    assert [found["layer 0"], found["layer 2"]] == pytest.approx([e.item() for e in errors], rel=1e-5)
    grads = [p.grad.clone() for p in aligned.parameters()]
    for p in aligned.parameters():
        p.grad = None
    (errors[0] + errors[1]).backward()
    assert all(
        (a - p.grad).abs().max() <= 1e-4 * p.grad.abs().max()
        for a, p in zip(grads, aligned.parameters(), strict=True)
    )
    assert all(p.grad is None for p in model.parameters())
    student.close()


@pytest.mark.parametrize("trains", ["mixers", "all"])
def test_stage_2_is_the_divergence_from_the_original(trains: str) -> None:
    model, ids = make("llama"), prompt(2, 40)
    before, dense = snapshot(model), logits(model, ids)
    student = Student(model, "toy", [0, 2])
    healed = Healed(student, [2], trains=trains, cross_entropy=0.5)
    loss = healed.backward(ids, Plain())
    grads = [p.grad.clone() for p in healed.parameters()]
    found = healed.evaluate(ids)
    for p in healed.parameters():
        p.grad = None
    with student.mixed([2]):
        got = log_softmax(model(ids, use_cache=False).logits[:, :-1].double(), -1)
    want = log_softmax(dense[:, :-1].double(), -1)
    kl = (want.exp() * (want - got)).sum(-1).mean()
    nll, nll_dense = (-x.gather(2, ids[:, 1:, None]).mean() for x in (got, want))
    (kl + 0.5 * nll).backward()
    assert loss.item() == pytest.approx((kl + 0.5 * nll).item(), rel=1e-5)
    wanted = {"kl": kl, "nll": nll, "nll_dense": nll_dense, "nll_difference": nll - nll_dense}
    assert all(found[name] == pytest.approx(x.item(), rel=1e-4, abs=1e-6) for name, x in wanted.items())
    pairs = list(zip(grads, healed.parameters(), strict=True))
    assert len(pairs) == 5 + (trains == "all") * (2 * 9 + 5)  # of the replaced layer, MLP and norms alone
    assert all((a - p.grad).abs().max() <= 1e-4 * p.grad.abs().max() + 1e-7 for a, p in pairs)
    healed.close(), student.close()
    assert snapshot(model) == before and torch.equal(logits(model, ids), dense)


def test_the_probe_asks_for_values_that_came_before() -> None:
    one, *_ = probe_texts(tokenizer, texts=2, pairs=4)
    letters = "".join(chr(int(x)) for x in one.ids[0])
    marks = {int(p) for p in one.answers}
    line = len("The code of the red door is 12345.\n")
    assert len(marks) == 4 * 6 and min(marks) > len(letters) // 2 and line * 7 < len(letters)
    model = make("llama")
    student = Student(model, "toy", [1])
    texts = probe_texts(tokenizer, texts=2, pairs=4)
    with student.mixed([1]):
        by_hand = [
            -log_softmax(logits(model, t.ids, use_cache=False)[0, t.answers - 1], -1)
            .gather(1, t.ids[0, t.answers, None])
            .flatten()
            for t in texts
        ]
    assert retrieval_loss(student, texts, [1]) == pytest.approx(torch.cat(by_hand).mean().item(), rel=1e-5)
    few = probe_texts(tokenizer, pairs=16, positions=400)
    assert all(len(t.answers) == 4 * 6 and t.ids.shape[1] <= 400 for t in few)
    assert retrieval_loss(student, texts, []) != pytest.approx(torch.cat(by_hand).mean().item(), rel=1e-3)


def test_a_model_is_converted_saved_and_reported(tmp_path: Path) -> None:
    """The measured layers stay; the numbers of the report are those of the saved model."""
    model = make("llama").train()
    before, seen, shown = snapshot(model), [], []
    out = tmp_path / "new"
    report = convert(
        model,
        out,
        attention_layers="auto:1",
        progress=lambda *x: seen.append(x),
        chosen=lambda *x: shown.append(x),
    )
    assert snapshot(model) == before and model.training
    [(measured, kept)] = shown
    assert report["attention_layers"] == kept == most_needed(measured, 1) and len(report["replaced"]) == 2
    assert sum(m.need for m in measured) == pytest.approx(1)
    assert [name for name, _ in seen] == ["align"] * 4 + ["choose"] * 3 + ["heal"] * 4
    assert {p.name for p in out.iterdir()} == {
        "README.md", "config.json", "conversion.json", "generation_config.json", "model.safetensors",
    }  # fmt: skip
    assert json.loads((out / "conversion.json").read_text()) == json.loads(json.dumps(report))
    made, held_out = load(out), cut_windows(tokenizer, text(), WINDOW, 2).held_out
    nll = [made(ids[None], labels=ids[None]).loss.item() for ids in held_out]
    assert report["after"]["nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-4)
    size = report["memory"]
    assert size["kv_bytes_per_token_before"] == 3 * 2 * 2 * 16 * 4
    assert size["kv_bytes_per_token_after"] == 2 * 2 * 16 * 4
    assert size["state_bytes"] == 2 * 4 * 16 * 16 * 4 and size["break_even_tokens"] == 16
    words = (out / "README.md").read_text()
    assert (
        "needs farspan to be loaded" in words and "Below 16 tokens" in words and f"layers {kept[0]}," in words
    )
    first, last = (report["stages"]["align"]["held_out"][i]["loss"] for i in (0, -1))
    assert last < first


def test_a_killed_conversion_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: Any) -> None:
    """It is stopped in each stage, in the middle of the measurements and while the model is written."""
    convert(make("llama"), tmp_path / "whole", attention_layers="auto:1")
    out, save = tmp_path / "stopped", hf.save_converted

    class Killed(BaseException):
        pass

    def stop(stage: str, at: int) -> Any:
        def watch(name: str, step: Any) -> None:
            if (name, step.done) == (stage, at):
                raise Killed

        return watch

    for stage, at in (("align", 3), ("choose", 2), ("heal", 3)):
        with pytest.raises(Killed):
            convert(make("llama"), out, attention_layers="auto:1", progress=stop(stage, at))

    def full(*args: Any) -> None:
        save(*args)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hf, "save_converted", full)
    with pytest.raises(
        FarspanError, match=r"could not be written to .*No space left.*training is kept there"
    ):
        convert(make("llama"), out, attention_layers="auto:1")
    assert [p.name for p in out.iterdir()] == ["conversion"]
    monkeypatch.setattr(hf, "save_converted", save)
    (out / "config.json").write_text("{}")  # a kill in the middle of writing leaves half a model
    with pytest.raises(FarspanError, match=r"other settings: lr=0.0003 .now 0.01"):
        convert(make("llama"), out, attention_layers="auto:1", lr=0.01)
    convert(make("llama"), out, attention_layers="auto:1")
    for file in ("model.safetensors", "config.json"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_an_alignment_serves_other_conversions(tmp_path: Path) -> None:
    """Stage 1 of one conversion, taken by another, gives the weights that its own stage 1 gives."""
    convert(make("llama"), tmp_path / "a", attention_layers="auto:1", keep=True)
    taken = convert(make("llama"), tmp_path / "b", attention_layers="auto:2", aligned=tmp_path / "a")
    own = convert(make("llama"), tmp_path / "c", attention_layers="auto:2")
    assert taken["attention_layers"] == own["attention_layers"]
    assert (tmp_path / "b/model.safetensors").read_bytes() == (tmp_path / "c/model.safetensors").read_bytes()
    with pytest.raises(FarspanError, match=r"alignment in .* is of another mixer: give the folder"):
        convert(
            make("llama"), tmp_path / "d", mixer="toy:bound=2", aligned=tmp_path / "a", attention_layers=[0]
        )
    with pytest.raises(FarspanError, match=r"holds no complete alignment .*--keep"):
        convert(make("llama"), tmp_path / "d", aligned=tmp_path / "b", attention_layers=[0])


def test_layers_that_stay() -> None:
    can = [0, 1, 2, 4, 5, 7]
    assert parse_layers("auto:3", can, 8) == 3 and parse_layers("even:2", can, 8) == [1, 5]
    assert parse_layers("5, 0,-1", can, 8) == [0, 5, 7] == parse_layers([0, 5, 7], can, 8)
    for given, says in (
        ("auto:6", "a number from 1 to 5, since the model has 6 layers"),
        ("auto:x", "a number from 1 to 5"),
        ("0,8", "names '8': it takes layers with full attention, which are 0, 1, 2, 4, 5, 7 here"),
        ([3], "names '3'"),
        ("one", "names 'one'"),
        (3, "a list of layer numbers; got 3"),
        ([], "keeps 0 of 6 layers"),
        (can, "keeps 6 of 6 layers: keep at least one, and leave at least one"),
    ):
        with pytest.raises(FarspanError, match=says):
            parse_layers(given, can, 8)
    same = {"error": 0.0, "nll": 0.0, "kl": 0.0, "retrieval": 0.0}
    needs = [Measured(layer=i, need=x, **same) for i, x in enumerate((0.1, 0.5, 0.1, 0.3))]
    assert most_needed(needs, 3) == [0, 1, 3]


def test_bad_input(tmp_path: Path, monkeypatch: Any) -> None:
    model, out = make("llama"), tmp_path / "new"
    before, held = snapshot(model), tmp_path / "held"
    held.mkdir()
    (held / "config.json").write_text("{}")
    for how, says in (
        ({"mixer": "toi"}, "There is no mixer 'toi' .did you mean 'toy'"),
        ({"mixer": "toy:bond=1"}, "bond"),
        ({"attention_layers": "auto:3"}, "a number from 1 to 2"),
        ({"attention_layers": "0,3"}, "names '3'"),
        ({"prose": "short"}, "The text has 5 tokens, which are 0 windows of 64"),
        ({"window": 1024}, "longer than the model's 512 positions"),
        ({"out": held}, "exists and holds a model: give a new folder"),
        ({"train": "lora"}, "train is mixers or all; got 'lora'"),
        ({"cross_entropy": -1.0}, "cross_entropy is a finite number, at least 0; got -1.0"),
        ({"lr": 0.0}, "lr is a finite number above 0"),
        ({"steps_heal": 0}, "steps is at least 1"),
    ):
        given = {"out": out, "attention_layers": "auto:1", **how}
        with pytest.raises(FarspanError, match=says):
            convert(model, **given)
        assert snapshot(model) == before, says
    with pytest.raises(
        SpecError, match="Layer 0 cannot get the mixer 'toy': toy takes a head_dim up to 16; got 32"
    ):
        convert(make("llama", head_dim=32), out, attention_layers=[1])
    with pytest.raises(Unsupported, match="fewer than 2 of its layers have full attention"):
        convert(make("mistral"), out)
    odd = make("llama")
    odd.generation_config.temperature = 0.5
    with pytest.raises(FarspanError, match=r"generation_config cannot be saved .*temperature"):
        convert(odd, out)
    with farspan.patch(model, "dense"), pytest.raises(FarspanError, match=r"call remove.. on the patch"):
        convert(model, out)

    bad = make("llama")
    with torch.no_grad():
        bad.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(FarspanError, match="The loss of step 1 is nan, so training stopped"):
        convert(bad, tmp_path / "nan", attention_layers="auto:1")

    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", no_space)
    with pytest.raises(FarspanError, match=r"checkpoint of step 2 could not be written to .*No space left"):
        convert(model, tmp_path / "disk", attention_layers="auto:1")
    assert snapshot(model) == before
