"""The laws of decode on a store of fixed size: for every method with a step of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.attention import static_step
from farspan.attention.attend import Reads
from farspan.attention.kv import KV
from farspan.attention.lists import TokenLists
from farspan.attention.method import AttentionMethod
from farspan.attention.partial import Partial
from farspan.attention.softmax import Softmax
from farspan.attention.sources import Sources
from farspan.attention.sparse import window
from farspan.attention.static_step import StaticStep
from farspan.runtime.report import PhaseReport
from farspan.runtime.static_call import Ledger
from farspan.runtime.store.static import Clock, StaticStore

from ..interpreter import overflow_unchecked
from ..ops.tools import assert_law_5
from .parameters import every_method_with_static_step
from .test_law_9_undo import HOW, IDS, snapshot
from .tools import HKV, Data, H, Stream, assert_same, decode_cuts

ROOM, PROMPT, STEPS = 160, 100, 12
STARTS = [None, [0, 33, 70]]


class Static(Stream):
    """A stream on a store of fixed size: a single token is a step, where the method has one for it."""

    def __init__(self, method: AttentionMethod, data: Data, *, impl: str = "auto") -> None:
        super().__init__(method, data, impl=impl)
        self.store: StaticStore = StaticStore(ROOM, Clock())
        self.store.impl = impl
        self.steps: list[StaticStep] = []
        self.ledger = Ledger()

    def call(self, upto: int) -> Partial:
        store, past = self.store, self.length
        new = slice(past, upto)
        step = None
        if past and upto == past + 1:
            step = self.layer_call.decode.static_step(store.step.of_next(self.layer_call.kept_as))
        if step is None:
            return super().call(upto)
        seen = store.step.seen()
        store.clock.begin(upto, store.starts or [0])
        store.begin(step)
        q, k, v = (x[:, :, new] for x in (self.data.q, self.data.k, self.data.v))
        store.append(k, v)
        part = step.run(q, store.step, Softmax(self.data.scale))
        store.clock.stepping = False
        store.finish(step, done=True)
        self.steps.append(step)
        self.ledger.ran(step, q, store, set())
        self.ledger.add(step, seen, upto)
        report = PhaseReport("")
        self.ledger.settle(report, self.method.selective, None)
        self.reads.append(
            Reads(
                report.pairs, report.causal_pairs, report.kv_bytes, report.dense_bytes, report.selection_bytes
            )
        )
        return part


CUTS = decode_cuts(PROMPT, STEPS)


@every_method_with_static_step()
@pytest.mark.parametrize("starts", STARTS)
def test_a_step_equals_a_call_on_a_growing_store(bound: AttentionMethod, starts: list[int] | None) -> None:
    """Bit for bit, counts included. Of recycled with rows that have no set yet, no call is a step."""
    data = Data.random(CUTS[-1], starts)
    one, other = Static(bound, data), Stream(bound, data)
    got, want = one.run(CUTS), other.run(CUTS)
    assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)
    counts = [[vars(r) | {"reason": None} for r in stream.reads] for stream in (one, other)]
    assert counts[0] == counts[1]
    assert len(one.steps) == STEPS or bound.name == "recycled"
    assert one.steps or (bound.name == "recycled" and starts is not None)


@every_method_with_static_step()
def test_law_4_a_row_alone_is_the_row_in_a_batch(bound: AttentionMethod) -> None:
    data = Data.random(CUTS[-1], [0, 33, 70])
    batch = Static(bound, data).run(CUTS)
    for row, first in enumerate([0, 33, 70]):
        alone = Static(bound, data.row(row)).run([cut - first for cut in CUTS])
        assert_same(Partial(batch.out[row : row + 1, :, first:], batch.lse[row : row + 1, :, first:]), alone)


@every_method_with_static_step()
@pytest.mark.parametrize(("impl", "dtype"), [("eager", torch.float32), ("triton", torch.float32)], ids=str)
@pytest.mark.parametrize("starts", STARTS)
def test_law_5_implementations_agree(
    bound: AttentionMethod, impl: str, dtype: torch.dtype, starts: list[int] | None
) -> None:
    """Steps as a kernel's and as eager torch's, against the reference in float64; the prompt is eager."""
    cuts = CUTS[:4]
    data = Data.random(cuts[-1], starts, dtype=dtype)
    unchecked = overflow_unchecked if impl == "triton" else nullcontext
    results = []
    for how, numbers in ((impl, data), ("reference", data), ("reference", data.to(torch.float64))):
        stream = Static(bound, numbers)
        stream.call(PROMPT)
        stream.impl = stream.store.impl = how
        with unchecked():
            parts = [stream.call(cut) for cut in cuts[1:]]
        results.append(Partial(*(torch.cat(x, 2) for x in zip(*parts, strict=True))))
    assert_law_5(*results)


@every_method_with_static_step()
@pytest.mark.parametrize("starts", STARTS)
def test_law_7_what_a_step_extends_is_what_is_made_anew(
    bound: AttentionMethod, starts: list[int] | None
) -> None:
    data = Data.random(CUTS[-1], starts)
    stream = Static(bound, data)
    for cut in CUTS:
        stream.call(cut)
        for summary in {step.summary.key: step.summary for step in stream.steps if step.summary}.values():
            for row, first in enumerate(starts or [0]):
                fresh = summary.compute(Sources({"keys": data.k[row : row + 1, :, first:cut]}))
                begin = first if summary.block is None else 0
                kept = stream.store.summaries.buffer(summary)[row : row + 1, :, begin:]
                assert torch.equal(kept[:, :, : fresh.shape[2]], fresh)


@every_method_with_static_step()
@pytest.mark.parametrize("starts", STARTS)
def test_law_8_what_is_not_counted_is_not_read(
    bound: AttentionMethod, starts: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pairs of the report are those that the operations were given, and NaN everywhere else in the
    buffers, positions past the length included, changes nothing."""
    pairs: list[int] = []

    def poisoned(op: Callable[..., Partial]) -> Callable[..., Partial]:
        def run(q: Tensor, kv: KV, *args: Any, **how: Any) -> Partial:
            read = _read(kv, args, how)
            pairs.append(int(read.sum()) * H // read.shape[1])
            keys = read.view(len(q), HKV, -1, kv.length).any(2) if read.shape[1] > 1 else read
            part = op(q, kv, *args, **how)
            clean = kv.map(lambda x: torch.where(keys[..., None], x, torch.nan))
            again = op(q, clean, *args, **how)
            assert torch.equal(part.out, again.out) and torch.equal(part.lse, again.lse)
            return part

        return run

    for module in (static_step, window, __import__("farspan.attention.recycled.steps", fromlist=["decode"])):
        monkeypatch.setattr(module, "decode", poisoned(module.decode))
    monkeypatch.setattr(static_step, "gather_decode", poisoned(static_step.gather_decode))
    stream = Static(bound, Data.random(CUTS[-1], starts))
    for cut in CUTS:
        steps = len(stream.steps)
        pairs.clear()
        stream.call(cut)
        if len(stream.steps) > steps:
            assert stream.reads[-1].pairs == sum(pairs)


def _read(kv: KV, args: tuple[Any, ...], how: dict[str, Any]) -> Tensor:
    """[B, 1 or Hs, N] bool: the positions that an operation may read."""
    if isinstance(args[0], TokenLists):
        lists = TokenLists(tokens=args[0].tokens, counts=args[0].counts)
        return lists.to_mask(1, kv.length)[:, :, 0]
    total, batch = int(how["length"]), kv.batch
    first = torch.zeros(batch, 1).long() if how["start"] is None else how["start"][:, None]
    places = torch.arange(kv.length)
    read = (places < total) & (places >= first)
    if how.get("window") is not None:
        read &= (places >= total - how["window"]) | (places < first + how["sinks"])
    return read[:, None]


@pytest.fixture
def plain(model: Any) -> Iterator[tuple[Any, Tensor]]:
    """(everything a patch could leave behind, the tokens) of the model before any patch."""
    yield snapshot(model), model.generate(IDS, **HOW)


@every_method_with_static_step()
def test_law_9_nothing_is_left(
    model: Any, patched: Callable[..., Any], method: AttentionMethod, plain: tuple[Any, Tensor]
) -> None:
    before, tokens = plain
    with patched(method, static=80):
        model.generate(IDS, **HOW)
    assert snapshot(model) == before
    assert torch.equal(model.generate(IDS, **HOW), tokens)
