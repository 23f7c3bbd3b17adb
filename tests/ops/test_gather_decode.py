"""gather_decode against a float64 oracle (law 5), poison."""

from __future__ import annotations

import pytest
import torch

from farspan.attention.errors import Unsupported
from farspan.attention.kv import KV
from farspan.attention.ops.gather_decode import gather_decode
from farspan.attention.selection import TokenIndex
from farspan.attention.softmax import Softmax

from .tools import Run, assert_law_5, assert_reference, every_run, make_qkv, oracle


def poison(x: torch.Tensor, mask: torch.Tensor) -> None:
    """NaN into x [B, Hkv, Tk, D] wherever mask [B, Hs, Tq, Tk] lets no query of a KV head read."""
    b, hs, _, tk = mask.shape
    read = mask.any(2).view(b, x.shape[1], hs // x.shape[1], tk).any(2)
    assert not bool(read.all()), "the case leaves nothing to poison"
    x[~read] = torch.nan


def random_tokens(b: int, hs: int, tq: int, tk: int, n: int, *, ragged: bool, seed: int = 0) -> TokenIndex:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.rand(b, hs, tq, tk, generator=generator).topk(n, -1).indices.sort(-1).values
    if not ragged:
        return TokenIndex(tokens=tokens)
    counts = torch.randint(1, n + 1, (b, hs, tq), generator=generator, dtype=torch.int32)
    used = torch.arange(n) < counts[..., None]
    return TokenIndex(tokens=torch.where(used, tokens, tokens[..., :1]), counts=counts)


@every_run()
@pytest.mark.parametrize(
    ("b", "h", "hkv", "per_head", "tq", "tk", "d", "n", "ragged", "softcap"),
    [
        (1, 4, 4, False, 1, 63, 16, 8, False, None),
        (2, 8, 2, False, 1, 500, 64, 33, False, None),
        (2, 8, 2, True, 1, 500, 80, 33, False, None),
        (2, 8, 2, False, 5, 500, 128, 33, True, None),
        (2, 8, 2, True, 5, 1021, 16, 7, True, None),
        (2, 8, 2, False, 5, 500, 64, 33, True, 5.0),
        (1, 2, 1, False, 1, 63, 16, 1, False, None),
        (1, 4, 2, False, 1, 500, 64, 300, False, None),  # more keys than one split takes
        (2, 4, 2, True, 2, 500, 16, 300, True, None),
        (1, 20, 1, False, 2, 100, 16, 40, True, None),  # more heads in a group than 16
    ],
)
def test_gather_decode(
    b: int, h: int, hkv: int, per_head: bool, tq: int, tk: int, d: int, n: int,
    ragged: bool, softcap: float | None, run: Run,
) -> None:  # fmt: skip
    q, k, v = make_qkv(b, h, hkv, tq, tk, d, dtype=run.dtype)
    index = random_tokens(b, h if per_head else hkv, tq, tk, n, ragged=ragged)
    mask = index.to_mask(tq, tk)
    poison(k, mask)
    poison(v, mask)
    how = {"scale": d**-0.5, "softcap": softcap}
    truth = oracle(q, k, v, mask, **how)
    given = KV(k, v), index, Softmax(**how)
    reference = gather_decode(q, *given, impl="reference")
    assert_reference(reference, truth)
    got = gather_decode(run.to(q), *run.to(given), impl=run.impl)
    assert_law_5(got, reference, truth)


@pytest.mark.parametrize("per_head", [False, True])
@every_run()
def test_rows_gathered_beforehand_are_the_rows_read(per_head: bool, run: Run) -> None:
    q, k, v = make_qkv(2, 4, 2, 1, 200, 16, dtype=run.dtype)
    hs = 4 if per_head else 2
    index = random_tokens(2, hs, 1, 200, 150, ragged=True)
    of_list = [x.repeat_interleave(hs // 2, 1) for x in (k, v)]
    spread = index.tokens[:, :, 0, :, None].expand(-1, -1, -1, 16)
    rows = tuple(x.gather(2, spread) for x in of_list)
    past = torch.arange(150) >= index.counts[:, :, 0, None]
    beside = TokenIndex(tokens=index.tokens, counts=index.counts, gathered=KV(*rows))
    plain = gather_decode(run.to(q), run.to(KV(k, v)), run.to(index), Softmax(0.25), impl=run.impl)
    nowhere = run.to(torch.full_like(k, torch.nan))
    got = gather_decode(run.to(q), KV(nowhere, nowhere), run.to(beside), Softmax(0.25), impl=run.impl)
    assert torch.equal(got.out, plain.out) and torch.equal(got.lse, plain.lse)
    if run.impl == "triton":  # eager's entries past the count repeat a counted one; the kernel loads none
        for x in rows:
            x[past] = torch.nan
        again = gather_decode(run.to(q), KV(nowhere, nowhere), run.to(beside), Softmax(0.25), impl=run.impl)
        assert torch.equal(again.out, got.out) and torch.equal(again.lse, got.lse)


@every_run()
def test_a_row_that_reads_nothing_is_empty(run: Run) -> None:
    """In one split and in several: nothing of it is loaded, and its neighbour does not notice."""
    for n in (8, 300):
        q, k, v = make_qkv(1, 4, 2, 2, 400, 16, dtype=run.dtype)
        index = random_tokens(1, 2, 2, 400, n, ragged=False)
        counts = torch.tensor([[[n, 0], [0, 3]]], dtype=torch.int32)
        some = TokenIndex(tokens=index.tokens, counts=counts)
        truth = oracle(q, k, v, some.to_mask(2, 400), scale=0.25)
        reference = gather_decode(q, KV(k, v), some, Softmax(0.25), impl="reference")
        got = gather_decode(run.to(q), run.to(KV(k, v)), run.to(some), Softmax(0.25), impl=run.impl)
        assert_law_5(got, reference, truth)
        none = TokenIndex(tokens=index.tokens, counts=torch.zeros_like(counts))
        empty = [torch.full_like(x, torch.nan) for x in (k, v)]
        if run.impl == "triton":
            got = gather_decode(run.to(q), run.to(KV(*empty)), run.to(none), Softmax(0.25), impl=run.impl)
            assert bool((got.lse == -torch.inf).all()) and bool((got.out == 0).all())


@every_run()
def test_strided_views_and_the_same_twice(run: Run) -> None:
    """q and the keys as views of [B, T, H, D], the tokens spread over the heads without a copy."""
    q, k, v = make_qkv(2, 4, 2, 3, 200, 80, dtype=run.dtype)
    index = random_tokens(2, 1, 3, 200, 150, ragged=True)
    plain = TokenIndex(tokens=index.tokens.repeat(1, 2, 1, 1), counts=index.counts.repeat(1, 2, 1))
    spread = TokenIndex(tokens=index.tokens.expand(2, 2, -1, -1), counts=index.counts.expand(2, 2, -1))
    want = gather_decode(run.to(q), run.to(KV(k, v)), run.to(plain), Softmax(0.25), impl=run.impl)
    views = [run.to(x.transpose(1, 2).contiguous()).transpose(1, 2) for x in (q, k, v)]
    assert not any(x.is_contiguous() for x in views)
    got = gather_decode(views[0], KV(*views[1:]), run.to(spread), Softmax(0.25), impl=run.impl)
    again = gather_decode(views[0], KV(*views[1:]), run.to(spread), Softmax(0.25), impl=run.impl)
    assert torch.equal(got.out, again.out) and torch.equal(got.lse, again.lse)
    assert torch.allclose(got.out, want.out, atol=4 * torch.finfo(run.dtype).eps)
    assert torch.allclose(got.lse, want.lse, atol=1e-5)


def test_what_the_kernel_cannot_do_is_said() -> None:
    q, k, v = make_qkv(1, 4, 2, 2, 20, 16, roomy=False)
    index = random_tokens(1, 2, 2, 20, 4, ragged=False)
    with pytest.raises(Unsupported, match="no backward"):
        gather_decode(q.requires_grad_(), KV(k, v), index, Softmax(1.0), impl="triton")
    beside = TokenIndex(tokens=index.tokens, gathered=KV(k[:, :, :4], v[:, :, :4]))
    with pytest.raises(Unsupported, match="those of one query, not of 2"):
        gather_decode(q.detach(), KV(k, v), beside, Softmax(1.0), impl="triton")


def test_gather_decode_refuses_an_index_of_another_shape() -> None:
    q, k, v = make_qkv(1, 4, 2, 2, 20, 8)
    for shape in [(1, 3, 2, 4), (1, 2, 1, 4), (2, 2, 2, 4)]:
        index = TokenIndex(tokens=torch.zeros(shape, dtype=torch.long))
        with pytest.raises(ValueError, match=r"gather_decode takes an index \[B, Hkv or H, Tq, K\]"):
            gather_decode(q, KV(k, v), index, Softmax(1.0))
