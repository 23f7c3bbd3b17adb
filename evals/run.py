"""Samples × methods through one model, into an output folder that survives being stopped.

For each batch of prompts the dense prefill is computed once. Every method that changes decoding only
continues from a copy of it; the last prompt token is its first decode step. A method with its own prefill
computes that, again without the last token. Each (sample, method) gets two figures: the published score of
the greedy answer, and the negative log-likelihood of the gold answer under teacher forcing through the same
decode path.

Rows are written and synced when a method finishes a batch. So Ctrl-C, `kill -9` or a power cut loses the
answers of the current batch under the current method, and the prefill of that batch, which is computed again.
With `batch_size=1` the loss is one sample; larger batches are faster. A session that is stopped while prompts
are drawn has asked for nothing yet. After that the folder knows which rows were asked for. Its summary is
complete when it has all of them, whichever methods the last session named.

Over ranks every rank makes the same model calls, and each prompt is spread over all ranks. Only the first
rank opens the folder and writes; the others learn from it what is done. So a folder that was begun on one
device can be resumed on several, and holds the same rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Protocol

import torch

from ..attention.attend import DECODE_ROWS
from ..attention.errors import FarspanError
from . import batch as forward
from . import report
from .compressed import Shorten, check_scorers, with_shorter_prompts
from .memory import batch_rows
from .ranks import Job, interrupted
from .results import ROW, Replica, Results, open_results, record
from .results import plan as plan_rows
from .sample import Sample, encode, encode_gold, key, score
from .setup import Setup
from .shape import MAYBE_NUMBER, NUMBER
from .shared import Started, check_methods, common_settings, costs, evaluating, meter, read_of, under_each
from .summary import summarise

ANSWER: dict[str, Any] = {
    **ROW,
    "suite": str,
    "task": str,
    "length": int,
    "extra": {"depth": MAYBE_NUMBER, "true_depth": MAYBE_NUMBER},
    "score": MAYBE_NUMBER,
    "nll": MAYBE_NUMBER,
    "gold_tokens": int,
    "density": {"prefill": MAYBE_NUMBER, "decode": MAYBE_NUMBER},
    "kv_read": MAYBE_NUMBER,
    "seconds": {"prefill": NUMBER, "decode": NUMBER},
    "batch": int,
    "steps": int,
    "fallbacks": (dict, list, NoneType),
}
"""The fields that the summary needs in a row."""
QUOTED = 400
"""Characters of a prompt's end that a row holds: the question and the start of the answer."""
AT_DEPTH: dict[str, Any] = {**ANSWER, "extra": {"depth": NUMBER, "true_depth": MAYBE_NUMBER}}
"""The same for a row of needle."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The result of an evaluation. `data` is summary.json, `files` are the tables and pictures beside it."""

    out: Path
    data: dict[str, Any]
    complete: bool
    files: list[str] = field(default_factory=list)


class Item(Protocol):
    """What is evaluated: it gives a row for each of its keys under each method. Items of one suite, task and
    length may share a batch. recipe: JSON-able, what the item was made from."""

    @property
    def suite(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def keys(self) -> list[str]: ...
    @property
    def recipe(self) -> dict[str, Any]: ...


Rows = Iterator[tuple[str, list[dict[str, Any]]]]
Evaluate = Callable[[Setup, Job, Sequence[Any], Sequence[str]], Rows]
"""(setup, job, a batch of items, specs) -> (spec, the rows of all items) for each spec in turn."""


def run(
    setup: Setup,
    samples: Iterable[Sample],
    *,
    batch_size: int | str = "auto",
    score: Callable[[Sample, str], float] = score,
    end: Callable[[Results], Summary] | None = None,
) -> Summary:
    """Evaluate every method of the setup on all samples; score: (sample, generated answer) -> 0 to 1.

    For the rest see `drive`.
    """
    evaluated = partial(evaluate, score=score)
    return drive(setup, samples, evaluated, batch_size=batch_size, end=end, shorten=_shorten)


def _shorten(sample: Sample, shorter: Callable[[Sample], Sample]) -> Sample:
    return shorter(sample)


def drive(
    setup: Setup,
    items: Iterable[Item],
    evaluate: Evaluate,
    *,
    settings: Mapping[str, Any] | None = None,
    batch_size: int | str = "auto",
    end: Callable[[Results], Summary] | None = None,
    shorten: Shorten | None = None,
) -> Summary:
    """Evaluate every method of the setup on all items into its folder; what is there is not done again.

    `setup.config` and `settings` say how the items were made (suite, seed, lengths, tasks, haystack, ...):
    they are written first, and compared with the folder's when a run is resumed. batch_size: rows per batch,
    or "auto" for as many as the free memory holds. end: makes the summary of the folder; by default `finish`,
    with tables and pictures. shorten: how an item gets a shorter prompt, for methods such as
    "compress:keep=0.3 + quest" (see compressed.py); without it they are refused.
    Raises FarspanError for a method that cannot serve the model (before anything is computed) and
    ResultsError for a folder that cannot be used. On Ctrl-C the summary of what is finished is written, then
    KeyboardInterrupt goes on.
    """
    check_batch_size(batch_size)
    model, end = setup.model, end or finish
    with Job(model, setup.parallel, setup.storage) as job:
        specs = check_methods(model, setup.methods, setup.recipe, job, shortens=shorten is not None)
        if shorten is not None:
            check_scorers(model, setup.tokenizer, specs)
            evaluate = with_shorter_prompts(evaluate, shorten)
        common = common_settings(model, setup.tokenizer, setup.name, specs, setup.recipe, setup.storage)
        asked = {**setup.config, **common, **(settings or {})}
        session = {"batch_size": batch_size, "device": str(model.device), **forward.set_aside(model)}
        shape = AT_DEPTH if asked.get("suite") == "needle" else ANSWER
        with open_results(job, setup.out, asked, session=session, row=shape) as results, evaluating(model):
            work = []
            with meter(setup.progress, None) as advance:
                for item in items:
                    job.agree(f"the sample {item.keys[0]}", item)
                    work.append(item)
                    advance(1, f"drawing prompts · {item.task} {item.length}")
            keys = [key for item in work for key in item.keys]
            plan_rows(job, results, dict.fromkeys(specs, keys))
            with finished_if_stopped(results, end):
                batches = plan(model, work, batch_size, job)
                with meter(setup.progress, len(work) * len(specs)) as advance:
                    for batch in batches:
                        _work_through(setup, job, batch, specs, results, advance, evaluate)
            return end(results)


@contextmanager
def finished_if_stopped(results: Results, finish: Callable[[Results], Summary]) -> Iterator[None]:
    """A context in which Ctrl-C, on this rank or another, makes `finish` write the summary before it goes
    on."""
    try:
        yield
    except (KeyboardInterrupt, FarspanError) as error:
        if interrupted(error):
            finish(results)
        raise


def check_batch_size(batch_size: object) -> None:
    """Raises FarspanError for a batch size that is neither "auto" nor a positive whole number."""
    if not (batch_size == "auto" or (isinstance(batch_size, int) and batch_size >= 1)):
        raise FarspanError(f"batch_size is {batch_size!r}; it must be a positive whole number or 'auto'.")


def plan(
    model: Any, items: Sequence[Item], batch_size: int | str, job: Job | None = None
) -> list[list[Item]]:
    """Batches of one suite, task and length each, in rounds over all cells, so that a stop leaves a balanced
    table."""
    cells: dict[tuple[str, str, int], list[Item]] = {}
    for item in items:
        cells.setdefault((item.suite, item.task, item.length), []).append(item)
    rounds: list[tuple[int, list[Item]]] = []
    for (_, _, length), cell in cells.items():
        rows = batch_rows(model, length, len(cell), job) if isinstance(batch_size, str) else batch_size
        rounds += [(i, cell[start : start + rows]) for i, start in enumerate(range(0, len(cell), rows))]
    return [batch for _, batch in sorted(rounds, key=lambda item: item[0])]


def _work_through(
    setup: Setup,
    job: Job,
    items: list[Item],
    specs: list[str],
    results: Results,
    advance: Any,
    evaluate: Evaluate,
) -> None:
    """Evaluate one batch under every method that has not finished it.

    If a GPU's memory runs out, the batch is halved. Over ranks the error is raised instead, because one rank
    cannot go on without the others.
    """

    def finished(item: Item, spec: str) -> bool:
        return all(results.done(key, spec, item.recipe) for key in item.keys)

    todo: dict[tuple[int, ...], list[str]] = {}
    for spec in specs:
        rows = tuple(i for i, item in enumerate(items) if not finished(item, spec))
        todo.setdefault(rows, []).append(spec)
        advance(len(items) - len(rows), "")
    try:
        for rows, waiting in todo.items():
            if not rows:
                continue
            left = [items[i] for i in rows]
            for spec, lines in evaluate(setup, job, left, waiting):
                fresh = [line for line in lines if not results.done(line["key"], spec, line["recipe"])]
                record(job, results, fresh)
                advance(len(left), f"{left[0].task} {left[0].length} · {spec}")
    except torch.OutOfMemoryError:
        if len(items) == 1 or job.mesh is not None:
            raise
        torch.cuda.empty_cache()
        middle = len(items) // 2
        for half in (items[:middle], items[middle:]):
            counted = lambda n, d: advance(n, d) if d else None  # noqa: E731
            _work_through(setup, job, half, specs, results, counted, evaluate)


def evaluate(
    setup: Setup,
    job: Job,
    samples: Sequence[Sample],
    specs: Sequence[str],
    *,
    score: Callable[[Sample, str], float] = score,
) -> Rows:
    """One batch of samples under each method in turn: yields (spec, one row per sample)."""
    model, tokenizer = setup.model, setup.tokenizer
    eos = forward.end_tokens(model, tokenizer)
    pad = forward.pad_token(model, tokenizer)
    prompts = [encode(tokenizer, sample) for sample in samples]
    golds = [encode_gold(tokenizer, sample) for sample in samples]
    batch = forward.collate(prompts, pad, model.device)
    limit = max(sample.max_new_tokens for sample in samples)

    def measure(patched: Any, started: Started) -> list[dict[str, Any]]:
        nlls = forward.teacher_forced(model, batch, started.copy(), golds, pad=pad, per_call=DECODE_ROWS)
        cache = started.take()
        patched.reset_report()  # the report covers the answer alone
        with forward.timed(model.device) as clock:
            answers = forward.greedy(model, batch, cache, max_new_tokens=limit, pad=pad, eos=eos)
        common = costs(started, read_of(job.report(patched)), clock.seconds, len(samples))
        common["steps"] = min(
            limit, max(len(answer) for answer in answers) + 1
        )  # the end token took a step too
        columns = zip(samples, prompts, answers, nlls, strict=True)
        return [
            row_of(tokenizer, sample, prompt, answer, nll, score) | common
            for sample, prompt, answer, nll in columns
        ]

    for spec, rows in under_each(model, batch, specs, setup.recipe, measure, job):
        yield spec, [{"method": spec, **row} for row in rows]


def row_of(
    tokenizer: Any,
    sample: Sample,
    prompt: list[int],
    answer: list[int],
    nll: list[float],
    score: Callable[[Sample, str], float],
) -> dict[str, Any]:
    """A sample's row without the fields of `shared.costs`."""
    answer = answer[: sample.max_new_tokens]
    text = tokenizer.decode(answer, skip_special_tokens=True)
    return {
        "key": key(sample),
        "suite": sample.suite,
        "task": sample.task,
        "length": sample.length,
        "index": sample.index,
        "extra": sample.extra,
        "recipe": sample.recipe,
        "prompt_tokens": len(prompt),
        "question": (sample.question + sample.answer_prefix)[-QUOTED:],
        "references": list(sample.references),
        "prompt_sha256": hashlib.sha256(",".join(map(str, prompt)).encode()).hexdigest()[:16],
        "answer": text,
        "tokens": len(answer),
        "score": score(sample, text),
        "nll": sum(nll) / len(nll) if nll else None,
        "nll_sum": sum(nll) if nll else None,
        "gold_tokens": len(nll),
    }


def finish(results: Results) -> Summary:
    """Write summary.json, the tables and the pictures from the folder's rows (on the first rank).

    The summary is complete if the folder has every row that any session asked for.
    """
    data = summarise(results.config, results.rows)
    data["unfinished"], data["stopped"] = results.unfinished(), results.config.get("stopped", [])
    data["complete"] = not data["unfinished"]
    summary = Summary(out=results.out, data=data, complete=data["complete"])
    if isinstance(results, Replica):
        return summary
    results.write_summary(data)
    return replace(summary, files=report.write(results, data))
