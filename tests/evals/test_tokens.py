"""Counting a prompt's tokens by its words: the count of the whole prompt, or none of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from farspan.evals import ruler
from farspan.evals.sample import Sample, encode
from farspan.evals.tokens import PromptLength

from .ruler_tools import ALL


def prompt(text: str) -> Sample:
    return Sample(
        suite="ruler",
        task="vt",
        length=4096,
        index=0,
        seed=1,
        context=text,
        question="\nAnd now?",
        answer_prefix=" It is",
        references=("x",),
        gold=" x",
        max_new_tokens=8,
        recipe={},
        extra={},
    )


TEXTS = [
    "One two three. Four five, six. Seven eight (nine). Ten.\nEleven twelve. " * 20,
    "A line.\n A space behind the end of a line. Two  spaces. Three   of them.\n\n\tTabs. " * 5,
    "well-known red--blue T-shirt x-1 -dash dash- 12-34 1234567. 'quoted'. don't it's $5.",
    "one -known well-known -known known-well red-dash -dash dash and -well.",
    "Ünïcödé naïve-ly 世界 。 ok é. And so on.",
    "aa bb cc. " * 100 + "last sentence without an end and a rather long one",
    "one",
    "one two",
    " leading space. And a trailing one ",
    "x" * 300 + " y. " + "z" * 5000 + " w. The end.",
]


@pytest.mark.parametrize("text", TEXTS)
def test_words_have_the_tokens_that_they_have_in_the_prompt(smollm2_tokenizer: Any, text: str) -> None:
    counted = PromptLength(smollm2_tokenizer)
    for repeated in (text, text + text, text):  # the second time, all words are known
        sample = prompt(repeated)
        assert counted(sample) == len(encode(smollm2_tokenizer, sample))
    assert counted.agrees(prompt(text)) and counted.by_words


@pytest.mark.parametrize("task", ALL)
def test_every_tasks_prompts_are_counted_by_their_words(smollm2_tokenizer: Any, task: str) -> None:
    counted = PromptLength(smollm2_tokenizer)
    for sample in ruler.make_samples(smollm2_tokenizer, task, 1500, 3, 2):
        assert counted(sample) == len(encode(smollm2_tokenizer, sample))


def test_a_tokenizer_whose_words_do_not_add_up_encodes_whole_prompts(smollm2_tokenizer: Any) -> None:
    counted = PromptLength(smollm2_tokenizer)
    sample = prompt("One two three. " * 30)
    assert counted(sample) == len(encode(smollm2_tokenizer, sample))
    counted._words["two"] = counted._sentences["One two three"] = 99
    assert counted(sample) != len(encode(smollm2_tokenizer, sample))
    assert not counted.agrees(sample) and not counted.by_words
    assert counted(sample) == len(encode(smollm2_tokenizer, sample))


def test_what_is_kept_is_bounded(smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farspan.evals.tokens._MOST", 20)
    counted = PromptLength(smollm2_tokenizer)
    for start in range(0, 2000, 50):
        sample = prompt(" ".join(f"word{i} and more. And" for i in range(start, start + 40)))
        assert counted(sample) == len(encode(smollm2_tokenizer, replace(sample)))
        assert len(counted._words) < 200 and len(counted._sentences) < 200
