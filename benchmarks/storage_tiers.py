"""One decode step of one attention layer whose keys and values lie on the device, in host memory or on disk.

    python -m benchmarks.storage_tiers [--keys 131072] [--repeats 7] [--folder PATH] [--device cuda]

On disk, a step is timed with the file's pages in the system's cache, and again after they were dropped from
it, so that they come from the disk. "resident" is what the process holds of the files, as the system counts
it (/proc/self/smaps): at most during a step, and after it, in percent of all keys and values. "CPU ms" is the
time that the process computes, which other work on the machine does not lengthen. Keys and queries are
random, so selected rows lie anywhere, and few are selected twice: for host memory's cache on a GPU that is
the worst case. There a step is also compared with that of transformers' offloaded cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .decode_step import Ours
from .record import clock, in_turn, save, table

CACHED, COLD = "in the system's cache", "on the disk"
METHODS = (
    "dense",
    "double_sparsity:k=1024",
    "double_sparsity:k=1024,group_factor=16",  # 1/16 of the channels, as in the paper
    "quest:k=1024",
)


def files(folder: str) -> list[int]:
    """The open files of this process in ``folder``, which have no names."""
    opened = ((int(fd), Path("/proc/self/fd", fd)) for fd in os.listdir("/proc/self/fd"))
    return [fd for fd, link in opened if link.is_symlink() and os.readlink(link).startswith(folder)]


def drop_pages(folder: str) -> None:
    """Drop the pages of these files from the system's cache."""
    for fd in files(folder):
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def resident(folder: str) -> int:
    """Bytes of these files that are in the memory of this process."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line[:1].isupper():
            ours = folder in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def most_resident(folder: str, run: Callable[[], Any]) -> int:
    """The most that ``resident`` is while ``run`` runs."""
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most.append(resident(folder))

    thread = threading.Thread(target=watch)
    thread.start()
    run()
    done.set()
    thread.join()
    return max(most)


class Offloaded:
    """transformers' cache_implementation="offloaded": while a layer computes, all keys and values of the next
    one are copied to the GPU. A step is that of a few layers, divided by their number."""

    layers = 4

    def __init__(self, k: torch.Tensor, v: torch.Tensor, heads: int) -> None:
        self.cache = DynamicCache(offloading=True)
        self.module = SimpleNamespace(num_key_value_groups=heads // k.shape[1], is_causal=True)
        for layer in range(self.layers):
            self.cache.update(k, v, layer)

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
        begin = clock()
        for layer in range(self.layers):
            keys, values = self.cache.update(k, v, layer)
            sdpa_attention_forward(self.module, q, keys, values, None, scaling=q.shape[-1] ** -0.5)
        return (clock() - begin) / self.layers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    h, hkv, d, folder = args.heads, args.kv_heads, args.head_dim, str(Path(args.folder).resolve())

    def random(heads: int, length: int) -> torch.Tensor:
        return torch.randn(1, heads, length, d, device=args.device, dtype=torch.bfloat16)

    k, v = random(hkv, args.keys), random(hkv, args.keys)
    whole = k.nbytes + v.nbytes
    lower = "disk:folder=" + folder if args.device == "cpu" else "host"
    made = {
        (tier, spec): Ours(spec, k, v, h, storage)
        for tier, storage in (("device", "device"), (lower.partition(":")[0], lower))
        for spec in METHODS
    }
    rival = Offloaded(k, v, h) if args.device != "cpu" else None
    del k, v

    def step(one: Ours) -> tuple[float, float]:
        q, k1, v1 = random(h, 1), random(hkv, 1), random(hkv, 1)
        begin, work = clock(), time.process_time()
        one.step(q, k1, v1)
        return clock() - begin, time.process_time() - work

    def from_disk(one: Ours) -> tuple[float, float]:
        drop_pages(folder)
        return step(one)

    cached = {(*name, CACHED if name[0] == "disk" else ""): partial(step, one) for name, one in made.items()}
    cold = {(*name, COLD): partial(from_disk, one) for name, one in made.items() if name[0] == "disk"}
    taken = in_turn(cached, args.repeats) | (in_turn(cold, args.repeats) if cold else {})
    seconds, work = (
        {name: statistics.median(pair[i] for pair in each) for name, each in taken.items()} for i in (0, 1)
    )
    rows, theirs = [], 0.0
    if rival is not None:
        runs = {"offloaded": lambda: rival.step(random(h, 1), random(hkv, 1), random(hkv, 1))}
        theirs = statistics.median(in_turn(runs, args.repeats)["offloaded"])
        rows.append({"memory": "host", "step": "transformers' offloaded cache", "ms": 1e3 * theirs})
    for (tier, spec, pages), taken in seconds.items():
        one = made[tier, spec]
        row = {"memory": tier, "step": spec, "pages": pages, "ms": 1e3 * taken}
        row["times faster than dense"] = seconds[tier, "dense", pages] / taken
        if rival is not None:
            row["times faster than offloaded"] = theirs / taken
        row["CPU ms"] = 1e3 * work[tier, spec, pages]
        row["device %"] = 100 * one.cache.store.tiers["device"] / whole
        asked, hits = one.layer.hot
        row["hit rate"] = hits / asked if asked else float("nan")
        if tier == "disk":
            row["resident in a step %"] = 100 * most_resident(folder, partial(step, one)) / whole
            row["resident after it %"] = 100 * resident(folder) / whole
        rows.append(row)
    heads = list(dict.fromkeys(head for row in rows for head in row))
    rows = [{head: row.get(head, "") for head in heads} for row in rows]
    print(table(rows))
    about = {name: value for name, value in vars(args).items() if name != "folder"}
    print("written to", save("storage_tiers", rows, arguments=about))


if __name__ == "__main__":
    main()
