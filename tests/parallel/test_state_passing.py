"""State passing: mixers over contiguous shards, against the same mixers on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farspan
from farspan import Unsupported

from ..hybrid import tools
from ..runtime import small_models
from .jobs import Case, stepped, stepped_over_ranks
from .jobs_states import (
    OWN,
    Convolved,
    call_of,
    gradients,
    loss,
    masks,
    mixer_of,
    part,
    passed,
)
from .test_generate import FP32, assert_same
from .test_training import averaged
from .test_training import gradients as one_device
from .world import World

CALLS = [(5, 2, 1), (0, 21, 1), (7, 30, 8)]  # past, length, block multiple
SPECS_OF = {0: "gated_linear:window=8", 2: "gated_delta"}  # of a converted model, by layer
SPECS = [spec for spec in tools.SPECS if mixer_of(spec).halo is not None]


@pytest.mark.parametrize("spec", [*OWN, *SPECS])
def test_passed_states_are_those_of_one_device(spec: str, world: World):
    """Lengths that do not divide, empty shards, shards shorter than the halo, rows that are all padding in a
    shard, and a past."""
    mixer = mixer_of(spec)
    for size, calls in ((3, CALLS), (2, CALLS[:1]), (4, CALLS[:1])):
        ranks = world.run(passed, size, spec, calls)
        for i, (past, length, _) in enumerate(calls):
            hidden, rotary = call_of(mixer, past + length)
            old, new = part(rotary, slice(past)), part(rotary, slice(past, None))
            for kind, mask in masks(length).items():
                with torch.no_grad():
                    state = mixer(hidden[:, :past], None, None, old)[1] if past else None
                    want, after = mixer(hidden[:, past:], state, mask, new)
                real = torch.ones(3, length, dtype=torch.bool) if mask is None else mask
                for rank, found in enumerate(done[i] for done in ranks):
                    out, end, _ = found[kind]
                    where = f"rank {rank} of {size}, {past} + {length} tokens, padding {kind}"
                    assert tools.close(out[real], want[real]) and tools.same(mixer, end, after), where
                    assert tools.equal(end, ranks[0][i][kind][1]), f"not the bits of rank 0: {where}"


@pytest.mark.parametrize("spec", ["delta", "wide", *SPECS])
def test_gradients_are_those_of_one_device(spec: str, world: World):
    """In the hidden states and in every parameter; rank 0 and an empty shard take part."""
    mixer = mixer_of(spec)
    for size, length in ((3, 20), (4, 3)):
        hidden, rotary = call_of(mixer, length)
        out = mixer(hidden.requires_grad_(), None, masks(length)["left"], rotary)[0]
        mixer.zero_grad()
        loss(out, torch.arange(length)).backward()
        want = [torch.zeros_like(p) if p.grad is None else p.grad for p in (hidden, *mixer.parameters())]
        for found in world.run(gradients, size, spec, length):
            assert all(map(tools.close, found, want)), f"{size} ranks, {length} tokens"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_bytes_sent_do_not_depend_on_the_length(size: int, world: World):
    """(P - 1) times the last ``halo`` hidden states with cos and sin, and a state with its decay; float64."""
    mixer, rows, tokens = mixer_of("head"), 3, 3
    halo = rows * tokens * (8 * (mixer.hidden_size + 2 * 8) + 1)
    state = rows * 8 * (2 * 8 * 8 + 2 + 3 * 48) + rows * 8
    for short, long in (
        (done[0], done[1]) for done in world.run(passed, size, "head", [(0, 21, 1), (0, 80, 1)])
    ):
        assert short["none"][2] == long["none"][2]
        calls, sent = short["none"][2]
        assert calls == {"halo": 1, "transitions": 1}
        assert sent == {"halo": (size - 1) * halo, "transitions": (size - 1) * state}


def patched(rule: str, **more: Any) -> dict[str, Any]:
    """Options of patch: two of the three layers have a mixer."""
    return {"mixers": {0: Convolved(rule=rule).double(), 2: Convolved(rule=rule, seed=1).double()}, **more}


def test_generate_with_mixers_is_that_of_one_device(world: World):
    """Beside dense and sparse attention: padded batches, several turns, chunked prefill, beams, short
    prompts, and lengths that leave a rank without tokens."""
    beams = {"num_beams": 3, "num_return_sequences": 2}
    sparse = "block_topk:k=32,block=16 + quest:k=32"
    cases = [
        Case(lengths=(61,), patch=patched("delta")),
        Case(lengths=(70, 41, 2), turns=(20, 1), new=4, patch=patched("head")),
        Case(lengths=(90, 57), new=4, patch=patched("channel", prefill_chunk=24)),
        Case(lengths=(61, 30), new=4, how=beams, patch=patched("head")),
        Case(lengths=(9,), turns=(30,), new=3, patch=patched("delta")),
        Case(lengths=(121, 80), new=4, spec=sparse, patch=patched("head")),
        Case(lengths=(33,), new=3, spec="block_topk:k=32,block=16", patch=patched("head")),
    ]
    ranks = assert_same(world, (2, 3, 4), cases, 1e-9)
    for report in (done[0]["report"] for done in ranks):
        assert {"halo", "transitions"} <= report.traffic.keys()


@pytest.mark.parametrize("mechanism", ["ring", "ulysses", "pass_q", "usp"])
def test_mechanisms_of_attention_beside_mixers(mechanism: str, world: World):
    """The ranks' tokens are contiguous for attention as well."""
    case = Case(
        overrides={"num_key_value_heads": 4},
        lengths=(37, 90),
        turns=(40,),
        new=3,
        patch=patched("head"),
        parallel={"mechanism": mechanism} | ({"ulysses": 2} if mechanism == "usp" else {}),
    )
    assert_same(world, (4,), [case], 1e-9)


def test_sliding_layers_and_labels_beside_mixers(world: World):
    mixers = {0: Convolved().double(), 3: Convolved(rule="delta").double()}
    cases = [
        Case(model="gemma3", lengths=(90, 57), turns=(20,), new=4, patch={"mixers": mixers}),
        Case(lengths=(90, 57), new=4, spec="dense + h2o:k=24", patch=patched("head")),
        Case(
            lengths=(90, 57),
            new=4,
            spec="antidiagonal:block=16 + snapkv:k=24,window=8",
            patch=patched("head"),
        ),
    ]
    assert_same(world, (3,), cases, 1e-9)


def test_converted_models_over_ranks(world: World):
    common: dict[str, Any] = {"converted": SPECS_OF, "new": 4}
    cases = [
        Case(**common, lengths=(90, 57), turns=(20, 1)),
        Case(**common, lengths=(90, 57), patch={"prefill_chunk": 24}),
        Case(**common, lengths=(41, 30), how={"num_beams": 3, "num_return_sequences": 2}),
        Case(**common, lengths=(121, 80), spec="block_topk:k=32,block=16 + quest:k=32"),
    ]
    assert_same(world, (3,), cases, 1e-9)


@pytest.mark.parametrize("name", ["llama", "falcon_h1", "qwen3_next"])
def test_training_as_on_one_device(name: str, world: World):
    """A rank without tokens, too: 40 tokens are three blocks of 16."""
    common: dict[str, Any] = {"converted": SPECS_OF} if name == "llama" else {"model": name, **FP32}
    cases = [Case(**common, lengths=(17, 70)), Case(**common, lengths=(40,), spec="block_topk:k=32,block=16")]
    ranks = world.run(averaged, 4, cases)
    for i, case in enumerate(cases):
        _, want = one_device(case)
        for got in (done[i][1] for done in ranks):
            assert got.keys() == want.keys()
            for key, grad in want.items():
                error = (got[key] - grad).abs().max() / grad.abs().max().clamp(min=1e-6)
                assert error < (1e-8 if name == "llama" else 1e-3), f"{key} differs by {error:.1e}: {case}"


def test_a_mixer_without_transitions_is_refused():
    one = Convolved()
    one.halo = None
    with pytest.raises(Unsupported, match="the mixer convolved does not define"):
        farspan.patch(small_models.shared("llama"), mixers={1: one}, parallel="auto")


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "lfm2"])
def test_packed_keys_beside_recurrent_layers_over_ranks(name: str, world: World):
    """Ranks round their keys in groups of their own, so that logits differ by what rounding costs, and agree
    to the bit. The first call reads its own keys as they are."""
    common: dict[str, Any] = {"model": name, **FP32, "calls": (130, 1, 1, 40, 1, 1)}
    plain = stepped(Case(**common))["logits"]
    for storage in ("int8:group=16,window=8", "int4:group=16,window=8"):
        case = Case(**common, patch={"storage": storage}, parallel={"block": 16})
        alone = stepped(case)["logits"]
        ranks = [done[0]["logits"] for done in world.run(stepped_over_ranks, 2, [case])]
        costs = max((a - b).abs().max() for a, b in zip(alone, plain, strict=True))
        for i, want in enumerate(plain):
            assert torch.equal(ranks[0][i], ranks[1][i])
            error = (ranks[0][i] - want).abs().max()
            assert error <= (2 * costs if i else 5e-4), f"{name} {storage} call {i}: {error} of {costs}"


@pytest.mark.parametrize("name", [*small_models.RECURRENT, *small_models.MORE_HYBRIDS])
def test_hybrids_of_transformers_over_ranks(name: str, world: World):
    """Their recurrent layers are those of the model on one device. They compute in float32: logits of about 5
    are 1e-5 to 1e-4 apart, as after a prefill in chunks on one device; 0.2 to 6 if no state is passed."""
    common: dict[str, Any] = {"model": name, **FP32, "new": 4}
    cases = [Case(**common, lengths=(90, 57), turns=(20, 1))]
    if name in small_models.RECURRENT:
        cases += [
            Case(**common, lengths=(70, 41, 2), patch={"prefill_chunk": 24}),
            Case(**common, lengths=(17, 5), how={"num_beams": 3, "num_return_sequences": 2}),
            Case(**common, lengths=(121, 80), spec="block_topk:k=32,block=16 + quest:k=32"),
        ]
    assert_same(world, (3,), cases, 5e-4)
    assert_same(world, (2, 4), cases[:1], 5e-4)
