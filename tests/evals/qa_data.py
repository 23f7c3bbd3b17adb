"""SQuAD and HotpotQA in their published formats, with made-up texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def paragraph(number: int) -> str:
    """About 60 words, whose answer no other paragraph has."""
    return f"The gate of town {number} is painted colour{number}x. " + f"It was built in {number}. " * 10


def squad(articles: int = 12, paragraphs: int = 6) -> dict[str, Any]:
    """Each paragraph has a question with two spellings of the answer, and one without an answer."""
    data = []
    for article in range(articles):
        parts = []
        for number in range(article * paragraphs, (article + 1) * paragraphs):
            answers = [
                {"text": f"colour{number}x"},
                {"text": f"Colour{number}X"},
                {"text": f"colour{number}x"},
            ]
            asked = {"question": f"What colour is gate {number}?", "answers": answers, "is_impossible": False}
            unasked = {"question": f"Who painted gate {number}?", "answers": [], "is_impossible": True}
            parts.append({"context": paragraph(number), "qas": [unasked, asked]})
        data.append({"title": f"Article {article}", "paragraphs": parts})
    return {"version": "v2.0", "data": data}


def hotpot(rows: int = 12) -> list[dict[str, Any]]:
    """Each question has ten titles, the last of which is also the first of the next question."""
    return [
        {
            "_id": str(row),
            "question": f"What colour is gate {9 * row}?",
            "answer": f"colour{9 * row}x",
            "context": [
                [f"Gate {n}", [paragraph(n), " It has two towers."]] for n in range(9 * row, 9 * row + 10)
            ],
        }
        for row in range(rows)
    ]


def write(folder: Path) -> list[Path]:
    """The two files; which is which is seen from what is in them."""
    files = {"hotpot.json": hotpot(), "squad.json": squad()}
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data), encoding="utf-8")
    return [folder / name for name in files]
