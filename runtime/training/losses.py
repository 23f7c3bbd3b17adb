"""Losses of next-token predictions, a few positions at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

_LOGITS = 1 << 24  # numbers of logits that exist at a time, of teacher and student each
SCALE = 1024.0  # gradients of logits are small numbers: in float16 they would be rounded to 0


def pieces(ids: Tensor, vocabulary: int) -> Iterator[slice]:
    """The positions of ids [B, T] that predict a token, a few at a time."""
    step = max(1, _LOGITS // (ids.shape[0] * vocabulary))
    last = ids.shape[1] - 1
    return (slice(a, min(a + step, last)) for a in range(0, last, step))


def nll(logits: Tensor, ids: Tensor, at: slice) -> Tensor:
    """The part of the positions ``at`` in the mean negative log-likelihood of the tokens ids [B, T]. logits:
    [B, n, vocabulary] of these positions."""
    following = ids[:, at.start + 1 : at.stop + 1]
    total = cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum")
    return total / ids[:, 1:].numel()


def divergence(wanted: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The sum over positions of KL(wanted || got), both at the temperature, times its square. wanted, logits:
    [B, n, vocabulary]."""
    target, got = (log_softmax(x / temperature, -1) for x in (wanted, logits))
    return (target.exp() * (target - got)).sum() * temperature**2
