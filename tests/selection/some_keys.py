"""Keys of which one rank of several has some."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from farspan.attention.keys import Keys


@dataclass(kw_only=True)
class SomeKeys(Keys):
    """Those keys of a call that one of several ranks has, at ``at`` [N]."""

    at: Tensor
    total: int

    @property
    def length(self) -> int:
        return self.total

    def held(self, length: int) -> int:
        return int((self.at < length).sum())

    def places(self) -> Tensor:
        return self.at
