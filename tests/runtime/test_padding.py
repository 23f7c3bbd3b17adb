"""Left padding where it is hard: rows that begin late, in chunks, in short calls, or under another mask."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import farspan
from farspan.runtime.chunking import Chunking
from farspan.runtime.rows import Run, served
from farspan.runtime.store.store import KVStore

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama(initializer_range=0.15).double()


def padded(*lengths: int, width: int | None = None) -> dict[str, torch.Tensor]:
    """Rows of these lengths, padded on the left to the longest, or to ``width``."""
    width = width or max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        ids[row, width - n :] = torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(row))
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def answers(model: Any, prompts: dict[str, torch.Tensor], **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, logits) of six greedy steps."""
    made = model.generate(
        **prompts, max_new_tokens=6, output_logits=True, return_dict_in_generate=True, **GREEDY, **how
    )
    return made.sequences[:, -6:], torch.stack(made.logits, 1)


# --- chunks (f04) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [100, 190])
@pytest.mark.parametrize("chunk", [24, 48])
@pytest.mark.parametrize("spec", ["h2o:k=16", "snapkv:k=40,window=30", "recycled:k=16,stride=4"])
def test_chunks_change_nothing_of_what_decode_remembers(
    model: Any, spec: str, chunk: int, width: int
) -> None:
    """f04: a row that has not begun must not cost the others their state. With ``width``, no row has begun in
    the first chunks."""
    prompts = padded(100, 23, 61, width=width)
    with farspan.patch(model, spec):
        tokens, logits = answers(model, prompts)
    with farspan.patch(model, spec, prefill_chunk=chunk):
        got = answers(model, prompts)
    assert torch.equal(got[0], tokens)
    assert (got[1] - logits).abs().max() < 1e-5


def test_chunks_keep_summaries(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """f04: pages are not made anew at every chunk."""
    dropped: list[int] = []
    monkeypatch.setattr(KVStore, "_drop_summaries", lambda store: dropped.append(store.total))
    with farspan.patch(model, "quest:k=16,page=4,dense_layers=0", prefill_chunk=24):
        answers(model, padded(100, 23, 61))
    assert not dropped


def test_a_row_begins_once() -> None:
    """f04: only rows whose settled start changes lose their state."""
    store = KVStore()
    keys = torch.zeros(3, 1, 10, 4)

    def grow(starts: list[int] | None) -> list[list[int]]:
        """Ten more positions under a mask. -> by group of rows, which rows keep their state from before."""
        store.append(keys, keys)
        store.align(starts, store.total)
        kept = []
        for rows in store.states.groups(3):
            state = store.states.of("method", slice(rows.start, rows.stop), store.total - 10, store.total)
            kept.append(state["rows"].tolist() if state else [])
            state["rows"] = torch.arange(rows.start, rows.stop)
        return kept

    assert grow([0, 10, 4]) == [[]]
    assert grow([0, 20, 4]) == [[0, 1, 2]], "the row in the middle has not begun"
    assert grow([0, 23, 4]) == [[0, 1, 2]], "it begins, where no mask has said anything yet"
    assert grow([0, 23, 5]) == [[0, 1], []], "another mask for the last row"
    store.crop(15)
    assert grow([0, 29, 5]) == [[]], "a crop drops every state"
    assert grow([0, 29, 5]) == [[0, 1, 2]]
    store.crop(25)
    assert grow([0, 25, 5]) == [[]], (
        "the row in the middle is taken back to before its start, and begins anew"
    )
    assert grow([0, 25, 5]) == [[0, 1, 2]]
    assert grow(None) == [[0], [], []]


def test_state_follows_the_rows_in_groups() -> None:
    """Reordered, selected and repeated rows take their state along, whatever groups they were in."""
    store = KVStore()
    store.append(torch.zeros(4, 1, 3, 2), torch.zeros(4, 1, 3, 2))
    store.states.groups(4)
    for rows, width in ((slice(0, 1), 1), (slice(1, 4), 2)):
        state = store.states.of("method", rows, 0, 3)
        state["of"] = torch.arange(rows.start, rows.stop)[:, None].expand(-1, width)
    for change, want in (
        (lambda: store.reorder(torch.tensor([2, 0, 0, 3])), [[2], [0, 0], [3]]),
        (lambda: store.repeat(2), [[2, 2], [0, 0, 0, 0], [3, 3]]),
        (lambda: store.select(torch.tensor([7, 6, 0, 2])), [[3, 3], [2], [0]]),
    ):
        change()
        groups = store.states.groups(store.buffers.batch)
        got = [store.states.of("method", slice(rows.start, rows.stop), 3, 3)["of"] for rows in groups]
        assert [x[:, 0].tolist() for x in got] == want


# --- summaries of blocks of one key (f02) ------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "quest:k=12,page=1,dense_layers=0",
        "quest:k=12,page=1,dense_layers=0,gqa_reduce=none",
        "block_topk:k=8,block=1",
        "dhsa:fraction=0.25,block_q=8,block_k=1,local=3",
        "sale:threshold=2,block_q=8,block_k=1,local=8,dense_below=0",
    ],
)
def test_blocks_of_one_key_count_from_the_row_s_start(model: Any, spec: str) -> None:
    """f02: ``page=1`` and ``block=1`` are blocks like any others under left padding."""
    lengths = (60, 41, 7)
    prompts = padded(*lengths)
    with farspan.patch(model, spec):
        tokens, logits = answers(model, prompts)
        for row, n in enumerate(lengths):
            got = answers(model, {name: x[row : row + 1, 60 - n :] for name, x in prompts.items()})
            assert torch.equal(got[0][0], tokens[row])
            assert (got[1][0] - logits[row]).abs().max() < 1e-5


# --- rows in phases of their own (f03) ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 24])
@pytest.mark.parametrize(
    "spec",
    [
        "dense",
        "window:w=12",
        "quest:k=16,page=4,dense_layers=0",
        "recycled:k=16,stride=4",
        "snapkv:k=24,window=8",
        "h2o:k=16",
    ],
)
def test_rows_that_begin_in_a_short_call(model: Any, spec: str, size: int) -> None:
    """f03: ``prefill_chunk_size`` makes calls of at most 16 tokens, in some of which rows have no token."""
    lengths = (40, 5, 16, 17, 1)
    prompts = padded(*lengths)
    with farspan.patch(model, spec):
        tokens, logits = answers(model, prompts, prefill_chunk_size=size)
        for row, n in enumerate(lengths):
            alone = {name: x[row : row + 1, 40 - n :] for name, x in prompts.items()}
            if (40 - n) % size == 0:  # generate cuts the row alone where it cuts the batch
                got = answers(model, alone, prefill_chunk_size=size)
            elif 40 - n > 39 // size * size:  # it lies in the last piece
                got = answers(model, alone)
            else:
                continue
            assert torch.equal(got[0][0], tokens[row])
            assert (got[1][0] - logits[row]).abs().max() < 1e-5


@pytest.mark.parametrize("decode", ["quest:k=1000", "recycled:k=1000", "snapkv:k=1000", "h2o:k=1000"])
def test_short_pieces_at_full_budget_are_dense(model: Any, decode: str) -> None:
    """f03, law 1."""
    prompts = padded(40, 5, 16, 17, 1)
    with farspan.patch(model, "dense"):
        tokens, logits = answers(model, prompts)
    with farspan.patch(model, decode):
        got = answers(model, prompts, prefill_chunk_size=8)
    assert torch.equal(got[0], tokens)
    assert (got[1] - logits).abs().max() < 1e-5


def test_which_rows_are_served_together() -> None:
    how: dict[str, Any] = {"crossover": {}, "groups": [range(4)]}
    long = served([0, 7, 40, 45], 4, 30, 50, short=False, **how)
    assert long.runs == [Run(slice(0, 4), "prefill", False)] and long.ended == [slice(0, 4)]
    late = served([0, 7, 40, 50], 4, 30, 50, short=False, **how)
    assert late.runs == [Run(slice(0, 3), "prefill", False)] and late.ended == [slice(0, 4)]
    short = served([0, 7, 50, 42], 4, 42, 50, short=True, **how)
    assert short.runs == [Run(slice(0, 2), "decode", False), Run(slice(3, 4), "prefill", False)]
    assert short.ended == [slice(3, 4)]
    assert served([50] * 4, 4, 42, 50, short=False, **how) == ([], [])
    apart = served(None, 4, 49, 50, short=True, crossover={}, groups=[range(1), range(1, 4)])
    assert [run.rows for run in apart.runs] == [slice(0, 1), slice(1, 4)] and not apart.ended
    crossed = served([0, 7, 30, 0], 4, 49, 50, short=True, crossover={"decode": 44}, groups=[range(4)])
    assert [run.below for run in crossed.runs] == [False, True, False]


def test_what_short_calls_read_is_counted(model: Any) -> None:
    """A row that begins in a short call is in its prefill; a row without a token is nowhere."""
    prompts = padded(30, 5, width=30)
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    positions, cache = (mask.cumsum(1) - 1).clamp(min=0), DynamicCache(config=model.config)
    with farspan.patch(model, "dense") as patched, torch.no_grad():
        for a, b in ((0, 20), (20, 24), (24, 30)):
            model(ids[:, a:b], mask[:, :b], positions[:, a:b], cache)
        layer = patched.report().layers[0].phases
    assert layer["prefill"].causal_pairs == 8 * (20 * 21 + 5 * 6) // 2
    assert layer["decode"].causal_pairs == 8 * (30 * 31 - 20 * 21) // 2
    assert (layer["prefill"].queries, layer["decode"].queries) == (20 + 6, 4 + 6)


# --- where a prompt is cut (f05) ---------------------------------------------------------------------------


@pytest.mark.parametrize("block_multiple", [1, 8, 24])
@pytest.mark.parametrize("by_prompt", [False, True])
def test_no_cut_falls_inside_a_block_of_a_row(block_multiple: int, by_prompt: bool) -> None:
    """f05: by brute force, over random batches."""
    draw = random.Random(block_multiple)
    for _ in range(500):
        tokens, length = block_multiple * draw.randint(-(-17 // block_multiple), 30), draw.randint(40, 300)
        chunking = Chunking(tokens=tokens, block_multiple=block_multiple, by_prompt=by_prompt)
        unit = draw.choice([1, block_multiple, tokens])
        begins = [draw.randrange(length + 40) // unit * unit for _ in range(draw.randint(1, 4))]
        if chunking.fits(length):
            continue
        cuts = chunking.cuts(begins, length)
        begins = [begin for begin in begins if begin < length] or [0]
        alone = {begin: list(range(begin + tokens, length - 16, tokens)) for begin in begins}
        pieces = [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
        assert all(piece > 16 for piece in pieces[1:]), "a piece would be a decode step"
        assert max(pieces[:-1], default=0) <= tokens
        for begin in begins:
            assert all((cut - begin) % block_multiple == 0 for cut in cuts if cut > begin)
            if by_prompt and cuts:
                assert [cut for cut in cuts if cut > begin] == alone[begin]
        if all((begin - begins[0]) % (tokens if by_prompt else block_multiple) == 0 for begin in begins):
            assert chunking.fits(pieces[-1]), "rows fit each other"
            assert set(alone[min(begins)]) <= set(cuts)


def test_a_batch_that_cannot_be_cut_is_told_once(model: Any) -> None:
    """f05: a batch is cut as far as its rows fit each other; the rest is one call, and a warning says so."""
    calls: list[int] = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda _, args, out: calls.append(out.shape[1]))

    def pieces(*lengths: int) -> list[int]:
        calls.clear()
        model(**padded(*lengths), logits_to_keep=1)
        return list(calls)

    sentence = (
        "prefill_chunk=32 is exceeded in this left-padded batch: 62 tokens run in one call, because cuts "
        "must lie at multiples of 8 tokens in every row"
    )
    with farspan.patch(model, "block_topk:k=24,block=8", prefill_chunk=30) as patched, torch.no_grad():
        with pytest.warns(UserWarning, match=sentence):
            assert pieces(150, 61) == [32, 32, 24, 62]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert pieces(150, 61) == [32, 32, 24, 62], "told once"
            assert pieces(150, 62) == [32, 32, 32, 32, 22], "the second row begins after 88 tokens"
            assert pieces(150, 15) == [32, 32, 32, 32, 22], "it begins in the last chunk"
        reason = "prefill_chunk did not cut its end: no cut fits every row of this left-padded batch"
        assert patched.report().notices == {reason: 2}
    with farspan.patch(model, "a_shape:w=16,sinks=4,block=8", prefill_chunk=30), torch.no_grad():
        assert pieces(150, 61) == [30, 30, 30, 30, 30], "fixed patterns are cut anywhere"
    hook.remove()
