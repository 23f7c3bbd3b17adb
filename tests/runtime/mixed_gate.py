"""A gate of the user's own whose summaries read everything that a summary can read.

It is no paper's method. It chooses blocks as ``pooled_gate`` does, by entries that depend on queries, keys,
values, hidden states, keys before RoPE and positions of a block, and by labels of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from farspan.attention import method as registry
from farspan.attention.keys import Keys, State
from farspan.attention.ops.pool import pool
from farspan.attention.sources import Source, Sources
from farspan.attention.summary import Summary, identity

from .pooled_gate import Gate, PooledGate

NAME = "mixed_gate"


@dataclass(frozen=True)
class Core:
    """A block's keys weighed by its last query, with the means of all else beside them, as one sum [D]."""

    block: int
    dtype: ClassVar[None] = None
    most: ClassVar[None] = None
    reads: ClassVar[frozenset[Source]] = frozenset(
        {"keys", "values", "queries", "keys_before_rope", "hidden_states", "positions"}
    )

    @property
    def key(self) -> tuple:
        return ("core", self.block)

    def width(self, head_dim: int) -> int:
        return head_dim

    def compute(self, x: Sources) -> Tensor:
        size, d = self.block, x.keys.shape[3]
        group = x.queries.shape[1] // x.keys.shape[1]
        cores = []
        for q, k in zip(x.queries.split(size, 2), x.keys.split(size, 2), strict=True):
            last = q[:, :, -1:].unflatten(1, (-1, group)).mean(2)
            cores.append((last @ k.mT * d**-0.5).softmax(-1) @ k)
        turned = x.keys_before_rope * (x.positions[:, None, :, None] % 7)
        hidden = x.hidden_states[:, None, :, :d]
        return torch.cat(cores, 2) + pool(x.values + turned + hidden, size, mode="mean")


@dataclass(frozen=True)
class Boundary:
    """A number for each token, of its hidden state by the weights of a gate."""

    gate: Gate
    block: ClassVar[None] = None
    dtype: ClassVar[None] = None
    most: ClassVar[None] = None
    reads: ClassVar[frozenset[Source]] = frozenset({"hidden_states"})

    @property
    def key(self) -> tuple:
        return ("boundary", identity(self.gate))

    def width(self, head_dim: int) -> int:
        return 1

    def compute(self, x: Sources) -> Tensor:
        weights = self.gate.k[:1].detach().to(x.hidden_states)
        return (x.hidden_states[..., : weights.shape[1]] @ weights.T)[:, None]


@dataclass(frozen=True)
class Bias:
    """A number for each token and KV head, of its value, key before RoPE and position."""

    block: ClassVar[None] = None
    dtype: ClassVar[None] = None
    most: ClassVar[None] = None
    key: ClassVar[tuple] = ("bias",)
    reads: ClassVar[frozenset[Source]] = frozenset({"values", "keys_before_rope", "positions"})

    def width(self, head_dim: int) -> int:
        return 1

    def compute(self, x: Sources) -> Tensor:
        odd = x.positions[:, None, :, None] % 3
        return x.values.sum(-1, keepdim=True) + odd * x.keys_before_rope[..., :1]


@dataclass(frozen=True, kw_only=True)
class MixedGate(PooledGate):
    """Blocks by their core, and by the largest of their tokens' labels; every other one also by what the last
    tokens of a prompt are."""

    name: ClassVar[str] = NAME

    @property
    def summaries(self) -> tuple[Summary, ...]:
        labels = () if self.gate is None else (Boundary(self.gate), Bias())
        return (Core(self.block), *labels)

    last_queries: ClassVar[int] = 5
    observation_window: ClassVar[int] = 3

    def prepare_prefill(self, q: Tensor, keys: Keys) -> State:
        return {"edge": keys.inputs.last(q.shape[2]).queries_before_rope.mean((1, 2, 3))}

    def on_prefill_end(self, q: Tensor, keys: Keys) -> None:
        assert keys.inputs.tq == q.shape[2]
        keys.state["tone"] = keys.inputs.hidden_states.mean((1, 2)) + keys.inputs.keys_before_rope.sum(
            (1, 2, 3)
        )

    def entries(self, keys: Keys) -> Tensor:
        core, *labels = self.summaries
        found = keys.summary(core).clone()
        for label in labels:
            x = keys.summary(label)[..., 0]
            if keys.peers is not None:
                x = keys.peers.gather(x, keys.length)
            for b, first in enumerate(keys.starts or [0] * len(x)):
                most = pool(x[b : b + 1, :, first:, None], self.block, mode="max")
                found[b, :, : most.shape[2]] += most[0]
        for more in (keys.prepared.get("edge"), keys.state.get("tone")):
            if more is not None:
                found[:, :, ::2] += more[:, None, None, None]
        return found


registry._REGISTRY.pop(NAME)  # other tests in this process go over all registered methods
