"""Mixers in a tiny Llama, some with a state that grows: a padded batch equals its rows alone, in chunks,
steps and ``generate``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import Feed, decode, logits, make, padded, prompt
from torch import Tensor

import farspan
from farspan import FarspanError
from farspan.attention.hybrid import Geometry, Mixer, parse_mixer

GEOMETRY = Geometry(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
SPECS = ("sigmoid:length=64", "scout:mixer=aaren", "scout:mixer=none,every=3")
KEYS = 2 * 2 * 16  # numbers of one token's keys and values


def mixer(spec: str, seed: int = 3) -> Mixer:
    torch.manual_seed(seed)
    made = parse_mixer(spec, GEOMETRY).double()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made


@pytest.fixture
def model() -> Any:
    return make("llama").double()


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def alone(model: Any, ids: Tensor) -> Tensor:
    """Logits [T, V] of one row in one call."""
    return logits(model, ids[None], use_cache=False)[0]


@pytest.mark.parametrize("how", [{}, {"prefill_chunk": 20}], ids=["whole", "chunked"])
def test_a_padded_batch_is_its_rows_alone(spec: str, model: Any, how: dict[str, Any]) -> None:
    """The rows begin at 0, 13 and 36, and every call ends between two checkpoints of some row."""
    inputs = padded((52, 39, 16))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with farspan.patch(model, mixers={1: mixer(spec)}, **how) as patched:
        feed = Feed(model, ids, mask)
        got = torch.cat([feed(41), *(feed(1) for _ in range(8)), feed(3)], 1)
        for row in range(3):
            want = alone(model, ids[row, mask[row].bool()])
            assert torch.allclose(got[row, -len(want) :], want, atol=1e-9), row
        assert patched.report().mixers[0].mixer == spec.partition(":")[0]


def test_generate_and_beams(spec: str, model: Any) -> None:
    inputs = padded((25, 14))
    with farspan.patch(model, mixers={1: mixer(spec)}):
        tokens = decode(model, inputs, new=9)
        for row in range(2):
            ids = inputs["input_ids"][row, inputs["attention_mask"][row].bool()]
            want = alone(model, torch.cat([ids, tokens[row]]))
            assert torch.equal(want[len(ids) - 1 : -1].argmax(-1), tokens[row])
        beams = decode(model, inputs, new=9, num_beams=3)
        assert torch.equal(beams, decode(model, inputs, new=9, num_beams=3, use_cache=False))


def test_rows_are_reordered_repeated_and_selected(spec: str, model: Any) -> None:
    inputs = padded((28, 13))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with farspan.patch(model, mixers={1: mixer(spec)}):
        feed = Feed(model, ids, mask)
        feed(24)
        kept = copy.deepcopy(feed.cache)
        want = feed(4)
        feed.cache, feed.length = kept, 24
        feed.cache.batch_repeat_interleave(2)
        feed.cache.batch_select_indices(torch.tensor([3, 0]))
        feed.cache.reorder_cache(torch.tensor([0, 1]))
        feed.ids, feed.mask = ids[[1, 0]], mask[[1, 0]]
        assert torch.allclose(feed(4), want[[1, 0]], atol=1e-9)
        feed.cache.reset()
        feed.length = 0
        assert torch.allclose(feed(28)[:, -4:], want[[1, 0]], atol=1e-9)


def test_the_report_says_how_a_state_grows(model: Any) -> None:
    mixers = {0: mixer("sigmoid"), 1: mixer("aaren"), 2: mixer("scout:mixer=none")}
    with farspan.patch(model, mixers=mixers) as patched:
        decode(model, prompt(1, 30), new=5)
        grown, fixed, tenth = patched.report().mixers
        assert (grown.bytes_per_token, grown.state_bytes) == (8 * KEYS, 8 * KEYS * 34 + 8)
        assert (fixed.bytes_per_token, fixed.state_bytes) == (0, 8 * 4 * 17)
        assert (tenth.bytes_per_token, tenth.state_bytes) == (0.8 * KEYS, 8 * KEYS * 3 + 8)
        text = str(patched.report())
    assert "pairs not counted, a state of 17.4 kB a row and layer, 512 B more a token" in text
    assert "mixer aaren in layers 1: no pairs, a state of 544 B a row and layer; 5 calls" in text


@pytest.mark.parametrize("kind", ["sigmoid", "scout:mixer=none,every=4"])
def test_a_state_of_keys_alone_is_cropped(model: Any, kind: str) -> None:
    inputs = padded((40, 6))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with farspan.patch(model, mixers={1: mixer(kind)}):
        feed = Feed(model, ids, mask)
        want = feed(36)[:, 30:]
        feed.cache.crop(-6)  # a row keeps none of its tokens
        feed.length = 30
        assert torch.allclose(feed(6)[mask[:, 30:36].bool()], want[mask[:, 30:36].bool()], atol=1e-9)
        one = prompt(1, 30).repeat(1, 2)
        assert torch.equal(decode(model, one), decode(model, one, prompt_lookup_num_tokens=4))
        right = Feed(model, ids, mask.flip(1))
        with torch.no_grad():
            right.cache = model(ids, attention_mask=mask.flip(1), use_cache=True).past_key_values
        with pytest.raises(FarspanError, match="padding on the right: pad on the left"):
            right.cache.crop(-1)
