"""The inputs of a patched attention module, and the part of them that methods are fed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..attention.kv import KV
from ..attention.needs import Inputs, Needs, Undo
from .store.store import KVStore


@dataclass(frozen=True)
class Given:
    """The inputs with which the attention module of the present layer was called.

    needs: what the methods of the layer declare.
    hidden: hidden states [B, T, hidden].
    positions: [B or 1, T], the positions by which queries and keys were rotated.
    undo: the function that undoes RoPE. frequencies: [R], those of the layer's RoPE, descending. positions,
    undo and frequencies are None where no method needs RoPE undone, or where the layer has no RoPE.
    early: the hidden states [B, T, hidden] of the earlier layer that ``needs`` names, where it has run.
    """

    needs: Needs
    hidden: Tensor
    positions: Tensor | None = None
    undo: Undo | None = None
    frequencies: Tensor | None = None
    early: Tensor | None = None

    def feed(self, q: Tensor, kv: KV, store: KVStore | None) -> Inputs:
        """The inputs that methods are fed in a call with queries q [B, H, Tq, D], keys and values kv
        [B, Hkv, Tk]. store: the store that holds kv; None where kv is all of this call."""
        total, tq = kv.length if store is None else store.total, q.shape[2]
        own = self.own(q, kv[:, :, kv.length - tq :].k)
        if own.places is None or store is None:
            return replace(own, length=total)
        return replace(own, length=total, places=store.positions.append(own.places, total))

    def own(self, q: Tensor, k: Tensor) -> Inputs:
        """The inputs of the tokens that this process computes, as if there were no others: queries
        q [B, H, n, D] and keys k [B, Hkv, n, D]."""
        places = None if self.positions is None else self.positions.expand(q.shape[0], q.shape[2])
        return Inputs(
            needs=self.needs,
            q=q,
            k=k,
            hidden=self.hidden,
            length=q.shape[2],
            places=places,
            undo=self.undo,
            frequencies=self.frequencies,
            early=self.early,
        )
