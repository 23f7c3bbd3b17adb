"""Law 7: what is kept beside the keys equals what would be made anew, and follows the rows where they go."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import farspan
from farspan.attention.keys import Keys
from farspan.attention.method import DECODE, AttentionMethod
from farspan.attention.sources import IN_NO_CACHE, Supply
from farspan.attention.summary import Summaries, Summary

from .parameters import every_method

PROMPT, STEPS = 70, 7
FULL_AFTER_A_CROP = ("chunkllm", "h2o", "recycled", "snapkv")  # what they had chosen is lost, and chosen anew


@contextmanager
def summaries_checked() -> Iterator[list[int]]:
    """Every summary that a method asks for is compared with one made from scratch; counts the comparisons."""
    checked = [0]

    def checking(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def summary(self: Keys, wanted: Summary, **how: Tensor | None) -> Tensor:
            entries, some = original(self, wanted, **how), how.get("rows")
            if wanted.reads & IN_NO_CACHE:  # of which earlier calls' are gone; test_summary.py compares these
                return entries
            anew = Summaries().get(wanted, Supply(self.kv, fed=self.fed), self.starts)
            for i, b in enumerate(range(self.kv.batch) if some is None else some.tolist()):
                first = self.starts[b] if self.starts else 0
                if wanted.block is None:
                    rows = slice(first, self.length)
                else:  # blocks are counted from the row's start; those past its end mean nothing
                    rows = slice(0, -(-(self.length - first) // wanted.block))
                # products round by their shape
                if any(isinstance(x, nn.Module) for x in vars(wanted).values()):
                    torch.testing.assert_close(entries[i, :, rows], anew[b, :, rows], rtol=1e-13, atol=1e-13)
                else:
                    assert torch.equal(entries[i, :, rows], anew[b, :, rows])
                assert not bool(entries[i, :, rows].isnan().any())
            checked[0] += 1
            return entries

        return summary

    with pytest.MonkeyPatch.context() as patching:
        for cls in (Keys, *Keys.__subclasses__()):
            if "summary" in vars(cls):
                patching.setattr(cls, "summary", checking(vars(cls)["summary"]))
        yield checked


class Feed:
    """A patched model, a cache and a left-padded batch, fed token by token."""

    def __init__(self, model: Any, rows: int = 2, *, padded: bool = True) -> None:
        self.model, self.cache = model, None
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 128, (rows, PROMPT + 80), generator=generator)
        self.mask = torch.ones(rows, PROMPT + 80, dtype=torch.long)
        for row in range(1, rows):
            self.mask[row, : 11 * row if padded else 0] = 0
        self.length = 0

    def __call__(self, count: int) -> torch.Tensor:
        """Logits of the next ``count`` tokens, in one call."""
        mask = self.mask[:, : self.length + count]
        with torch.no_grad():
            output = self.model(
                self.ids[:, self.length : self.length + count],
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, self.length :],
                past_key_values=self.cache,
                use_cache=True,
            )
        self.cache, self.length = output.past_key_values, self.length + count
        return output.logits

    def steps(self, count: int) -> torch.Tensor:
        return torch.cat([self(1) for _ in range(count)], 1)

    def rows(self, rows: list[int]) -> Feed:
        """The same feed with its rows changed like the cache's: the tokens to come go along."""
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        return self

    def twin(self) -> Feed:
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-5)


@every_method()
@pytest.mark.parametrize("way", ["greedy", "beams", "assisted"])
def test_summaries_in_generate(
    model: Any, patched: Callable[..., Any], method: AttentionMethod, way: str
) -> None:
    """Greedy, beams (rows reordered) and assisted decoding (crops), over a padded batch and over one row."""
    feed = Feed(model)
    ids, mask = feed.ids[:, :PROMPT], feed.mask[:, :PROMPT]
    given = {
        "greedy": {"inputs": ids, "attention_mask": mask},
        "beams": {"inputs": ids, "attention_mask": mask, "num_beams": 3},
        "assisted": {"inputs": ids[:1].repeat(1, 2), "prompt_lookup_num_tokens": 4},
    }
    with patched(method), summaries_checked() as checked:
        model.generate(**given[way], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    if method.name in ("quest", "double_sparsity", "block_topk"):
        assert checked[0] >= 2, "two layers"


@every_method(DECODE)
def test_assisted_decoding_gives_the_method_s_own_greedy_tokens(
    model: Any, patched: Callable[..., Any], method: AttentionMethod
) -> None:
    """Candidates are checked at once and cropped; without state over time, tokens are plain greedy's."""
    if method.name in FULL_AFTER_A_CROP:
        pytest.skip("a crop makes its next step full, so its tokens may differ by design")
    ids = Feed(model).ids[:1, :PROMPT].repeat(1, 2)
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with patched(method):
        plain = model.generate(ids, **how)
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **how), plain)


@every_method(DECODE)
@pytest.mark.parametrize("padded", [False, True])
def test_crop(model: Any, patched: Callable[..., Any], method: AttentionMethod, padded: bool) -> None:
    with patched(method) as patch, summaries_checked():
        feed = Feed(model, padded=padded)
        feed(PROMPT)
        feed.steps(STEPS)
        untouched, cropped = feed.twin(), feed.twin()
        want = untouched.steps(STEPS)
        for layer in feed.cache.layers:
            layer.crop(0)
        assert close(feed.steps(STEPS), want), "a crop by nothing changes nothing"

        cropped.cache.crop(-3)
        cropped.length -= 3
        cropped.ids = cropped.ids.clone()
        cropped.ids[:, cropped.length :] = cropped.ids[:, cropped.length :].flip(1)
        patch.reset_report()
        got = cropped(1)
        if method.name in FULL_AFTER_A_CROP:
            assert patch.report().summary["decode_density"] == 1.0, "the step after a crop is a full one"
            return
        fresh = Feed(model, padded=padded)  # one that never saw what was cropped
        fresh.ids = cropped.ids
        fresh(PROMPT)
        fresh.steps(STEPS - 3)
        assert close(got, fresh(1))
        assert close(cropped.steps(STEPS), fresh.steps(STEPS))


@every_method(DECODE)
@pytest.mark.parametrize("before", [0, STEPS])
def test_rows_take_their_state_along(
    model: Any, patched: Callable[..., Any], method: AttentionMethod, before: int
) -> None:
    with patched(method), summaries_checked():
        feed = Feed(model, rows=3)
        feed(PROMPT)
        if before:
            feed.steps(before)
        want = feed.twin().steps(STEPS)

        swapped = feed.twin().rows([2, 0, 1])
        swapped.cache.reorder_cache(torch.tensor([2, 0, 1]))
        assert close(swapped.steps(STEPS), want[[2, 0, 1]])

        beams = feed.twin().rows([1, 1, 0])
        beams.cache.reorder_cache(torch.tensor([1, 1, 0]))
        assert close(beams.steps(STEPS), want[[1, 1, 0]])

        doubled = feed.twin().rows([0, 0, 1, 1, 2, 2])
        doubled.cache.batch_repeat_interleave(2)
        assert close(doubled.steps(STEPS), want[[0, 0, 1, 1, 2, 2]])

        chosen = feed.twin().rows([1, 2])
        chosen.cache.batch_select_indices(torch.tensor([1, 2]))
        assert close(chosen.steps(STEPS), want[[1, 2]])

        assert close(feed.steps(STEPS), want), "the copies have left the original alone"


@every_method(DECODE)
def test_copies_go_their_own_ways(model: Any, patched: Callable[..., Any], method: AttentionMethod) -> None:
    """A prefix cache that is copied and continued in two ways, in turns."""
    with patched(method), summaries_checked():
        feed = Feed(model)
        feed(PROMPT)
        feed.steps(3)
        want = feed.twin().steps(STEPS)
        other = feed.twin()
        other.ids = other.ids.flip(1)
        got = []
        for _ in range(STEPS):
            got.append(feed(1))
            other(1)
        assert close(torch.cat(got, 1), want)


@every_method(DECODE)
def test_a_reset_cache_is_new(model: Any, patched: Callable[..., Any], method: AttentionMethod) -> None:
    with patched(method), summaries_checked():
        feed = Feed(model)
        want = torch.cat([feed(PROMPT), feed.steps(STEPS)], 1)
        again = Feed(model)
        again.ids = again.ids.flip(0)
        again.mask = again.mask.flip(0)
        again(PROMPT)
        again.steps(3)
        again.cache.reset()
        again.ids, again.mask, again.length = feed.ids, feed.mask, 0
        assert close(torch.cat([again(PROMPT), again.steps(STEPS)], 1), want)


def test_another_mask_drops_what_was_made_for_the_old_one(model: Any, patched: Callable[..., Any]) -> None:
    """The same cache, then a mask that hides more of a row: pages are counted anew from its new start."""
    quest = farspan.parse_method("quest:k=24,page=8,dense_layers=0")
    with patched(quest), summaries_checked() as checked:
        feed = Feed(model)
        feed(PROMPT)
        feed.steps(2)
        feed.mask = feed.mask.clone()
        feed.mask[1, :30] = 0
        feed.steps(2)
        assert checked[0] == 8, "two layers, four steps"
