"""Law 7: summaries kept on append equal summaries made from scratch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.softmax import Softmax
from farspan.attention.sources import Sources, Supply
from farspan.attention.summary import BlockPool, Channels, Summaries, Summary


class FewBlocks(BlockPool):
    most = 5  # type: ignore[assignment]


SUMMARIES: dict[str, Summary] = {
    "mean": BlockPool(8),
    "max-min": BlockPool(16, ("max", "min")),
    "one": BlockPool(1, ("max",)),
    "few": FewBlocks(8),
    "channels": Channels(torch.tensor([[0, 3, 5], [1, 2, 15]])),
}


def from_scratch(summary: Summary, k: Tensor, start: list[int] | None) -> list[Tensor]:
    """Per row, the entries that speak of its keys [Hkv, n, width], by the definition written out."""
    rows = []
    for b in range(k.shape[0]):
        first = start[b] if start else 0
        x = k[b, :, first:].double()
        if isinstance(summary, Channels):
            rows.append(torch.stack([x[h][:, c] for h, c in enumerate(summary.channels)]))
            continue
        pieces = [x[:, a : a + summary.block] for a in range(0, x.shape[1], summary.block)]
        pooled = [
            torch.cat([{"mean": p.mean, "max": p.amax, "min": p.amin}[mode](1) for mode in summary.modes], -1)
            for p in pieces
        ]
        rows.append(torch.stack(pooled[: summary.most], 1))
    return rows


def check(kept: Summaries, summary: Summary, k: Tensor, start: list[int] | None) -> None:
    entries = kept.get(summary, Supply(KV(k, k)), start)
    assert entries.shape[2] == min(-(-k.shape[2] // (summary.block or 1)), summary.most or k.shape[2])
    for b, want in enumerate(from_scratch(summary, k, start)):
        # labels stand where their keys stand; blocks, those of one key too, are counted from the row's start
        skip = start[b] if start and isinstance(summary, Channels) else 0
        got = entries[b, :, skip : skip + want.shape[1]].double()
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-6), f"row {b}"


@pytest.mark.parametrize("name", SUMMARIES)  # "one" with padding: f02
@pytest.mark.parametrize("start", [None, [0, 5, 5], [13, 0, 40]])
def test_ragged_appends_crops_and_copies(name: str, start: list[int] | None) -> None:
    summary, kept = SUMMARIES[name], Summaries()
    torch.manual_seed(0)
    k = torch.randn(3, 2, 700, 16)
    length = 0
    for step in (41, 1, 1, 6, 17, 1, 100, 3, 0, 250):
        length += step
        check(kept, summary, k[:, :, :length], start)
    for back in (1, 9, 160):  # a crop, then other keys in the same places
        length -= back
        kept.crop(length)
        k[:, :, length:] = torch.randn(3, 2, 700 - length, 16)
        length += 5
        check(kept, summary, k[:, :, :length], start)
    twin = copy.deepcopy(kept)
    other = k.clone()
    other[:, :, length:] += 1
    check(twin, summary, other[:, :, : length + 30], start)
    check(kept, summary, k[:, :, : length + 30], start)


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_crop_is_seen_at_once(name: str) -> None:
    """The open block is summarised again although nothing has been appended since the crop."""
    kept, k = Summaries(), torch.randn(1, 2, 60, 16)
    check(kept, SUMMARIES[name], k, None)
    kept.crop(53)
    check(kept, SUMMARIES[name], k[:, :, :53], None)


@pytest.mark.parametrize("name", SUMMARIES)
def test_rows_that_move_take_their_entries_along(name: str) -> None:
    summary, kept = SUMMARIES[name], Summaries()
    torch.manual_seed(0)
    k, start = torch.randn(3, 2, 90, 16), [0, 7, 22]
    check(kept, summary, k[:, :, :60], start)
    rows = torch.tensor([2, 2, 0, 1])
    kept.map_rows(lambda x: x.index_select(0, rows))
    check(kept, summary, k[rows], [start[r] for r in rows.tolist()])
    kept.clear()
    check(kept, summary, -k, start)


def test_only_new_entries_are_computed() -> None:
    """Extended, never rebuilt: an append asks for the open block and what follows it."""
    asked: list[int] = []

    class Counted(BlockPool):
        def compute(self, x: Sources) -> Tensor:
            asked.append(x.length)
            return super().compute(x)

    kept, summary, k = Summaries(), Counted(8), torch.randn(1, 2, 100, 4)
    for length in (50, 51, 56, 57, 57, 90):
        kept.get(summary, Supply(KV(k, k)[:, :, :length]), None)
    assert asked == [50, 3, 8, 1, 34]


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_row_of_a_batch_sees_what_it_would_see_alone(name: str) -> None:
    """Keys.row reads the batch's summaries; a row alone makes its own."""
    torch.manual_seed(0)
    k, start = torch.randn(3, 2, 61, 16), [0, 13, 58]
    batch = Keys(kv=KV(k, k), tq=20, softmax=Softmax(1.0), start=torch.tensor(start))
    for b, first in enumerate(start):
        row = batch.row(b)
        alone = Keys(kv=KV(k[b : b + 1, :, first:], k[b : b + 1, :, first:]), tq=row.tq, softmax=Softmax(1.0))
        assert row.tq == min(20, 61 - first)
        assert torch.equal(row.kv.k, alone.kv.k)
        assert torch.equal(row.summary(SUMMARIES[name]), alone.summary(SUMMARIES[name]))
        assert row.summary_bytes == alone.summary_bytes
