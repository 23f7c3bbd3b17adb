"""What one decode step of a whole model launches: kernels per layer, their time, and the host's.

    python -m benchmarks.launches --shape llama-3.1-8b --tokens 32768 --device cuda

A few steps run under torch's profiler, on a cache that a prefill has filled, and their mean is shown. On a
GPU a launch is a kernel, a copy or a fill that the device ran; where the device is busy for much less than a
step takes, the host is what decode waits for. On a CPU operations of torch are counted in their place, those
that other operations call left out, to try the command. The times of the profiler are longer than those
without it: ``ms a token`` is measured without. --methods names decode methods; "static" behind one gives it a
cache of fixed size.
"""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from farspan.runtime.hf import with_cache

from .generate import load, model_parser, names_of, patch, prefill
from .record import clock, save, table

METHODS = "dense; window:w=1020,sinks=4; double_sparsity:k=2048; quest:k=2048"
STEPS = 4


def main() -> None:
    parser = model_parser(__doc__, METHODS)
    parser.add_argument("--tokens", type=int, default=7900, help="length of the prompt")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model, ids, recipe = load(args, args.tokens + 1)
    layers = model.config.num_hidden_layers
    rows = []
    for name in names_of(args):
        spec = name if name == "unpatched" else f"dense + {name}"
        with patch(model, spec, recipe, args.tokens + 4 * STEPS):
            rows.append({"tokens": args.tokens, "method": name, **measured(model, ids, layers)})
    print(table([{key: value for key, value in row.items() if key != "most"} for row in rows]))
    for row in rows:
        print(f"{row['method']}: {row['most']}")
    print("written to", save("launches", rows, arguments=vars(args)))


def measured(model: Any, ids: torch.Tensor, layers: int) -> dict[str, Any]:
    """One prefill, and then a few decode steps without and a few under the profiler."""
    _, cache = prefill(model, ids[:, :-1])

    def step() -> float:
        begin = clock()
        model(ids[:, -1:], **with_cache(model, cache), use_cache=True)
        return clock() - begin

    for _ in range(2):  # of a fixed cache, the second call is captured
        step()
    seconds = statistics.median(step() for _ in range(STEPS))
    gpu = ids.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiled:
        for _ in range(STEPS):
            step()
    if gpu:
        events = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
        busy = sum(event.device_time for event in events)
    else:
        events = [event for event in profiled.events() if event.cpu_parent is None]
        busy = 0.0
    names = Counter(event.name for event in events)
    most = ", ".join(f"{count / STEPS:.0f} x {name[:60]}" for name, count in names.most_common(8))
    return {
        "launches a token": len(events) / STEPS,
        "launches a layer": len(events) / STEPS / layers,
        "device ms a token": busy / STEPS / 1e3,  # the profiler's times are in microseconds
        "ms a token": 1e3 * seconds,
        "most": most,
    }


if __name__ == "__main__":
    main()
