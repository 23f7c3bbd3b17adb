"""SeerAttention and SeerAttention-R against their definitions, written apart (naive_seer.py): selections in
both layouts of a recipe, losses with their gradients, and the weights that training begins with."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan import FarspanError
from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.method import DECODE, PREFILL
from farspan.attention.softmax import Softmax
from farspan.attention.sparse.gate import rotate, sample_frequencies
from farspan.attention.sparse.seer import Seer
from farspan.attention.sparse.seer_decode import SeerDecode

from . import naive_seer as naive
from .tools import HKV, THETA, D, Data, H, Stream, decode_cuts, layer_info, recorded

G = H // HKV
STARTS = [None, [0, 21, 70]]


def random_weights(size: int, *, published: bool = False) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(7)
    if published:
        return {"k": torch.randn(H, 3 * D, D, generator=made) * 0.3}
    return {
        "q": torch.randn(H, D, size, generator=made) * D**-0.5,
        "k": torch.randn(HKV, 3 * D, size, generator=made) * D**-0.5,
    }


def decode_weights(size: int, per_head: bool) -> dict[str, Tensor]:
    if per_head:
        return random_weights(size)
    made = torch.Generator().manual_seed(8)
    return {
        "q": torch.randn(HKV, G * D, size, generator=made) * (G * D) ** -0.5,
        "k": torch.randn(HKV, 3 * D, size, generator=made) * D**-0.5,
        "q_norm": 1 + 0.5 * torch.rand(size, generator=made),
        "k_norm": 1 + 0.5 * torch.rand(size, generator=made),
    }


PREFILLS: list[dict[str, Any]] = [
    {"fraction": 0.3, "block": 8},
    {"fraction": None, "k": 43, "block": 8, "gqa_reduce": "sum"},
    {"fraction": 0.7, "mass": 0.6, "block": 8, "gqa_reduce": "max"},
    {"fraction": None, "threshold": 0.12, "block": 16},
    {"fraction": None, "threshold": 0.1, "mass": 0.8, "k": 64, "block": 8, "gqa_reduce": "sum"},
]


@pytest.mark.parametrize("published", [False, True], ids=["own layout", "published layout"])
@pytest.mark.parametrize("starts", STARTS, ids=["plain", "padded"])
@pytest.mark.parametrize("cuts", [[150], [64, 150], [37, 90, 150]], ids=["whole", "aligned", "unaligned"])
@pytest.mark.parametrize("settings", PREFILLS, ids=str)
def test_seer(settings: dict[str, Any], cuts: list[int], starts: list[int] | None, published: bool) -> None:
    weights = random_weights(6, published=published)
    method, data = Seer(**settings).for_layer(layer_info(weights)), Data.random(150, starts, seed=3)
    budgets = {name: settings.get(name) for name in ("fraction", "mass", "threshold")}
    how = {"block": settings["block"], "k_tokens": settings.get("k"), **budgets}
    how["gqa_reduce"] = settings.get("gqa_reduce", "none")
    wide = {name: x.double() for name, x in weights.items()}
    stream, compared, left_out = Stream(method, data), 0, 0
    for a, z in zip([0, *cuts], cuts, strict=False):
        with recorded(method) as seen:
            stream.call(z)
        answers = iter(s for s in seen if s.phase == PREFILL)
        for b, first in enumerate(data.starts or [0]):
            if first >= z:
                continue
            index = next(answers).index
            if index is None:
                assert z - first <= max(2 * settings["block"], settings.get("k") or 0)
                continue
            begin = max(a, first)
            for head in range(HKV):
                heads = range(head * G, (head + 1) * G)
                want = naive.seer(
                    data.q[b, heads.start : heads.stop, begin:z],
                    data.k[b, head, first:z],
                    begin - first,
                    [wide["q"][h] for h in heads] if "q" in wide else None,
                    [wide["k"][h if published else head] for h in heads],
                    THETA,
                    **how,
                )
                for n, per_head in enumerate(want):
                    for g, read in enumerate(per_head):
                        hs = (head * G + g) * index.blocks.shape[1] // H
                        got = index.blocks[0, hs, n, : int(index.counts[0, hs, n])].tolist()
                        assert got == sorted(read), f"row {b}, head {head * G + g}, query block {n}"
                        left_out += (begin - first) // settings["block"] + n + 1 - len(read)
                        compared += 1
    assert compared and left_out


DECODES: list[dict[str, Any]] = [
    {"k": 24, "block": 4},
    {"k": 27, "block": 8},
    {"k": None, "threshold": 0.1, "block": 8},
    {"k": 60, "threshold": 0.04, "block": 8},
]


@pytest.mark.parametrize("per_head", [False, True], ids=["a score a group", "a score a head"])
@pytest.mark.parametrize("starts", STARTS, ids=["plain", "padded"])
@pytest.mark.parametrize("settings", DECODES, ids=str)
def test_seer_decode(settings: dict[str, Any], starts: list[int] | None, per_head: bool) -> None:
    weights = decode_weights(8, per_head)
    method, data = SeerDecode(**settings).for_layer(layer_info(weights)), Data.random(140, starts, seed=5)
    how = {"block": settings["block"], "k_tokens": settings["k"], "threshold": settings.get("threshold")}
    cuts = [*decode_cuts(110, 9), 128, 140]  # the last two calls decode nine and twelve candidates at once
    with recorded(method) as seen:
        Stream(method, data).run(cuts)
    left_out = 0
    for selection in (s for s in seen if s.phase == DECODE):
        read = selection.mask().expand(-1, HKV, -1, -1)
        rows = [b for b, first in enumerate(data.starts or [0]) if first < selection.tk]
        assert len(rows) == selection.batch
        for b in rows:
            first = (data.starts or [0])[b]
            for head in range(HKV):
                wide = {name: (x[head] if x.dim() > 1 else x).double() for name, x in weights.items()}
                if per_head:
                    wide["q"] = weights["q"][head * G : (head + 1) * G].double()
                for t in range(selection.tq):
                    end = selection.tk - selection.tq + t + 1
                    q = data.q[b, head * G : (head + 1) * G, end - 1]
                    want = naive.seer_decode(q, data.k[b, head, first:end], wide, THETA, **how)
                    got = (read[b, head, t].nonzero()[:, 0] - first).tolist()
                    assert got == sorted(want), f"row {b}, KV head {head}, position {end - 1}"
                    left_out += end - first - len(want)
    assert left_out


def test_layers_below_dense_layers_have_no_gate() -> None:
    method, weights = SeerDecode(dense_layers=2), decode_weights(8, per_head=False)
    for index, dense in ((1, True), (2, False)):
        layer = dataclasses.replace(layer_info(weights), index=index)
        assert (method.for_layer(layer) is None) == (method.for_training(layer) is None) == dense


# --- training ---------------------------------------------------------------------------------------


def window(method: Any, length: int) -> tuple[Tensor, Keys]:
    """A window of two rows as the trainer gives it."""
    data = Data.random(length, [0, 0], seed=6)
    keys = Keys(kv=KV(data.k, data.v), tq=length, softmax=Softmax(data.scale))
    keys.fed = data.fed(method, 0, length)
    return data.q, keys


def assert_loss_and_gradients(method: Any, want: Tensor, twins: dict[str, Tensor], length: int) -> None:
    loss = method.distillation_loss(*window(method, length))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(want.item(), rel=1e-9)
    loss.backward()
    want.backward()
    for name, p in method.module.named_parameters():
        assert twins[name].grad is not None and p.grad is not None
        assert twins[name].grad.abs().max() > 1e-4
        assert torch.allclose(p.grad, twins[name].grad, rtol=1e-7, atol=1e-10), name


@pytest.mark.parametrize("length", [64, 61])
def test_the_loss_of_seer(length: int) -> None:
    weights = {name: x.double() for name, x in random_weights(6).items()}
    method = Seer(block=8).for_layer(layer_info(weights))
    twins = {name: x.clone().requires_grad_() for name, x in weights.items()}
    q, keys = window(method, length)
    rows = [naive.seer_loss(q[b], keys.kv.k[b], twins["q"], twins["k"], THETA, 8) for b in range(2)]
    assert_loss_and_gradients(method, torch.stack(rows).mean(), twins, length)


@pytest.mark.parametrize("per_head", [False, True], ids=["a score a group", "a score a head"])
@pytest.mark.parametrize("length", [64, 61])
def test_the_loss_of_seer_decode(length: int, per_head: bool) -> None:
    weights = {name: x.double() for name, x in decode_weights(6, per_head).items()}
    method = SeerDecode(block=8, per_head=per_head).for_layer(layer_info(weights))
    twins = {name: x.clone().requires_grad_() for name, x in weights.items()}
    q, keys = window(method, length)
    rows = [naive.seer_decode_loss(q[b], keys.kv.k[b], twins, THETA, 8, 16) for b in range(2)]
    assert_loss_and_gradients(method, torch.stack(rows).mean(), twins, length)


@pytest.mark.parametrize(
    "method",
    [
        Seer(block=8, gate_dim=8),
        SeerDecode(block=8, gate_dim=8),
        SeerDecode(block=8, gate_dim=8, per_head=True),
    ],
    ids=str,
)
def test_training_lowers_the_loss(method: Any) -> None:
    learns = method.for_training(layer_info())
    given = window(learns, 96)
    optimizer = torch.optim.AdamW(learns.module.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(40):
        loss = learns.distillation_loss(*given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and losses[-1] == min(losses)


@pytest.mark.parametrize("method", [Seer(block=8), SeerDecode(block=8)], ids=str)
def test_a_window_needs_blocks_that_are_not_always_read(method: Any) -> None:
    learns = method.for_training(layer_info())
    assert learns.distillation_loss(*window(learns, 17)).isfinite()
    with pytest.raises(FarspanError, match="windows of more than 16 tokens; got 16"):
        learns.distillation_loss(*window(learns, 16))


@pytest.mark.parametrize(
    "method", [Seer(block=8, gate_dim=D), SeerDecode(block=8, gate_dim=D, per_head=True)], ids=str
)
def test_training_begins_with_mean_pooled_blocks(method: Any) -> None:
    """With d_g = D the untrained gate is the product of the means, in the positions of their blocks."""
    learns = method.for_training(layer_info())
    assert learns.gate is not None
    data = Data.random(64, seed=1)
    q, k = (x[0].unflatten(1, (8, 8)).mean(2) for x in (data.q, data.k))  # [heads, 8, D]
    q_gate = learns.gate.project(q[None])[0]
    k_gate = learns.gate.compress(data.k, 8)[0]
    assert torch.allclose(q_gate, q) and torch.allclose(k_gate, k)


@pytest.mark.parametrize("size", [4, 6, 8, 16, 32])
def test_frequencies_of_another_width_have_the_same_theta(size: int) -> None:
    own = 10_000.0 ** (-torch.arange(8).double() / 8)
    want = 10_000.0 ** (-torch.arange(size // 2).double() / (size // 2))
    assert torch.allclose(sample_frequencies(own, size // 2), want, rtol=1e-12)
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = torch.stack([naive.turned(row, 5 * i, 10_000.0) for i, row in enumerate(x)])
    assert torch.allclose(rotate(x, 5 * torch.arange(3), own), turned, rtol=1e-12)
