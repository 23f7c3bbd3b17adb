"""Cut a text into passages: paragraphs, and parts of long ones packed together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import regex

from ..sentences import cut_sentences

Count = Callable[[list[str]], list[int]]
"""The numbers of tokens of some texts."""
Cut = Callable[[str], list[str]]


def cut_passages(text: str, tokens: int, count: Count) -> list[str]:
    """The passages of ``text``; together they are the text, each with the white space behind it.

    A passage is a paragraph (text up to a blank line). A paragraph of more than ``tokens`` tokens is cut
    into sentences, which are packed into passages of at most ``tokens`` tokens. A sentence that is longer is
    cut behind line breaks, as code and lists are; a longer line behind commas and the like, then behind
    words, and at last between characters.
    """
    return [passage for passage, _ in _cut(text, _LADDER, tokens, count, packed=False)]


def first_part(text: str, tokens: int, count: Count) -> str:
    """The first paragraph, or where it has more than ``tokens`` tokens its first sentence, or its first
    passage."""
    return _end_part(text, tokens, count, 0)


def last_part(text: str, tokens: int, count: Count) -> str:
    """The last paragraph, or where it has more than ``tokens`` tokens or is the whole text, its last
    sentence, or its last passage."""
    return _end_part(text, tokens, count, -1)


def _end_part(text: str, tokens: int, count: Count, end: int) -> str:
    part = text
    for cut in _LADDER[:2]:
        parts = cut(part)
        whole, part = part == text and len(parts) == 1, parts[end]
        if not whole and count([part])[0] <= tokens:
            return part
    return cut_passages(part, tokens, count)[end]


def _cut(
    text: str, ladder: tuple[Cut, ...], tokens: int, count: Count, packed: bool = True
) -> Iterator[tuple[str, int]]:
    """Parts of a text by the first cut of ``ladder``, those of more than ``tokens`` tokens cut by the next
    ones; (part, its tokens). packed: join short neighbours."""
    parts = ladder[0](text)
    sized: list[tuple[str, int]] = []
    for part, size in zip(parts, count(parts), strict=True):
        if size <= tokens or len(part) == 1:
            sized.append((part, size))
        else:  # the last cut, in halves, is repeated
            sized += _cut(part, ladder[1:] or ladder, tokens, count)
    return _packed(sized, tokens) if packed else iter(sized)


def _packed(parts: Iterable[tuple[str, int]], tokens: int) -> Iterator[tuple[str, int]]:
    """The parts, neighbours joined while they have at most ``tokens`` tokens together."""
    text, size = "", 0
    for part, more in parts:
        if text and size + more > tokens:
            yield text, size
            text, size = "", 0
        text, size = text + part, size + more
    if text:
        yield text, size


def _behind(pattern: str) -> Cut:
    """The cut of a text behind each match of ``pattern``."""
    mark = regex.compile(pattern)

    def cut(text: str) -> list[str]:
        ends = sorted({0, len(text), *(match.end() for match in mark.finditer(text))})
        return [text[a:b] for a, b in pairwise(ends)]

    return cut


def _halves(text: str) -> list[str]:
    return [text[: len(text) // 2], text[len(text) // 2 :]]


_LADDER = (
    _behind(r"(?<=\S)[^\S\n]*\n[^\S\n]*\n\s*"),
    cut_sentences,
    _behind(r"(?<=\S)[^\S\n]*\n\s*"),
    _behind(r"[,;:]\s+|[，；：、]\s*"),
    _behind(r"(?<=\S)\s+"),
    _halves,
)
