"""Multi-query associative recall: sequences of key-value pairs, followed by queries (Zoology, 2312.04927)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.errors import FarspanError

POWER = 0.01  # a, the exponent of the gaps' distribution
FILLERS = ("zero", "random")
_CHUNK = 2048  # sequences drawn at once, which bounds memory


@dataclass(frozen=True, kw_only=True, order=True)
class Setting:
    """Sequences of ``length`` tokens with ``pairs`` key-value pairs, written "64x4".

    Raises FarspanError for sequences that have no room for the queries.
    """

    length: int
    pairs: int

    suite = "mqar"
    encoders = False  # queries are asked one after another, of what came before

    def __post_init__(self) -> None:
        if self.pairs < 1 or 4 * self.pairs > self.length:
            raise FarspanError(
                f"The setting {self} has no room for its queries: a sequence takes at least 4 tokens a pair, "
                "and at least one pair. Give a longer length or fewer pairs."
            )

    @staticmethod
    def parse(text: str) -> Setting:
        """The setting of "64x4". Raises FarspanError for another text."""
        found = re.fullmatch(r"\s*(\d{1,9})x(\d{1,9})\s*", text)
        if found is None:
            raise FarspanError(f"A setting is LENGTHxPAIRS such as 64x4; got {text!r}.")
        return Setting(length=int(found[1]), pairs=int(found[2]))

    def __str__(self) -> str:
        return f"{self.length}x{self.pairs}"

    @property
    def title(self) -> str:
        """For a panel of the plot."""
        return f"{self.length} tokens, {self.pairs} pairs"

    def check(self, vocabulary: int, filler: str) -> None:
        """Raises FarspanError where such sequences cannot be drawn."""
        check(self, vocabulary, filler)

    def draw(self, count: int, *, vocabulary: int, filler: str, seed: int) -> Examples:
        """`count` sequences (see the function `draw`)."""
        return draw(self, count, vocabulary=vocabulary, filler=filler, seed=seed)


@dataclass(frozen=True)
class Examples:
    """N sequences: tokens [N, length] int64; places [N, Q] int64, the positions of the queries (of MQAR in
    the order of the pairs, of ListOps one); answers [N, Q] int64, the tokens to be given at these
    positions. lengths [N] int64: the tokens of each sequence before its padding; None: there is no
    padding."""

    tokens: Tensor
    places: Tensor
    answers: Tensor
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor | slice) -> Examples:
        lengths = None if self.lengths is None else self.lengths[rows]
        return Examples(self.tokens[rows], self.places[rows], self.answers[rows], lengths)

    @property
    def real(self) -> Tensor | None:
        """[N, length] bool, False at padding; None where there is none."""
        if self.lengths is None:
            return None
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]

    def to(self, device: str) -> Examples:
        """The same on a device."""
        lengths = None if self.lengths is None else self.lengths.to(device)
        return Examples(self.tokens.to(device), self.places.to(device), self.answers.to(device), lengths)


def draw(
    setting: Setting, count: int, *, vocabulary: int = 8192, filler: str = "zero", seed: int = 0
) -> Examples:
    """``count`` sequences of MQAR.

        tokens   k1 v1 k2 v2 | k2  .  .  .  k1  .      the first 2 pairs positions are the context
        answers    .  .  .  .  v2  .  .  .  v1  .      at the query's own position

    Keys are drawn without repeats from 1 .. vocabulary/2 - 1, values from vocabulary/2 .. vocabulary - 1. Key
    i comes again at position 2 pairs + 2 gap_i. The gaps 0 .. (length - 2 pairs)/2 - 1 are drawn without
    repeats with probabilities in proportion to (gap + 1)^(a - 1), a = 0.01. All other tokens are fillers:
    0 with filler="zero", as in the paper's figure 2, or any token of the vocabulary with filler="random",
    which may repeat a key. Pairs and fillers come from generators of their own, which the seed starts: the
    pairs are the same for both fillers.

    Raises FarspanError for a vocabulary that is odd or has too few keys, and for an unknown filler.
    """
    check(setting, vocabulary, filler)
    pairs_from, fillers_from = (torch.Generator().manual_seed(2 * seed + i) for i in range(2))
    parts = [
        _draw(setting, min(_CHUNK, count - first), vocabulary, filler, pairs_from, fillers_from)
        for first in range(0, count, _CHUNK)
    ]
    tokens, places, answers = (torch.cat(x) for x in zip(*parts, strict=True))
    return Examples(tokens, places, answers)


def check(setting: Setting, vocabulary: int, filler: str) -> None:
    """Raises FarspanError where such sequences cannot be drawn."""
    if vocabulary % 2 or vocabulary < 2 * setting.pairs + 2:
        raise FarspanError(
            f"A vocabulary of {vocabulary} tokens does not fit {setting.pairs} pairs: half of it are keys, "
            f"without token 0, and half values. Give an even number of at least {2 * setting.pairs + 2}."
        )
    if filler not in FILLERS:
        raise FarspanError(f"The filler is {' or '.join(FILLERS)}; got {filler!r}.")


def _draw(
    setting: Setting,
    rows: int,
    vocabulary: int,
    filler: str,
    pairs_from: torch.Generator,
    fillers_from: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    n, half = setting.pairs, vocabulary // 2
    keys = 1 + _distinct(half - 1, rows, n, pairs_from)
    values = half + _distinct(half, rows, n, pairs_from)
    slots = torch.arange(1, (setting.length - 2 * n) // 2 + 1)
    places = 2 * n + 2 * _weighted(slots.double() ** (POWER - 1), rows, n, pairs_from)
    shape = (rows, setting.length)
    if filler == "zero":
        tokens = torch.zeros(shape, dtype=torch.long)
    else:
        tokens = torch.randint(vocabulary, shape, generator=fillers_from)
    tokens[:, 0 : 2 * n : 2], tokens[:, 1 : 2 * n : 2] = keys, values
    return tokens.scatter_(1, places, keys), places, values


def _distinct(size: int, rows: int, count: int, made_by: torch.Generator) -> Tensor:
    """[rows, count] int64: in each row, different numbers below ``size`` in random order, all equally likely
    (Floyd's algorithm, then a shuffle)."""
    chosen = torch.empty(rows, count, dtype=torch.long)
    for i in range(count):
        most = size - count + i
        one = torch.randint(most + 1, (rows,), generator=made_by)
        taken = (chosen[:, :i] == one[:, None]).any(1)
        chosen[:, i] = torch.where(taken, most, one)
    order = torch.rand(rows, count, generator=made_by, dtype=torch.float64).argsort(1)
    return chosen.gather(1, order)


def _weighted(weights: Tensor, rows: int, count: int, made_by: torch.Generator) -> Tensor:
    """[rows, count] int64: in each row, numbers below len(weights) drawn one after the other, without
    repeats, in proportion to their weights. The largest log(weight) plus Gumbel noise are such a draw."""
    noise = torch.rand(rows, len(weights), generator=made_by, dtype=torch.float64)
    return (weights.log() - (-noise.log()).log()).topk(count, dim=1).indices
