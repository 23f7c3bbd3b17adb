"""A whole model's prefill seconds and decode tokens per second, patched against unpatched, in one run.

    python -m benchmarks.generate [--model smollm2-135m] [--tokens 7900] [--repeats 3] [--device cuda]
    python -m benchmarks.generate --tokens 4096,32768 --new 1 --methods "dense; antidiagonal; dhsa"
    python -m benchmarks.generate --shape llama-3.1-8b --device cuda --tokens 32768,131072 --new 256
    python -m benchmarks.generate --methods "dense; dense static; quest:k=512; quest:k=512 static"

"static" behind a method gives it a cache of fixed size (``patch(..., static=N)``).
The prompt is real text; positions are stretched (YaRN) where it is longer than the model's. ``--shape`` makes
a model of random weights instead, as large as the real one: its queries and keys are no real ones, and what
methods read that choose by them is not what they would read. Prefill is time to first token but for sampling
it; decode is what a longer ``generate`` takes beyond the first tokens. Peak memory is what prefill needed at
most beyond what the process (on a GPU: the device) held before.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import farspan
from farspan.evals.text import load_prose
from farspan.runtime.hf import returned_cache, with_cache

from .record import Stamps, clock, save, specs_of, table

METHODS = (
    "dense; window:w=1020,sinks=4; recycled:k=512,stride=10; double_sparsity:k=512; quest:k=512; "
    "block_topk:k=2048"
)
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {  # as its config.json has it
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "tiny": {  # to try the command
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
}


@dataclass
class Times:
    """What the rounds of one method took, and what it read."""

    prefill: list[float] = field(default_factory=list)
    token: list[float] = field(default_factory=list)
    peak: float = 0.0
    densities: dict[str, float | None] = field(default_factory=dict)


def patch(model: Any, name: str, recipe: Any, room: int) -> AbstractContextManager[farspan.Patched | None]:
    """The patch by a method's name, "static" behind it or not; room: the positions of a static cache."""
    if name == "unpatched":
        return nullcontext()
    spec = name.removesuffix(" static")
    takes: dict[str, Any] = {"recipe": recipe} if "double_sparsity" in spec else {}
    return farspan.patch(model, spec, static=room if spec != name else None, **takes)


def prefill(model: Any, ids: torch.Tensor) -> tuple[float, Any]:
    """Seconds of a prefill with a cache, and the cache."""
    begin = clock()
    out = model(ids, use_cache=True, logits_to_keep=1)
    return clock() - begin, returned_cache(out)


def decode(model: Any, ids: torch.Tensor, cache: Any, tokens: int) -> float:
    """Seconds per token of a plain generate that goes on from a filled cache, its first step left out."""
    stamps = Stamps()
    model.generate(
        ids,
        **with_cache(model, cache),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        streamer=stamps,
    )
    return (stamps.times[-1] - stamps.times[2]) / (len(stamps.times) - 3)


def resident(device: str, name: str) -> float:
    """Bytes the process holds ("VmRSS"), or held at most ("VmHWM") since ``forget_peak``."""
    if device != "cpu":
        return torch.cuda.memory_allocated() if name == "VmRSS" else torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def load(args: argparse.Namespace, longest: int) -> tuple[Any, torch.Tensor, Any]:
    """(model, token ids [1, longest], recipe of double_sparsity)."""
    if args.shape is None:
        _, tokenizer = farspan.load(args.model)
        text = "\n\n".join(load_prose().documents)
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :longest]
        rope = f"yarn:{longest}" if longest > tokenizer.model_max_length else None
        model, _ = farspan.load(args.model, rope=rope)
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(**SHAPES[args.shape])
        with torch.device(args.device):
            model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
        ids = torch.randint(0, config.vocab_size, (1, longest), generator=torch.Generator().manual_seed(0))
    if ids.shape[1] < longest:
        raise SystemExit(f"the prose has {ids.shape[1]} tokens; {longest} are wanted.")
    model, ids = model.to(args.device), ids.to(args.device)
    recipe = farspan.calibrate(model, lambda *_, **__: {"input_ids": ids[:, :1024]}, "", tokens=1024)
    return model, ids, recipe


def model_parser(description: str | None, methods: str) -> argparse.ArgumentParser:
    """A parser of the options that ``load`` and ``names_of`` read."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shape", choices=SHAPES, help="random weights in this shape, not a model")
    parser.add_argument("--methods", default=methods, help='specs with ";" between')
    parser.add_argument("--device", default="cpu")
    return parser


def names_of(args: argparse.Namespace) -> list[str]:
    """The names that ``patch`` takes: "unpatched" and the methods."""
    return ["unpatched", *specs_of(args.methods)]


def main() -> None:
    parser = model_parser(__doc__, METHODS)
    parser.add_argument("--tokens", default="7900", help="lengths of the prompt")
    parser.add_argument("--new", type=int, default=44, help="tokens to decode; 1: prefill alone")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="generate", help="of the file in benchmarks/results")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    lengths = [int(n) for n in args.tokens.split(",")]
    model, ids, recipe = load(args, max(lengths) + 1)
    methods = names_of(args)
    rows = []
    for length in lengths:
        prompt = ids[:, : length + 1]
        times = {name: Times() for name in methods}
        for repeat in range(args.repeats + 1):  # in turn, so that drift of the machine hits all alike
            for name, found in times.items():
                warm_up = repeat == 0  # not timed, so a shorter prompt does where the long one takes minutes
                given = prompt[:, : min(length, 4096) + 1] if warm_up else prompt
                run(model, given, name, recipe, Times() if warm_up else found, args)
        rows += [line(length, name, found, times["unpatched"]) for name, found in times.items()]
        print(table(rows[-len(times) :]), flush=True)
    print("written to", save(args.name, rows, arguments=vars(args)))


def run(
    model: Any, ids: torch.Tensor, name: str, recipe: Any, found: Times, args: argparse.Namespace
) -> None:
    """One prefill and, of more than one new token, one decode."""
    with patch(model, name, recipe, ids.shape[1] + args.new) as patched:
        forget_peak(args.device)
        before = resident(args.device, "VmRSS")
        seconds, cache = prefill(model, ids[:, :-1])
        found.prefill.append(seconds)
        found.peak = max(found.peak, resident(args.device, "VmHWM") - before)
        if args.new > 1:
            found.token.append(decode(model, ids, cache, args.new))
        if patched is not None:
            summary = patched.report().summary
            found.densities = {phase: summary.get(f"{phase}_density") for phase in ("prefill", "decode")}


def line(length: int, name: str, found: Times, base: Times) -> dict[str, Any]:
    """A row of the table."""
    first, before = statistics.median(found.prefill), statistics.median(base.prefill)
    row = {"tokens": length, "method": name, "prefill s": first, "prefill x": before / first}
    if found.token:
        rest = statistics.median(found.token)
        row |= {"tokens/s": 1 / rest, "decode x": statistics.median(base.token) / rest}
    read = {f"{phase} keys": found.densities.get(phase) or 1.0 for phase in ("prefill", "decode")}
    return row | read | {"peak GB": found.peak / 1e9}


if __name__ == "__main__":
    main()
