"""``gather_decode`` by FlashInfer's batch decode over pages of one key: a rival that ``auto`` takes where
``farspan tune`` found it faster.

Written after flashinfer-python 0.7.4 (``BatchDecodeWithPagedKVCacheWrapper``); it has not run on a GPU yet.
There a request has one query [heads, D] and a list of pages, which all of its KV heads share. Here each list
has KV rows of its own, so each (row, list, query) is a request with one KV head, and a page is one row of the
stored keys, wherever they lie:

    key t of row b and KV head h is page (b * stride[0] + h * stride[1] + t * stride[2]) / D

Where every list has the same number of tokens, one plan serves all calls, and a call does not wait for the
device. Ragged lists are planned in each call, which waits. Its log-sum-exp is in base 2 (flashinfer issue
2113), and it has none for a list without tokens.
"""

from __future__ import annotations

import functools
import importlib
import math
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kv import KV
from ...lists import TokenLists
from ...partial import Partial, empty_partial
from ...softmax import Softmax
from .. import library

_WORKSPACE = 128 << 20  # bytes, what its documentation recommends
_MATRIX_UNITS = 4  # query heads of a list from which its kernels for matrix units are used


def unsupported(q: Tensor, kv: KV, index: TokenLists, softmax: Softmax) -> list[str]:
    """Why FlashInfer cannot run these arguments, one clause each."""
    reasons = library.cannot_call("flashinfer", "flashinfer-python", q)
    stored = kv if index.gathered is None else index.gathered
    if torch.is_grad_enabled() and (q.requires_grad or stored.requires_grad):
        reasons.append("it has no backward and an input needs a gradient")
    d, dv = stored.head_dim, stored.value_dim
    if d != dv or d not in (64, 128, 256):
        reasons.append(f"its keys and values are of one size, 64, 128 or 256; these have {d} and {dv}")
    if stored.format != "plain":
        reasons.append(f"it reads plain keys and values, and these are stored as {stored.format}")
    elif not reasons:
        k, v = stored.stored
        if k.stride() != v.stride() or k.stride(3) != 1 or any(x % d for x in k.stride()[:3]):
            reasons.append(
                "its pages are whole rows, and these keys and values do not lie in such rows alike"
            )
        elif _rows_spanned(k) >= 1 << 31:
            reasons.append("it numbers pages in 32 bits, and these keys span more rows")
    if index.gathered is not None and q.shape[2] != 1:
        reasons.append(f"rows gathered beforehand are those of one query, not of {q.shape[2]}")
    return reasons


class Pages(NamedTuple):
    """What FlashInfer reads of the lists of R requests.

    indptr [R + 1]: where the list of each request begins in ``indices``; on the host where every list has the
    same number of tokens. indices [sum of counts]: pages. last_page_len [R]: 1, or 0 of a list without
    tokens. All are int32.
    """

    indptr: Tensor
    indices: Tensor
    last_page_len: Tensor


def to_pages(index: TokenLists, stored: KV) -> Pages:
    """The lists of ``index`` [B, Hs, Tq, K] as pages of one row of ``stored`` [B, Hkv, T]; requests in the
    order of (row, list, query)."""
    b, hs, tq, n = index.tokens.shape
    tokens = index.tokens
    if index.gathered is not None:
        tokens = torch.arange(n, device=tokens.device).expand(b, hs, tq, n)
    of_row, of_head, of_token = (x // stored.head_dim for x in stored.stored[0].stride()[:3])
    row = torch.arange(b, device=tokens.device)[:, None, None, None]
    head = torch.arange(hs, device=tokens.device)[:, None, None] // (hs // stored.num_kv_heads)
    pages = (row * of_row + head * of_head + tokens * of_token).int()
    if index.counts is None:
        indptr = torch.arange(b * hs * tq + 1, dtype=torch.int32) * n
        return Pages(indptr, pages.flatten(), torch.full((b * hs * tq,), min(n, 1), dtype=torch.int32))
    counts = index.counts.flatten().int()
    indptr = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    used = torch.arange(n, device=tokens.device) < index.counts[..., None]
    return Pages(indptr, pages[used], counts.clamp(max=1))


def gather_decode(q: Tensor, kv: KV, index: TokenLists, softmax: Softmax) -> Partial:
    (b, h, tq, d), (hs, n) = q.shape, (index.tokens.shape[1], index.tokens.shape[3])
    if q.numel() == 0 or n == 0:
        return empty_partial(q, kv.value_dim)
    stored = kv if index.gathered is None else index.gathered
    pages = to_pages(index, stored)
    requests, group = b * hs * tq, h // hs
    plan = _plan(
        q.device, requests, group, d, 1 << (n - 1).bit_length(), q.dtype, float(softmax.scale),
        softmax.softcap or 0.0, threading.get_ident(),
    )  # fmt: skip
    queries = q.reshape(b, hs, group, tq, d).transpose(2, 3).reshape(requests, group, d)
    k, v = (x.as_strided((_rows_spanned(x), 1, 1, d), (d, d, d, 1)) for x in stored.stored)
    out, lse = plan(queries, (k, v), pages, n if index.counts is None else None)
    lse = lse * math.log(2)
    if index.counts is not None:
        none = index.counts.reshape(requests, 1) == 0
        out, lse = out.masked_fill(none[..., None], 0), lse.masked_fill(none, -torch.inf)
    out = out.reshape(b, hs, tq, group, d).transpose(2, 3).reshape(b, h, tq, d)
    return Partial(out, lse.reshape(b, hs, tq, group).transpose(2, 3).reshape(b, h, tq))


def _rows_spanned(x: Tensor) -> int:
    """Number of rows of D numbers from the first to the last one of x [B, Hkv, T, D]."""
    return (
        sum((size - 1) * step for size, step in zip(x.shape[:3], x.stride(), strict=False)) // x.shape[3] + 1
    )


class _Plan:
    """A wrapper of FlashInfer with the buffers that its CUDA-graph form reads, so that pages can change
    without a new plan. A thread has its own, as a call changes it."""

    def __init__(
        self, device: torch.device, requests: int, room: int, heads: int, head_dim: int, **how: Any
    ) -> None:
        wrapper = importlib.import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper

        def buffer(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        self.indices, self.each = buffer(requests * room), -1
        self.sizes, self.how = (heads, 1, head_dim, 1), how
        self.wrapper = wrapper(
            _workspace(device, threading.get_ident()),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=heads >= _MATRIX_UNITS,
            paged_kv_indptr_buffer=buffer(requests + 1),
            paged_kv_indices_buffer=self.indices,
            paged_kv_last_page_len_buffer=buffer(requests),
            backend="fa2",
        )

    def __call__(
        self, q: Tensor, kv: tuple[Tensor, Tensor], pages: Pages, each: int | None
    ) -> tuple[Tensor, Tensor]:
        """(out [R, heads, D], lse [R, heads] in base 2) of q [R, heads, D]. each: the number of tokens of
        every list; None: they differ."""
        if each is not None and each == self.each:
            self.indices[: pages.indices.numel()].copy_(pages.indices)
        else:
            self.wrapper.plan(*pages, *self.sizes, **self.how)
            self.each = -1 if each is None else each
        out, lse = self.wrapper.run(q, kv, return_lse=True)
        return out, lse


@functools.lru_cache(maxsize=8)
def _plan(
    device: torch.device, requests: int, heads: int, head_dim: int, room: int,
    dtype: torch.dtype, scale: float, softcap: float, thread: int,
) -> _Plan:  # fmt: skip
    how = {"q_data_type": dtype, "kv_data_type": dtype, "sm_scale": scale, "logits_soft_cap": softcap}
    return _Plan(device, requests, room, heads, head_dim, **how)


@functools.cache
def _workspace(device: torch.device, thread: int) -> Tensor:
    """Room for the library's partial results, zeros at first."""
    return torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
