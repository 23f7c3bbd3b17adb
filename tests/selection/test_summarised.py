"""Recent keys and summaries in one softmax: against a loop over queries, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.partial import Partial, merge
from farspan.attention.selection import Summarised
from farspan.attention.softmax import Softmax

from .some_keys import SomeKeys

H, HKV, D = 6, 2, 8
KINDS = [
    {"block": 4, "local": 8},
    {"block": 5, "local": 1, "bias": (math.log(5),)},
    {"block": 1, "local": 1, "levels": 8},
    {"block": 2, "local": 1, "levels": 3},
    {"block": 3, "local": 7, "levels": 4, "bias": (0.3, 0.1, 1.0, 2.0)},
    {"block": 2, "local": 1, "levels": 2, "step": 3},
    {"block": 4, "local": 1, "step": 3, "anchor": 12, "bias": (math.log(4),)},
    {"block": 2, "local": 5, "step": 4, "anchor": 4},
]


def made(kind: dict, b: int) -> Summarised:
    generator = torch.Generator().manual_seed(3)
    levels = [torch.randn(2, b, HKV, 180 >> n, D, generator=generator, dtype=torch.float64) for n in range(8)]
    levels = levels[: kind.get("levels", 1)]
    bias, size = kind.get("bias", (0.0,) * len(levels)), kind.get("anchor", 0)
    first = KV(*torch.randn(2, b, HKV, size, D, generator=generator, dtype=torch.float64))
    anchor = first if size else None
    return Summarised(**kind | {"bias": bias, "levels": tuple(KV(*x) for x in levels), "anchor": anchor})


def call(tq: int, tk: int, starts: list[int] | None) -> tuple[Tensor, Keys]:
    generator = torch.Generator().manual_seed(tq + tk)
    b = len(starts or [0])
    q = torch.randn(b, H, tq, D, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(b, HKV, tk, D, generator=generator, dtype=torch.float64) for _ in range(2))
    start = None if starts is None else torch.tensor(starts)
    return q, Keys(kv=KV(k, v), tq=tq, softmax=Softmax(0.4, 5.0), start=start)


def naive(q: Tensor, keys: Keys, kind: Summarised) -> tuple[Partial, int]:
    """One query at a time, its keys and summaries side by side; and the pairs read."""
    out, lse, pairs = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=q.dtype), 0
    for b in range(q.shape[0]):
        first = 0 if keys.starts is None else keys.starts[b]
        for t in range(q.shape[2]):
            i = keys.past + t - first  # its position in the row
            if i < 0:
                continue
            behind = max(0, math.floor((i + 1 - kind.local) / (kind.block * kind.step))) * kind.step
            anchor = kind.anchor if behind else None
            size = 0 if anchor is None else anchor.length
            top, at, chosen = len(kind.levels) - 1, size // kind.block, []
            for level in range(top, -1, -1):  # spans from the oldest on, as large as fit
                while behind - at >= 2**level:
                    chosen.append((level, at // 2**level))
                    at += 2**level
            own = range(kind.block * behind, i + 1)
            pairs += H * (len(own) + len(chosen) + size)
            for h in range(H):
                g = h * HKV // H
                x = [(keys.kv.k[b, g, first + j], keys.kv.v[b, g, first + j], 0.0) for j in own]
                if anchor is not None:
                    x += [(anchor.k[b, g, j], anchor.v[b, g, j], 0.0) for j in range(size)]
                for level, j in chosen:
                    kv = kind.levels[level]
                    x.append((kv.k[b, g, j], kv.v[b, g, j], kind.bias[level]))
                logits = torch.stack([5 * torch.tanh(k @ q[b, h, t] * 0.4 / 5) + bias for k, _, bias in x])
                lse[b, h, t] = torch.logsumexp(logits, 0)
                out[b, h, t] = torch.softmax(logits, 0) @ torch.stack([v for _, v, _ in x])
    return Partial(out, lse), pairs


def assert_close(got: Partial, want: Partial) -> None:
    seen = want.lse > -torch.inf
    assert torch.equal(got.lse > -torch.inf, seen)
    assert (got.lse - want.lse)[seen].abs().max() < 1e-12
    assert (got.out - want.out)[seen].abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("tq", "tk", "starts"), [(61, 61, None), (1, 60, None), (150, 177, None), (5, 70, [0, 21, 67])]
)
def test_runs_counts_and_masks(kind: dict, tq: int, tk: int, starts: list[int] | None) -> None:
    q, keys = call(tq, tk, starts)
    selection = made(kind, q.shape[0])
    want, pairs = naive(q, keys, selection)
    if starts is None:
        part, counted = selection.run_prefill(q, keys, range(tq), "auto")
        assert_close(part, want)
        assert counted == pairs
        rows = range(tq // 3, tq // 2)
        mask, entries = selection.to_mask(tq, tk)[0, 0], selection.entries_read(tq, tk)[0]
        cut = slice(rows.start, rows.stop)
        assert selection.run_prefill(q, keys, rows, "auto")[1] == H * int(
            mask[cut].sum() + entries[cut].sum()
        )
    if tq <= 16:
        part, counted = selection.run_decode(q, keys, "auto")
        assert_close(part, want)
        assert counted == pairs
    mask = selection.to_mask(tq, tk, keys.start, q.shape[0])
    valid = mask.any(-1)[:, 0]
    entries = selection.entries_read(tq, tk, keys.start, q.shape[0])
    assert H * int(mask.sum() + entries[valid.expand(len(entries), -1)].sum()) == pairs
    some = torch.tensor([tq - 1, 0])
    assert torch.equal(selection.to_mask(tq, tk, keys.start, q.shape[0], some), mask[:, :, some])
    needed = selection.needed((tk - tq, tk), starts or [0], HKV, q.device)
    assert not bool((mask.any(2) & ~needed).any())


@dataclass(kw_only=True)
class Share:
    """One of ``size`` ranks."""

    rank: int
    size: int

    def share(self, count: int) -> range:
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("tq", "tk", "starts"), [(1, 60, None), (5, 70, [0, 21, 67])])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_share_keys_and_summaries(
    kind: dict, tq: int, tk: int, starts: list[int] | None, size: int
) -> None:
    q, keys = call(tq, tk, starts)
    selection = made(kind, q.shape[0])
    want, pairs = naive(q, keys, selection)
    parts, counted = [], 0
    for rank in range(size):
        at = torch.arange(tk)[torch.arange(tk) // 5 % size == rank]
        how = {"softmax": keys.softmax, "start": keys.start, "peers": Share(rank=rank, size=size)}
        here = SomeKeys(kv=keys.kv[:, :, at], tq=tq, at=at, total=tk, **how)
        part, read = selection.run_decode_here(q, here)
        parts.append(part)
        counted += int(read)
    assert_close(merge(*parts), want)
    assert counted == pairs


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("tq", "tk", "starts"), [(1, 60, None), (5, 70, [0, 21, 67]), (30, 70, None)])
def test_keys_before_the_block_may_be_gone(kind: dict, tq: int, tk: int, starts: list[int] | None) -> None:
    q, keys = call(tq, tk, starts)
    selection = made(kind, q.shape[0])
    want, pairs = naive(q, keys, selection)
    dropped = max(0, tk - tq + 1 - selection.local - selection.block * selection.step)
    less = replace(keys, kv=keys.kv[:, :, dropped:], dropped=dropped)
    for run in ("run_decode", "run_prefill") if starts is None else ("run_decode",):
        if run == "run_decode":
            part, counted = selection.run_decode(q, less, "auto")
        else:
            part, counted = selection.run_prefill(q, less, range(tq), "auto")
        assert_close(part, want)
        assert counted == pairs


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients(kind: dict) -> None:
    """Of queries, keys, values and summaries, against autograd through the loop."""
    q, keys = call(40, 40, None)
    selection = made(kind, 1)
    tensors = [q, *keys.kv.stored, *(x for kv in selection._read_besides for x in kv.stored)]
    weights = torch.randn(q.shape, generator=torch.Generator().manual_seed(5), dtype=q.dtype)
    gradients = []
    for run in (
        lambda: naive(q, keys, selection)[0],
        lambda: selection.run_prefill(q, keys, range(40), "auto")[0],
    ):
        for x in tensors:
            x.requires_grad_(True)
            x.grad = None
        part = run()
        ((part.out * weights).sum() + part.lse.sum()).backward()
        gradients.append([torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in tensors])
    for got, want in zip(*gradients, strict=True):
        assert (got - want).abs().max() < 1e-12


class Reads(TorchDispatchMode):
    """Counts how often the host waits for a number of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in str(func) for name in ("local_scalar_dense", "is_nonzero"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_number_is_read_back_from_the_device(kind: dict) -> None:
    q, keys = call(150, 177, None)
    selection = made(kind, 1)
    with Reads() as reads:
        selection._rest(keys, range(27, 177), q, keys.kv)
    assert reads.count == 0


def test_no_weights_are_kept_for_the_backward_pass() -> None:
    """What autograd keeps grows with the tokens, not with their pairs."""
    kept = []
    for n in (2048, 4096):
        q, k, v = (torch.randn(1, 2, n, D, requires_grad=True) for _ in range(3))
        level = KV(*(torch.cat([x.mean(-1, keepdim=True)] * D, -1)[:, :, ::4] for x in (k, v)))
        keys = Keys(kv=KV(k, v), tq=n, softmax=Softmax(0.4))
        selection = Summarised(block=4, local=1, levels=(level,))
        sizes: dict[int, int] = {}

        def keep(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            part, _ = selection.run_prefill(q, keys, range(n), "auto")
        kept.append(sum(sizes.values()))
        part.out.sum().backward()
        assert k.grad is not None and q.grad is not None
    assert kept[1] < 2.5 * kept[0] < 2.5 * 16 * 2048 * D * 2 * 4
