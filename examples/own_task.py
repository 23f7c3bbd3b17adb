"""Evaluate a task of your own: dense beside two budgets, with a table, a data frame and a recommendation.

    python examples/own_task.py [MODEL]

MODEL is an alias of `farspan models`, a hub id or a local folder [default: smollm2-135m].
"""

import random
import sys

import farspan
from farspan.evals.tasks import Prompt, Task

COLOURS = ("blue", "green", "white", "black", "brown", "grey")
GOODS = ("apples", "bolts", "candles", "drums", "flutes", "gloves", "hammers")


class Code(Task):
    """The code of a safe, in a line somewhere between lines about boxes. A unit is a line about a box."""

    name = "code"
    max_new_tokens = 8

    def prompt(self, units: int, rng: random.Random) -> Prompt:
        lines = [f"The {rng.choice(COLOURS)} box holds {rng.choice(GOODS)}." for _ in range(units)]
        code = str(rng.randrange(1000, 10000))
        lines.insert(rng.randrange(len(lines) + 1), f"The code of the red safe is {code}.")
        return Prompt(
            context="\n".join(lines),
            question="\n\nWhat is the code of the red safe?",
            answer_prefix=" The code of the red safe is",
            references=(code,),
        )


def main(name: str = "smollm2-135m", length: int = 1024, samples: int = 6) -> None:
    model, tokenizer = farspan.load(name)
    methods = ["dense", "quest:k=256", "window:w=252,sinks=4"]
    result = farspan.evaluate(
        model, tokenizer, methods, tasks=[Code()], lengths=[length], samples=samples, progress=False
    )
    print(result)
    frame = result.to_pandas()
    print(frame.groupby("method").score.mean())
    found = result.recommend(max_drop=60)
    print("to use:", found.chosen.patch if found.chosen else "no method is shown to be good enough")


if __name__ == "__main__":
    main(*sys.argv[1:])
