"""Fixtures of the evaluations' tests."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    """The tokenizer of smollm2-135m with its chat template, without the model's weights in memory."""
    from transformers import AutoTokenizer

    from farspan.runtime.models import resolve

    return AutoTokenizer.from_pretrained(resolve("smollm2-135m"))
