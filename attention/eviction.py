"""Which keys of a store stay where a method evicts the others."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .keys import Keys, State


@dataclass(frozen=True, kw_only=True)
class Eviction:
    """The keys that stay; the store drops the others.

    slots: [B, heads, R], the keys of each KV head that stay, ascending, as places among the keys that it has
    (``Keys.of_heads``). A row that has fewer than R keys keeps all of them, in the last places. heads: the KV
    heads that these are; None: all of the layer. crop: how many of the newest positions may still be cropped.
    state: what changes in the method's state of these rows with it.
    """

    slots: Tensor
    crop: int
    heads: tuple[int, ...] | None = None
    state: State = field(default_factory=dict)


def stay(chosen: Tensor, recent: int, keys: Keys) -> Tensor:
    """``Eviction.slots``: the ``chosen`` keys [B, heads, C] and the last ``recent`` ones, none of which is
    among them; all keys of the rows that have no more than C + recent."""
    b, heads, c = chosen.shape
    newest = torch.arange(keys.length - recent - c, keys.length, device=chosen.device).expand(b, heads, -1)
    slots = torch.cat([chosen, newest[..., c:]], 2)
    if keys.start is not None:
        short = keys.length - keys.start <= c + recent
        slots = torch.where(short[:, None, None], newest, slots)
    return slots.clamp(min=0)
