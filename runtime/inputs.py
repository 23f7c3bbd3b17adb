"""What a patched attention module was given in a call, and what methods are fed of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

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

    def feed(self, q: Tensor, k: Tensor, store: KVStore | None) -> Inputs:
        """The inputs of a call with queries q [B, H, Tq, D] over keys k [B, Hkv, Tk, D]. store: the one that
        holds k; None where k are the call's own keys."""
        total, tq = k.shape[2], q.shape[2]
        places = None
        if self.positions is not None:
            own = self.positions.expand(q.shape[0], tq)
            places = own if store is None else store.positions.append(own, total)
        return Inputs(
            needs=self.needs,
            q=q,
            k=k[:, :, total - tq :],
            hidden=self.hidden,
            length=total,
            places=places,
            undo=self.undo,
        )
