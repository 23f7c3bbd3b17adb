"""One dense decode step of one layer over quantised keys and values, against bfloat16.

    python -m benchmarks.storage [--keys 131072] [--repeats 7] [--threads 1 2]

Shapes are those of Llama 3.1 8B (32 heads on 8 of 128) and SmolLM2 360M (15 heads on 5 of 64). A step is one
call of ``decode``. Seconds are medians, in turn, of the CPU time of the process divided by its threads: other
work on the machine is not in them. Bytes are those of keys and values, the recent ones included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from farspan.attention.kv import KV
from farspan.attention.ops.decode import decode
from farspan.attention.softmax import Softmax
from farspan.runtime.store.storage import parse_storage
from farspan.runtime.store.store import KVStore

from .record import interleaved, save, table

SHAPES = {"llama-3.1-8b": (32, 8, 128), "smollm2-360m": (15, 5, 64)}
STORAGES = ("device", "int8", "int4")


def stored(storage: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax: Softmax) -> KV:
    """k and v as a store holds them after a prompt."""
    store = KVStore(parse_storage(storage))
    store.append(k, v)
    store.pack(q, softmax)
    assert store.kv is not None
    return store.kv


def cpu_seconds(run: Callable[[], Any]) -> float:
    """CPU time of one run, per thread."""
    begin = time.process_time()
    run()
    return (time.process_time() - begin) / torch.get_num_threads()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=131072)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    rows = []
    for name, (heads, kv_heads, d) in SHAPES.items():
        q = torch.randn(1, heads, 1, d).bfloat16()
        k, v = (torch.randn(1, kv_heads, args.keys, d).bfloat16() for _ in range(2))
        softmax = Softmax(d**-0.5)
        held = {storage: stored(storage, q, k, v, softmax) for storage in STORAGES}
        for threads in args.threads:
            torch.set_num_threads(threads)
            runs = {storage: partial(decode, q, kv, softmax) for storage, kv in held.items()}
            seconds = interleaved(runs, args.repeats, seconds=cpu_seconds)
            for storage, taken in seconds.items():
                rows.append(
                    {
                        "shape": name,
                        "threads": threads,
                        "storage": storage,
                        "ms": 1e3 * taken,
                        "of bfloat16's time": taken / seconds["device"],
                        "of its bytes": held[storage].nbytes / held["device"].nbytes,
                    }
                )
    print(table(rows))
    print("written to", save("storage", rows, arguments={**vars(args), "device": "cpu"}))


if __name__ == "__main__":
    main()
