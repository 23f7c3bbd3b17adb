"""Mixers of a patched model, and what the report says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..attention.checks import whole_number
from ..attention.errors import SpecError
from ..attention.hybrid.mixer import Mixer


@dataclass
class MixerReport:
    """What a mixer did in one layer: it reads a state of ``state_bytes`` a row, and no pairs of query and
    key."""

    layer: int
    mixer: str
    state_bytes: int
    calls: int = 0
    tokens: int = 0


class Mixed:
    """A mixer in place of a layer's attention, and its counts."""

    def __init__(self, index: int, mixer: Mixer) -> None:
        self.index, self.mixer = index, mixer
        self.clear_report()

    def clear_report(self) -> None:
        """Start counting anew."""
        self.report = MixerReport(self.index, self.mixer.name, self.mixer.state_bytes)

    def count(self, hidden: Tensor) -> None:
        """Take in a call of hidden states [B, T, hidden]."""
        self.report.calls += 1
        self.report.tokens += hidden.shape[0] * hidden.shape[1]


def mixed_layers(
    mixers: Mapping[int, Any], count: int, attention: Mapping[int, Any], hidden_size: int
) -> dict[int, Mixed]:
    """Mixers by layer, checked. count: layers of the model; attention: those that have an attention module.

    Raises SpecError for a layer that there is not, or that has no attention, and for what is no Mixer of the
    model's hidden size.
    """
    found: dict[int, Mixed] = {}
    for name, mixer in mixers.items():
        number = whole_number(name)
        if number is None or not -count <= number < count:
            raise SpecError(f"mixers= takes layer numbers from 0 to {count - 1}; got {name!r}.")
        index = number % count
        if index in found:
            raise SpecError(f"mixers= names layer {index} twice: keep one of them.")
        if index not in attention:
            raise SpecError(f"mixers= cannot replace the attention of layer {index}: it has none.")
        if not isinstance(mixer, Mixer):
            raise SpecError(
                f"mixers= takes modules that are a farspan.attention.hybrid.mixer.Mixer; got a "
                f"{type(mixer).__name__} for layer {index}."
            )
        if mixer.hidden_size != hidden_size:
            raise SpecError(
                f"The mixer {mixer.name} for layer {index} has hidden_size {mixer.hidden_size}, the model "
                f"{hidden_size}."
            )
        if any(mixer is other.mixer for other in found.values()):
            raise SpecError(
                f"mixers= has one module for two layers, {index} among them: give each layer its own module."
            )
        found[index] = Mixed(index, mixer)
    return found
