"""Random arguments of scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

KINDS = ("none", "ssd", "channels", "delta", "beta")  # beta: the delta rule without decays


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    state: Tensor | None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    scale: float = 0.3

    @property
    def args(self) -> tuple[Any, ...]:
        return self[:4]

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._fields[4:]}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that take gradients."""
        return {name: y for name, y in zip(self._fields[:6], self[:6], strict=True) if y is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """Every floating tensor changed; the mask and the bounds on the device of the others."""
        made = self._replace(**{name: change(y) for name, y in self.tensors.items()})
        device = made.q.device
        mask = None if self.mask is None else self.mask.to(device)
        return made._replace(
            mask=mask, cu_seqlens=None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        )

    def cut(self, begin: int, end: int) -> Inputs:
        """The tokens begin .. end; the state is kept."""
        return self._replace(
            **{name: y[:, :, begin:end] for name, y in self.tensors.items() if name != "state"},
            mask=None if self.mask is None else self.mask[:, begin:end],
        )

    def row(self, n: int) -> Inputs:
        return self._replace(**{name: y[n : n + 1] for name, y in self.tensors.items()})


def inputs(
    kind: str,
    *,
    b: int = 2,
    h: int = 4,
    hq: int = 2,
    t: int,
    dk: int,
    dv: int,
    rows: int | None = None,
    strong: float = 1.0,
    padded: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Normal q and v, unit k, decays of up to exp(-strong) a token; padded: a third of the tokens, anywhere.
    Decays and states are float32 at least."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    q, k, v = normal(b, hq, t, dk), normal(b, hq, t, dk), normal(b, h, t, dv)
    log_decay, beta = None, None
    if kind in ("ssd", "delta"):
        log_decay = -strong * uniform(b, h, t).to(wide)
    if kind == "channels":
        log_decay = -strong * uniform(b, h, t, dk).to(wide)
    if kind in ("delta", "beta"):
        beta = uniform(b, h, t).to(wide)
    return Inputs(
        q.to(dtype),
        torch.nn.functional.normalize(k, dim=-1).to(dtype),
        v.to(dtype),
        log_decay,
        beta,
        normal(b if rows is None else rows, h, dk, dv).to(wide),
        uniform(b, t) > 1 / 3 if padded else None,
    )
