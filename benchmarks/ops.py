"""Every operation beside what else there is: times, shares of the device's ceilings, break-even lengths.

    python -m benchmarks.ops [--device cpu|cuda] [--ops decode pool] [--lengths 1024,2048]
        [--densities 0.1,0.5] [--heads 32] [--kv-heads 8] [--head-dim 128] [--dtype bfloat16] [--block 64]
        [--batch 8] [--tokens 2048] [--repeats 7] [--seconds-limit 30] [--flex] [--json]

Times are medians of interleaved runs. "of copy" is the share of a large copy's bandwidth that moving the
bytes a run cannot do without would be in that time, "of matmul" the share of a large matrix product's rate
that the operations on the pairs asked for would be: a good run is near 100 % in the larger of the two. (Data
that stays in a cache may pass 100 % of a copy.) "x dense" is the fastest dense run's time over the run's,
"impl" what farspan's operations ran by.

On CUDA "ms" is the device's time and "host ms" what the host needs to queue the run; alone, a run takes the
larger of the two.

Selection in prefill is block_topk's (pool of q and k, scores, select), at decode double_sparsity's and
quest's with their summaries kept as between steps; "block_sparse + selection" is the sum of the two times.
FlexAttention's BlockMask is made beforehand; on the CPU it is compiled half a minute, so --flex asks for it.
The break-even length is the shortest one measured from which on a run is faster than every dense one, also
at each longer length measured. Everything goes to results/ops_<device>.json, after each length.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from farspan.attention.ops.dispatch import implementations

from . import rivals
from .cases import CASES
from .ceilings import Ceilings, TooMuch, measure
from .inputs import Run, Setting
from .record import interleaved, save, table

Row = dict[str, Any]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DENSITIES = {"cpu": (0.125, 0.25, 0.5, 1.0), "cuda": (0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 1.0)}
LENGTHS = tuple(1024 << i for i in range(9))  # 1K .. 256K
BATCH = {"cpu": 1, "cuda": 8}
SECONDS = {"cpu": 20.0, "cuda": 3.0}  # that the repeats of one length may take
LEAST, MOST = {"cpu": 2, "cuda": 3}, {"cpu": 15, "cuda": 21}  # repeats


class Record:
    """Rows and refusals, told as they come and saved as a whole."""

    def __init__(self, setting: Setting, ceilings: Ceilings, arguments: Row, quiet: bool) -> None:
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        self._setting, self._ceilings, self._arguments = setting, ceilings, arguments
        self._to = sys.stderr if quiet else sys.stdout

    def say(self, text: str) -> None:
        print(text, file=self._to, flush=True)

    def skip(self, text: str) -> None:
        if text not in self.skipped:
            self.skipped.append(text)
            self.say(f"skipped: {text}")

    def save(self) -> Path:
        ceilings = {"copy bytes/s": self._ceilings.bandwidth, "matmul flops/s": self._ceilings.rate}
        # A run of some of it leaves the whole run's file alone.
        given = self._arguments
        parts = [*(given["ops"] or ()), *map(str, given["lengths"] or ())]
        return save(
            "_".join(["ops", self._setting.device, *parts]),
            self.rows,
            arguments=self._arguments,
            ceilings=ceilings,
            break_even=break_even(self.rows),
            selection=selection_share(self.rows),
            skipped=self.skipped,
        )


def timed(runs: list[Run], where: str, record: Record, ceilings: Ceilings, repeats: int | None) -> list[Row]:
    """One row per run that could be timed."""
    on_gpu, left, used, round_seconds = ceilings.device == "cuda", [], [], 0.0
    for run in runs:
        label = f"{where}, {run.name}{' at ' + run.at if run.at else ''}"
        try:
            ceilings.check(flops=run.flops, bytes=run.bytes, memory=run.memory)
            with implementations() as seen:
                for _ in range(2 if on_gpu or run.compiles else 1):  # the first compiles and tunes
                    taken = ceilings.timer(run.call)
        except TooMuch as reason:
            record.skip(f"{label}: {reason}")
        except torch.OutOfMemoryError:
            record.skip(f"{label}: out of memory")
            torch.cuda.empty_cache()
        else:
            if run.role == "rival" and taken > ceilings.seconds_limit:
                record.skip(f"{label}: took {taken:.0f} s, over --seconds-limit")
                continue
            left.append(run)
            used.append(" ".join(sorted({impl for _, impl in seen})) or None)
            round_seconds += taken
    if not left:
        return []
    kind = ceilings.device
    repeats = repeats or min(MOST[kind], max(LEAST[kind], int(SECONDS[kind] / max(round_seconds, 1e-9))))
    calls = {str(i): run.call for i, run in enumerate(left)}
    seconds = list(interleaved(calls, repeats, seconds=ceilings.timer, warm_up=0).values())
    dense = [s for run, s in zip(left, seconds, strict=True) if run.role == "dense"]
    rows: list[Row] = []
    for run, impl, taken in zip(left, used, seconds, strict=True):
        rows.append(
            {
                "run": run.name,
                "impl": impl,
                "role": run.role,
                "at": run.at,
                "density": run.density,
                "ms": 1e3 * taken,
                "host ms": None if (host := ceilings.timer.queueing(run.call)) is None else 1e3 * host,
                "of copy": run.bytes / ceilings.bandwidth / taken if run.bytes else None,
                "of matmul": run.flops / ceilings.rate / taken if run.flops else None,
                "x dense": min(dense) / taken if dense else None,
                "repeats": repeats,
            }
        )
    return rows


def with_selection(rows: list[Row]) -> list[Row]:
    """Rows of block_sparse and its selection together."""
    both: list[Row] = []
    for row in rows:
        chosen = [r for r in rows if r["run"] == "selection" and r["at"] == row["at"]]
        if row["run"] == "block_sparse" and chosen:
            ms = row["ms"] + chosen[0]["ms"]
            host = None if row["host ms"] is None else row["host ms"] + chosen[0]["host ms"]
            gone = {"of copy": None, "of matmul": None}
            kept = {"run": "block_sparse + selection", "ms": ms, "host ms": host, **gone}
            faster = None if row["x dense"] is None else row["x dense"] * row["ms"] / ms
            both.append({**row, **kept, "x dense": faster})
    return both


def break_even(rows: list[Row]) -> list[Row]:
    """Per budget and run: the shortest measured length from which it is faster than dense at every longer
    one."""
    series: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        if row["at"] and row["role"] in ("ours", "rival") and row["x dense"] is not None:
            series.setdefault((row["op"], row["at"], row["run"]), {})[row["length"]] = row["x dense"]
    found: list[Row] = []
    for (op, at, run), faster in series.items():
        length: int | None = None
        for n in sorted(faster, reverse=True):
            if faster[n] <= 1:
                break
            length = n
        found.append(
            {
                "op": op,
                "at": at,
                "run": run,
                "break-even": length or "none measured",
                "longest": max(faster),
                "x dense there": faster[max(faster)],
            }
        )
    return found


def selection_share(rows: list[Row]) -> list[Row]:
    """What selecting takes, as a share of the time of the sparse operation that follows it."""
    kernels = {
        (r["op"], r["length"], r["at"]): r["ms"]
        for r in rows
        if r["run"] in ("block_sparse", "gather_decode")
    }
    return [
        {
            "op": r["op"],
            "length": r["length"],
            "at": r["at"],
            "selection": r["run"],
            "ms": r["ms"],
            "of sparse": r["ms"] / kernels[key],
        }
        for r in rows
        if r["role"] == "selection" and (key := (r["op"], r["length"], r["at"])) in kernels
    ]


def shown(rows: list[Row]) -> str:
    """Rows as a table, shares in per cent."""
    shares = ("density", "of copy", "of matmul", "of sparse")
    return table(
        [
            {
                name: "-" if value is None else f"{100 * value:.3g} %" if name in shares else value
                for name, value in row.items()
                if name not in ("op", "length", "role")
            }
            for row in rows
        ]
    )


def run_case(
    name: str,
    length: int,
    setting: Setting,
    ceilings: Ceilings,
    record: Record,
    repeats: int | None,
) -> None:
    where = f"{name} at {length}"
    case = next(case for cases in CASES.values() for each, _, case in cases if each == name)
    if setting.flex:
        torch.compiler.reset()  # FlexAttention compiled for this length alone, as for the last one
    try:
        runs = list(case(setting, length, ceilings))
    except TooMuch as reason:
        record.skip(f"{where}: {reason}")
        return
    except torch.OutOfMemoryError:
        record.skip(f"{where}: out of memory")
        return
    for text in sorted(rivals.said):
        record.skip(text)
    rows = timed(runs, where, record, ceilings, repeats)
    rows += with_selection(rows)
    if rows:
        record.rows += [{"op": name, "length": length, **row} for row in rows]
        record.say(f"\n{where}\n{shown(rows)}")
        record.save()


def arguments() -> argparse.Namespace:
    def numbers(kind: type) -> Any:
        return lambda text: tuple(kind(part) for part in text.split(","))

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ops", nargs="+", choices=list(CASES), help="default: all")
    parser.add_argument("--lengths", type=numbers(int))
    parser.add_argument("--densities", type=numbers(float))
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--batch", type=int, help="rows of the decode side (1 on the CPU, 8 on CUDA)")
    parser.add_argument("--tokens", type=int, default=2048, help="keys read at decode, besides the densities")
    parser.add_argument("--repeats", type=int, help="default: as many as fit in some seconds")
    parser.add_argument("--seconds-limit", type=float, default=30.0, help="of one call")
    parser.add_argument("--flex", action="store_true", help="FlexAttention on the CPU, too")
    parser.add_argument("--json", action="store_true", help="print what is saved instead of tables")
    args = parser.parse_args()
    args.densities = args.densities or DENSITIES[args.device]
    args.batch = args.batch or BATCH[args.device]
    args.flex = args.flex or args.device == "cuda"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu runs on the processor")
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} is no multiple of --kv-heads {args.kv_heads}")
    if any(not 0 < x <= 1 for x in args.densities):
        parser.error("--densities lie above 0, and are at most 1")
    for length in args.lengths or ():
        if length < 1 or length % args.block:
            parser.error(f"--lengths are multiples of the block, {args.block}; got {length}")
    return args


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    setting = Setting(
        device=args.device,
        dtype=DTYPES[args.dtype],
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        block=args.block,
        batch=args.batch,
        tokens=args.tokens,
        densities=args.densities,
        flex=args.flex,
    )
    ceilings = measure(args.device, setting.dtype, args.seconds_limit, args.repeats or 7)
    record = Record(setting, ceilings, vars(args), quiet=args.json)
    record.say(
        f"copy {ceilings.bandwidth / 1e9:.4g} GB/s read plus written, "
        f"matmul {ceilings.rate / 1e12:.4g} TFLOP/s in {args.dtype}"
    )
    for op in args.ops or CASES:
        for name, longest, _ in CASES[op]:
            for length in args.lengths or LENGTHS:
                if args.lengths or args.device == "cuda" or length <= longest:
                    run_case(name, length, setting, ceilings, record, args.repeats)
                    if args.device == "cuda":
                        torch.cuda.empty_cache()
    path = record.save()
    if args.json:
        print(path.read_text(), end="")
        return
    for title, found in (
        ("selection, beside the sparse operation alone", selection_share(record.rows)),
        ("break-even with the fastest dense run", break_even(record.rows)),
    ):
        if found:
            # shown() leaves "op" and "length" out, which head the tables of one length
            lines = [{"of": f"{r['op']} {r.get('length', '')}".strip(), **r} for r in found]
            print(f"\n{title}\n{shown(lines)}")
    print("\nwritten to", path)


if __name__ == "__main__":
    main()
