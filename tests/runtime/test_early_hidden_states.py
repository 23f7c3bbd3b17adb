"""Methods are fed hidden states of an earlier layer: those that this layer's attention was called with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from small_models import decode, logits, make, padded, prompt, snapshot
from torch import Tensor

import farspan
from farspan import FarspanError, Unsupported
from farspan.attention import method as registry
from farspan.attention.keys import Keys
from farspan.attention.method import AttentionMethod
from farspan.attention.needs import Needs
from farspan.attention.selection import Index
from farspan.runtime import hf


@dataclass(frozen=True, kw_only=True)
class Early(AttentionMethod):
    """Reads everything and keeps what it is fed."""

    name: ClassVar[str] = "early"
    title: ClassVar[str] = "Early hidden states"
    seen: ClassVar[list[Tensor]] = []

    early: int = 1
    use: bool = True

    @property
    def needs(self) -> Needs:
        return Needs(early_hidden_states=self.early)

    def for_layer(self, layer: Any) -> AttentionMethod | None:
        return self if layer.index >= self.early else None

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        if self.use:
            self.seen.append(keys.inputs.early_hidden_states)
            assert self.seen[-1].shape[:2] == (q.shape[0], q.shape[2])
        return None

    select_decode = select_prefill


registry._REGISTRY.pop("early")  # other tests in this process go over all registered methods


@pytest.fixture
def model() -> Any:
    return make("llama").double()


@pytest.fixture
def fed(model: Any) -> Iterator[list[Tensor]]:
    """What the attention of layer 1 was called with, call by call; the oracle."""
    given: list[Tensor] = []
    attention = model.model.layers[1].self_attn
    hook = attention.register_forward_pre_hook(
        lambda m, a, k: given.append(k["hidden_states"]), with_kwargs=True
    )
    Early.seen.clear()
    yield given
    hook.remove()


@pytest.mark.parametrize("how", [{}, {"prefill_chunk": 24}], ids=["whole", "chunked"])
def test_every_later_layer_is_fed_them(model: Any, fed: list[Tensor], how: dict[str, Any]) -> None:
    """In prefill and in decode; layer 1 itself and layer 2."""
    with farspan.patch(model, Early(), **how):
        decode(model, prompt(1, 61), new=5)
    assert len(fed) >= 5 and len(Early.seen) == 2 * len(fed)
    for i, want in enumerate(fed):
        assert torch.equal(Early.seen[2 * i], want) and torch.equal(Early.seen[2 * i + 1], want)


def test_rows_of_a_padded_batch(model: Any, fed: list[Tensor]) -> None:
    lengths = (41, 29, 40)
    with farspan.patch(model, Early()):
        decode(model, padded(lengths), new=2)
    rows = [fed[0][b : b + 1, 41 - n :] for b, n in enumerate(lengths)]
    for got, want in zip(Early.seen, [*rows, *rows, *fed[1:]], strict=False):
        assert torch.equal(got, want)


def test_they_are_dropped_after_the_call_and_the_patch(model: Any, fed: list[Tensor]) -> None:
    want, before = logits(model, prompt(1, 50)), snapshot(model)
    with farspan.patch(model, Early()):
        assert torch.equal(logits(model, prompt(1, 50)), want)
        layer = model.model.layers[2].self_attn
        session = getattr(layer, hf.interface.ATTRIBUTE).session
        assert session.early is None
    assert snapshot(model) == before


def test_gradient_checkpointing(model: Any) -> None:
    """A layer that is run again has no early hidden states: who reads them is refused, others are served."""
    ids = prompt(1, 40)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with farspan.patch(model, Early(use=False)):
        model(ids, labels=ids).loss.backward()
    with farspan.patch(model, Early()), pytest.raises(FarspanError, match="without gradient checkpointing"):
        model(ids, labels=ids).loss.backward()


def test_observers_are_fed_them_too(model: Any, fed: list[Tensor]) -> None:
    """As the trainer observes the layers of a model that is patched densely."""
    info, seen = hf.inspect_model(model), []
    with farspan.patch(model, "dense"):
        needs = Needs(early_hidden_states=1)
        undo = [hf.observe(info, i, needs, lambda *_, inputs: seen.append(inputs)) for i in (1, 2)]
        logits(model, padded((40, 31)), use_cache=False)
        for step in undo:
            step()
    assert len(seen) == 2 and all(torch.equal(inputs.early_hidden_states, fed[0]) for inputs in seen)


def test_a_layer_without_attention_is_refused() -> None:
    with pytest.raises(Unsupported, match="hidden states of layer 0"):
        farspan.patch(make("qwen3_next"), Early(early=0))
