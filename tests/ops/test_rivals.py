"""Implementations that are other packages' kernels: their lists against brute force, and the calls themselves
with a stand-in that has the package's signature and computes by brute force from the lists that it gets."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from farspan.attention.errors import Unsupported
from farspan.attention.kv import KV
from farspan.attention.ops import library
from farspan.attention.ops.block_sparse import block_sparse, flash4, flex, flex_flash
from farspan.attention.ops.dispatch import implementations
from farspan.attention.ops.gather_decode import flashinfer, gather_decode
from farspan.attention.partial import Partial
from farspan.attention.selection import BlockIndex, TokenIndex
from farspan.attention.softmax import Softmax

from .test_block_sparse import random_blocks
from .test_gather_decode import random_tokens
from .tools import Run, make_qkv, oracle

HALF = torch.float16
CLOSE = 4e-3  # of float16 results of standard normal inputs


def module(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> ModuleType:
    """An importable module that holds ``names``."""
    made = ModuleType(name)
    made.__dict__.update(names, __spec__=ModuleSpec(name, None), __path__=[])
    monkeypatch.setitem(sys.modules, name, made)
    return made


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors are taken for those of a Hopper GPU."""
    monkeypatch.setattr(library, "capability", lambda device: 9)


def agree(got: Partial, truth: Partial) -> None:
    none = truth.lse == -torch.inf
    assert torch.equal(got.lse == -torch.inf, none) and bool((got.out[none] == 0).all())
    assert (got.out.double() - truth.out).abs().max() < CLOSE
    assert (got.lse.double() - truth.lse)[~none].abs().max() < CLOSE


# FlashAttention-4

LISTS = [  # b, hs, tq, tk, block_q, block_k, m
    (2, 2, 300, 500, 64, 64, 5),
    (1, 1, 200, 200, 64, 16, 9),
    (1, 2, 130, 130, 128, 128, 2),
    (1, 1, 70, 90, 32, 64, 4),
]


@pytest.mark.parametrize("case", LISTS, ids=str)
def test_partial_and_full_blocks_read_what_the_index_reads(case: tuple[int, ...]) -> None:
    """Of every pair: a full block needs no mask, a partial one the causal mask, together they are
    ``to_mask``."""
    b, hs, tq, tk, block_q, block_k, m = case
    index = random_blocks(b, hs, tq, tk, block_q, block_k, m, empty=True)
    partial, full = index.partial_and_full(tq, tk)
    seen = torch.zeros(b, hs, tq, tk, dtype=torch.bool)
    causal = torch.arange(tk) <= torch.arange(tk - tq, tk)[:, None]
    for (counts, blocks), whole in ((partial, False), (full, True)):
        assert counts.dtype == blocks.dtype == torch.int32 and blocks.shape[3] <= -(-tk // block_k)
        for i, j, n in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
            named = blocks[i, j, n, : int(counts[i, j, n])].tolist()
            assert named == sorted(set(named))
            for block in named:
                cut = slice(n * block_q, (n + 1) * block_q), slice(block * block_k, (block + 1) * block_k)
                assert not bool(seen[i, j][cut].any()), "a block is visited once"
                inside = (block + 1) * block_k <= tk
                assert whole == (inside and bool(causal[cut].all())), "full where every query sees every key"
                seen[i, j][cut] = True if whole else causal[cut]
    assert torch.equal(seen, index.to_mask(tq, tk))


class FakeLists(NamedTuple):
    """The fields of flash_attn.cute.block_sparsity.BlockSparseTensorsTorch (flash-attn-4 4.0.0b36)."""

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_block_idx_offsets: Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: Tensor | None = None
    dq_write_order_full: Tensor | None = None
    spt: bool | None = None


def fake_flash_attn_func(  # its parameters are those of 4.0.0b36
    q: Tensor, k: Tensor, v: Tensor, qv: None = None, gather_kv_indices: None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[None, None] = (None, None),
    learnable_sink: None = None, softcap: float = 0.0, num_splits: int = 1, pack_gqa: bool | None = None,
    deterministic: bool = False, score_mod: Any = None, score_mod_bwd: Any = None, mask_mod: Any = None,
    aux_tensors: None = None, aux_scalars: None = None, block_sparse_tensors: FakeLists | None = None,
    block_sparse_tensors_bwd: None = None, return_lse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [B, Tq, H, D], k, v [B, Tk, Hkv, D] -> out as q, natural lse [B, H, Tq]."""
    assert block_sparse_tensors is not None and not causal and return_lse
    (b, tq, h, _), tk = q.shape, k.shape[1]
    lists, (block_q, block_k) = block_sparse_tensors, block_sparse_tensors.block_size
    lengths = SimpleNamespace(seqlen_q=tq, seqlen_k=tk)
    visible = mask_mod(0, 0, torch.arange(tq)[:, None], torch.arange(tk), lengths, None)
    mask = torch.zeros(b, h, tq, tk, dtype=torch.bool)
    assert lists.mask_block_cnt.shape[0] == b and lists.mask_block_cnt.shape[1] in (1, h)
    assert lists.mask_block_cnt.shape[2] == -(-tq // block_q)
    assert lists.mask_block_idx.shape[3] <= -(-tk // block_k)
    pairs = (lists.mask_block_cnt, lists.mask_block_idx), (lists.full_block_cnt, lists.full_block_idx)
    for (counts, blocks), whole in zip(pairs, (False, True), strict=True):
        for i, j, n in torch.cartesian_prod(*map(torch.arange, counts.shape)).reshape(-1, 3).tolist():
            heads = slice(None) if counts.shape[1] == 1 else slice(j, j + 1)
            for block in blocks[i, j, n, : int(counts[i, j, n])].tolist():
                rows, cols = (
                    slice(n * block_q, (n + 1) * block_q),
                    slice(block * block_k, (block + 1) * block_k),
                )
                mask[i, heads, rows, cols] = True if whole else visible[rows, cols]
    part = oracle(*(x.transpose(1, 2) for x in (q, k, v)), mask, scale=softmax_scale, softcap=softcap or None)
    return part.out.transpose(1, 2).to(q.dtype), part.lse.float()


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch, hopper: None) -> Iterator[None]:
    flash4._causal.cache_clear()
    cutlass = module(monkeypatch, "cutlass", Int32=int)
    cutlass.cute = module(monkeypatch, "cutlass.cute", jit=lambda function: function)
    utils = module(monkeypatch, "flash_attn.cute.utils", scalar_to_ssa=lambda x, kind: kind(x))
    module(monkeypatch, "flash_attn")
    module(monkeypatch, "flash_attn.cute", flash_attn_func=fake_flash_attn_func, utils=utils)
    module(monkeypatch, "flash_attn.cute.block_sparsity", BlockSparseTensorsTorch=FakeLists)
    yield
    flash4._causal.cache_clear()


@pytest.mark.parametrize(
    ("b", "h", "hkv", "hs", "tq", "tk", "softcap"),
    [
        (2, 4, 2, 2, 200, 300, None),  # the heads of a group share a list: KV heads are rows
        (2, 4, 2, 4, 130, 130, 5.0),
        (1, 2, 2, 2, 70, 70, None),
    ],
)
def test_flash4_is_called_as_the_library_takes_it(
    b: int, h: int, hkv: int, hs: int, tq: int, tk: int, softcap: float | None, flash_attn: None
) -> None:
    q, k, v = make_qkv(b, h, hkv, tq, tk, 16, dtype=HALF, roomy=False)
    index = random_blocks(b, hs, tq, tk, 64, 32, 4, empty=True)
    truth = oracle(q, k, v, index.to_mask(tq, tk), scale=0.25, softcap=softcap)
    with implementations() as ran:
        agree(block_sparse(q, KV(k, v), index, Softmax(0.25, softcap), impl="flash4"), truth)
    assert ran == {("block_sparse", "flash4")}


def test_what_flash4_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch, flash_attn: None) -> None:
    def reasons(major: int = 9, d: int = 128, blocks: tuple[int, int] = (128, 128), **how: Any) -> str:
        monkeypatch.setattr(library, "capability", lambda device: major)
        q, k, v = make_qkv(1, 4, 2, 256, 256, d, dtype=how.pop("dtype", HALF), roomy=False)
        index = random_blocks(1, 2, 256, 256, *blocks, 1, **how)
        return "; ".join(flash4.unsupported(q, KV(k, v), index, Softmax(1.0)))

    assert reasons() == reasons(10, blocks=(256, 128)) == reasons(d=256, blocks=(64, 80)) == ""
    assert reasons(d=256) == "key blocks are a multiple of 16 up to 80 for these heads; these have 128"
    assert reasons(blocks=(32, 64)) == "query blocks are multiples of 64; these have 32"
    assert "query blocks are multiples of 256 and key blocks of 128" in reasons(10)
    assert "192 and 128, or 256; these have 160 and 160" in reasons(10, d=160, blocks=(256, 128))
    assert reasons(8).startswith("its kernels are made for compute capability 9.x and 10.x and 11.x")
    assert reasons(dtype=torch.float32) == "torch.float32 is neither float16 nor bfloat16"
    assert reasons(starts=[5]).startswith("its rows are padded by different lengths")
    assert reasons(order=True) == "it reorders the keys"


def test_without_the_library_and_a_gpu_that_is_said() -> None:
    q, k, v = make_qkv(1, 2, 2, 128, 128, 64, dtype=HALF, roomy=False)
    index = random_blocks(1, 2, 128, 128, 128, 128, 1)
    for impl in ("flash4", "flex_flash"):
        with pytest.raises(Unsupported, match="the tensors are on cpu") as refused:
            block_sparse(q, KV(k, v), index, Softmax(1.0), impl=impl)
        if not library.is_installed("flash_attn.cute"):
            assert 'flash-attn-4 is not installed: "pip install flash-attn-4"' in refused.value.reasons
    with pytest.raises(Unsupported, match="the tensors are on cpu"):
        tokens = random_tokens(1, 2, 1, 128, 4, ragged=False)
        gather_decode(q[:, :, :1], KV(k, v), tokens, Softmax(1.0), impl="flashinfer")


def test_flex_flash_asks_for_the_backend_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, flash_attn: None
) -> None:
    index = random_blocks(1, 2, 200, 200, 64, 64, 2)
    q, k, v = make_qkv(1, 4, 2, 200, 200, 64, dtype=HALF, roomy=False)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(flex, "attend", lambda q, kv, index, softmax, options: asked.update(options))
    block_sparse(q, KV(k, v), index, Softmax(1.0), impl="flex_flash")
    assert asked == {"BACKEND": "FLASH"}
    assert flex_flash.unsupported(q, KV(k, v), index, Softmax(1.0)) == []
    [reason] = flex_flash.unsupported(q[:, :, 72:], KV(k, v), index, Softmax(1.0))
    assert reason == "it has no mask for keys before the queries, and there are 72"


def test_torch_knows_the_backend() -> None:
    from torch.nn.attention.flex_attention import FlexKernelOptions

    assert "BACKEND" in FlexKernelOptions.__annotations__


# FlashInfer


def pages_read(pages: flashinfer.Pages, stored: KV, b: int, hs: int, tq: int) -> Tensor:
    """[B, Hs, Tq, T] bool: which positions of its KV head each request's pages hold, by their place in
    memory."""
    k = stored.stored[0]
    mask = torch.zeros(b * hs * tq, k.shape[2], dtype=torch.bool)
    of_place = {
        k[i, j, t].data_ptr(): (i, j, t)
        for i, j, t in torch.cartesian_prod(*map(torch.arange, k.shape[:3])).tolist()
    }
    row_bytes = k.shape[3] * k.element_size()
    for request in range(b * hs * tq):
        i, list_ = request // (hs * tq), request // tq % hs
        begin, end = pages.indptr[request : request + 2].tolist()
        assert int(pages.last_page_len[request]) == min(1, end - begin)
        for page in pages.indices[begin:end].tolist():
            row, head, token = of_place[k.data_ptr() + page * row_bytes]
            assert (row, head) == (i, list_ // (hs // k.shape[1])) and not bool(mask[request, token])
            mask[request, token] = True
    return mask.view(b, hs, tq, -1)


@pytest.mark.parametrize("layout", ["room", "tokens first"])
@pytest.mark.parametrize(("hs", "tq", "ragged"), [(2, 1, False), (4, 3, True), (2, 2, True)])
def test_pages_are_the_rows_of_the_lists(hs: int, tq: int, ragged: bool, layout: str) -> None:
    _, k, v = make_qkv(2, 4, 2, tq, 40, 8)
    if layout == "tokens first":
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    index = random_tokens(2, hs, tq, 40, 7, ragged=ragged)
    if ragged:
        index.counts[0, 1, 0] = 0
    pages = flashinfer.to_pages(index, KV(k, v))
    assert {x.dtype for x in pages} == {torch.int32}
    assert torch.equal(pages_read(pages, KV(k, v), 2, hs, tq), index.to_mask(tq, 40))


class FakeWrapper:
    """BatchDecodeWithPagedKVCacheWrapper of flashinfer-python 0.7.4, as far as it is used, by brute force."""

    planned = 0

    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
        use_tensor_cores: bool = False, paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None, paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto", jit_args: None = None, jit_kwargs: None = None,
    ) -> None:  # fmt: skip
        assert kv_layout == "NHD" and use_cuda_graph and float_workspace_buffer.dtype == torch.uint8
        self.indptr, self.indices = paged_kv_indptr_buffer, paged_kv_indices_buffer
        self.last = paged_kv_last_page_len_buffer

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int,
        head_dim: int, page_size: int, *, pos_encoding_mode: str = "NONE", window_left: int = -1,
        logits_soft_cap: float | None = None, q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None, sm_scale: float | None = None,
    ) -> None:  # fmt: skip
        assert num_kv_heads == page_size == 1 and q_data_type == kv_data_type == HALF
        assert len(indices) <= len(self.indices) and len(self.last) == len(last_page_len)
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        self.indptr.copy_(indptr)
        self.indices[: len(indices)].copy_(indices)
        self.last.copy_(last_page_len)
        self.how = {"scale": sm_scale, "softcap": logits_soft_cap or None}
        self.shape = num_qo_heads, head_dim
        FakeWrapper.planned += 1

    def run(
        self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, return_lse: bool = False
    ) -> tuple[Tensor, Tensor]:
        assert q.shape == (len(self.last), *self.shape) and return_lse
        out, lse = torch.full_like(q, 3.0), torch.full(q.shape[:2], -5e4)  # what a list without pages leaves
        bounds = self.indptr.tolist()
        for request, (begin, end) in enumerate(itertools.pairwise(bounds)):
            if length := max(0, end - begin - 1) + int(self.last[request]):
                k, v = (x[self.indices[begin : begin + length].long(), 0, 0] for x in paged_kv_cache)
                every = torch.ones(1, 1, 1, length, dtype=torch.bool)
                part = oracle(q[request][None, :, None], k[None, None], v[None, None], every, **self.how)
                out[request], lse[request] = part.out[0, :, 0].to(HALF), part.lse[0, :, 0] / math.log(2)
        return out, lse


@pytest.fixture
def flash_infer(monkeypatch: pytest.MonkeyPatch, hopper: None) -> Iterator[None]:
    module(monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=FakeWrapper)
    monkeypatch.setattr(flashinfer, "_WORKSPACE", 16)
    caches = flashinfer._plan, flashinfer._workspace
    FakeWrapper.planned = 0
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize(
    ("h", "hkv", "hs", "tq", "ragged", "softcap"),
    [(8, 2, 2, 1, False, None), (4, 2, 4, 3, True, 5.0), (2, 2, 2, 2, True, None)],
)
def test_flashinfer_is_called_as_the_library_takes_it(
    h: int, hkv: int, hs: int, tq: int, ragged: bool, softcap: float | None, flash_infer: None
) -> None:
    q, k, v = make_qkv(2, h, hkv, tq, 60, 64, dtype=HALF)
    for seed, planned in ((0, 1), (1, 2 if ragged else 1)):  # lists of one length need one plan
        index = random_tokens(2, hs, tq, 60, 9, ragged=ragged, seed=seed)
        if ragged:
            index.counts[1, 0, 0] = 0
        truth = oracle(q, k, v, index.to_mask(tq, 60), scale=0.2, softcap=softcap)
        agree(gather_decode(q, KV(k, v), index, Softmax(0.2, softcap), impl="flashinfer"), truth)
        assert FakeWrapper.planned == planned


def test_flashinfer_reads_rows_gathered_beforehand(flash_infer: None) -> None:
    q, k, v = make_qkv(2, 4, 2, 1, 60, 64, dtype=HALF, roomy=False)
    index = random_tokens(2, 2, 1, 60, 9, ragged=True)
    truth = oracle(q, k, v, index.to_mask(1, 60), scale=0.2)
    spread = index.tokens[:, :, 0, :, None].expand(-1, -1, -1, 64)
    rows = KV(*(x.gather(2, spread) for x in (k, v)))
    beside = TokenIndex(tokens=index.tokens, counts=index.counts, gathered=rows)
    nowhere = torch.full_like(k, torch.nan)
    agree(gather_decode(q, KV(nowhere, nowhere), beside, Softmax(0.2), impl="flashinfer"), truth)


def test_what_flashinfer_cannot_do_is_said(flash_infer: None) -> None:
    def reasons(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
        index = random_tokens(1, 2, 1, 30, 4, ragged=False)
        return flashinfer.unsupported(q, KV(k, v), index, Softmax(1.0))

    q, k, v = make_qkv(1, 4, 2, 1, 30, 64, dtype=HALF, roomy=False)
    assert reasons(q, k, v) == []
    assert reasons(q, k, v.transpose(1, 2).contiguous().transpose(1, 2)) == [
        "its pages are whole rows, and these keys and values do not lie in such rows alike"
    ]
    q, k, v = make_qkv(1, 4, 2, 1, 30, 80, roomy=False)
    assert reasons(q, k, v) == [
        "torch.float32 is neither float16 nor bfloat16",
        "its keys and values are of one size, 64, 128 or 256; these have 80 and 80",
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["flash4", "flex_flash", "flashinfer"])
@pytest.mark.parametrize("per_head", [False, True])
def test_the_libraries_themselves(impl: str, per_head: bool) -> None:
    """Where they are installed and the GPU is one of theirs."""
    h, hkv, d, on = 8, 2, 128, "cuda"
    hs = h if per_head else hkv
    tq, tk = (1, 4096) if impl == "flashinfer" else (1000, 1000)
    q, k, v = make_qkv(2, h, hkv, tq, tk, d, dtype=HALF, roomy=False)
    index: Any = random_blocks(2, hs, tq, tk, 256, 128, 5, empty=True)
    if impl == "flashinfer":
        index = random_tokens(2, hs, tq, tk, 500, ragged=True)
    truth = oracle(q, k, v, index.to_mask(tq, tk), scale=d**-0.5)
    run: Any = gather_decode if impl == "flashinfer" else block_sparse
    moved = Run(impl, on, HALF).to(index)
    try:
        got = run(q.to(on), KV(k.to(on), v.to(on)), moved, Softmax(d**-0.5), impl=impl)
    except Unsupported as refusal:
        pytest.skip(str(refusal))
    agree(Partial(got.out.cpu(), got.lse.cpu()), truth)


def test_an_index_of_blocks_counts_only_its_own_query_blocks() -> None:
    """An index may have room for more query blocks than the call has."""
    index = random_blocks(1, 1, 200, 200, 64, 64, 2)
    few = BlockIndex(blocks=index.blocks, counts=index.counts, block_q=64, block_k=64)
    (counts, _), (_, blocks) = few.partial_and_full(100, 200)
    assert counts.shape[2] == blocks.shape[2] == 2
