"""Calls of a patched model on one rank. What a prompt has in common with earlier ones is not read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention.errors import FarspanError
from .. import hf
from ..patched import Patched
from ..prefixes import PrefixStore, Taken
from .engine import Cancelled

_PATCH = ""  # a server has one patch, so its caches need no name of theirs


@dataclass(frozen=True)
class Call:
    """What every rank calls the model with: the prompt ids [1, T], transformers' generation config, and the
    seed of sampling."""

    ids: Tensor
    config: Any
    seed: int


class Ending:
    """A streamer that ends the call, by Cancelled, at the first token at which ``cancelled`` is true.

    begun: whether the first token of the answer has come, so that the prompt has been read."""

    def __init__(self, cancelled: Callable[[], bool], streamer: Any = None) -> None:
        self._cancelled, self._streamer = cancelled, streamer
        self._calls = 0  # the first one brings the prompt

    @property
    def begun(self) -> bool:
        return self._calls > 1

    def put(self, value: Tensor) -> None:
        self._calls += 1
        if self._cancelled():
            raise Cancelled
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()


class Reader:
    """A patched model that answers prompts and keeps their caches in ``prefixes`` (None: it keeps none).

    Over ranks, each one has a reader with a store of its own and makes the same calls, so that the stores
    hold the parts of the same caches. Where they do not, all are emptied.
    """

    def __init__(self, model: Any, tokenizer: Any, patched: Patched, prefixes: PrefixStore | None) -> None:
        self.model, self.tokenizer, self.mesh = model, tokenizer, patched.mesh
        self.cuts = patched.cuts
        self._prefixes = None if self.cuts.never else prefixes

    @property
    def keeps(self) -> bool:
        """Whether caches are kept for later prompts."""
        return self._prefixes is not None

    def taken(self, tokens: list[int]) -> Taken:
        """What is reused for a prompt."""
        most = self.cuts.longest(len(tokens))
        if self._prefixes is None or not most:
            return Taken()
        found = self._prefixes.take(_PATCH, tokens[: most + 1], self.cuts.step)
        if self.mesh is not None and not self.mesh.alike(found.length, found.shared):
            self._prefixes.clear()
            return Taken()
        return found

    def answer(self, call: Call, taken: Taken, ending: Ending) -> Tensor:
        """The tokens [1, T + N] of a prompt and of its answer; afterwards the cache of the prompt is kept.
        Raises Cancelled where ``ending`` ends the call."""
        tokens: list[int] = call.ids[0].tolist()
        cache = hf.caches_of(self.model).empty() if taken.cache is None else taken.cache
        marks, read, kept = list(taken.marks), taken.length, self.cuts.longest(len(tokens))
        try:
            for end in self._ends(taken, kept, cache):
                hf.extend(self.model, call.ids[:, :end], cache, start=read)
                hf.forget_states(cache)
                marks.append(hf.mark(cache))
                read = end
            return self._generated(call, cache, ending)
        except Cancelled:
            kept = kept if ending.begun else min(kept, read)
            raise
        except BaseException:
            kept = 0
            raise
        finally:
            self._keep(tokens[:kept], cache, marks)

    def _ends(self, taken: Taken, kept: int, cache: Any) -> list[int]:
        """The ends of the first calls in which a prompt is read, where the cache needs a mark: of what the
        prompt shares with another one, and of what will be kept."""
        ends, begin = [], taken.length
        if self._prefixes is not None and hf.needs_marks(cache):
            for end in (min(taken.shared, self.cuts.longest(kept)), kept):
                if end - begin >= self.cuts.rest:
                    ends.append(end)
                    begin = end
        return ends

    def _generated(self, call: Call, cache: Any, streamer: Any) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": call.ids, "attention_mask": torch.ones_like(call.ids)}
        if call.config.stop_strings is not None:
            inputs["tokenizer"] = self.tokenizer
        torch.manual_seed(call.seed)
        with torch.no_grad():
            made: Tensor = hf.generate_by(
                self.model, call.config, streamer=streamer, **inputs, **hf.with_cache(self.model, cache)
            )
        return made

    def _keep(self, tokens: list[int], cache: Any, marks: list[hf.Mark]) -> None:
        """Keep what a cache holds of the beginning of a prompt. What decode has written is not kept: a method
        may have read less for it than prefill would have. After a call that has ended in its middle, some
        layers hold more than others."""
        if hf.needs_marks(cache):
            tokens = tokens[: max((one.length for one in marks if one.length <= len(tokens)), default=0)]
        if self._prefixes is None or not tokens:
            return
        try:
            hf.cut(cache, len(tokens), marks)
        except FarspanError:  # a method has dropped keys
            return
        self._prefixes.put(_PATCH, tokens, cache, marks, self._largest)

    def _largest(self, number: int) -> int:
        return number if self.mesh is None else self.mesh.largest(number)
