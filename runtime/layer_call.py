"""One call of one layer: which rows are in which phase, what each of them reads, and what is counted.

``LayerCall`` is used by a patched layer on one device and over ranks, by ``tune`` and by the tests of the
laws. Where the keys are is known to a ``KeySource`` alone: ``LocalKeys`` here, ``KeysOverRanks`` in
layer_over_ranks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import NamedTuple, Protocol

from torch import Tensor

from ..attention.attend import DECODE_ROWS, Reads, attend
from ..attention.dense import Dense
from ..attention.keys import Keys, State
from ..attention.kv import KV
from ..attention.mass import SELECTION, Probe
from ..attention.method import DECODE, AttentionMethod
from ..attention.needs import Inputs
from ..attention.ops.dispatch import implementations
from ..attention.partial import Partial
from ..attention.softmax import Softmax
from ..attention.summary import Summaries
from ..parallel.mechanisms.call import Travel
from .cache import KVStore
from .padding import Padding
from .rows import Done, Run, joined, served
from .state import States

_DENSE = Dense()


class KeySource(Protocol):
    """Where the keys of one call of a layer are, and how its queries reach them.

    q: [B, H, n, D], the queries of the call that this process has.
    past, total: positions of the sequence before the call, and after it.
    starts, ends: where rows begin and end, None where no row is padded on the left, on the right.
    short: whether the call is a decode step for rows that have keys from before.
    kept: whether the keys outlive the call. Only then a prefill sets up state for later decode steps.
    states: what methods keep of the rows over time.
    """

    q: Tensor
    past: int
    total: int
    starts: list[int] | None
    ends: list[int] | None
    short: bool
    kept: bool
    states: States

    def begin(self, prefill: AttentionMethod, decode: AttentionMethod) -> None:
        """Called first, with the methods of both phases: store what is new and bring summaries up to date."""
        ...

    def keys(self, rows: slice, state: State, tq: int) -> Keys:
        """The keys of some rows, as a decode method sees them that serves the call's last ``tq`` queries."""
        ...

    def last_queries(self, count: int) -> Tensor:
        """The last ``count`` queries [B, H, count, D] of the whole call."""
        ...

    def attend(
        self, method: AttentionMethod, run: Run, state: State, probe: Probe | None
    ) -> tuple[Partial, Reads, Travel | None]:
        """Attention of the rows of ``run`` over what ``method`` selects, what that read, and, over ranks, how
        data moved."""
        ...


class Called(NamedTuple):
    """What one call of a layer gives.

    done: one entry for each run of rows. prefill_end_bytes: bytes that the decode method has read in
    ``on_prefill_end``.
    """

    done: list[Done]
    prefill_end_bytes: int

    def part(self, q: Tensor, value_dim: int) -> Partial:
        """The attention of all rows of the queries q [B, H, n, D]; (0, -inf) in rows without a token."""
        return joined(self.done, q, value_dim)


class LayerCall:
    """How a layer attends: by ``prefill`` in one phase and by ``decode`` in the other, row by row.

    from_keys: by phase, rows with fewer keys are read densely. It has no state of its own, so that threads
    may call it at the same time.
    """

    def __init__(
        self,
        prefill: AttentionMethod,
        decode: AttentionMethod,
        from_keys: Mapping[str, float] | None = None,
    ) -> None:
        self.prefill, self.decode = prefill, decode
        self.from_keys = {} if from_keys is None else from_keys
        self._kept_as = str(decode)  # the name of its state; only decode methods keep state
        self._sets_up = type(decode).on_prefill_end is not AttentionMethod.on_prefill_end

    def method(self, run: Run) -> AttentionMethod:
        """The method that serves the rows of ``run``."""
        if run.below:
            return _DENSE
        return self.decode if run.phase == DECODE else self.prefill

    def __call__(self, source: KeySource, probe_of: Callable[[str], Probe | None] | None = None) -> Called:
        """Attention of ``source.q`` over the keys of ``source``. probe_of: the probe of a phase, where the
        call is measured."""
        source.begin(self.prefill, self.decode)
        states = source.states
        rows = served(
            source.starts,
            source.q.shape[0],
            source.past,
            source.total,
            ends=source.ends,
            short=source.short,
            crossover=self.from_keys,
            groups=states.groups(source.q.shape[0]),
        )
        done = []
        for run in rows.runs:
            state: State = {}
            if run.phase == DECODE and not run.below:
                state = states.of(self._kept_as, run.rows, source.past, source.total)
            probe = None if probe_of is None else probe_of(run.phase)
            with implementations() as ran:
                part, reads, travel = source.attend(self.method(run), run, state, probe)
            done.append(Done(run, part, reads, ran, travel))
        if not (rows.ended and source.kept):
            return Called(done, 0)
        probe = None if probe_of is None else probe_of(DECODE)
        with nullcontext() if probe is None else probe.timed(SELECTION, source.q.device):
            return Called(done, self._end_prefill(source, rows.ended))

    def _end_prefill(self, source: KeySource, ended: list[slice]) -> int:
        """Let the decode method set up the state of rows whose prefill has run. -> bytes that it has read."""
        tokens, wanted = source.total - source.past, self.decode.observation_window
        count = tokens if wanted is None else min(wanted, tokens)
        last = source.last_queries(count) if self._sets_up else None
        read = 0
        for rows in ended:
            state = source.states.of(self._kept_as, rows, source.past, source.total)
            if last is not None:
                keys = source.keys(rows, state, count)
                self.decode.on_prefill_end(last[rows], keys)
                read += keys.summary_bytes
        return read


class LocalKeys:
    """The keys of a call that are all on this device: kv [B, Hkv, Tk]; q [B, H, Tq, D] are the queries of the
    last Tq positions.

    padding: where rows begin. ends: where they end. store: the one that holds kv, None where no store
    does: then the call is a prefill, whatever its length. impl: which implementation of operations.
    fed: what the methods are fed besides.
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
        self.total = kv.length
        self.past = self.total - q.shape[2]
        self.kept = store is not None
        self.short = self.kept and q.shape[2] <= DECODE_ROWS
        self.states = States() if store is None else store.states

    def begin(self, prefill: AttentionMethod, decode: AttentionMethod) -> None:
        if self.store is not None:
            self.store.align(self.starts, self.total)

    def keys(self, rows: slice, state: State, tq: int) -> Keys:
        keys = Keys(
            kv=self.kv,
            tq=tq,
            softmax=self.softmax,
            start=self.start,
            state=state,
            summaries=Summaries() if self.store is None else self.store.summaries,
            starts=self.starts,
            ends=self.ends,
            fed=self.fed,
        )
        return keys if self._are_all(rows) else keys.some_rows(rows, state)

    def last_queries(self, count: int) -> Tensor:
        return self.q[:, :, -count:]

    def attend(
        self, method: AttentionMethod, run: Run, state: State, probe: Probe | None
    ) -> tuple[Partial, Reads, Travel | None]:
        q = self.q if self._are_all(run.rows) else self.q[run.rows]
        keys = self.keys(run.rows, state, q.shape[2])
        part, reads = attend(method, run.phase, q, keys, impl=self.impl, probe=probe)
        return part, reads, None

    def _are_all(self, rows: slice) -> bool:
        return rows.stop - rows.start == self.q.shape[0]
