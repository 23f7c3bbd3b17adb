"""What DHSA's fixed and learned chunks have in common, and the part of DHSA that is trained."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..budget import check_budget
from ..checks import require
from ..cost import Cost, Queries
from ..errors import SpecError
from ..keys import Keys
from ..method import AttentionMethod, LayerInfo
from ..needs import Needs
from ..selection import Index
from .dhsa_boundaries import BoundaryPredictor, boundary_loss, chunk_bounds, tokens_by_chunks


@dataclass(frozen=True, kw_only=True)
class LearnedChunks(AttentionMethod):
    """The fields of DHSA, and its selection where ``boundaries`` is "learned". See ``DHSA``."""

    trained_with: ClassVar[tuple[str, ...]] = ("boundaries", "gate_dim")

    k: int | None = None
    fraction: float | None = 0.125
    select: str = "mean"
    block_q: int = 128
    block_k: int = 32
    local: int = 64
    gqa_reduce: str = "none"
    boundaries: str = "fixed"
    segment: int = 256
    apart: int = 8
    gate_dim: int = 32
    recipe: str = ""
    predictor: BoundaryPredictor | None = field(
        default=None, repr=False, compare=False, metadata={"spec": False}
    )

    def __post_init__(self) -> None:
        check_budget(self, self.k, self.fraction)
        require(self, select=("mean", "vertical_slash"), gqa_reduce=("sum", "max", "none"))
        require(self, block_q=(1, None), block_k=(1, None), local=(1, None), boundaries=("fixed", "learned"))
        require(self, segment=(1, None), apart=(0, None), gate_dim=(1, None))
        if self.trains and (self.select != "mean" or self.segment < self.block_k):
            raise SpecError(
                "dhsa:boundaries=learned takes select=mean and a segment of at least block_k; got "
                f"select={self.select}, segment={self.segment}, block_k={self.block_k}."
            )

    @property
    def trains(self) -> bool:
        return self.boundaries == "learned"

    @property
    def couples_heads(self) -> bool:
        return self.boundaries == "learned"  # the predictor reads the keys of all KV heads

    @property
    def module(self) -> nn.Module | None:
        return self.predictor

    @property
    def _learned_needs(self) -> Needs:
        dim = self.gate_dim
        weights: dict[str, tuple[int | str | None, ...]] = {
            "hidden.weight": (dim, None),
            "hidden.bias": (dim,),
            "out.weight": (1, dim),
            "out.bias": (1,),
        }
        return Needs(keys=True, weights=weights)

    def for_layer(self, layer: LayerInfo) -> AttentionMethod | None:
        if self.boundaries == "fixed":
            return self
        predictor = BoundaryPredictor(layer, self.gate_dim)
        predictor.load_state_dict(dict(layer.checked(self)))
        return replace(self, predictor=predictor)

    def for_training(self, layer: LayerInfo) -> AttentionMethod | None:
        if self.boundaries == "fixed":
            return super().for_training(layer)
        return replace(self, predictor=BoundaryPredictor(layer, self.gate_dim))

    def distillation_loss(self, q: Tensor, keys: Keys) -> Tensor:
        if self.predictor is None:
            return super().distillation_loss(q, keys)
        return boundary_loss(self.predictor, q, keys)

    def _learned_reads(self, queries: Queries) -> Cost:
        length = queries.length
        if self._covers_tokens(length):
            return queries.cost()
        begin = (queries.seen - 1) // self.block_q * self.block_q
        end = (begin + self.block_q).clamp(max=length)
        keys = self._tokens(begin, end) - (end - queries.seen)  # without the later ones of the own block
        return queries.cost(keys, selection=queries.raw_keys(length))

    @torch.no_grad()
    def _select_learned(self, q: Tensor, keys: Keys) -> Index:
        if self._covers_tokens(keys.length):
            return None
        assert self.predictor is not None, "for_layer was not called"
        bounds = chunk_bounds(self.predictor(keys.kv.k), self.segment, self.block_k, self.apart)
        begin = torch.arange(keys.past, keys.length, self.block_q)
        return tokens_by_chunks(
            q,
            keys,
            bounds,
            self._tokens(begin, (begin + self.block_q).clamp(max=keys.length)),
            block_q=self.block_q,
            first=self.block_k,
            local=self.local,
            usual=self.block_k,
            gqa_reduce=self.gqa_reduce,
        )

    def _tokens(self, begin: Tensor, end: Tensor) -> Tensor:
        """Tokens that the block of the queries begin .. end - 1 reads."""
        near = (begin - (self.local - 1)).clamp(min=0)
        always = end - near + near.clamp(max=self.block_k)
        budget = (end * self.fraction).round().long() if self.fraction else torch.full_like(end, self.k or 0)
        return torch.maximum(budget, always).minimum(end)

    def _covers_tokens(self, length: int) -> bool:
        return self.fraction == 1 or (self.k or 0) >= length
