"""SeerAttention-R: blocks chosen by a learned gate for each decode query."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import select_topk
from ..checks import require
from ..cost import Cost, Queries
from ..errors import SpecError
from ..keys import Keys, State
from ..method import AttentionMethod, LayerInfo
from ..needs import Needs
from ..pages import page_tokens
from ..selection import Index
from ..summary import Summary
from .gate import BlockGate, CompressedKeys, GroupGate
from .gate_loss import loss_of_rows, observe_rows


@dataclass(frozen=True, kw_only=True)
class SeerDecode(AttentionMethod):
    """The key blocks that a learned gate scores highest for a decode query, one selection per KV head
    (SeerAttention-R, 2506.08889).

    The queries of a group side by side [G D], and concat(max, min, mean) [3 D] of the keys of each block of
    ``block``, all before RoPE, are projected to d_g numbers, normalised (RMSNorm with weights), and rotated
    by RoPE: a query at its position, a block where it begins. Softmax over the blocks before the query's own
    of the products over sqrt(d_g) estimates their shares. The query's own block, which is still being filled,
    and the first one are always read. The best others follow, as long as ``k`` tokens and estimates of at
    least ``threshold`` allow; either may be none. Compressed keys are kept before RoPE and extended as keys
    come, d_g numbers per block and KV head. Prefill is dense.

    A recipe has q [Hkv, G D, d_g], k [Hkv, 3 D, d_g], q_norm and k_norm [d_g]. Training starts from the mean
    of a group's queries and the means of the blocks, d_g of their D numbers. The truth is the largest
    probability in each block and over the group, normalised over the blocks before the query's own; the
    queries are one of 16 in the second half of a window.

    ``per_head`` (ours) trains a gate that scores every query head: q [H, D, d_g] and k [Hkv, 3 D, d_g], no
    norm, truth per head, and the estimate of a group is the mean of its heads' estimates. A recipe's tensors
    say which kind it is. With d_g = D it begins as the product of mean-pooled queries and keys. Compressed
    keys are as large as those of the other kind.

    Departures: the official code rotates a block that fills up during decode at the position of its last key.
    The own block, which holds later keys in training, is not scored. The first block is always read. The loss
    (``gate_loss``) has the paper's divergence, and that of the blocks which are not always read.
    """

    name: ClassVar[str] = "seer_decode"
    title: ClassVar[str] = "SeerAttention-R"
    paper: ClassVar[str] = "2506.08889"
    trained_with: ClassVar[tuple[str, ...]] = ("block",)
    needs: ClassVar[Needs] = Needs(
        queries_before_rope=True,
        keys_before_rope=True,
        weights={
            "q": (None, None, None),
            "k": ("num_kv_heads", None, None),
        },
    )

    k: int | None = 1024
    threshold: float | None = None
    block: int = 64
    gate_dim: int = 32
    per_head: bool = False
    dense_layers: int = 0
    recipe: str = ""
    gate: BlockGate | None = field(default=None, repr=False, compare=False, metadata={"spec": False})

    def __post_init__(self) -> None:
        require(self, k=(1, None), threshold=(0, 1.0), block=(1, None), gate_dim=(2, None))
        require(self, dense_layers=(0, None))
        if self.k is None and self.threshold is None:
            raise SpecError("seer_decode takes a budget: k=TOKENS, threshold=, or both; got none.")
        if self.gate_dim % 2:
            raise SpecError(f"seer_decode rotates pairs: gate_dim must be even; got {self.gate_dim}.")

    @property
    def module(self) -> BlockGate | None:
        return self.gate

    @property
    def summaries(self) -> tuple[Summary, ...]:
        size = self.gate_dim if self.gate is None else self.gate.size
        return (CompressedKeys(self.block, size, self.gate),)

    def for_layer(self, layer: LayerInfo) -> AttentionMethod | None:
        if layer.index < self.dense_layers:
            return None
        weights = layer.checked(self)
        kind = GroupGate if "q_norm" in weights else BlockGate
        return dataclasses.replace(self, gate=kind.load(layer, weights))

    def for_training(self, layer: LayerInfo) -> AttentionMethod | None:
        if layer.index < self.dense_layers:
            return None
        kind = BlockGate if self.per_head else GroupGate
        return dataclasses.replace(self, gate=kind.start(layer, self.gate_dim))

    def observed(self, q: Tensor, keys: Keys) -> State:
        return observe_rows(q, keys, self.block, "each" if self.per_head else "group")

    def loss_of(self, observed: State) -> Tensor:
        assert self.gate is not None
        return loss_of_rows(self.gate, observed, self.block)

    def reads(self, queries: Queries) -> Cost:
        if self._covers(queries.length):
            return queries.cost()
        own, length = (queries.seen - 1) // self.block, queries.length
        size = max(2, (length if self.k is None else self.k) // self.block)
        keys = queries.of_blocks(length if self.k is None or self.k >= length else size, own, own, self.block)
        return queries.cost(keys, selection=queries.entries(*self.summaries), exact=not self.threshold)

    def _covers(self, length: int) -> bool:
        return length <= 2 * self.block or (not self.threshold and (self.k is None or self.k >= length))

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        if self._covers(keys.longest()):
            return None
        assert self.gate is not None
        seen = keys.seen()  # [B or 1, 1, Tq]
        at = (seen - 1)[:, :, None]  # [B or 1, 1, 1, Tq]
        own, fed, entries = at[..., None] // self.block, keys.inputs, keys.summary(*self.summaries)
        logits = self.gate.logits(fed.queries_before_rope, at, entries, self.block, fed.frequencies)
        cols = torch.arange(logits.shape[-1], device=q.device)
        shares = logits.masked_fill(cols >= own, -torch.inf).softmax(-1)
        shares = shares[:, :, 0] if shares.shape[2] == 1 else shares.mean(2)
        own = own[:, :, 0]
        forced = (cols == own) | (cols == 0)
        shares = torch.where(cols < own, shares, -torch.inf)
        size, most = own[..., 0] + 1, len(cols)
        if self.k is not None:
            blocks = max(2, self.k // self.block)
            size, most = torch.where(seen <= self.k, size, size.clamp(max=blocks)), min(most, blocks + 1)
        if self.threshold:
            size = torch.minimum(size, (forced | (shares >= self.threshold)).sum(-1))
        ranked = shares.masked_fill(forced, torch.inf)
        chosen, counts = select_topk(ranked, size.expand(ranked.shape[:3]), most)
        first = 0 if keys.start is None else keys.start[:, None, None, None]
        rows = torch.arange(keys.past, keys.length, device=q.device)[:, None]
        return page_tokens(chosen, counts, self.block, first, rows)
