"""Double Sparsity's calibration: each KV head's channels, ranked."""

from __future__ import annotations

from torch import Tensor

from ..errors import FarspanError
from ..method import LayerInfo
from ..needs import Inputs, Needs
from ..softmax import Softmax

RANKINGS = ("q", "k", "qk")


class ChannelRanking:
    """``channels`` [Hkv, D] int32, each KV head's channels, best first, by running sums of |q| and |k|."""

    def __init__(self, layer: LayerInfo, by: str) -> None:
        if by not in RANKINGS:
            raise FarspanError(f"Channels are ranked by {', '.join(RANKINGS)}; got {by!r}.")
        raw = by != "qk"
        self.needs, self.settings = Needs(queries_before_rope=raw, keys_before_rope=raw), {"by": by}
        self._by, self._kv_heads = by, layer.num_kv_heads
        self._q: Tensor | float = 0.0  # [H, D]
        self._k: Tensor | float = 0.0  # [Hkv, D]

    def observe(
        self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, *, inputs: Inputs | None = None
    ) -> None:
        if inputs is not None:
            q, k = inputs.queries_before_rope, inputs.keys_before_rope
        self._q = self._q + q.double().abs().sum((0, 2)).cpu()
        self._k = self._k + k.double().abs().sum((0, 2)).cpu()

    def weights(self) -> dict[str, Tensor]:
        assert isinstance(self._q, Tensor) and isinstance(self._k, Tensor)
        q = self._q.unflatten(0, (self._kv_heads, -1)).mean(1)  # [Hkv, D]
        score = {"q": q, "k": self._k, "qk": q * self._k}[self._by]
        return {"channels": score.argsort(dim=-1, descending=True, stable=True).int()}
