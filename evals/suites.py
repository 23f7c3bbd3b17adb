"""The suites of scored answers by their names, for sweeps and for `farspan.evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..attention.errors import FarspanError
from .needle import Needle
from .retrieval import Retrieval
from .ruler import Ruler, task_names
from .ruler.qa import load_files
from .task import Task
from .text import load_prose
from .turns import Turns

SUITES: dict[str, type[Task]] = {task.suite: task for task in (Ruler, Needle, Retrieval, Turns)}
_OWN: dict[str, tuple[str, ...]] = {
    Ruler.suite: ("text", "qa_data", "compat"),
    Needle.suite: ("text", "depths"),
    Turns.suite: ("text", "turns"),
}
"""The options of a suite besides lengths, tasks, samples and seed."""


def task_of(
    suite: str,
    *,
    lengths: Sequence[int],
    tasks: Sequence[str] = (),
    text: str | None = None,
    qa_data: Sequence[str | Path] = (),
    **given: Any,
) -> Task:
    """The task of a suite, with the options of `farspan eval SUITE`; those left out have its defaults.

    Raises FarspanError for an unknown suite, an option that the suite does not have, and wrong values.
    """
    if suite not in SUITES:
        raise FarspanError(f"The suite {suite!r} was given; it is one of {', '.join(SUITES)}.")
    if text is not None:
        given["text"] = text
    if qa_data:
        given["qa_data"] = qa_data
    own = _OWN.get(suite, ())
    if unknown := [name for name in given if name not in ("samples", "seed", *own)]:
        raise FarspanError(f"{unknown[0]} was given, which the suite {suite} does not have; leave it out.")
    if suite == Ruler.suite:
        tasks = task_names(tasks or ["synthetic"])
        given["questions"] = load_files(given.pop("qa_data", ()))
    if (named := given.pop("text", None)) is not None:
        given["haystack"] = load_prose(named)
    return SUITES[suite](lengths=lengths, **({"tasks": tasks} if tasks else {}), **given)
