"""The abstraction of a layer that reads a whole sequence at once, for encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

_REGISTRY: dict[str, type[EncoderMixer]] = {}


def registered() -> dict[str, type[EncoderMixer]]:
    """Every encoder mixer that has a name, by name."""
    return dict(_REGISTRY)


class EncoderMixer(nn.Module):
    """Base of the modules that may stand in place of an encoder's self-attention
    (``farspan.runtime.hf.put_encoder_mixers``).

    It reads later tokens, so it is no ``Mixer``, keeps no state and cannot stand in a causal LM. It begins
    with random weights: it must be trained. It obeys one law: a row with padding, on any side, gives its
    other tokens the outputs of the row alone.

    One of this package is made by ``EncoderMixer(hidden_size, *, parameters)``. A class with a ``name`` is
    registered by being defined.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""  # as the paper calls it
    paper: ClassVar[str] = ""  # arXiv id
    hidden_size: int  # numbers of a hidden state

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            _REGISTRY[cls.name] = cls

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """hidden [B, T, hidden] -> [B, T, hidden]. mask: [B, T] bool, False where a token is padding, on any
        side of a row; None where there is none. Outputs at padding mean nothing."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward.")


def by_length(x: Tensor, count: Tensor | None, mix: Callable[[Tensor], Tensor]) -> Tensor:
    """``mix`` of rows of one length at a time: x [B, T, C], real in each row's first count [B] tokens (all
    for None) -> [B, T, C'], zero behind them. For what depends on a row's length, such as Fourier
    transforms."""
    lengths = [] if count is None else [n for n in count.unique().tolist() if n]
    if count is None or not lengths:
        return mix(x)
    parts = {n: mix(x[count == n, :n]) for n in lengths}
    out = parts[lengths[0]].new_zeros(*x.shape[:2], parts[lengths[0]].shape[2])
    for n, part in parts.items():
        out[count == n, :n] = part
    return out
