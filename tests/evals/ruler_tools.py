"""RULER's tasks and samples of known size, for its tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from farspan.evals import ruler
from farspan.evals.sample import Sample

ALL = list(ruler.SYNTHETIC)
NIAH = [name for name in ALL if name.startswith("niah")]
ESSAY = [name for name in ALL if ruler.TASKS[name].haystack == "essay"]


class Words:
    """A tokenizer with one token per word: samples of known size, quickly and without a model."""

    chat_template = None
    eos_token_id = None

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Any:
        return SimpleNamespace(input_ids=text.split())


def samples(task: str, length: int = 1024, count: int = 4, seed: int = 1, **options: Any) -> list[Sample]:
    return list(ruler.make_samples(Words(), task, length, count, seed, **options))


def haystack(sample: Sample) -> str:
    """The context between the introduction and the question, without the solved example of vt and cwe."""
    introduction = {
        "vt": "hidden in the following text.\n\n",
        "cwe": "Memorize the ones that appear most often.\n",
        "fwe": "most frequently appeared coded words. ",
    }.get(sample.task, "afterwards.\n")
    return sample.context.rpartition(introduction)[2].removesuffix("\n")
