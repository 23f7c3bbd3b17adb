"""gather_decode against a float64 oracle (law 5), poison."""

from __future__ import annotations

import pytest
import torch

from farspan.attention.index import TokenIndex
from farspan.attention.ops.gather_decode import gather_decode

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
    reference = gather_decode(q, k, v, index, impl="reference", **how)
    assert_reference(reference, truth)
    got = gather_decode(*run.to((q, k, v)), run.to(index), impl=run.impl, **how)
    assert_law_5(got, reference, truth)


def test_gather_decode_with_gathered_rows_and_empty_rows() -> None:
    q, k, v = make_qkv(1, 4, 2, 1, 63, 16)
    index = random_tokens(1, 2, 1, 63, 8, ragged=False)
    plain = gather_decode(q, k, v, index, scale=0.25)
    spread = index.tokens[:, :, 0, :, None].expand(-1, -1, -1, 16)
    beside = TokenIndex(tokens=index.tokens, gathered=(k.gather(2, spread), v.gather(2, spread)))
    got = gather_decode(q, torch.full_like(k, torch.nan), torch.full_like(v, torch.nan), beside, scale=0.25)
    assert torch.equal(got.out, plain.out)
    counts = torch.tensor([[[8], [0]]], dtype=torch.int32)
    none = gather_decode(q, k, v, TokenIndex(tokens=index.tokens, counts=counts), scale=0.25)
    assert bool((none.lse[:, 2:] == -torch.inf).all()) and bool((none.out[:, 2:] == 0).all())
    assert torch.allclose(none.out[:, :2], plain.out[:, :2], atol=1e-6)


def test_gather_decode_refuses_an_index_of_another_shape() -> None:
    q, k, v = make_qkv(1, 4, 2, 2, 20, 8)
    for shape in [(1, 3, 2, 4), (1, 2, 1, 4), (2, 2, 2, 4)]:
        index = TokenIndex(tokens=torch.zeros(shape, dtype=torch.long))
        with pytest.raises(ValueError, match=r"gather_decode takes an index \[B, Hkv or H, Tq, K\]"):
            gather_decode(q, k, v, index, scale=1.0)
