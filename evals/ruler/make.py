"""RULER's samples: the text of a recipe, and how many units of haystack fill a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ...attention.errors import FarspanError
from ..sample import Sample, fill, plain_ids
from ..text import Prose
from ..tokens import PromptLength
from . import qa, vt, words
from .constants import COMPAT_FWE_SHARE, COMPAT_SHORT, COMPAT_STEPS, COMPAT_VT, NiahTask, Task
from .draws import Builder, Cell, words_recipe
from .niah import niah
from .qa import Questions

GENERATOR = 1
"""The version of the generator. It changes when the same recipe would make another prompt."""
_FULL = 0.98  # of the length; a prompt of all documents that is shorter is refused

Source = Prose | Questions | None


def draw(task: Task, source: Source, cell: Cell, recipe: dict[str, Any]) -> Callable[[int], Sample]:
    """Number of units -> the sample, with the recipe as it then is."""
    builder = _builder(task, source, cell, recipe.get("example_lines", 0))

    def sample(units: int) -> Sample:
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
            metric=task.metric,
        )

    return sample


@dataclass
class Maker:
    """Makes the samples of a task. source: the text or the questions that they are cut from, if any."""

    tokenizer: Any
    task: Task
    source: Source
    _counted: PromptLength = field(init=False)
    _tested: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._counted = PromptLength(self.tokenizer)

    def make(self, cell: Cell) -> Sample:
        """The sample of a cell, filled to its length.

        The first prompt, and the same one with a unit more, are also encoded whole. If they have other
        numbers of tokens than the words say, this prompt and all later ones are filled by encoding them
        whole.
        """
        units, sample = self._filled(cell)
        if not self._tested:
            self._tested = True
            _, most = _limits(self.task, self.source, cell)
            more = units + 1 if most is None else min(units + 1, most)
            if not all([self._counted.agrees(sample(units)), self._counted.agrees(sample(more))]):
                units, sample = self._filled(cell)
        return sample(units)

    def _filled(self, cell: Cell) -> tuple[int, Callable[[int], Sample]]:
        """The number of units, and the sample for any number."""
        recipe = self._recipe(cell)
        sample = draw(self.task, self.source, cell, recipe)
        generated = self.task.template.tokens_to_generate

        @cache
        def total(units: int) -> int:
            return self._counted(sample(units)) + generated

        minimum, most = _limits(self.task, self.source, cell)
        what = f"ruler task {self.task.name}"
        if cell.compat:
            answer = plain_ids(self.tokenizer, " " + " ".join(sample(minimum).references))
            step, unlimited = _step(self.task, cell), most if most is not None else 1 << 62
            steps = fill(
                lambda count: total(min(count * step, unlimited)) + len(answer),
                cell.length,
                minimum=-(-minimum // step),
                what=f"{what} with --compat",
                most=None if most is None else -(-most // step),
            )
            units = min(steps * step, unlimited)
        else:
            units = fill(total, cell.length, minimum=minimum, what=what, most=most)
            if units == most and total(units) < _FULL * cell.length:
                raise FarspanError(
                    f"{what} at {cell.length} tokens needs more documents than the {most} of its data, which "
                    f"make {total(units)} tokens; give a shorter length or larger data."
                )
        recipe["units"] = units
        recipe["prompt_tokens"] = total(units) - generated
        return units, sample

    def _recipe(self, cell: Cell) -> dict[str, Any]:
        task = self.task
        recipe: dict[str, Any] = {
            "suite": "ruler",
            "generator": GENERATOR,
            "task": task.name,
            "length": cell.length,
            "index": cell.index,
            "seed": cell.seed,
        }
        if cell.compat:
            recipe["compat"] = True
        if self.source is not None:
            recipe["haystack" if isinstance(self.source, Prose) else "questions"] = self.source.recipe
        kinds = (getattr(task, "type_k", None), getattr(task, "type_v", None))
        if task.haystack == "words" or "words" in kinds:
            recipe["words"] = words_recipe()
        if task.name == "vt":
            recipe["example_lines"] = vt.example_lines(
                cell, lambda text: len(plain_ids(self.tokenizer, text))
            )
        return recipe


def _step(task: Task, cell: Cell) -> int:
    """The units by which the published generator fills a prompt."""
    short, small = COMPAT_SHORT
    if task.name == "vt":
        return COMPAT_VT
    if task.haystack in ("noise", "needle") and cell.length < short:
        return small
    return COMPAT_STEPS.get(task.haystack, max(cell.length // COMPAT_FWE_SHARE, 1))


def _limits(task: Task, source: Source, cell: Cell) -> tuple[int, int | None]:
    """The least number of units, and the largest where there is one."""
    if isinstance(task, NiahTask):
        return task.keys * task.values, None
    if isinstance(source, Questions):
        return len(qa.question_of(cell, source).gold), len(source.documents)
    return {"vt": vt.MINIMUM, "cwe": words.CWE_MINIMUM}.get(task.name, words.FWE_MINIMUM), None


def _builder(task: Task, source: Source, cell: Cell, example_lines: int) -> Builder:
    if isinstance(task, NiahTask):
        return niah(task, cell, source if isinstance(source, Prose) else None)
    if isinstance(source, Questions):
        return qa.question_answering(cell, source)
    if task.name == "vt":
        return vt.variable_tracking(cell, example_lines)
    return words.common_words(cell) if task.name == "cwe" else words.frequent_words(cell)
