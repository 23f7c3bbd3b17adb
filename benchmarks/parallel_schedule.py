"""The simulated schedule of a layer against the real one: gloo processes on this machine, P = 2 and 4.

    python -m benchmarks.parallel_schedule [--ranks 2,4] [--lengths 1024,2048,4096] [--heads 16] [--json]

Three things are measured alone, every rank at once so that they share the machine's cores as they will later:
attention of a rank's chunks on keys that are there (two lengths: operations a second, and what a call costs
beside them), a message to the next rank, an all-gather and an all-to-all (two sizes each: bytes a second and
latency). From these the replay predicts a layer's time by gather, ring and ulysses at other lengths, which
then is measured. The shorter of the lengths serve for the figures alone.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from farspan.attention.kv import KV
from farspan.attention.ops.flash import flash
from farspan.attention.partial import Partial
from farspan.attention.softmax import Softmax
from farspan.parallel.group.comm import Ranks
from farspan.parallel.mechanisms.gather import gather_all
from farspan.parallel.mechanisms.layout import Layout, Split, zigzag
from farspan.parallel.mechanisms.ring import ring
from farspan.parallel.mechanisms.ulysses import ulysses
from farspan.parallel.mechanisms.volume import Geometry, PrefillCall, refusals
from farspan.parallel.planner.device import Device
from farspan.parallel.planner.simulate import Work, simulate

from .record import save, table

CALIBRATION = (512, 1536)  # lengths at which attention alone is timed
MESSAGES = (1 << 14, 1 << 22)  # bytes of the messages that links are timed with
MECHANISMS = ("gather", "ring", "ulysses")


@dataclass(frozen=True)
class Figures:
    """What was measured alone. flops: a second; launch: seconds a call; link, latency: by mechanism, bytes a
    second and seconds a message."""

    flops: float
    launch: float
    memory: float
    link: dict[str, float]
    latency: dict[str, float]

    def device(self, mechanism: str) -> Device:
        """For the replay: every rank on one node."""
        return Device(
            name="this machine",
            flops=self.flops,
            bandwidth=self.memory,
            memory=0,
            link_bandwidth=self.link[mechanism],
            node_bandwidth=self.link[mechanism],
            latency=self.latency[mechanism],
            launch=self.launch,
            utilisation=1.0,
            per_node=1 << 20,
        )


class Bench:
    """One rank's side of the measurements."""

    def __init__(self, heads: int, head_dim: int, repeats: int) -> None:
        self.ranks = Ranks(dist.group.WORLD)
        self.heads, self.head_dim, self.repeats = heads, head_dim, repeats
        self.geometry = Geometry(heads, heads, head_dim, 4)

    def seconds(self, runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """The slowest rank's seconds of each run, the least of all rounds: what other processes on the
        machine add is never negative. All ranks start a run together, and the runs take turns."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(self.repeats + 1):
            for name, run in runs.items():
                dist.barrier()
                begin = time.perf_counter()
                run()
                mine = torch.tensor(time.perf_counter() - begin)
                slowest = float(self.ranks.all_gather(mine).max())
                if repeat:  # the first warms up
                    times[name].append(slowest)
        return {name: min(values) for name, values in times.items()}

    def inputs(self, split: Split) -> list[torch.Tensor]:
        """q, k, v [1, H, rows, D]."""
        return [torch.randn(1, self.heads, split.rows, self.head_dim) for _ in range(3)]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, split: Split) -> None:
        """This rank's chunks over keys that are all there."""
        scale = self.head_dim**-0.5
        for slot, (_, end) in split.slots(self.ranks.rank):
            flash(q[:, :, slot], KV(k[:, :, :end], v[:, :, :end]), Softmax(scale))

    def alone(self) -> dict[str, Callable[[], Any]]:
        """What figures are made of."""
        runs: dict[str, Callable[[], Any]] = {}
        for length in CALIBRATION:
            split = zigzag(0, length, self.ranks.size)
            q, _, _ = self.inputs(split)
            k, v = (torch.randn(1, self.heads, length, self.head_dim) for _ in range(2))
            runs[f"attention {length}"] = partial(self.attend, q, k, v, split)
        for size in MESSAGES:
            runs |= {
                f"gather {size}": self._gather(size),
                f"ring {size}": self._shift(size),
                f"ulysses {size}": self._exchange(size),
            }
        x = torch.randn(1 << 24)
        y = torch.empty_like(x)
        return runs | {"copy": lambda: y.copy_(x)}

    def figures(self, taken: dict[str, float]) -> Figures:
        """From the seconds of :meth:`alone`."""
        size = self.ranks.size
        pairs = [length * (length + 1) / 2 / size for length in CALIBRATION]
        flops = [4 * self.head_dim * self.heads * n for n in pairs]
        rate, launch = _line(flops, [taken[f"attention {length}"] for length in CALIBRATION])
        link, latency = {}, {}
        for name in MECHANISMS:
            steps = size - 1 if name == "gather" else 1
            sent = size - 1 if name == "ulysses" else 1  # messages to all others at once
            each = [taken[f"{name} {message}"] / steps for message in MESSAGES]
            link[name], latency[name] = _line([sent * message for message in MESSAGES], each)
        return Figures(rate, launch, 2 * 4 * (1 << 24) / taken["copy"], link, latency)

    def _gather(self, size: int) -> Callable[[], Any]:
        x = torch.zeros(size, dtype=torch.uint8)
        return lambda: self.ranks.all_gather(x)

    def _shift(self, size: int) -> Callable[[], Any]:
        x, into = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
        return lambda: self.ranks.shift(x, into).wait()

    def _exchange(self, size: int) -> Callable[[], Any]:
        each = [size] * self.ranks.size
        x = torch.zeros(size * self.ranks.size, dtype=torch.uint8)
        return lambda: self.ranks.all_to_all(x, each, each)

    def layer(self, mechanism: str, length: int) -> Callable[[], Any]:
        """One layer's attention."""
        split, scale = zigzag(0, length, self.ranks.size), self.head_dim**-0.5
        q, k, v = self.inputs(split)
        nothing, empty = k[:, :, :0], Layout.empty(self.ranks.size)

        def gather() -> None:
            self.attend(q, *gather_all(k, v, nothing, nothing, empty, split, self.ranks), split)

        def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Partial:
            return flash(q, KV(k, v), Softmax(scale))

        runs: dict[str, Callable[[], Any]] = {
            "gather": gather,
            "ring": lambda: ring(q, k, v, split, self.ranks, softmax=Softmax(scale)),
            "ulysses": lambda: ulysses(q, k, v, split, self.ranks, whole),
        }
        return runs[mechanism]


def _line(work: list[float], seconds: list[float]) -> tuple[float, float]:
    """(work a second, seconds beside it) of two measurements."""
    rate = (work[1] - work[0]) / max(seconds[1] - seconds[0], 1e-9)
    return rate, max(0.0, seconds[0] - work[0] / rate)


def _rank(
    rank: int, size: int, folder: str, lengths: list[int], heads: int, head_dim: int, repeats: int
) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    bench = Bench(heads, head_dim, repeats)
    absent = refusals(bench.geometry, size)
    layers = [(name, length) for length in lengths for name in MECHANISMS if name not in absent]
    taken = bench.seconds(
        bench.alone() | {f"{name} of {length}": bench.layer(name, length) for name, length in layers}
    )
    figures = bench.figures(taken)
    rows = [
        {
            "ranks": size,
            "length": length,
            "mechanism": name,
            "measured ms": 1e3 * taken[f"{name} of {length}"],
            "predicted ms": 1e3 * predict(name, figures, bench.geometry, size, length),
        }
        for name, length in layers
    ]
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps({"figures": vars(figures), "rows": rows}))
    dist.barrier()
    dist.destroy_process_group()


def predict(mechanism: str, figures: Figures, geometry: Geometry, ranks: int, length: int) -> float:
    """Simulated seconds of one layer's attention. The simulation begins with the layer's matrix products.
    There are none here, and the time to start them is subtracted."""
    call = PrefillCall(ranks, length)
    trace = simulate(mechanism, Work(geometry=geometry), figures.device(mechanism), call)
    return trace.seconds - figures.launch


def measure(
    size: int, lengths: list[int], heads: int = 16, head_dim: int = 64, repeats: int = 5
) -> dict[str, Any]:
    """{"figures", "rows"} of ``size`` processes."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(size, folder, lengths, heads, head_dim, repeats), nprocs=size)
        return json.loads(Path(folder, "rows.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--lengths", default="1024,2048,4096")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON and write no file")
    args = parser.parse_args()
    lengths = [int(n) for n in args.lengths.split(",")]
    rows, figures = [], {}
    for size in map(int, args.ranks.split(",")):
        found = measure(size, lengths, args.heads, args.head_dim, args.repeats)
        figures[size] = found["figures"]
        rows += [
            row | {"predicted / measured": row["predicted ms"] / row["measured ms"]} for row in found["rows"]
        ]
    if args.json:
        print(json.dumps({"figures": figures, "rows": rows}))
        return
    print(table(rows))
    about = {"arguments": {**vars(args), "device": "cpu"}, "figures": figures}
    print("written to", save("parallel_schedule", rows, **about))


if __name__ == "__main__":
    main()
