"""The mixers of a patched model, and their entries in the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..attention.errors import SpecError
from ..attention.hybrid.encoder import EncoderMixer
from ..attention.hybrid.mixer import Mixer, State
from .layer_numbers import by_layer


@dataclass
class MixerReport:
    """The calls of a mixer in one layer. Its pairs are not counted.

    state_bytes: of one row's state after the last call. bytes_per_token: by how much it grows; 0 for a state
    of constant size.
    """

    layer: int
    mixer: str
    state_bytes: int
    bytes_per_token: float = 0.0
    calls: int = 0
    tokens: int = 0

    @property
    def kind(self) -> tuple[str, int, float]:
        """What layers have in common that share a line of the report."""
        return self.mixer, self.state_bytes, self.bytes_per_token


class Mixed:
    """A mixer in place of a layer's attention, and its counts."""

    def __init__(self, index: int, mixer: Mixer) -> None:
        self.index, self.mixer = index, mixer
        self.clear_report()

    def clear_report(self) -> None:
        """Set the counts to zero."""
        mixer = self.mixer
        self.report = MixerReport(self.index, mixer.name, mixer.state_bytes, state_growth(mixer))

    def count(self, hidden: Tensor, state: State) -> None:
        """Count a call with hidden states [B, T, hidden] that has returned ``state``."""
        self.report.calls += 1
        self.report.tokens += hidden.shape[0] * hidden.shape[1]
        self.report.state_bytes = sum(x.nbytes // x.shape[0] for x in state)


def state_growth(mixer: Mixer) -> float:
    """Bytes by which one row's state grows at each token, on average: 0 for a state of constant size."""
    return sum(part.bytes_after(part.every) / part.every for part in mixer.growing)


def mixed_layers(
    mixers: Mapping[int, Any], count: int, attention: Mapping[int, Any], hidden_size: int
) -> dict[int, Mixed]:
    """Check the mixers and return them by layer.

    count: number of layers of the model. attention: the attention modules by layer.

    Raises SpecError for a layer that does not exist or has no attention, for a module that is not a Mixer or
    has another hidden size than the model, and for one module in two layers.
    """
    found: dict[int, Mixed] = {}
    for index, (_, mixer) in by_layer("mixers", mixers, count).items():
        if index not in attention:
            raise SpecError(
                f"mixers= names layer {index}, which has no attention: name a layer that has attention."
            )
        if isinstance(mixer, EncoderMixer):
            raise SpecError(
                f"mixers= gives layer {index} the encoder mixer {mixer.name}, which reads later tokens and "
                "cannot stand in a causal LM: take another mixer, or put it into an encoder with "
                "farspan.runtime.hf.put_encoder_mixers."
            )
        if not isinstance(mixer, Mixer):
            raise SpecError(
                f"mixers= takes modules that are a farspan.attention.hybrid.mixer.Mixer; got a "
                f"{type(mixer).__name__} for layer {index}."
            )
        if mixer.hidden_size != hidden_size:
            raise SpecError(
                f"The mixer {mixer.name} for layer {index} has hidden_size {mixer.hidden_size}, but the "
                f"model has {hidden_size}: make the mixer with hidden_size={hidden_size}."
            )
        if any(mixer is other.mixer for other in found.values()):
            raise SpecError(
                f"mixers= gives layer {index} the module of another layer: give each layer its own module."
            )
        found[index] = Mixed(index, mixer)
    return found
