"""select against counting by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from farspan.attention.errors import Unsupported
from farspan.attention.ops.select import by_mass, by_threshold, top_k

from .tools import Run, every_run


def _brute_top_k(row: list[float], k: int, order: str) -> list[int]:
    ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    return ranked if order == "score" else sorted(ranked)


def _tied(n: int, levels: int | None, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    """[3, 2, n] in [0, 1), or only so many different values, with infinities and both zeros."""
    x = torch.rand(3, 2, n, generator=torch.Generator().manual_seed(seed))
    x = x - 0.5 if levels is None else (x * levels).floor() - levels // 2
    x[0, 0, n // 6 : n // 2] = -torch.inf  # not to be had
    x[1, 1, n // 2 : n // 2 + 3] = torch.inf  # forced
    x[2, 1, ::2], x[2, 1, 1::3] = -0.0, 0.0
    return x.to(dtype).to(device)


@every_run()
@pytest.mark.parametrize("order", ["position", "score"])
@pytest.mark.parametrize("levels", [2, None])
def test_top_k_gives_ties_to_the_lowest_position(run: Run, order: str, levels: int | None) -> None:
    x = _tied(63, levels, run.dtype, run.device)
    for k in (1, 7, 62, 100):
        got = top_k(x, k, order=order, impl=run.impl)
        assert got.shape == (3, 2, min(k, 63)) and got.dtype == torch.int64
        for a in range(3):
            for b in range(2):
                assert got[a, b].tolist() == _brute_top_k(x[a, b].tolist(), min(k, 63), order)


@every_run()
@pytest.mark.parametrize("n", [500, 4097, 8200])
@pytest.mark.parametrize("levels", [3, None])
def test_top_k_of_long_rows(run: Run, n: int, levels: int | None) -> None:
    """One program per row, and (beyond 8192) several."""
    x = _tied(n, levels, run.dtype, run.device)[:: 2 if n > 8192 else 1, 1]
    k = n // 3 + 1
    got = top_k(x, k, impl=run.impl)
    assert torch.equal(got.cpu(), top_k(x.cpu(), k, impl="reference"))


@pytest.mark.parametrize(("n", "k"), [(8192, 512), (8207, 1), (30011, 700)])
@pytest.mark.parametrize("levels", [3, 5000, None])
def test_few_of_a_long_row(n: int, k: int, levels: int | None) -> None:
    """On the CPU not all scores are ranked: also where the highest are neighbours, or all are tied."""
    x = _tied(n, levels, torch.float32)
    x[1, 0, 5000 : 5000 + k // 2] += 1.0
    x[0, 1] = 0.0
    assert torch.equal(top_k(x, k, impl="eager"), top_k(x, k, impl="reference"))


@every_run()
def test_top_k_reads_views(run: Run) -> None:
    x = torch.rand(4, 90, 3, generator=torch.Generator().manual_seed(0)).to(run.dtype).to(run.device)
    for view in (x[..., 1], x.transpose(1, 2), x[:, 10:70, 0], x[1:1, :, 0]):
        got = top_k(view, 5, impl=run.impl)
        assert torch.equal(got.cpu(), top_k(view.cpu().contiguous(), 5, impl="reference"))


def _check_lists(indices: Tensor, counts: Tensor, most: int | None, n: int) -> list[list[int]]:
    """The form both lists share: ascending, different, in range, padded with the first. -> the chosen."""
    assert indices.dtype == torch.int64 and counts.dtype == torch.int32
    assert indices.shape[:-1] == counts.shape
    assert indices.shape[-1] == (max(1, int(counts.max())) if most is None else min(most, n))
    chosen = []
    for row, count in zip(indices.flatten(0, -2).tolist(), counts.flatten().tolist(), strict=True):
        assert row[:count] == sorted(set(row[:count])) and min(row) >= 0 and max(row) < n
        assert row[count:] == [row[0] if count else 0] * (len(row) - count)
        chosen.append(row[:count])
    return chosen


def _probabilities(n: int, levels: int | None, run: Run) -> Tensor:
    x = torch.rand(3, 2, n, generator=torch.Generator().manual_seed(n)) ** 4
    x = x if levels is None else (x * levels).floor() / 8
    x[0, 0] = 0.0  # no mass
    x[1, 0] = 0.0
    x[1, 0, n // 2] = 1e-30  # all of it in one place
    x[2, 0, : n // 2] = -0.0
    return x.to(run.dtype).to(run.device)


@every_run()
@pytest.mark.parametrize(("n", "levels"), [(1, None), (63, 3), (500, None)])
def test_by_mass(run: Run, n: int, levels: int | None) -> None:
    x = _probabilities(n, levels, run)
    for mass in (1e-6, 0.7, 1.0):
        for most in (None, 7):
            _check_by_mass(run, x, mass, most)


def _check_by_mass(run: Run, x: Tensor, mass: float, most: int | None) -> None:
    n = x.shape[-1]
    indices, counts = by_mass(x, mass, most=most, impl=run.impl)
    chosen = _check_lists(indices, counts, most, n)
    for row, got in zip(x.double().flatten(0, -2).tolist(), chosen, strict=True):
        ranked = [i for i in _brute_top_k(row, n, "score") if row[i] > 0]
        assert got == sorted(ranked[: len(got)]), "the largest, ties to the lowest position"
        if not ranked:
            continue
        assert len(got) >= 1
        total, rounding = sum(row), n * 2**-24 * sum(row)
        if most is None or len(got) < most:
            assert sum(row[i] for i in got) >= mass * total - rounding, "reaches the mass"
        assert sum(row[i] for i in ranked[: len(got) - 1]) < mass * total + rounding, (
            "and no smaller set does"
        )


@pytest.mark.parametrize("most", [None, 9])
def test_by_mass_is_exact_where_sums_are(most: int | None) -> None:
    """Eighths add up without rounding, so every implementation takes the same entries."""
    run = Run("reference", "cpu", torch.float32)
    x = _probabilities(500, 9, run)
    for mass in (0.25, 1.0):
        want = by_mass(x, mass, most=most, impl="reference")
        for impl in ("eager", "triton"):
            got = by_mass(x, mass, most=most, impl=impl)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@every_run()
@pytest.mark.parametrize(("n", "levels"), [(1, None), (63, 4), (500, None)])
@pytest.mark.parametrize("most", [None, 5])
def test_by_threshold(run: Run, n: int, levels: int | None, most: int | None) -> None:
    x = _tied(n, levels, run.dtype, run.device)
    one = 0.25 if levels is None else 1.0
    per_row = torch.tensor([[one], [-torch.inf], [0.0]], device=run.device)
    for threshold in (one, -torch.inf, torch.inf, per_row, torch.tensor(-0.0)):
        indices, counts = by_threshold(x, threshold, most=most, impl=run.impl)
        chosen = _check_lists(indices, counts, most, n)
        limits = torch.as_tensor(threshold).cpu().expand(3, 2).flatten().tolist()
        for row, limit, got in zip(x.cpu().flatten(0, -2).tolist(), limits, chosen, strict=True):
            passing = [i for i in _brute_top_k(row, n, "score") if row[i] >= limit and row[i] > -torch.inf]
            assert got == sorted(passing[:most])


def test_references_of_lists_agree_with_the_eager_ones() -> None:
    x = torch.rand(5, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for most in (None, 30):
        for got, want in (
            (by_mass(x, 0.7, most=most), by_mass(x, 0.7, most=most, impl="reference")),
            (by_threshold(x, 0.7, most=most), by_threshold(x, 0.7, most=most, impl="reference")),
        ):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_selection_is_captured_in_a_graph(impl: str) -> None:
    """Nothing waits for the device: a wait would break the capture."""
    for n in (2048, 40000):
        x = torch.rand(6, n, device="cuda")

        def select(x: Tensor = x, n: int = n) -> list[Tensor]:
            lists = [top_k(x, 100, impl=impl)]
            if impl == "eager" or n <= 8192:
                lists += by_mass(x, 0.5, most=300, impl=impl) + by_threshold(x, 0.9, most=300, impl=impl)
            return lists

        select()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = select()
        x.copy_(torch.rand(6, n, device="cuda"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, select(), strict=True))


def test_select_refuses_bad_arguments() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="k of at least 1; got 0"):
        top_k(x, 0)
    with pytest.raises(ValueError, match="'position' or 'score'; got 'size'"):
        top_k(x, 1, order="size")
    for mass in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="above 0, and at most 1; got"):
            by_mass(x, mass)
    with pytest.raises(ValueError, match="by_mass keeps at least 1 entry; got most = 0"):
        by_mass(x, 0.5, most=0)
    with pytest.raises(ValueError, match="by_threshold keeps at least 1 entry; got most = -1"):
        by_threshold(x, 0.5, most=-1)
    with pytest.raises(ValueError, match=r"broadcasts to \[2\], the rows of scores \[2, 3\]; got \[4\]"):
        by_threshold(x, torch.zeros(4))
    with pytest.raises(ValueError, match=r"at least one entry per row; got \[2, 0\]"):
        by_threshold(x[:, :0], 0.0)


def test_triton_says_what_it_cannot_select() -> None:
    with pytest.raises(Unsupported, match="float64 is none of"):
        top_k(torch.zeros(2, 3, dtype=torch.float64), 1, impl="triton")
    with pytest.raises(Unsupported, match="rows of 20000 entries are longer than 8192"):
        by_mass(torch.zeros(2, 20000), 0.5, impl="triton")
    with pytest.raises(Unsupported, match="no backward"):
        top_k(torch.zeros(2, 3, requires_grad=True), 1, impl="triton")
