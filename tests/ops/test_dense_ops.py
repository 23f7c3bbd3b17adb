"""flash and decode: every implementation against a float64 oracle (law 5), gradients, padding, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from farspan.attention.errors import Unsupported
from farspan.attention.kv import KV
from farspan.attention.ops.decode import decode
from farspan.attention.ops.flash import flash
from farspan.attention.softmax import Softmax

from .tools import (
    Run,
    assert_grads_equal,
    assert_law_5,
    assert_reference,
    brute_mask,
    every_run,
    make_qkv,
    oracle,
)

FLASH = [  # b, h, hkv, tq, tk, d, window, softcap, starts
    (1, 4, 4, 63, 63, 16, None, None, None),
    (1, 8, 2, 500, 500, 64, None, None, None),
    (2, 4, 2, 100, 500, 80, None, None, None),
    (1, 4, 2, 17, 1021, 128, None, None, None),
    (1, 4, 2, 1021, 1021, 16, 100, None, None),
    (2, 4, 1, 300, 500, 64, 63, None, [0, 220]),
    (2, 4, 2, 500, 500, 64, None, None, [0, 437]),
    (3, 4, 2, 63, 500, 16, None, None, [0, 437, 480]),
    (2, 4, 2, 63, 500, 16, 40, 5.0, [10, 499]),
    (1, 4, 2, 500, 500, 64, None, 5.0, None),
    (1, 4, 2, 63, 63, 16, 1, None, None),
    (1, 4, 2, 63, 63, 16, 63, None, None),
]
DECODE = [
    (1, 4, 4, 1, 63, 16, None, None, None),
    (2, 8, 2, 1, 1021, 64, None, None, None),
    (2, 8, 2, 1, 500, 80, None, None, [0, 400]),
    (3, 4, 2, 5, 500, 128, None, None, [0, 13, 494]),
    (1, 4, 2, 16, 1021, 64, None, None, None),
    (1, 4, 2, 5, 500, 16, 63, None, None),
    (2, 4, 2, 1, 500, 16, 63, None, [0, 480]),
    (2, 4, 2, 5, 500, 16, 63, 5.0, [0, 480]),
    (2, 4, 2, 1, 500, 16, None, 5.0, [0, 480]),
    (1, 4, 2, 1, 1, 16, None, None, None),
    (1, 4, 2, 4, 4, 16, None, None, None),
    (1, 12, 2, 37, 300, 16, 20, None, None),  # more rows than one tile holds
]
OPS: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [(flash, c) for c in FLASH]
OPS += [(decode, c) for c in DECODE]


def _name(value: Any) -> str:
    return getattr(value, "__name__", "-".join(map(str, value)) if isinstance(value, tuple) else str(value))


@pytest.mark.parametrize(("op", "case"), OPS, ids=_name)
@every_run()
def test_against_float64(op: Callable[..., Any], case: tuple[Any, ...], run: Run) -> None:
    b, h, hkv, tq, tk, d, window, softcap, starts = case
    q, k, v = make_qkv(b, h, hkv, tq, tk, d, dtype=run.dtype)
    how = {"scale": d**-0.5, "softcap": softcap}
    truth = oracle(q, k, v, brute_mask(tq, tk, starts or [0] * b, window=window), **how)
    given = KV(k, v), Softmax(**how)
    where = {"window": window, "start": None if starts is None else torch.tensor(starts)}
    reference = op(q, *given, impl="reference", **where)
    assert reference.out.dtype == run.dtype
    assert_reference(reference, truth)
    got = op(run.to(q), *run.to(given), impl=run.impl, window=window, start=run.to(where["start"]))
    assert_law_5(got, reference, truth)


@pytest.mark.parametrize(("op", "case"), [o for o in OPS if o[1][-1]], ids=_name)
@pytest.mark.parametrize("impl", ["reference", "eager", "triton"])
def test_padding_is_never_read(op: Callable[..., Any], case: tuple[Any, ...], impl: str) -> None:
    b, h, hkv, tq, tk, d, window, softcap, starts = case
    q, k, v = make_qkv(b, h, hkv, tq, tk, d, starts=starts)
    kv, softmax = KV(k, v), Softmax(d**-0.5, softcap)
    how = {"window": window, "start": torch.tensor(starts)}
    clean = op(q, kv.map(torch.nan_to_num), softmax, impl=impl, **how)
    poisoned = op(q, kv, softmax, impl=impl, **how)
    assert torch.equal(poisoned.out, clean.out)
    assert torch.equal(poisoned.lse, clean.lse)


@pytest.mark.parametrize(("op", "case"), [o for o in OPS if o[1][4] <= 500 and o[1][5] <= 80], ids=_name)
def test_gradients_are_those_of_the_definition(op: Callable[..., Any], case: tuple[Any, ...]) -> None:
    b, h, hkv, tq, tk, d, window, softcap, starts = case
    leaves = [x.double() for x in make_qkv(b, h, hkv, tq, tk, d, roomy=False)]
    how = {"scale": d**-0.5, "softcap": softcap}
    mask = brute_mask(tq, tk, starts or [0] * b, window=window)
    seen = mask.any(-1).expand(b, h, tq)
    weight = torch.randn(b, h, tq, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def grads(run: Callable[..., Any]) -> list[torch.Tensor]:
        leaf = [x.clone().requires_grad_() for x in leaves]
        part = run(*leaf)
        return list(torch.autograd.grad((part.out * weight).sum() + part.lse[seen].cos().sum(), leaf))

    start = None if starts is None else torch.tensor(starts)
    softmax = Softmax(**how)
    got = grads(lambda q, k, v: op(q, KV(k, v), softmax, window=window, start=start, impl="eager"))
    assert_grads_equal(got, grads(lambda q, k, v: oracle(q, k, v, mask, **how)))


@pytest.mark.parametrize("op", [flash, decode])
def test_gradients_in_float32_reach_every_input(op: Callable[..., Any]) -> None:
    """The library kernel's lse has no gradient: used under autograd, dq and dk would be silently wrong."""
    leaves = make_qkv(1, 4, 2, 8, 40, 16, roomy=False)
    mask = brute_mask(8, 40, [0])

    def grads(run: Callable[..., Any], dtype: torch.dtype) -> list[torch.Tensor]:
        leaf = [x.to(dtype).clone().requires_grad_() for x in leaves]
        part = run(*leaf)
        return [g.double() for g in torch.autograd.grad(part.out.square().sum() + part.lse.sin().sum(), leaf)]

    got = grads(lambda q, k, v: op(q, KV(k, v), Softmax(0.25)), torch.float32)
    assert_grads_equal(got, grads(lambda q, k, v: oracle(q, k, v, mask, scale=0.25), torch.float64), 1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rows_that_begin_after_the_last_key_are_empty(softcap: float | None) -> None:
    """A chunk of a left-padded prompt may hold nothing of a short row."""
    q, k, v = make_qkv(2, 4, 2, 32, 32, 16, starts=[0, 32])
    for window in (None, 8):
        truth = oracle(q, k, v, brute_mask(32, 32, [0, 32], window=window), scale=0.25, softcap=softcap)
        got = flash(q, KV(k, v), Softmax(0.25, softcap), start=torch.tensor([0, 32]), window=window)
        assert_reference(got, truth)


def test_a_strided_query_is_served() -> None:
    """Models hand over q as a transposed view [B, T, H, D] -> [B, H, T, D]."""
    q, k, v = make_qkv(2, 4, 2, 63, 63, 16)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    for op in (flash, decode):
        plain, got = (op(x, KV(k, v), Softmax(0.25)) for x in (q, strided))
        assert torch.allclose(got.out, plain.out, atol=1e-6)
        assert torch.allclose(got.lse, plain.lse, atol=1e-6)


@every_run()
def test_decode_of_strided_views_is_the_same_twice(run: Run) -> None:
    """q and the keys as views of [B, T, H, D]; the order of a merge of splits is fixed."""
    plain = [run.to(x) for x in make_qkv(2, 4, 1, 3, 300, 80, dtype=run.dtype, roomy=False)]
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    assert not views[0].is_contiguous()
    start = run.to(torch.tensor([0, 130]))
    want, got, again = (
        decode(x[0], KV(*x[1:]), Softmax(0.25), start=start, impl=run.impl) for x in (plain, views, views)
    )
    assert torch.equal(got.out, again.out) and torch.equal(got.lse, again.lse)
    assert torch.allclose(got.out, want.out, atol=4 * torch.finfo(run.dtype).eps)
    assert torch.allclose(got.lse, want.lse, atol=1e-5)


@every_run()
def test_decode_of_rows_that_have_not_begun_is_empty(run: Run) -> None:
    q, k, v = make_qkv(2, 4, 2, 1, 300, 16, dtype=run.dtype, starts=[300, 7])
    start = run.to(torch.tensor([300, 7]))
    got = decode(run.to(q), run.to(KV(k, v)), Softmax(0.25), start=start, impl=run.impl)
    assert bool((got.out[0] == 0).all()) and bool((got.lse[0] == -torch.inf).all())
    assert bool(got.out[1].isfinite().all()) and bool(got.lse[1].isfinite().all())


def test_more_splits_than_a_row_has_keys() -> None:
    """A padded row of 3 keys leaves most of its splits empty."""
    q, k, v = make_qkv(2, 4, 2, 1, 1021, 16, starts=[0, 1018])
    start = torch.tensor([0, 1018])
    whole = decode(q, KV(k, v), Softmax(0.25), start=start, impl="triton")
    alone = decode(q[1:], KV(k[1:, :, 1018:], v[1:, :, 1018:]), Softmax(0.25), impl="triton")
    assert torch.allclose(whole.out[1:], alone.out, atol=1e-6)
    assert torch.allclose(whole.lse[1:], alone.lse, atol=1e-6)


def test_values_may_be_of_another_width_than_keys() -> None:
    """D 192 and Dv 128, as in multi-head latent attention."""
    q, k, v = make_qkv(1, 4, 2, 1, 150, 192, dtype=torch.float16)
    v = v[..., :128]
    truth = oracle(q, k, v, brute_mask(1, 150, [0]), scale=0.07)
    reference = decode(q, KV(k, v), Softmax(0.07), impl="reference")
    assert_law_5(decode(q, KV(k, v), Softmax(0.07), impl="triton"), reference, truth)


def test_splits_fill_whole_waves_of_the_device() -> None:
    pytest.importorskip("triton")
    from farspan.attention.ops import combine

    assert combine._splits(8, 128, 264) == 32  # 256 of 264 places at once
    assert combine._splits(64, 128, 264) == 4
    assert combine._splits(8, 4, 264) == 4  # no shorter than is worth a program
    assert combine._splits(10_000, 128, 264) == 1
    assert combine._splits(150, 128, 264) == 7  # 1050 of 1056; one split would leave 114 places empty


@pytest.mark.parametrize("op", [flash, decode])
def test_bad_shapes_are_refused_in_a_sentence(op: Callable[..., Any]) -> None:
    q, k, v = make_qkv(2, 4, 2, 5, 9, 8, roomy=False)
    name = op.__name__
    for (query, *kv), message in [
        ((q[0], k, v), rf"{name} takes q \[B, H, Tq, D\].*got 3-D"),
        ((q, k, v[:, :, :5]), f"{name} got q .* do not fit together"),
        ((q[:1], k, v), "do not fit together"),
        ((q[..., :4], k, v), "do not fit together"),
        ((q[:, :3], k, v), "whole number of query heads per KV head; got 3 and 2"),
        ((q, k[:, :, :3], v[:, :, :3]), "queries among the keys; got Tq = 5 > Tk = 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            op(query, KV(*kv), Softmax(1.0))
    with pytest.raises(ValueError, match=r"start \[B\] = \[2\].*got \[1\]"):
        op(q, KV(k, v), Softmax(1.0), start=torch.tensor([0]))
    with pytest.raises(
        Unsupported, match="no implementation 'nonsense': it has eager, reference, triton and auto"
    ):
        op(q, KV(k, v), Softmax(1.0), impl="nonsense")
    with pytest.raises(TypeError, match=r"as one KV\(k, v\); got a Tensor"):
        op(q, k, Softmax(1.0))


@pytest.mark.parametrize("op", [flash, decode])
def test_an_empty_window_is_refused(op: Callable[..., Any]) -> None:
    q, k, v = make_qkv(1, 4, 2, 5, 9, 8, roomy=False)
    with pytest.raises(ValueError, match="window of at least 1"):
        op(q, KV(k, v), Softmax(1.0), window=0)


@pytest.mark.parametrize("op", [flash, decode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_may_be_narrower_than_keys(op: Callable[..., Any], dtype: torch.dtype) -> None:
    q, k, v = make_qkv(1, 4, 2, 5, 63, 32, dtype=dtype)
    v = v[..., :16]
    truth = oracle(q, k, v, brute_mask(5, 63, [0]), scale=0.2)
    got, reference = (op(q, KV(k, v), Softmax(0.2), impl=impl) for impl in ("eager", "reference"))
    assert_law_5(got, reference, truth)
