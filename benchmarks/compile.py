"""Compile every Triton kernel for a GPU that need not be there, and print what it takes there.

    python -m benchmarks.compile [--arch 90] [--ops decode pool] [--dtypes bfloat16] [--head-dims 64 128]
                                 [--all-configs]
    python -m benchmarks.compile --save       every kernel, dtype, head size and form -> compile_sm90.json

Each operation is called as a user would call it, on CPU tensors; each launch is turned into a compilation,
with --all-configs into one for every configuration (form) that the autotuner would try.
Registers and spills are per thread, shared memory is bytes per program; a program with spills, or with more
shared memory than the chip has (227 KB on Hopper), is a defect.

--save writes after each operation, dtype and head size. A second run takes from the file what it has of the
same programs, and the rest from Triton's cache: so it goes on where the first was stopped, and after a change
it compiles what has changed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from farspan.attention.kv import KV
from farspan.attention.packing import OUTLIERS, Int4, Int8
from farspan.attention.softmax import Softmax

os.environ.pop("TRITON_INTERPRET", None)
os.environ.pop("FARSPAN_AUTOTUNE", None)  # nothing is timed here

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import autotuner, driver, jit

from farspan.attention.ops import launch
from farspan.attention.ops.append import Kept, Labels, Pages, append
from farspan.attention.ops.block_max import block_max
from farspan.attention.ops.block_sparse import block_sparse
from farspan.attention.ops.decode import decode
from farspan.attention.ops.estimate_topk import estimate_topk
from farspan.attention.ops.flash import flash
from farspan.attention.ops.gather_decode import gather_decode
from farspan.attention.ops.int4_scores import int4_block_max, int4_scores, quantise_int4
from farspan.attention.ops.pool import pool, pool_segments
from farspan.attention.ops.scan import scan
from farspan.attention.ops.scores import scores
from farspan.attention.ops.select import by_mass, by_threshold, top_k
from farspan.attention.selection import BlockIndex, TokenIndex

from .inputs import packed
from .record import RESULTS, machine, table

_TILE = ("BLOCK_M", "BLOCK_N", "ROWS", "KEYS", "COLS")  # the constants of a kernel that are worth a column
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SAVED = ("bfloat16", "float16"), (64, 80, 128, 256)  # dtypes and head sizes of --save


def _qkv(dtype: torch.dtype, d: int, tq: int, tk: int, grad: bool = False) -> list[torch.Tensor]:
    shapes = [(1, 8, tq, d), (1, 2, tk, d), (1, 2, tk, d)]
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


def _storage(dtype: torch.dtype, d: int) -> None:
    """Each operation on packed keys, in its most frequent form."""
    tokens = TokenIndex(tokens=torch.zeros(1, 2, 1, 64, dtype=torch.long))
    blocks = torch.zeros(1, 2, 4, 2, dtype=torch.int32)
    index = BlockIndex(blocks=blocks, counts=torch.ones_like(blocks[..., 0]), block_q=64, block_k=64)
    for packing, outliers in ((Int8(), 0), (Int4(), 0), (Int4(), OUTLIERS)):
        q, kv = _q_kv(dtype, d, 1, 1088)
        some = packed(kv, packing, outliers)
        decode(q, some, Softmax(1.0), impl="triton")
        gather_decode(q, some, tokens, Softmax(1.0), check=False, impl="triton")
        q = torch.randn(1, 8, 256, d, dtype=dtype)
        flash(q, some, Softmax(1.0), impl="triton")
        block_sparse(q, some, index, Softmax(1.0), impl="triton")


def _q_kv(*args: Any, **how: Any) -> tuple[torch.Tensor, KV]:
    q, k, v = _qkv(*args, **how)
    return q, KV(k, v)


def _append(dtype: torch.dtype, d: int) -> None:
    _, *new = _qkv(dtype, d, 1, 1)
    k, v = (torch.empty(1, 2, 1024, d, dtype=dtype) for _ in range(2))
    length, since = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    pages = Pages(torch.empty(1, 2, 64, 2 * d, dtype=dtype), 16)
    labels = Labels(k[..., :32], torch.arange(32).expand(2, 32))
    kept = Kept(torch.zeros(1, 2, 64, dtype=torch.long), KV(k[:, :, :64], v[:, :, :64]), since)
    for more in (
        {},
        {"pages": pages, "start": torch.zeros(1, dtype=torch.long)},
        {"labels": labels},
        {"kept": kept},
    ):
        append(*new, KV(k, v), length, impl="triton", **more)


def _block_max(dtype: torch.dtype, d: int) -> None:
    q, k, _ = _qkv(dtype, d, 256, 256)
    for block_q, block_k, heads, softcap in ((64, 64, "each", None), (1, 64, "group", 5.0)):
        how: dict[str, Any] = {"block_q": block_q, "block_k": block_k, "heads": heads}
        block_max(q, k, q[..., 0].float(), Softmax(1.0, softcap), impl="triton", **how)


def _block_sparse(dtype: torch.dtype, d: int) -> None:
    for block_q, block_k in ((64, 64), (128, 32), (128, 128)):
        blocks = torch.zeros(1, 2, -(-256 // block_q), 2, dtype=torch.int32)
        index = BlockIndex(
            blocks=blocks, counts=torch.ones_like(blocks[..., 0]), block_q=block_q, block_k=block_k
        )
        part = block_sparse(*_q_kv(dtype, d, 256, 256, grad=True), index, Softmax(1.0), impl="triton")
        part.out.sum().backward()
    index = BlockIndex(  # every option at once, and blocks smaller than a tile
        blocks=torch.zeros(1, 2, 16, 2, dtype=torch.int32),
        counts=torch.ones(1, 2, 16, dtype=torch.int32),
        block_q=16,
        block_k=8,
        start=torch.zeros(1, dtype=torch.long),
        key_order=torch.arange(256).expand(1, 2, 256),
    )
    part = block_sparse(*_q_kv(dtype, d, 256, 256, grad=True), index, Softmax(1.0, 5.0), impl="triton")
    part.out.sum().backward()


def _decode(dtype: torch.dtype, d: int) -> None:
    start = torch.zeros(1, dtype=torch.long)
    for softcap, more in ((None, {}), (None, {"start": start}), (5.0, {"window": 100})):
        decode(*_q_kv(dtype, d, 1, 1024), Softmax(1.0, softcap), impl="triton", **more)
    decode(*_q_kv(dtype, d, 16, 1024), Softmax(1.0), impl="triton")
    length = torch.ones(1, dtype=torch.int32)
    for more in ({}, {"window": 100, "sinks": 4, "start": start}):
        decode(*_q_kv(dtype, d, 1, 1024), Softmax(1.0), length=length, impl="triton", **more)


def _estimate_topk(dtype: torch.dtype, d: int) -> None:
    q = torch.randn(1, 8, 1, d, dtype=dtype)
    how = Softmax(1.0), torch.ones(1, dtype=torch.int32), 512
    pages, labels = (torch.empty(1, 2, 1024, width, dtype=dtype) for width in (2 * d, 32))
    start, channels = torch.zeros(1, dtype=torch.long), torch.arange(32).expand(2, 32)
    for reduce, first in (("max", None), ("sum", start), ("none", start)):
        estimate_topk(q, pages, *how, page=16, reduce=reduce, start=first, impl="triton")
        estimate_topk(q, labels, *how, channels=channels, reduce=reduce, start=first, impl="triton")
    estimate_topk(q, pages, *how[:2], None, fraction=0.1, page=16, impl="triton")


def _flash(dtype: torch.dtype, d: int) -> None:
    for softcap, window in ((None, None), (None, 100), (5.0, None)):
        flash(*_q_kv(dtype, d, 256, 256), Softmax(1.0, softcap), impl="triton", window=window)


def _gather_decode(dtype: torch.dtype, d: int) -> None:
    counts, rows = torch.ones(1, 2, 1, dtype=torch.int32), torch.zeros(1, 2, 64, d, dtype=dtype)
    for heads, more in ((2, {}), (8, {}), (2, {"counts": counts}), (2, {"gathered": KV(rows, rows)})):
        index = TokenIndex(tokens=torch.zeros(1, heads, 1, 64, dtype=torch.long), **more)
        gather_decode(*_q_kv(dtype, d, 1, 1024), index, Softmax(1.0), check=False, impl="triton")


def _int4_scores(dtype: torch.dtype, d: int) -> None:
    q, k, _ = _qkv(dtype, d, 256, 1024)
    for block in (32, 64):
        k4 = quantise_int4(k, block, impl="triton")
        for q_bits in (4, 8, None):
            int4_block_max(q, k4, q[..., 0], Softmax(1.0), block_q=64, q_bits=q_bits, impl="triton")
        int4_scores(q[:, :, :1], k4, scale=1.0, impl="triton")


def _pool(dtype: torch.dtype, d: int) -> None:
    x = _qkv(dtype, d, 1, 256)[1]
    for block, mode in ((16, "mean"), (64, ("max", "min")), (128, ("max", "min", "mean"))):
        pool(x, block, mode=mode, impl="triton")
    pool_segments(x, torch.zeros(1, 9, dtype=torch.long), mode="length_normalised", impl="triton")


def _scan(dtype: torch.dtype, d: int) -> None:
    def tokens(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(1, *shape, dtype=kind, requires_grad=True)

    q, k, v = (tokens(heads, 4096, d, kind=dtype) for heads in (2, 2, 8))
    decay, beta, state = tokens(8, 4096), tokens(8, 4096), torch.randn(2, 8, d, d)
    every: dict[str, Any] = {"mask": torch.ones(1, 4096, dtype=torch.bool), "state": state}
    every["cu_seqlens"] = torch.tensor([0, 100, 4096])
    for log_decay, more in (
        (decay, {}),
        (tokens(8, 4096, d), every),
        (decay, {"beta": beta, **every}),
        (None, {}),
    ):
        out, _ = scan(q, k, v, log_decay, impl="triton", **more)
        out.sum().backward()


def _scores(dtype: torch.dtype, d: int) -> None:
    for queries in (1, 16, 512):
        scores(*_qkv(dtype, d, queries, 1024)[:2], impl="triton")


def _select(dtype: torch.dtype, d: int) -> None:
    for n in (2048, 8192, 131072):
        top_k(torch.randn(4, n), 64, impl="triton")
    for n in (2048, 8192):
        by_mass(torch.rand(4, n), 0.9, most=64, impl="triton")
        by_threshold(torch.rand(4, n), 0.9, most=64, impl="triton")


CASES: dict[str, Callable[[torch.dtype, int], None]] = {
    "append": _append,
    "block_max": _block_max,
    "block_sparse": _block_sparse,
    "decode": _decode,
    "estimate_topk": _estimate_topk,
    "flash": _flash,
    "gather_decode": _gather_decode,
    "int4_scores": _int4_scores,
    "pool": _pool,
    "scan": _scan,
    "scores": _scores,
    "select": _select,
    "storage": _storage,
}


class _Chip:
    """As much of a driver as the compiler asks for."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def resources(compiled: Any, arch: int) -> tuple[int, int]:
    """(registers, bytes spilled) of one compiled kernel, as the assembler that triton calls reports them."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        suffix = "a" if arch >= 90 else ""
        done = subprocess.run(
            [get_ptxas(arch).path, "-v", f"-arch=sm_{arch}{suffix}", ptx, "-o", ptx.with_suffix(".cubin")],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"ptxas refused {compiled.metadata.name}: {done.stderr.strip()}")
    found = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    return int(found.group(1)) if found else 0, sum(map(int, spills))


def units(ops: list[str], dtypes: list[str], head_dims: list[int]) -> Iterator[tuple[str, str, int]]:
    """(operation, dtype, head size) of all that there is to compile. Rows of scores (select) are float32 and
    have no head size."""
    for op in ops:
        if op == "select":
            yield op, "float32", 0
        else:
            yield from ((op, dtype, d) for dtype in dtypes for d in head_dims)


def compile_unit(
    arch: int, op: str, dtype: str, d: int, all_configs: bool = False, known: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """One row per kernel that the operation launches, and per form of it that is asked for. ``first``:
    whether it is the form that is launched where nothing is timed."""
    driver.set_active(_Chip(arch))
    launch.cannot_launch = lambda device: []
    made: list[tuple[Any, str, bool]] = []
    first = [True]
    original, tune = jit.JITFunction.run, autotuner.Autotuner.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = original(self, *args, grid=grid, warmup=True, **options)
        tile = "x".join(str(options[name]) for name in _TILE if name in options)
        made.append((compiled, tile, first[0]))
        return compiled

    def untimed(self: Any, *args: Any, **options: Any) -> None:
        for n, config in enumerate(self.configs if all_configs else self.configs[:1]):
            first[0] = n == 0
            self.fn.run(*args, **options, **config.all_kwargs())
        first[0] = True

    jit.JITFunction.run, autotuner.Autotuner.run = compile_only, untimed
    try:
        CASES[op](DTYPES[dtype], d)
    finally:
        jit.JITFunction.run, autotuner.Autotuner.run = original, tune
    rows: dict[str, dict[str, Any]] = {}
    for kernel, tile, is_first in made:
        if kernel.hash in rows:
            rows[kernel.hash]["first"] |= is_first
            continue
        found = (known or {}).get(kernel.hash[:16])
        registers, spilled = found or resources(kernel, arch)
        rows[kernel.hash] = {
            "op": op,
            "kernel": kernel.metadata.name,
            "dtype": dtype,
            "D": d,
            "tile": tile or "-",
            "warps": kernel.metadata.num_warps,
            "stages": kernel.metadata.num_stages,
            "first": is_first,
            "registers": registers,
            "spilled": spilled,
            "shared": kernel.metadata.shared,
            "hash": kernel.hash[:16],
        }
    return list(rows.values())


def compile_all(
    arch: int, ops: list[str], dtypes: list[str], head_dims: list[int], all_configs: bool = False
) -> list[dict[str, Any]]:
    """The rows of ``compile_unit`` of all that is named."""
    each = units(ops, dtypes, head_dims)
    return [row for unit in each for row in compile_unit(arch, *unit, all_configs=all_configs)]


def save(arch: int, ops: list[str]) -> Path:
    """Compile every form of ``ops`` and write it to compile_sm<arch>.json in place of what that has of
    them."""
    path = RESULTS / f"compile_sm{arch}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    known = {row["hash"]: (row["registers"], row["spilled"]) for row in rows}
    for unit in units(ops, *map(list, SAVED)):
        made = compile_unit(arch, *unit, all_configs=True, known=known)
        rows = [row for row in rows if (row["op"], row["dtype"], row["D"]) != unit] + made
        rows.sort(key=lambda row: list(CASES).index(row["op"]))
        lines = ",\n".join(json.dumps(row) for row in rows)
        about = json.dumps({"machine": machine("cpu"), "arch": arch})
        draft = path.with_suffix(".part")
        draft.write_text(f'{about[:-1]}, "rows": [\n{lines}\n]}}\n')
        draft.replace(path)
        worst = max(row["spilled"] for row in made)
        print(f"{' '.join(map(str, unit))}: {len(made)} programs, worst spill {worst} bytes", flush=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--ops", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 80, 96, 128, 256])
    parser.add_argument("--all-configs", action="store_true")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    if args.save:
        print(f"saved in {save(args.arch, args.ops)}")
    else:
        print(table(compile_all(args.arch, args.ops, args.dtypes, args.head_dims, args.all_configs)))


if __name__ == "__main__":
    main()
