"""Fidelity: how far a method's next-token distributions are from dense's, on the user's own prompts.

Dense answers each prompt greedily. Every method is then fed the same answer, token by token, and at each
token its distribution is compared with dense's: KL(dense || method) in nats, and whether both have the same
most likely token. No right answers are needed, and a few prompts say much: the cheapest early warning.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..attention.attend import DECODE_ROWS
from ..attention.errors import FarspanError
from ..runtime.models import prompt_ids
from . import batch as forward
from .ranks import Job
from .results import Results
from .run import Rows, Summary, drive
from .setup import Setup
from .shared import Started, costs, read_of, under_each
from .task import Cell, Suite


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The tokens of a prompt. length: the power of two that holds prompt and answer, a cell of the tables."""

    index: int
    ids: list[int]
    new_tokens: int

    suite: ClassVar[str] = "fidelity"
    task: ClassVar[str] = "prompts"

    @property
    def length(self) -> int:
        return 1 << (len(self.ids) + self.new_tokens - 1).bit_length()

    @property
    def keys(self) -> list[str]:
        return [f"{self.suite}/{self.task}/{self.length}/{self.index}"]

    @property
    def recipe(self) -> dict[str, Any]:
        return {"prompt_sha256": hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()[:16]}


def read_prompts(paths: Sequence[str | Path]) -> list[str]:
    """The prompts of files and folders: a .jsonl file has one a line (a string, or an object with "prompt"),
    any other file is one prompt, and a folder is its .txt files. Raises FarspanError for what cannot be
    read."""
    found: list[str] = []
    for path in (Path(given).expanduser() for given in paths):
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        for file in files:
            try:
                text = file.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise FarspanError(f"the prompts {file} cannot be read ({error}); give UTF-8 text.") from None
            found += _lines(text, file) if file.suffix == ".jsonl" else [text]
    prompts = [text for text in found if text.strip()]
    if not prompts:
        raise FarspanError(
            f"there is no prompt in {', '.join(map(str, paths))}; give text with a word in it."
        )
    return prompts


def _lines(text: str, file: Path) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise FarspanError(
                f'line {number} of {file} is neither a JSON string nor an object with a "prompt"; mend it.'
            )
        yield prompt


@dataclass(frozen=True, kw_only=True)
class Fidelity(Suite):
    """Every method beside dense on prompts, along dense's answers of `new_tokens` tokens.

    Each prompt is a user's message in the chat format, if the tokenizer has one. A row's score is the share
    of tokens at which dense and the method have the same most likely token, `kl` the mean of
    KL(dense || method) over the tokens, `kl_most` the largest one, `first_other` the first token at which the
    most likely one differs (None: at none), and `nll` that of dense's own answer under the method.
    Raises FarspanError without a prompt or new tokens, and, once there is a tokenizer, for a prompt of fewer
    than 2 tokens.
    """

    suite: ClassVar[str] = "fidelity"

    prompts: Sequence[str]
    new_tokens: int = 64

    def __post_init__(self) -> None:
        if not self.prompts or self.new_tokens < 1:
            raise FarspanError(
                f"{len(self.prompts)} prompts and {self.new_tokens} new tokens were given; give at least one "
                "of each."
            )

    @property
    def config(self) -> dict[str, Any]:
        return {"suite": self.suite, "tasks": [Prompt.task], "new_tokens": self.new_tokens}

    def longest(self, tokenizer: Any) -> int:
        return max(len(prompt.ids) for prompt in self.draw(tokenizer)) + self.new_tokens

    def cells(self, tokenizer: Any) -> list[Cell]:
        keys: dict[int, list[tuple[str, ...]]] = {}
        for prompt in self.draw(tokenizer):
            keys.setdefault(prompt.length, []).append(tuple(prompt.keys))
        return [
            Cell(suite=self.suite, task=Prompt.task, length=length, items=tuple(items))
            for length, items in keys.items()
        ]

    def of_cell(self, tokenizer: Any, cell: Cell) -> Iterator[Prompt]:
        return (prompt for prompt in self.draw(tokenizer) if prompt.length == cell.length)

    def draw(self, tokenizer: Any) -> Iterator[Prompt]:
        for index, text in enumerate(self.prompts):
            ids = prompt_ids(tokenizer, text, clock=False)
            if len(ids) < 2:
                said = f"Prompt {index + 1} of {len(self.prompts)} has fewer than 2 tokens"
                raise FarspanError(f"{said}; give a longer one.")
            yield Prompt(index=index, ids=ids, new_tokens=self.new_tokens)

    def run(
        self,
        setup: Setup,
        items: Iterable[Any],
        *,
        batch_size: int | str = "auto",
        end: Callable[[Results], Summary] | None = None,
    ) -> Summary:
        return drive(setup, items, _evaluate, batch_size=batch_size, end=end)


def _evaluate(setup: Setup, job: Job, prompts: Sequence[Any], specs: Sequence[str]) -> Rows:
    """One batch of prompts under each method in turn; dense is run first in any case."""
    model = setup.model
    pad = forward.pad_token(model, setup.tokenizer)
    batch = forward.collate([prompt.ids for prompt in prompts], pad, model.device)

    def answer(patched: Any, started: Started) -> tuple[list[list[int]], torch.Tensor]:
        limit = prompts[0].new_tokens
        answers = forward.greedy(model, batch, started.copy(), max_new_tokens=limit, pad=pad, eos=())
        logits = forward.forced_logits(model, batch, started.take(), answers, pad=pad, per_call=DECODE_ROWS)
        return answers, torch.cat([part.float().log_softmax(-1).cpu() for part, _ in logits], dim=1)

    [(_, (answers, dense))] = under_each(model, batch, ["dense"], setup.recipe, answer, job)

    def measure(patched: Any, started: Started) -> list[dict[str, Any]]:
        cache = started.take()
        patched.reset_report()
        kls, same, nlls, at = [], [], [], 0
        with forward.timed(model.device) as clock:
            for logits, targets in forward.forced_logits(
                model, batch, cache, answers, pad=pad, per_call=DECODE_ROWS
            ):
                mine = logits.float().log_softmax(-1).cpu()
                base = dense[:, at : at + mine.shape[1]]
                at += mine.shape[1]
                kls.append(_divergence(base, mine))
                same.append(base.argmax(-1) == mine.argmax(-1))
                nlls.append(-mine.gather(-1, targets.cpu()[..., None])[..., 0])
        common = costs(started, read_of(job.report(patched)), clock.seconds, len(prompts))
        columns = zip(
            prompts, *(torch.cat(parts, dim=1).tolist() for parts in (kls, same, nlls)), strict=True
        )
        return [_row(prompt, *found) | common for prompt, *found in columns]

    for spec, rows in under_each(model, batch, specs, setup.recipe, measure, job):
        yield spec, [{"method": spec, **row} for row in rows]


def _divergence(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(base || other) [B, n] of log-probabilities [B, n, V]; a token that base cannot give counts
    nothing."""
    share = base.exp()
    terms = torch.where(share > 0, share * (base - other), 0.0)
    return terms.sum(-1).clamp(min=0)


def _row(prompt: Prompt, kl: list[float], same: list[bool], nll: list[float]) -> dict[str, Any]:
    return {
        "key": prompt.keys[0],
        "suite": prompt.suite,
        "task": prompt.task,
        "length": prompt.length,
        "index": prompt.index,
        "extra": {},
        "recipe": prompt.recipe,
        "prompt_tokens": len(prompt.ids),
        "score": sum(same) / len(same),
        "kl": sum(kl) / len(kl),
        "kl_most": max(kl),
        "first_other": None if all(same) else same.index(False),
        "nll": sum(nll) / len(nll),
        "nll_sum": sum(nll),
        "gold_tokens": len(nll),
        "steps": len(nll),
    }
