"""The gradient of every method that selects in prefill is that of float64 attention over the keys it has
chosen, with the choice fixed; under gradient checkpointing too. The gradient through summaries of keys is
compared with its own definition in test_definitions_chunked.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from farspan.attention.method import AttentionMethod
from farspan.attention.selection import Biased, Rescaled

from .parameters import every_method
from .tools import Data, H, Selection, Stream, recorded

LENGTH = 75


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, scale: float, selection: Selection, bound: AttentionMethod
) -> Tensor:
    """Softmax over the mask of ``selection``, as whole matrices; rescaled keys keep a part of their share,
    and biased keys have their bias, which ``bound`` makes of the values."""
    mask = selection.mask()
    mask = mask.repeat_interleave(H // mask.shape[1], 1)
    key, value = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    logits = q @ key.mT * scale
    if isinstance(selection.index, Biased) and bound.module is not None:
        logits = logits + bound.module(v).repeat_interleave(H // v.shape[1], 1)[:, :, None]
    weights = torch.softmax(logits.masked_fill(~mask, -torch.inf), -1)
    if isinstance(selection.index, Rescaled):
        less = selection.index.keys[:, :, None].expand_as(weights)
        kept = torch.where(less, weights * selection.index.factor, 0)
        rest = torch.where(less, 0, weights)
        some = rest.sum(-1, keepdim=True) > 0
        grown = rest * (1 - kept.sum(-1, keepdim=True)) / rest.sum(-1, keepdim=True).where(some, 1)
        weights = torch.where(some, kept + grown, weights)
    return weights @ value


@every_method("prefill", of_summaries=False)
def test_gradients_are_those_of_the_keys_read(bound: AttentionMethod) -> None:
    data = Data.random(LENGTH, seed=5)
    inputs = [x.requires_grad_() for x in (data.q, data.k, data.v)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Stream(bound, Data(q, k, v)).call(LENGTH).out

    with recorded(bound) as selections:
        out = run(*inputs)
    [selection] = selections
    wanted = by_definition(*inputs, data.scale, selection, bound)
    assert (out - wanted).abs().max() < 1e-10
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    again = checkpoint(run, *inputs, use_reentrant=False)
    theirs = torch.autograd.grad(wanted, inputs, weight)
    for result in (out, again):
        for name, ours, its in zip("qkv", torch.autograd.grad(result, inputs, weight), theirs, strict=True):
            assert (ours - its).abs().max() < 1e-9, name
