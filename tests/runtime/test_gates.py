"""Gates: a method of the user's own with parameters, fed queries and keys before RoPE and hidden states.

The gate is the untrained form of SeerAttention's (2410.13276): mean-pooled queries and keys before RoPE, each
through a projection of its own, choose blocks. Its oracle is a float64 computation from the outputs of the
model's own q_proj, k_proj, q_norm and k_norm.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pooled_gate import BLOCK, NAME, Anew, Gate, PooledGate
from small_models import Feed, decode, logits, make, padded, prompt, served, snapshot
from torch import Tensor

import farspan
from farspan import FarspanError, Recipe, Unsupported
from farspan.attention.needs import Inputs
from farspan.runtime import hf

NAMES = ("q", "k", "v", "out")


class Tape:
    """What every layer's projections gave and what its attention returned, call by call, in float64."""

    def __init__(self, model: Any) -> None:
        self.modules = [layer.self_attn for layer in model.model.layers]
        self.kept: list[dict[str, list[Tensor]]] = [{n: [] for n in NAMES} for _ in self.modules]
        self.undo = []
        for kept, module in zip(self.kept, self.modules, strict=True):
            d = module.head_dim
            for name in "qkv":
                source = getattr(module, f"{name}_norm", getattr(module, f"{name}_proj"))
                hook = functools.partial(self.take, kept[name], d)
                self.undo.append(source.register_forward_hook(lambda m, a, out, hook=hook: hook(out)))
            hook = functools.partial(self.take, kept["out"], d)
            self.undo.append(module.o_proj.register_forward_pre_hook(lambda m, a, hook=hook: hook(a[0])))

    @staticmethod
    def take(kept: list[Tensor], d: int, x: Tensor) -> None:
        """x [B, T, heads * D] or [B, T, heads, D] -> [B, heads, T, D]."""
        kept.append(x.detach().double().reshape(*x.shape[:2], -1, d).transpose(1, 2))

    def stop(self) -> None:
        for hook in self.undo:
            hook.remove()


def rotate(x: Tensor, theta: float) -> Tensor:
    """RoPE of x [heads, T, D] at positions 0 .. T - 1, written out."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1]).double()[:, None] * theta ** (-torch.arange(half).double() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def naive_blocks(gate: Gate, q: Tensor, k: Tensor, first: int, last: int, blocks: int) -> list[set[int]]:
    """The blocks that queries first .. last of one row read, by query head; they lie in one block."""
    group, own = len(q) // len(k), first // BLOCK
    gq, gk = gate.q.detach().double(), gate.k.detach().double()
    read = []
    for h in range(len(q)):
        query = gq @ q[h, first : last + 1].mean(0)
        score = [float(query @ (gk @ k[h // group, j * BLOCK : (j + 1) * BLOCK].mean(0))) for j in range(own)]
        ranked = sorted(range(1, own), key=lambda j: -score[j])
        forced = {0, own}
        read.append(forced | set(ranked[: max(0, blocks - len(forced))]))
    return read


def assert_naive(tape: Tape, gates: dict[int, Gate], starts: list[int], theta: float, blocks: int = 3) -> int:
    """Every attention output on the tape is that of the float64 definition. -> outputs compared."""
    compared = 0
    for layer, kept in enumerate(tape.kept):
        sizes = [x.shape[2] for x in kept["q"]]
        q, k, v, out = (torch.cat(kept[name], 2) for name in NAMES)
        for row, start in enumerate(starts):
            rq, rk, rv, ro = (x[row, :, start:] for x in (q, k, v, out))
            turned_q, turned_k = rotate(rq, theta), rotate(rk, theta)
            group, past = len(rq) // len(rk), 0
            for size in sizes:
                begin, end = max(past - start, 0), past + size - start
                step = 1 if past and size <= 16 else BLOCK
                past += size
                for first in range(begin, end, step):
                    last = min(first + step, end) - 1
                    read = naive_blocks(gates[layer], rq, rk, first, last, blocks)
                    for t in range(first, last + 1):
                        for h, chosen in enumerate(read):
                            keys = [p for p in range(t + 1) if p // BLOCK in chosen]
                            logit = turned_k[h // group, keys] @ turned_q[h, t] * rq.shape[-1] ** -0.5
                            want = logit.softmax(0) @ rv[h // group, keys]
                            assert torch.allclose(ro[h, t], want, atol=1e-5), (layer, row, t, h)
                            compared += 1
    return compared


@contextmanager
def taped(model: Any, method: PooledGate, **how: Any) -> Iterator[tuple[Any, Tape]]:
    """A patched model and the tape of its calls."""
    tape = Tape(model)
    try:
        with farspan.patch(model, method, **how) as patched:
            yield patched, tape
    finally:
        tape.stop()


def gates_of(patched: Any) -> dict[int, Gate]:
    return {index: named[NAME] for index, named in patched.modules().items()}


def theta(model: Any) -> float:
    return float(model.config.rope_parameters["rope_theta"])


@pytest.fixture(params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> Any:
    """A random model in float64."""
    return make(request.param).double()


@pytest.mark.parametrize("how", [{}, {"prefill_chunk": 24}], ids=["whole", "chunked"])
def test_selection_is_the_definitions_own(model: Any, how: dict[str, Any]) -> None:
    """Prefill, whole and in chunks, and decode steps of generate."""
    with taped(model, PooledGate(), **how) as (patched, tape):
        decode(model, prompt(1, 61), new=8)
        assert assert_naive(tape, gates_of(patched), [0], theta(model)) == 3 * 4 * 68
        report = patched.report().summary
        assert report["prefill_density"] < 0.9 and report["decode_density"] < 0.6


@pytest.mark.parametrize("how", [{}, {"prefill_chunk": 24}], ids=["whole", "chunked"])
def test_selection_in_a_left_padded_batch(model: Any, how: dict[str, Any]) -> None:
    lengths = (61, 45, 29)  # rows begin at whole blocks of each other, so that chunks are cut
    with taped(model, PooledGate(), **how) as (patched, tape):
        decode(model, padded(lengths), new=6)
        assert_naive(tape, gates_of(patched), [61 - n for n in lengths], theta(model))


def test_selection_without_a_cache(model: Any) -> None:
    with taped(model, PooledGate()) as (patched, tape):
        logits(model, padded((50, 34)), use_cache=False)
        assert_naive(tape, gates_of(patched), [0, 16], theta(model))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[1, :19] = 0
    return prompt(2, 90), mask


def test_crop_and_reorder(model: Any, batch: tuple[Tensor, Tensor]) -> None:
    """After a crop into an earlier block and after rows changed places, the next calls give what a new cache
    gives, token by token."""
    ids, mask = batch
    with farspan.patch(model, PooledGate()):
        one = Feed(model, ids, mask)
        one(60)
        steps = torch.cat([one(1) for _ in range(14)], 1)
        one.cache.crop(-11)
        one.length -= 11
        again = torch.cat([one(1) for _ in range(11)], 1)
        assert torch.allclose(again, steps[:, 3:], atol=1e-9)
        one.cache.reorder_cache(torch.tensor([1, 0]))
        one.ids, one.mask = ids[[1, 0]], mask[[1, 0]]
        two = Feed(model, ids, mask)
        two(60)
        for _ in range(14):
            two(1)
        assert torch.allclose(one(1), two(1)[[1, 0]], atol=1e-9)
        shared = copy.deepcopy(two.cache)  # a prefix that two continuations share
        want = two(3)
        two.cache, two.length = shared, two.length - 3
        assert torch.equal(two(3), want)
        two.cache.reset()
        two.length = 0
        assert torch.allclose(two(60), Feed(model, ids, mask)(60))


def test_generate_with_beams_and_assistance(model: Any) -> None:
    """Beam search reorders rows, prompt lookup crops: the same tokens as with summaries made from scratch."""
    ids = prompt(1, 30).repeat(1, 2)
    for how in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 4}):
        with farspan.patch(model, PooledGate()):
            kept = decode(model, ids, **how)
        with farspan.patch(model, Anew()):
            assert torch.equal(decode(model, ids, **how), kept)


def test_the_gate_is_a_module_that_a_recipe_keeps(model: Any, tmp_path: Any) -> None:
    with farspan.patch(model, PooledGate()) as patched:
        plain = logits(model, prompt(1, 70))
        gates = gates_of(patched)
        assert (
            len(gates) == 3
            and sum(p.numel() for g in gates.values() for p in g.parameters()) == 3 * 2 * 8 * 16
        )
        with torch.no_grad():
            for p in (p for g in gates.values() for p in g.parameters()):
                p.mul_(-1.5).add_(0.3)
        changed = logits(model, prompt(1, 70))
        patched.recipe(NAME, steps=1).save(tmp_path / "gate")
    assert not torch.allclose(plain, changed)
    loaded = Recipe.load(tmp_path / "gate")
    assert loaded.settings == {"steps": 1} and loaded.method == NAME
    with farspan.patch(model, PooledGate(trained=True), recipe=tmp_path / "gate") as patched:
        assert torch.equal(logits(model, prompt(1, 70)), changed)
        assert gates_of(patched)[0] is not gates[0]
    with pytest.raises(FarspanError, match=r"q of the sizes \[8, 16\] in layer 0, the model needs \[4, 16\]"):
        farspan.patch(model, PooledGate(trained=True, dim=4), recipe=loaded)
    with pytest.raises(FarspanError, match="needs a recipe"):
        farspan.patch(model, PooledGate(trained=True))


def test_gradients_reach_the_gate(model: Any) -> None:
    """What a trainer needs: scores of fed queries and keys, differentiable in the gate's parameters."""
    with farspan.patch(model, PooledGate()) as patched:
        given: list[Inputs] = []
        info = hf.inspect_model(model)
        undo = hf.observe(info, 1, PooledGate.needs, lambda q, k, v, _, inputs: given.append(inputs))
        logits(model, prompt(1, 40), use_cache=False)
        undo()
        gate = gates_of(patched)[1]
    (inputs,) = given
    assert inputs.hidden_states.shape == (1, 40, 64)
    (inputs.queries_before_rope.double() @ gate.q.T.double()).sum().backward()
    assert gate.q.grad is not None and bool(gate.q.grad.abs().sum() > 0)


def test_remove_leaves_nothing(model: Any) -> None:
    want, before = logits(model, prompt(1, 50)), snapshot(model)
    with farspan.patch(model, PooledGate()):
        decode(model, prompt(1, 50))
    assert snapshot(model) == before and torch.equal(logits(model, prompt(1, 50)), want)


def test_what_is_not_needed_costs_nothing() -> None:
    """No hook on attention modules, no positions in the store, for methods without such needs."""
    model = make("llama")
    with farspan.patch(model, "block_topk:k=24,block=8 + quest:k=16,dense_layers=0"):
        module = model.model.layers[0].self_attn
        assert not module._forward_pre_hooks and not model.model.rotary_emb._forward_hooks
        feed = Feed(model, prompt(1, 40), torch.ones(1, 40, dtype=torch.long))
        feed(40)
        assert feed.cache.layers[0].store.positions.length == 0


def test_what_cannot_be_served_is_refused() -> None:
    model = make("llama")
    with farspan.patch(model, "dense"):
        feed = Feed(model, prompt(1, 60), torch.ones(1, 60, dtype=torch.long))
        feed(40)
    with farspan.patch(model, PooledGate()), pytest.raises(FarspanError, match="positions of these keys"):
        feed(1)
    stretched = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    longer = make("llama", rope_parameters=stretched)
    before = snapshot(longer)
    with pytest.raises(Unsupported, match="'dynamic' depends on the length"):
        farspan.patch(longer, PooledGate())
    assert snapshot(longer) == before
    with pytest.raises(FarspanError, match="only calls of a patched model"):
        farspan.tune(model, PooledGate(), lengths=[64], repeats=1)


@pytest.mark.parametrize("name", ["phi3", "gemma3", "gpt_oss", "qwen3_next", "falcon_h1", "olmo_hybrid"])
def test_other_architectures(name: str) -> None:
    """Fused projections, norms behind projections, two rotary embeddings, partial rotation: the input of the
    family's own ``apply_rotary_pos_emb`` is the oracle."""
    model = make(name)
    apart = inspect.getmodule(type(hf.inspect_model(model).attention[served(model)[0]]))
    apply, seen, fed = apart.apply_rotary_pos_emb, [], []

    def spy(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((q, k))
        return apply(q, k, cos, sin, *args, **kwargs)

    info = hf.inspect_model(model)
    with farspan.patch(model, "dense"), pytest.MonkeyPatch.context() as patching:
        keep = [
            hf.observe(info, i, PooledGate.needs, lambda *_, inputs: fed.append(inputs))
            for i in info.attention
        ]
        patching.setattr(apart, "apply_rotary_pos_emb", spy)
        logits(model, padded((40, 31)), use_cache=False)
        patching.undo()
        assert len(fed) == len(seen) == len(info.attention)
        for inputs, (q, k) in zip(fed, seen, strict=True):
            assert torch.allclose(inputs.queries_before_rope, q, atol=1e-4 * float(q.abs().max()))
            assert torch.allclose(inputs.keys_before_rope, k, atol=1e-4 * float(k.abs().max()))
        for undo in keep:
            undo()
