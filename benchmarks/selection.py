"""What each prefill method reads of RULER's prompts, how much of the true attention that holds, and what
choosing it costs.

    python -m benchmarks.selection [--lengths 4096,8192] [--samples 1] [--methods "pbs; dhsa"]

Per method and length, over tasks and samples: the share of visible keys read, the share of the true softmax
mass they hold (mean over layers, heads and sampled queries; the layer with the least), and the seconds of
selection as a share of those of selection and attention together.
"""

from __future__ import annotations

import argparse
from statistics import fmean
from typing import Any

import torch

import farspan
from farspan.evals import ruler
from farspan.evals.sample import encode

from .record import save, specs_of, table

METHODS = (
    "antidiagonal; pbs; pbs:mass=0.7; dhsa; dhsa:k=512,block_q=64; block_topk:k=768,gqa_reduce=none; "
    "vertical_slash; vertical_slash:vertical=256,slash=256; routing; sale:threshold=0.008; "
    "a_shape:w=1024,sinks=64; strided:w=512,stride=8; dilated:w=512,sinks=4; window; oracle:mass=1,k=512; "
    "oracle:mass=1,k=768"
)
TASKS = "niah_single_1,niah_multikey_1,niah_multiquery,fwe"


def measured(model: Any, prompts: list[list[int]], method: str) -> dict[str, Any]:
    """One row of the table, without its length."""
    found = []
    for ids in prompts:
        with farspan.patch(model, prefill=method, measure_mass=True) as patched:
            model(torch.tensor([ids], device=model.device), use_cache=True, logits_to_keep=1)
            report = patched.report(measure_mass=True)
        summary = report.summary
        layers = [layer.phases["prefill"].measured for layer in report.layers]
        chosen, read = (summary[f"prefill_{x}_seconds"] for x in ("selection", "attention"))
        found.append(
            {
                "density": summary["prefill_density"],
                "mass recall": summary["prefill_mass_recall"],
                "least of a layer": min(m.recall for m in layers if m is not None and m.recall is not None),
                "selection s": chosen,
                "of the time": chosen / (chosen + read),
            }
        )
    return {"method": method, **{name: fmean(x[name] for x in found) for name in found[0]}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", default=METHODS, help='prefill specs with ";" between')
    parser.add_argument("--lengths", default="4096")
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = farspan.load(args.model)
    model.to(args.device)
    rows = []
    for length in map(int, args.lengths.split(",")):
        prompts = [
            encode(tokenizer, sample)
            for task in args.tasks.split(",")
            for sample in ruler.make_samples(tokenizer, task, length, args.samples, seed=1)
        ]
        for method in specs_of(args.methods):
            rows.append({"tokens": length, **measured(model, prompts, method)})
            print(table(rows[-1:]), flush=True)
    print(table(rows))
    print("written to", save("selection", rows, arguments=vars(args)))


if __name__ == "__main__":
    main()
