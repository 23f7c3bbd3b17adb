"""What the tests of prefill mechanisms run on each rank, and the same in float64 on one device."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from farspan.attention.errors import FarspanError, Unsupported
from farspan.attention.kv import KV
from farspan.attention.ops.flash import flash
from farspan.attention.partial import Partial
from farspan.attention.softmax import Softmax
from farspan.parallel.group.autograd import gather
from farspan.parallel.group.comm import Ranks
from farspan.parallel.mechanisms import ring as ring_module
from farspan.parallel.mechanisms.layout import Layout, Split, contiguous, usp_split, zigzag
from farspan.parallel.mechanisms.pass_q import pass_q
from farspan.parallel.mechanisms.ring import ring
from farspan.parallel.mechanisms.ulysses import ulysses
from farspan.parallel.mechanisms.usp import usp

from ..ops.tools import assert_grads_equal, brute_mask, oracle

BLOCK = 16  # of decoded tokens


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: ``new`` tokens after ``past`` stored ones."""

    new: int
    past: int = 0
    heads: tuple[int, int] = (8, 2)
    dims: tuple[int, int] = (8, 8)  # of keys and of values
    starts: tuple[int, ...] = (0,)  # one per row of the batch
    softcap: float | None = None
    dtype: torch.dtype = torch.float64

    @property
    def length(self) -> int:
        return self.past + self.new

    @property
    def how(self) -> dict[str, Any]:
        return {"scale": 2 * self.dims[0] ** -0.5, "softcap": self.softcap}

    @property
    def mask(self) -> Tensor:
        return brute_mask(self.new, self.length, list(self.starts))

    def whole(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the weights of out in a loss, of every position and alike on every rank."""
        g = torch.Generator().manual_seed(self.length)
        (h, hkv), (d, dv) = self.heads, self.dims
        q, k, v, weights = (
            torch.randn(len(self.starts), n, self.length, width, generator=g).to(self.dtype)
            for n, width in ((h, d), (hkv, d), (hkv, dv), (h, dv))
        )
        return q, k, v, weights

    def truth(self) -> Partial:
        """The queries of the call in float64 on one device."""
        q, k, v, _ = self.whole()
        return oracle(q[:, :, self.past :], k, v, self.mask, **self.how)

    def magnitude(self) -> Partial:
        """The same of |v|: what partial outputs, weighted, add up to at most."""
        q, k, v, _ = self.whole()
        return oracle(q[:, :, self.past :], k, v.abs(), self.mask, **self.how)


def stored(case: Case, size: int) -> Layout:
    """A past as it comes to be: a prefill, then decoding in blocks that do not come out even."""
    if case.past == 0:
        return Layout.empty(size)
    prefill = case.past * 2 // 3
    return zigzag(0, prefill, size).layout().block_cyclic(prefill, case.past, BLOCK)


@dataclass
class LocalPart:
    """What one rank has of a call. Padding and split padding are NaN: they must not be read."""

    case: Case
    split: Split
    past: Layout
    rank: int

    def __post_init__(self) -> None:
        self.positions = torch.full((self.split.rows,), -1)  # of computed rows; split padding: -1
        for slot, (a, b) in self.split.slots(self.rank):
            self.positions[slot] = torch.arange(a, b)
        self.split_padding = self.positions < 0
        self.stored = self.past.positions(self.rank)

    def leaves(self) -> list[Tensor]:
        """q, k, v, past_k, past_v."""
        q, k, v, _ = self.case.whole()
        for x in (q, k, v):
            for b, first in enumerate(self.case.starts):
                x[b, :, :first] = torch.nan
        computed = [self.of(x, torch.nan) for x in (q, k, v)]
        return [x.requires_grad_() for x in (*computed, k[:, :, self.stored], v[:, :, self.stored])]

    def of(self, x: Tensor, fill: float, begin: int = 0) -> Tensor:
        """The rows of this rank of x [B, H, positions from ``begin`` on, ...]."""
        rows = x[:, :, (self.positions - begin).clamp(min=0)]
        rows[:, :, self.split_padding] = fill
        return rows

    def part(self, whole: Partial) -> Partial:
        """This rank's rows of a result."""
        begin = self.split.begin
        return Partial(self.of(whole.out, 0.0, begin), self.of(whole.lse, -torch.inf, begin))


def grid(size: int) -> list[tuple[int, int]]:
    """Shapes (U, R) for usp on ``size`` ranks."""
    return [(2, 2)] if size == 4 else []


class Mechanism:
    """One of them on one case: its part of the call, its result, what it sent."""

    def __init__(self, name: str, case: Case, group: Any, **options: Any):
        self.name, self.ranks, self.options = name, Ranks(group), options
        if name in ("ulysses", "usp"):
            self.options = {"with_lse": True} | options
        size = self.ranks.size
        if name == "usp":
            self.across, self.along = _groups(*grid(size)[0], self.ranks.rank)
            split = usp_split(case.past, case.length, *grid(size)[0])
        else:
            cut = contiguous if name == "ulysses" and case.past else zigzag
            split = cut(case.past, case.length, size)
        self.local = LocalPart(case, split, stored(case, size), self.ranks.rank)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Partial:
        local, options = self.local, dict(self.options)
        case, split, starts = local.case, local.split, list(local.case.starts)
        if case.past:
            options |= {"past": local.past, "past_k": past_k, "past_v": past_v}
        if self.name == "ulysses":
            start = torch.tensor(starts)

            def run(q: Tensor, k: Tensor, v: Tensor) -> Partial:
                return flash(q, KV(k, v), Softmax(**case.how), start=start)

            return Partial(*ulysses(q, k, v, split, self.ranks, run, **options))
        options |= {"starts": starts if any(starts) else None, "softmax": Softmax(**case.how)}
        if self.name == "usp":
            return Partial(*usp(q, k, v, split, self.across, self.along, **options))
        return {"ring": ring, "pass_q": pass_q}[self.name](q, k, v, split, self.ranks, **options)


_made: dict[tuple[int, ...], Any] = {}


def _groups(u: int, r: int, rank: int) -> tuple[Ranks, Ranks]:
    """The rank's Ulysses and ring groups; every process makes every group, in this order."""
    across = [tuple(range(i * u, (i + 1) * u)) for i in range(r)]
    along = [tuple(range(i, u * r, u)) for i in range(u)]
    for members in across + along:
        if members not in _made:
            _made[members] = dist.new_group(list(members))
    mine = [next(m for m in groups if rank in m) for groups in (across, along)]
    return Ranks(_made[mine[0]]), Ranks(_made[mine[1]])


def prefill(group: Any, cases: list[tuple[str, Case]]) -> None:
    """Each mechanism gives this rank's rows of what one device gives.

    All of them run before the first is checked: a rank that failed would leave the others waiting.
    """
    mechanisms = [Mechanism(name, case, group) for name, case in cases]
    with torch.no_grad():
        parts = [mechanism(*mechanism.local.leaves()) for mechanism in mechanisms]
    for (name, case), mechanism, part in zip(cases, mechanisms, parts, strict=True):
        assert part.out.dtype in (case.dtype, torch.float32)
        want = mechanism.local.part(case.truth())
        if case.dtype == torch.float64:
            assert_same(part, want, (name, case))
        else:
            _assert_rounded(part, want, mechanism.local.part(case.magnitude()).out, (name, case))


def assert_same(part: Partial, want: Partial, what: object) -> None:
    empty = want.lse == -torch.inf
    assert torch.equal(part.lse == -torch.inf, empty), what
    assert not part.out[empty].any(), what
    assert torch.allclose(part.out, want.out, rtol=1e-12, atol=1e-12), what
    assert torch.allclose(part.lse, want.lse, rtol=1e-12, atol=1e-12), what


def _assert_rounded(part: Partial, want: Partial, magnitude: Tensor, what: object) -> None:
    """At most four roundings of what is added up: weights, a partial's out, its travel, the result. An error
    of the lse is a relative error of the weights; torch's 16-bit kernel takes exponentials to 20 bits."""
    eps = torch.finfo(torch.bfloat16).eps
    empty = want.lse == -torch.inf
    assert torch.equal(part.lse == -torch.inf, empty), what
    assert not part.out[empty].any(), what
    assert ((part.out - want.out).abs() <= 4 * eps / 2 * magnitude).all(), what
    assert torch.allclose(part.lse[~empty].double(), want.lse[~empty], rtol=1e-6, atol=eps / 32), what


def gradients(group: Any, cases: list[tuple[str, Case]]) -> None:
    """Gradients of q, k, v and of stored k, v, through out and lse, on this rank's rows."""
    results = []
    for name, case in cases:
        mechanism = Mechanism(name, case, group)
        local, leaves = mechanism.local, mechanism.local.leaves()
        with torch.inference_mode():
            mechanism(*leaves)  # indices kept from here must serve a backward
        total = loss(mechanism(*leaves), local.of(case.whole()[3], 1e6))
        results.append((case, local, torch.autograd.grad(total, leaves, allow_unused=True)))
    for case, local, got in results:
        dq, dk, dv = _whole_gradients(case)
        want = [local.of(x, 0.0) for x in (dq, dk, dv)]
        close = 1e-9 if case.dtype == torch.float64 else 1e-5
        assert_grads_equal([g.double() for g in got[:3]], want, close)
        if case.past:
            past = [x[:, :, local.stored] for x in (dk, dv)]
            assert_grads_equal([g.double() for g in (got[0], *got[3:])], [want[0], *past], close)


def loss(part: Partial, weights: Tensor) -> Tensor:
    """Of one rank: all ranks' together are the loss of the whole."""
    return (part.out * weights).sum() + part.lse[part.lse > -torch.inf].cos().sum()


def _whole_gradients(case: Case) -> list[Tensor]:
    """float64, on one device, by the definition: dq (zeros before the call), dk, dv."""
    *leaves, weights = (x.double() for x in case.whole())
    leaves = [x.requires_grad_() for x in leaves]
    q, k, v = leaves
    part = oracle(q[:, :, case.past :], k, v, case.mask, **case.how)
    return list(torch.autograd.grad(loss(part, weights[:, :, case.past :]), leaves))


def bytes_sent(group: Any, cases: list[tuple[str, Case]]) -> list[dict[str, int]]:
    """By case: what this rank sends, forward and backward, and the rows that a rank computes."""
    results = []
    for name, case in cases:
        options = {"with_lse": False} if name in ("ulysses", "usp") else {}
        mechanism = Mechanism(name, case, group, **options)
        leaves = mechanism.local.leaves()
        mechanism(*leaves).out.nansum().backward()
        ranks = [mechanism.across, mechanism.along] if name == "usp" else [mechanism.ranks]
        sent = {key: value for r in ranks for key, value in r.sent.items()}
        counts = [mechanism.local.past.count(r) for r in range(mechanism.ranks.size)]
        results.append(sent | {"rows": mechanism.local.split.rows, "past": counts})
    return results


def schedule(group: Any) -> list[str]:
    """The order of sending, computing and waiting in a ring, forward and backward."""
    events: list[str] = []

    class Told(Ranks):
        def shift(self, *args: Any, **how: Any) -> Any:
            events.append("send")
            shift = super().shift(*args, **how)
            wait = shift.wait
            shift.wait = lambda: (events.append("wait"), wait())
            return shift

    mechanism = Mechanism("ring", Case(new=61), group)
    mechanism.ranks = Told(group)
    leaves = mechanism.local.leaves()
    add, add_gradients = ring_module.add, ring_module.add_gradients
    with (
        patch.object(ring_module, "add", lambda *a, **k: (events.append("compute"), add(*a, **k))),
        patch.object(
            ring_module, "add_gradients", lambda *a, **k: (events.append("compute"), add_gradients(*a, **k))
        ),
    ):
        part = mechanism(*leaves)
        events.append("backward")
        part.out.sum().backward()
    return events


def same(group: Any, cases: list[Case]) -> None:
    """What must not change a bit: an empty past for none; DeepSpeed's all-to-all for torch's."""
    for case in cases:
        names = ["ring", "pass_q", "ulysses"]
        for name in names:
            plain = Mechanism(name, case, group)
            leaves = plain.local.leaves()
            want = plain(*leaves)
            if case.past == 0:
                empty = {"past": plain.local.past, "past_k": leaves[3], "past_v": leaves[4]}
                _assert_equal(Mechanism(name, case, group, **empty)(*leaves), want)
        for name in ["ulysses", *(["usp"] if grid(plain.ranks.size) else [])]:
            ours, theirs = Mechanism(name, case, group), Mechanism(name, case, group, backend="deepspeed")
            pairs = []
            for one in (ours, theirs):
                leaves = one.local.leaves()
                part = one(*leaves)
                leaves = leaves if case.past else leaves[:3]
                grads = torch.autograd.grad(loss(part, one.local.of(case.whole()[3], 1.0)), leaves)
                ranks = [one.across, one.along] if name == "usp" else [one.ranks]
                pairs.append((part, grads, [r.sent for r in ranks]))
            (a, da, sent_a), (b, db, sent_b) = pairs
            _assert_equal(a, b)
            assert all(torch.equal(x, y) for x, y in zip(da, db, strict=True))
            assert sent_a == sent_b


def _assert_equal(a: Partial, b: Partial) -> None:
    assert torch.equal(a.out, b.out) and torch.equal(a.lse, b.lse)


def refusals(group: Any) -> None:
    """What cannot be served is said before anything is sent."""
    heads = "9 query heads cannot .* 2 ranks; of 3 KV heads and 2 ranks"
    for case, options, error, words in (
        (Case(new=5, heads=(9, 3)), {}, Unsupported, heads),
        (Case(new=5), {"backend": "mpi"}, Unsupported, "no backend 'mpi': it has torch and deepspeed"),
        (Case(new=5), {"backend": "deepspeed"}, FarspanError, r"pip install 'farspan\[parallel\]'"),
    ):
        mechanism = Mechanism("ulysses", case, group, **options)
        with patch.dict(sys.modules, {"deepspeed.comm": None}), pytest.raises(error, match=words):
            mechanism(*mechanism.local.leaves())
        assert not mechanism.ranks.calls


def gathered_gradient(group: Any) -> None:
    """d sum(weights_r * gathered) / dx on rank s is the sum of everyone's weights for it."""
    ranks = Ranks(group)
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(ranks.size, ranks.size, 2, 3, generator=g, dtype=torch.float64)
    x = torch.full((2, 3), float(ranks.rank), dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad((gather(x, ranks) * weights[ranks.rank]).sum(), x)
    assert torch.allclose(dx, weights[:, ranks.rank].sum(0), rtol=1e-14)
    assert ranks.sent["all_gather"] == ranks.sent["all_gather_backward"] == (ranks.size - 1) * 48
    assert gather(x.bfloat16(), ranks).dtype == torch.bfloat16
