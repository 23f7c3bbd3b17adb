"""Prompts that are read once: a cache with the tokens that it holds, and a store of such caches in memory."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..attention.errors import FarspanError
from . import hf


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
            cache = hf.copied(self.cache, self.reused) if keep else self.cache
            hf.crop_to(cache, self.reused)
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


@dataclass(eq=False)
class _Entry:
    patch: str
    tokens: Tensor  # [1, T]
    cache: Any
    nbytes: int


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

    def take(self, patch: str, tokens: Sequence[int]) -> tuple[Any | None, int]:
        """The cache with the longest common prefix with a prompt, cropped to it, and its length; (None, 0)
        where there is none. At least the last token of the prompt is left to be read."""
        prompt = torch.tensor([list(tokens)], dtype=torch.int64)
        with self._lock:
            chosen, length = None, 0
            for entry in self._entries:
                same = min(common(entry.tokens, prompt), len(tokens) - 1) if entry.patch == patch else 0
                whole = same == entry.tokens.shape[1]
                if same > length and (whole or hf.croppable(entry.cache)):
                    chosen, length = entry, same
            try:
                cache = None if chosen is None else self._given(chosen, length)
            except FarspanError:  # its method has dropped keys that the cropped cache would need
                cache = None
            if cache is None:
                self.misses += 1
                return None, 0
            self.hits += 1
            self.tokens_reused += length
        return cache, length

    def _given(self, entry: _Entry, length: int) -> Any:
        """The cache that a caller gets who reuses ``length`` tokens of an entry. Raises FarspanError where it
        cannot be cropped to them."""
        if 2 * length < entry.tokens.shape[1]:
            with suppress(torch.OutOfMemoryError):
                cache = hf.copied(entry.cache, length)
                self._entries.append(self._entries.pop(self._entries.index(entry)))  # it has been used
                return cache
        self._entries.remove(entry)
        hf.crop_to(entry.cache, length)
        return entry.cache

    def put(self, patch: str, tokens: Sequence[int], cache: Any) -> bool:
        """Keep a cache that holds the first of these tokens, as many as it has. Returns whether it is kept: a
        cache above the limit is not, nor one in which a failed call has left layers of different lengths.
        Caches of which it is a continuation are dropped, if it can be cropped to serve in their place."""
        length = hf.length_of(cache)
        if not length or length > len(tokens):
            return False
        entry = _Entry(
            patch,
            torch.tensor([list(tokens[:length])], dtype=torch.int64),
            cache,
            hf.stored_bytes(cache) + 8 * length,
        )
        with self._lock:
            if hf.croppable(cache):
                self._entries = [x for x in self._entries if not _continues(entry, x)]
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
        """Bytes of all caches in the store."""
        with self._lock:
            return sum(x.nbytes for x in self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _continues(new: _Entry, old: _Entry) -> bool:
    """Whether the tokens of ``new`` begin with those of ``old``."""
    return new.patch == old.patch and common(new.tokens, old.tokens) == old.tokens.shape[1]
