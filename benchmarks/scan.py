"""``scan`` beside dense attention and flash-linear-attention, in one run.

    python -m benchmarks.scan [--device cpu|cuda] [--lengths 4096,16384] [--heads 9] [--kv-heads 3]
        [--head-dim 64] [--dtype float32] [--backward] [--repeats 5]

Per length: torch's causal attention by each backend of the device (q of --heads, k and v of --kv-heads), and
the three recurrences (q and k of --kv-heads, v of --heads, a state of head-dim x head-dim a head), each by
"auto" and, on CUDA where flash-linear-attention is installed, by its chunk kernels. Medians of interleaved
runs. "x dense" is the fastest dense run's time over the run's, "x fla" the rival's time for the same
recurrence over the run's; above 1 is faster. --backward times the forward and the gradients of every input.
The last rows are one step of each recurrence. Everything goes to results/scan_<device>.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from farspan.attention.ops.dispatch import implementations
from farspan.attention.ops.scan import scan, scan_step

from . import rivals
from .record import interleaved, save, table

Calls = dict[str, Callable[[], Any]]


def inputs(args: argparse.Namespace, length: int) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v of the recurrences and of dense attention, alike but for the heads of q."""
    dtype = getattr(torch, args.dtype)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, heads, length, args.head_dim, device=args.device).to(dtype)

    few = [normal(args.kv_heads), normalize(normal(args.kv_heads), dim=-1), normal(args.heads)]
    return few, [normal(args.heads), few[1], normal(args.kv_heads)]


def decays(args: argparse.Namespace, length: int) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """log_decay and beta of each recurrence."""
    shape = (1, args.heads, length)
    head = -0.1 * torch.rand(shape, device=args.device)
    channel = -0.1 * torch.rand(*shape, args.head_dim, device=args.device)
    beta = torch.rand(shape, device=args.device)
    return {"ssd": (head, {}), "gated linear": (channel, {}), "gated delta": (head, {"beta": beta})}


def with_gradients(run: Callable[..., Any], tensors: list[Tensor]) -> Callable[[], Any]:
    """``run`` and the gradients of its first result with respect to ``tensors``."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]

    def both() -> Any:
        out = run(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return both


def calls(args: argparse.Namespace, length: int) -> tuple[Calls, dict[str, str]]:
    """What is timed, by name, and the implementation that each recurrence ran by."""
    few, (q, k, v) = inputs(args, length)
    runs: Calls = {}
    used: dict[str, str] = {}
    if args.backward:

        def dense(*each: Tensor) -> Tensor:
            return rivals.sdpa(*each, is_causal=True, enable_gqa=True)

        runs["sdpa"] = with_gradients(dense, [q, k, v])
    else:
        runs |= {name: run for name, run, _ in rivals.sdpa_runs(q, k, v, causal=True) if "math" not in name}
    for kind, (decay, more) in decays(args, length).items():
        for impl in ("auto", "fla") if args.device == "cuda" and rivals.fla_is_there() else ("auto",):
            names, extra = list(more), [decay, *more.values()]

            def run(*each: Tensor, impl: str = impl, names: list[str] = names) -> Tensor:
                q, k, v, decay, *rest = each
                return scan(q, k, v, decay, **dict(zip(names, rest, strict=True)), impl=impl)[0]

            tensors = [*few, *extra]
            name = kind if impl == "auto" else f"{kind}, fla"
            runs[name] = with_gradients(run, tensors) if args.backward else lambda r=run, t=tensors: r(*t)
            with implementations() as seen:
                runs[name]()  # the first call compiles and tunes
            used[name] = " ".join(sorted({impl for _, impl in seen}))
    return runs, used


def steps(args: argparse.Namespace) -> Calls:
    """One step of each recurrence."""
    (q, k, v), _ = inputs(args, 1)
    state = torch.zeros(1, args.heads, args.head_dim, args.head_dim, device=args.device)
    runs: Calls = {}
    for kind, (decay, more) in decays(args, 1).items():
        each = [x[:, :, 0] for x in (q, k, v, decay)]
        options = {name: x[:, :, 0] for name, x in more.items()}
        runs[kind] = lambda each=each, options=options: scan_step(*each, state=state, **options)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--lengths")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    on_cuda = args.device == "cuda"
    args.dtype = args.dtype or ("bfloat16" if on_cuda else "float32")
    lengths = args.lengths or ("8192,16384,32768,65536" if on_cuda else "4096,16384")
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    with torch.set_grad_enabled(args.backward):
        for length in map(int, lengths.split(",")):
            runs, used = calls(args, length)
            seconds = interleaved(runs, args.repeats)
            dense = min(taken for name, taken in seconds.items() if name not in used)
            for name, taken in seconds.items():
                rival = seconds.get(f"{name}, fla")
                rows.append(
                    {
                        "length": length,
                        "run": name,
                        "impl": used.get(name, "torch"),
                        "ms": 1e3 * taken,
                        "x dense": dense / taken,
                        "x fla": rival / taken if rival else None,
                    }
                )
        with torch.no_grad():
            for name, taken in interleaved(steps(args), 50 * args.repeats).items():
                one = {"length": 1, "run": f"{name}, step", "impl": "torch", "ms": 1e3 * taken}
                rows.append({**one, "x dense": None, "x fla": None})
    print(table(rows))
    for text in sorted(rivals.said):
        print("skipped:", text)
    parts = ["scan", args.device, *(["backward"] if args.backward else [])]
    print("written to", save("_".join(parts), rows, arguments=vars(args), skipped=sorted(rivals.said)))


if __name__ == "__main__":
    main()
