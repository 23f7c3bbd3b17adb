"""``generate`` over ranks: architectures, mechanisms, what is stored, what is sent, and what is refused."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch

import farspan
from farspan.attention.errors import Unsupported
from farspan.parallel.group.comm import Ranks
from farspan.parallel.mechanisms.layout import zigzag

from ..runtime import small_models
from .jobs import BLOCK, Case, generated, model_of, over_ranks, prompts
from .world import World

FP32 = {"dtype": torch.float32}


def assert_same(world: World, sizes: tuple[int, ...], cases: list[Case], bound: float) -> list[Any]:
    """Every rank has the tokens and logits of one device; -> what the last size has given, by rank."""
    ranks: list[Any] = []
    alone = [generated(case) for case in cases]
    for size in sizes:
        ranks = world.run(over_ranks, size, cases)
        for i, (case, want) in enumerate(zip(cases, alone, strict=True)):
            for rank, got in enumerate(done[i] for done in ranks):
                where = f"rank {rank} of {size}, {case}"
                for a, b in zip(got["tokens"], want["tokens"], strict=True):
                    assert torch.equal(a, b), f"other tokens: {where}"
                for a, b in zip(got["logits"], want["logits"], strict=True):
                    assert (a - b).abs().max() <= bound, f"logits {(a - b).abs().max():.1e} apart: {where}"
    return ranks


SERVED = [name for name in small_models.ARCHITECTURES if name not in small_models.RECURRENT]


@pytest.mark.parametrize("name", SERVED)
def test_architectures(name: str, world: World):
    """Grouped heads, sliding layers, soft-caps, sinks, experts; padded, and on a spread cache."""
    experts = name in ("gpt_oss", "qwen3_moe")  # whose kernel knows no float64
    dtype = torch.float32 if experts else torch.float64
    cases = [
        Case(model=name, dtype=dtype, lengths=(90,)),
        Case(model=name, dtype=dtype, lengths=(70, 41), turns=(20, 1), new=4),
    ]
    assert_same(world, (3,), cases, 5e-5 if experts else 1e-9)


@pytest.mark.parametrize("spec", ["dense", "quest:k=16,page=4,dense_layers=0", "block_topk:k=16,block=8"])
def test_stores_in_host_memory(spec: str, world: World):
    """Each rank's part of the keys is in another memory; padded, and in several turns. One process has the
    same storage, whose results law 10 compares with those of the device."""
    case = {"spec": spec, "patch": {"storage": "host:cached=64"}}
    cases = [Case(**case, lengths=(90,)), Case(**case, lengths=(70, 41), turns=(20, 1), new=4)]
    assert_same(world, (2,), cases, 1e-9)


def test_packed_stores(world: World):
    """Padded rows in several turns, and beams, which reorder packed rows. While nothing is packed, results
    are those of one device. After that ranks agree to the bit, and so does the first token of one device,
    since a call reads its own keys as they are; later ones are law 6's (tests/laws/test_storages.py)."""
    ways: list[dict[str, Any]] = [
        {"lengths": (90, 57), "turns": (40, 1), "new": 4},
        {"lengths": (90, 57), "new": 4, "how": {"num_beams": 3}},
    ]
    cases = [Case(**way, patch={"storage": "int8:window=256"}) for way in ways]
    plain = assert_same(world, (2,), cases, 1e-9)[0]
    packed = [Case(**way, patch={"storage": "int4:group=16,window=8"}) for way in ways]
    ranks = world.run(over_ranks, 2, packed)
    for before, one, other in zip(plain, *ranks, strict=True):
        for a, b in zip(one["tokens"] + one["logits"], other["tokens"] + other["logits"], strict=True):
            assert torch.equal(a, b)
        first, want = one["logits"][0], before["logits"][0]
        assert (first[:, 0] - want[:, 0]).abs().max() <= 1e-9 < (first - want).abs().max()


ROPE_BY_LENGTH: dict[str, dict[str, Any]] = {
    "phi3": {
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 64,
        },
    },
    "llama": {
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    },
}


@pytest.mark.parametrize("name", ROPE_BY_LENGTH)
def test_rope_whose_frequencies_depend_on_the_length(name: str, world: World):
    """f01: every rank's share of a call is rotated by the length of the whole call, in chunks as well. From
    57 tokens, answering crosses the boundary."""
    common: dict[str, Any] = {"model": name, "overrides": ROPE_BY_LENGTH[name]}
    cases = [
        Case(**common, lengths=(90, 57)),
        Case(**common, lengths=(57,), new=12),
        Case(**common, lengths=(90,), patch={"prefill_chunk": 24}),
        Case(**common, lengths=(70, 41), turns=(40, 1), new=4),
    ]
    assert_same(world, (3,), cases, 1e-9)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 3), (8, 2)], ids=str)
def test_any_number_of_heads_and_mechanism(heads: tuple[int, int], world: World):
    overrides = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "hidden_size": 96}
    common: dict[str, Any] = {"overrides": overrides, "lengths": (37, 90), "turns": (40,), "new": 3}
    cases = [
        Case(**common, parallel={"mechanism": mechanism})
        for mechanism in ("gather", "ring", "ulysses", "pass_q")
    ]
    assert_same(world, (3,), cases[:2], 1e-9)
    assert_same(world, (4,), [*cases, Case(**common, parallel={"mechanism": "usp", "ulysses": 2})], 1e-9)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_float32_logits(name: str, world: World):
    """At the scale of a trained model's weights: greedy tokens equal, logits within 1e-5."""
    common: dict[str, Any] = {"model": name, **FP32, "overrides": {"initializer_range": 0.05}}
    cases = [Case(**common, lengths=(n,)) for n in (5, 61, 257, 500)]
    assert_same(world, (2, 3, 4), cases, 1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_bfloat16_tokens(name: str, world: World):
    """The same tokens on every rank; as on one device until the two best are closer than rounding."""
    case = Case(model=name, dtype=torch.bfloat16, lengths=(257,), new=24)
    exact = generated(dataclasses.replace(case, dtype=torch.float64, new=1))
    want = generated(case)
    bound = 2 * (want["logits"][0][:, 0].double() - exact["logits"][0][:, 0]).abs().max()
    for size in (2, 3):
        every = [done[0] for done in world.run(over_ranks, size, [case])]
        assert all(torch.equal(got["tokens"][0], every[0]["tokens"][0]) for got in every)
        new = every[0]["tokens"][0][0, 257:]
        other = (new != want["tokens"][0][0, 257:]).nonzero()
        first = int(other[0]) if len(other) else len(new) - 1
        logits, alone = every[0]["logits"][0][0, : first + 1], want["logits"][0][0, : first + 1]
        assert (logits.float() - alone.float()).abs().max() <= 2 * bound
        if len(other):
            best = alone[first].float().topk(2).values
            assert best[0] - best[1] <= 2 * bound, f"step {first} of {size} ranks"


@pytest.mark.parametrize("mechanism", ["ulysses", "usp", "ring", "pass_q"])
def test_selective_methods_whatever_is_asked_for(mechanism: str, world: World):
    """A group's heads choose together, so heads are shared out by whole groups or not at all."""
    cases = [
        Case(
            overrides={"num_key_value_heads": kv},
            spec=f"block_topk:k=48,block=16,gqa_reduce={share}",
            lengths=(241, 90),
            new=3,
            parallel={"mechanism": mechanism} | ({"ulysses": 2} if mechanism == "usp" else {}),
        )
        for kv, share in ((2, "sum"), (4, "none"))
    ]
    ranks = assert_same(world, (4,), cases, 1e-9)
    assert_same(world, (3,), cases if mechanism != "usp" else [], 1e-9)
    if mechanism == "ulysses":
        ways = [list(got["report"].layers[0].phases["prefill"].mechanisms) for got in ranks[0]]
        assert ways == [["fetch"], ["ulysses"]]


def test_a_mechanism_that_cannot_serve_is_named(world: World):
    case = Case(
        overrides={"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96},
        parallel={"mechanism": "ulysses"},
    )
    [got] = world.run(over_ranks, 4, [case])[0]
    [(name, why)] = got["report"].layers[0].phases["prefill"].mechanisms.items()
    assert name == "gather" and why.startswith("ulysses was asked for, but") and "6 query heads" in why


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bytes_sent_and_kept_follow_the_formulas(size: int, world: World):
    case = Case(**FP32, lengths=(1021, 700), new=9, overrides={"max_position_embeddings": 2048})
    h, hkv, d, e, b = 4, 2, 16, 4, 2
    filled = zigzag(0, 1021, size).rows * size
    for rank, [got] in enumerate(world.run(over_ranks, size, [case])):
        layer = got["report"].layers[1].phases
        assert layer["prefill"].sent_bytes == b * (size - 1) * filled // size * 2 * hkv * d * e
        assert layer["prefill"].dense_sent_bytes == layer["prefill"].sent_bytes
        assert layer["decode"].calls == 8
        assert layer["decode"].sent_bytes == 8 * b * (size - 1) * h * (d * e + 4)
        total = 1021 + 8
        assert got["seen"] == total
        assert all(rows <= total / size + BLOCK for rows in got["rows"]), rank


def counted(group: Any, case: Case) -> list[dict[str, int]]:
    """The collectives of each decode call of a case."""
    found: list[dict[str, int]] = []
    seen: list[Any] = []
    original = Ranks.counted

    def spy(self: Ranks, name: str, sent: int) -> Any:
        seen.append(name)
        return original(self, name, sent)

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(Ranks, "counted", spy)
        over_ranks(group, [case])
    calls: list[str] = []
    for name in [*seen, "agree"]:
        if name == "agree":  # one before each call
            found.append({n: calls.count(n) for n in calls})
            calls = []
        else:
            calls.append(name)
    return found


@pytest.mark.parametrize(
    ("spec", "each"),
    [
        ("dense", {"partials": 1}),
        ("window:w=20", {"partials": 1}),
        ("quest:k=16,page=4,dense_layers=0", {"partials": 1}),
        ("recycled:k=24,stride=100", {"partials": 1}),
        # A global cut over single keys: the shares of grouped heads need a normaliser of their own.
        ("recycled:k=24,stride=1", {"normaliser": 1, "candidates": 1, "partials": 1}),
    ],
)
def test_collectives_of_a_decode_step(spec: str, each: dict[str, int], world: World):
    layers = 3
    for calls in world.run(counted, 3, Case(spec=spec, lengths=(61,), new=6)):
        assert calls[-1] == {name: n * layers for name, n in each.items()}


@pytest.mark.parametrize(
    ("spec", "how"),
    [
        ("dense", {}),
        ("quest:k=16,page=4,dense_layers=0", {"prompt_lookup_num_tokens": 3}),
        ("dense", {"top_k": 5, "do_sample": True}),
        ("dense", {"num_beams": 3, "num_return_sequences": 2}),
    ],
)
def test_other_ways_to_generate(spec: str, how: dict[str, Any], world: World):
    assert_same(world, (3,), [Case(spec=spec, lengths=(61,), how=how, new=12)], 1e-9)


def test_selected_keys_alone_travel(world: World):
    """With a block per query block, far less is sent than by dense attention."""
    case = Case(
        lengths=(1000,), spec="block_topk:k=32,block=16", new=2, overrides={"max_position_embeddings": 2048}
    )
    for [got] in world.run(over_ranks, 4, [case]):
        prefill = got["report"].layers[0].phases["prefill"]
        assert list(prefill.mechanisms) == ["fetch"]
        assert 0 < prefill.sent_bytes < 0.5 * prefill.dense_sent_bytes


def test_recurrent_layers_that_farspan_does_not_know_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("farspan.runtime.hf.models.passes_states", lambda module: False)
    with pytest.raises(Unsupported, match="'linear_attention' have a recurrent state that farspan does not"):
        farspan.patch(small_models.shared("qwen3_next"), parallel="auto")


def outside(group: Any) -> list[str]:
    """What happens to a spread cache once its patch is gone, and to a deep copy of it."""
    import copy

    case = Case()
    model, (ids, mask) = model_of(case), prompts(case)
    config = farspan.ContextParallel(mesh=group)
    with farspan.patch(model, parallel=config):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True)
        cache = out.past_key_values
        again = copy.deepcopy(cache)
        more = torch.cat([out.sequences, ids[:, :4]], 1)
        first = model.generate(more, max_new_tokens=3, past_key_values=cache)
        second = model.generate(more, max_new_tokens=3, past_key_values=again)
    said = [str(torch.equal(first, second))]
    for patch in (None, farspan.patch):
        patched = patch(model) if patch else None
        try:
            model(ids[:, :3], past_key_values=cache)
        except farspan.FarspanError as error:
            said.append(str(error))
        if patched:
            patched.remove()
    return said


def test_a_spread_cache_outside_its_patch(world: World):
    for same, unpatched, alone in world.run(outside, 2):
        assert same == "True"
        assert "not patched over these ranks" in unpatched
        assert "parallel=" in alone


def with_other_inputs(group: Any) -> str:
    model, (ids, _) = model_of(Case()), prompts(Case())
    with farspan.patch(model, parallel=farspan.ContextParallel(mesh=group)):
        if torch.distributed.get_rank(group) == 1:
            ids[0, 7] += 1
        try:
            model.generate(ids, max_new_tokens=2)
        except farspan.FarspanError as error:
            return str(error)
    return ""


def test_other_inputs_on_a_rank_are_found(world: World):
    for said in world.run(with_other_inputs, 3):
        assert "the input on rank 1" in said


def out_of_memory_on_a_rank(group: Any) -> str:
    model, (ids, _) = model_of(Case()), prompts(Case())

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")

    if torch.distributed.get_rank(group) == 2:
        model.get_decoder().layers[1].mlp.register_forward_pre_hook(fail)
    with farspan.patch(model, parallel=farspan.ContextParallel(mesh=group, timeout=20)):
        try:
            model.generate(ids, max_new_tokens=2)
        except farspan.FarspanError as error:
            return str(error)
    return ""


def test_out_of_memory_on_a_rank_is_said_by_all():
    world = World()  # of its own: the group is of no use afterwards
    try:
        began = time.monotonic()
        for said in world.run(out_of_memory_on_a_rank, 3):
            assert "ank 2 ran out of memory" in said and "20.00 GiB" in said
        assert time.monotonic() - began < 30
    finally:
        world.stop()


def plain_calls(group: Any) -> list[torch.Tensor]:
    """Calls without generate: every position's logits, the last ones', hidden states, embeddings, no
    cache."""
    case = Case(lengths=(45, 90))
    model, (ids, mask) = model_of(case), prompts(case)
    parallel = None if group is None else farspan.ContextParallel(mesh=group)
    embeddings = model.get_input_embeddings()(ids)
    with farspan.patch(model, parallel=parallel), torch.no_grad():
        whole = model(ids, attention_mask=mask, output_hidden_states=True)
        return [
            whole.logits[mask.bool()],
            *(x[mask.bool()] for x in whole.hidden_states),
            model(ids, attention_mask=mask, logits_to_keep=3).logits,
            model(ids, attention_mask=mask, logits_to_keep=torch.tensor([44, 80])).logits,
            model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits[mask.bool()],
            model.get_decoder()(ids, attention_mask=mask).last_hidden_state[mask.bool()],
        ]


def test_calls_without_generate(world: World):
    alone = plain_calls(None)
    for size in (2, 3):
        for got in world.run(plain_calls, size):
            for i, (a, b) in enumerate(zip(got, alone, strict=True)):
                assert a.shape == b.shape and (a - b).abs().max() < 1e-9, f"output {i}"
