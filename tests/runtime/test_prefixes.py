"""The prefix store: which cache it gives, what it drops, and that nothing of a cache is shared."""

from __future__ import annotations

import copy
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import prompt, shared
from transformers import DynamicCache

import farspan
from farspan import Recipe
from farspan.attention.errors import FarspanError
from farspan.runtime import fingerprint, hf
from farspan.runtime.prefixes import PrefixStore, common

A, B = "one patch", "another patch"


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Caches of ten bytes a token that hold nothing, except where a test has a model."""
    if "real" in request.keywords or "model" in request.fixturenames:
        return
    monkeypatch.setattr(hf, "length_of", lambda cache: cache.length)
    monkeypatch.setattr(hf, "stored_bytes", lambda cache: 2 * cache.length)
    monkeypatch.setattr(hf, "last_cut", last_cut)
    monkeypatch.setattr(hf, "cut", lambda cache, length, marks: setattr(cache, "length", length))
    copied = lambda cache, length, marks: SimpleNamespace(**{**vars(cache), "length": length})  # noqa: E731
    monkeypatch.setattr(hf, "cut_copy", copied)


def last_cut(cache: Any, most: int, marks: Any = (), step: int = 1) -> int:
    cuts = {most - most % step} if cache.anywhere else {cache.length, *(one.length for one in marks)}
    return max((x for x in cuts if x <= most and x % step == 0), default=0)


def cache_of(tokens: list[int], anywhere: bool = True) -> Any:
    return SimpleNamespace(length=len(tokens), anywhere=anywhere)


def mark_at(length: int) -> Any:
    return SimpleNamespace(length=length, nbytes=5)


def took(store: PrefixStore, patch: str, tokens: list[int]) -> tuple[Any, int]:
    found = store.take(patch, tokens)
    return found.cache, found.length


@pytest.fixture
def model() -> Any:
    return shared("llama")


def test_the_longest_prefix_in_random_sequences() -> None:
    """Against a list that is searched by hand: which cache, how much of it, and what is left."""
    rng = random.Random(0)
    store, kept, copied = PrefixStore(10**9), [], 0
    for _ in range(300):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(2, 9))]
        patch = rng.choice([A, B])
        if rng.random() < 0.5:
            cache = cache_of(tokens)
            assert store.put(patch, tokens, cache)
            kept = [x for x in kept if x[0] != patch or tokens[: len(x[1])] != x[1]]
            kept.append((patch, tokens, cache))
            continue

        def shares(entry: Any, patch: str = patch, tokens: list[int] = tokens) -> int:
            same = 0
            while entry[0] == patch and same < min(len(tokens) - 1, len(entry[1])):
                if tokens[same] != entry[1][same]:
                    break
                same += 1
            return same

        best = max(map(shares, kept), default=0)
        found, length = took(store, patch, tokens)
        assert length == best and (found is None) == (best == 0)
        if found is not None:
            assert found.length == best
            mine = [x for x in kept if x[2] is found]
            copied += not mine
            if mine:
                assert shares(mine[0]) == best and 2 * best >= len(mine[0][1])
                kept.remove(mine[0])
            else:
                assert any(shares(x) == best and 2 * best < len(x[1]) for x in kept)
    assert len(store) == len(kept) and store.hits > 50 and copied > 5


def test_a_short_common_beginning_leaves_a_long_cache_in_the_store() -> None:
    """Two conversations with one system prompt take turns, and each goes on where it was."""
    store = PrefixStore(10**6)
    system = [7] * 10
    for turn in range(3):
        for talk in (1, 2):
            tokens = system + [talk] * 30 * (turn + 1)
            cache, length = took(store, A, tokens)
            assert length == (10 + 30 * turn if turn else 10 * (talk == 2))
            cache = cache_of(tokens) if cache is None else cache
            cache.length = len(tokens)
            store.put(A, tokens, cache)
    assert len(store) == 2


def test_the_least_recently_used_is_dropped() -> None:
    """Ten bytes a token: two of the keys and values, eight of the token's number."""
    store = PrefixStore(100)
    for first in (1, 2):
        assert store.put(A, [first] * 4, cache_of([first] * 4))
    assert store.nbytes == 80
    again, length = took(store, A, [1, 1, 1, 1, 7])  # the first is used, so the second is older now
    assert length == 4 and store.nbytes == 40 and store.put(A, [1] * 4, again)
    store.put(A, [3] * 4, cache_of([3] * 4))
    assert store.dropped == 1 and store.nbytes == 80
    assert store.take(A, [2, 2, 2]).length == 0 and store.take(A, [1, 1, 1]).length == 2
    assert not store.put(A, [9] * 11, cache_of([9] * 11)), (
        "more than the limit: not kept, and nothing dropped"
    )
    assert store.take(A, [3, 3, 3]).length == 2
    assert (store.hits, store.misses, store.tokens_reused) == (3, 1, 8)
    store.clear()
    assert store.nbytes == len(store) == 0


def test_caches_that_cannot_be_cropped() -> None:
    """They serve a prompt that begins with all their tokens, and shorter ones stay beside longer ones."""
    store = PrefixStore(10**6)
    for length in (3, 6):
        store.put(A, [1] * length, cache_of([1] * length, anywhere=False))
    assert len(store) == 2
    assert store.take(A, [1, 1, 1, 1, 1]).length == 3
    found = store.take(A, [1, 1, 1, 1, 1])
    assert found.cache is None and found.length == 0 and found.shared == 4
    assert store.take(A, [1] * 6 + [2]).length == 6


def test_marks_are_cuts() -> None:
    """A cache with marks serves prompts that share as much as a mark has, and takes the place of shorter
    ones. The bytes of its marks count."""
    store = PrefixStore(10**6)
    store.put(A, [1] * 4, cache_of([1] * 4, anywhere=False))
    marks = [mark_at(length) for length in (8, 4, 6, 10, 2, 12)]
    store.put(A, [1] * 10, cache_of([1] * 10, anywhere=False), marks)
    assert len(store) == 2, "nothing is left of the mark at 4"
    store.put(A, [1] * 4, cache_of([1] * 4, anywhere=False))
    store.clear()
    store.put(A, [1] * 10, cache_of([1] * 10, anywhere=False), marks)
    assert store.nbytes == 100 + 4 * 5, "the first mark, and the last three"
    found = store.take(A, [1] * 9 + [2, 2])
    assert (found.length, found.shared, [one.length for one in found.marks]) == (8, 9, [2, 6, 8])
    assert found.cache.length == 8 and len(store) == 0
    store.put(A, [1] * 8, found.cache, found.marks)
    assert store.take(A, [1] * 9, step=3).length == 6, "of the marks, the one at a multiple of 3"
    for length in (2, 6):
        store.put(A, [1] * length, cache_of([1] * length, anywhere=False))
    store.put(A, [1] * 8, cache_of([1] * 8, anywhere=False), marks)
    assert len(store) == 1, "it can be cut to what these have"


def test_what_is_not_kept() -> None:
    store = PrefixStore(10**6)
    assert not store.put(A, [1, 2], cache_of([1, 2, 3])), "more in it than is known of"
    assert not store.put(A, [1, 2], cache_of([])) and len(store) == 0
    assert store.put(A, [1, 2, 3], cache_of([1, 2])), "the last token of an answer is in no cache yet"
    assert store.take(A, [1, 2, 3, 4]).length == 2
    with pytest.raises(FarspanError, match="number of bytes; got -1"):
        PrefixStore(-1)


def test_many_threads() -> None:
    """No cache is ever with two owners."""
    store, owned, lock = PrefixStore(10**6), set(), threading.Lock()
    failures: list[str] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            tokens = [rng.randrange(2) for _ in range(6)]
            cache = store.take(A, tokens).cache
            with lock:
                if cache is not None and id(cache) in owned:
                    failures.append("a cache has two owners")
                cache = cache_of(tokens) if cache is None else cache
                owned.add(id(cache))
            cache.length = len(tokens)
            with lock:
                owned.discard(id(cache))
                store.put(A, tokens, cache)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures and store.hits + store.misses == 800


def test_common_columns() -> None:
    a = torch.tensor([[0, 5, 6, 7], [4, 5, 6, 7]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert common(a, a) == 4 and common(a, a, mask, mask) == 4
    assert common(a, a, mask, torch.ones_like(mask)) == 0
    b = a.clone()
    b[1, 2] = 9
    assert common(a, b) == 2 and common(a, a[:, :3]) == 3 and common(a, a[:1]) == 0


@pytest.mark.parametrize("spec", ["dense", "recycled:k=16,stride=4", "quest:k=16,page=4,dense_layers=0"])
def test_turns_of_two_conversations(model: Any, spec: str) -> None:
    """The tokens of each turn are those of a conversation that keeps a cache of its own."""

    def say(ids: torch.Tensor, cache: Any) -> tuple[list[int], Any]:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, eos_token_id=None,
            return_dict_in_generate=True,
            **hf.with_cache(model, cache),
        )  # fmt: skip
        return out.sequences[0].tolist(), hf.returned_cache(out)

    store = PrefixStore(10**8)
    with farspan.patch(model, spec):
        patch = str(fingerprint.of_patch(model))
        talks = [prompt(1, 60, seed=seed) for seed in (1, 2)]
        own: list[Any] = [DynamicCache(config=model.config) for _ in talks]
        for turn in range(3):
            for i, ids in enumerate(talks):
                want, own[i] = say(ids, own[i])
                cache, reused = took(store, patch, ids[0].tolist())
                assert reused == (
                    turn and ids.shape[1] - 19
                )  # the last token of an answer, and the next turn
                got, cache = say(ids, cache)
                assert got == want and store.put(patch, got, cache)
                talks[i] = torch.cat([torch.tensor([got]), prompt(1, 18, seed=turn + 5)], 1)
    assert len(store) == 2 and store.nbytes >= sum(map(hf.stored_bytes, own)) > 0
    assert store.hits == 4 and store.misses == 2


def test_the_patch_is_part_of_the_key(model: Any) -> None:
    found = []
    for spec in ("quest:k=16", "quest:k=20", "dense", "dense"):
        with farspan.patch(model, spec):
            found.append(str(fingerprint.of_patch(model)))
    assert len(set(found)) == 3 and found[2] == found[3]


@pytest.mark.parametrize("storage", ["device", "int8:group=16,window=0", "int4:group=16,window=0", "disk"])
@pytest.mark.parametrize("spec", ["dense", "quest:k=16,page=4,dense_layers=0", "recycled:k=16,stride=4"])
def test_a_copied_beginning_is_as_small_as_a_cache_of_it(
    model: Any, spec: str, storage: str, tmp_path: Path
) -> None:
    """40 tokens of 480, in no more memory than a prompt of 40 tokens takes, and with the answers of a copy
    that was cropped. The other tokens stay where they are, bit for bit."""
    where = f"disk:folder={tmp_path}" if storage == "disk" else storage
    ids, store = prompt(1, 480), PrefixStore(10**9)
    more = prompt(1, 20, seed=7)
    with farspan.patch(model, spec, storage=where), torch.no_grad():
        cache = hf.fill(model, ids, torch.ones_like(ids))
        cropped = copy.deepcopy(cache)
        before = copy.deepcopy(cache)
        cropped.crop(-440)
        most = hf.stored_bytes(hf.fill(model, ids[:, :40], torch.ones_like(ids[:, :40])))
        assert store.put(A, ids[0].tolist(), cache)
        found, length = took(store, A, [*ids[0, :40].tolist(), *more[0].tolist()])
        assert length == 40 and found is not cache and len(store) == 1
        assert hf.stored_bytes(found) <= most < 0.7 * hf.stored_bytes(cache)
        a, b = (model(more, **hf.with_cache(model, x)).logits for x in (found, cropped))
        assert torch.equal(a, b)
        for one, other in zip(cache.layers, before.layers, strict=True):
            assert all(
                torch.equal(x, y) for x, y in zip(one.store.kv.stored, other.store.kv.stored, strict=True)
            )
        a, b = (model(more, **hf.with_cache(model, x)).logits for x in (cache, before))
        assert torch.equal(a, b)


def test_a_copied_beginning_of_heads_apart(model: Any) -> None:
    """Where duo has dropped keys, the beginning cannot be cropped from them: it is read anew."""
    tensors = {f"layers.{i}.alpha": torch.tensor([0.9, 0.1]) for i in range(3)}
    recipe = Recipe(method="duo", geometry=hf.inspect_model(model).geometry, settings={}, tensors=tensors)
    ids = prompt(1, 300)
    with farspan.patch(model, "duo:sinks=4,recent=20", recipe=recipe), torch.no_grad():
        cache = hf.fill(model, ids, torch.ones_like(ids))
        want = copy.deepcopy(cache)
        with pytest.raises(FarspanError, match="cannot be cropped by 260"):
            hf.cut_copy(cache, 40)
        found = hf.cut_copy(cache, 290)
        want.crop(-10)
        assert hf.stored_bytes(found) <= hf.stored_bytes(want)
        a, b = (model(prompt(1, 9), **hf.with_cache(model, x)).logits for x in (found, want))
        assert torch.equal(a, b) and cache.get_seq_length() == 300
