"""Read result folders for a report: every evaluation in them, folders of the same settings joined.

A folder is given itself, or a folder above it. Nothing is written. A damaged file ends in a sentence, because
a report that leaves rows out in silence would mislead; only an incomplete last line is left out, which a run
that is still going writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from . import speed_summary, summary
from .mqar import report as mqar
from .mqar.run import MQAR_ROW
from .mqar.settings import NAMES
from .rows import ResultsError, parse, parse_config, parse_rows
from .run import ANSWER, AT_DEPTH
from .settings import EMPTY, differences, grown
from .shape import NUMBER, Shape, misfit

CONFIG, ROWS, INSPECTED = "config.json", "samples.jsonl", "inspect.json"
SPEED, PERPLEXITY, FIDELITY, HARNESS = "speed", "ppl", "fidelity", "lm-eval"
NEEDLE, RULER = "needle", "ruler"
FROM_SCRATCH = tuple(NAMES)
"""The suites that train their own models."""
OTHERS = (SPEED, PERPLEXITY, FIDELITY, HARNESS, *FROM_SCRATCH)
"""The suites without a scored answer for each prompt."""
SHAPES: dict[str, Shape] = {
    SPEED: speed_summary.TIMING,
    NEEDLE: AT_DEPTH,
    **dict.fromkeys(FROM_SCRATCH, MQAR_ROW),
}
_TRAINING: Shape = {
    "tasks": [str],
    "rates": [NUMBER],
    "seeds": [int],
    "first": str,
    "stop": NUMBER,
    "samples": int,
    "epochs": int,
    "test_samples": int,
}
SETTINGS: dict[str, Shape] = {
    SPEED: {"new_tokens": int, "batch_size": int, "baseline": str},
    **dict.fromkeys(FROM_SCRATCH, _TRAINING),
}
"""The fields of config.json that a suite's report needs besides those of every folder."""
SUMMARISE: dict[str, Callable[..., dict[str, Any]]] = {
    SPEED: speed_summary.summarise,
    **dict.fromkeys(FROM_SCRATCH, mqar.summarise),
}
INSPECTION: dict[str, Any] = {
    "model": str,
    "method": str,
    "prompt_tokens": int,
    "density": NUMBER,
    "mass_recall": NUMBER,
    "layers": [{"layer": int, "density": NUMBER, "mass_recall": NUMBER}],
}
"""The fields of inspect.json that a report needs."""


@dataclass(frozen=True)
class Evaluation:
    """The rows of one or several folders that were measured under the same settings."""

    folders: list[Path]
    config: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def suite(self) -> str:
        return str(self.config.get("suite"))

    @property
    def model(self) -> str:
        """The model's name as the first folder has it, a path without its folders; the suite's where it
        trains its own models."""
        name = self.given
        return Path(name).name if Path(name).is_absolute() else name

    @property
    def given(self) -> str:
        """The model's name as a command takes it: a folder with its whole path."""
        return str(self.config.get("model") or self.suite)

    @cached_property
    def data(self) -> dict[str, Any]:
        """The content of summary.json, made anew from the rows."""
        return SUMMARISE.get(self.suite, summary.summarise)(self.config, self.rows)

    def same_model(self, other: Evaluation) -> bool:
        """Whether both have measured the same model in the same dtype."""
        mine, theirs = self.config.get("identity"), other.config.get("identity")
        alike = mine == theirs if mine and theirs else self.model == other.model
        return alike and self.config.get("dtype") == other.config.get("dtype")


@dataclass(frozen=True)
class Found:
    """What stands in the folders of a report. inspections: the content of each inspect.json."""

    evaluations: list[Evaluation] = field(default_factory=list)
    inspections: list[dict[str, Any]] = field(default_factory=list)

    def answers(self) -> list[Evaluation]:
        """The evaluations with scored answers."""
        return [one for one in self.evaluations if one.suite not in OTHERS]

    def of(self, suite: str) -> list[Evaluation]:
        return [one for one in self.evaluations if one.suite == suite]

    def speeds(self, of: Evaluation) -> list[Evaluation]:
        """The measurements of speed of the same model in the same dtype."""
        return [one for one in self.of(SPEED) if one.same_model(of)]


def read_folders(paths: Sequence[str | Path]) -> Found:
    """The evaluations in the folders and below them. Raises ResultsError for a folder that is not there, one
    without results, and a damaged file."""
    found = Found()
    for folder in dict.fromkeys(folder for path in paths for folder in _with_results(Path(path))):
        if (folder / INSPECTED).is_file():
            found.inspections.append(_read_inspection(folder / INSPECTED))
        if (folder / CONFIG).is_file():
            _add(found.evaluations, _read(folder))
    kept = [one for one in found.evaluations if one.rows]
    if not kept and not found.inspections:
        raise ResultsError(f"{paths[0]} has no results yet; run its evaluation first.")
    return Found(kept, found.inspections)


def _with_results(path: Path) -> list[Path]:
    if not path.is_dir():
        what = "is a file" if path.exists() else "is not there"
        raise ResultsError(f"The folder {path} {what}; give the output folder of an evaluation.")
    every = {file.parent for name in (ROWS, INSPECTED) for file in path.rglob(name)}
    hidden = lambda folder: any(part.startswith(".") for part in folder.relative_to(path).parts)  # noqa: E731
    inside = sorted(folder for folder in every if not hidden(folder))  # a sweep works in a hidden folder
    if not inside:
        raise ResultsError(
            f"{path} has no results ({ROWS} or {INSPECTED}), neither itself nor a folder below it; give the "
            "output folder of `farspan eval` or `farspan inspect`."
        )
    return inside


def _read(folder: Path) -> Evaluation:
    config = EMPTY | parse_config(_bytes(folder / CONFIG), folder / CONFIG)
    suite = config.get("suite") or ""
    if wrong := misfit(config, SETTINGS.get(suite, {}), "it"):
        raise ResultsError(f"{folder / CONFIG} is damaged ({wrong}); mend it, or leave the folder out.")
    rows, _ = parse_rows(_bytes(folder / ROWS), folder / ROWS, SHAPES.get(suite, ANSWER))
    if suite in FROM_SCRATCH and not all(_whole(row) for row in rows):
        raise ResultsError(f"{folder / ROWS} is damaged (a row lacks one of its settings); leave it out.")
    return Evaluation([folder], config, rows)


def _whole(row: Mapping[str, Any]) -> bool:
    """Whether such a row has settings, and an accuracy and a state for each of them."""
    names = set(row["settings"])
    return bool(names) and names <= row["accuracy"].keys() and names <= row["state"].keys()


def _read_inspection(path: Path) -> dict[str, Any]:
    data = parse(_bytes(path))
    if wrong := misfit(data, INSPECTION, "it"):
        raise ResultsError(f"{path} is damaged ({wrong}); run `farspan inspect` again.")
    return dict(data)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ResultsError(
            f"{path} cannot be read ({error.strerror}); give the output folder of an evaluation."
        ) from None


def _add(evaluations: list[Evaluation], new: Evaluation) -> None:
    """Append the evaluation, or join it with the first one of the same settings."""
    for i, old in enumerate(evaluations):
        if (
            old.suite == new.suite
            and old.suite not in (SPEED, *FROM_SCRATCH)
            and _alike(old.config, new.config)
        ):
            known = {(row["key"], row["method"]) for row in old.rows}
            rows = [row for row in new.rows if (row["key"], row["method"]) not in known]
            sessions = [*old.config["sessions"], *new.config["sessions"]]
            stopped = list(dict.fromkeys([*old.config["stopped"], *new.config["stopped"]]))
            joined = grown(old.config, new.config) | {"sessions": sessions, "stopped": stopped}
            evaluations[i] = Evaluation([*old.folders, *new.folders], joined, [*old.rows, *rows])
            return
    evaluations.append(new)


def _alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return not differences(a, b)
