"""MQAR's sequences against the definition, its models, and training that goes on where it was stopped."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan import FarspanError
from farspan.attention.hybrid import mixers
from farspan.evals.mqar.data import Setting, draw
from farspan.evals.mqar.layers import make_layers, split_mixers
from farspan.evals.mqar.model import Model
from farspan.evals.mqar.train import Run, Training, train

SMALL = Setting(length=24, pairs=3)


def read(tokens: list[int], pairs: int, vocabulary: int) -> dict[int, int]:
    """The definition, token by token: {position: value} of every key that comes again, for zero filler."""
    half = vocabulary // 2
    known: dict[int, int] = {}
    for at in range(0, 2 * pairs, 2):
        key, value = tokens[at : at + 2]
        assert 1 <= key < half and half <= value < vocabulary and key not in known
        known[key] = value
    assert len(set(known.values())) == pairs
    asked = {at: known[token] for at, token in enumerate(tokens) if at >= 2 * pairs and token != 0}
    assert sorted(tokens[at] for at in asked) == sorted(known), "each key is asked for once"
    assert all((at - 2 * pairs) % 2 == 0 for at in asked)
    return asked


def test_sequences_are_those_of_the_definition() -> None:
    examples = draw(SMALL, 200, vocabulary=32, seed=3)
    for tokens, places, answers in zip(
        examples.tokens.tolist(), examples.places.tolist(), examples.answers.tolist(), strict=True
    ):
        assert dict(zip(places, answers, strict=True)) == read(tokens, 3, 32)
        assert [tokens[at] for at in places] == tokens[0:6:2]  # in the order of the pairs


def test_gaps_follow_the_power_law_and_keys_are_equally_likely() -> None:
    """The first pair's gap is the first number drawn, with p(i) in proportion to i^(0.01 - 1); each place of
    the context has each of the 15 keys and 16 values equally often."""
    n = 20_000
    examples = draw(SMALL, n, vocabulary=32)
    law = torch.arange(1, 10).double() ** (0.01 - 1)
    flat = [torch.ones(size).double() for size in (15, 16)]
    drawn = [(examples.places[:, 0] - 6) // 2]
    drawn += [examples.tokens[:, at] - (1, 16)[at % 2] for at in range(6)]
    for numbers, weights in zip(drawn, [law, *flat * 3], strict=True):
        want = weights / weights.sum()
        got = torch.bincount(numbers, minlength=len(want)) / n
        assert len(got) == len(want) and torch.all((got - want).abs() < 4 * (want / n).sqrt())


def test_seeds_are_its_own_and_random_fillers_leave_the_pairs() -> None:
    torch.manual_seed(5)
    a = draw(SMALL, 50, vocabulary=32, seed=1)
    before = torch.random.get_rng_state()
    b = draw(SMALL, 50, vocabulary=32, seed=1, filler="random")
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(a.places, b.places) and torch.equal(a.answers, b.answers)
    kept = a.tokens != 0
    assert torch.equal(a.tokens[kept], b.tokens[kept]) and not torch.equal(a.tokens, b.tokens)
    assert not torch.equal(a.tokens, draw(SMALL, 50, vocabulary=32, seed=2).tokens)


def test_lists_of_mixers_and_hybrids() -> None:
    given = "attention, base_conv:length=3+block_topk:k=8,block=4;attention,window:w=4"
    specs = ["attention", "base_conv:length=3+block_topk:k=8,block=4", "window:w=4"]
    assert split_mixers([given]) == specs
    low, high = make_layers(specs[1], 8, 2, 24)
    assert low.state_bytes(24) == 4 * 2 * 8 and not low.attends
    assert high.state_bytes(24) == 4 * 2 * 24 * 8 and high.attends
    below, above = make_layers("attention", 8, 2, 24, first="base_conv:length=3")
    assert not below.attends and above.attends
    (own, _) = make_layers("base_conv", 8, 2, 24)
    assert make_layers("base_conv:length = 5", 8, 2, 24)[0].mixer.length == 5
    assert own.state_bytes(24) == 4 * 23 * 8  # a filter of the sequence's length


@pytest.mark.parametrize("spec", ["attention", "base_conv:length=3+attention", *mixers()])
def test_models_are_causal_and_logits_stand_at_the_queries(spec: str) -> None:
    torch.manual_seed(0)
    model = Model(spec, dim=8, heads=2, length=24, vocabulary=32).double()
    ordered = spec.startswith("base_conv") or (spec in mixers() and mixers()[spec].ordered)
    assert (model.positions is None) == ordered
    examples = draw(SMALL, 4, vocabulary=32)
    logits = model(examples)
    assert logits.shape == (4, 3, 32)
    examples.tokens[:, 17:] = 9  # changes nothing before
    later = model(examples)
    early = examples.places < 17
    assert torch.allclose(logits[early], later[early], atol=1e-10)
    assert not torch.allclose(logits[~early], later[~early])
    later.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.layers.parameters())


def test_a_sparse_layer_is_masked_attention_and_its_gate_is_trained() -> None:
    """A method that reads every key is attention; a gate's bias changes the output and has a gradient."""
    torch.manual_seed(0)
    x = torch.randn(3, 24, 8, requires_grad=True)
    (dense, _), (topk, _) = (
        make_layers(spec, 8, 2, 24) for spec in ("attention", "block_topk:k=none,fraction=1,block=4")
    )
    topk.load_state_dict(dense.state_dict())
    want, got = dense(x), topk(x)
    assert torch.allclose(got, want, atol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (want, got)]
    assert torch.allclose(*grads, atol=1e-4)
    (gated, _) = make_layers("dynamic_mask:w=6,local=2,add_bias=true", 8, 2, 24)
    gated(x).square().sum().backward()
    named = dict(gated.named_parameters())
    assert any(name.startswith("gate.") and p.grad is not None and p.grad.any() for name, p in named.items())


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("nothing", "There is no sequence mixer 'nothing'"),
        ("attention+base_conv+attention", "has 3 layers"),
        ("base_conv:length=0", "at least 1 token"),
        ("double_sparsity", "selects nothing in prefill"),
        ("pbs", "see the future"),
    ],
)
def test_what_is_no_mixer_is_refused(spec: str, sentence: str) -> None:
    with pytest.raises(FarspanError, match=sentence):
        make_layers(spec, 8, 2, 24)


TINY = Training(
    vocabulary=32, samples=256, epochs=3, batch_tokens=384, test_samples=64, dropout=0.1, first="same"
)


def tiny(mixer: str, **changes: Any) -> Run:
    both = (Setting(length=16, pairs=2), SMALL)
    return Run(**{"mixer": mixer, "dim": 16, "settings": both, "lr": 1e-2, "seed": 0, **changes})


def test_a_stopped_run_ends_as_one_that_ran_through(tmp_path: Path) -> None:
    run, cost = tiny("base_conv:length=3+attention"), ("seconds", "cpu_seconds")
    whole = train(run, TINY, tmp_path / "a")

    def stop(epoch: int, accuracy: dict[str, float]) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    state = torch.random.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        train(run, TINY, tmp_path / "b", progress=stop)
    assert (tmp_path / "b").is_dir()
    seen: list[int] = []
    again = train(run, TINY, tmp_path / "b", progress=lambda epoch, accuracy: seen.append(epoch))
    assert seen == [3] and not (tmp_path / "b").exists()
    assert {k: v for k, v in again.items() if k not in cost} == {
        k: v for k, v in whole.items() if k not in cost
    }
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_run_ends_when_it_is_solved_or_diverges(tmp_path: Path) -> None:
    row = train(tiny("attention"), replace(TINY, stop=0.0), tmp_path)
    steps = 256 // 24 + 1 + math.ceil(51 / 16)  # 256 sequences of 16 tokens, a fifth of those of 24
    assert (row["ended"], row["epochs"], row["steps"]) == ("solved", 1, steps)
    assert row["state"] == {"16x2": [2048, 2048], "24x3": [3072, 3072]}
    row = train(tiny("attention", lr=1e30), TINY, tmp_path)
    assert row["ended"] == "not finite" and row["accuracy"] == {"16x2": 0.0, "24x3": 0.0}
