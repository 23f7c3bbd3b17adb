"""Prompts that are read once: a cache with the tokens that it holds, and a store of such caches in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention.errors import FarspanError
from . import hf

MARKS = 4
"""How many marks a store keeps of a cache: states are as large as those of the cache itself."""


@dataclass(kw_only=True)
class Prefix:
    """The cache of a patched model and the tokens that it holds, as ``farspan.load_cache`` returns them.

    tokens, mask [B, T]: the tokens, and 0 at the padding on the left. settings: how it was made. reused: how
    many positions the last call of ``inputs`` has reused. left: why it could not reuse more of the cache; ""
    where it did.
    """

    model: Any = field(repr=False)
    cache: Any = field(repr=False)
    tokens: Tensor = field(repr=False)
    mask: Tensor = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    reused: int = 0
    left: str = ""

    def inputs(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, keep: bool = True
    ) -> dict[str, Any]:
        """The arguments by which ``generate`` continues this prefix to a whole prompt.

        input_ids, attention_mask [B, N]: the prompt, its beginning included. The longest common prefix of all
        rows is reused, except for the prompt's last token, which has to be read. The cache is cropped to it:
        methods then start without their state, so that their next step is a full one. Where a layer cannot be
        cropped, nothing is reused. keep: whether the prefix stays as it is and may serve other prompts, which
        takes a copy of the cache.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        same = common(self.tokens, input_ids, self.mask, mask)
        self.reused, self.left = min(same, input_ids.shape[1] - 1), ""
        given = {"input_ids": input_ids, "attention_mask": mask}
        if self.reused == 0:
            return given
        try:
            if keep:
                cache = hf.cut_copy(self.cache, self.reused)
            else:
                cache = self.cache
                hf.cut(cache, self.reused)
        except FarspanError as error:
            self.reused, self.left = 0, str(error)
            return given
        return {**given, **hf.with_cache(self.model, cache)}


def common(a: Tensor, b: Tensor, a_mask: Tensor | None = None, b_mask: Tensor | None = None) -> int:
    """The number of first columns in which all rows of a and b [B, any] agree, and their masks."""
    if a.shape[0] != b.shape[0]:
        return 0
    n = min(a.shape[1], b.shape[1])
    differ = a[:, :n].to(b.device) != b[:, :n]
    if a_mask is not None and b_mask is not None:
        differ |= a_mask[:, :n].to(b.device).bool() != b_mask[:, :n].bool()
    found = differ.any(0).nonzero()
    return int(found[0]) if len(found) else n


@dataclass(frozen=True, kw_only=True, eq=False)
class Taken:
    """What a prompt reuses of a store.

    cache: None: nothing. length: how many tokens it holds, the first ones of the prompt. marks: where it can
    be cut again. shared: how many tokens the prompt has in common with any cache of the store; where that is
    more than ``length``, a mark there lets the next prompt reuse them.
    """

    cache: Any = None
    length: int = 0
    marks: tuple[hf.Mark, ...] = ()
    shared: int = 0


@dataclass(eq=False)
class _Entry:
    patch: str
    tokens: Tensor  # [1, T]
    cache: Any
    marks: tuple[hf.Mark, ...]
    nbytes: int

    def cut(self, most: int, step: int = 1) -> int:
        """The last cut of the cache at or before ``most`` tokens."""
        return hf.last_cut(self.cache, most, self.marks, step)


class PrefixStore:
    """Caches of single sequences in memory, by their tokens and by the patch that has filled them. Beyond
    ``limit`` bytes the least recently used are dropped.

    A cache has one owner. ``take`` moves it out of the store to the caller, who appends to it and gives it
    back by ``put``. Where a prompt shares less than half of a cache, such as the system prompt of another
    conversation, the caller gets a copy, so that the other conversation can go on. Several threads may call
    one store.

    patch: a text that differs where the caches of two patches do (``fingerprint.of_patch``).
    hits, misses: calls of ``take`` that found a prefix, and that found none. tokens_reused: the tokens that
    were taken. dropped: caches that the limit has removed.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise FarspanError(f"The limit of a prefix store is a number of bytes; got {limit}.")
        self.limit = limit
        self.hits = self.misses = self.tokens_reused = self.dropped = 0
        self._entries: list[_Entry] = []  # the most recently used last
        self._lock = threading.Lock()

    def take(self, patch: str, tokens: Sequence[int], step: int = 1) -> Taken:
        """The longest beginning of a prompt that a cache of the store can be cut to, at a multiple of
        ``step`` tokens. At least the last token of the prompt is left to be read. A cache that is taken
        whole keeps the states of its methods; one that is cut does not."""
        prompt = torch.tensor([list(tokens)], dtype=torch.int64)
        with self._lock:
            chosen, length, shared = None, 0, 0
            for entry in self._entries:
                same = min(common(entry.tokens, prompt), len(tokens) - 1) if entry.patch == patch else 0
                shared = max(shared, same - same % step)
                if same > length and (at := entry.cut(same, step)) > length:
                    chosen, length = entry, at
            self.hits += chosen is not None
            self.misses += chosen is None
            self.tokens_reused += length
            cache = None if chosen is None else self._given(chosen, length)
        if chosen is None:
            return Taken(shared=shared)
        marks = tuple(one for one in chosen.marks if one.length <= length)
        return Taken(cache=cache, length=length, marks=marks, shared=shared)

    def _given(self, entry: _Entry, length: int) -> Any:
        """The cache that a caller gets who reuses ``length`` tokens of an entry."""
        if 2 * length < entry.tokens.shape[1]:
            with suppress(torch.OutOfMemoryError):
                cache = hf.cut_copy(entry.cache, length, entry.marks)
                self._entries.append(self._entries.pop(self._entries.index(entry)))  # it has been used
                return cache
        self._entries.remove(entry)
        hf.cut(entry.cache, length, entry.marks)
        return entry.cache

    def put(
        self,
        patch: str,
        tokens: Sequence[int],
        cache: Any,
        marks: Sequence[hf.Mark] = (),
        largest: Callable[[int], int] = int,
    ) -> bool:
        """Keep a cache that holds the first of these tokens, as many as it has. Returns whether it is kept: a
        cache above the limit is not, nor one in which a failed call has left layers of different lengths.
        Caches of which it is a continuation are dropped, if it can be cut to serve in their place.

        marks: those that were made after the first tokens of this sequence; of more than MARKS, the first
        and the last ones are kept. largest: over ranks, the largest of a number's values on all ranks, so
        that their stores drop the same caches."""
        length = hf.length_of(cache)
        if not length or length > len(tokens):
            return False
        kept = tuple(sorted((one for one in marks if one.length <= length), key=lambda one: one.length))
        kept = kept if len(kept) <= MARKS else (kept[0], *kept[1 - MARKS :])
        nbytes = largest(hf.stored_bytes(cache) + 8 * length + sum(one.nbytes for one in kept))
        first = torch.tensor([list(tokens[:length])], dtype=torch.int64)
        entry = _Entry(patch, first, cache, kept, nbytes)
        with self._lock:
            self._entries = [x for x in self._entries if not _serves(entry, x)]
            if entry.nbytes > self.limit:
                return False
            self._entries.append(entry)
            while sum(x.nbytes for x in self._entries) > self.limit:
                del self._entries[0]
                self.dropped += 1
        return True

    def clear(self) -> None:
        """Drop every cache."""
        with self._lock:
            self._entries.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all caches in the store, their marks included."""
        with self._lock:
            return sum(x.nbytes for x in self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _serves(new: _Entry, old: _Entry) -> bool:
    """Whether ``new`` can be cut to what ``old`` holds."""
    length = old.tokens.shape[1]
    return new.patch == old.patch and common(new.tokens, old.tokens) == length == new.cut(length)
