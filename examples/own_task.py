"""A task of your own: which of many lines is marked? Dense and a method, side by side, into a folder.

python examples/own_task.py [MODEL] [FOLDER]
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import farspan
from farspan.evals.sample import Sample, rng_for
from farspan.evals.task import Task, filled
from farspan.evals.tokens import Filling


@dataclass(frozen=True, kw_only=True)
class Marked(Task):
    """Numbered lines, one of which says that it is the one."""

    suite: ClassVar[str] = "marked"

    def make(self, tokenizer: Any, name: str, length: int, count: int) -> Iterator[Sample]:
        filling = Filling(tokenizer)
        for index in range(count):
            yield filled(filling, lambda units, i=index: self.sample(name, length, i, units), what=name)

    def sample(self, name: str, length: int, index: int, units: int) -> Sample:
        """A prompt with `units` lines. Everything random in it comes from its coordinates."""
        place = int(rng_for(self.suite, self.seed, length, index).random() * units)
        lines = [f"{i + 1}: {'the marked line' if i == place else 'a line'}" for i in range(units)]
        return Sample(
            suite=self.suite,
            task=name,
            length=length,
            index=index,
            seed=self.seed,
            context="\n".join(lines) + "\n\n",
            question="What is the number of the marked line?",
            answer_prefix=" The number of the marked line is",
            references=(str(place + 1),),
            gold=f" {place + 1}.",
            max_new_tokens=8,
            recipe={"suite": self.suite, "length": length, "index": index, "seed": self.seed},
            extra={},
        )


def main(name: str = "smollm2-135m", folder: str = "out/marked") -> None:
    model, tokenizer = farspan.load(name)
    task = Marked(lengths=[256], samples=2)
    methods = ["dense", "window:w=64,sinks=4"]
    result = farspan.evaluate(model, tokenizer, methods, suite=task, out=folder, name=name, progress=False)
    for row in result.summary["overall"]:
        print(row["method"], row["length"], row["score"])


if __name__ == "__main__":
    main(*sys.argv[1:])
