"""What a plan is made for: a model by its numbers, devices, and a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ...attention.cost import DECODE, PREFILL, Cost
from ...attention.dense import Dense
from ...attention.errors import FarspanError
from ...attention.method import AttentionMethod
from ..mechanisms.volume import MECHANISMS, Geometry, PrefillCall
from .device import Device
from .storages import PLAIN, Stored

MOST_RANKS = 4096  # the simulation needs time and memory of ranks * ranks
_DENSE = Dense()


@dataclass(frozen=True)
class LayerShape:
    """Attention of one layer. window: the most keys that a query sees; None: all."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A causal LM by its numbers.

    layers: the attention layers. parameters: of the whole model. layer_parameters: of all layers, those that
    one token is multiplied with (in a mixture, of its chosen experts). intermediate: width of the MLP (in a
    mixture, of all experts of a token). element_size: bytes of a number in weights, activations and the
    cache. mixers: layers in which a mixer has replaced attention, which are not among ``layers``; mixer_kv:
    bytes of a token's keys and values in the attention that they replace; mixer_states: bytes of their states
    for a sequence, before its first token; mixer_growth: bytes by which each token makes these larger.
    positions: those the model was made for; None: no limit. stretchable: whether --rope can give it more.
    in_order: whether some layer has a recurrent state, for which each rank takes a contiguous shard.
    """

    name: str
    layers: tuple[LayerShape, ...]
    hidden: int
    intermediate: int
    vocab: int
    parameters: int
    layer_parameters: int
    element_size: int = 2
    mixers: int = 0
    mixer_kv: int = 0
    mixer_states: int = 0
    mixer_growth: int = 0
    positions: int | None = None
    stretchable: bool = False
    in_order: bool = False

    def geometry(self, layer: LayerShape, tensor: int = 1) -> Geometry:
        """The sizes of a layer on one of ``tensor`` devices that divide its heads."""
        return Geometry(
            layer.num_heads // tensor, layer.num_kv_heads // tensor, layer.head_dim, self.element_size
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """The run that is planned.

    length: tokens of the prompt. gpus: devices. tensor: devices that divide each layer's weights and heads
    among them; gpus / tensor is the number of ranks of the sequence. memory: bytes of a device. weights:
    bytes of the whole model. prefill, decode: the methods. chunk: tokens of one call of a chunked prefill;
    None: one call. batch: prompts at once. mechanism: "auto" or one of volume.MECHANISMS. storage: how
    the cache keeps keys and values. Raises FarspanError for numbers that are not allowed.
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
    storage: Stored = PLAIN

    def __post_init__(self) -> None:
        for name in ("length", "gpus", "memory", "tensor", "batch"):
            if getattr(self, name) < 1:
                raise FarspanError(f"A plan needs {name} of at least 1; got {getattr(self, name)}.")
        if self.mechanism not in ("auto", *MECHANISMS):
            raise FarspanError(
                f"There is no mechanism {self.mechanism!r}; give auto, {', '.join(MECHANISMS)}."
            )
        if self.gpus % self.tensor:
            raise FarspanError(
                f"{self.gpus} GPUs cannot be cut into groups of {self.tensor}; give a multiple of that."
            )
        if self.ranks > MOST_RANKS:
            raise FarspanError(
                f"A plan takes up to {MOST_RANKS} ranks, and {self.gpus} GPUs in groups of {self.tensor} are "
                f"{self.ranks}: give fewer GPUs."
            )
        if self.decode.evict and self.ranks > 1:
            raise FarspanError(
                f"The plan of {self.decode} is for one device: give one GPU, or evict=false. patch() refuses "
                "methods over ranks that evict in some heads alone (duo), and runs the others."
            )
        for layer in set(self.model.layers):
            if layer.num_heads % self.tensor or layer.num_kv_heads % self.tensor:
                raise FarspanError(
                    f"Tensor parallelism of {self.tensor} does not divide both {layer.num_heads} query "
                    f"heads and {layer.num_kv_heads} KV heads; give a common divisor."
                )

    @property
    def ranks(self) -> int:
        """Ranks that share the sequence."""
        return self.gpus // self.tensor

    @property
    def local_ranks(self) -> int:
        """Ranks of the sequence on one node."""
        return max(1, self.device.per_node // self.tensor)

    @cached_property
    def prefill_cost(self) -> Cost:
        """The declared cost of the prefill's method in one layer."""
        return self._cost(self.prefill, PREFILL)

    @cached_property
    def decode_cost(self) -> Cost:
        """The declared cost of the decode's method in one layer."""
        return self._cost(self.decode, DECODE)

    def _cost(self, method: AttentionMethod, phase: str) -> Cost:
        size, head_dim = self.model.element_size, self.model.layers[0].head_dim
        return method.cost(phase, self.length, head_dim=head_dim, element_size=size)

    def methods(self, index: int) -> tuple[AttentionMethod, AttentionMethod]:
        """Those of layer ``index`` of the model's attention layers, in prefill and at decode."""
        prefill, decode = [_DENSE if index < x.dense_layers else x for x in (self.prefill, self.decode)]
        return prefill, decode

    @property
    def num_calls(self) -> int:
        """Calls of the prefill."""
        return -(-self.length // min(self.chunk or self.length, self.length))

    def call(self, index: int) -> tuple[int, int]:
        """(new, past) of one call of the prefill."""
        step = min(self.chunk or self.length, self.length)
        return min(step, self.length - index * step), index * step

    def prefill_call(self, new: int, past: int) -> PrefillCall:
        """The same call as it is divided among the ranks of the sequence."""
        grid = self.local_ranks if 1 < self.local_ranks < self.ranks else None
        return PrefillCall(
            self.ranks, new, past, ulysses=grid, batch=self.batch, in_order=self.model.in_order
        )

    @property
    def calls(self) -> list[tuple[int, int]]:
        """(new, past) of each call of the prefill."""
        return [self.call(i) for i in range(self.num_calls)]
