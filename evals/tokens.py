"""The number of tokens of a prompt, from the numbers of its words, which are kept.

To fill a prompt to a length, prompts of many sizes are counted, and almost all their words are the same. A
tokenizer that splits its text before each word's space gives a word the same tokens in every prompt. Then the
tokens of a prompt are those of its words. Whether a tokenizer does so is tested on whole prompts (`agrees`);
the prompts of other tokenizers are encoded whole.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import accumulate, chain
from operator import mul
from typing import Any

from .sample import Sample, encode

_SPACE = re.compile(r"(?<=\S) (?=\S)")
_BLANK = " \t\n\r"
_STOP = ". "
_ANCHOR = "a"
_LONGEST = 100  # characters of a word that is kept
_SENTENCE, _LONGEST_SENTENCE = 30, 4000  # characters: on average at least, and of one that is kept
_MOST = 1 << 18  # words and sentences that are kept


class PromptLength:
    """Counts the tokens of `encode(tokenizer, sample)`."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.by_words = bool(getattr(tokenizer, "is_fast", False))
        """Whether prompts are counted by their words."""
        self._words: dict[str, int] = {}
        self._tails: dict[str, int] = {}  # parts of words behind a hyphen
        self._sentences: dict[str, int] = {}
        self._ends: dict[tuple[str, ...], int] = {}

    def __call__(self, sample: Sample) -> int:
        """The number of tokens of the sample's prompt."""
        first, _, rest = sample.user.partition(" ")
        middle, _, last = rest.rpartition(" ")
        if not self.by_words or not middle or any(end in _BLANK for end in (middle[0], middle[-1])):
            return len(encode(self.tokenizer, sample))
        # The chat format stands around the message: a message of its first and last word has the same one.
        ends = (first, last, sample.answer_prefix)
        if ends not in self._ends:
            short = replace(sample, context=first, question=" " + last)
            self._ends[ends] = len(encode(self.tokenizer, short))
        return self._ends[ends] + self._count(middle)

    def agrees(self, sample: Sample) -> bool:
        """Whether this count is that of the whole prompt. If not, all prompts are encoded whole from now
        on."""
        if self.by_words and self(sample) != len(encode(self.tokenizer, sample)):
            self.by_words = False
            return False
        return True

    def _count(self, text: str) -> int:
        """The tokens of words behind a space. The sentences of prose are kept too: they are fewer."""
        if text.count(_STOP) * _SENTENCE > len(text) or "  " in text:
            return self._sum(_words(text))
        *sentences, last = text.split(_STOP)
        total, known = self._sum(_words(last)), self._sentences
        for sentence in sentences:
            count = known.get(sentence)
            if count is None:
                count = self._sum(_words(f"{sentence}."))
                if len(sentence) < _LONGEST_SENTENCE:
                    known[sentence] = count
            total += count
        if len(known) > _MOST:
            known.clear()
        return total

    def _sum(self, words: list[str]) -> int:
        counted, known = Counter(words), self._words
        if new := [word for word in counted if word not in known]:
            if len(known) > _MOST:
                known = self._words = {}
                self._tails = {}
                new = list(counted)
            self._learn(new)
        total = sum(map(mul, map(known.__getitem__, counted), counted.values()))
        for word in new:
            if len(word) > _LONGEST:
                del known[word]
        return total

    def _learn(self, words: list[str]) -> None:
        """Count the tokens of new words, each behind a space. A word of letters and hyphens is the sum of its
        parts, because keys are pairs of words."""
        hyphens = ((word, word.split("-")) for word in words if "-" in word)
        cut = {word: parts for word, parts in hyphens if all(map(str.isalpha, parts))}
        whole = [word for word in words if word not in cut]
        heads = dict.fromkeys(parts[0] for parts in cut.values())
        tails = dict.fromkeys(chain.from_iterable(parts[1:] for parts in cut.values()))
        whole += [part for part in heads if part not in self._words]
        self._words |= self._counts(whole, " ")
        self._tails |= self._counts([part for part in tails if part not in self._tails], "-")
        for word, (head, *rest) in cut.items():
            self._words[word] = self._words[head] + sum(map(self._tails.__getitem__, rest))

    def _counts(self, words: list[str], before: str) -> dict[str, int]:
        """The tokens of each word. All are encoded in one text, whose tokens are counted by their places.

        Words with white space at an end are encoded alone, because tokenizers may leave it out of a place."""
        alone = [word for word in words if word.strip() != word]
        words = [word for word in words if word.strip() == word]
        ends = list(accumulate((len(before) + len(word) for word in words), initial=len(_ANCHOR)))
        counts = [0] * len(ends)
        for _, end in self._encoded(_ANCHOR + "".join(before + word for word in words)).offsets:
            counts[bisect_left(ends, end)] += 1
        found = dict(zip(words, counts[1:], strict=True))
        anchor = counts[0]
        return found | {word: len(self._encoded(_ANCHOR + before + word)) - anchor for word in alone}

    def _encoded(self, text: str) -> Any:
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)


class Filling:
    """Fills prompts to a length, counted by their words.

    The first prompt, and the same one with a unit more, are also encoded whole. If they have other numbers of
    tokens than the words say, this prompt and all later ones are filled by encoding them whole.
    """

    def __init__(self, tokenizer: Any):
        self._counted = PromptLength(tokenizer)
        self._tested = False

    def tokens(self, sample: Sample) -> int:
        """The tokens of the sample's prompt."""
        return self._counted(sample)

    def fill(self, sample: Callable[[int], Sample], find: Callable[[Callable[[int], int]], int]) -> int:
        """The number of units that `find` returns for a function total(units): tokens of prompt and answer.

        sample: number of units -> the sample. `find` searches for the size, such as `evals.sample.fill`.
        """

        def search() -> int:
            @cache
            def total(units: int) -> int:
                drawn = sample(units)
                return self._counted(drawn) + drawn.max_new_tokens

            return find(total)

        units = search()
        if not self._tested:
            self._tested = True
            if not all(self._counted.agrees(sample(n)) for n in (units, units + 1)):
                units = search()
        return units


def _words(text: str) -> list[str]:
    """The words of a text, cut at single spaces, which are left out."""
    return _SPACE.split(text) if "  " in text else text.split(" ")
