"""Run a text with gradients: the effect of each layer's attention on the likelihood of the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from ..attention.calibration.protocol import GradientCalibration
from ..attention.softmax import Softmax
from . import hf


def read_with_gradients(
    model: Any,
    info: hf.ModelInfo,
    layers: Mapping[int, GradientCalibration],
    windows: Sequence[Tensor],
    done: Callable[[int], None],
) -> None:
    """Call the calibration of each layer with its attention inputs and with the gradient of its output.

    model: a patched model. layers: by layer, its calibration. windows: token ids [1, T] each.

    For each window, ``observe`` is called with q, k and v of the layer's dense attention. Then
    ``observe_grad`` is called with the gradient of the window's mean negative log-likelihood with respect to
    the output of that attention. A window takes one forward and one backward pass; attention is computed
    again in the backward pass. ``done`` is called with the number of windows so far. No parameter gets a
    gradient.
    """
    undo = [hf.replace_attention(info.attention[i], partial(_attend, layer)) for i, layer in layers.items()]
    embedded: list[Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: embedded.append(output.requires_grad_())
    )
    try:
        with torch.enable_grad():
            for i, ids in enumerate(windows):
                embedded.clear()
                logits = model(ids, use_cache=False).logits
                loss = cross_entropy(logits[0, :-1].float(), ids[0, 1:])
                torch.autograd.grad(loss, embedded[0])
                done(i + 1)
    finally:
        hook.remove()
        for step in undo:
            step()


def _attend(
    layer: GradientCalibration, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softmax: Softmax
) -> Tensor:
    """Dense attention [1, T, H, D] of one window without padding; ``layer`` observes its inputs and its
    gradient."""
    with torch.no_grad():
        layer.observe(q.detach(), k.detach(), v.detach(), softmax)
    out: Tensor = checkpoint(hf.attend_densely, q, k, v, softmax, use_reentrant=False)
    out.register_hook(layer.observe_grad)
    return out.transpose(1, 2).contiguous()
