"""RULER's aggregation tasks: the common words of a list (cwe), the frequent words of a coded text (fwe)."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice

from .constants import (
    COMMON_WORDS,
    CWE_COMMON_WORDS,
    CWE_COUNTS,
    CWE_COUNTS_SHORT,
    CWE_SHORT,
    FREQUENT_WORDS,
    FWE_ALPHA,
    FWE_ANSWERS,
    FWE_NOISE,
    FWE_VOCABULARY_SHARE,
    FWE_WORD_LETTERS,
)
from .draws import Builder, Cell, Draft, distinct, filled, listed, shuffle, word, word_lists

CWE_MINIMUM = CWE_COMMON_WORDS + 1
_ZETA = math.pi**2 / 6  # Riemann's zeta at FWE_ALPHA = 2


def common_words(cell: Cell) -> Builder:
    """The builder of one cwe sample: a solved example, then a numbered list. A unit is one more word."""
    counts = CWE_COUNTS_SHORT if cell.length < CWE_SHORT else CWE_COUNTS
    example, example_common = _WordList(cell, "example").numbered(
        counts.example_words, counts.example_common, counts.example_uncommon
    )
    words_of = _WordList(cell, "list")
    solved = "".join(filled(COMMON_WORDS, example)) + _numbered(example_common) + "\n"

    def build(units: int) -> Draft:
        words, common = words_of.numbered(units, counts.common, counts.uncommon)
        context, question, answer_prefix = filled(COMMON_WORDS, words)
        return Draft(
            context=solved + context,
            question=question,
            answer_prefix=answer_prefix,
            references=tuple(common),
            gold=_numbered(common),
        )

    return build


class _WordList:
    """The words of one list of a sample, which are drawn once."""

    def __init__(self, cell: Cell, purpose: str):
        self._cell, self._purpose = cell, purpose
        self._more = _different_words(cell.rng(f"{purpose} words"))
        self._drawn: list[str] = []

    def numbered(self, words: int, common: int, uncommon: int) -> tuple[str, list[str]]:
        """(numbered list, common words). Of `words` different words 10 appear `common` times, others
        `uncommon`."""
        self._drawn += islice(self._more, max(words - len(self._drawn), 0))
        frequent = self._drawn[:CWE_COMMON_WORDS]
        entries = frequent * common + self._drawn[CWE_COMMON_WORDS:words] * uncommon
        shuffle(self._cell.order(f"{self._purpose} order"), entries)
        return _numbered(entries)[1:], frequent


def _different_words(rng: random.Random) -> Iterator[str]:
    """All words of wonderwords in random order, then pairs, for lists longer than its 8,166 words."""
    known = list(_known_words())
    rng.shuffle(known)
    yield from known
    taken = set(known)
    while True:
        taken.add(pair := distinct(lambda: word(rng), taken))
        yield pair


@lru_cache(maxsize=1)
def _known_words() -> tuple[str, ...]:
    return tuple(sorted({name for names in word_lists().values() for name in names}))


def _numbered(words: list[str]) -> str:
    """ " 1. word 2. word …", with a space in front."""
    return "".join(f" {place}. {name}" for place, name in enumerate(words, 1))


def frequent_words(cell: Cell) -> Builder:
    """The builder of one fwe sample: coded words with zeta-distributed counts; the most frequent one is dots.

    A unit is one word: of `units` words, the k-th most frequent appears int(units · k^-2 / zeta(2)) times.
    """
    rng = cell.rng("vocabulary")
    drawn = {FWE_NOISE: None}  # ordered, and quick to search
    for _ in range(max(cell.length // FWE_VOCABULARY_SHARE, FWE_ANSWERS + 2) - 1):
        word = distinct(lambda: "".join(rng.choices(string.ascii_lowercase, k=FWE_WORD_LETTERS)), drawn)
        drawn[word] = None
    vocabulary = list(drawn)
    answers = tuple(vocabulary[1 : 1 + FWE_ANSWERS])

    def build(units: int) -> Draft:
        words = [
            name
            for name, count in zip(vocabulary, fwe_counts(units, len(vocabulary)), strict=True)
            for _ in range(count)
        ]
        shuffle(cell.order("order"), words)
        context, question, answer_prefix = filled(FREQUENT_WORDS, " ".join(words))
        return Draft(
            context=context,
            question=question,
            answer_prefix=answer_prefix,
            references=answers,
            gold=f" {listed(answers)}.",
        )

    return build


def fwe_counts(units: int, vocabulary: int) -> list[int]:
    """How often each word appears, from the most to the least frequent."""
    return [int(units * rank**-FWE_ALPHA / _ZETA) for rank in range(1, vocabulary + 1)]


def _fwe_minimum() -> int:
    """The least number of units from which on the third answer is more frequent than the fourth word."""
    units = 1
    for tried in range(1, 1000):
        third, fourth = fwe_counts(tried, FWE_ANSWERS + 2)[-2:]
        if third <= fourth:
            units = tried + 1
    return units


FWE_MINIMUM = _fwe_minimum()
