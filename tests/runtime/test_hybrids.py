"""transformers' own hybrid models under a patch: rows of a padded batch against the rows alone.

Padding is random tokens here. A pad token may have the embedding zero, which hides a recurrent layer that
takes padding up.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from small_models import (
    MORE_HYBRIDS,
    RECURRENT,
    Feed,
    decode,
    logits,
    make,
    padded,
    prompt,
    recipe,
    shared,
    snapshot,
)
from torch import Tensor

import farspan
from farspan.attention.needs import Needs
from farspan.runtime import hf

HYBRIDS = [*RECURRENT, *MORE_HYBRIDS]
SPECS = [
    "dense",
    "block_topk:k=16,block=8 + quest:k=16,page=4,dense_layers=0",
    "antidiagonal:mass=0.6,stride=4,block=8 + double_sparsity:k=16,dense_layers=0",
    "window:w=12,sinks=2",
    "recycled:k=16,stride=5",
]
CALLED = [(name, spec) for name in HYBRIDS for spec in (SPECS if name in RECURRENT else SPECS[:2])]
CUT = [(name, SPECS[(i + j) % 5]) for i, name in enumerate(HYBRIDS) for j in range(2)]
LENGTHS = (72, 48, 16)  # rows begin at 0, 24 and 56
CALLS = (32, 1, 1, 30, 4, 4)  # the tokens of calls on one cache, 72 together; short calls are decode steps


def batch_of(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """A left-padded batch whose padding is random tokens."""
    batch = padded(lengths)
    noise = prompt(*batch["input_ids"].shape, seed=99)
    batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], noise)
    return batch


def row_alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch without its padding."""
    begin = int((batch["attention_mask"][row] == 0).sum())
    return {key: x[row : row + 1, begin:] for key, x in batch.items()}


def patched(model: Any, name: str, spec: str, **how: Any) -> Any:
    return farspan.patch(model, spec, recipe=recipe(name) if "double" in spec else None, **how)


@functools.cache
def rounding(name: str) -> float:
    """How far equal results may differ, relative to the largest logit: 8 times the effect of a change of
    every weight by half a unit in its last place."""
    model, changed = make(name), make(name)
    torch.manual_seed(0)
    for weight in changed.parameters():
        weight.data.mul_(1 + torch.randn_like(weight) * torch.finfo(weight.dtype).eps / 2)
    ids = prompt(3, 72)
    return 8 * difference(logits(changed, ids), logits(model, ids))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def in_calls(model: Any, batch: dict[str, Tensor], row: int | None = None) -> Tensor:
    """Logits of a batch in CALLS on one cache; for a ``row``, of that row alone in its part of each call."""
    begin = 0 if row is None else int((batch["attention_mask"][row] == 0).sum())
    alone = batch if row is None else row_alone(batch, row)
    feed, parts, end = Feed(model, alone["input_ids"], alone["attention_mask"]), [], 0
    for count in CALLS:
        end += count
        if own := min(count, end - begin) * (end > begin):
            parts.append(feed(own))
    return torch.cat(parts, 1)


def test_rounding_is_far_below_what_padding_does() -> None:
    assert max(map(rounding, HYBRIDS)) < 1e-3


@pytest.mark.parametrize(("name", "spec"), CALLED)
def test_calls_on_one_cache_with_padding(name: str, spec: str) -> None:
    """Padding that ends before, at and inside a call; calls of one token while a row has not begun."""
    model, batch = shared(name), batch_of()
    before = snapshot(model)
    with patched(model, name, spec):
        together = in_calls(model, batch)
        for row, length in enumerate(LENGTHS):
            own = in_calls(model, batch, row)
            assert difference(together[row : row + 1, -length:], own) < rounding(name), row
    assert snapshot(model) == before
    if spec == "dense":
        for row, length in enumerate(LENGTHS):
            whole = logits(model, row_alone(batch, row)["input_ids"])
            assert difference(together[row : row + 1, -length:], whole) < rounding(name), row


@pytest.mark.parametrize(("name", "spec"), CUT)
def test_a_prompt_in_chunks_with_padding(name: str, spec: str) -> None:
    """The first chunk is padding in two rows, the second begins where a row begins, the third cuts another
    row's padding; then generate, and a second turn on its cache."""
    model, batch = shared(name), batch_of()
    more, lengths = prompt(3, 9, seed=7), []
    with patched(model, name, spec, prefill_chunk=24):
        embedding = model.get_input_embeddings()
        watch = embedding.register_forward_hook(lambda *call: lengths.append(call[2].shape[1]))
        chunked = logits(model, batch)
        assert lengths == [24, 24, 24]
        watch.remove()
        turns = two_turns(model, batch, more)
    with patched(model, name, spec):
        for row, length in enumerate(LENGTHS):
            alone = row_alone(batch, row)
            own = logits(model, alone["input_ids"], use_cache=True)
            assert difference(chunked[row : row + 1, -length:], own) < rounding(name), row
            assert torch.equal(turns[row : row + 1], two_turns(model, alone, more[row : row + 1])), row


def two_turns(model: Any, batch: dict[str, Tensor], more: Tensor) -> Tensor:
    """The tokens that generate appends to a batch, and after ``more`` tokens on the same cache."""
    how = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    first = model.generate(**batch, max_new_tokens=4, **how)
    ids = torch.cat([first.sequences, more], 1)
    new = batch["attention_mask"].new_ones(len(ids), ids.shape[1] - batch["input_ids"].shape[1])
    mask = torch.cat([batch["attention_mask"], new], 1)
    cache = hf.with_cache(model, hf.returned_cache(first))
    second = model.generate(ids, attention_mask=mask, max_new_tokens=4, **cache, **how)
    return torch.cat([first.sequences[:, -4:], second.sequences[:, -4:]], 1)


@pytest.mark.parametrize("name", HYBRIDS)
def test_beams_of_a_padded_batch(name: str) -> None:
    model, batch = shared(name), batch_of()
    with patched(model, name, SPECS[1], prefill_chunk=24):
        together = decode(model, batch, 6, num_beams=3)
    with patched(model, name, SPECS[1]):
        for row in range(3):
            alone = decode(model, row_alone(batch, row)["input_ids"], 6, num_beams=3)
            assert torch.equal(together[row : row + 1], alone), row


@pytest.mark.parametrize("name", HYBRIDS)
def test_padding_leaves_the_state_at_zero(name: str) -> None:
    """A chunk, a call of one token and a second chunk, all of them padding in row 2."""
    model, batch = make(name), batch_of()
    with farspan.patch(model, "dense"):
        feed = Feed(model, batch["input_ids"], batch["attention_mask"])
        for count in (32, 1, 20):
            feed(count)
    states = [
        state
        for layer in feed.cache.layers
        for kind in ("conv_states", "recurrent_states")
        for state in getattr(layer, kind, {}).values()
        if state is not None
    ]
    assert states and all(bool(x[0].any() and x[1].any()) and not bool(x[2].any()) for x in states)


BIASES = {
    "falcon_h1": "mamba_proj_bias",
    "nemotron_h": "use_bias",
    "granitemoehybrid": "mamba_proj_bias",
    "lfm2": "conv_bias",
}


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_of_the_projections_does_not_fill_the_padding(name: str) -> None:
    """transformers zeroes hidden states before the projection alone, so a row in a batch is another one
    there."""
    model, batch = make(name, **{BIASES[name]: True}), batch_of()
    for key, weight in model.named_parameters():
        if key.endswith("bias") and not weight.any():
            torch.nn.init.normal_(weight)
    own = [logits(model, row_alone(batch, row)["input_ids"]) for row in range(3)]
    before, unpatched = snapshot(model), logits(model, batch)
    with farspan.patch(model, "dense"):
        whole, calls = logits(model, batch), in_calls(model, batch)
    assert snapshot(model) == before and torch.equal(logits(model, batch), unpatched)
    for row, length in enumerate(LENGTHS):
        for got in (whole, calls):
            assert difference(got[row : row + 1, -length:], own[row]) < rounding(name), row
    assert difference(unpatched[2:, -16:], own[2]) > 0.05


def test_a_continued_call_counts_its_positions_from_the_cache() -> None:
    """Without position ids, Bamba counts from 0 in every call."""
    model, ids = shared("bamba"), prompt(2, 60)
    whole = logits(model, ids)
    with farspan.patch(model, "dense", prefill_chunk=20):
        out = model(ids[:, :40])
        parts = [out.logits, logits(model, ids[:, 40:], **hf.with_cache(model, hf.returned_cache(out)))]
    assert difference(torch.cat(parts, 1), whole) < rounding("bamba")
    out = model(ids[:, :40])
    unpatched = logits(model, ids[:, 40:], **hf.with_cache(model, hf.returned_cache(out)))
    assert difference(unpatched, whole[:, 40:]) > 0.05


def test_a_failed_call_leaves_no_mask_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make("qwen3_next"), batch_of()
    ids = prompt(3, 72)
    expected = logits(model, ids)
    with farspan.patch(model, "dense"):
        with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="broken"):
            broken.setattr(model.get_decoder().layers[2].mlp, "forward", fail)
            logits(model, batch)
        assert difference(logits(model, ids), expected) < rounding("qwen3_next")


def fail(*_: Any) -> None:
    raise RuntimeError("broken")


@pytest.mark.parametrize(
    ("name", "more"),
    [("nemotron_h", {}), ("granitemoehybrid", {}), ("granitemoehybrid", {"position_embedding_type": "rope"})],
    ids=["nemotron_h", "granite", "granite with RoPE"],
)
def test_keys_before_rope_where_a_model_can_do_without(name: str, more: dict[str, Any]) -> None:
    """The output of the projection is the oracle."""
    model, keys, fed = make(name, **more), [], []
    info = hf.inspect_model(model)
    with farspan.patch(model, "dense"):
        undo = hf.observe(info, 1, Needs(keys_before_rope=True), lambda *_, inputs: fed.append(inputs))
        watch = info.attention[1].k_proj.register_forward_hook(lambda *call: keys.append(call[2]))
        logits(model, prompt(2, 40), use_cache=False)
        watch.remove()
        undo()
    [own], [projected] = fed, keys
    assert difference(own.keys_before_rope.transpose(1, 2).flatten(2), projected) < 1e-4
