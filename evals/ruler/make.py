"""RULER's samples: the text of a recipe, and how many units of haystack fill a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ...attention.errors import FarspanError
from ..sample import Sample, fill, plain_ids
from ..text import Prose
from ..tokens import Filling
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
    """Number of units -> the sample with this recipe."""
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
    _filling: Filling = field(init=False)

    def __post_init__(self) -> None:
        self._filling = Filling(self.tokenizer)

    def make(self, cell: Cell) -> Sample:
        """The sample of a cell, filled to its length."""
        recipe = self._recipe(cell)
        sample = draw(self.task, self.source, cell, recipe)
        answer = 0
        if cell.compat:
            least, _ = _limits(self.task, self.source, cell)
            answer = len(plain_ids(self.tokenizer, " " + " ".join(sample(least).references)))
        units = self._filling.fill(sample, lambda total: self._units(cell, total, answer))
        recipe["units"] = units
        made = sample(units)
        recipe["prompt_tokens"] = self._filling.tokens(made)
        return replace(made, recipe=dict(recipe))

    def _units(self, cell: Cell, total: Callable[[int], int], answer: int) -> int:
        minimum, most = _limits(self.task, self.source, cell)
        what = f"ruler task {self.task.name}"
        if cell.compat:
            step, unlimited = _step(self.task, cell), most if most is not None else 1 << 62
            steps = fill(
                lambda count: total(min(count * step, unlimited)) + answer,
                cell.length,
                minimum=-(-minimum // step),
                what=f"{what} with --compat",
                most=None if most is None else -(-most // step),
            )
            return min(steps * step, unlimited)
        units = fill(total, cell.length, minimum=minimum, what=what, most=most)
        if units == most and total(units) < _FULL * cell.length:
            raise FarspanError(
                f"{what} at {cell.length} tokens needs more documents than the {most} of its data, which "
                f"make {total(units)} tokens; give a shorter length or larger data."
            )
        return units

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
