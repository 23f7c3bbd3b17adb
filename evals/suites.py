"""The suites by their names, with the options of `farspan eval`: for the commands, sweeps and
`farspan.evaluate`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..attention.errors import FarspanError
from .fidelity import Fidelity
from .needle import Needle
from .perplexity import Perplexity
from .retrieval import Retrieval
from .ruler import Ruler, task_names
from .ruler.qa import load_files
from .speed import Speed
from .task import Suite
from .text import load_prose
from .turns import Turns

SUITES: dict[str, type[Any]] = {
    one.suite: one for one in (Ruler, Needle, Retrieval, Turns, Fidelity, Perplexity, Speed)
}
"""The classes, dataclasses that are subclasses of `Suite`."""
_OPTIONS = {"haystack": "text", "questions": "qa_data"}
"""The options of fields that have another name."""


def options_of(suite: str) -> dict[str, str]:
    """The options of a suite, each with the field that it sets. Raises FarspanError for an unknown suite."""
    if suite not in SUITES:
        raise FarspanError(f"The suite {suite!r} was given; it is one of {', '.join(SUITES)}.")
    return {_OPTIONS.get(field.name, field.name): field.name for field in fields(SUITES[suite])}


def suite_of(suite: str, **given: Any) -> Suite:
    """The suite with the options of `farspan eval SUITE`; those that are None or left out have its defaults.

    Raises FarspanError for an unknown suite, an option that the suite does not have, and wrong values.
    """
    own = options_of(suite)
    asked = {name: value for name, value in given.items() if value is not None}
    if unknown := [name for name in asked if name not in own]:
        raise FarspanError(f"{unknown[0]} was given, which the suite {suite} does not have; leave it out.")
    if suite == Ruler.suite:
        asked["tasks"] = task_names(asked.get("tasks", ["synthetic"]))
        asked["qa_data"] = load_files(asked.get("qa_data", ()))
    if "text" in asked:
        asked["text"] = load_prose(asked["text"])
    return SUITES[suite](**{own[name]: value for name, value in asked.items()})  # type: ignore[no-any-return]
