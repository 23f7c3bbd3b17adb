"""Where gates look: how much of the true attention, and how many of the true top blocks, a method finds.

    python -m benchmarks.gates --methods "seer:fraction=0.2; block_topk:k=none,fraction=0.2" \\
        [--recipe PATH] [--text sotu] [--ruler niah_multikey_1,fwe] [--lengths 4096,8192] [--windows 2]

The model runs densely. In every layer, every method selects from the same queries and keys. Per method,
kind of text and third of the layers: the share of visible keys read, the share of the true softmax mass on
them (mean over heads and sampled queries), and the recall of true top blocks: of the blocks (64 x 64) with
the largest true probabilities, as many as the method reads in a row, the share that it reads.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import farspan
from farspan.attention.calibration.truth import block_truth
from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.mass import block_reads, mass_recall, sample_rows, visible_pairs
from farspan.attention.method import AttentionMethod
from farspan.attention.needs import Needs
from farspan.attention.selection import EveryKey
from farspan.attention.softmax import Softmax
from farspan.evals import ruler
from farspan.evals.sample import encode
from farspan.evals.text import load_prose
from farspan.runtime import hf
from farspan.runtime.bind import serve
from farspan.runtime.training.windows import cut_windows

from .record import save, specs_of, table

BLOCK, ROWS = 64, 32
METHODS = (
    "seer:fraction=0.2; block_topk:k=none,fraction=0.2,gqa_reduce=none; "
    "antidiagonal:block=64,stride=8,mass=0.7"
)


def texts(tokenizer: Any, args: Any, length: int) -> dict[str, list[list[int]]]:
    """Token ids by kind: RULER's prompts, and the windows that `farspan train` holds out of this text with
    the same --window and --held-out. With others, they may be among those that were trained on."""
    prose = "\n\n".join(load_prose(args.text).documents)
    cut = cut_windows(tokenizer, prose, length, args.held_out).held_out[: args.windows].tolist()
    prompts = [
        encode(tokenizer, sample)
        for task in filter(None, args.ruler.split(","))
        for sample in ruler.make_samples(tokenizer, task, length, 1, seed=1)
    ]
    return {"prose": cut, "RULER": prompts}


@torch.no_grad()
def found(method: AttentionMethod, q: Tensor, keys: Keys, truth: Tensor, total: Tensor) -> tuple[float, ...]:
    """(density, recall of mass, recall of top blocks) of one layer."""
    if method.last_queries:
        keys.prepared = method.prepare_prefill(q[:, :, -method.last_queries :], keys)
    selection = method.select_prefill(q, keys) or EveryKey()
    t = keys.length
    mass = mass_recall(q, keys, selection, sample_rows(t, ROWS)).mean().item()
    share = block_reads(selection, t, t, BLOCK, BLOCK, q.device).expand(q.shape[1], -1, -1)
    density = (share * total).sum() / (total.sum() * len(share))
    read = share > 0.5
    ranks = truth[0].argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    top = ranks < read.sum(-1, keepdim=True)
    return density.item(), mass, ((read & top).sum() / top.sum()).item()


class Watched:
    """What every method finds in every layer of one dense call."""

    def __init__(self, info: Any, specs: list[str], recipe: str | None) -> None:
        self.layers = [i for i in info.attention if info.kinds[i] != hf.SLIDING]
        self.methods = {
            index: {
                spec: serve(farspan.parse_method(spec), info.layer_info(index), recipe, info.geometry)
                for spec in specs
            }
            for index in self.layers
        }
        self.seen: dict[tuple[str, int], list[tuple[float, ...]]] = defaultdict(list)

    def observe(
        self, index: int, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, *, inputs: Any = None
    ) -> None:
        t = q.shape[2]
        truth = block_truth(q, Keys(kv=KV(k, v), tq=t, softmax=softmax), BLOCK, BLOCK)
        total = visible_pairs(t, t, BLOCK, BLOCK)
        third = 3 * self.layers.index(index) // len(self.layers)
        for spec, method in self.methods[index].items():
            if method is not None:
                keys = Keys(kv=KV(k, v), tq=t, softmax=softmax, fed=inputs)
                self.seen[spec, third].append(found(method, q, keys, truth, total))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--methods", default=METHODS, help='prefill specs with ";" between')
    parser.add_argument("--recipe", default=None, help="of the method that needs one and names none")
    parser.add_argument("--text", default="sotu")
    parser.add_argument("--ruler", default="niah_multikey_1,fwe")
    parser.add_argument("--lengths", default="4096")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--held-out", type=int, default=4, help="as in the training of the recipe")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = farspan.load(args.model)
    info = hf.inspect_model(model)
    specs = specs_of(args.methods)
    every = Needs(queries_before_rope=True, keys_before_rope=True, hidden_states=True)
    rows: list[dict[str, Any]] = []
    for length in map(int, args.lengths.split(",")):
        for kind, prompts in texts(tokenizer, args, length).items():
            watched = Watched(info, specs, args.recipe)
            with farspan.patch(model, "dense"):
                undo = [hf.observe(info, i, every, partial(watched.observe, i)) for i in watched.layers]
                for ids in prompts:
                    model(torch.tensor([ids]), use_cache=False, logits_to_keep=1)
                for step in undo:
                    step()
            for (spec, third), numbers in sorted(watched.seen.items()):
                named = {"text": kind, "tokens": length, "method": spec}
                named["layers"] = ("first", "middle", "last")[third] + " third"
                means = (fmean(x) for x in zip(*numbers, strict=True))
                rows.append(named | dict(zip(("density", "mass recall", "top blocks"), means, strict=True)))
            print(table([x for x in rows if (x["text"], x["tokens"]) == (kind, length)]), flush=True)
    print("written to", save("gates", rows, arguments=vars(args)))


if __name__ == "__main__":
    main()
