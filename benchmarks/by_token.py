"""Prose that was held out of a training, fed one token at a time: what a method loses, reads, keeps and how
often it chooses.

    python -m benchmarks.by_token --methods "chunkllm:recipe=OUT; window:w=1024" [--length 2048] [--new 256]

The windows are those that `farspan train` holds out with the same --text, --window and --held-out. Dense
attention reads all but the last ``--new`` tokens of a window, or the method does where it has prefill; the
last ones are decoded as `generate` does. Per method: the mean negative log-likelihood of a token (nats), its
difference from dense with the half width of its 95 % interval over windows, the shares of visible keys read,
calls that selected per token and layer that the method serves, and the bytes stored beside dense's.
"""

from __future__ import annotations

import argparse
from statistics import fmean
from typing import Any

import farspan
from farspan.evals import batch as forward
from farspan.evals.ranks import Job
from farspan.evals.shared import under_each
from farspan.evals.text import load_prose
from farspan.runtime.training.windows import cut_windows

from .record import mean_difference, save, specs_of, table


def numbers_of(patched: Any, prefill_density: float, losses: list[float]) -> dict[str, float]:
    """What one window has shown under one method."""
    report = patched.report()
    phases = [layer.phases["decode"] for layer in report.layers]
    chosen = [p for p in phases if p.selecting_calls]
    total = report.summary
    return {
        "NLL": fmean(losses),
        "prefill keys": prefill_density,
        "decode keys": total["decode_density"],
        "selections": sum(p.selecting_calls for p in chosen) / max(1, sum(p.calls for p in chosen)),
        "stored": total["kv_bytes_stored"] / total["kv_bytes_stored_dense"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", required=True, help='specs with ";" between')
    parser.add_argument("--recipe", default=None, help="of the methods that need one and name none")
    parser.add_argument("--text", default="sotu")
    parser.add_argument("--length", type=int, default=2048, help="as --window in the training of the recipe")
    parser.add_argument("--held-out", type=int, default=4, help="as in the training of the recipe")
    parser.add_argument("--new", type=int, default=256, help="tokens of a window that are decoded")
    parser.add_argument("--name", default="by_token", help="of the file under benchmarks/results")
    args = parser.parse_args()
    model, tokenizer = farspan.load(args.model)
    specs = ["dense", *specs_of(args.methods)]
    prose = "\n\n".join(load_prose(args.text).documents)
    windows = cut_windows(tokenizer, prose, args.length, args.held_out).held_out.tolist()
    found: dict[str, list[dict[str, float]]] = {spec: [] for spec in specs}
    for ids in windows:
        gold = ids[-args.new :]
        prompt = forward.collate([ids[: -args.new]], tokenizer.pad_token_id, model.device)

        def measure(patched: Any, started: Any, prompt: Any = prompt, gold: Any = gold) -> dict[str, float]:
            [losses] = forward.teacher_forced(
                model, prompt, started.take(), [gold], pad=tokenizer.pad_token_id
            )
            return numbers_of(patched, started.summary["prefill_density"], losses)

        with Job(model, None) as job:
            for spec, numbers in under_each(model, prompt, specs, args.recipe, measure, job):
                found[spec].append(numbers)
                print(spec, numbers, flush=True)
    rows = []
    for spec, every in found.items():
        off = mean_difference([x["NLL"] - y["NLL"] for x, y in zip(every, found["dense"], strict=True)])
        means = {name: fmean(x[name] for x in every) for name in every[0]}
        rows.append({"method": spec, "NLL": means.pop("NLL"), **off, **means})
    print(table(rows))
    print("written to", save(args.name, rows, arguments=vars(args)))


if __name__ == "__main__":
    main()
