"""Perplexity under a method, as a difference from dense: prefill a context, score what follows through
decode.

Text may be in a model's training data, so absolute perplexities claim nothing; the paired difference per
window, with its 95 % interval, is what is reported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..attention.errors import FarspanError
from . import batch as forward
from .memory import batch_rows
from .ranks import Job, interrupted
from .results import Results, open_results, record
from .run import Summary, finish
from .shared import Started, check_methods, costs, evaluating, meter, recipes, under_each


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    methods: Sequence[str],
    out: str | Path,
    *,
    model_name: str,
    config: Mapping[str, Any],
    context: int = 2048,
    tokens: int = 128,
    windows: int = 8,
    per_call: int = 1,
    batch_size: int | str = "auto",
    recipe: str | Path | None = None,
    parallel: Any = None,
    progress: bool = True,
) -> Summary:
    """Mean NLL (nats per token) of `tokens` tokens after `context` tokens, in `windows` disjoint parts of the
    text.

    per_call: tokens per forward call while scoring, 1 to 16 (longer calls are prefill). Writes and resumes a
    folder as `run` does, over ranks too (`parallel`). Raises FarspanError where the text is too short for the
    windows.
    """
    if not 1 <= per_call <= 16:
        raise FarspanError(f"per_call is {per_call}; a decode call takes 1 to 16 tokens.")
    if min(context, tokens, windows) < 1:
        raise FarspanError(
            f"context {context}, tokens {tokens} and windows {windows} must all be at least 1."
        )
    with Job(model, parallel) as job:
        specs = check_methods(model, methods, recipe, job)
        cut = list(cut_windows(tokenizer, text, context + tokens, windows))
        settings = {
            **config,
            "suite": "ppl",
            "model": model_name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "methods": specs,
            "recipes": recipes(specs, recipe),
            "text_sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
            "context": context,
            "tokens": tokens,
            "windows": windows,
            "per_call": per_call,
        }
        pad = forward.pad_token(model, tokenizer)
        automatic = isinstance(batch_size, str)
        size = batch_rows(model, context + tokens, windows, job) if automatic else int(batch_size)
        with (
            open_results(job, out, settings, session={"batch_size": size}) as results,
            evaluating(model),
        ):
            try:
                with meter(progress, windows * len(specs)) as advance:
                    for first in range(0, windows, size):
                        numbers = range(first, min(first + size, windows))
                        rows = _score(
                            model, cut, numbers, context, specs, recipe, pad, per_call, results, advance, job
                        )
                        for spec, lines in rows:
                            record(job, results, lines)
                            advance(len(lines), spec)
            except (KeyboardInterrupt, FarspanError) as error:
                if interrupted(error):
                    finish(results, complete=False)
                raise
            return finish(results, complete=True)


def cut_windows(tokenizer: Any, text: str, span: int, windows: int) -> Iterator[list[int]]:
    """The first `span` tokens (BOS included where the tokenizer adds one) of equal parts of the text."""
    for number in range(windows):
        part = text[number * len(text) // windows : (number + 1) * len(text) // windows]
        # Eight characters a token are most often enough, and the part may be megabytes.
        ids = list(tokenizer(part[: 8 * span], verbose=False).input_ids)
        if len(ids) <= span:
            ids = list(tokenizer(part, verbose=False).input_ids)
        if len(ids) < span:
            raise FarspanError(
                f"the text is too short: {windows} windows of {span} tokens were asked for and part "
                f"{number + 1} has only {len(ids)}; give a longer text, fewer windows or a shorter context."
            )
        yield ids[:span]


def _score(
    model: Any,
    cut: list[list[int]],
    numbers: Sequence[int],
    context: int,
    specs: list[str],
    recipe: str | Path | None,
    pad: int,
    per_call: int,
    results: Results,
    advance: Any,
    job: Job,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Score the windows `numbers` under each method that has not finished all of them."""
    span = len(cut[0])
    keys = [f"ppl/text/{span}/{number}" for number in numbers]
    waiting = []
    for spec in specs:
        if all(
            results.done(key, spec, {"window": number}) for key, number in zip(keys, numbers, strict=True)
        ):
            advance(len(keys), "")
        else:
            waiting.append(spec)
    if not waiting:
        return
    batch = forward.collate([cut[number][:context] for number in numbers], pad, model.device)
    golds = [cut[number][context:] for number in numbers]

    def measure(patched: Any, started: Started) -> list[dict[str, Any]]:
        cache = started.take()
        patched.reset_report()
        with forward.timed(model.device) as clock:
            nlls = forward.teacher_forced(model, batch, cache, golds, pad=pad, per_call=per_call)
        common = costs(started, job.report(patched).summary, clock.seconds, len(numbers))
        return [
            {
                "key": key,
                "suite": "ppl",
                "task": "text",
                "length": span,
                "index": number,
                "extra": {},
                "recipe": {"window": number},
                "score": None,
                "nll": sum(nll) / len(nll),
                "nll_sum": sum(nll),
                "gold_tokens": len(nll),
                "steps": -(-len(nll) // per_call),
                **common,
            }
            for key, number, nll in zip(keys, numbers, nlls, strict=True)
        ]

    for spec, rows in under_each(model, batch, waiting, recipe, measure, job):
        fresh = [row for row in rows if not results.done(row["key"], spec, row["recipe"])]
        yield spec, [{"method": spec, **row} for row in fresh]
