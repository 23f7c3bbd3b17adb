"""A whole model's prefill seconds and decode tokens per second, patched against unpatched, in one run.

    python -m benchmarks.generate [--model smollm2-135m] [--tokens 7900] [--repeats 3] [--device cuda]

The prompt is real text. Prefill and decode are timed apart: decode is what a longer ``generate`` takes beyond
a one-token one.
"""

from __future__ import annotations

import argparse
import copy
from contextlib import nullcontext
from typing import Any

import torch

import farspan
from farspan.evals.text import load_prose

from .record import clock, save, table

METHODS = (
    "dense",
    "window:w=1020,sinks=4",
    "recycled:k=512,stride=10",
    "double_sparsity:k=512",
    "quest:k=512",
    "block_topk:k=2048",
)


def prefill(model: Any, ids: torch.Tensor) -> tuple[float, Any]:
    """Seconds of a prefill with a cache, and the cache."""
    begin = clock()
    out = model(ids, use_cache=True, logits_to_keep=1)
    return clock() - begin, out.past_key_values


def decode(model: Any, ids: torch.Tensor, cache: Any, tokens: int) -> float:
    """Seconds per token of a plain generate that goes on from a filled cache, its first step left out."""
    stamps: list[float] = []

    class Clock:
        def put(self, _: torch.Tensor) -> None:
            stamps.append(clock())

        def end(self) -> None:
            pass

    model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        streamer=Clock(),
    )
    return (stamps[-1] - stamps[2]) / (len(stamps) - 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=7900)
    parser.add_argument("--new", type=int, default=44)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = farspan.load(args.model)
    model.to(args.device)
    text = "\n\n".join(load_prose().documents[:20])
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : args.tokens + 1].to(args.device)
    recipe = farspan.calibrate(model, tokenizer, text, tokens=1024)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ("unpatched", *METHODS)}
    for repeat in range(args.repeats + 1):  # the methods in turn, so that drift of the machine hits all alike
        for name, (first, rest) in times.items():
            with nullcontext() if name == "unpatched" else farspan.patch(model, name, recipe=recipe):
                seconds, cache = prefill(model, ids[:, :-1])
                per_token = decode(model, ids, copy.deepcopy(cache), args.new)
            if repeat:
                first.append(seconds)
                rest.append(per_token)
    middle = {name: [sorted(part)[len(part) // 2] for part in parts] for name, parts in times.items()}
    base = middle["unpatched"]
    rows = [
        {
            "method": name,
            "prefill s": p,
            "prefill x": base[0] / p,
            "tokens/s": 1 / t,
            "decode x": base[1] / t,
        }
        for name, (p, t) in middle.items()
    ]
    print(table(rows))
    print("written to", save("generate", rows, arguments=vars(args)))


if __name__ == "__main__":
    main()
