"""``append``: every implementation leaves what the definition leaves, and writes nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from farspan.attention.errors import Unsupported
from farspan.attention.kv import KV
from farspan.attention.ops.append import Kept, Labels, Pages, append

from .doubled import Doubled
from .tools import Run, every_run

B, HKV, ROOM = 2, 3, 70


class Buffers:
    """Buffers that are NaN but for the first ``length - 1`` positions and what is kept of them."""

    def __init__(self, run: Run, d: int, dv: int, length: int, starts: list[int] | None, page: int) -> None:
        generator = torch.Generator().manual_seed(length)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(run.device, run.dtype)

        self.k, self.v = numbers(B, HKV, 1, d), numbers(B, HKV, 1, dv)
        self.kv = KV(*(torch.full_like(numbers(B, HKV, ROOM, n), torch.nan) for n in (d, dv)))
        for buffer in self.kv.stored:
            buffer[:, :, : length - 1] = numbers(B, HKV, length - 1, buffer.shape[3])
        self.length = torch.tensor([length], dtype=torch.int32, device=run.device)
        self.start = None if starts is None else torch.tensor(starts, device=run.device)
        self.channels = torch.stack([torch.randperm(d, generator=generator)[:5] for _ in range(HKV)])
        labels = torch.full_like(numbers(B, HKV, ROOM, 5), torch.nan)
        pages = torch.full_like(numbers(B, HKV, -(-ROOM // page), 2 * d), torch.nan)
        self.labels, self.pages = Labels(labels, self.channels.to(run.device)), Pages(pages, page)
        for b in range(B):
            first = 0 if starts is None else starts[b]
            number, inside = divmod(length - 1 - first, page)
            if inside:
                keys = self.kv.k[b, :, first + number * page : length - 1]
                pages[b, :, number] = torch.cat([keys.amax(1), keys.amin(1)], -1)
        chosen = torch.arange(7, device=run.device).expand(B, HKV, 7).clone()
        since = torch.tensor([length - 11], dtype=torch.int32, device=run.device)
        self.kept = Kept(chosen, KV(numbers(B, HKV, 7, d), numbers(B, HKV, 7, dv)), since)

    def run(self, impl: str, **more: object) -> list[Tensor]:
        given = {"pages": self.pages, "labels": self.labels, "kept": self.kept} | more
        append(self.k, self.v, self.kv, self.length, start=self.start, impl=impl, **given)
        return [
            *self.kv.stored,
            self.pages.entries,
            self.labels.entries,
            self.kept.tokens,
            *self.kept.kv.stored,
        ]


@every_run()
@pytest.mark.parametrize(
    ("d", "dv", "length", "starts", "page"),
    [
        (64, 64, 1, None, 4),  # the first key of all
        (128, 128, 33, None, 16),  # the first of a page
        (64, 80, 48, [0, 3], 16),  # the last of a page in one row
        (80, 64, ROOM, [5, 61], 5),
    ],
)
def test_append(d: int, dv: int, length: int, starts: list[int] | None, page: int, run: Run) -> None:
    case = (d, dv, length, starts, page)
    want, buffers = Buffers(run, *case).run("reference"), Buffers(run, *case)
    got = buffers.run(run.impl)
    # the reference writes the labels of earlier keys too
    want[3][:, :, : length - 1] = torch.nan
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.nan_to_num(7e3), b.nan_to_num(7e3))
    once = [x.clone() for x in got]
    for a, b in zip(buffers.run(run.impl), once, strict=True):
        assert torch.equal(a.nan_to_num(7e3), b.nan_to_num(7e3))


@every_run()
def test_keys_alone_and_strided_views(run: Run) -> None:
    """k and v as a model has them, views of [B, 1, Hkv, D]; nothing but the buffers is written."""
    case = Buffers(run, 64, 64, 20, None, 4)
    case.k, case.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.k, case.v))
    kept = case.kept.tokens.clone()
    keys, values, pages, *_ = case.run(run.impl, pages=None, labels=None, kept=None)
    assert torch.equal(keys[:, :, 19], case.k[:, :, 0]) and torch.equal(values[:, :, 19], case.v[:, :, 0])
    assert bool(keys[:, :, 20:].isnan().all()) and torch.equal(kept, case.kept.tokens)
    assert int(pages.isfinite().all(-1).sum()) == B * HKV  # the open page alone


def test_what_append_cannot_do_is_said() -> None:
    case = Buffers(Run("eager", "cpu", torch.float32), 16, 16, 9, None, 4)
    with pytest.raises(ValueError, match="append takes one key and one value"):
        append(case.k.repeat(1, 1, 2, 1), case.v, case.kv, case.length)
    other = Doubled.encode(*case.kv.dense())
    with pytest.raises(Unsupported, match="which no kernel writes"):
        append(case.k, case.v, other, case.length, impl="triton")
