"""A decode step of one token on StaticStores, for all layers of a model, and its part of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from ..attention.attend import TOO_SHORT, Reads
from ..attention.checks import whole_number
from ..attention.errors import FarspanError, Unsupported
from ..attention.method import AttentionMethod
from ..attention.ops.dispatch import implementations
from ..attention.partial import Partial
from ..attention.softmax import Softmax
from ..attention.sources import IN_NO_CACHE
from ..attention.static_step import StaticStep
from ..attention.summary import count_entries
from .report import PhaseReport
from .store.static import StaticStore

_NOTED = 1024  # steps that a ledger notes before it is settled
SERVED = "dense, window, quest, double_sparsity without label_bits and recycled without dynamic=true"


def check_methods(prefill: AttentionMethod, decode: AttentionMethod) -> None:
    """Raise Unsupported for methods of a layer that a store of fixed size does not serve."""
    if not decode.has_static_step:
        raise Unsupported(
            f"static= does not serve {decode}", [f"the methods with a step of fixed shape are {SERVED}"]
        )
    declared = (*prefill.summaries, *decode.summaries)
    if prefill.needs.inputs or any(summary.reads & IN_NO_CACHE for summary in declared):
        raise Unsupported(
            f"static= does not serve {prefill} in prefill",
            ["its inputs besides keys must be kept at every token: choose another prefill method, or dense"],
        )


class Sizes(NamedTuple):
    """What the bytes of a step depend on: heads, bytes of a key with its value, of a key, and of a summary's
    entry; and the bytes of memory of the store."""

    num_heads: int
    num_kv_heads: int
    row: int
    key: int
    entry: int
    memory: int


class Ledger:
    """The steps of a layer that are not in its report yet. All counts follow from the lengths, which the host
    knows, so no step counts anything; they are added up when a report is asked for."""

    def __init__(self) -> None:
        self._steps: list[tuple[StaticStep, list[int], int]] = []
        self._sizes: dict[str, Sizes] = {}
        self._ran: set[tuple[str, str]] = set()

    def ran(self, step: StaticStep, q: Tensor, store: StaticStore, ops: set[tuple[str, str]]) -> None:
        """A step has run by these (operation, implementation) pairs; a replay of it does not come here."""
        entries = None if step.summary is None else store.summaries.buffer(step.summary)
        entry = 0 if entries is None else entries.shape[3] * entries.element_size()
        kv = store.step.buffers
        key = kv.key_nbytes // (kv.batch * kv.num_kv_heads * kv.length)
        sizes = Sizes(q.shape[1], kv.num_kv_heads, kv.row_nbytes, key, entry, store.nbytes)
        self._sizes[step.name] = sizes
        self._ran |= ops

    def add(self, step: StaticStep, seen: list[int], total: int) -> int:
        """Note a step whose rows have seen so many keys, of a sequence of ``total`` positions. Returns how
        many steps are noted."""
        self._steps.append((step, seen, total))
        return len(self._steps)

    def clear(self) -> None:
        """Drop the steps that are not in the report."""
        self._steps = []

    def settle(self, report: PhaseReport, selective: bool, left_dense: str | None) -> tuple[int, int] | None:
        """Add the noted steps to the report. Returns, after the last one, the bytes of memory of the store
        and those of all keys and values; None without a step."""
        steps, self._steps = self._steps, []
        stored, ran = None, sorted(self._ran)
        for step, seen, total in steps:
            sizes = self._sizes[step.name]
            reads = _reads(step, seen, total, sizes)
            reads.reason = TOO_SHORT if step.every and selective else left_dense
            report.add(reads, len(seen), ran)
            stored = sizes.memory, len(seen) * sizes.num_kv_heads * total * sizes.row
        return stored


def _reads(step: StaticStep, seen: list[int], total: int, sizes: Sizes) -> Reads:
    """What a step has read, as ``attend.count_reads`` counts it."""
    h, hkv = sizes.num_heads, sizes.num_kv_heads
    shared = h // step.lists(h, hkv)
    pairs, causal = sum(map(step.read, seen)) * h, sum(seen) * h
    lists = len(seen) * hkv
    entries = 0 if step.summary is None else lists * count_entries(step.summary, total)
    return Reads(
        pairs=pairs,
        causal_pairs=causal,
        kv_bytes=pairs * sizes.row // shared,
        dense_bytes=causal * sizes.row // (shared if shared > 1 else h // hkv),
        selection_bytes=entries * sizes.entry + step.scores_keys * lists * total * sizes.key,
    )


class ServedLayer(Protocol):
    """What a step needs of a layer: its number, its decode method and the name of that one's state, and the
    ledger, whose steps ``settle`` brings into the report."""

    index: int
    decode: AttentionMethod
    ledger: Ledger

    @property
    def kept_as(self) -> str: ...

    def settle(self) -> None: ...


class StaticCall:
    """A call of one token for each row, which every layer serves by its fused step. As a context it surrounds
    the call of the decoder.

    names: the steps of the layers by name. Calls with the same names and pointers launch the same kernels.
    """

    def __init__(self, steps: list[tuple[ServedLayer, StaticStore, StaticStep]]) -> None:
        self._steps = steps
        self._by_layer = {layer.index: (store, step) for layer, store, step in steps}
        self.names = tuple(step.name for _, _, step in steps)
        first = steps[0][1]
        self._clock, self._seen = first.clock, first.step.seen()
        self.total = first.length + 1

    @classmethod
    def of(
        cls,
        layers: Mapping[int, ServedLayer],
        store_of: Callable[[int], object],
        tokens: Tensor | None,
        masked: bool,
    ) -> StaticCall | None:
        """The call of ``tokens`` [B, T, ...] as one step; None where it goes the way of a growing store: the
        prompt, several tokens, rows that begin, a step that a method does not fuse, or gradients.

        store_of: the store of a layer, by its number. masked: whether the call has a mask and position ids,
        without which padded rows take no step. The mask is not read: it continues the one of the prompt."""
        if tokens is None or tokens.shape[1] != 1 or torch.is_grad_enabled():
            return None
        steps: list[tuple[ServedLayer, StaticStore, StaticStep]] = []
        for index, layer in layers.items():
            store = store_of(index)
            if not isinstance(store, StaticStore) or not _goes_on(store, tokens.shape[0], masked):
                return None
            step = layer.decode.static_step(store.step.of_next(layer.kept_as))
            if step is None:
                return None
            steps.append((layer, store, step))
        return cls(steps) if steps else None

    def __enter__(self) -> Self:
        starts = self._steps[0][1].starts
        self._clock.begin(self.total, starts or [0])
        try:
            for _, store, step in self._steps:
                store.begin(step)
        except BaseException:  # or the next prompt would wait for steps to store it
            self._clock.stepping = False
            for _, store, _ in self._steps:
                store.states.clear()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock.stepping = False
        for layer, store, step in self._steps:
            store.finish(step, done=kind is None)
            if kind is None and layer.ledger.add(step, self._seen, self.total) >= _NOTED:
                layer.settle()

    def run(self, layer: ServedLayer, q: Tensor, softmax: Softmax) -> Partial:
        """The attention of one layer with q [B, H, 1, D], over its store and the token that it was given."""
        store, step = self._by_layer[layer.index]
        with implementations() as ran:
            part = step.run(q, store.step, softmax)
        layer.ledger.ran(step, q, store, ran)
        return part

    def pointers(self) -> tuple[int, ...]:
        """The addresses of all that the steps of the layers read and write beside their arguments."""
        return tuple(address for _, store, _ in self._steps for address in store.step.pointers())

    @property
    def stores(self) -> list[StaticStore]:
        """The stores of the layers."""
        return [store for _, store, _ in self._steps]


def _goes_on(store: StaticStore, batch: int, masked: bool) -> bool:
    """Whether one token for each of ``batch`` rows continues rows that have keys in the store."""
    starts = store.starts
    if starts is None or len(starts) != batch or store.clock.padded_right:
        return False
    return max(starts) < store.length and (masked or not any(starts))


def checked_room(static: int | None, **others: object) -> int | None:
    """The positions of a store of fixed size, as ``patch(static=)`` was given them. Raises FarspanError for
    what is no number of positions, and for options ``others`` that cannot be given together with it."""
    if static is None:
        return None
    room = whole_number(static)
    if room is None or room < 1:
        raise FarspanError(f"static is a number of positions, at least 1; got {static!r}.")
    given = [name for name, value in others.items() if value]
    if given:
        raise FarspanError(
            f"static={room} was given together with {' and '.join(given)}, which a store of fixed size "
            "does not serve: leave one of them out."
        )
    return room
