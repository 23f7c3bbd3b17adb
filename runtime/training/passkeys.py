"""Passkeys hidden in a text, which its end repeats: tokens that only attention far back can give."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...attention.errors import FarspanError

COUNT, LENGTH = 10, 32  # passkeys of a window, and tokens of each
_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"]


class Hidden(NamedTuple):
    """ids [B, T], the text with passkeys in it. answers [B, T] bool: the tokens of the passkeys where the end
    repeats them."""

    ids: Tensor
    answers: Tensor


class Passkeys:
    """Puts passkeys into windows of a text, at random places. A window of T tokens stays one of T tokens; the
    text's last tokens give way."""

    def __init__(self, tokenizer: Any) -> None:
        def tokens(text: str) -> Tensor:
            ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
            return ids

        self._told = [tokens(f"\n\nRemember this: the {ordinal} passkey is") for ordinal in _ORDINALS]
        self._asked = [tokens(f"\n\nThe {ordinal} passkey is") for ordinal in _ORDINALS]
        self._end = tokens(".\n\n")

    def __call__(self, ids: Tensor, generator: torch.Generator) -> Hidden:
        """Hide up to 10 passkeys of 32 tokens, drawn from the text, in each row of ids [B, T], and repeat
        them in order at the end; fewer where they would take more than half of the window. Raises
        FarspanError for a window too short for one."""
        size = max(len(x) for x in self._told) + max(len(x) for x in self._asked)
        size += 2 * LENGTH + len(self._end)
        count = min(COUNT, ids.shape[1] // (2 * size))
        if count < 1:
            raise FarspanError(
                f"A window of {ids.shape[1]} tokens is too short for a passkey and its answer: give at least "
                f"{2 * size}."
            )
        rows = [self._row(row, count, generator) for row in ids.cpu()]
        found, answers = (torch.stack(x).to(ids.device) for x in zip(*rows, strict=True))
        return Hidden(found, answers)

    def _row(self, text: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        drawn = torch.randint(1, len(text), (count, LENGTH), generator=generator)
        keys = text[drawn]  # of the text behind its first token, which may be a special one
        told = [torch.cat([self._told[i], keys[i], self._end]) for i in range(count)]
        asked = [torch.cat([self._asked[i], keys[i]]) for i in range(count)]
        room = len(text) - sum(len(x) for x in told + asked)
        places = torch.randint(1, room + 1, (count,), generator=generator).sort().values.tolist()
        parts = []
        for a, b, key in zip([0, *places], [*places, room], [*told, told[0][:0]], strict=True):
            parts += [text[a:b], key]
        answers = torch.zeros(len(text), dtype=torch.bool)
        at = len(text) - sum(len(x) for x in asked)
        for part in asked:
            answers[at + len(part) - LENGTH : at + len(part)] = True
            at += len(part)
        return torch.cat(parts + asked), answers
