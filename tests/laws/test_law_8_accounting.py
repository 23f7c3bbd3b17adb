"""Law 8: what is reported is what is read, counted by brute force, and what is not read cannot matter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import farspan
from farspan.attention.causal import causal_mask
from farspan.attention.keys import Keys
from farspan.attention.method import DECODE, PREFILL, AttentionMethod
from farspan.attention.summary import Summaries
from farspan.parallel.mechanisms.layout import Split, zigzag

from ..parallel.jobs import TWO_LAYERS, Case, stepped, stepped_over_ranks
from ..parallel.world import World
from ..runtime.mixed_gate import MixedGate
from .parameters import every_method, leaves_out
from .tools import HKV, D, Data, H, Selection, Stream, recorded, replayed

DENSE = farspan.parse_method("dense")
CASES = [  # cuts, starts
    ([160, 180, 181, 182, 183, 184, 185, 190, 191], None),
    ([160, 180, 181, 182, 183, 184, 185, 190, 191], [0, 33, 145]),
    ([26, 27, 28, 29, 30, 31, 32], [0, 3, 25]),
]


def pairs(selections: list[Selection]) -> int:
    """(query head, key) pairs, counted one by one."""
    return sum(int(s.mask().sum()) * H // s.mask().shape[1] + s.entries() * H for s in selections)


@every_method()
@pytest.mark.parametrize(("cuts", "starts"), CASES)
def test_every_call_is_counted(bound: AttentionMethod, cuts: list[int], starts: list[int] | None) -> None:
    data = Data.random(cuts[-1], starts)
    stream = Stream(bound, data)
    batch = data.q.shape[0]
    per_key = 2 * D * data.k.element_size()
    for a, b in zip([0, *cuts], cuts, strict=False):
        with recorded(bound, DENSE) as seen:
            stream.call(b)
        reads = stream.reads[-1]
        assert reads.pairs == pairs(seen)
        visible = causal_mask(b - a, b, torch.tensor(starts) if starts else None, batch)
        assert reads.causal_pairs == int(visible.sum()) * H
        if seen[0].phase == DECODE:  # each key that the heads of a group share is loaded once per query
            loads = sum(int(s.mask().expand(-1, max(HKV, s.mask().shape[1]), -1, -1).sum()) for s in seen)
            loads += sum(s.entries() * HKV for s in seen)
            assert reads.kv_bytes == loads * per_key
            assert reads.dense_bytes == int(visible.sum()) * HKV * per_key


@every_method()
@pytest.mark.parametrize("starts", [None, [0, 20]])
def test_a_budget_that_covers_everything_is_named_as_the_reason(
    bound: AttentionMethod, starts: list[int] | None
) -> None:
    """Where only some rows of a batch are short, not everything was read, and no reason for that is given."""
    data = Data.random(60, starts)
    stream = Stream(bound, data)
    for cut in (21, 60):  # rows of 21 keys (and 1); of 60 (and 40)
        stream.length = 0
        with recorded(bound) as seen:
            stream.call(cut)
        reads = stream.reads[-1]
        everything = bool(seen) and all(s.index is None for s in seen) and bound.selective
        assert (reads.reason is not None) == (everything and PREFILL in bound.phases)


@every_method()
def test_the_report_of_a_model(model: Any, patched: Callable[..., Any], method: AttentionMethod) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (2, 120), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :41] = 0
    with patched(method) as patch, recorded(method, DENSE) as seen:
        model.generate(
            ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        report = patch.report()
    layers = model.config.num_hidden_layers
    lengths = (120, 79)
    causal = {
        PREFILL: sum(n * (n + 1) // 2 for n in lengths),
        DECODE: sum(n + i for n in lengths for i in range(1, 9)),
    }
    for phase in (PREFILL, DECODE):
        read = pairs([s for s in seen if s.phase == phase])
        assert sum(layer.phases[phase].pairs for layer in report.layers) == read
        want = read / (causal[phase] * H * layers)
        assert math.isclose(report.summary[f"{phase}_density"], want, rel_tol=1e-12)
        sparse = phase in method.phases and leaves_out(method)
        assert (want < 0.95) == sparse, "a method that reads everything, or dense attention that does not"
    assert report.summary["implementation"] == "eager"


@every_method()
@pytest.mark.parametrize(("cuts", "starts"), CASES)
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_poison_where_the_index_does_not_point(
    bound: AttentionMethod, cuts: list[int], starts: list[int] | None, impl: str
) -> None:
    data = Data.random(cuts[-1], starts)
    with recorded(bound, DENSE) as seen:
        stream = Stream(bound, data)
        calls = []
        for cut in cuts:
            before = len(seen)
            stream.call(cut)
            calls.append(seen[before:])
    poisoned = 0
    for a, b, selections in zip([0, *cuts], cuts, calls, strict=False):
        served = bound if selections[0].phase in bound.phases else DENSE
        read = _read(selections, data, a, b)
        results = []
        for inputs in (data, _poisoned(data, read)):
            one = Stream(served, inputs, impl=impl)
            one.length = a
            with replayed(served, selections):
                results.append(one.call(b))
        clean, got = results
        assert torch.equal(got.lse, clean.lse)
        assert torch.equal(got.out, clean.out)
        poisoned += int((~read).sum())
    # By DHSA's columns and diagonals the last queries of a call read everything.
    whole = not leaves_out(bound) or getattr(bound, "select", None) == "vertical_slash"
    assert poisoned > 0 or (whole and starts is None), "the case leaves nothing to poison"


def _read(selections: list[Selection], data: Data, a: int, b: int) -> torch.Tensor:
    """[B, Hkv, b] bool: keys that some query of the call reads. A padded prefill is asked row by row."""
    read = torch.zeros(data.q.shape[0], HKV, b, dtype=torch.bool)
    if len(selections) == 1:
        return _keys(selections[0])
    assert data.starts is not None
    rows = [row for row, first in enumerate(data.starts) if first < b]
    for row, selection in zip(rows, selections, strict=True):
        read[row, :, data.starts[row] :] = _keys(selection)[0]
    return read


def _keys(selection: Selection) -> torch.Tensor:
    mask = selection.mask().any(2)  # [B, Hs, Tk]
    batch, hs, tk = mask.shape
    return mask.expand(-1, HKV, -1) if hs < HKV else mask.view(batch, HKV, hs // HKV, tk).any(2)


def _poisoned(data: Data, read: torch.Tensor) -> Data:
    k, v = data.k.clone(), data.v.clone()
    for x in (k, v):
        x[:, :, : read.shape[2]][~read] = torch.nan
        x[:, :, read.shape[2] :] = torch.nan
    return Data(data.q, k, v, data.starts)


# --- what selection has read, over ranks ------------------------------------------------------------


@dataclass
class SelectionBytes:
    """Bytes that the methods of one device's layers have read to select, by what ranks do with them.

    prepared: by ``prepare_prefill``. chunks: by ``select_prefill`` for each chunk of the prompt that a rank
    computes. sharded: at decode and in ``on_prefill_end``, of labels and raw keys, which lie with their keys.
    """

    prepared: int = 0
    chunks: int = 0
    sharded: int = 0


@contextmanager
def selection_bytes(method: AttentionMethod, prompt: Split) -> Iterator[SelectionBytes]:
    """Counts while a patched model runs on one device; ``prompt``: the chunks of its prefill."""
    found, cls, decoding = SelectionBytes(), type(method), [False]

    def prepare(self: Any, q: Tensor, keys: Keys, original: Any = cls.prepare_prefill) -> Any:
        state = original(self, q, keys)
        found.prepared += keys.summary_bytes
        return state

    def select(self: Any, q: Tensor, keys: Keys, original: Any = cls.select_prefill) -> Any:
        for a, b in (chunk for rank in prompt.chunks for chunk in rank if chunk[0] < chunk[1]):
            fed = None if keys.fed is None else keys.fed.part(slice(None), 0, b)
            chunk = replace(
                keys,
                kv=keys.kv[:, :, :b],
                tq=b - a,
                summaries=Summaries(),
                summary_bytes=0,
                fed=fed,
                supply=replace(keys.supply, q=keys.supply.q[:, :, :b], fed=fed),
            )
            original(self, q[:, :, a:b], chunk)
            found.chunks += chunk.summary_bytes
        return original(self, q, keys)

    def at_decode(original: Any) -> Any:
        def run(self: Any, q: Tensor, keys: Keys) -> Any:
            decoding[0] = True
            try:
                return original(self, q, keys)
            finally:
                decoding[0] = False

        return run

    def read(original: Any) -> Any:
        def run(self: Keys, *args: Any, **how: Any) -> Any:
            before = self.summary_bytes
            result = original(self, *args, **how)
            whole = bool(args) and not isinstance(args[0], int) and args[0].block is not None
            found.sharded += self.summary_bytes - before if decoding[0] and not whole else 0
            return result

        return run

    with pytest.MonkeyPatch.context() as patching:
        if method.selective:
            patching.setattr(cls, "prepare_prefill", prepare)
            patching.setattr(cls, "select_prefill", select)
            for name in ("select_decode", "on_prefill_end"):
                patching.setattr(cls, name, at_decode(getattr(cls, name)))
            for name in ("summary", "read_all_keys", "read_key_blocks", "read_keys"):
                patching.setattr(Keys, name, read(getattr(Keys, name)))
        yield found


@every_method(evicting_in_some_heads=False)
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_count_what_selection_reads(
    method: AttentionMethod, recipe_of: Callable[[AttentionMethod], Any], world: World, size: int
) -> None:
    _assert_ranks_count(method, recipe_of(method), world, size)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_count_what_gates_read(world: World, size: int) -> None:
    _assert_ranks_count(MixedGate(), None, world, size)


def _assert_ranks_count(method: AttentionMethod, recipe: Any, world: World, size: int) -> None:
    """Every rank reads what is whole on every rank, so its bytes are one device's: block summaries at decode,
    all keys in ``prepare_prefill``. Two things differ by definition. Labels and raw keys at decode lie with
    their keys, so the ranks' bytes add up to one device's. In prefill each chunk of the prompt is selected
    for by itself, from what it sees, so the ranks' bytes are those of the chunks."""
    length = 288
    blocks = [s.block or 1 for s in method.summaries]
    prompt = zigzag(0, length, size, math.lcm(method.block_multiple, *blocks))
    how: dict[str, Any] = {"overrides": TWO_LAYERS, "patch": {"recipe": recipe}}
    case = Case(spec=method, calls=(length, *(1,) * 5), **how)
    with selection_bytes(method, prompt) as known:
        want = _of_selection(stepped(case)["report"])
    ranks = [_of_selection(got["report"]) for [got] in world.run(stepped_over_ranks, size, [case])]
    whole = want[DECODE] - known.sharded
    assert sum(rank[DECODE] for rank in ranks) == size * whole + known.sharded
    assert sum(rank[PREFILL] for rank in ranks) == size * known.prepared + known.chunks
    for rank in ranks:
        assert rank[PREFILL] >= known.prepared and rank[DECODE] >= whole


def _of_selection(report: farspan.Report) -> dict[str, int]:
    """Bytes that selection has read in all layers, by phase."""
    return {p: sum(layer.phases[p].selection_bytes for layer in report.layers) for p in (PREFILL, DECODE)}
