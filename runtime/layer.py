"""A patched layer: its methods, its store for the running call, and its part of the report."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from torch import Tensor

from ..attention.attend import DECODE_ROWS, attend
from ..attention.dense import Dense
from ..attention.errors import FarspanError
from ..attention.keys import Keys, State
from ..attention.method import DECODE, PREFILL, AttentionMethod
from ..attention.ops.dispatch import implementations
from ..attention.ops.flash import flash
from ..attention.partial import add_sinks
from ..attention.summary import Summaries
from .cache import KVStore, lasting
from .report import PhaseReport

NO_CACHE = "no KV cache, so every call is a prefill"
FOREIGN = "keys that are not the cache's own"
UNEXPECTED = frozenset({NO_CACHE, FOREIGN})
_DENSE = Dense()


@dataclass
class Padding:
    """Where rows begin: ``start`` [B] on the device and ``starts`` on the host, both None where no row is
    padded."""

    start: Tensor | None = None
    starts: list[int] | None = None


class Stores(Protocol):
    """The stores of the running call, by layer."""

    def __getitem__(self, index: int) -> KVStore | None: ...


class Session(threading.local):
    """What the layers of one patched model share during a forward call; threads may call it at the same
    time."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.cached = False  # whether the running call keeps its keys
        self.stores: Stores | None = None
        self._paddings: dict[int, tuple[Tensor, Padding]] = {}  # by mask id: each kind of layer has its mask

    def padding(self, mask: Tensor | None, batch: int, length: int) -> Padding:
        """Read a 2-D mask [B, Tk], True where a token is. Worked out once for all the layers that are given
        it."""
        if mask is None:
            return Padding()
        if mask.dim() != 2:
            raise FarspanError(
                f"farspan takes a 2-D attention mask for left padding; got a {mask.dim()}-D one."
            )
        if id(mask) not in self._paddings:
            self._paddings[id(mask)] = mask, read_padding(mask)
        if mask.shape != (batch, length):
            raise FarspanError(
                f"The attention mask covers {list(mask.shape)} (rows, positions), the keys are "
                f"{[batch, length]}: pass a mask "
                "with one entry for every token, cached ones included."
            )
        return self._paddings[id(mask)][1]

    def end(self) -> None:
        """Forget the call."""
        self.cached, self.stores, self._paddings = False, None, {}


def read_padding(mask: Tensor) -> Padding:
    """Where the rows of a left-padded 2-D mask begin. Raises FarspanError for zeros after a one."""
    mask = mask.bool()
    if bool(mask.all()):
        return Padding()
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        row = int((mask[:, 1:] < mask[:, :-1]).any(1).nonzero()[0])
        raise FarspanError(
            f"The attention mask has zeros after ones in row {row}: farspan serves left padding "
            "(tokenizer.padding_side = "
            "'left'), not right padding or holes."
        )
    start = (~mask).sum(1)
    return Padding(start, start.tolist())


def _below(keys: float) -> str:
    if keys == math.inf:
        return "not faster than dense at the longest length measured"
    return f"below the crossover of {keys:.0f} keys"


@dataclass
class Layer:
    """Attention of one layer of a patched model."""

    index: int
    prefill: AttentionMethod
    decode: AttentionMethod
    session: Session
    left_dense: str | None = None  # why the method itself leaves this layer dense
    from_keys: dict[str, float] = field(default_factory=dict)  # by phase, fewer keys are read densely
    phases: dict[str, PhaseReport] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clear_report()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise FarspanError("A patched model cannot be copied: call remove() first, then patch both.")

    @property
    def methods(self) -> dict[str, AttentionMethod]:
        """The method of each phase."""
        return {PREFILL: self.prefill, DECODE: self.decode}

    def clear_report(self) -> None:
        """Start counting anew."""
        self.phases = {PREFILL: PhaseReport(str(self.prefill)), DECODE: PhaseReport(str(self.decode))}

    @lasting()
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of q [B, H, Tq, D] (the last Tq positions) over k, v [B, Hkv, Tk, D] -> [B, Tq, H, D]."""
        b, _, tq, _ = q.shape
        padding = self.session.padding(mask, b, k.shape[2])
        store = self.session.stores[self.index] if self.session.stores is not None else None
        own = store is not None and store.holds(k)
        phase = DECODE if own and k.shape[2] > tq and tq <= DECODE_ROWS else PREFILL
        method = self.methods[phase]
        short = k.shape[2] < self.from_keys.get(phase, 0)
        if short:
            method = _DENSE
        if window is not None:
            part = flash(q, k, v, scale=scale, window=window, softcap=softcap, start=padding.start)
        else:
            keys = self._keys(q, k, v, store if own else None, padding, scale, softcap, method)
            with implementations() as ran:
                part, reads = attend(method, phase, q, keys)
            if phase == PREFILL and own:
                self.decode.after_prefill(q, self._keys(q, k, v, store, padding, scale, softcap, self.decode))
            if short:
                reads.reason = _below(self.from_keys[phase])
            elif not own and method.name == "dense" != self.decode.name:
                reads.reason = FOREIGN if self.session.cached else NO_CACHE
            elif reads.reason is None and self.left_dense and method.name == "dense":
                reads.reason = self.left_dense
            self.phases[phase].add(reads, b * tq, ran)
            if self.session.strict and reads.reason in UNEXPECTED:
                raise FarspanError(
                    f"Layer {self.index} cannot run {self.decode} and strict=True forbids dense attention "
                    f"instead: {reads.reason}."
                )
        if sinks is not None:
            part = add_sinks(part, sinks)
        return part.out.to(q.dtype).transpose(1, 2).contiguous()

    def _keys(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        store: KVStore | None,
        padding: Padding,
        scale: float,
        softcap: float | None,
        method: AttentionMethod,
    ) -> Keys:
        state: State = {}
        summaries = Summaries()
        if store is not None:
            store.align(padding.starts)
            state, summaries = store.state(str(method), k.shape[2] - q.shape[2]), store.summaries
        return Keys(
            k=k,
            v=v,
            tq=q.shape[2],
            scale=scale,
            start=padding.start,
            starts=padding.starts,
            softcap=softcap,
            state=state,
            summaries=summaries,
        )
