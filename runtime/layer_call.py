"""One call of one layer: find the phase of each row, select, attend and count.

A patched layer (on one device or over ranks), ``tune`` and the tests of the laws all use ``LayerCall``. A
``KeySource`` gives it the keys: ``LocalKeys`` in this file, ``KeysOverRanks`` in layer_over_ranks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..attention.attend import DECODE_ROWS, Reads, attend
from ..attention.dense import Dense
from ..attention.eviction import Eviction
from ..attention.kept import evicts, keys_needed
from ..attention.keys import Keys, State
from ..attention.kv import KV
from ..attention.mass import SELECTION, Probe
from ..attention.method import DECODE, AttentionMethod
from ..attention.needs import Inputs
from ..attention.ops.dispatch import implementations
from ..attention.partial import Partial
from ..attention.softmax import Softmax
from ..attention.sources import IN_NO_CACHE, Supply
from ..attention.summary import Summaries
from ..parallel.mechanisms.call import Travel
from .faster import Faster, at_length
from .padding import Padding
from .rows import Done, Run, joined, served
from .store.states import States
from .store.store import KVStore

_DENSE = Dense()


class KeySource(Protocol):
    """The keys of one layer call, wherever they are stored.

    q: [B, H, n, D], the queries of the call in this process.
    past, total: number of positions of the sequence before and after the call.
    starts, ends: the positions at which rows begin and end; None where no row is padded on the left (starts)
    or on the right (ends).
    short: whether the call is a decode step for rows that have keys from earlier calls.
    kept: whether a cache keeps the keys. Only then a prefill sets up state for later decode steps.
    evicted: whether the decode method has evicted keys, so that no row can be served densely any more.
    states: the state of each method, by row.
    """

    q: Tensor
    past: int
    total: int
    starts: list[int] | None
    ends: list[int] | None
    short: bool
    kept: bool
    evicted: bool
    states: States

    def require(self, needed: int | None, evicting: str) -> None:
        """Raise FarspanError where a query's last ``needed`` keys (None: all) are not stored any more, except
        those that the method ``evicting`` has evicted. It is called before anything else."""
        ...

    def begin(self, layer: LayerCall) -> None:
        """Store the new keys and update the summaries of the methods of ``layer``. It is called before any
        selection."""
        ...

    def forget(self, needed: int) -> None:
        """Drop keys that no later call needs, because queries need their last ``needed`` keys only. It is
        called after all attention."""
        ...

    def pack(self, layer: LayerCall) -> None:
        """Bring the new keys into the form in which they are kept. It is called last."""
        ...

    def evict(self, method: AttentionMethod, runs: list[Run]) -> None:
        """Drop the keys that ``method`` evicts after it has served ``runs``, which are all rows. It is called
        last."""
        ...

    def keys(self, rows: slice, state: State, tq: int) -> Keys:
        """The keys of some rows, for the last ``tq`` queries of the call."""
        ...

    def last_queries(self, count: int) -> Tensor:
        """The last ``count`` queries [B, H, count, D] of the whole call."""
        ...

    def attend(
        self, method: AttentionMethod, run: Run, state: State, probe: Probe | None
    ) -> tuple[Partial, Reads, Travel | None]:
        """Attention of the rows of ``run`` over the keys that ``method`` selects. Returns the Partial, the
        counts of what was read, and over ranks the data that moved (None on one device)."""
        ...


class Called(NamedTuple):
    """The result of one layer call.

    done: one entry for each run of rows. prefill_end_bytes: bytes that the decode method read in
    ``on_prefill_end``.
    """

    done: list[Done]
    prefill_end_bytes: int

    def part(self, q: Tensor, value_dim: int) -> Partial:
        """The attention of the queries q [B, H, n, D] of all rows; (0, -inf) in rows without a token."""
        return joined(self.done, q, value_dim)


class LayerCall:
    """The attention of a layer: each row is served by ``prefill`` or by ``decode``, according to its phase.

    from_keys: by phase, the crossover; rows with fewer keys are read densely. faster: by phase, the
    implementations that "auto" takes first. A LayerCall has no state, so several threads may call it at the
    same time.
    """

    def __init__(
        self,
        prefill: AttentionMethod,
        decode: AttentionMethod,
        from_keys: Mapping[str, float] | None = None,
        faster: Mapping[str, Faster] | None = None,
    ) -> None:
        self.prefill, self.decode = prefill, decode
        self.faster = {} if faster is None else faster
        self.from_keys = {} if from_keys is None else from_keys
        self.needed = keys_needed(prefill, decode, self.from_keys.values())
        self.kept_as = str(decode)  # the name of the state; only decode methods keep state
        self.evicts = evicts(prefill, decode)
        declared = (*prefill.summaries, *decode.summaries)
        # Those that read what is in no cache: they are extended in every call.
        self.fed = tuple(summary for summary in declared if summary.reads & IN_NO_CACHE)
        self._sets_up = type(decode).on_prefill_end is not AttentionMethod.on_prefill_end

    def method(self, run: Run) -> AttentionMethod:
        """The method that serves the rows of ``run``."""
        if run.below:
            return _DENSE
        return self.decode if run.phase == DECODE else self.prefill

    def __call__(self, source: KeySource, probe_of: Callable[[str], Probe | None] | None = None) -> Called:
        """Attention of ``source.q`` over the keys of ``source``. probe_of: returns the probe of a phase; None
        where the call is not measured. A measured call compares with all keys, so none is dropped."""
        needed = self.needed if probe_of is None else None
        evicts = self.evicts and probe_of is None
        source.require(needed, self.kept_as if evicts else "")
        source.begin(self)
        states = source.states
        rows = served(
            source.starts,
            source.q.shape[0],
            source.past,
            source.total,
            ends=source.ends,
            short=source.short,
            crossover={} if source.evicted else self.from_keys,
            groups=states.groups(source.q.shape[0]),
        )
        done = []
        for run in rows.runs:
            state: State = {}
            if run.phase == DECODE and not run.below:
                state = states.of(self.kept_as, run.rows, source.past, source.total)
            probe = None if probe_of is None else probe_of(run.phase)
            with implementations(at_length(self.faster.get(run.phase, ()), source.total)) as ran:
                part, reads, travel = source.attend(self.method(run), run, state, probe)
            done.append(Done(run, part, reads, ran, travel))
        read = 0
        if rows.ended and source.kept:
            probe = None if probe_of is None else probe_of(DECODE)
            with nullcontext() if probe is None else probe.timed(SELECTION, source.q.device):
                read = self._end_prefill(source, rows.ended)
        if needed is not None and source.kept:
            source.forget(needed)
        if evicts and source.kept and source.ends is None and sum(x.run.size for x in done) == len(source.q):
            methods = {id(method): method for method in (self.method(x.run) for x in done)}
            if len(methods) == 1 and (method := methods.popitem()[1]).evict:
                source.evict(method, rows.runs)
        if source.kept:
            source.pack(self)
        return Called(done, read)

    def _end_prefill(self, source: KeySource, ended: list[slice]) -> int:
        """Call the decode method's ``on_prefill_end`` for the rows whose prefill has run, so that it sets up
        their state. Returns the bytes that it read."""
        tokens, window = source.total - source.past, self.decode.observation_window
        count = tokens if window is None else min(window, tokens)
        last = source.last_queries(count) if self._sets_up else None
        read = 0
        for rows in ended:
            state = source.states.of(self.kept_as, rows, source.past, source.total)
            if last is not None:
                keys = source.keys(rows, state, count)
                self.decode.on_prefill_end(last[rows], keys)
                read += keys.summary_bytes
        return read


class LocalKeys:
    """The keys and values kv [B, Hkv, Tk] of a call on one device. q [B, H, Tq, D]: the queries of the last
    Tq positions.

    padding: the positions at which rows begin. ends: the positions at which rows end.
    store: the store that holds kv, which has all positions but those that it has dropped; None where no store
    holds it. Without a store the call is a prefill, whatever its length.
    impl: the implementation of the operations.
    fed: the inputs that methods declare besides q and kv.
    """

    def __init__(
        self,
        q: Tensor,
        kv: KV,
        softmax: Softmax,
        *,
        padding: Padding | None = None,
        ends: list[int] | None = None,
        store: KVStore | None = None,
        impl: str = "auto",
        fed: Inputs | None = None,
    ) -> None:
        self.q, self.kv, self.softmax = q, kv, softmax
        self.start, self.starts = (None, None) if padding is None else (padding.start, padding.starts)
        self.ends, self.store, self.impl, self.fed = ends, store, impl, fed
        self.total = kv.length if store is None else store.total
        self.past = self.total - q.shape[2]
        self.kept = store is not None
        self.evicted = store is not None and bool(store.evicted_by)
        self.short = self.kept and q.shape[2] <= DECODE_ROWS
        self.states = States() if store is None else store.states
        self.summaries = Summaries() if store is None else store.summaries
        gone = 0 if store is not None and store.evicted is not None else self.total - kv.length
        self.supply = Supply(kv, q, fed, dropped=gone)

    def require(self, needed: int | None, evicting: str) -> None:
        if self.store is not None:
            self.store.require(needed, self.past, evicting)

    def begin(self, layer: LayerCall) -> None:
        if self.store is not None:
            self.store.align(self.starts, self.total)
        if layer.fed:
            self.supply = replace(self.supply, recent=self.summaries.recent)
            self.summaries.take(layer.fed, self.supply, self.starts)

    def keys(self, rows: slice, state: State, tq: int) -> Keys:
        keys = Keys(
            kv=self.kv,
            tq=tq,
            softmax=self.softmax,
            dropped=self.total - self.kv.length,
            start=self.start,
            state=state,
            summaries=self.summaries,
            starts=self.starts,
            ends=self.ends,
            fed=self.fed,
            supply=self.supply,
        )
        if self.store is not None and self.store.evicted is not None:
            keys = replace(keys.compacted(self.kv, self.store.evicted), supply=self.supply)
        return keys if self._are_all(rows) else keys.some_rows(rows, state)

    def last_queries(self, count: int) -> Tensor:
        return self.q[:, :, -count:]

    def forget(self, needed: int) -> None:
        if self.store is not None:
            self.store.forget(needed)

    def evict(self, method: AttentionMethod, runs: list[Run]) -> None:
        assert self.store is not None, "a cache keeps the keys"
        evict(self, self.store, self.start, method, runs)

    def pack(self, layer: LayerCall) -> None:
        store = self.store
        if store is None or store.storage.packing is None:
            return
        for summary in {s.key: s for s in (*layer.prefill.summaries, *layer.decode.summaries)}.values():
            if not self.supply.dropped or self.summaries.done(summary):
                self.summaries.get(summary, self.supply, self.starts)  # from keys as they were appended
        store.pack(self.q, self.softmax, self.start)

    def attend(
        self, method: AttentionMethod, run: Run, state: State, probe: Probe | None
    ) -> tuple[Partial, Reads, Travel | None]:
        q = self.q if self._are_all(run.rows) else self.q[run.rows]
        keys = self.keys(run.rows, state, q.shape[2])
        part, reads = attend(method, run.phase, q, keys, impl=self.impl, probe=probe)
        return part, reads, None

    def _are_all(self, rows: slice) -> bool:
        return rows.stop - rows.start == self.q.shape[0]


def evict(
    source: KeySource, store: KVStore, start: Tensor | None, method: AttentionMethod, runs: list[Run]
) -> None:
    """``KeySource.evict`` of the keys of ``source``, which are in ``store``. start: [B], where rows begin;
    None: no row is padded."""
    if store.kv is not None and store.kv.requires_grad:
        return
    found: list[tuple[State, Eviction]] = []
    for run in runs:
        state = source.states.of(str(method), run.rows, source.past, source.total)
        eviction = method.eviction(source.keys(run.rows, state, source.q.shape[2]), run.phase)
        if eviction is None:
            return
        found.append((state, eviction))
    if len({one.slots.shape[2] for _, one in found}) > 1:
        return  # rows whose prompts ended in different calls
    for state, one in found:
        state.update(one.state)
    slots = torch.cat([one.slots for _, one in found])
    crop = min(one.crop for _, one in found)
    store.evict(replace(found[0][1], slots=slots, crop=crop), str(method), start)
