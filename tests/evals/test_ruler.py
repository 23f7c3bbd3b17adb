"""RULER: published wording and parameters, answers recomputed from the prompts, sizes, determinism."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from farspan.evals import ruler
from farspan.evals.ruler import constants, draws, words
from farspan.evals.text import load_prose, split_sentences

from .ruler_tools import ESSAY, NIAH, haystack, samples

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
FACT = re.compile(r"One of the special magic (numbers|uuids) for (.+?) is: ([0-9a-f-]+)\.")
NUMBER = r"\d{7}"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


# As published.


@pytest.mark.parametrize(
    ("task", "filler", "type_k", "type_v", "keys", "values", "queries"),
    [
        ("niah_single_1", "noise", "words", "numbers", 1, 1, 1),
        ("niah_single_2", "essay", "words", "numbers", 1, 1, 1),
        ("niah_single_3", "essay", "words", "uuids", 1, 1, 1),
        ("niah_multikey_1", "essay", "words", "numbers", 4, 1, 1),
        ("niah_multikey_2", "needle", "words", "numbers", 1, 1, 1),
        ("niah_multikey_3", "needle", "uuids", "uuids", 1, 1, 1),
        ("niah_multivalue", "essay", "words", "numbers", 1, 4, 1),
        ("niah_multiquery", "essay", "words", "numbers", 4, 1, 4),
    ],
)
def test_needle_tasks_are_the_published_table(
    task: str, filler: str, type_k: str, type_v: str, keys: int, values: int, queries: int
) -> None:
    for sample in samples(task):
        text, units = haystack(sample), sample.recipe["units"]
        facts = FACT.findall(text)
        assert all(re.fullmatch(r"\S.*-\S.*" if type_k == "words" else UUID, key) for _, key, _ in facts)
        assert all(re.fullmatch(NUMBER if type_v == "numbers" else UUID, value) for *_, value in facts)
        assert {kind for kind, *_ in facts} == {type_v}
        others = units if filler == "needle" else 0
        assert len(facts) == keys * values + others
        assert Counter(Counter(key for _, key, _ in facts).values()) == {values: keys + others}
        assert len(sample.references) == queries * values == len(set(sample.references))
        assert text.count(NOISE) == (units if filler == "noise" else 0)
        assert sample.max_new_tokens == 128


def test_the_thirteen_tasks_and_what_they_generate() -> None:
    generated = {name: task.template.tokens_to_generate for name, task in ruler.TASKS.items()}
    others = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    assert generated == dict.fromkeys(NIAH, 128) | others
    assert len(NIAH) == 8


def test_wording_for_one_value_and_for_several() -> None:
    (one,) = samples("niah_single_3", count=1)
    ((_, key, value),) = FACT.findall(haystack(one))
    assert one.context.startswith(
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz "
        "you about the uuid afterwards.\nFellow-Citizens of the Senate"
    )
    assert one.question == f"What is the special magic uuid for {key} mentioned in the provided text?"
    assert one.answer_prefix == f" The special magic uuid for {key} mentioned in the provided text is"
    assert one.gold == f" {value}."

    (four,) = samples("niah_multiquery", count=1)
    value_of = {key: value for _, key, value in FACT.findall(haystack(four))}
    asked = sorted(value_of, key=four.question.index)
    query = f"{asked[0]}, {asked[1]}, {asked[2]}, and {asked[3]}"
    assert four.context.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will "
        "quiz you about the numbers afterwards.\nFellow-Citizens of the Senate"
    )
    whole = "special magic numbers for {} mentioned in the provided text"
    assert four.question == "What are all the " + whole.format(query) + "?"
    assert four.answer_prefix == " The " + whole.format(query) + " are"
    first, second, third, fourth = (value_of[key] for key in asked)
    assert four.gold == f" {first}, {second}, {third}, and {fourth}."


def test_wording_of_vt_cwe_and_fwe() -> None:
    (vt,) = samples("vt", count=1)
    value = re.findall(r"value (\d+) in", vt.question)[0]
    opening = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    assert vt.context.startswith(opening) and vt.context.count(opening) == 2
    assert vt.question == (
        f"Question: Find all variables that are assigned the value {value} in the text above."
    )
    assert vt.answer_prefix == (
        " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are "
        f"assigned the value {value}, they are: "
    )
    (cwe,) = samples("cwe", count=1)
    opening = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize "
        "the ones that appear most often.\n1. "
    )
    assert cwe.context.startswith(opening) and cwe.context.count(opening) == 2
    assert cwe.question == "Question: What are the 10 most common words in the above list?"
    assert cwe.answer_prefix == " Answer: The top 10 words that appear most often in the list are:"
    (fwe,) = samples("fwe", count=1)
    assert fwe.context.startswith(
        "Read the following coded text and track the frequency of each coded word. Find the three most "
        "frequently appeared coded words. "
    )
    assert fwe.question == (
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
        "frequently appeared words in the above coded text?"
    )
    assert fwe.answer_prefix == (
        " Answer: According to the coded text above, the three most frequently appeared words are:"
    )


def test_the_depths_are_the_published_ones() -> None:
    assert tuple(np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int)) == constants.DEPTHS


# Answers, recomputed from the prompt.


@pytest.mark.parametrize("task", NIAH)
def test_needles_answers_are_what_the_text_says_of_the_keys_asked_for(task: str) -> None:
    for sample in samples(task, count=8):
        values: dict[str, list[str]] = {}
        for _, key, value in FACT.findall(haystack(sample)):
            values.setdefault(key, []).append(value)
        query = re.findall(r"special magic \w+ for (.+) mentioned in the provided text\?", sample.question)[0]
        if task == "niah_multiquery":
            asked = query.replace(", and ", ", ").split(", ")
            assert [values[key] for key in asked] == [[value] for value in sample.references]
        else:
            assert sorted(values[query]) == sorted(sample.references)


@pytest.mark.parametrize("task", ESSAY)
def test_needles_stand_between_sentences_at_published_depths_of_the_prose(task: str) -> None:
    drawn = set()
    for sample in samples(task, length=2048, count=10):
        blocks = re.split(FACT.pattern.replace("(", "(?:"), haystack(sample))
        prose = load_prose().pieces(sample.recipe["units"])
        assert " ".join(" ".join(blocks).split()) == "".join(prose).rstrip()
        cuts = np.cumsum([len(split_sentences(block)) for block in blocks[:-1]])
        allowed = {int(len(prose) * (depth / 100)): depth for depth in constants.DEPTHS}
        assert set(map(int, cuts)) <= set(allowed)
        drawn |= {allowed[int(cut)] for cut in cuts}
    assert len(drawn) >= 6


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "niah_multikey_3"])
def test_needles_stand_anywhere_among_the_lines(task: str) -> None:
    places = []
    for sample in samples(task, length=2048, count=30):
        lines = haystack(sample).split("\n")
        (place,) = [at for at, line in enumerate(lines) if sample.references[0] in line]
        assert len(lines) == sample.recipe["units"] + 1 and place < sample.recipe["units"]
        places.append(place / len(lines))
    assert min(places) < 0.25 and max(places) > 0.75


def assigned(text: str) -> dict[str, str]:
    """Variable -> value, by following the assignments from top to bottom."""
    held: dict[str, str] = {}
    for name, right in re.findall(r"^VAR ([A-Z]+) = (\d+|VAR [A-Z]+) ?$", text, re.MULTILINE):
        held[name] = held[right.removeprefix("VAR ")] if right.startswith("VAR ") else right
    return held


@pytest.mark.parametrize("length", [1024, 2048])
def test_variable_tracking_follows_its_chain_and_solves_its_example(length: int) -> None:
    for sample in samples("vt", length=length, count=8):
        value = re.findall(r"value (\d{5}) in", sample.question)[0]
        held = assigned(haystack(sample))
        assert tuple(held) == sample.references and set(held.values()) == {value}
        assert [len(name) for name in held] == [5] * 5
        lines = ["VAR" if line.startswith("VAR") else line for line in haystack(sample).split("\n")]
        assert Counter(lines) == {NOISE: sample.recipe["units"], "VAR": 5}
        assert lines[-1] == NOISE and all(pair != ("VAR", "VAR") for pair in pairwise(lines))
        assert sample.gold == " " + " ".join(sample.references)

        example, _, rest = sample.context.partition("\n\nMemorize")
        example, answer = example.split(", they are:  ")
        solved = assigned(example)
        assert answer.split(" ") == list(solved) and [len(name) for name in solved] == [3] * 5
        assert set(solved.values()) == set(re.findall(r"assigned the value (\d{5}) in the text", example))
        assert set(solved.values()) != {value}
        assert rest.startswith(" and track the chain(s)")


def test_the_example_of_vt_fills_500_tokens_and_no_more(smollm2_tokenizer: Any) -> None:
    line = len(smollm2_tokenizer(NOISE + "\n", add_special_tokens=False).input_ids)
    for sample in ruler.make_samples(smollm2_tokenizer, "vt", 1024, 5, 1):
        example = sample.context.split(", they are: ")[0] + ", they are: "
        tokens = len(smollm2_tokenizer(example, add_special_tokens=False).input_ids)
        assert 500 - line <= tokens <= 500


@pytest.mark.parametrize(
    ("length", "common", "uncommon", "example_words", "example_common", "example_uncommon"),
    [(1024, 6, 1, 20, 3, 1), (4095, 6, 1, 20, 3, 1), (4096, 30, 3, 40, 10, 3), (8192, 30, 3, 40, 10, 3)],
)
def test_common_words_are_the_ten_that_a_count_finds(
    length: int, common: int, uncommon: int, example_words: int, example_common: int, example_uncommon: int
) -> None:
    for sample in samples("cwe", length=length, count=3):
        counts = counted(haystack(sample))
        assert Counter(counts.values()) == {common: 10, uncommon: sample.recipe["units"] - 10}
        assert {word for word, count in counts.items() if count == common} == set(sample.references)
        assert sample.gold == "".join(f" {place}. {word}" for place, word in enumerate(sample.references, 1))

        example, answer = sample.context.split("\nBelow")[0].split("in the list are: ")
        counts = counted(example.split("appear most often.\n")[1].split("\nQuestion")[0])
        assert Counter(counts.values()) == {example_common: 10, example_uncommon: example_words - 10}
        assert set(counted(answer)) == {word for word, count in counts.items() if count == example_common}


def counted(numbered: str) -> Counter[str]:
    """How often each word of "1. word 2. word" appears; the numbers must run from 1."""
    entries = re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", numbered)
    assert [int(place) for place, _ in entries] == list(range(1, len(entries) + 1))
    return Counter(word for _, word in entries)


def test_common_words_go_on_when_the_word_list_is_used_up() -> None:
    known = {word for kind in draws.word_lists().values() for word in kind}
    cell = draws.Cell(task="cwe", length=10**6, index=0, seed=1)
    text, common = words._WordList(cell, "list").numbered(len(known) + 500, 30, 3)
    counts = counted(text)
    assert len(counts) == len(known) + 500 and known < set(counts)
    assert {word for word, count in counts.items() if count == 30} == set(common)


@pytest.mark.parametrize("length", [512, 1024, 4096])
def test_frequent_words_are_the_three_that_a_count_finds(length: int) -> None:
    for sample in samples("fwe", length=length, count=8):
        counts = Counter(haystack(sample).split(" "))
        (dots, most), *rest = counts.most_common(5)
        assert dots == "..." and all(re.fullmatch("[a-z]{6}", word) for word in set(counts) - {dots})
        assert tuple(word for word, _ in rest[:3]) == sample.references
        assert rest[0][1] > rest[1][1] > rest[2][1] > rest[3][1]
        # Zeta with alpha 2: the n-th word appears 1/n² as often as the first.
        for rank, (_, count) in enumerate(rest, 2):
            assert abs(count - most / rank**2) <= 1
        assert len(counts) <= length // 50


def test_the_shortest_frequent_words_still_have_one_answer() -> None:
    for units in range(words.FWE_MINIMUM, 5000):
        dots, *answers, fourth = words.fwe_counts(units, 5)
        assert dots > answers[0] > answers[1] > answers[2] > fourth
    _, _, _, third, fourth = words.fwe_counts(words.FWE_MINIMUM - 1, 5)
    assert third == fourth


# Size.


# The same prompts, everywhere.


# Bad input.
