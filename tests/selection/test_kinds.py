"""What every kind of selection owes: its phases, its mask, the keys it needs, and decode over a part of the
keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.method import DECODE, PREFILL
from farspan.attention.ops.reference import masked_attention
from farspan.attention.partial import Partial, merge
from farspan.attention.selection import (
    Band,
    Bands,
    Biased,
    BlockIndex,
    EveryKey,
    Rescaled,
    Selection,
    Spans,
    Stretches,
    Summarised,
    TokenIndex,
    Window,
    as_selection,
)
from farspan.attention.softmax import Softmax

from .some_keys import SomeKeys

H, HKV, D = 6, 2, 8


def data(tq: int, tk: int, starts: list[int] | None) -> tuple[Tensor, Keys]:
    generator = torch.Generator().manual_seed(tq * tk)
    b = len(starts or [0])
    q = torch.randn(b, H, tq, D, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(b, HKV, tk, D, generator=generator, dtype=torch.float64) for _ in range(2))
    start = None if starts is None else torch.tensor(starts)
    return q, Keys(kv=KV(k, v), tq=tq, softmax=Softmax(0.4, 5.0), start=start)


def biased(read: Selection, tk: int, b: int = 1) -> Biased:
    generator = torch.Generator().manual_seed(tk)
    return Biased(read=read, bias=3 * torch.randn(b, HKV, tk, generator=generator, dtype=torch.float64))


def want_of(selection: Selection, q: Tensor, keys: Keys, mask: Tensor) -> Partial:
    """Softmax under the mask, with the bias of a ``Biased`` added to the logits before the soft-cap."""
    if not isinstance(selection, Biased):
        return masked_attention(q, *keys.kv.dense(), mask, scale=0.4, softcap=5.0)
    k, v, bias = (x.repeat_interleave(H // HKV, 1) for x in (*keys.kv.dense(), selection.bias))
    logits = 5 * torch.tanh((0.4 * q @ k.transpose(2, 3) + bias[:, :, None]) / 5)
    mask = mask if mask.shape[1] == 1 else mask.repeat_interleave(H // mask.shape[1], 1)
    logits = logits.masked_fill(~mask, -torch.inf)
    return Partial(logits.softmax(-1).nan_to_num() @ v, logits.logsumexp(-1))


def tokens(heads: int, tq: int, tk: int, starts: list[int] | None, full: str) -> TokenIndex:
    generator = torch.Generator().manual_seed(heads + tk)
    b = len(starts or [0])
    candidates = torch.rand(b, heads, tq, tk, generator=generator).argsort(-1)
    rows = torch.arange(tk - tq, tk)[:, None]
    first = torch.tensor(starts or [0])[:, None, None, None]
    counted = (candidates <= rows) & (candidates >= first)
    counted &= torch.rand(b, heads, tq, tk, generator=generator) < 0.4
    whole = {"none": None, "some": torch.rand(b, heads, tq, generator=generator) < 0.5}
    whole["all"] = torch.ones(b, heads, tq, dtype=torch.bool)
    return TokenIndex.ragged(candidates, counted, full=whole[full])


DECODES: dict[str, Any] = {
    "every": lambda *call: EveryKey(),
    "window": lambda *call: Window(size=7, sinks=3),
    "narrow": lambda *call: Window(size=1),
    "tokens": lambda *call: tokens(HKV, *call, "none"),
    "tokens of heads": lambda *call: tokens(H, *call, "none"),
    "some full": lambda *call: tokens(HKV, *call, "some"),
    "all full": lambda *call: tokens(HKV, *call, "all"),
    "biased tokens": lambda *call: biased(tokens(HKV, *call, "none"), call[1], len(call[2] or [0])),
    "biased": lambda *call: biased(EveryKey(), call[1], len(call[2] or [0])),
}


def here(selection: Selection, keys: Keys) -> Selection:
    """A biased selection has the biases of the keys that are here."""
    if isinstance(selection, Biased) and isinstance(keys, SomeKeys):
        return replace(selection, bias=selection.bias[:, :, keys.at])
    return selection


@pytest.mark.parametrize(
    ("tq", "tk", "starts"), [(1, 30, None), (4, 33, None), (3, 41, [0, 25]), (1, 9, [8])]
)
@pytest.mark.parametrize("name", DECODES)
@pytest.mark.parametrize("holders", [1, 2, 3])
def test_parts_of_the_keys_add_up_to_decode(
    name: str, holders: int, tq: int, tk: int, starts: list[int] | None
) -> None:
    """Against softmax under the mask; one device is the case of one holder, a holder may have no key."""
    q, keys = data(tq, tk, starts)
    selection = DECODES[name](tq, tk, starts)
    mask = selection.to_mask(tq, tk, keys.start, q.shape[0])
    want = want_of(selection, q, keys, mask)
    whole, pairs = selection.run_decode(q, keys, "auto")
    assert pairs == int(mask.sum()) * (H // mask.shape[1]) * (q.shape[0] // mask.shape[0])
    held: list[Keys] = [keys]
    if holders > 1:
        at = [torch.arange(tk)[torch.arange(tk) // 5 % holders == i] for i in range(holders)]
        at.append(torch.arange(0))
        held = [
            SomeKeys(
                kv=keys.kv[:, :, x],
                tq=tq,
                softmax=keys.softmax,
                start=keys.start,
                at=x,
                total=tk,
            )
            for x in at
        ]
    parts = [here(selection, some).run_decode_here(q, some) for some in held]
    for got in (whole, merge(*(part for part, _ in parts))):
        seen = want.lse > -torch.inf
        assert torch.equal(got.lse > -torch.inf, seen)
        assert (got.lse - want.lse)[seen].abs().max() < 1e-12
        assert (got.out - want.out)[seen].abs().max() < 1e-12
    assert sum(int(number) for _, number in parts) == pairs


PREFILLS: dict[str, Selection] = {
    "every": EveryKey(),
    "window": Window(size=7, sinks=3),
    "bands": Bands(bands=(Band(1, 0, 3), Band(4, 4, 24)), sinks=2),
    "blocks": BlockIndex(
        blocks=torch.tensor([[[[0, 2], [1, 9]], [[2, 3], [0, 3]]]], dtype=torch.int32),
        counts=torch.tensor([[[2, 1], [2, 2]]], dtype=torch.int32),
        block_q=8,
        block_k=8,
    ),
}
PREFILLS["rescaled"] = Rescaled(read=None, keys=torch.zeros(1, H, 31, dtype=torch.bool), factor=0.5)
PREFILLS["rescaled blocks"] = Rescaled(
    read=PREFILLS["blocks"],  # type: ignore[arg-type]
    keys=torch.arange(31).expand(1, H, 31) == 3,
    factor=0.5,
)
# Some keys are never read, some to the end, some leave within a query block.
PREFILLS["spans"] = Spans(until=torch.randint(40, (1, HKV, 31), generator=torch.Generator().manual_seed(0)))
PREFILLS["biased spans"] = biased(PREFILLS["spans"], 31)
PREFILLS["biased blocks"] = biased(PREFILLS["blocks"], 31)
PREFILLS["biased"] = biased(EveryKey(), 31)


PREFILLS["stretches"] = Stretches(
    tokens=torch.stack([torch.arange(18).roll(5 * i)[:5] for i in range(2 * HKV)]).view(1, HKV, 2, 5),
    first=18,
    stride=9,
)


@pytest.mark.parametrize("name", PREFILLS)
def test_prefill_reads_the_keys_needed_and_counts_the_pairs(name: str) -> None:
    tq, tk = 15, 31
    q, keys = data(tq, tk, None)
    selection = PREFILLS[name]
    mask = selection.to_mask(tq, tk)
    assert mask.shape == (1, selection.mask_heads, tq, tk)
    assert torch.equal(selection.to_mask(tq, tk, rows=torch.tensor([14, 2])), mask[:, :, [14, 2]])
    assert selection.reads_every_key == (name in ("every", "rescaled", "biased"))
    part, pairs = selection.run_prefill(q, keys, range(3, 12), "auto")
    assert pairs == int(mask[:, :, 3:12].sum()) * (H // mask.shape[1])
    lse = want_of(selection, q, keys, mask).lse
    assert (part.lse - lse)[lse > -torch.inf].abs().max() < 1e-12
    needed = selection.needed((tk - tq, tk), [0], HKV, torch.device("cpu"))
    assert needed.shape == (1, HKV, tk)
    read = mask.any(2).expand(-1, HKV, -1)
    assert not bool((read & ~needed).any()), "a key that is read is not needed"


def test_spans_count_positions_from_the_start_of_a_row() -> None:
    """In the mask and among the keys needed, as a padded row that is served alone has them."""
    tq, tk, first = 15, 31, 6
    until = torch.randint(40, (2, HKV, tk), generator=torch.Generator().manual_seed(1))
    both, alone = Spans(until=until), Spans(until=until[1:, :, : tk - first])
    padded = both.to_mask(tq, tk, torch.tensor([0, first]))
    assert (
        torch.equal(padded[1:, :, :, first:], alone.to_mask(tq, tk - first))
        and not padded[1, ..., :first].any()
    )
    needed = both.needed((tk - tq, tk), [0, first], HKV, torch.device("cpu"))
    assert torch.equal(needed, padded.any(2))


def test_an_answer_for_the_other_phase_is_refused() -> None:
    q, keys = data(1, 9, None)
    prefill = r"^select_prefill answers with None, .*a BlockIndex.* or a Window; got TokenIndex\.$"
    decode = r"^select_decode answers with None, .*a TokenIndex.* or a Window; got Bands\.$"
    index, bands = tokens(HKV, 1, 9, None, "none"), PREFILLS["bands"]
    for refused in (
        lambda: as_selection(index, PREFILL),
        lambda: index.run_prefill(q, keys, range(1), "auto"),
        lambda: index.needed((0, 9), [0], HKV, torch.device("cpu")),
    ):
        with pytest.raises(TypeError, match=prefill):
            refused()
    for refused in (
        lambda: as_selection(bands, DECODE),
        lambda: bands.run_decode(q, keys, "auto"),
        lambda: bands.run_decode_here(q, keys),
    ):
        with pytest.raises(TypeError, match=decode):
            refused()
    with pytest.raises(TypeError, match=r"got Tensor\.$"):
        as_selection(q, DECODE)  # type: ignore[arg-type]
    assert as_selection(None, PREFILL) == EveryKey() and as_selection(index, DECODE) is index


def test_the_kinds_of_each_phase() -> None:
    kinds = (EveryKey, Window, Bands, BlockIndex, Rescaled, Spans, Summarised, Biased, TokenIndex)
    assert [k for k in kinds if not k.serves(PREFILL)] == [TokenIndex]
    assert [k for k in kinds if k.serves(DECODE)] == [EveryKey, Window, Summarised, Biased, TokenIndex]
    for kind in kinds:  # over ranks, too
        assert (kind.needed is not Selection.needed) == kind.serves(PREFILL)
        assert (kind.run_decode_here is not Selection.run_decode_here) == kind.serves(DECODE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("most", [6e4, 2e12, torch.inf])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_bias_beyond_the_type_of_the_keys(dtype: torch.dtype, most: float, softcap: float | None) -> None:
    """A key with an enormous bias takes all, as far as a soft-cap allows, and a negative one nothing."""
    q, keys = data(12, 12, None)
    k, v = (x.to(dtype) for x in keys.kv.dense())
    keys = Keys(kv=KV(k, v), tq=12, softmax=Softmax(0.4, softcap))
    bias = torch.zeros(1, HKV, 12)
    bias[..., 0], bias[..., 3] = -most, most
    selection = Biased(read=EveryKey(), bias=bias)
    logits = 0.4 * q.to(dtype).double() @ k.double().repeat_interleave(H // HKV, 1).transpose(2, 3)
    logits = logits + bias[:, :1, None].clamp(-1e15, 1e15).double()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
    want = logits.softmax(-1) @ v.double().repeat_interleave(H // HKV, 1)
    last = Keys(kv=keys.kv, tq=1, softmax=keys.softmax)
    every = TokenIndex(tokens=torch.arange(12).expand(1, HKV, 1, 12))
    precise = 0.02 if dtype == torch.bfloat16 else 3e-3
    got = selection.run_prefill(q.to(dtype), keys, range(12), "auto")[0].out
    assert (got - want).abs().max() < precise
    for read in (selection, Biased(read=every, bias=bias)):
        got = read.run_decode(q[:, :, -1:].to(dtype), last, "auto")[0].out
        assert (got - want[:, :, -1:]).abs().max() < precise
