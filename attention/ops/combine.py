"""What the two decode kernels share: one tile of online softmax, and cutting the keys into splits.

Few queries cannot fill a GPU, so the keys are cut into splits, each a program of its own. A split leaves its
normalised output and log-sum-exp, in float32, in a scratch buffer; a second, small kernel merges them in a
fixed order, so that a result never depends on which program was first.

    keys      0 ............................... Tk
    splits    |   0   |   1   |   2   |   3   |
    scratch     o, lse  o, lse  o, lse  o, lse        one program each
                  `-------`---+---'-------'
                           out, lse                    combine
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..partial import Partial
from ..softmax import Softmax
from . import launch

_SHORTEST = 128  # keys: a shorter split costs more to start than to read
_MOST = 128  # splits, so that combine holds every weight of a row at once
_PER_SM = 2  # programs that share a multiprocessor (about 96 KB of tiles in flight each)
_NO_GPU = 8  # multiprocessors that a CPU counts for: several splits under the interpreter


def number_of_splits(programs: int, keys: int, device: torch.device) -> int:
    """Into how many splits to cut ``keys`` keys, so that ``programs`` programs per split fill the device.

    From shapes and the device alone: nothing is read from it.
    """
    return _splits(programs, min(triton.cdiv(keys, _SHORTEST), _MOST), _PER_SM * _multiprocessors(device))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _NO_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=4096)
def _splits(programs: int, most: int, places: int) -> int:
    """The fewest splits whose programs fill whole waves of ``places`` to within 5 % of the best choice."""
    if programs == 0:
        return 1
    filled = []
    for splits in range(1, max(most, 1) + 1):
        waves = splits * programs / places
        filled.append(waves / -(-splits * programs // places))
    return next(i + 1 for i, share in enumerate(filled) if share >= 0.95 * max(filled))


def scratch(q: Tensor, value_dim: int, splits: int) -> tuple[Tensor, Tensor]:
    """Where splits leave their results: (out [splits, B, H, Tq, Dv], lse [splits, B, H, Tq]).

    A single split's result is the result, in q's dtype; several are float32.
    """
    shape = (splits, *q.shape[:3])
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    dtype = q.dtype if splits == 1 else torch.float32
    return torch.empty((*shape, value_dim), dtype=dtype, device=q.device), lse


def combine(outs: Tensor, lses: Tensor, dtype: torch.dtype) -> Partial:
    """Merge what the splits left in :func:`scratch`, in their order."""
    splits, b, h, tq, d = outs.shape
    if splits == 1:
        return Partial(outs[0], lses[0])
    out = torch.empty((b, h, tq, d), dtype=dtype, device=outs.device)
    lse = torch.empty((b, h, tq), dtype=torch.float32, device=outs.device)
    rows, cols = b * h * tq, min(launch.wide(d), 64)
    _combine[(rows, triton.cdiv(d, cols))](
        outs, lses, out, lse, rows, splits, D=d, COLS=cols, SPLITS=triton.next_power_of_2(splits)
    )
    return Partial(out, lse)


@triton.jit(do_not_specialize=["splits"])
def _combine(
    outs, lses, out, lse, rows, splits,
    D: tl.constexpr, COLS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One row, COLS of its D columns: all loads are in flight at once, and the sum's order is the tile's."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLS + tl.arange(0, COLS)
    at = tl.arange(0, SPLITS).to(tl.int64) * rows + row
    part = tl.load(lses + at, mask=tl.arange(0, SPLITS) < splits, other=float("-inf"))  # [SPLITS]
    peak = tl.max(part, 0)
    weight = tl.exp(part - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weight, 0)
    safe = tl.where(total > 0, total, 1.0)
    # An empty split has nothing to add, and is not read.
    read = (part > float("-inf"))[:, None] & (d < D)[None, :]
    tile = tl.load(outs + at[:, None] * D + d[None, :], mask=read, other=0.0)  # [SPLITS, COLS]
    merged = tl.sum(tile * (weight / safe)[:, None], 0)
    tl.store(out + row * D + d, merged.to(out.dtype.element_ty), mask=d < D)
    if tl.program_id(1) == 0:
        tl.store(lse + row, tl.where(total > 0, peak + tl.log(safe), float("-inf")))


@triton.jit
def attend_tile(
    q, k, v, valid, peak, total, acc, inner, outer,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One tile of keys taken into the running (peak, total, acc) of each row, in base 2.

    q [M, D], k [N, D], v [N, Dv], valid [M | 1, N]. logits = inner q k^T, or outer tanh(inner q k^T).
    """
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * inner
    if SOFTCAP:
        logits = outer * launch.tanh(logits)
    logits = tl.where(valid, logits, float("-inf"))
    new = tl.maximum(peak, tl.max(logits, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # a row that has read nothing: -inf - -inf is NaN
    weights = tl.exp2(logits - safe[:, None])
    shrink = tl.exp2(peak - safe)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new, total * shrink + tl.sum(weights, 1), acc


@triton.jit
def store_rows(out, lse, at, keep, d, peak, total, acc, D: tl.constexpr):
    """Write the rows' results (at [M] int64: their places in out [., D] and lse [.])."""
    result, natural = launch.finish(acc, peak, total)
    mask = keep[:, None] & (d < D)[None, :]
    tl.store(out + at[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + at, natural, mask=keep)


def factors(softmax: Softmax) -> tuple[float, float]:
    """(inner, outer) of :func:`attend_tile`: logits in base 2."""
    scale, softcap, log2e = softmax.scale, softmax.softcap, launch.LOG2E.value
    return (scale * log2e, 1.0) if softcap is None else (scale / softcap, softcap * log2e)


def tile_keys(head_dim: int, value_dim: int, itemsize: int) -> int:
    """Keys per tile: about 32 KB of K and V, so that three stages leave room for two programs per SM.

    Half of that in float32, whose products are not the matrix unit's: they keep their operands in registers.
    """
    row = (launch.wide(head_dim) + launch.wide(value_dim)) * itemsize
    room = (32768 if itemsize < 4 else 16384) // row
    return max(16, min(128, triton.next_power_of_2(room + 1) // 2))


def tile_rows(rows: int, itemsize: int) -> int:
    """Rows per tile, for ``rows`` rows that want the same keys: all of them, where registers allow it.

    float32's products hold their operands in registers: 16 rows, and the next tile finds the keys in L2.
    """
    return 16 if itemsize >= 4 else max(16, min(64, triton.next_power_of_2(rows)))


def configs(stages: int) -> list[triton.Config]:
    """Loads bound these kernels: stages are bytes in flight, warps are what turns a tile over in time."""
    chosen = ((4, stages), (4, stages + 1), (8, stages))
    return [triton.Config({}, num_warps=w, num_stages=s) for w, s in chosen]
