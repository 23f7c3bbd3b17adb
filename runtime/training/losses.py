"""Losses of next-token predictions, a few positions at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from .. import hf

_LOGITS = 1 << 24  # numbers of logits that exist at a time, of teacher and student each
_SCALE = 1024.0  # gradients of logits are small numbers: in float16 they would be rounded to 0


def backward(
    head: hf.Head, output: Any, ids: Tensor, loss: Callable[[Tensor, slice], Tensor], accelerator: Any
) -> Tensor:
    """Call ``accelerator.backward`` for a loss of next-token predictions, and return the detached loss. The
    gradient of the logits is taken a few positions at a time, and goes through the decoder once.

    output: what ``head.hidden`` has returned for ids [B, T]. loss: called with logits [B, n, vocabulary] and
    their positions; returns the part of these positions in the loss.
    """
    hidden = output.last_hidden_state
    leaf, losses = hidden.detach().requires_grad_(), []
    for at in _pieces(head, ids):
        piece = loss(logits_at(head, output, leaf, ids, at), at)
        (piece * _SCALE).backward()
        losses.append(piece.detach())
    assert leaf.grad is not None
    accelerator.backward((hidden.float() * (leaf.grad.float() / _SCALE)).sum())
    return torch.stack(losses).sum()


@torch.no_grad()
def measure(
    head: hf.Head, output: Any, dense: Any, ids: Tensor, temperature: float = 1.0
) -> dict[str, float]:
    """The negative log-likelihoods (nats a token) of the trained model and of the dense one, their
    difference, and KL(dense || trained) at the temperature, times its square. output, dense: what
    ``head.hidden`` has returned for ids [B, T] by either."""
    sums = torch.zeros(3, dtype=torch.float64)
    for at in _pieces(head, ids):
        logits, wanted = (logits_at(head, x, x.last_hidden_state, ids, at) for x in (output, dense))
        kl = divergence(wanted, logits, ids, temperature)
        sums += torch.stack([nll(logits, ids, at), nll(wanted, ids, at), kl]).double().cpu()
    own, nll_dense, kl = sums.tolist()
    return {"nll": own, "nll_dense": nll_dense, "nll_difference": own - nll_dense, "kl": kl}


def logits_at(head: hf.Head, output: Any, hidden: Tensor, ids: Tensor, at: slice) -> Tensor:
    """Logits [B, n, vocabulary] in float32 of the positions ``at`` of ``hidden`` [B, T, hidden], the hidden
    states of ``output``."""
    return head.logits(output, hidden[:, at], ids[:, at]).float()


def nll(logits: Tensor, ids: Tensor, at: slice) -> Tensor:
    """The part of the positions ``at`` in the mean negative log-likelihood of the tokens ids [B, T]. logits:
    [B, n, vocabulary] of these positions."""
    following = ids[:, at.start + 1 : at.stop + 1]
    total = cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum")
    return total / ids[:, 1:].numel()


def divergence(wanted: Tensor, logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """The part of some positions in the mean of KL(wanted || got) over positions of ids [B, T], both at the
    temperature, times its square. wanted, logits: [B, n, vocabulary] of these positions."""
    target, got = (log_softmax(x / temperature, -1) for x in (wanted, logits))
    return (target.exp() * (target - got)).sum() * temperature**2 / ids[:, 1:].numel()


def _pieces(head: hf.Head, ids: Tensor) -> Iterator[slice]:
    """The positions of ids [B, T] that predict a token, a few at a time."""
    step = max(1, _LOGITS // (ids.shape[0] * head.vocabulary))
    last = ids.shape[1] - 1
    return (slice(a, min(a + step, last)) for a in range(0, last, step))
