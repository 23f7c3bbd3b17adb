"""Dense attention as a method: every visible key, on farspan's storage and kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .method import AttentionMethod
from .static_step import EveryKeyStep, StaticKeys, StaticStep


@dataclass(frozen=True, kw_only=True)
class Dense(AttentionMethod):
    """Every visible key is read: the model's own attention, with a cache that is not copied at every
    token."""

    name: ClassVar[str] = "dense"
    title: ClassVar[str] = "Dense attention"

    def static_step(self, keys: StaticKeys) -> StaticStep | None:
        return EveryKeyStep()
