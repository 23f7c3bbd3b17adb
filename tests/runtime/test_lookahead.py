"""Methods whose selection looks ahead say so where logits of earlier positions are asked for."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import farspan
from farspan import FarspanError
from farspan.attention.lookahead import Lookahead
from farspan.attention.method import PREFILL
from farspan.attention.spec import methods

from ..laws.gates import random_gates
from ..laws.parameters import sparse_settings

PROMPT = "pbs:mass=0.3,block=8,segment=16"
BLOCKS = "block_topk:k=32,block=8"
IDS = torch.randint(3, 128, (1, 90), generator=torch.Generator().manual_seed(0))
SENTENCE = "Logits of more than the last position were returned"

# One spec of every method that serves prefill, sparse at 90 tokens, and how many later tokens it looks at.
AHEAD = {
    "act:first=0,heads=all,threshold=0.05": math.inf,
    "antidiagonal:mass=0.4,stride=4,block=8": 7,
    "a_shape:w=16,sinks=4,block=8": 0,
    "block_static:block=8": 0,
    BLOCKS: 7,
    "block_topk:k=32,block=1": 0,
    "dense": 0,
    "dhsa:fraction=0.25,block_q=16,block_k=8,local=5": 15,
    "dhsa:select=vertical_slash,fraction=0.3,block_q=8,block_k=8": math.inf,
    "dilated:w=9,dilation=3": 0,
    "oracle:mass=0.6,block=8": 7,
    PROMPT: math.inf,
    "routing:k=40,clusters=4,segment=16,block=8,window=8": 7,
    "sale:threshold=2.0,block_q=8,block_k=4,local=12,dense_below=0,q_bits=none": 7,
    "seer:block=8": 7,
    "strided:w=8,stride=8": 0,
    "vertical_slash:vertical=6,slash=5,block=8,last=16,local=4": math.inf,
    "window:w=16": 0,
}


def patched_by(model: Any, spec: str) -> Any:
    """patch(model, spec), with random weights for a method that is trained."""
    method = farspan.parse_method(spec)
    return farspan.patch(model, spec, recipe=random_gates(method, model) if method.needs.recipe else None)


def loss(model: Any) -> torch.Tensor:
    return model(IDS, labels=IDS, use_cache=False).loss


def told(call: Callable[[], Any]) -> list[str]:
    """The warnings of a call that speak of logits."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if SENTENCE in str(one.message)]


def test_every_method_that_looks_ahead_is_here() -> None:
    named = {farspan.parse_method(spec).name for spec in AHEAD}
    ahead = {
        name
        for name, cls in methods().items()
        for settings in sparse_settings(cls)
        if PREFILL in cls.phases and cls(**settings).lookahead.tokens
    }
    assert ahead <= named


@pytest.mark.parametrize("spec", AHEAD)
def test_scoring_is_flagged(tiny_llama: Any, spec: str) -> None:
    """By one warning of a patch, and in the report for every call, where later tokens have had a part."""
    model, ahead = tiny_llama(), AHEAD[spec]
    assert farspan.parse_method(spec).lookahead == Lookahead(ahead)
    calls = [
        lambda: model(IDS),
        lambda: model(IDS, use_cache=False),
        lambda: model(IDS, logits_to_keep=2),
        lambda: loss(model),
    ]
    with patched_by(model, spec) as patched, torch.no_grad():
        said = [sentence for call in calls for sentence in told(call)]
        report = patched.report()
        patched.reset_report()
        assert not told(calls[0]), "once per patch"
    if not ahead:
        assert not said and not report.notices
        return
    later = "all later tokens" if ahead == math.inf else f"up to {ahead} later tokens"
    [sentence] = said
    assert later in sentence and spec.partition(":")[0] in sentence and "lookahead is 0" in sentence
    [(reason, count)] = report.notices.items()
    assert count == len(calls) and later in reason and "scoring" in reason
    assert f"in {count} calls of the model: {reason}" in str(report)


@pytest.mark.parametrize("spec", [BLOCKS, PROMPT, f"{BLOCKS} + quest:k=16,page=4,dense_layers=0"])
def test_calls_that_score_nothing_are_quiet(tiny_llama: Any, spec: str) -> None:
    model = tiny_llama()
    few = IDS[:, :4]

    def calls() -> None:
        model.generate(IDS, max_new_tokens=3, do_sample=False)
        model(IDS, logits_to_keep=1)
        model.model(IDS)  # hidden states alone
        cache = DynamicCache(config=model.config)
        model(IDS, past_key_values=cache, logits_to_keep=1)
        model(few, past_key_values=cache)  # a decode step of four candidates
        model(few)  # every key is read

    with farspan.patch(model, spec) as patched, torch.no_grad():
        assert not told(calls)
        assert not patched.report().notices
    with farspan.patch(model, spec, crossover=100) as patched, torch.no_grad():
        assert not told(lambda: model(IDS)), "below the crossover it is dense"
        assert not patched.report().notices


def test_what_is_said_is_true(tiny_llama: Any) -> None:
    """Other tokens later on change the logits of a block's earlier positions under a method that looks ahead,
    and under no other."""
    model = tiny_llama(initializer_range=0.15).double()
    other = IDS.clone()
    other[:, 60:] = IDS[:, 60:].flip(1)
    for spec, ahead in AHEAD.items():
        with patched_by(model, spec), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            moved = (model(IDS).logits - model(other).logits)[0, :60].abs().amax(1) > 1e-9
        first = int(moved.nonzero()[0]) if bool(moved.any()) else 60
        assert first >= 60 - ahead, spec


def test_training_is_flagged(tiny_llama: Any) -> None:
    model = tiny_llama()
    with farspan.patch(model, PROMPT) as patched:
        with pytest.warns(UserWarning, match="pbs.*last queries.*another prefill") as caught:
            loss(model).backward()
        assert not [one for one in caught if SENTENCE in str(one.message)], (
            "training has a warning of its own"
        )
        assert not patched.report().notices
    with farspan.patch(model, PROMPT, strict=True), pytest.raises(FarspanError, match="last queries"):
        loss(model)
    with farspan.patch(model, BLOCKS), pytest.warns(UserWarning, match=SENTENCE):
        loss(model).backward()
    with farspan.patch(model, "window:w=16"), warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(model).backward()


def test_the_readme_names_them() -> None:
    text = (Path(farspan.__file__).parent / "README.md").read_text()
    names = r"((?:`\w+`[,\s and]*)+)"
    found = re.search(rf"\n{names} select for a block of queries together, {names}", text)
    assert found
    named = [set(re.findall(r"`(\w+)`", part)) for part in found.groups()]
    ahead = {name: cls().lookahead for name, cls in methods().items() if cls().lookahead.tokens}
    by_prompt = {name for name, lookahead in ahead.items() if lookahead.is_prompt}
    assert named == [ahead.keys() - by_prompt, by_prompt]


def test_the_report_says_so(tiny_llama: Any) -> None:
    model, sentence = tiny_llama(), "selects by a prompt's last queries"
    for spec, said in ((PROMPT, True), (BLOCKS, False), ("dense + snapkv", False)):
        with farspan.patch(model, spec) as patched, torch.no_grad():
            loss(model)
            assert (sentence in str(patched.report())) == said
            phases = [layer.phases["prefill"].lookahead for layer in patched.report().layers]
            assert (phases == [Lookahead.prompt()] * 2) == said
