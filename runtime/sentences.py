"""Where the sentences of a text end, by rules on its characters."""

from __future__ import annotations

import regex

CLOSING = r"(?:[\p{Pe}\p{Pf}\p{Pi}\"']|\s»)*"
# "。", "।", "؟", "።" …: marks that need no space and no capital behind them.
OTHER_MARKS = r"(?:(?![.!?])\p{Sentence_Terminal})+[\p{Pe}\p{Pf}]*"
_OPENING = r"(?:[\p{Ps}\p{Pi}\"'¿¡]|«\s)*"
_SENTENCE_END = regex.compile(
    rf"[.!?]+{CLOSING}\s+(?={_OPENING}[\p{{Lu}}\p{{Lt}}\p{{Lo}}\p{{Nd}}])|{OTHER_MARKS}\s*"
)
# A full stop that ends no sentence: a title, an initial, an abbreviation such as "U.S.".
_ABBREVIATED = regex.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Messrs|St|Gen|Col|Capt|Lt|Sgt|Gov|Sen|Rep|Hon|Rev|Prof|Jr|Sr|Co|Inc|No|Nos|Art|Sec|vs|viz)"
    r"|\b\p{Lu}(?:\.\p{Lu})*)\.$"
)
_LOOK_BACK = 12  # characters that an abbreviation is looked for in


def cut_sentences(text: str) -> list[str]:
    """The sentences of a text, each with the white space behind it; together they are the text.

    A sentence ends with a mark of Unicode's Sentence_Terminal, as in UAX 29. Behind ".", "!" and "?" there
    must be white space, and then a capital, a digit, or a letter of a script without capitals. The full stop
    of an abbreviation ends no sentence.
    """
    parts, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        marked = text[max(start, end.start() - _LOOK_BACK) : end.end()].rstrip()
        if not _ABBREVIATED.search(marked[-_LOOK_BACK:]):
            parts.append(text[start : end.end()])
            start = end.end()
    return [*parts, text[start:]] if start < len(text) else parts
