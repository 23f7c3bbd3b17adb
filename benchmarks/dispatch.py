"""What a layer dispatches in a call: kernels launched, waits for the device, copies to the device, by method
and phase.

    python -m benchmarks.dispatch [--devices cuda,cpu] [--methods dense,quest]

No GPU is needed: "cuda" is a simulated device (tests/simulated.py), on which farspan takes the ways that it
takes on a GPU. A Triton kernel counts as one launch and a view as none. Every method has the laws' tiny
parameters (tests/laws/parameters.py), one layer of 8 query and 2 KV heads, a prompt of 120 tokens and decode
steps after it, alone and in a batch of two rows, one of which is padded on the left by 33. "prefill" is the
call of the prompt. "step" is the decode step of the median number of launches and "largest step" that of
most, of nine steps. "waits" and "copies" are those of all nine steps.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from tests.dispatch import PADDED, count, tiny_methods

from .record import save, table


def row(name: str, device: str, starts: list[int] | None) -> dict[str, Any]:
    method = tiny_methods()[name]
    prefill, steps, _ = count(method, device, starts)
    launches = [step.launches.total() for step in steps]
    return {
        "method": name,
        "device": device,
        "batch": "padded" if starts else "one row",
        "prefill": prefill.launches.total(),
        "prefill waits": prefill.reads.total(),
        "prefill copies": prefill.uploads.total(),
        "step": int(statistics.median(launches)),
        "largest step": max(launches),
        "waits": sum(step.reads.total() for step in steps),
        "copies": sum(step.uploads.total() for step in steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", default="cuda,cpu")
    parser.add_argument("--methods", default=",".join(tiny_methods()))
    parser.add_argument("--name", default="dispatch", help="of the file in benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row(name, device, starts)
        for device in args.devices.split(",")
        for starts in (None, PADDED)
        for name in args.methods.split(",")
    ]
    print(table(rows))
    print(
        "written to",
        save(args.name, rows, arguments=vars(args), specs={n: str(m) for n, m in tiny_methods().items()}),
    )


if __name__ == "__main__":
    main()
