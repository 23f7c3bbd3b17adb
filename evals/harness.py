"""Tasks of the lm-evaluation-harness (the package lm-eval) on the patched model, with what was read beside
the harness's scores.

The harness makes the prompts and scores them. Log-likelihoods are one call on prompt and continuation, so
only a method's prefill acts on them; its decode acts where a task generates text. The harness cuts a prompt
that is longer than the model's positions on the left, in silence. Here it is refused, or cut in the middle
and counted.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ..attention.errors import FarspanError
from ..runtime.models import positions
from .ranks import Job
from .run import Rows, Summary, drive
from .setup import Setup
from .shared import Started, costs, patched_with, read_of

MIDDLE = "middle"
UNKNOWN_POSITIONS = 1 << 20
"""The limit of a model whose configuration sets none."""


@dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """A task of the harness. It has one row for each method."""

    task: str
    settings: Mapping[str, Any]

    suite: ClassVar[str] = "lm-eval"
    length: ClassVar[int] = 0

    @property
    def keys(self) -> list[str]:
        return [f"{self.suite}/{self.task}/0"]

    @property
    def recipe(self) -> dict[str, Any]:
        return dict(self.settings)


def harness(
    setup: Setup,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 1,
    fewshot: int | None = None,
    truncate: str | None = None,
    include: str | Path | None = None,
) -> Summary:
    """Run tasks of the harness under every method of the setup (see `run.drive`).

    limit: the first documents of each task alone; fewshot: examples in a prompt instead of the task's own
    number; truncate: "middle" cuts a prompt that is too long in its middle; include: a folder of the user's
    own tasks (YAML). Raises FarspanError without the package, for an unknown task, over several ranks, and,
    without `truncate`, for a prompt that is longer than the model's positions.
    """
    check(tasks, truncate)
    manager = _manager(include)
    known = set(manager.all_tasks)
    if unknown := [name for name in tasks if name not in known]:
        raise FarspanError(
            f"lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists them, and --include names a "
            "folder of your own."
        )
    settings = {"limit": limit, "fewshot": fewshot, "truncate": truncate, "lm_eval": _version()}
    items = [HarnessTask(task=name, settings=settings) for name in dict.fromkeys(tasks)]
    asked = {"suite": "lm-eval", "tasks": [item.task for item in items], "lengths": [], **settings}
    run = partial(_evaluate, manager=manager, batch_size=batch_size)
    return drive(setup, items, run, settings=asked, batch_size=1)


def check(tasks: Sequence[str], truncate: str | None) -> None:
    """Raises FarspanError where the package is missing, and for wrong arguments."""
    if importlib.util.find_spec("lm_eval") is None:
        raise FarspanError("lm-eval is not installed; install it with `pip install 'farspan[lm-eval]'`.")
    if not tasks:
        raise FarspanError("no task was given; name at least one of `lm-eval ls tasks`.")
    if truncate not in (None, MIDDLE):
        raise FarspanError(f"--truncate is {MIDDLE!r} or left out; got {truncate!r}.")


def cut_middle(ids: Sequence[int], most: int) -> list[int]:
    """The first and last tokens, `most` together; of an odd number one more at the end."""
    head = most // 2
    return list(ids[:head]) + list(ids[len(ids) - (most - head) :])


class Lengths:
    """How long the prompts of a task were, and how many were cut."""

    def __init__(self, limit: int, truncate: str | None):
        self.limit, self.truncate = limit, truncate
        self.longest = self.cut = 0

    def fitted(self, ids: Sequence[int], room: int) -> list[int]:
        """The ids if they are at most `room`; else cut in the middle, or refused."""
        self.longest = max(self.longest, len(ids))
        if len(ids) <= room:
            return list(ids)
        if self.truncate is None or room < 2:
            raise FarspanError(
                f"a prompt has {len(ids)} tokens, and the model has room for {room} of its "
                f"{self.limit} positions beside the answer; give --truncate middle to cut the middle out, "
                "or --rope to stretch the positions."
            )
        self.cut += 1
        return cut_middle(ids, room)


def _evaluate(
    setup: Setup, job: Job, items: Sequence[Any], specs: Sequence[str], *, manager: Any, batch_size: int
) -> Rows:
    if job.size > 1:
        raise FarspanError("lm-eval runs on one rank: start it without torchrun, or give --parallel none.")
    from lm_eval import simple_evaluate  # type: ignore[import-not-found]

    [item] = items
    settings = item.settings
    for spec in specs:
        lengths = Lengths(positions(setup.model) or UNKNOWN_POSITIONS, settings["truncate"])
        model = _wrapped(setup, lengths, batch_size)
        with patched_with(setup.model, spec, setup.recipe, job) as patched:
            began = time.perf_counter()
            found = simple_evaluate(
                model,
                tasks=[item.task],
                num_fewshot=settings["fewshot"],
                limit=settings["limit"],
                task_manager=manager,
                bootstrap_iters=1000,
            )
            seconds = time.perf_counter() - began
            read = read_of(job.report(patched))
        documents = sum(len(rows) for rows in found["samples"].values())
        counted = Started(cache=None, seconds=0.0, summary=read | {"fallbacks": {}})
        common = costs(counted, read, seconds, max(documents, 1))
        yield spec, [{"method": spec, **_row(item, found, lengths)} | common]


def _wrapped(setup: Setup, lengths: Lengths, batch_size: int) -> Any:
    """The harness's model around ours."""
    import torch
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]

    class Fitted(HFLM):  # type: ignore[misc]
        """The harness's model. Prompts that are too long are cut in the middle or refused."""

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **named: Any) -> Any:
            room = self.max_length + 1  # the last token is a target alone
            fitted = [
                (text, lengths.fitted(context, room - len(continuation)), continuation)
                for text, context, continuation in requests
            ]
            return super()._loglikelihood_tokens(fitted, *args, **named)

        def tok_batch_encode(
            self,
            strings: Any,
            padding_side: str = "left",
            left_truncate_len: Any = None,
            truncation: Any = False,
        ) -> Any:
            ids, mask = super().tok_batch_encode(strings, padding_side=padding_side)
            rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
            rows = [lengths.fitted(row, left_truncate_len or lengths.limit) for row in rows]
            width = max(map(len, rows))
            pad = self.tokenizer.pad_token_id
            padded = [[pad] * (width - len(row)) + row for row in rows]
            kept = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
            return torch.tensor(padded), torch.tensor(kept)

    limit = lengths.limit
    return Fitted(
        pretrained=setup.model,
        tokenizer=setup.tokenizer,
        batch_size=batch_size,
        max_length=limit,
        backend="causal",
    )


def _row(item: HarnessTask, found: Mapping[str, Any], lengths: Lengths) -> dict[str, Any]:
    metrics = {
        name: {key: value for key, value in values.items() if isinstance(value, int | float)}
        for name, values in found["results"].items()
    }
    first, scores = _scores(found)
    mean = sum(scores.values()) / len(scores) if scores else None
    return {
        "key": item.keys[0],
        "suite": item.suite,
        "task": item.task,
        "length": item.length,
        "index": 0,
        "extra": {},
        "recipe": item.recipe,
        "score": mean,
        "nll": None,
        "gold_tokens": 0,
        "steps": 0,
        "metrics": metrics,
        "metric": first,
        "scores": scores,
        "longest_prompt": lengths.longest,
        "prompts_cut": lengths.cut,
    }


def _scores(found: Mapping[str, Any]) -> tuple[str | None, dict[str, float]]:
    """The first metric that is a number of each document, and its values by document."""
    for task, rows in found["samples"].items():
        for name in rows[0].get("metrics", ()) if rows else ():
            values = {f"{task}/{row['doc_id']}": row[name] for row in rows}
            if all(isinstance(value, int | float) and math.isfinite(value) for value in values.values()):
                return name, {key: float(value) for key, value in values.items()}
    return None, {}


def _manager(include: str | Path | None) -> Any:
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    if include is not None and not Path(include).is_dir():
        raise FarspanError(
            f"--include {include} is not a folder; give one with the YAML files of your tasks."
        )
    return TaskManager(include_path=None if include is None else str(include))


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
