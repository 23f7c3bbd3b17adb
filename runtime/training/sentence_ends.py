"""Which tokens of a text end a sentence, by rules on the tokenizer's pieces of text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ENDS = (".", "!", "?", "…", "。", "！", "？")
_CLOSING = "\"'”’)]}»*_ "
_ABBREVIATIONS = frozenset(
    [
        "Mr",
        "Mrs",
        "Ms",
        "Dr",
        "Prof",
        "St",
        "Jr",
        "Sr",
        "vs",
        "etc",
        "Inc",
        "Ltd",
        "Co",
        "No",
        "Vol",
        "Fig",
        "al",
        "cf",
        "e.g",
        "i.e",
        "U.S",
    ]
)


class SentenceEnds:
    """Marks the last token of every sentence of token ids.

    A token ends a sentence if its text ends in one of . ! ? … (or their full-width forms), closing quotes and
    brackets left out, and a space or a line break follows; not behind an abbreviation or a single capital
    letter. Line breaks belong to the sentence before them. Two in a row end it even without a full stop, as
    behind a heading.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[bool, bool, bool, bool, int]] = {}

    def __call__(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> [B, T] bool. The last token of a row is judged as if a space followed."""
        values, at = ids.cpu().unique(return_inverse=True)
        found = torch.tensor([self._about(int(value)) for value in values])  # [V, 5]
        stops, closes, opens, short = found[at][..., :4].bool().unbind(-1)  # [B, T] each
        breaks = found[at][..., 4]
        stops = stops & ~_before(short, False)
        stops = stops | (closes & _before(stops, False))
        after = breaks > 0
        ends = stops & (_after(opens, True) | _after(after, False)) & ~_after(after, False)
        run = after & ((breaks > 1) | (_before(breaks, 0) > 0) | _before(stops, False))
        return (ends | (run & ~_after(after, False))).to(ids.device)

    def _about(self, token: int) -> tuple[bool, bool, bool, bool, int]:
        """Whether a token's text ends like a sentence, is closing quotes or brackets alone, begins with a
        space, is an abbreviation; and how many line breaks are in it."""
        if token not in self._known:
            text = self._tokenizer.decode([token])
            piece = str(self._tokenizer.convert_ids_to_tokens(token))
            bare = text.rstrip().rstrip(_CLOSING)
            word = text.strip().rstrip(".")
            short = word in _ABBREVIATIONS or (len(word) == 1 and word.isupper())
            stop = bare.endswith(_ENDS) and not short
            opens = text[:1].isspace() or piece[:1] in ("▁", "Ġ", "Ċ")
            closes = not bare and not opens and bool(text)
            self._known[token] = stop, closes, opens, short, text.count("\n")
        return self._known[token]


def _after(x: Tensor, last: bool | int) -> Tensor:
    """x [B, T] of the next token."""
    return torch.cat([x[:, 1:], torch.full_like(x[:, :1], last)], 1)


def _before(x: Tensor, first: bool | int) -> Tensor:
    """x [B, T] of the previous token."""
    return torch.cat([torch.full_like(x[:, :1], first), x[:, :-1]], 1)
