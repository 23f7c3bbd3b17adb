"""What a plan is asked about: a model by its numbers, devices, and a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ...attention.cost import DECODE, PREFILL, Cost
from ...attention.dense import Dense
from ...attention.errors import FarspanError
from ...attention.method import AttentionMethod
from ..mechanisms.volume import MECHANISMS, Geometry
from .device import Device

MOST_RANKS = 4096  # the replay takes time and memory of ranks * ranks
_DENSE = Dense()


@dataclass(frozen=True)
class LayerShape:
    """Attention of one layer. window: keys that a query sees at most, None for all."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A causal LM by its numbers.

    layers: the attention layers. parameters: of the whole model. layer_parameters: of all layers together,
    those that one token passes (of a mixture, its chosen experts). intermediate: width of the MLP (of a
    mixture, of all experts that a token passes). element_size: bytes of a number in weights, activations and
    the cache. positions: those it was made for, None for no limit; stretchable: whether --rope can give it
    more.
    """

    name: str
    layers: tuple[LayerShape, ...]
    hidden: int
    intermediate: int
    vocab: int
    parameters: int
    layer_parameters: int
    element_size: int = 2
    positions: int | None = None
    stretchable: bool = False

    def geometry(self, layer: LayerShape, tensor: int = 1) -> Geometry:
        """One of ``tensor`` equal shares of a layer's heads."""
        return Geometry(
            layer.num_heads // tensor, layer.num_kv_heads // tensor, layer.head_dim, self.element_size
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked.

    length: tokens of the prompt. gpus: devices, tensor of which share each layer's weights and heads; the
    others, gpus / tensor, are the ranks of the sequence. memory: bytes of a device. weights: bytes of the
    whole model. prefill, decode: the methods. chunk: tokens of one call of a chunked prefill. mechanism:
    "auto" or one of volume.MECHANISMS.
    """

    model: ModelShape
    device: Device
    length: int
    gpus: int
    memory: int
    weights: int
    prefill: AttentionMethod = _DENSE
    decode: AttentionMethod = _DENSE
    tensor: int = 1
    chunk: int | None = None
    batch: int = 1
    mechanism: str = "auto"

    def __post_init__(self) -> None:
        for name in ("length", "gpus", "memory", "tensor", "batch"):
            if getattr(self, name) < 1:
                raise FarspanError(f"A plan needs {name} of at least 1; got {getattr(self, name)}.")
        if self.mechanism not in ("auto", *MECHANISMS):
            raise FarspanError(
                f"There is no mechanism {self.mechanism!r}; it is auto, {', '.join(MECHANISMS)}."
            )
        if self.gpus % self.tensor:
            raise FarspanError(f"{self.gpus} GPUs cannot be cut into groups of {self.tensor}.")
        if self.ranks > MOST_RANKS:
            raise FarspanError(
                f"A plan spreads a prompt over up to {MOST_RANKS} ranks, and {self.gpus} GPUs in groups of "
                f"{self.tensor} are {self.ranks}: give fewer GPUs."
            )
        for layer in set(self.model.layers):
            if layer.num_heads % self.tensor or layer.num_kv_heads % self.tensor:
                raise FarspanError(
                    f"Tensor parallelism of {self.tensor} divides not both {layer.num_heads} query heads and "
                    f"{layer.num_kv_heads} KV heads."
                )

    @property
    def ranks(self) -> int:
        """Ranks that share the sequence."""
        return self.gpus // self.tensor

    @property
    def local_ranks(self) -> int:
        """Of them, those of one node."""
        return max(1, self.device.per_node // self.tensor)

    @cached_property
    def prefill_cost(self) -> Cost:
        """What the prefill's method reads in one layer."""
        return self._cost(self.prefill, PREFILL)

    @cached_property
    def decode_cost(self) -> Cost:
        """What the decode's method reads in one layer."""
        return self._cost(self.decode, DECODE)

    def _cost(self, method: AttentionMethod, phase: str) -> Cost:
        size, head_dim = self.model.element_size, self.model.layers[0].head_dim
        return method.cost(phase, self.length, head_dim=head_dim, element_size=size)

    @property
    def num_calls(self) -> int:
        """Calls of the prefill."""
        return -(-self.length // min(self.chunk or self.length, self.length))

    def call(self, index: int) -> tuple[int, int]:
        """(new, past) of one call of the prefill."""
        step = min(self.chunk or self.length, self.length)
        return min(step, self.length - index * step), index * step

    @property
    def calls(self) -> list[tuple[int, int]]:
        """(new, past) of each call of the prefill."""
        return [self.call(i) for i in range(self.num_calls)]
