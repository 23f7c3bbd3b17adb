"""DuoAttention: streaming KV heads keep the first and the last keys, retrieval heads keep all."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..attend import DECODE_ROWS
from ..calibration.duo import HeadAlphas, StreamingError, streaming_heads
from ..checks import require
from ..cost import Cost, Queries
from ..errors import SpecError
from ..eviction import Eviction, stay
from ..keys import Keys
from ..kv import KV
from ..method import AttentionMethod, LayerInfo
from ..needs import Needs
from ..ops.flash import flash
from ..selection import ByHead, EveryKey, Index, Window
from ..softmax import Softmax


@dataclass(frozen=True, kw_only=True)
class DuoAttention(AttentionMethod):
    """Streaming KV heads read the first ``sinks`` and the last ``recent`` keys, the other heads read every
    key (DuoAttention, 2410.10819), in prefill and at decode.

    A recipe has an ``alpha`` for each KV head of the model, near 1 for a retrieval head. The share
    ``streaming`` of all heads with the lowest alphas streams, so layers differ in how many do. ``farspan
    calibrate`` measures how far streaming changes a head's output on a text; ``farspan train`` optimises the
    alphas on passkeys, as the paper does. With ``evict`` the cache drops the other keys of streaming heads
    after each call, so its memory falls. A crop by more than 16 tokens is then refused where it would need
    dropped keys, and nothing is dropped where another method serves prefill.
    Departures: 16 recent keys more than ``recent`` are kept, which crops may need, but they are not read. In
    a prompt every query reads its own ``recent`` keys; the authors' code lets those of a chunk read the whole
    chunk. Departures of the training stand in ``runtime/training/blended.py``.
    """

    name: ClassVar[str] = "duo"
    title: ClassVar[str] = "DuoAttention"
    paper: ClassVar[str] = "2410.10819"

    streaming: float = 0.5
    sinks: int = 64
    recent: int = 256
    evict: bool = True
    recipe: str = ""
    stream: Tensor | None = field(default=None, repr=False, compare=False, metadata={"spec": False})
    alphas: HeadAlphas | None = field(default=None, repr=False, compare=False, metadata={"spec": False})

    def __post_init__(self) -> None:
        require(self, sinks=(0, None), recent=(1, None))
        if not 0 <= self.streaming <= 1:
            raise SpecError(f"duo takes a share of KV heads, 0 to 1, for streaming; got {self.streaming}.")

    @property
    def evicts_in_some_heads(self) -> bool:
        return self.evict

    @property
    def needs(self) -> Needs:
        return Needs(weights={"alpha": ("num_kv_heads",)})

    @property
    def recipe_maker(self) -> str:
        return "'farspan calibrate --method duo' or 'farspan train duo'"

    def for_layer(self, layer: LayerInfo) -> AttentionMethod | None:
        if layer.weights is not None and not layer.weights and layer.tensors:
            return None  # the model's own window, for which a recipe has nothing
        own = {f"layers.{layer.index}.alpha": layer.checked(self)["alpha"]}
        stream = streaming_heads({**(layer.tensors or {}), **own}, self.streaming)[layer.index]
        return replace(self, stream=layer.own(stream)) if bool(stream.any()) else None

    def calibration(self, layer: LayerInfo) -> StreamingError:
        """The ``alpha`` of a KV head is the relative change of its output when it streams, at most 1."""
        return StreamingError(layer, self.sinks, self.recent)

    def for_training(self, layer: LayerInfo) -> AttentionMethod | None:
        return replace(self, alphas=HeadAlphas(layer.num_kv_heads))

    @property
    def module(self) -> nn.Module | None:
        return self.alphas

    def blended(self, q: Tensor, kv: KV, softmax: Softmax) -> Tensor:
        assert self.alphas is not None, "for_training was not called"
        keys = Keys(kv=kv, tq=q.shape[2], softmax=softmax)
        part, _ = self._window.run_prefill(q, keys, range(keys.tq), "auto")
        return self.alphas(flash(q, kv, softmax), part, softmax)

    @cached_property
    def _heads(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The KV heads that keep every key, and those that stream."""
        assert self.stream is not None, "for_layer was not called"
        return tuple((~self.stream).nonzero()[:, 0].tolist()), tuple(self.stream.nonzero()[:, 0].tolist())

    @property
    def _window(self) -> Window:
        return Window(size=self.recent, sinks=self.sinks)

    def reads(self, queries: Queries) -> Cost:
        """Of a layer in which the share ``streaming`` of the heads streams, where it is not bound to one."""
        seen = queries.seen.double()
        read = seen.clamp(max=self.sinks + self.recent)
        return queries.cost((1 - self._share) * seen + self._share * read)

    @property
    def _share(self) -> float:
        return self.streaming if self.stream is None else float(self.stream.float().mean())

    def keys_left(self, phase: str, length: int) -> float:
        window = min(length, self.sinks + self.recent + DECODE_ROWS)
        return (1 - self._share) * length + self._share * window

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        return self._select(keys)

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        return self._select(keys)

    def _select(self, keys: Keys) -> Index:
        if keys.longest() <= self.sinks + self.recent and not keys.parted:
            return None
        keys.check_evicting(self._heads[1])
        both = zip(self._heads, (EveryKey(), self._window), strict=True)
        return ByHead(parts=tuple((heads, selection) for heads, selection in both if heads))

    def eviction(self, keys: Keys, phase: str) -> Eviction | None:
        _, streaming = self._heads
        keys = keys.of_heads(streaming) if keys.parted else keys
        recent = self.recent + DECODE_ROWS
        if not streaming or keys.length <= self.sinks + recent + max(DECODE_ROWS, (self.sinks + recent) // 8):
            return None  # many are dropped at a time, so that the others are rarely copied
        first = torch.arange(self.sinks, device=keys.kv.device)
        first = first.expand(keys.kv.batch, len(streaming), -1)
        first = first if keys.start is None else first + keys.start[:, None, None]
        return Eviction(slots=stay(first, recent, keys), crop=DECODE_ROWS, heads=streaming)
