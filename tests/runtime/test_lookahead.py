"""Methods that select by a prompt's last queries say so where likelihoods of the prompt are asked for."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import farspan
from farspan import FarspanError

PROMPT = "pbs:mass=0.3,block=8,segment=16"


def loss(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 128, (1, 90), generator=torch.Generator().manual_seed(0))
    return model(ids, labels=ids, use_cache=False).loss


def test_training_is_flagged(tiny_llama: Any) -> None:
    model = tiny_llama()
    with farspan.patch(model, PROMPT), pytest.warns(UserWarning, match="pbs.*last queries.*another prefill"):
        loss(model).backward()
    with farspan.patch(model, PROMPT, strict=True), pytest.raises(FarspanError, match="last queries"):
        loss(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with farspan.patch(model, "block_topk:k=32,block=8"):
            loss(model).backward()
        with farspan.patch(model, PROMPT), torch.no_grad():
            loss(model)


def test_the_report_says_so(tiny_llama: Any) -> None:
    model, sentence = tiny_llama(), "selects by a prompt's last queries"
    for spec, said in ((PROMPT, True), ("block_topk:k=32,block=8", False), ("dense + snapkv", False)):
        with farspan.patch(model, spec) as patched, torch.no_grad():
            loss(model)
            assert (sentence in str(patched.report())) == said
            phases = [layer.phases["prefill"].lookahead for layer in patched.report().layers]
            assert (phases == ["prompt"] * 2) == said
