"""static=N: a store of fixed size gives what a growing one gives, bit for bit, and reports the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import PAD, Feed, decode, make, padded, prompt, recipe, shared
from torch import Tensor

import farspan
from farspan.attention.errors import FarspanError, Unsupported
from farspan.runtime import static_call
from farspan.runtime.hf import returned_cache, with_cache
from farspan.runtime.static_call import StaticCall
from farspan.runtime.store.static import StaticStore

STATIC: dict[str, set[str]] = {  # the steps that a run from 41 to 61 keys takes
    "dense": {"every"},
    "window:w=42,sinks=3": {"every", "window"},
    "quest:k=48,page=8,dense_layers=1": {"every", "pages"},
    "quest:k=22,page=4,dense_layers=0,gqa_reduce=none": {"pages"},
    "quest:k=none,fraction=0.4,page=4,dense_layers=0": {"pages"},
    "double_sparsity:k=20,dense_layers=0": {"labels"},
    "double_sparsity:k=none,fraction=0.3,dense_layers=0,gqa_reduce=none": {"labels"},
    "recycled:k=16,stride=4": {"full", "kept set"},
    "recycled:k=50,stride=3,pool=3,gqa_reduce=max": {"every", "full", "kept set"},
}
every_static = pytest.mark.parametrize("spec", STATIC)


def patched(spec: str, **how: Any) -> farspan.Patched:
    needs = {"recipe": recipe("llama")} if "double_sparsity" in spec else {}
    return farspan.patch(shared("llama"), spec, **needs, **how)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The names of the steps of the layers, for each call that stores of fixed size served by steps."""
    seen: list[tuple[str, ...]] = []
    enter = StaticCall.__enter__

    def counted(self: StaticCall) -> StaticCall:
        seen.append(self.names)
        return enter(self)

    monkeypatch.setattr(StaticCall, "__enter__", counted)
    return seen


def told(report: farspan.Report) -> dict[str, Any]:
    """All that a report says but memory and which operations ran."""
    known = report.to_dict()
    for layer in known["layers"]:
        del layer["stored_bytes"], layer["stored_by_tier"]
        for phase in ("prefill", "decode"):
            del layer[phase]["implementations"]
    for name in ("kv_bytes_stored", "kv_bytes_stored_by_tier", "implementation"):
        del known["summary"][name]
    return known


def generated(spec: str, inputs: Any, **how: Any) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(tokens, logits, report) of 20 new tokens."""
    sizes = {name: how.pop(name) for name in ("static", "prefill_chunk") if name in how}
    torch.manual_seed(3)
    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    with patched(spec, **sizes) as patch:
        out = shared("llama").generate(
            **given,
            max_new_tokens=20,
            eos_token_id=None,
            pad_token_id=PAD,
            output_logits=True,
            return_dict_in_generate=True,
            **{"do_sample": False, **how},
        )
        return out.sequences, torch.stack(out.logits), told(patch.report())


@pytest.mark.parametrize(
    ("spec", "how"),
    [
        *((spec, {}) for spec in STATIC),
        ("dense", {"prefill_chunk": 16}),
        ("window:w=42,sinks=3", {"num_beams": 3}),
        ("quest:k=22,page=4,dense_layers=0,gqa_reduce=none", {"do_sample": True, "temperature": 1.5}),
        ("quest:k=48,page=8,dense_layers=1", {"num_beams": 3}),
        ("double_sparsity:k=20,dense_layers=0", {"num_beams": 3, "prefill_chunk": 16}),
        ("recycled:k=16,stride=4", {"num_beams": 3}),
        ("recycled:k=50,stride=3,pool=3,gqa_reduce=max", {"do_sample": True, "prefill_chunk": 16}),
    ],
    ids=str,
)
def test_a_fixed_store_equals_a_growing_one_bit_for_bit(
    spec: str, how: dict[str, Any], steps: list[tuple[str, ...]]
) -> None:
    for inputs, named in ((prompt(2, 41), STATIC[spec]), (padded((41, 38)), set())):
        want = generated(spec, inputs, **how)
        assert not steps
        got = generated(spec, inputs, static=64, **how)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert got[2] == want[2]
        assert named <= {name for call in steps for name in call}
        # rows of which some have no more keys than the set of recycled go the way of a growing store
        assert len(steps) == 19 or (spec.startswith("recycled:k=50") and len(steps) > 6)
        steps.clear()


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3", "olmo2", "qwen3_moe"])
def test_other_architectures(name: str, steps: list[tuple[str, ...]]) -> None:
    model, results = shared(name), []
    for size in ({}, {"static": 50}):
        with farspan.patch(model, "quest:k=22,page=4,dense_layers=1", **size):
            results.append(decode(model, padded((41, 38)), 6))
    assert torch.equal(*results) and len(steps) == 5


def test_padded_rows_without_position_ids_take_no_step(steps: list[tuple[str, ...]]) -> None:
    """A model may make them of the mask, which steps do not give it."""
    given = padded((41, 38))
    with patched("dense", static=50), torch.no_grad():
        out = shared("llama")(**given, use_cache=True)
        mask = torch.cat([given["attention_mask"], torch.ones(2, 1).long()], 1)
        shared("llama")(prompt(2, 1), attention_mask=mask, **with_cache(shared("llama"), returned_cache(out)))
    assert not steps


def test_many_steps_are_counted_before_a_report_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a server that never asks keeps no list of its tokens."""
    monkeypatch.setattr(static_call, "_NOTED", 4)
    want, got = (generated("window:w=42,sinks=3", prompt(1, 41), **size) for size in ({}, {"static": 61}))
    assert got[2] == want[2]


@every_static
def test_assisted_decoding_and_crops(spec: str) -> None:
    """Calls of several tokens, and crops between steps, which open a page again."""
    model = shared("llama")
    ids = prompt(1, 40)
    ids[:, 20:] = ids[:, :20]
    results = []
    for size in ({}, {"static": 80}):
        with patched(spec, **size):
            assisted = decode(model, ids, 20, prompt_lookup_num_tokens=4)
            feed = Feed(model, prompt(1, 70), torch.ones(1, 70).long())
            logits = [feed(count) for count in (44, 1, 1, 1)]
            for removed in (2, 1, 9):
                feed.cache.crop(-removed)
                feed.length -= removed
                logits += [feed(1), feed(1), feed(5), feed(1)]
            results.append((assisted, torch.cat(logits, 1)))
    (a, x), (b, y) = results
    assert torch.equal(a, b) and torch.equal(x, y)


def test_a_failed_step_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails in the second layer, then the same token: as if it had never been tried."""
    for spec in STATIC:
        model, mask = shared("llama"), torch.ones(1, 60).long()
        with patched(spec):
            want = Feed(model, prompt(1, 60), mask)
            expected = [want(count) for count in (50, 1, 1)]
        with patched(spec, static=60):
            feed = Feed(model, prompt(1, 60), mask)
            got = [feed(50), feed(1)]
            other = Feed(model, prompt(1, 60, seed=9), mask)
            other.cache, other.length = feed.cache, feed.length
            with monkeypatch.context() as patching:
                patching.setattr(model.model.layers[1].mlp, "forward", _fails)
                with pytest.raises(MemoryError):
                    other(1)
            got.append(feed(1))
        assert len({layer.store.length for layer in feed.cache.layers}) == 1
        same = [torch.equal(a, b) for a, b in zip(got, expected, strict=True)]
        # its next step is full
        assert all(same) or (spec.startswith("recycled") and same[:2] == [True, True])


def _fails(*_: Any) -> Any:
    raise MemoryError


def test_buffers_do_not_move() -> None:
    """Over steps, beams of the same number, a reset and a second prompt; the length is on the device."""
    for spec in STATIC:
        model = shared("llama")
        with patched(spec, static=64), torch.no_grad():
            feed = Feed(model, prompt(3, 64), torch.ones(3, 64).long())
            feed(52)
            first = feed(1)
            stores = [layer.store for layer in feed.cache.layers]
            assert all(isinstance(store, StaticStore) for store in stores)
            feed(1)
            before = [store.step.pointers() for store in stores]
            feed.cache.reorder_cache(torch.tensor([2, 0, 1]))
            feed(1)
            assert stores[0].step.length.dtype == torch.int32 and int(stores[0].step.length) == 55
            assert [store.step.pointers() for store in stores] == before
            feed.cache.reset()
            feed.length = 0
            feed(52)
            assert torch.equal(feed(1), first)
            assert [store.step.pointers() for store in stores] == before


def test_rows_of_a_cache_are_repeated_selected_and_copied() -> None:
    for spec in ("quest:k=22,page=4,dense_layers=0", "recycled:k=16,stride=4"):
        model, ids = shared("llama"), prompt(2, 50)
        results = []
        for size in ({}, {"static": 60}):
            logits = []
            with patched(spec, **size):
                feed = Feed(model, ids, torch.ones(2, 50).long())
                feed(41), feed(1)
                feed.cache.batch_repeat_interleave(2)
                feed.ids, feed.mask = (x.repeat_interleave(2, 0) for x in (ids, feed.mask))
                logits.append(feed(1))
                other = Feed(model, feed.ids, feed.mask)
                other.cache, other.length = copy.deepcopy(feed.cache), feed.length
                logits += [feed(1), feed(1)]
                logits += [other(1), other(1)]
                feed.cache.batch_select_indices(torch.tensor([1, 2]))
                feed.ids, feed.mask = (x[[1, 2]] for x in (feed.ids, feed.mask))
                logits.append(feed(1))
            results.append(torch.cat(logits))
        assert torch.equal(*results)


def test_caches_from_before_and_under_other_patches() -> None:
    """A cache of the unpatched model or of a growing store is taken over; a fixed one serves a growing
    patch."""
    model, ids = shared("llama"), prompt(1, 50)
    spec = "quest:k=22,page=4,dense_layers=0"
    with patched(spec):
        feed = Feed(model, ids, torch.ones(1, 50).long())
        want = [feed(count) for count in (40, 1, 1, 1)]
    results = []
    for first, second in (({}, {"static": 50}), ({"static": 50}, {})):
        with patched(spec, **first):
            feed = Feed(model, ids, torch.ones(1, 50).long())
            got = [feed(40), feed(1)]
        with patched(spec, **second):
            got += [feed(1), feed(1)]
        results.append(all(map(torch.equal, got, want)))
    assert results == [True, True]
    with torch.no_grad():
        cache = returned_cache(model(ids[:, :40], use_cache=True))
        with patched("dense", static=50):
            got = [model(ids[:, n : n + 1], **with_cache(model, cache)).logits for n in (40, 41)]
        assert isinstance(cache.layers[0].store, StaticStore)
        assert torch.allclose(torch.cat(got, 1), model(ids[:, :42]).logits[:, 40:], atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "how", "sentence"),
    [
        ("dense", {"static": 0}, "static is a number of positions, at least 1; got 0"),
        ("dense", {"static": 2.5}, "static is a number of positions, at least 1; got 2.5"),
        ("snapkv", {"static": 9}, "static= does not serve snapkv: .* are dense, window, quest, double_spa"),
        ("recycled:dynamic=true", {"static": 9}, "static= does not serve recycled:dynamic=True"),
        ("dense", {"static": 9, "parallel": "auto"}, "static=9 was given together with parallel"),
        ("dense", {"static": 9, "measure_mass": True}, "together with measure_mass"),
        ("dense", {"static": 9, "crossover": 100}, "together with crossover"),
    ],
)
def test_what_it_does_not_serve_is_said(spec: str, how: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FarspanError, match=sentence):
        farspan.patch(shared("llama"), spec, **how)
    farspan.patch(shared("llama")).remove()  # nothing was changed


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("gemma2", {}, "layers of type 'sliding_attention' keep something"),
        ("nemotron_h", {}, "layers of type 'linear_attention' keep something"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "RoPE of type 'dynamic'",
        ),
    ],
)
def test_models_that_it_does_not_serve(name: str, overrides: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        farspan.patch(make(name, **overrides), static=100)


def test_a_position_that_the_host_counts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4's attention without RoPE scales queries by the length of its cache, which no replay reads."""
    model = shared("llama")
    monkeypatch.setattr(model.model.layers[1].self_attn, "attn_temperature_tuning", True, raising=False)
    with pytest.raises(Unsupported, match="the position of a token from the length on the host"):
        farspan.patch(model, static=100)


def test_no_position_beyond_the_last() -> None:
    model = shared("llama")
    with patched("quest:k=22,page=4,dense_layers=0", static=45), torch.no_grad():
        feed = Feed(model, prompt(1, 60), torch.ones(1, 60).long())
        for count in (44, 1):
            feed(count)
        cache = copy.deepcopy(feed.cache)
        sentence = r"room for 45 positions \(static=45\), and this call needs 4[68]"
        for count in (1, 3):
            with pytest.raises(FarspanError, match=sentence):
                feed(count)
        for mine, kept in zip(feed.cache.layers, cache.layers, strict=True):
            assert mine.store.length == 45
            for a, b in zip(mine.store.buffers.tensors, kept.store.buffers.tensors, strict=True):
                assert torch.equal(a, b)
        with pytest.raises(FarspanError, match="needs 46"):
            feed.cache.layers[0].update(*(torch.zeros(1, 2, 1, 16) for _ in range(2)))
        with pytest.raises(FarspanError, match="needs 46"):
            decode(model, prompt(1, 40), 12)


@pytest.mark.parametrize("then", [80, None], ids=["larger", "growing"])
def test_a_cache_goes_on_under_another_size(then: int | None) -> None:
    model, ids, spec = shared("llama"), prompt(1, 60), "quest:k=22,page=4,dense_layers=0"
    with torch.no_grad():
        feed = Feed(model, ids, torch.ones(1, 60).long())
        with patched(spec, static=45):
            for count in (40, 1, 1, 1):
                feed(count)
        with patched(spec) if then is None else patched(spec, static=then):
            got = [feed(1) for _ in range(17)]
        right = Feed(model, ids, torch.ones(1, 60).long())
        with patched(spec):
            want = [right(count) for count in (40, *[1] * 20)][4:]
    assert all(map(torch.equal, got, want))
    rooms = {getattr(layer.store, "room", None) for layer in feed.cache.layers}
    assert rooms == {then}


def test_a_cache_is_used_again_in_another_dtype() -> None:
    model, spec = make("llama"), "quest:k=22,page=4,dense_layers=0"
    with torch.no_grad(), farspan.patch(model, spec, static=64):
        cache = returned_cache(model(prompt(1, 40), use_cache=True))
        model(prompt(1, 1), **with_cache(model, cache))
        cache.reset()
        model.double()
        for length in (40, 1, 1):
            out = model(prompt(1, length), **with_cache(model, cache))
    assert out.logits.dtype == cache.layers[0].store.buffers.tensors[0].dtype == torch.float64


def test_a_step_that_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next calls store their tokens, and the schedule of ``recycled`` begins anew."""
    begin, failing = StaticStore.begin, [False]

    def failed(self: StaticStore, step: Any) -> None:
        begin(self, step)
        if failing[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(StaticStore, "begin", failed)
    with patched("recycled:k=16,stride=4", static=64), torch.no_grad():
        feed = Feed(shared("llama"), prompt(1, 60), torch.ones(1, 60).long())
        feed(40)
        failing[0] = True
        with pytest.raises(KeyboardInterrupt):
            feed(1)
        failing[0] = False
        store = feed.cache.layers[0].store
        assert not store.clock.stepping and not any(g.states for g in store.states._groups)
        feed(2)
        assert store.length == 42


def test_gradients_are_refused() -> None:
    model = shared("llama")
    with patched("dense", static=45), pytest.raises(FarspanError, match="which no gradient can follow"):
        model(prompt(1, 40), use_cache=True)


def test_padding_on_the_right_cannot_be_continued() -> None:
    model, mask = shared("llama"), torch.ones(2, 41).long()
    mask[1, 30:40] = 0
    with patched("dense", static=60), torch.no_grad():
        cache = returned_cache(model(prompt(2, 40), attention_mask=mask[:, :40], use_cache=True))
        with pytest.raises(FarspanError, match=r"padding on the right|zeros between ones"):
            model(prompt(2, 1), attention_mask=mask, **with_cache(model, cache))
