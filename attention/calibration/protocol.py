"""What ``farspan.calibrate`` asks of a calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..needs import Inputs, Needs
from ..softmax import Softmax


class Calibration(Protocol):
    """Learns one layer's weights by observing its dense attention over windows of a text.

    needs: which ``inputs`` ``observe`` is given. settings: the options it learns with, which the recipe
    records.
    """

    @property
    def needs(self) -> Needs: ...

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def observe(
        self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, *, inputs: Inputs | None = None
    ) -> None:
        """One window of the text: q [1, H, T, D], k, v [1, Hkv, T, D], and how the layer turns q k^T into
        weights. inputs: where ``needs`` name some."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """What ``for_layer`` finds in ``LayerInfo.weights``."""
        ...


@runtime_checkable
class GradientCalibration(Calibration, Protocol):
    """A calibration that also needs the effect of a change of the layer's attention on the text's
    likelihood."""

    def observe_grad(self, gradient: Tensor) -> None:
        """gradient [1, H, T, D]: of the mean negative log-likelihood of the window that was observed last, in
        the output of its attention."""
        ...
