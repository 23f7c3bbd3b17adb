"""Training of duo's alphas: the passkeys, the loss and its gradient, and the recipe that comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import farspan
from farspan import FarspanError
from farspan.attention.kv import KV
from farspan.attention.softmax import Softmax
from farspan.runtime.training.blended import Blended
from farspan.runtime.training.passkeys import LENGTH, Passkeys

from ..laws import naive
from ..laws.tools import D, Data, H, layer_info
from .small_models import VOCAB, make

SPEC = "duo:sinks=3,recent=16"


def tokenizer(text: str, **_: Any) -> dict[str, Tensor]:
    """One token a character."""
    return {"input_ids": torch.tensor([[3 + ord(c) % (VOCAB - 3) for c in text]])}


def text(length: int) -> str:
    made = torch.Generator().manual_seed(5)
    return "".join(chr(65 + int(c)) for c in torch.randint(60, (length,), generator=made))


def test_passkeys_are_told_once_and_repeated_at_the_end() -> None:
    ids = tokenizer(text(2400))["input_ids"].view(2, -1)
    hide = Passkeys(tokenizer)
    found, answers = hide(ids, torch.Generator().manual_seed(3))
    again, _ = hide(ids, torch.Generator().manual_seed(3))
    other, _ = hide(ids, torch.Generator().manual_seed(4))
    assert torch.equal(found, again) and not torch.equal(found, other)
    assert found.shape == ids.shape and answers.shape == ids.shape
    for row, where, original in zip(found.tolist(), answers, ids.tolist(), strict=True):
        places = where.nonzero()[:, 0].view(-1, LENGTH)
        assert len(places) == 4 and places[-1, -1] == 1199  # of 10, as many as take half of the window
        begin = int(places[0, 0])
        told = 0
        for i, ordinal in enumerate(("first", "second", "third", "fourth")):
            key = [row[place] for place in places[i].tolist()]
            sentence = tokenizer(f"\n\nRemember this: the {ordinal} passkey is")["input_ids"][0].tolist()
            sentence = [*sentence, *key, *tokenizer(".\n\n")["input_ids"][0].tolist()]
            at = [j for j in range(begin) if row[j : j + len(sentence)] == sentence]
            assert len(at) == 1
            told += len(sentence)
        asked = len(tokenizer("\n\nThe first passkey is")["input_ids"][0])
        rest = row[: begin - asked]
        for token in original[: begin - asked - told]:  # the text goes on around the passkeys
            rest = rest[rest.index(token) + 1 :]
    with pytest.raises(FarspanError, match=r"A window of 100 tokens is too short for a passkey"):
        hide(ids[:, :100], torch.Generator())


def test_a_blend_is_a_sum_of_full_and_streaming_attention() -> None:
    data = Data.random(40, seed=2)
    method = farspan.parse_method("duo:sinks=2,recent=9").for_training(layer_info())
    assert method is not None and method.module is not None
    alphas = [0.3, 0.8]
    method.module.load_state_dict({"alpha": torch.tensor(alphas)})
    with torch.no_grad():
        got = method.blended(data.q, KV(data.k, data.v), Softmax(data.scale))
    for h in range(H):
        k, v, alpha = data.k[0, h // 4], data.v[0, h // 4], float(torch.tensor(alphas[h // 4]))
        for i in range(40):
            full = naive.attention(data.q[0, h, i], k, v, set(range(i + 1)), data.scale)
            read = {j for j in range(i + 1) if j < 2 or j > i - 9}
            streaming = naive.attention(data.q[0, h, i], k, v, read, data.scale)
            assert (got[0, h, i] - alpha * full - (1 - alpha) * streaming).abs().max() < 1e-12
    assert got.shape == (1, H, 40, D)


class Backward:
    """What the loss asks of accelerate."""

    @staticmethod
    def backward(loss: Tensor) -> None:
        loss.backward()


def test_the_loss_and_its_gradient() -> None:
    """At alpha 1 the dense model, at alpha 0 the model under ``streaming=1``; the gradient by differences."""
    model = make("llama").double()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    ids = tokenizer(text(400))["input_ids"]
    blended = Blended(model, tokenizer, farspan.parse_method(SPEC))
    parameters = blended.parameters()
    for p in parameters:
        p.data = p.data.double()
    assert blended.evaluate(ids) == {"loss": 0.05, "difference": 0.0, "alpha": 1.0}
    for p in parameters:
        p.data.zero_()
    streaming = blended.evaluate(ids)
    assert streaming["loss"] == streaming["difference"] > 0
    hidden = Passkeys(tokenizer)(ids, torch.Generator().manual_seed(int(ids.sum())))
    random = torch.Generator().manual_seed(1)
    for p in parameters:
        p.data = torch.rand(p.shape, generator=random, dtype=torch.float64) * 0.8 + 0.1
    torch.manual_seed(0)
    blended.backward(ids, Backward)

    def loss() -> float:
        torch.manual_seed(0)
        return float(blended.backward(ids, type("", (), {"backward": lambda loss: None})))

    for p in parameters:
        assert p.grad is not None
        for i in range(len(p)):
            sides = []
            for step in (3e-3, -6e-3):
                p.data[i] += step
                sides.append(loss())
            p.data[i] += 3e-3
            # The norms of the model compute in float32.
            assert abs(float(p.grad[i]) - (sides[0] - sides[1]) / 6e-3) < 2e-3
    blended.close()
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        dense = model.model(hidden.ids).last_hidden_state[hidden.answers]
        tensors = {f"layers.{i}.alpha": torch.zeros(2) for i in range(len(parameters))}
        recipe = farspan.Recipe(method="duo", geometry={}, settings={}, tensors=tensors)
        with farspan.patch(model, f"{SPEC},streaming=1.0", recipe=recipe):
            got = model.model(hidden.ids).last_hidden_state[hidden.answers]
    assert abs(streaming["difference"] - float((got - dense).square().mean())) < 1e-12


def test_train_makes_a_recipe_that_patch_takes(tmp_path: Path) -> None:
    model = make("llama")
    how: dict[str, Any] = {"steps": 3, "window": 400, "held_out": 1, "out": tmp_path / "duo"}
    made = farspan.train(model, tokenizer, SPEC, text(1700), **how)
    assert made.settings["lr"] == 2e-2 and made.settings["sparsity"] == 0.05
    assert made.settings["held_out"][0]["alpha"] == 1.0 > made.settings["held_out"][1]["alpha"]
    assert all(bool(((x >= 0) & (x <= 1)).all()) for x in made.tensors.values())
    with farspan.patch(model, SPEC, recipe=tmp_path / "duo") as patched, torch.no_grad():
        model(tokenizer(text(300))["input_ids"])
        assert 0.5 < patched.report().summary["prefill_density"] < 0.7  # half the heads read 19 keys of 300
    with pytest.raises(FarspanError, match="duo needs a recipe: make one with 'farspan calibrate --meth"):
        farspan.patch(model, "duo")
