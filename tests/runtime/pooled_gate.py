"""A gate of the user's own, as the tests of gates use it: SeerAttention's (2410.13276) without training.

Mean-pooled queries and keys before RoPE, each through a projection of the gate's module, choose blocks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from farspan.attention import method as registry
from farspan.attention.blocks import Grid
from farspan.attention.calibration.truth import block_truth, kl_of_rows
from farspan.attention.gqa import group_scores
from farspan.attention.keys import Keys, State
from farspan.attention.lookahead import Lookahead
from farspan.attention.method import AttentionMethod, LayerInfo
from farspan.attention.needs import Needs
from farspan.attention.ops.pool import pool
from farspan.attention.ops.scores import scores
from farspan.attention.selection import Index, TokenIndex
from farspan.attention.softmax import Softmax
from farspan.attention.summary import BlockPool, Summaries, Summary

BLOCK = 8
NAME = "pooled_gate"


class Gate(nn.Module):
    """One layer's projections of pooled queries and keys, [D -> dim]."""

    def __init__(self, layer: LayerInfo, dim: int) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(layer.index)
        shape = (dim, layer.head_dim)
        self.q = nn.Parameter(torch.randn(shape, generator=made) * layer.head_dim**-0.5)
        self.k = nn.Parameter(torch.randn(shape, generator=made) * layer.head_dim**-0.5)


@dataclass(frozen=True, kw_only=True)
class PooledGate(AttentionMethod):
    """Blocks by (Q mean(q)) . (K mean(k)) before RoPE, besides the first and the own one; at decode by each
    query itself. trained: Q and K come from a recipe."""

    name: ClassVar[str] = NAME
    title: ClassVar[str] = "Pooled gate before RoPE"
    trained_with: ClassVar[tuple[str, ...]] = ("block",)
    needs: ClassVar[Needs] = Needs(queries_before_rope=True, keys_before_rope=True, hidden_states=True)

    blocks: int = 3
    block: int = BLOCK
    dim: int = 8
    trained: bool = False
    gate: Gate | None = field(default=None, repr=False, compare=False, metadata={"spec": False})

    def __post_init__(self) -> None:
        if self.trained:
            weights = {"q": (self.dim, "head_dim"), "k": (self.dim, "head_dim")}
            object.__setattr__(self, "needs", dataclasses.replace(self.needs, weights=weights))

    def for_training(self, layer: LayerInfo) -> AttentionMethod:
        return dataclasses.replace(self, gate=Gate(layer, self.dim))

    def observed(self, q: Tensor, keys: Keys) -> State:
        fed = keys.inputs
        return {
            "queries": pool(fed.queries_before_rope, self.block, mode="mean"),
            "means": pool(fed.keys_before_rope, self.block, mode="mean"),
            "truth": block_truth(q, keys, self.block, self.block),
        }

    def loss_of(self, observed: State) -> Tensor:
        found = self._scores(observed["queries"], observed["means"]).flatten(1, 2)
        later = torch.ones(found.shape[-2:], dtype=torch.bool).triu(1)
        return kl_of_rows(found.masked_fill(later, -torch.inf).log_softmax(-1), observed["truth"])

    def for_layer(self, layer: LayerInfo) -> AttentionMethod:
        gate = Gate(layer, self.dim)
        if self.trained:
            gate.load_state_dict(dict(layer.checked(self)))
        return dataclasses.replace(self, gate=gate)

    @property
    def module(self) -> nn.Module | None:
        return self.gate

    @property
    def lookahead(self) -> Lookahead:
        return Lookahead.of_block(self.block)

    @property
    def block_multiple(self) -> int:
        return self.block

    @property
    def summaries(self) -> tuple[Summary, ...]:
        return (BlockPool(self.block, of="keys_before_rope"),)

    def entries(self, keys: Keys) -> Tensor:
        """[B, Hkv, N, D], one for each block."""
        return keys.summary(*self.summaries)

    def _scores(self, q: Tensor, means: Tensor) -> Tensor:
        assert self.gate is not None
        return scores(q @ self.gate.q.T.to(q), means @ self.gate.k.T.to(q), Softmax(1.0))

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        assert keys.inputs.hidden_states.shape[1] == q.shape[2]
        grid = Grid.of(keys, self.block, self.block)
        means = self.entries(keys)
        found = self._scores(pool(keys.inputs.queries_before_rope, self.block, mode="mean"), means)
        ranked = group_scores(found, (grid.cols < grid.first[:, None])[None], "none")
        forced = grid.between(grid.first, grid.last) | (grid.cols == 0)
        return grid.choose(ranked, forced, self.blocks)

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        means = self.entries(keys)  # [B, Hkv, N, D]
        found = self._scores(keys.inputs.queries_before_rope, means)
        first = torch.zeros(1, device=q.device) if keys.start is None else keys.start
        rows = torch.arange(keys.past, keys.length, device=q.device)
        own = (rows - first.long()[:, None]) // self.block  # [B, Tq]
        cols = torch.arange(means.shape[2], device=q.device)
        ranked = group_scores(found, cols < own[..., None], "none")
        forced = (cols == own[..., None]) | (cols == 0)
        ranked = ranked.masked_fill(forced[:, None], torch.inf)
        size = min(self.blocks, means.shape[2])
        value, chosen = ranked.topk(size, -1)  # [B, Hkv, Tq, M]
        tokens = chosen[..., None] * self.block + torch.arange(self.block, device=q.device)
        tokens = (tokens + first.long()[:, None, None, None, None]).flatten(-2)
        valid = (tokens <= rows[:, None]) & (value > -torch.inf).repeat_interleave(self.block, -1)
        order = (~valid).int().argsort(dim=-1, stable=True)
        tokens = tokens.where(valid, keys.length - 1).gather(-1, order)
        return TokenIndex(tokens=tokens, counts=valid.sum(-1).int())


@dataclass(frozen=True, kw_only=True)
class Anew(PooledGate):
    """The same with its summary made from scratch in every call."""

    name: ClassVar[str] = NAME + "_anew"

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        return super().select_prefill(q, dataclasses.replace(keys, summaries=Summaries()))

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        return super().select_decode(q, dataclasses.replace(keys, summaries=Summaries()))


for made in (NAME, NAME + "_anew"):
    registry._REGISTRY.pop(made)  # other tests in this process go over all registered methods
