"""Methods with chunks of any length against their definitions in ``naive_chunks``: what they read, step by
step, and the losses that their modules learn by."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import farspan
from farspan import FarspanError
from farspan.attention.boundaries import chunk_numbers, highest_apart, within
from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.method import LayerInfo
from farspan.attention.needs import Inputs
from farspan.attention.softmax import Softmax
from farspan.attention.sparse import dhsa_boundaries

from . import naive, naive_chunks
from .test_definitions import grouped, reads
from .test_definitions_blocks import assert_as_defined
from .tools import HKV, D, Data, H, Stream, layer_info, recorded

STEPS = 40


def randomised(method: Any, layer: LayerInfo, seed: int = 0) -> Any:
    """``method`` as it begins its training, its module in float64 with random weights."""
    served = method.for_training(layer)
    generator = torch.Generator().manual_seed(seed)
    for p in served.module.double().parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * p.shape[-1] ** -0.5
    return served


# --- chunks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [None, [0, 7, 30]])
def test_chunks_are_those_of_a_walk_over_the_tokens(start: list[int] | None) -> None:
    ends = torch.rand(3, 30, generator=torch.Generator().manual_seed(0)) < 0.2
    firsts = start or [0, 0, 0]
    numbers = chunk_numbers(within(ends, 5, None if start is None else torch.tensor(start)))
    for b, first in enumerate(firsts):
        want = naive_chunks.chunks_of(ends[b, first:].tolist(), 5)
        got: dict[int, list[int]] = {}
        for t in range(first, 30):
            got.setdefault(int(numbers[b, t]), []).append(t - first)
        assert list(got.values()) == want


def test_non_maximum_suppression_is_greedy() -> None:
    scores = torch.rand(4, 50, generator=torch.Generator().manual_seed(0))
    scores[1] = (scores[1] * 4).round() / 4  # ties
    got = highest_apart(scores, 7, 3, 0.3)
    for row, places in zip(scores.tolist(), got.tolist(), strict=True):
        taken: list[int] = []
        for at in sorted(range(50), key=lambda at: (-row[at], at)):
            if len(taken) < 7 and row[at] > 0.3 and all(abs(at - other) > 3 for other in taken):
                taken.append(at)
        assert places == sorted(taken) + [50] * (7 - len(taken))


# --- ChunkLLM ---------------------------------------------------------------------------------------

CHUNKLLM: list[dict[str, Any]] = [
    {"fraction": 0.3, "longest": 6, "alpha": 0.8},
    {"fraction": 0.5, "longest": 20, "alpha": 0.7},
    {"k": 16, "fraction": None, "longest": 9, "sinks": 1, "alpha": 0.6},
    {"k": 12, "fraction": None, "longest": 4, "sinks": 0, "alpha": 1.0},  # no boundaries but the longest
    {"k": 30, "fraction": None, "longest": 1},  # every token is a chunk
]


@pytest.mark.parametrize("settings", CHUNKLLM, ids=str)
@pytest.mark.parametrize(
    ("prompt", "starts"), [(60, None), (60, [0, 20, 47, 58]), (10, None), (18, [0, 3, 17])]
)
def test_chunkllm_step_by_step(settings: dict[str, Any], prompt: int, starts: list[int] | None) -> None:
    """One crop among the steps. Summaries are read of the rows that choose, and of no others."""
    method = farspan.methods()["chunkllm"](**settings, boundary_layer=0, gate_dim=6)
    served = randomised(method, layer_info())
    weights = {name: p.detach() for name, p in served.module.named_parameters()}
    data = Data.random(prompt + STEPS, starts, seed=3)
    hidden = data.q.transpose(1, 2).flatten(2)
    known = {name: getattr(method, name) for name in ("k", "fraction", "alpha", "longest", "sinks")}
    known |= {"wq": weights["q"], "wk": weights["k"], "wb": weights["boundary.weight"][0]}
    firsts = data.starts or [0]
    rows = [naive_chunks.ChunkLLMRow(**known, bias=float(weights["boundary.bias"])) for _ in firsts]
    stream = Stream(served, data)
    stream.call(prompt)
    for row, b, first in zip(rows, range(len(firsts)), firsts, strict=True):
        q = grouped(data.q[b, :, prompt - 1], HKV)
        row.prefilled(q, data.k[b, :, first:prompt], hidden[b, first:prompt])
    chosen, sparse = [], 0
    for n in range(prompt + 1, prompt + STEPS + 1):
        if n == prompt + 25:
            stream.state.clear()  # what KVStore.crop does to a method's state
            for row in rows:
                row.cropped()
        before = sum(row.choices for row in rows)
        with recorded(served) as seen:
            part = stream.call(n)
        for b, first in enumerate(firsts):
            q, k, v = data.q[b, :, n - 1], data.k[b, :, first:n], data.v[b, :, first:n]
            want = rows[b].step(grouped(q, HKV), k, hidden[b, first:n])
            got = reads(seen[0], b, first, H)[0]
            for h in range(H):
                head = h * HKV // H
                assert got[h] == want[head], f"step {n - prompt}, row {b}, head {h}"
                out = naive.attention(q[h], k[head], v[head], want[head], data.scale)
                assert (part.out[b, h, 0] - out).abs().max() < 1e-12
            sparse += len(want[0]) < n - first
        choices = sum(row.choices for row in rows) - before
        chosen.append(choices > 0)
        label = HKV * 6 * 8 + 1  # bytes of a token: compressed keys of 6 float64, whether it ends a chunk
        assert stream.reads[-1].selection_bytes == choices * n * label
    assert sparse > 0
    if starts is None and method.longest > 1:
        assert sum(chosen) < 0.6 * STEPS


def test_several_candidates_at_once_read_what_single_steps_read() -> None:
    method = farspan.methods()["chunkllm"](fraction=0.3, longest=6, alpha=0.8, boundary_layer=0, gate_dim=6)
    served, data = randomised(method, layer_info()), Data.random(80, [0, 31])
    one, many = Stream(served, data).run([60, *range(61, 81)]), Stream(served, data).run([60, 71, 80])
    assert (one.out - many.out).abs().max() < 1e-12


def window(method: Any, length: int, seed: int = 0) -> tuple[Tensor, Keys]:
    """Queries and keys of a window of two rows, with what ``method`` is fed in training."""
    data = Data.random(length, [0, 0], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, length, 20, generator=generator, dtype=torch.float64)
    ends = torch.rand(2, length, generator=generator) < 0.2
    fed = Inputs(
        needs=method.needs, q=data.q, k=data.k, hidden=hidden, length=length, early=hidden, ends=ends
    )
    return data.q, Keys(kv=KV(data.k, data.v), tq=length, softmax=Softmax(data.scale), fed=fed)


def assert_gradients(module: torch.nn.Module, loss: Tensor, want: Tensor) -> None:
    """The loss and its gradients equal those of the definition, which is written with the same parameters."""
    torch.testing.assert_close(loss, want, rtol=1e-11, atol=0)
    parameters = dict(module.named_parameters())
    for name, one, two in zip(
        parameters,
        torch.autograd.grad(loss, list(parameters.values())),
        torch.autograd.grad(want, list(parameters.values())),
        strict=True,
    ):
        assert bool(two.abs().max() > 0), name
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_the_loss_of_chunkllm_and_its_gradients() -> None:
    method = farspan.methods()["chunkllm"](longest=7, gate_dim=5)
    layer = LayerInfo(index=1, num_heads=H, num_kv_heads=HKV, head_dim=D, hidden_size=20)
    served = randomised(method, layer)
    q, keys = window(method, 33)
    inputs, module = keys.inputs, served.module
    want = naive_chunks.chunk_loss(
        q, keys.kv.k, inputs.early_hidden_states, inputs.sentence_ends, 7, keys.softmax.scale,
        module.q, module.k, module.boundary.weight[0], module.boundary.bias,
    )  # fmt: skip
    assert_gradients(module, served.distillation_loss(q, keys), want)


def learns(served: Any, q: Tensor, keys: Keys, steps: int = 60) -> Iterator[float]:
    optimizer = torch.optim.AdamW(served.module.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(steps):
        loss = served.distillation_loss(q, keys)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield float(loss.detach())


def test_chunkllm_learns_on_sampled_queries() -> None:
    """A window with more queries than are compared; float32 modules, as the trainer has them."""
    method = farspan.methods()["chunkllm"](longest=12, gate_dim=8)
    layer = LayerInfo(index=1, num_heads=H, num_kv_heads=HKV, head_dim=D, hidden_size=20)
    torch.manual_seed(0)
    served = method.for_training(layer)
    other = method.for_training(LayerInfo(index=2, num_heads=H, num_kv_heads=HKV, head_dim=D, hidden_size=20))
    for name, p in served.module.boundary.named_parameters():
        assert torch.equal(p, dict(other.module.boundary.named_parameters())[name]), "alike in every layer"
    losses = list(learns(served, *window(method, 150)))
    assert losses[-1] < 0.7 * losses[0]


def test_chunkllm_is_refused_where_it_lacks_what_it_needs() -> None:
    method = farspan.methods()["chunkllm"]()
    layer = LayerInfo(index=0, num_heads=H, num_kv_heads=HKV, head_dim=D, hidden_size=20)
    assert method.for_training(layer) is None, "layers below the boundary layer are dense"
    known = dataclasses.replace(layer, num_layers=3)
    for bind in (method.for_training, farspan.methods()["chunkllm"](boundary_layer=2).for_training):
        assert bind(known) is None
    beyond = farspan.methods()["chunkllm"](boundary_layer=3)
    for bind in (beyond.for_training, beyond.for_layer):
        with pytest.raises(
            FarspanError, match="boundary_layer is at most 2 in this model of 3 layers; got 3"
        ):
            bind(known)
    with pytest.raises(FarspanError, match="one earlier layer"):
        _ = method.needs | farspan.methods()["chunkllm"](boundary_layer=2).needs
    q, keys = window(method, 20)
    fed = Inputs(needs=method.needs, q=q, k=keys.kv.k, hidden=q[:, 0], length=20)
    for name in ("early_hidden_states", "sentence_ends"):
        with pytest.raises(FarspanError, match="This call has no"):
            getattr(fed, name)


# --- DHSA with learned boundaries -------------------------------------------------------------------

LEARNED: list[dict[str, Any]] = [
    {"fraction": 0.3, "block_q": 16, "block_k": 8, "segment": 32, "local": 5, "apart": 2},
    {"fraction": 0.4, "block_q": 8, "block_k": 5, "segment": 40, "local": 1, "apart": 8, "gqa_reduce": "max"},
    {"k": 40, "fraction": None, "block_q": 8, "block_k": 4, "segment": 24, "apart": 0, "gqa_reduce": "sum"},
]


def _layers(module: Any) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        "hidden": (module.hidden.weight, module.hidden.bias),
        "out": (module.out.weight, module.out.bias),
    }


@pytest.mark.parametrize("settings", LEARNED, ids=str)
@pytest.mark.parametrize("cuts", [[150], [96, 150], [37, 90, 150]])
@pytest.mark.parametrize("starts", [None, [0, 21, 120]])
def test_learned_dhsa(settings: dict[str, Any], cuts: list[int], starts: list[int] | None) -> None:
    method = farspan.methods()["dhsa"](boundaries="learned", gate_dim=8, **settings)
    layer = LayerInfo(index=0, num_heads=4, num_kv_heads=1, head_dim=D)
    served, data = randomised(method, layer), Data.random(150, starts)
    data = Data(data.q[:, :4], data.k[:, :1], data.v[:, :1], data.starts)
    found = []

    def define(q: Tensor, k: Tensor, past: int, _: int) -> list[list[set[int]]]:
        places, n = range(4, len(k) - 3), len(k)
        with torch.no_grad():
            logits = {
                at: float(naive_chunks.boundary_logit(k[None], at, **_layers(served.module))) for at in places
            }
        chunks = naive_chunks.learned_chunks(logits, n, method.segment, method.block_k, method.apart)
        found.extend(chunks)
        how = {
            name: getattr(method, name) for name in ("fraction", "block_q", "block_k", "local", "gqa_reduce")
        }
        return naive_chunks.learned_dhsa(q, k, chunks, past=past, size=method.k, scale=data.scale, **how)

    shares = assert_as_defined(served, data, cuts, define)
    assert shares[-1] < 0.8
    assert len({len(chunk) for chunk in found}) > 3, "chunks of several lengths"


def test_the_predictor_sees_every_kv_head_and_its_loss_is_the_definition_s() -> None:
    method = farspan.methods()["dhsa"](boundaries="learned", gate_dim=8)
    served = randomised(method, layer_info())
    q, keys = window(method, 40)
    layers = _layers(served.module)
    logits = served.module(keys.kv.k)
    for at in range(40):
        if 4 <= at <= 36:
            want = naive_chunks.boundary_logit(keys.kv.k[1], at, **layers)
            torch.testing.assert_close(logits[1, at], want, rtol=1e-12, atol=1e-12)
        else:
            assert logits[1, at] == -torch.inf
    want = naive_chunks.boundary_loss(q, keys.kv.k, keys.softmax.scale, **layers)
    assert_gradients(served.module, served.distillation_loss(q, keys), want)


def test_the_predictor_scores_tiles_of_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its features, 4 numbers for each number of the keys, are never made of the whole text."""
    method = farspan.methods()["dhsa"](boundaries="learned", gate_dim=8)
    module = randomised(method, layer_info()).module
    k = torch.randn(2, HKV, 3000, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        logits = module(k)
    assert max(sizes) <= 2 * 1024 * (4 * HKV * D + 1) < k.numel() * 2
    for length in (7, 8, 9, 29, 30, 31):
        for tile in (1, 11):
            monkeypatch.setattr(dhsa_boundaries, "TILE", tile)
            got = module(k[:, :, :length])
            torch.testing.assert_close(got[:, 4 : length - 3], logits[:, 4 : length - 3], rtol=0, atol=1e-12)
            assert got.shape == (2, length) and int(got.isfinite().sum()) == 2 * max(0, length - 7)


def test_learned_dhsa_learns() -> None:
    method = farspan.methods()["dhsa"](boundaries="learned")
    torch.manual_seed(0)
    served = method.for_training(layer_info())
    losses = list(learns(served, *window(method, 200)))
    assert losses[-1] < 0.97 * losses[0]  # the labels of random keys are hard to learn


def test_learned_dhsa_needs_a_recipe_and_the_fixed_one_none() -> None:
    fixed, learned = (farspan.methods()["dhsa"](boundaries=x) for x in ("fixed", "learned"))
    assert not fixed.trains and not fixed.needs.recipe and learned.trains and learned.needs.recipe
    with pytest.raises(FarspanError, match="farspan train dhsa:boundaries=learned"):
        learned.for_layer(layer_info())
    with pytest.raises(FarspanError, match="not trained"):
        fixed.for_training(layer_info())
    with pytest.raises(FarspanError, match="select=mean"):
        farspan.methods()["dhsa"](boundaries="learned", select="vertical_slash")
