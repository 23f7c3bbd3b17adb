"""Fine-tuning with a method on: losses and gradients against plain autograd, and what is left behind."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import logits, make, prompt, shared, snapshot
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import farspan
from farspan import FarspanError
from farspan.attention.recycled import teacher_forced
from farspan.runtime import hf
from farspan.runtime.training import losses
from farspan.runtime.training.tuned import Tuned

IDS = prompt(2, 48)
BLOCKS = "block_topk:k=16,block=8"
PLAIN = SimpleNamespace(backward=lambda loss: loss.backward())


def objective(model: Any, spec: str = BLOCKS, **how: Any) -> Tuned:
    return Tuned(model, farspan.parse_method(spec), **how)


def disturb(training: Tuned, size: float = 0.05) -> None:
    """Random changes of everything trained."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in training.parameters():
            p += size * torch.randn(p.shape, generator=generator)


def gradients(training: Tuned) -> list[torch.Tensor]:
    found = []
    for p in training.parameters():
        assert p.grad is not None
        found.append(p.grad.clone())
        p.grad = None
    return found


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe", "falcon_h1"])
def test_the_head_alone_is_the_models_own(name: str) -> None:
    model = shared(name)
    head = hf.Head(model, hf.inspect_model(model))
    before = snapshot(model)
    with torch.no_grad():
        output = head.hidden(IDS)
        parts = [
            head.logits(output, output.last_hidden_state[:, at], IDS[:, at])
            for at in (slice(0, 7), slice(7, 48))
        ]
    assert torch.allclose(torch.cat(parts, 1), logits(model, IDS), atol=1e-5)
    assert snapshot(model) == before


@pytest.mark.parametrize("tune", ["lora", "attention"])
@pytest.mark.parametrize(
    ("name", "spec", "loss"),
    [
        ("llama", BLOCKS, "kl"),
        ("phi3", "window:w=12", "nll"),
        ("llama", "recycled:k=12,stride=6", "kl"),
        ("gemma2", BLOCKS, "kl"),
    ],
)
def test_loss_and_gradients_are_those_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, tune: str, name: str, spec: str, loss: str
) -> None:
    """The oracle takes all logits of the model at once and one backward."""
    monkeypatch.setattr(losses, "_LOGITS", 2 * 128 * 10)  # ten positions at a time
    model = make(name)
    dense = logits(model, IDS)
    before = snapshot(model)
    training = objective(model, spec, tune=tune, loss=loss, temperature=2.0)
    disturb(training)
    got = training.backward(IDS, PLAIN)
    ours, measured = gradients(training), training.evaluate(IDS)
    whole = model(IDS, use_cache=False).logits[:, :-1]
    nll = cross_entropy(whole.flatten(0, 1), IDS[:, 1:].flatten())
    target, mine = (log_softmax(x / 2, -1).flatten(0, 1) for x in (dense[:, :-1], whole))
    kl = 4 * kl_div(mine, target, log_target=True, reduction="batchmean")
    want = nll if loss == "nll" else kl
    theirs = torch.autograd.grad(want, training.parameters())
    assert torch.allclose(got, want, rtol=1e-4)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= 1e-3 * max(other.norm(), 1e-3)
    nll_dense = cross_entropy(dense[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).item()
    expected = {"loss": want, "nll": nll, "nll_dense": nll_dense, "nll_difference": nll - nll_dense, "kl": kl}
    assert measured == {
        k: pytest.approx(float(torch.as_tensor(v).detach()), rel=1e-3, abs=1e-4) for k, v in expected.items()
    }
    training.close()
    assert snapshot(model) == before
    assert torch.equal(logits(model, IDS), dense)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("spec", "tune"), [(BLOCKS, "lora"), (BLOCKS, "attention"), ("recycled:k=12,stride=6", "lora")]
)
def test_training_brings_the_method_nearer_to_dense(spec: str, tune: str) -> None:
    training = objective(make("llama"), spec, tune=tune)
    optimizer = torch.optim.AdamW(training.parameters(), lr=5e-3 if tune == "lora" else 2e-3)
    first = training.evaluate(IDS)["kl"]
    for _ in range(12):
        training.backward(IDS, PLAIN)
        optimizer.step()
        optimizer.zero_grad()
    assert training.evaluate(IDS)["kl"] < 0.7 * first
    training.close()


def test_only_layers_with_the_method_learn_and_recycled_trains_as_it_decodes() -> None:
    model = make("gemma2")
    training = objective(model, "recycled:k=12,stride=6")
    layers = {name.split(".")[1] for name in training.state()}
    assert layers == {"1", "3"}, "the others have the model's own window"
    form = teacher_forced(farspan.parse_method("recycled:k=12,stride=6"))
    reports = training._patched.report().layers
    assert all(layer.phases["prefill"].method == str(form) for layer in reports)
    training.close()


@pytest.mark.parametrize("tune", ["lora", "attention"])
def test_a_training_goes_on_from_its_recipe(tune: str) -> None:
    model = make("llama")
    training = objective(model, tune=tune)
    disturb(training)
    state = {name: x.clone() for name, x in training.state().items()}
    recipe = training.recipe({"steps": 1})
    training.close()
    again = objective(model, tune=tune, start=recipe)
    assert all(torch.equal(x, state[name]) for name, x in again.state().items())
    again.close()
    with pytest.raises(FarspanError, match="starts from has other adapters"):
        objective(model, tune=tune, start=recipe, rank=3) if tune == "lora" else objective(
            model, start=recipe
        )


def test_gradient_checkpointing_of_the_model() -> None:
    model = make("llama").train()
    training = objective(model)
    training.backward(IDS, PLAIN)
    plain = gradients(training)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    training.backward(IDS, PLAIN)
    for one, other in zip(gradients(training), plain, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    training.close()


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    before = snapshot(model)
    for how, says in (
        ({"tune": "mlp"}, "tune is lora or attention; got 'mlp'"),
        ({"tune": "attention", "rank": 4}, "rank and alpha belong to tune='lora'"),
        ({"rank": 0}, "rank is a whole number, at least 1; got 0"),
        ({"loss": "mse"}, "loss is kl or nll; got 'mse'"),
        ({"temperature": float("nan")}, "temperature is a finite number above 0"),
        ({"spec": "quest"}, "quest selects nothing in prefill"),
        ({"spec": "dense"}, "dense selects nothing in prefill"),
        ({"spec": "pbs"}, "pbs selects by a prompt's last queries"),
        ({"spec": "recycled:dynamic=true"}, "leave dynamic out"),
    ):
        with pytest.raises(FarspanError, match=says):
            objective(model, **how)
    with pytest.warns(UserWarning, match=r"block_topk.* up to 7 later tokens.*loss='kl'"):
        objective(model, loss="nll").close()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(FarspanError, match=r"pip install 'farspan\[train\]'"):
        objective(model)
    assert snapshot(model) == before
    assert all(p.requires_grad for p in model.parameters())


class Packed(torch.nn.Linear):
    """As bitsandbytes stores a projection: a Linear whose weight is integers."""

    def __init__(self, like: torch.nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.weight = torch.nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)


def test_quantised_and_unfit_models_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_torch = torch.ao.quantization.quantize_dynamic(make("llama"), {torch.nn.Linear})
    packed = make("llama")
    packed.model.layers[1].self_attn.v_proj = Packed(packed.model.layers[1].self_attn.v_proj)
    for model in (by_torch, packed):
        with pytest.raises(FarspanError, match=r"_proj of layer \d is quantised .*floating-point weights"):
            objective(model)
    for attention in (bare := make("llama")).model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(attention.self_attn, name, torch.nn.Identity())
    with pytest.raises(FarspanError, match="no linear projections"):
        objective(bare)
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(FarspanError, match="has adapters already"):
        objective(wrapped)
