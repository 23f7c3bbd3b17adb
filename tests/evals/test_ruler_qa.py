"""RULER's qa_1 and qa_2: their documents and answers, from local files; and the published generator's
quirks."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import chisquare

from farspan import FarspanError
from farspan.evals import ruler
from farspan.evals.ruler import constants, draws, niah, qa
from farspan.evals.sample import encode, score

from .qa_data import hotpot, paragraph, squad, write
from .ruler_tools import Words, haystack, samples

ASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other "
    "words.\n\n"
)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, qa.Questions]:
    return qa.load_files(write(tmp_path_factory.mktemp("qa")))


def documents(sample: Any) -> list[str]:
    """The documents of a prompt in their order; their numbers must run from 1."""
    text = sample.context.removeprefix(f"{ASK}The following are given documents.\n\n").removesuffix("\n")
    parts = re.split(r"(?:^|\n\n)Document (\d+):\n", text)
    assert parts[0] == "" and list(map(int, parts[1::2])) == list(range(1, len(parts) // 2 + 1))
    return parts[2::2]


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_wording_answers_and_documents(questions: dict[str, qa.Questions], task: str) -> None:
    for sample in samples(task, 1500, 8, questions=questions):
        number = int(re.findall(r"gate (\d+)\?$", sample.question)[0])
        assert sample.question == f"\n{ASK}Question: What colour is gate {number}?"
        assert (sample.answer_prefix, sample.max_new_tokens, sample.metric) == (" Answer:", 32, "part")
        assert sample.gold == f" colour{number}x" and score(sample, sample.gold) == 1
        found = documents(sample)
        assert len(found) == len(set(found)) == sample.recipe["units"]
        assert sum(f"colour{number}x" in text for text in found) == 1, "the answer is in one document"
        if task == "qa_1":
            assert sample.references == (f"colour{number}x", f"Colour{number}X")
            same = {paragraph(n) for n in range(number - number % 6, number - number % 6 + 6)}
            assert same <= set(found), "those of its article come before others"
        else:
            assert sample.references == (f"colour{number}x",)
            assert {
                f"Gate {n}\n{paragraph(n)} It has two towers." for n in range(number, number + 10)
            } <= set(found)


def test_half_an_answer_is_the_best_reference_and_not_the_mean() -> None:
    sample = next(iter(samples("qa_1", 1500, 1, questions={"qa_1": qa.squad(squad()["data"], "made")})))
    assert score(sample, f"It is {sample.references[0].upper()}.") == 1
    assert score(sample, "I do not know.") == 0


def test_prompts_are_full_and_depend_on_their_coordinates_alone(
    questions: dict[str, qa.Questions], smollm2_tokenizer: Any
) -> None:
    for task in ("qa_1", "qa_2"):
        for sample in ruler.make_samples(smollm2_tokenizer, task, 3000, 2, 1, questions=questions):
            assert len(encode(smollm2_tokenizer, sample)) + 32 <= 3000
            more = {**sample.recipe, "units": sample.recipe["units"] + 1, "prompt_tokens": None}
            longer = ruler.rebuild(smollm2_tokenizer, more, questions=questions)
            assert len(encode(smollm2_tokenizer, longer)) + 32 > 3000
        three = samples(task, 1500, 3, questions=questions)
        assert samples(task, 1500, 1, questions=questions) == three[:1]
        assert (
            ruler.rebuild(Words(), json.loads(json.dumps(three[2].recipe)), questions=questions) == three[2]
        )
        longer_ones = samples(task, 2000, 3, questions=questions)
        assert [s.question for s in longer_ones] == [s.question for s in three], (
            "lengths are compared by question"
        )
        other = samples(task, 1500, 3, seed=2, questions=questions)
        assert [s.question for s in other] != [s.question for s in three]
    recipe = samples("qa_1", 1500, 1, questions=questions)[0].recipe
    with pytest.raises(FarspanError, match="give that data"):
        ruler.rebuild(Words(), recipe, questions={"qa_1": qa.squad(squad(13)["data"], "other")})


def test_the_answers_document_stands_anywhere_but_in_the_published_generator_in_one_place(
    questions: dict[str, qa.Questions],
) -> None:
    places: dict[bool, Counter[int]] = {False: Counter(), True: Counter()}
    for compat in places:
        for sample in samples("qa_1", 850, 60, questions=questions, compat=compat):
            found = documents(sample)
            (place,) = [i for i, text in enumerate(found) if sample.references[0] in text]
            places[compat][place] += 1
            assert sample.extra["true_depths"] == [place / (len(found) - 1)]
            assert len(found) % 10 == 0 or not compat
    assert len(places[True]) == 1 and len(places[False]) > 8
    first = samples("qa_1", 850, 3, questions=questions, compat=True)
    assert [s.references[0] for s in first] == ["colour0x", "colour1x", "colour2x"], "the file's order"


def test_too_few_documents_are_refused_and_all_taken_with_compat(questions: dict[str, qa.Questions]) -> None:
    with pytest.raises(
        FarspanError, match=r"qa_1 at 9000 tokens needs more documents than the 72 .* make \d+ tokens"
    ):
        samples("qa_1", 9000, 1, questions=questions)
    (sample,) = samples("qa_1", 9000, 1, questions=questions, compat=True)
    assert len(documents(sample)) == 72
    with pytest.raises(FarspanError, match=r"qa_2 needs a length of at least \d+ tokens"):
        samples("qa_2", 300, 1, questions=questions)


def test_files_that_are_neither_and_no_network_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.json").write_text('{"data": 3}')
    with pytest.raises(FarspanError, match=r"other\.json is neither SQuAD's JSON .* nor HotpotQA's"):
        qa.load_files([tmp_path / "other.json"])
    with pytest.raises(FarspanError, match=r"nowhere\.json cannot be read"):
        qa.load_files([tmp_path / "nowhere.json"])
    datasets = pytest.importorskip("datasets")

    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FarspanError) as caught:
        ruler.make_samples(Words(), "qa_1", 1500, 1, 1)
    said = str(caught.value)
    assert "(no route to host)" in said and "--qa-data dev-v2.0.json,hotpot_dev_distractor_v1.json" in said
    assert re.findall(r"\n    curl -LO (\S+)", said) == list(qa.FILES.values())


def test_rows_of_the_package_datasets_are_the_same_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "rajpurkar/squad_v2": [
            {
                "title": article["title"],
                "context": part["context"],
                "question": asked["question"],
                "answers": {"text": [answer["text"] for answer in asked["answers"]], "answer_start": []},
            }
            for article in squad()["data"]
            for part in article["paragraphs"]
            for asked in part["qas"]
        ],
        "hotpotqa/hotpot_qa": [
            row
            | {
                "context": {
                    "title": [t for t, _ in row["context"]],
                    "sentences": [p for _, p in row["context"]],
                }
            }
            for row in hotpot()
        ],
    }
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: rows[name])
    qa._fetched.cache_clear()
    made = {"qa_1": qa.squad(squad()["data"], "x"), "qa_2": qa.hotpot(hotpot(), "x")}
    for task, expected in made.items():
        found = qa.load_questions(task)
        assert (found.documents, found.questions) == (expected.documents, expected.questions)
    qa._fetched.cache_clear()


def test_compat_fills_in_the_published_steps_and_counts_the_answer() -> None:
    steps = {"niah_single_1": 5, "niah_single_2": 500, "niah_multikey_2": 5, "vt": 10, "cwe": 10, "fwe": 96}
    for task, step in steps.items():
        fine, coarse = samples(task, 3072, 2), samples(task, 3072, 2, compat=True)
        for sample, exact in zip(coarse, fine, strict=True):
            assert sample.recipe["units"] % step == 0 and sample.recipe["compat"] is True
            assert exact.recipe["units"] - 2 * step < sample.recipe["units"] <= exact.recipe["units"]
            assert ruler.rebuild(Words(), sample.recipe) == sample
    (longer,) = samples("niah_single_1", 4096, 1, compat=True)
    assert longer.recipe["units"] % 25 == 0


def test_compat_has_one_order_for_all_prompts() -> None:
    def order(sample: Any) -> list[int]:
        text = haystack(sample)
        return [i for i, _ in sorted(enumerate(map(text.index, sample.references)), key=lambda item: item[1])]

    for compat, orders in ((True, 1), (False, 5)):
        found = {tuple(order(s)) for s in samples("niah_multivalue", 1024, 12, compat=compat)}
        assert (len(found) == 1) if compat else (len(found) >= orders)
    layouts = {
        compat: {
            re.sub(r"[A-Z]{3}\b", "NAME", s.context.split(", they are: ")[0])
            for s in samples("vt", 2048, 4, compat=compat)
        }
        for compat in (True, False)
    }
    assert len(layouts[True]) == 1 and len(layouts[False]) == 4


def test_depths_are_covered_uniformly() -> None:
    """40 depths in a haystack of 4,000 sentences, where each has its own place."""
    cells = (draws.Cell(task="niah_single_2", length=131072, index=i, seed=1) for i in range(4000))
    found = Counter(niah.essay_places(4000, 1, cell)[0] for cell in cells)
    assert set(found) == {40 * depth for depth in constants.DEPTHS}
    assert chisquare(list(found.values())).pvalue > 0.001
    assert min(found.values()) > 60


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_shuffle_is_the_librarys(count: int) -> None:
    mine, theirs = list(range(count)), list(range(count))
    draws.shuffle(random.Random(count), mine)
    random.Random(count).shuffle(theirs)
    assert mine == theirs
