"""Evaluate a task of your own: dense beside two budgets, with a table, a data frame and a recommendation.

    python examples/own_task.py [MODEL]

MODEL is an alias of `farspan models`, a hub id or a local folder [default: smollm2-135m].
"""

import random
import sys

import farspan
from farspan.evals.tasks import Prompt, Task

GOODS = ("apples", "bolts", "candles", "drums", "engines", "flutes", "gloves", "hammers")


class Prices(Task):
    """The price of one article in a list. A unit is a line of the list."""

    name = "prices"
    max_new_tokens = 8

    def prompt(self, units: int, rng: random.Random) -> Prompt:
        prices = [rng.randrange(1000, 10000) for _ in range(units)]
        lines = [
            f"Article {i} ({GOODS[i % len(GOODS)]}) costs {price} crowns." for i, price in enumerate(prices)
        ]
        asked = rng.randrange(units)
        return Prompt(
            context="\n".join(lines),
            question=f"\n\nWhat does article {asked} cost?",
            answer_prefix=f" Article {asked} ({GOODS[asked % len(GOODS)]}) costs",
            references=(str(prices[asked]),),
            gold=f" {prices[asked]} crowns.",
        )


def main(name: str = "smollm2-135m", length: int = 1024, samples: int = 6) -> None:
    model, tokenizer = farspan.load(name)
    methods = ["dense", "quest:k=256", "window:w=252,sinks=4"]
    result = farspan.evaluate(
        model, tokenizer, methods, tasks=[Prices()], lengths=[length], samples=samples, progress=False
    )
    print(result)
    frame = result.to_pandas()
    print(frame.groupby("method").score.mean())
    found = result.recommend(max_drop=60)
    print("to use:", found.chosen.patch if found.chosen else "no method is shown to be good enough")


if __name__ == "__main__":
    main(*sys.argv[1:])
