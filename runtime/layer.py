"""A patched layer: its methods, its store for the running call, and its part of the report."""

from __future__ import annotations

import math
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from torch import Tensor, is_grad_enabled

from ..attention.attend import DECODE_ROWS, Reads, attend, tell
from ..attention.dense import Dense
from ..attention.errors import FarspanError
from ..attention.keys import Keys
from ..attention.kv import KV
from ..attention.mass import SELECTION
from ..attention.method import DECODE, PREFILL, AttentionMethod
from ..attention.ops.dispatch import implementations
from ..attention.ops.flash import flash
from ..attention.partial import Partial, add_sinks
from ..attention.softmax import Softmax
from ..parallel.group.mesh import Mesh
from ..parallel.mechanisms.call import Call
from .cache import KVStore, lasting
from .layer_over_ranks import carried, spread, spread_window
from .measure import Measured, Meter, Observer
from .padding import Padding, read_padding
from .report import PhaseReport
from .rows import Done, Run, Served, joined, served
from .shard import ShardStore
from .state import States

NO_CACHE = "no KV cache, so every call is a prefill"
FOREIGN = "keys that are not the cache's own"
UNEXPECTED = frozenset({NO_CACHE, FOREIGN})
_DENSE = Dense()


class Stores(Protocol):
    """The stores of the running call, by layer."""

    def __getitem__(self, index: int) -> KVStore | None: ...


class Unique:
    """A part of a patch, which belongs to one model. Copying or pickling it raises FarspanError."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise FarspanError(
            "A patched model cannot be copied or pickled (torch.save of a whole model pickles it): call "
            "remove() first, and patch again afterwards. save_pretrained and state_dict work while it is "
            "patched."
        )


class Notices(Counter[str]):
    """What was not done in calls of a patched model, and why, by number of calls. warned: the reasons that a
    warning was given of."""

    def __init__(self) -> None:
        super().__init__()
        self.warned: set[str] = set()


class Session(threading.local):
    """What the layers of one patched model share during a forward call; threads may call it at the same
    time."""

    def __init__(self, strict: bool, mesh: Mesh | None = None, notices: Notices | None = None) -> None:
        self.strict = strict
        self.mesh = mesh
        self.notices = Notices() if notices is None else notices  # of all threads, for the report
        self.call: Call | None = None  # of a mesh, while the decoder runs
        self.output: Tensor | None = None  # of a mesh, what the last call has given
        self.rows: int | None = None  # how many last positions the caller wants; None: all
        self.scoring = False  # whether logits of more than the last position are wanted
        self.off = False  # whether the running call is the model's own, since it was set to another attention
        self.positions: Tensor | None = None  # of the whole call, while a part of it runs
        self.cached = False  # whether the running call keeps its keys
        self.stores: Stores | None = None
        self.ends: list[int] | None = None  # where rows of the running call end, if some have padding behind
        self._padding: tuple[int, Padding] | None = None  # of the running call, and up to which position
        self._paddings: dict[int, tuple[Tensor, Padding]] = {}  # by mask id: each kind of layer has its mask
        self._noticed: set[str] = set()  # in the running call

    def begin(self, stores: Stores | None, padding: Padding, total: int) -> None:
        """A call begins that takes the sequence to ``total`` positions, and keeps its keys in ``stores``."""
        self.end()
        self.cached, self.stores, self.ends = stores is not None, stores, padding.ends
        self._padding = total, padding

    def notice(self, reason: str, warning: str | None = None) -> None:
        """Take into the report, once for each call, what was not done in it; ``warning`` is given once for
        each patch, by the first of several ranks."""
        if reason in self._noticed:
            return
        self._noticed.add(reason)
        self.notices[reason] += 1
        first = self.mesh is None or self.mesh.rank == 0
        if warning is not None and first and reason not in self.notices.warned:
            self.notices.warned.add(reason)
            warnings.warn(warning, stacklevel=3)

    def ends_below(self, total: int) -> list[int] | None:
        """Where rows end among the first ``total`` positions; None where no padding follows them."""
        if self.ends is None or min(self.ends) >= total:
            return None
        return [min(end, total) for end in self.ends]

    def padding(self, mask: Tensor | None, batch: int, length: int) -> Padding:
        """Read a 2-D mask [B, Tk], True where a token is. Worked out once for all the layers that are given
        it."""
        if mask is None:
            return Padding()
        if mask.dim() != 2:
            raise FarspanError(f"farspan takes a 2-D attention mask for padding; got a {mask.dim()}-D one.")
        if self._padding is not None and mask.shape == (batch, self._padding[0]) and length == mask.shape[1]:
            return self._padding[1]
        if id(mask) not in self._paddings:
            self._paddings[id(mask)] = mask, read_padding(mask)
        if mask.shape != (batch, length):
            raise FarspanError(
                f"The attention mask covers {list(mask.shape)} (rows, positions), the keys are "
                f"{[batch, length]}: pass a mask "
                "with one entry for every token, cached ones included."
            )
        return self._paddings[id(mask)][1]

    @contextmanager
    def part_of(self, positions: Tensor) -> Iterator[None]:
        """Around calls that run parts of one with these ``positions``; a part may have parts itself."""
        before = self.positions
        self.positions = positions if before is None else before
        try:
            yield
        finally:
            self.positions = before

    def end(self) -> None:
        """Forget the call."""
        self.cached, self.stores, self.ends = False, None, None
        self._padding, self._paddings, self._noticed = None, {}, set()


def _below(keys: float) -> str:
    if keys == math.inf:
        return "not faster than dense at the longest length measured"
    return f"below the crossover of {keys:.0f} keys"


@dataclass
class Layer(Unique):
    """Attention of one layer of a patched model."""

    index: int
    prefill: AttentionMethod
    decode: AttentionMethod
    session: Session
    left_dense: Mapping[str, str] = field(default_factory=dict)  # by phase, why its method leaves it dense
    from_keys: dict[str, float] = field(default_factory=dict)  # by phase, fewer keys are read densely
    measure: int = 0  # query rows of a prefill call on which the attention that is read is measured
    observer: Observer | None = None  # with ``measure``, called after every selection
    phases: dict[str, PhaseReport] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clear_report()

    @property
    def methods(self) -> dict[str, AttentionMethod]:
        """The method of each phase."""
        return {PREFILL: self.prefill, DECODE: self.decode}

    def clear_report(self) -> None:
        """Start counting anew."""
        self.phases = {
            phase: PhaseReport(
                str(method), lookahead=method.lookahead, measured=Measured() if self.measure else None
            )
            for phase, method in self.methods.items()
        }

    @lasting()
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        softmax: Softmax,
    ) -> Tensor:
        """Attention of q [B, H, Tq, D] (the last Tq positions) over k, v [B, Hkv, Tk, D] -> [B, Tq, H, D]."""
        if self._trains(q):
            self._flag_training()
        call = self.session.call or carried(mask)
        if call is not None and mask is None:
            raise FarspanError(
                f"The attention mask was dropped on its way to layer {self.index}, as accelerate's own "
                "context parallelism drops it: leave cp_size out of the Accelerator's ParallelismConfig, and "
                "let patch(parallel=...) alone spread the sequence."
            )
        if call is not None and mask is not None and mask.dim() > 2 and mask.numel() > 1:
            raise FarspanError(
                f"Layer {self.index} was given a {mask.dim()}-D attention mask of the model's own "
                "making, which cannot be spread over ranks: leave parallel out, in one process."
            )
        if call is not None:
            part = self._over_ranks(q, k, v, call, softmax)
        elif self.session.mesh is not None:
            raise FarspanError(
                f"Layer {self.index} of a model that is spread over ranks was called outside a call of its "
                "decoder; gradient checkpointing needs use_reentrant=False."
            )
        else:
            part = self._here(q, k, v, mask, softmax)
        if softmax.sinks is not None:
            part = add_sinks(part, softmax.sinks)
        return part.out.to(q.dtype).transpose(1, 2).contiguous()

    def _here(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        softmax: Softmax,
    ) -> Partial:
        b, _, tq, _ = q.shape
        total = k.shape[2]
        padding = self.session.padding(mask, b, total)
        store = self.session.stores[self.index] if self.session.stores is not None else None
        own = store is not None and store.holds(k)
        kv = store.kv if own and store is not None else None
        kv = KV(k, v) if kv is None else kv
        if softmax.window is not None:
            return flash(q, kv, softmax, window=softmax.window, start=padding.start)
        whole = Keys(
            kv=kv,
            tq=tq,
            softmax=softmax,
            start=padding.start,
            starts=padding.starts,
            ends=self.session.ends_below(total),
        )
        states = States()
        if own and store is not None:
            store.align(padding.starts, total)
            whole.summaries, states = store.summaries, store.states
        short = own and tq <= DECODE_ROWS
        batch = self.served(padding.starts, b, total - tq, total, short, states, whole.ends)
        done = []
        for run in batch.runs:
            method = self.method(run)
            keeps = run.phase == DECODE and not run.below
            state = states.of(str(method), run.rows, total - tq, total) if keeps else {}
            keys = whole.some_rows(run.rows, state)
            with implementations() as ran:
                part, read = attend(method, run.phase, q[run.rows], keys, probe=self._meter(run.phase))
            if not own and self.decode.selective and not method.selective and read.reason is None:
                read.reason = FOREIGN if self.session.cached else NO_CACHE
            done.append(Done(run, part, read, ran))
        if own:
            self._tell(q, whole, batch.told, states)
        self._report(done, q)
        return joined(done, q, kv.value_dim)

    def _tell(self, q: Tensor, whole: Keys, rows: list[slice], states: States) -> None:
        """Let the decode method know that a prefill call has run in these rows."""
        meter = self._meter(DECODE)
        with nullcontext() if meter is None else meter.timed(SELECTION, q.device):
            for some in rows:
                state = states.of(str(self.decode), some, whole.past, whole.length)
                self.phases[DECODE].selection_bytes += tell(
                    self.decode, q[some], whole.some_rows(some, state)
                )

    def _over_ranks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: Call,
        softmax: Softmax,
    ) -> Partial:
        """As ``_here``, where q, k and v are of this rank's tokens and the keys of others are on other
        ranks."""
        mesh = self.session.mesh
        assert mesh is not None
        store = self.session.stores[self.index] if self.session.stores is not None else None
        cached = isinstance(store, ShardStore)
        if not isinstance(store, ShardStore):
            store = ShardStore(mesh.ranks, mesh.config.block)
        if softmax.window is not None:
            return spread_window(q, k, v, store, call, mesh, softmax)
        done = spread(self, q, k, v, store, call, mesh, softmax)
        for run, _, reads, _, travel in done:
            dense = not self.method(run).selective
            if not cached and dense and self.decode.selective and reads.reason is None:
                reads.reason = NO_CACHE
            assert travel is not None
            self.phases[run.phase].moved(travel)
        self._report(done, q)
        return joined(done, q, v.shape[3])

    def served(
        self,
        starts: list[int] | None,
        batch: int,
        past: int,
        total: int,
        short: bool,
        states: States,
        ends: list[int] | None = None,
    ) -> Served:
        """Which rows of a call are served together; arguments as in ``rows.served``."""
        return served(
            starts,
            batch,
            past,
            total,
            ends=ends,
            short=short,
            crossover=self.from_keys,
            groups=states.groups(batch),
        )

    def method(self, run: Run) -> AttentionMethod:
        """What serves the rows of ``run``."""
        return _DENSE if run.below else self.methods[run.phase]

    def _trains(self, q: Tensor) -> bool:
        """Whether a loss flows back through what the method has selected by a prompt's last queries."""
        return self.prefill.lookahead == "prompt" and q.requires_grad and is_grad_enabled()

    def _flag_training(self) -> None:
        sentence = (
            f"{self.prefill} selects by a prompt's last queries, so a loss over the prompt's own tokens has "
            "seen what comes after them: train under another prefill method."
        )
        if self.session.strict:
            raise FarspanError(f"{sentence} (strict=True)")
        warnings.warn(sentence, stacklevel=3)

    def _flag_scoring(self, done: list[Done], q: Tensor) -> None:
        """Say so where logits are asked for that later tokens, padding among them, have had a part in."""
        ahead = self.prefill.tokens_ahead
        if not (self.session.scoring and ahead) or self._trains(q):
            return
        if not any(x.run.phase == PREFILL and not x.run.below and x.reads.reason is None for x in done):
            return  # every key was read, or nothing but decode steps ran
        later = "all later tokens" if ahead == math.inf else f"up to {ahead:.0f} later tokens"
        self.session.notice(
            f"more logits than the last were asked for, as in scoring, and {self.prefill} selects by {later}",
            f"Logits of more than the last position were asked for, and {self.prefill} selects the keys of a "
            f"position by {later}, padding without a mask included: likelihoods change with what follows. "
            "Score under dense or another method whose lookahead is 0 (`farspan methods --json`), or one "
            "token at a time on the cache.",
        )

    def _meter(self, phase: str) -> Meter | None:
        measured = self.phases[phase].measured
        return None if measured is None else Meter(measured, phase, self.measure, self.observer)

    def _report(self, done: list[Done], q: Tensor) -> None:
        """Take a call into the report, with why every key was read where the method would have chosen."""
        self._flag_scoring(done, q)
        for phase, report in self.phases.items():
            mine = [x for x in done if x.run.phase == phase]
            total = Reads()
            for run, _, reads, *_ in mine:
                if run.below:
                    reads.reason = _below(self.from_keys[phase])
                total += reads
                total.reason = total.reason or reads.reason or self.left_dense.get(phase)
            if mine:
                queries = sum(x.run.size for x in mine) * q.shape[2]
                report.add(total, queries, [op for x in mine for op in x.ran])
            if self.session.strict and total.reason in UNEXPECTED:
                raise FarspanError(
                    f"Layer {self.index} cannot run {self.decode} and strict=True forbids dense attention "
                    f"instead: {total.reason}."
                )
