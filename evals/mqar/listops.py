"""ListOps of the Long Range Arena (arXiv 2011.04006): the value of a nested expression of one-digit numbers.

    [MAX 2 9 [MIN 4 7 ] 0 ]  =  9

An operator takes 2 or more arguments: digits or further operators. [MAX, [MIN and [MED (the median, rounded
down) are of the arguments, [SM is their sum modulo 10. Without parentheses, as the Long Range Arena gives
them to models. Here a model reads from left to right and answers at a last token "=", by one of ten digits.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import torch

from ...attention.errors import FarspanError
from .data import Examples

OPERATOR_SHARE = 0.25
"""The probability that a node above the deepest level is an operator."""
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
TOKENS = ("", *map(str, range(10)), *OPERATORS, "]", "=")
"""Each token's id is its place; the first one is the padding behind a sequence."""
VOCABULARY = len(TOKENS) + len(TOKENS) % 2
_ID = {token: number for number, token in enumerate(TOKENS)}
_DIGIT, _END, _ASK = _ID["0"], _ID["]"], _ID["="]
_MOST_TRIES = 200_000


@dataclass(frozen=True, kw_only=True, order=True)
class ListOps:
    """Expressions of `shortest` to `longest` tokens, of at most `depth` levels and `arguments` an operator,
    written "SHORTEST-LONGESTxDEPTHxARGUMENTS". The Long Range Arena has 500-2000x10x10.

    Raises FarspanError for limits that allow no expression.
    """

    longest: int
    shortest: int
    depth: int
    arguments: int

    suite = "listops"
    encoders = True  # the one question stands at the end

    def __post_init__(self) -> None:
        if not 4 <= self.shortest <= self.longest or self.depth < 2 or self.arguments < 2:
            raise FarspanError(
                f"The setting {self} allows no expression: give at least 4 tokens, at most as many for the "
                "shortest as for the longest, and at least 2 levels and 2 arguments."
            )

    @staticmethod
    def parse(text: str) -> ListOps:
        """The setting of "16-64x4x5". Raises FarspanError for another text."""
        found = re.fullmatch(r"\s*(\d{1,7})-(\d{1,7})x(\d{1,3})x(\d{1,3})\s*", text)
        if found is None:
            raise FarspanError(
                f"A setting is SHORTEST-LONGESTxDEPTHxARGUMENTS such as 16-64x4x5; got {text!r}."
            )
        shortest, longest, depth, arguments = map(int, found.groups())
        return ListOps(shortest=shortest, longest=longest, depth=depth, arguments=arguments)

    def __str__(self) -> str:
        return f"{self.shortest}-{self.longest}x{self.depth}x{self.arguments}"

    @property
    def length(self) -> int:
        """Tokens of a sequence: the longest expression and "="."""
        return self.longest + 1

    @property
    def title(self) -> str:
        """For a panel of the plot."""
        return f"{self.shortest} to {self.longest} tokens, depth {self.depth}"

    def check(self, vocabulary: int, filler: str) -> None:
        """Raises FarspanError if the vocabulary has too few tokens."""
        if vocabulary < VOCABULARY:
            raise FarspanError(
                f"ListOps has {VOCABULARY} tokens, and the vocabulary {vocabulary}; give more."
            )

    def draw(self, count: int, *, vocabulary: int, filler: str, seed: int) -> Examples:
        """`count` expressions, each drawn again until its length is within the limits. Operators and digits
        are equally likely. Raises FarspanError if such lengths hardly ever occur."""
        rng = random.Random(seed)
        tokens = torch.zeros(count, self.length, dtype=torch.long)
        places = torch.empty(count, 1, dtype=torch.long)
        answers = torch.empty(count, 1, dtype=torch.long)
        for row in range(count):
            expression = self._expression(rng)
            tokens[row, : len(expression)] = torch.tensor(expression)
            tokens[row, len(expression)] = _ASK
            places[row, 0] = len(expression)
            answers[row, 0] = _DIGIT + evaluate(expression)
        return Examples(tokens, places, answers, lengths=places[:, 0] + 1)

    def _expression(self, rng: random.Random) -> list[int]:
        for _ in range(_MOST_TRIES):
            found: list[int] = []
            if self._grow(rng, found, 1) and len(found) >= self.shortest:
                return found
        raise FarspanError(
            f"Of {_MOST_TRIES:,} expressions none fits the setting {self}; allow shorter ones, or more "
            "levels and arguments."
        )

    def _grow(self, rng: random.Random, found: list[int], level: int) -> bool:
        """Append a node at a level; False as soon as the expression is too long."""
        if level < self.depth and rng.random() < OPERATOR_SHARE:
            found.append(_ID[rng.choice(OPERATORS)])
            for _ in range(rng.randint(2, self.arguments)):
                if not self._grow(rng, found, level + 1):
                    return False
            found.append(_END)
        else:
            found.append(_DIGIT + rng.randrange(10))
        return len(found) <= self.longest


def evaluate(expression: list[int]) -> int:
    """The value, 0 to 9, of an expression in token ids."""
    stack: list[list[int]] = [[]]
    for token in expression:
        if token == _END:
            operator, *values = stack.pop()
            stack[-1].append(_apply(TOKENS[operator], values))
        elif TOKENS[token] in OPERATORS:
            stack.append([token])
        else:
            stack[-1].append(token - _DIGIT)
    return stack[0][0]


def _apply(operator: str, values: list[int]) -> int:
    if operator == "[MIN":
        return min(values)
    if operator == "[MAX":
        return max(values)
    if operator == "[SM":
        return sum(values) % 10
    values, middle = sorted(values), len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) // 2
