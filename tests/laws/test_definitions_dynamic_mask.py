"""Dynamic Mask Attention against its definition, written apart (naive_dynamic_mask.py): which keys are read,
what comes out with the bias added, gradients, and the loss that teaches it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import farspan
from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.running import kept_until
from farspan.attention.softmax import Softmax

from . import naive_dynamic_mask as naive
from .tools import HKV, D, Data, H, Stream, assert_same, layer_info

G = H // HKV
SETTINGS = [
    {"w": 24, "local": 0, "add_bias": True},
    {"w": 30, "local": 9, "form": "exp", "add_bias": True},
    {"w": 1, "local": 0},
    {"w": 70, "local": 1, "add_bias": True},
    {"w": 500, "local": 64, "add_bias": True},
    {"w": 500, "local": 0, "form": "exp", "add_bias": True},
]


def gated(settings: dict[str, Any], a: Tensor | None = None) -> Any:
    """The method with random weights, as a recipe gives them."""
    generator = torch.Generator().manual_seed(2)
    weights = {
        "a": torch.tensor([1.3, -0.8]) if a is None else a,
        "w": torch.randn(HKV, D, HKV, generator=generator) * 0.4,
    }
    return farspan.methods()["dynamic_mask"](**settings).for_layer(layer_info(weights))


def biases(method: Any, v: Tensor) -> Tensor:
    """By the definition, in the precision that labels are kept in."""
    return naive.biases(v, method.gate.a.double(), method.gate.w.double(), method.form).float().double()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("starts", [None, [0, 21, 120]])
@pytest.mark.parametrize("cuts", [[150, 151, 155], [37, 120, 139, 140, 150]], ids=["whole", "cut"])
def test_what_is_read_and_what_comes_out(
    settings: dict[str, Any], starts: list[int] | None, cuts: list[int]
) -> None:
    """With a budget that covers every key this is dense attention plus bias."""
    method, data = gated(settings), Data.random(cuts[-1], starts, seed=4)
    stream = Stream(method, data)
    got = stream.run(cuts)
    known = {name: getattr(method, name) for name in ("w", "local")}
    pairs = 0
    for b, first in enumerate(data.starts or [0]):
        q, k, v = (x[b, :, first:] for x in (data.q, data.k, data.v))
        bias = biases(method, v)
        added = bias if method.add_bias else torch.zeros_like(bias)
        for head in range(HKV):
            for t in range(k.shape[1]):
                keys = naive.read(bias[head].tolist(), t, **known)
                pairs += len(keys) * G
                for h in range(head * G, head * G + G):
                    out, lse = naive.attention(q[h, t], k[head], v[head], added[head], keys, data.scale)
                    assert (got.out[b, h, first + t] - out).abs().max() < 1e-10, (
                        f"row {b}, head {h}, query {t}"
                    )
                    assert abs(got.lse[b, h, first + t] - lse) < 1e-10
    assert sum(int(r.pairs) for r in stream.reads) == pairs


def test_untrained_weights_give_a_window() -> None:
    """Equal biases: the latest keys stay."""
    data, cuts = Data.random(150, [0, 30]), [140, 141, 145, 150]
    window = farspan.parse_method("window:w=24,sinks=0")
    for form in ("softplus", "exp"):
        method = gated({"w": 24, "local": 5, "form": form, "add_bias": True}, torch.zeros(HKV))
        got, want = Stream(method, data).run(cuts), Stream(window, data).run(cuts)
        added = 1.0 if form == "exp" else 0.0
        assert_same(got._replace(lse=got.lse - added), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bias_is_not_rounded_to_the_type_of_the_keys(dtype: torch.dtype) -> None:
    """Queries of zeros: the weights are those of the biases alone, whatever the scale is a power of."""
    data = Data.random(100).to(dtype)
    data.q = torch.zeros_like(data.q)
    method = gated({"w": 30, "local": 0, "add_bias": True}, torch.tensor([40.0, -30.0]))
    with torch.no_grad():
        for scale in (0.25, 0.07):
            keys = Keys(kv=KV(data.k, data.v), tq=100, softmax=Softmax(scale))
            part, _ = method.select_prefill(data.q, keys).run_prefill(data.q, keys, range(100), "eager")
            bias = biases(method, data.v[0].double())
            for head in range(HKV):
                for t in (3, 50, 99):
                    at = sorted(naive.read(bias[head].tolist(), t, w=30, local=0))
                    assert abs(part.lse[0, head * G, t] - torch.logsumexp(bias[head, at], 0)) < 1e-4


@pytest.mark.parametrize("settings", [{"w": 20, "local": 4}, {"w": 90, "local": 0, "form": "exp"}], ids=str)
def test_gradients_flow_through_the_bias(settings: dict[str, Any]) -> None:
    """Of queries, keys, values and gate, for the set of keys that is read, against softmax with the bias as a
    mask of numbers."""
    data, method = Data.random(80, [0, 0]), gated(settings | {"add_bias": True})
    method.gate.double().requires_grad_()
    inputs = [x.requires_grad_() for x in (data.q, data.k, data.v)]
    keys = Keys(kv=KV(data.k, data.v), tq=80, softmax=Softmax(data.scale))
    selection = method.select_prefill(data.q, keys)
    part, _ = selection.run_prefill(data.q, keys, range(80), "eager")
    weigh = torch.randn(part.out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = [*inputs, method.gate.a, method.gate.w]
    got = torch.autograd.grad((part.out * weigh).sum() + part.lse.sin().sum(), wanted)
    bias = torch.stack([naive.biases(v, method.gate.a, method.gate.w, method.form) for v in data.v])
    logits = torch.einsum("bhgtd,bhnd->bhgtn", data.q.unflatten(1, (HKV, G)), data.k) * data.scale
    logits = (logits + bias[:, :, None, None]).masked_fill(
        ~selection.to_mask(80, 80, batch=2)[:, :, None], -torch.inf
    )
    out = torch.einsum("bhgtn,bhnd->bhgtd", logits.softmax(-1), data.v).flatten(1, 2)
    want = torch.autograd.grad((out * weigh).sum() + logits.logsumexp(-1).flatten(1, 2).sin().sum(), wanted)
    for name, a, b in zip(("q", "k", "v", "a", "w"), got, want, strict=True):
        assert (a - b).abs().max() < 1e-9 * b.abs().max(), name


@pytest.mark.parametrize("local", [0, 7])
@pytest.mark.parametrize("form", ["softplus", "exp"])
def test_what_the_bias_learns(local: int, form: str) -> None:
    """The loss and its gradient against the definition."""
    data = Data.random(40, [0, 0])
    method = farspan.methods()["dynamic_mask"](w=20, local=local, form=form).for_training(layer_info())
    assert method is not None and not bool(method.gate.a.any())
    gate = method.gate.double()
    gate.a.data = torch.tensor([0.7, -0.4], dtype=torch.float64)
    keys = Keys(kv=KV(data.k, data.v), tq=40, softmax=Softmax(data.scale))
    got = method.distillation_loss(data.q, keys)
    # The rows, too, are weighted with the attention beyond the last keys.
    parts = []
    for b in range(2):
        bias = naive.biases(data.v[b], gate.a, gate.w, form)
        parts.append(
            (naive.loss(data.q[b], data.k[b], bias, scale=data.scale, local=local), _mass(data, b, local))
        )
    want = sum(loss * mass for loss, mass in parts) / sum(mass for _, mass in parts)
    assert abs(got - want) < 1e-12 * abs(want)
    for x, y in zip(*(torch.autograd.grad(z, [gate.a, gate.w]) for z in (got, want)), strict=True):
        assert (x - y).abs().max() < 1e-10


def _mass(data: Data, b: int, local: int) -> float:
    """Attention beyond the last ``local`` keys in row b, the mean over the heads of a group."""
    logits = torch.einsum("htd,hnd->htn", data.q[b], data.k[b].repeat_interleave(G, 0)) * data.scale
    n = logits.shape[1]
    shares = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
    return float(shares.tril(-local).sum()) / G


def test_distillation_finds_the_keys_that_are_attended_to() -> None:
    """Keys whose values have a mark get much attention later: after training the gate keeps them, and the
    window it began as does not."""
    torch.manual_seed(0)
    method = farspan.methods()["dynamic_mask"](w=32, local=8).for_training(layer_info())
    assert method is not None

    def window(seed: int) -> tuple[Data, Tensor]:
        data = Data.random(160, seed=seed, dtype=torch.float32)
        marked = torch.rand(160, generator=torch.Generator().manual_seed(seed)) < 0.08
        data.v[..., marked, 0] += 4.0
        data.k[..., marked, :] += 3.0
        data.q += 1.0
        return data, marked

    def kept(data: Data, marked: Tensor) -> float:
        with torch.no_grad():
            keys = Keys(kv=KV(data.k, data.v), tq=160, softmax=Softmax(data.scale))
            mask = method.select_prefill(data.q, keys).to_mask(160, 160)
            return float(mask[0, :, -1, marked].float().mean())

    held_out = window(1000)
    before, losses = kept(*held_out), []
    steps = torch.optim.AdamW(method.gate.parameters(), lr=0.05, weight_decay=0.0)
    for step in range(120):
        data, _ = window(step)
        steps.zero_grad()
        loss = method.distillation_loss(
            data.q, Keys(kv=KV(data.k, data.v), tq=160, softmax=Softmax(data.scale))
        )
        loss.backward()
        steps.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    assert int(held_out[1].sum()) <= 24 and before < 0.3 and kept(*held_out) > 0.9


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 130])
def test_how_long_a_score_is_among_the_highest(n: int) -> None:
    scores = torch.randint(6, (2, 3, n), generator=torch.Generator().manual_seed(n)).float()  # many are equal
    for w in (1, 2, 5, 64, 200):
        until = kept_until(scores, w)
        for row, ends in zip(scores.flatten(0, 1).tolist(), until.flatten(0, 1).tolist(), strict=True):
            for t in range(n):
                held = set(sorted(range(t + 1), key=lambda j: (row[j], j), reverse=True)[:w])
                assert {j for j in range(t + 1) if t < ends[j]} == held


def test_bad_settings_are_refused() -> None:
    for settings, says in (
        ({"w": 10, "local": 10}, "local must be below w; got w=10, local=10"),
        ({"form": "relu"}, "softplus or exp"),
    ):
        with pytest.raises(farspan.SpecError, match=re.escape(says)):
            farspan.methods()["dynamic_mask"](**settings)
