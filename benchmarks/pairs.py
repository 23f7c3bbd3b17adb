"""Every prefill method with every decode method: what both together cost on RULER's answers.

    python -m benchmarks.pairs [--length 2048] [--samples 2] [--recipe docs/results/recipe] [--device cuda]

The mean negative log-likelihood of the gold answer per token (nats, teacher forcing through the decode
method) minus that of dense prefill and decode on the same prompts, with the half width of its 95 % interval
over prompts; and the shares of visible keys read in prefill and at decode.
"""

from __future__ import annotations

import argparse
from statistics import fmean
from typing import Any

import farspan
from farspan.evals import batch as forward
from farspan.evals import ruler
from farspan.evals.ranks import Job
from farspan.evals.sample import encode, encode_gold
from farspan.evals.shared import under_each

from .record import mean_difference, save, specs_of, table

PREFILL = "dense; antidiagonal; dhsa:k=512,block_q=64; pbs:mass=0.7; block_topk:k=512"
DECODE = (
    "dense; double_sparsity:k=512,group_factor=2; quest:k=512; recycled:k=512,stride=10,pool=15; snapkv:k=512"
)
TASKS = "niah_single_2,niah_multiquery,fwe"


Found = dict[str, list[tuple[float, float, float]]]  # by pair, of each prompt: loss, shares of keys read


def rows_of(found: Found, pairs: list[str]) -> list[dict[str, Any]]:
    """A row for each pair, over the prompts so far."""
    base = [loss for loss, _, _ in found[pairs[0]]]
    rows = []
    for pair, numbers in found.items():
        prefill, decode = pair.split(" + ")
        differences = [x[0] - y for x, y in zip(numbers, base, strict=True)]
        rows.append(
            {
                "prefill": prefill,
                "decode": decode,
                **mean_difference(differences),
                "prefill keys": fmean(x[1] for x in numbers),
                "decode keys": fmean(x[2] for x in numbers),
                "each ΔNLL": differences,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prefill", default=PREFILL, help='specs with ";" between')
    parser.add_argument("--decode", default=DECODE, help='specs with ";" between')
    parser.add_argument("--also", default="", help='further pairs "PREFILL + DECODE" with ";" between')
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--samples", type=int, default=2, help="of each task; the first of all come first")
    parser.add_argument("--recipe", default="docs/results/recipe")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="pairs", help="of the file under benchmarks/results")
    args = parser.parse_args()
    model, tokenizer = farspan.load(args.model)
    model.to(args.device)
    pairs = [f"{a} + {b}" for a in specs_of(args.prefill) for b in specs_of(args.decode)]
    pairs += specs_of(args.also)
    found: Found = {pair: [] for pair in pairs}
    samples = {
        task: list(ruler.make_samples(tokenizer, task, args.length, args.samples, seed=1))
        for task in args.tasks.split(",")
    }
    for number, task in ((i, task) for i in range(args.samples) for task in samples):
        sample = samples[task][number]
        prompt = forward.collate([encode(tokenizer, sample)], tokenizer.pad_token_id, model.device)
        gold = encode_gold(tokenizer, sample)

        def measure(
            patched: Any, started: Any, prompt: Any = prompt, gold: list[int] = gold
        ) -> tuple[float, float, float]:
            [losses] = forward.teacher_forced(
                model, prompt, started.take(), [gold], pad=tokenizer.pad_token_id
            )
            decode = patched.report().summary["decode_density"]
            return fmean(losses), started.summary["prefill_density"], decode

        with Job(model, None) as job:
            for pair, numbers in under_each(model, prompt, pairs, args.recipe, measure, job):
                found[pair].append(numbers)
                said = f"{task} {number + 1}: {pair}: {numbers[0] - found[pairs[0]][-1][0]:+.4f}, read"
                print(said, " and ".join(f"{x:.4f}" for x in numbers[1:]), flush=True)
        rows = rows_of(found, pairs)
        path = save(args.name, rows, arguments=vars(args))
    print(table([{name: x for name, x in row.items() if name != "each ΔNLL"} for row in rows]))
    print("written to", path)


if __name__ == "__main__":
    main()
