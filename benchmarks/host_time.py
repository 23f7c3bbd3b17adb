"""The host's time of a decode step on a tiny model, where arithmetic takes little.

    python -m benchmarks.host_time [--layers 4] [--keys 2000] [--tokens 50] [--repeats 9]
    python -m benchmarks.host_time --before FOLDER

A random Llama of a few narrow layers reads a prompt and then decodes ``--tokens`` tokens at batch 1, patched
by each method and unpatched (transformers' SDPA with DynamicCache). Runs are in turn on one thread, and the
medians are over the repeats. "wall us" is by the clock and "CPU us" the process's own time, both per token
and layer, with the layer's projections and MLP. "added" is the difference to the unpatched model in CPU
time, which a busy machine distorts less. Recycled runs a whole stride: one full step and the others recycled.

FOLDER has another checkout under the name farspan. It runs in a process of its own, in turn with this one run
by run, and stands beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import farspan
from farspan.runtime.hf import with_cache

from .record import commit, in_turn, save, specs_of, table

METHODS = (
    "dense",
    "window:w=508,sinks=4",
    "quest:k=512,dense_layers=0",
    "double_sparsity:k=512,dense_layers=0",
    "recycled:k=512,stride=50",
    "block_topk:k=512",
)
UNPATCHED = "unpatched sdpa"


def make_model(layers: int, head_dim: int) -> Any:
    """A random Llama with 4 query heads and 2 KV heads, in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=4 * head_dim,
        intermediate_size=8 * head_dim,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).eval()


class Decoding:
    """A model, patched or not, that decodes after a prompt of ``ids`` [1, keys]."""

    def __init__(self, args: argparse.Namespace, method: str, ids: torch.Tensor) -> None:
        self.ids, self.tokens = ids, args.tokens
        self.model = make_model(args.layers, args.head_dim)
        if method != UNPATCHED:
            recipe = {}
            if method.startswith("double_sparsity"):
                given = {"input_ids": ids[:, :256]}
                made = farspan.calibrate(self.model, lambda *_, **__: given, "", tokens=256)
                recipe = {"recipe": made}
            farspan.patch(self.model, method, **recipe)

    def run(self) -> tuple[float, float]:
        """(wall, CPU) seconds of the decode steps after a fresh prompt."""
        cache = DynamicCache(config=self.model.config)
        mask = torch.ones(1, self.ids.shape[1] + self.tokens, dtype=torch.long)
        length = self.ids.shape[1]
        self.model(
            self.ids, attention_mask=mask[:, :length], **with_cache(self.model, cache), logits_to_keep=1
        )
        token = self.ids[:, :1]
        wall, cpu = time.perf_counter(), time.process_time()
        for step in range(1, self.tokens + 1):
            self.model(
                token,
                attention_mask=mask[:, : length + step],
                **with_cache(self.model, cache),
                logits_to_keep=1,
            )
        return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--keys", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--methods", default="; ".join(METHODS), help='specs with ";" between')
    parser.add_argument("--before", help="a folder with another checkout, named farspan")
    parser.add_argument("--name", default="host_time", help="of the file in benchmarks/results")
    parser.add_argument("--serve", action="store_true", help="run what stdin names, for another process")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    ids = torch.randint(3, 128, (1, args.keys), generator=torch.Generator().manual_seed(0))
    methods = [UNPATCHED, *specs_of(args.methods)]
    runs = {method: Decoding(args, method, ids) for method in methods}
    if args.serve:
        for line in sys.stdin:
            print(*runs[line.strip()].run(), flush=True)
        return
    sides: dict[str, Callable[[str], tuple[float, ...]]] = {"": lambda method: runs[method].run()}
    about = vars(args)
    if args.before:
        sides = {" before": other(args), **sides}
        about = about | {"before": commit(Path(args.before) / "farspan")}
    times = in_turn(
        {(m, side): partial(run, m) for m in methods for side, run in sides.items()}, args.repeats
    )
    per = 1e6 / (args.tokens * args.layers)
    median = {x: [per * statistics.median(t) for t in zip(*taken, strict=True)] for x, taken in times.items()}
    rows: list[dict[str, Any]] = []
    for method in methods:
        row: dict[str, Any] = {"method": method}
        for side in sides:
            wall, cpu = median[method, side]
            added = cpu - median[UNPATCHED, side][1]
            row |= {f"wall us{side}": wall, f"CPU us{side}": cpu, f"added{side}": added}
        rows.append(row)
    print(table(rows))
    print("written to", save(args.name, rows, arguments=about))


def other(args: argparse.Namespace) -> Callable[[str], tuple[float, ...]]:
    """Runs a method in a process of its own, with the farspan of another checkout."""
    options = ("layers", "head_dim", "keys", "tokens", "methods")
    given = [x for name in options for x in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.host_time", "--serve", *given],
        env=os.environ | {"PYTHONPATH": args.before},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(method: str) -> tuple[float, ...]:
        assert process.stdin is not None and process.stdout is not None
        print(method, file=process.stdin, flush=True)
        return tuple(map(float, process.stdout.readline().split()))

    return run


if __name__ == "__main__":
    main()
