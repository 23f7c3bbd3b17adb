"""RULER's question answering: the documents of a data set, among them those that hold the answer.

qa_1 is SQuAD 2.0 (development set, answerable questions), qa_2 is HotpotQA (development set, distractor
setting), as published. They come from local files in their published JSON, or from the package `datasets`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from ...attention.errors import FarspanError
from ..sample import rng_for
from ..shape import Shape, misfit
from .constants import QA_BETWEEN, QA_DOCUMENT, QUESTION_ANSWERING
from .draws import Builder, Cell, Draft, filled

FILES = {
    "qa_1": "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",
    "qa_2": "http://curtis.ml.cmu.edu/datasets/hotpot/hotpot_dev_distractor_v1.json",
}
"""Where the published files are."""
SETS = {"qa_1": ("rajpurkar/squad_v2", None), "qa_2": ("hotpotqa/hotpot_qa", "distractor")}
"""The same on the hub: name and configuration."""

_SQUAD: Shape = [{"paragraphs": [{"context": str, "qas": [{"question": str, "answers": [{"text": str}]}]}]}]
_HOTPOT: Shape = [{"question": str, "answer": str, "context": [list]}]


@dataclass(frozen=True, kw_only=True)
class Question:
    """`gold` are the numbers of the documents that belong to it, `related` those that are taken before all
    others."""

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The questions of a data set in its order, and its documents, sorted and without repeats."""

    name: str
    documents: tuple[str, ...]
    questions: tuple[Question, ...]

    @property
    def recipe(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": _digest(self)}


def load_files(paths: Sequence[str | Path]) -> dict[str, Questions]:
    """The questions of local files by task. A file is SQuAD's or HotpotQA's by what is in it.

    Raises FarspanError for a file that cannot be read or is neither.
    """
    found: dict[str, Questions] = {}
    for path in map(Path, paths):
        try:
            data = json.loads(path.expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FarspanError(
                f"--qa-data {path} cannot be read ({error}); give SQuAD's or HotpotQA's JSON file."
            ) from None
        if isinstance(data, dict) and misfit(data.get("data"), _SQUAD, "data") is None:
            found["qa_1"] = squad(data["data"], path.name)
        elif misfit(data, _HOTPOT, "it") is None:
            found["qa_2"] = hotpot(data, path.name)
        else:
            raise FarspanError(
                f"--qa-data {path} is neither SQuAD's JSON (an object with \"data\") nor HotpotQA's (a "
                'list of objects with "question", "answer" and "context"); give their published files.'
            )
    return found


def load_questions(task: str, given: Mapping[str, Questions] | None = None) -> Questions:
    """The questions of a task: those given, or else from the package `datasets`, which keeps what it has
    fetched. Raises FarspanError, with the two commands that fetch the files, where neither is there."""
    questions = (given or {}).get(task) or _fetched(task)
    if not questions.questions:
        raise FarspanError(f"{questions.name} has no question with an answer; give another file for {task}.")
    return questions


def squad(articles: Iterable[Mapping[str, Any]], name: str) -> Questions:
    """SQuAD's articles: documents are paragraphs, and those of the question's article are related."""
    parts = [[(p["context"], p["qas"]) for p in article["paragraphs"]] for article in articles]
    documents = sorted({context for article in parts for context, _ in article})
    number = {context: i for i, context in enumerate(documents)}
    questions = []
    for article in parts:
        every = tuple(dict.fromkeys(number[context] for context, _ in article))
        for context, asked in article:
            gold = number[context]
            for question in asked:
                answers = tuple(dict.fromkeys(answer["text"] for answer in question["answers"]))
                if answers and not question.get("is_impossible"):
                    others = tuple(i for i in every if i != gold)
                    questions.append(
                        Question(query=question["question"], answers=answers, gold=(gold,), related=others)
                    )
    return Questions(name=name, documents=tuple(documents), questions=tuple(questions))


def hotpot(rows: Iterable[Mapping[str, Any]], name: str) -> Questions:
    """HotpotQA's rows: documents are titles and paragraphs, ten of which belong to a question."""
    every = [(row, [f"{title}\n{''.join(text)}" for title, text in row["context"]]) for row in rows]
    documents = sorted({document for _, texts in every for document in texts})
    number = {document: i for i, document in enumerate(documents)}
    questions = tuple(
        Question(
            query=row["question"],
            answers=(row["answer"],),
            gold=tuple(dict.fromkeys(number[text] for text in texts)),
        )
        for row, texts in every
    )
    return Questions(name=name, documents=tuple(documents), questions=questions)


def question_of(cell: Cell, data: Questions) -> Question:
    """The sample's question: the same at every length, and drawn without repeats as long as there are others.
    The published generator (compat) takes them in the data's order, neighbours of one article."""
    count = len(data.questions)
    if cell.compat:
        return data.questions[cell.index % count]
    return data.questions[_order(cell.seed, cell.task, count)[cell.index % count]]


def question_answering(cell: Cell, data: Questions) -> Builder:
    """The builder of one sample. A unit is a document: those of the question, then related ones, then any.
    The documents stand in random order, so that those of the question may stand anywhere.

    In the published generator (compat) the order depends on the number of documents and the seed alone, so
    SQuAD's paragraph has the same place in all prompts with the same number of documents.
    """
    question = question_of(cell, data)
    drawn = list(question.related)
    rng = cell.rng("documents")
    rng.shuffle(drawn)
    more = _others(rng, len(data.documents), {*question.gold, *drawn})

    def build(units: int) -> Draft:
        others = units - len(question.gold)
        drawn.extend(islice(more, max(others - len(drawn), 0)))
        numbers = [*question.gold, *drawn[:others]]
        cell.order("order").shuffle(numbers)
        texts = (
            QA_DOCUMENT.format(number=place, document=data.documents[i]) for place, i in enumerate(numbers, 1)
        )
        context, asked, answer_prefix = filled(
            QUESTION_ANSWERING, QA_BETWEEN.join(texts), query=question.query
        )
        return Draft(
            context=context,
            question=asked,
            answer_prefix=answer_prefix,
            references=question.answers,
            gold=f" {question.answers[0]}",
            extra={"true_depths": [numbers.index(i) / max(len(numbers) - 1, 1) for i in question.gold]},
        )

    return build


def _others(rng: random.Random, count: int, taken: set[int]) -> Iterator[int]:
    """All numbers below ``count`` that are not taken, in random order."""
    seen = set(taken)
    while 2 * len(seen) < count:
        drawn = rng.randrange(count)
        if drawn not in seen:
            seen.add(drawn)
            yield drawn
    rest = [i for i in range(count) if i not in seen]
    rng.shuffle(rest)
    yield from rest


@lru_cache(maxsize=4)
def _order(seed: int, task: str, count: int) -> tuple[int, ...]:
    order = list(range(count))
    rng_for("ruler", seed, task, "questions").shuffle(order)
    return tuple(order)


@lru_cache(maxsize=4)
def _digest(data: Questions) -> str:
    digest = hashlib.sha256(json.dumps([data.documents, [vars(q) for q in data.questions]]).encode())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=2)
def _fetched(task: str) -> Questions:
    name, config = SETS[task]
    try:
        from datasets import load_dataset

        rows = load_dataset(name, config, split="validation")
    except Exception as error:  # the package, the network, the hub
        raise FarspanError(_how_to_fetch(task, error)) from None
    read: Callable[[Any], Questions] = _of_squad_rows if task == "qa_1" else _of_hotpot_rows
    return read(rows)


def _how_to_fetch(task: str, error: Exception) -> str:
    reason = (str(error).split("\n")[0] or type(error).__name__).rstrip(".")[:200]
    names = ",".join(url.rpartition("/")[2] for url in FILES.values())
    lines = "".join(f"\n    curl -LO {url}" for url in FILES.values())
    return (
        f"ruler task {task} needs a data set that cannot be fetched here ({reason}); fetch the files where "
        f"there is a network, and give them with --qa-data {names}, or leave the task out:{lines}"
    )


def _of_squad_rows(rows: Iterable[Mapping[str, Any]]) -> Questions:
    articles: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        answers = [{"text": text} for text in row["answers"]["text"]]
        paragraphs = articles.setdefault(row["title"], {})
        paragraphs.setdefault(row["context"], []).append({"question": row["question"], "answers": answers})
    grouped = [
        {"paragraphs": [{"context": context, "qas": asked} for context, asked in paragraphs.items()]}
        for paragraphs in articles.values()
    ]
    return squad(grouped, SETS["qa_1"][0])


def _of_hotpot_rows(rows: Iterable[Mapping[str, Any]]) -> Questions:
    listed = (
        {
            "question": row["question"],
            "answer": row["answer"],
            "context": list(zip(row["context"]["title"], row["context"]["sentences"], strict=True)),
        }
        for row in rows
    )
    return hotpot(listed, SETS["qa_2"][0])
