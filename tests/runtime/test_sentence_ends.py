"""The ends of sentences, by the texts between them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from farspan.runtime.training.sentence_ends import SentenceEnds

TEXTS = {
    "One sentence. Another one! A third?": ["One sentence.", " Another one!", " A third?"],
    "Mr. Smith paid 3.50 dollars. He left.": ["Mr. Smith paid 3.50 dollars.", " He left."],
    'He said "no." She laughed.': ['He said "no."', " She laughed."],
    "By J. Doe in the open": ["By J. Doe in the open"],
    "A heading\n\nA line\nthat goes on.\nThe next.": [
        "A heading\n\n",
        "A line\nthat goes on.\n",
        "The next.",
    ],
    "The end.\n\nNew paragraph": ["The end.\n\n", "New paragraph"],
    "Wait... what? Yes": ["Wait...", " what?", " Yes"],
}


class Words:
    """A tokenizer of words, numbers and single other characters, which keep the space before them."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    def __call__(self, text: str) -> torch.Tensor:
        found = re.findall(r" ?\w+| ?\.+| ?[^\w\s]|\s", text)
        assert "".join(found) == text
        self.pieces += [piece for piece in found if piece not in self.pieces]
        return torch.tensor([[self.pieces.index(piece) for piece in found]])

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.pieces[token].replace(" ", "Ġ")


def split(ends: SentenceEnds, tokenizer: Any, ids: torch.Tensor) -> list[str]:
    sentences, current = [], []
    for token, end in zip(ids[0].tolist(), ends(ids)[0].tolist(), strict=True):
        current.append(token)
        if end:
            sentences.append(tokenizer.decode(current))
            current = []
    return [*sentences, tokenizer.decode(current)] if current else sentences


@pytest.mark.parametrize("text", TEXTS)
def test_sentences(text: str) -> None:
    words = Words()
    assert split(SentenceEnds(words), words, words(text)) == TEXTS[text]


def test_sentences_of_a_real_tokenizer(smollm2: tuple[Any, Any]) -> None:
    tokenizer = smollm2[1]
    ends = SentenceEnds(tokenizer)
    for text, want in TEXTS.items():
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert split(ends, tokenizer, ids) == want


def test_rows_are_judged_alone() -> None:
    words = Words()
    one, two = words("One. Two."), words("Two words here")
    both = torch.cat([one, two[:, : one.shape[1]].repeat(1, 2)[:, : one.shape[1]]])
    ends = SentenceEnds(words)
    assert ends(both)[0].tolist() == ends(one)[0].tolist() == [False, True, False, True]
