"""Recycled Attention over a given text, for training: the steps of decode, in one prefill call."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..errors import FarspanError
from ..gqa import group_scores
from ..keys import Keys
from ..method import AttentionMethod
from ..needs import Needs
from ..ops.scores import scores
from ..ops.select import top_k
from ..selection import Index, Stretches
from .kept_set import pooled
from .recycled import Recycled

_LOGITS = 1 << 24  # of full steps against keys, that exist at a time


class RecycledOverText(Recycled):
    """``recycled`` in training mode, after the continued pre-training of 2411.05787. ``teacher_forced`` makes
    it; it has no name of its own in specs, and ``recycled`` keeps its dense prefill.

    A position that is a multiple of ``stride`` and has more than ``k`` keys is a full step. It reads every
    key and chooses a set, and the following ``stride`` - 1 positions read what recycled decode steps read:
    the set, in which each of their tokens has replaced the lowest-ranked key left. Positions before the first
    full step read every key. The output is that of a dense prefill up to the first full step and one decode
    step for each later token of the text. Gradients flow through what is read, not through the choice.

    The paper does not say where stretches begin; here chunks of whole strides give the same result as the
    whole text.
    """

    @property
    def needs(self) -> Needs:
        return Needs(keys=True)

    @property
    def block_multiple(self) -> int:
        return self.stride

    @torch.no_grad()
    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        first = -(-max(self.k, keys.past) // self.stride) * self.stride
        if first >= keys.length:
            return None
        keys.read_all_keys()
        places = torch.arange(first, keys.length, self.stride, device=q.device)
        step = max(1, _LOGITS // (q.shape[0] * q.shape[1] * keys.length))
        chosen = [self._choose(q, keys, some) for some in places.split(step)]
        return Stretches(tokens=torch.cat(chosen, 2), first=first, stride=self.stride)

    def _choose(self, q: Tensor, keys: Keys, places: Tensor) -> Tensor:
        """[B, Hkv, n, k]: the keys that the full steps at ``places`` [n] choose, highest first."""
        length = int(places[-1]) + 1
        logits = scores(q[:, :, places - keys.past], keys.kv.k[:, :, :length], keys.softmax)
        visible = torch.arange(length, device=q.device) <= places[:, None]
        ranked = group_scores(logits, visible[None], self.gqa_reduce)
        return top_k(pooled(ranked, self.pool, visible), self.k, order="score")

    def __str__(self) -> str:
        return f"{super().__str__()} over a given text"


def teacher_forced(method: AttentionMethod) -> AttentionMethod | None:
    """The method that computes in one prefill call over a given text what the decode steps of ``method``
    compute; None for a method without such a form. Raises FarspanError for the schedule dynamic=true, whose
    full steps depend on the queries."""
    if not isinstance(method, Recycled):
        return None
    if method.dynamic:
        raise FarspanError(
            f"{method} chooses its full steps by each step's query, and training over a text takes the fixed "
            "schedule: leave dynamic out, and use it again afterwards."
        )
    return RecycledOverText(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)})
