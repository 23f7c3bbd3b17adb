"""Sample: prompt to tokens, scoring, keys, seeds, and the search that fills a length."""

from __future__ import annotations

import copy
import random
from datetime import date
from types import SimpleNamespace
from typing import Any

import pytest

from farspan import FarspanError
from farspan.evals.sample import (
    Sample,
    check_numbers,
    encode,
    encode_gold,
    fill,
    key,
    rng_for,
    score,
    string_match_all,
)


def sample(**changes: Any) -> Sample:
    fields: dict[str, Any] = {
        "suite": "ruler",
        "task": "niah_single_1",
        "length": 1024,
        "index": 3,
        "seed": 1,
        "context": "The magic number is 42.\n",
        "question": "What is the magic number?",
        "answer_prefix": " The magic number is",
        "references": ("42",),
        "gold": " 42.",
        "max_new_tokens": 8,
        "recipe": {},
        "extra": {},
    }
    return Sample(**(fields | changes))


class Letters:
    """A tokenizer with one token per character, a BOS before and an EOS behind unless told otherwise."""

    chat_template = None
    eos_token_id = 2

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Any:
        ids = [ord(letter) for letter in text]
        return SimpleNamespace(input_ids=[1, *ids, 2] if add_special_tokens else ids)


class Pairs(Letters):
    """One token per two characters: a prompt of odd length merges with its answer."""

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Any:
        return SimpleNamespace(input_ids=[text[at : at + 2] for at in range(0, len(text), 2)])


def test_chat_prompt_is_the_template_then_the_answer_prefix(smollm2_tokenizer: Any) -> None:
    ids = encode(smollm2_tokenizer, sample())
    assert smollm2_tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nThe magic number is 42.\nWhat is the magic number?<|im_end|>\n"
        "<|im_start|>assistant\n The magic number is"
    )
    assert ids.count(smollm2_tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3


def test_plain_prompt_keeps_the_bos_and_stays_open_at_its_end() -> None:
    ids = encode(Letters(), sample())
    text = "The magic number is 42.\nWhat is the magic number? The magic number is"
    assert ids == [1, *map(ord, text)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("\n{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}", "\n26 Jul 2024 The magic"),
        ("{{ strftime_now('%d %B %Y') }} {{ messages[0]['content'] }}", "26 July 2024 The magic"),
        (
            "{% if not date_string is defined %}{% if strftime_now is defined %}"
            "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}"
            "{% for message in messages %}{{ date_string }} {{ message['content'] }}{% endfor %}",
            "26 Jul 2024 The magic",
        ),
    ],
)
def test_a_template_with_todays_date_gives_the_same_prompt_every_day(
    smollm2_tokenizer: Any, template: str, expected: str
) -> None:
    tokenizer = copy.copy(smollm2_tokenizer)
    tokenizer.chat_template = template
    text = tokenizer.decode(encode(tokenizer, sample()))
    assert text.startswith(expected)
    assert str(date.today().year) not in text.replace("2024", "")
    assert tokenizer.chat_template == template


def test_gold_tokens_continue_the_prompt(smollm2_tokenizer: Any) -> None:
    one = sample()
    text = smollm2_tokenizer.decode(encode(smollm2_tokenizer, one))
    together = smollm2_tokenizer(text + one.gold, add_special_tokens=False).input_ids
    assert encode(smollm2_tokenizer, one) + encode_gold(smollm2_tokenizer, one) == together
    assert encode_gold(Letters(), one) == [ord(letter) for letter in " 42."]


def test_gold_is_encoded_alone_where_it_would_merge_with_the_prompt() -> None:
    odd = sample(answer_prefix=" is" + "x" * (len(sample().user) % 2 == 0))
    even = sample(answer_prefix=" is" + "x" * (len(sample().user) % 2 == 1))
    assert len(odd.user + odd.answer_prefix) % 2 != len(even.user + even.answer_prefix) % 2
    assert encode_gold(Pairs(), odd) == encode_gold(Pairs(), even) == [" 4", "2."]


class Chats(Letters):
    """A chat format that writes its special tokens as ids, without a template, as Mistral's tokenizers do."""

    def apply_chat_template(self, conversation: Any, *, add_generation_prompt: bool, tokenize: bool) -> Any:
        assert add_generation_prompt and tokenize
        return {"input_ids": [1, 3, *map(ord, conversation[0]["content"]), 4]}


def test_a_chat_format_without_a_template_is_used() -> None:
    one = sample()
    assert encode(Chats(), one) == [1, 3, *map(ord, one.user), 4, *map(ord, one.answer_prefix)]
    assert encode_gold(Chats(), one) == [*map(ord, one.gold)]


def test_key_names_the_cell_and_the_sample() -> None:
    assert key(sample()) == "ruler/niah_single_1/1024/3"
    needle = sample(suite="needle", task="needle", extra={"depth": 0.25})
    assert key(needle) == "needle/needle/1024/depth=0.25/3"


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        (" 42.", ("42",), 1.0),
        ("nothing", ("42",), 0.0),
        ("", ("42", "43"), 0.0),
        ("42 and 44", ("42", "43"), 0.5),
        ("the FOX and the hen", ("fox", "HEN", "cow", "cat"), 0.5),
        ("1429", ("42",), 1.0),  # a substring, as published
        ("4\x002", ("42",), 0.0),  # a control character is a line's end, not nothing
        ("42\x00\x1f43", ("42", "43"), 1.0),
        ("43 42 41", ("41", "42", "43"), 1.0),  # in any order
    ],
)
def test_score_is_the_fraction_of_references_found(
    answer: str, references: tuple[str, ...], expected: float
) -> None:
    assert score(sample(references=references), answer) == expected
    assert string_match_all(answer, references) == expected


def test_seeds_give_the_same_stream_on_every_machine() -> None:
    # Recorded once; a change here changes every prompt ever made.
    assert [rng_for("ruler", 1, "vt", 4096, 0, "chain").randrange(10**6) for _ in range(2)] == [
        691455,
        691455,
    ]
    assert rng_for("a", 1).random() != rng_for("a", 2).random()
    assert rng_for("a", "1").random() != rng_for("a", 1).random()


@pytest.mark.parametrize("seed", range(40))
def test_fill_finds_what_a_linear_scan_finds(seed: int) -> None:
    rng = random.Random(seed)
    start, step = rng.randrange(50), rng.choice([1, 2, 3, 25, 80])
    sizes = [start]
    while sizes[-1] < 6000:
        sizes.append(sizes[-1] + rng.randrange(1, 2 * step))
    length = rng.randrange(sizes[5], 5000)
    calls: list[int] = []

    def total(units: int) -> int:
        calls.append(units)
        return sizes[units] if units < len(sizes) else sizes[-1] + 3 * units

    best = max(units for units, size in enumerate(sizes) if size <= length and units >= 5)
    assert fill(total, length, minimum=5, what="this") == best
    assert len(calls) <= 40


@pytest.mark.parametrize("seed", range(20))
def test_fill_is_within_one_unit_where_tokens_go_up_and_down(seed: int) -> None:
    rng = random.Random(seed)
    noise = [rng.randrange(-9, 10) for _ in range(5000)]

    def total(units: int) -> int:
        return 30 + 2 * units + noise[units]

    units = fill(total, 2000, minimum=1, what="this")
    assert total(units) <= 2000 < total(units + 1)


def test_fill_says_how_long_the_shortest_prompt_is() -> None:
    with pytest.raises(
        FarspanError, match=r"ruler task vt needs a length of at least 107 tokens .* 100 was given"
    ):
        fill(lambda units: 100 + units, 100, minimum=7, what="ruler task vt")
    assert fill(lambda units: 100 + units, 107, minimum=7, what="ruler task vt") == 7


def test_fill_ends_where_units_add_no_tokens() -> None:
    with pytest.raises(FarspanError, match="could not be filled"):
        fill(lambda units: 5, 100, minimum=1, what="this")


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({"length": 0, "count": 1, "seed": 1}, "length 0 is not a whole number of at least 1"),
        ({"length": "1024", "count": 1, "seed": 1}, "length '1024' is not"),
        ({"length": 10, "count": 0, "seed": 1}, "count 0 is not"),
        ({"length": 10, "count": True, "seed": 1}, "count True is not"),
        ({"length": 10, "count": 1, "seed": 1.5}, "seed 1.5 is not a whole number"),
    ],
)
def test_wrong_numbers_are_refused_in_a_sentence(numbers: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FarspanError, match=sentence):
        check_numbers(**numbers)
