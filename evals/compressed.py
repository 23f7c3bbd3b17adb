"""Shorter prompts as a part of a method row: "compress:keep=0.3 + quest".

Such a row answers prompts that `farspan.compress` has shortened, under the method behind the first "+" (dense
without one). Passages are scored for the sample's own question. Keys read are shares of what dense attention
reads of the whole prompt, and the seconds of the prefill include those of the scorer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

from ..runtime.compress.prompt import compress, scorer_of
from ..runtime.compress.spec import Compression, split
from .ranks import Job
from .sample import Sample
from .setup import Setup

Shorten = Callable[[Any, Callable[[Sample], Sample]], Any]
"""(an item, a function that shortens a sample) -> the item with a shorter prompt."""


def check_scorers(model: Any, tokenizer: Any, specs: Sequence[str]) -> None:
    """Raises FarspanError for a row with a scorer that cannot serve the model."""
    for scorer in {compression.scorer for compression, _ in map(split, specs) if compression is not None}:
        scorer_of(model, tokenizer, scorer)


def with_shorter_prompts(evaluate: Callable[..., Any], shorten: Shorten) -> Callable[..., Any]:
    """`evaluate` (see `run.Evaluate`) for rows of which some have shorter prompts."""

    def run(
        setup: Setup, job: Job, items: Sequence[Any], specs: Sequence[str]
    ) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        groups: dict[Compression | None, dict[str, list[str]]] = {}
        for spec in specs:
            compression, method = split(spec)
            groups.setdefault(compression, {}).setdefault(method, []).append(spec)
        for compression, methods in groups.items():
            facts: dict[str, dict[str, Any]] = {}  # by the key of an item's first row
            made = items
            if compression is not None:
                shorter = partial(_shortened, setup, job, compression, facts)
                made = [shorten(item, shorter) for item in items]
            of_row = {key: facts.get(item.keys[0]) for item in items for key in item.keys}
            for method, rows in evaluate(setup, job, made, list(methods)):
                whole = [_of_whole(row, of_row[row["key"]], row["key"] in facts) for row in rows]
                for spec in methods[method]:
                    yield spec, [{**row, "method": spec} for row in whole]

    return run


def _shortened(
    setup: Setup, job: Job, compression: Compression, facts: dict[str, dict[str, Any]], sample: Sample
) -> Sample:
    """The sample with a shorter context. What that took goes into `facts`."""
    question = sample.question.strip()

    def make() -> dict[str, Any]:
        how = {field.name: getattr(compression, field.name) for field in fields(compression)}
        found = compress(setup.model, setup.tokenizer, sample.user, question or None, **how)
        names = ("tokens_before", "tokens_after", "tokens_scored", "seconds", "scorer")
        return {
            **{name: getattr(found, name) for name in names},
            "passages": len(found.passages),
            "kept": sum(passage.kept for passage in found.passages),
            "prompt": found.prompt,
        }

    made = job.decide(make)
    prompt = made.pop("prompt")
    facts[sample.keys[0]] = made
    asked = prompt.rindex(question) if question else len(prompt)
    return replace(sample, context=prompt[:asked], question=prompt[asked:])


def _of_whole(row: Mapping[str, Any], made: Mapping[str, Any] | None, first: bool) -> dict[str, Any]:
    """A row of a shorter prompt with its costs beside those of the whole prompt. first: whether the seconds
    of the scorer belong to it."""
    if made is None:
        return dict(row)
    share = row["prompt_tokens"] / (row["prompt_tokens"] + made["tokens_before"] - made["tokens_after"])
    # a prefill reads pairs, of which a prompt half as long has a quarter
    shares = {"prefill": share**2, "decode": share}
    seconds = row["seconds"]
    if first:
        seconds = {**seconds, "prefill": seconds["prefill"] + made["seconds"]}
    return {
        **row,
        "density": {phase: _times(row["density"][phase], shares[phase]) for phase in shares},
        "layers": {phase: _times(row["layers"][phase], shares[phase]) for phase in shares},
        "kv_read": row["kv_read"] * share,
        "seconds": seconds,
        "compressed": dict(made),
    }


def _times(value: Any, share: float) -> Any:
    """A number, a list of numbers, or None (nothing was read) times ``share``."""
    if isinstance(value, list):
        return [_times(one, share) for one in value]
    return None if value is None else value * share
