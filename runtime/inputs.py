"""What a patched attention module was given in a call, and what methods are fed of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..attention.kv import KV
from ..attention.needs import Inputs, Needs, Undo
from .cache import KVStore


@dataclass(frozen=True)
class Given:
    """What the attention module of the running layer was called with.

    hidden: [B, T, hidden]. positions: [B or 1, T], by which its queries and keys were rotated; None, like
    ``undo``, where RoPE need not or cannot be undone because the layer has none.
    """

    needs: Needs
    hidden: Tensor
    positions: Tensor | None = None
    undo: Undo | None = None

    def feed(self, q: Tensor, kv: KV, store: KVStore | None) -> Inputs:
        """The inputs of a call with queries q [B, H, Tq, D] over kv [B, Hkv, Tk]. store: the one that holds
        kv; None where kv are the call's own keys and values."""
        total, tq = kv.length, q.shape[2]
        places = None
        if self.positions is not None:
            own = self.positions.expand(q.shape[0], tq)
            places = own if store is None else store.positions.append(own, total)
        return Inputs(
            needs=self.needs,
            q=q,
            k=kv[:, :, total - tq :].k,
            hidden=self.hidden,
            length=total,
            places=places,
            undo=self.undo,
        )
