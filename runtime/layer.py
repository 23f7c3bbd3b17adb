"""A patched layer: the function that transformers calls, and the layer's part of the report."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, is_grad_enabled

from ..attention.errors import FarspanError
from ..attention.kv import KV
from ..attention.method import DECODE, PREFILL, AttentionMethod
from ..attention.needs import Needs
from ..attention.ops.flash import flash
from ..attention.partial import Partial, add_sinks
from ..attention.softmax import Softmax
from ..attention.summary import Summaries
from ..parallel.mechanisms.call import Call
from .faster import Faster
from .layer_call import Called, LayerCall, LocalKeys
from .layer_over_ranks import KeysOverRanks, carried
from .measure import Measured, Meter, Observer
from .prefetch import predictable, rows_of
from .report import PhaseReport
from .rows import Done, Run, total_reads
from .session import Session, Unique
from .static_call import Ledger
from .store.lasting import runs_lasting
from .store.shard import ShardStore
from .store.store import KVStore

NO_CACHE = "no KV cache, so every call is a prefill"
FOREIGN = "keys that are not those of the cache"
UNEXPECTED = frozenset({NO_CACHE, FOREIGN})


def _below(keys: float) -> str:
    if keys == math.inf:
        return "not faster than dense at the longest length measured"
    return f"below the crossover of {keys:.0f} keys"


@dataclass
class Layer(Unique):
    """The attention of one layer of a patched model.

    left_dense: by phase, why the method of the phase leaves this layer dense.
    from_keys: by phase, the crossover; rows with fewer keys are read densely.
    faster: by phase, the implementations that "auto" takes first.
    measure: number of queries of a prefill call on which attention mass is measured; 0 measures nothing.
    observer: called after every selection of a layer that is measured.
    phases: the report of each phase.
    stored, dense_stored: bytes of memory of the last call's store, by tier, and of all keys and values of its
    tokens. hot: rows asked for, and those of them that were on the device, of a store in another memory.
    """

    index: int
    prefill: AttentionMethod
    decode: AttentionMethod
    session: Session
    left_dense: Mapping[str, str] = field(default_factory=dict)
    from_keys: dict[str, float] = field(default_factory=dict)
    faster: dict[str, Faster] = field(default_factory=dict)
    measure: int = 0
    observer: Observer | None = None
    phases: dict[str, PhaseReport] = field(default_factory=dict)
    stored: dict[str, int] = field(default_factory=dict)
    dense_stored: int = 0
    hot: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.layer_call = LayerCall(self.prefill, self.decode, self.from_keys, self.faster)
        self.ledger = Ledger()
        self._softmax: Softmax | None = None  # of the last call
        self.clear_report()

    @property
    def methods(self) -> dict[str, AttentionMethod]:
        """The method of each phase."""
        return {PREFILL: self.prefill, DECODE: self.decode}

    @property
    def kept_as(self) -> str:
        """The name by which stores keep the state of the decode method."""
        return self.layer_call.kept_as

    @property
    def needs(self) -> Needs:
        """The needs of the methods of both phases."""
        return self.prefill.needs | self.decode.needs

    def clear_report(self) -> None:
        """Set the counts of this layer to zero."""
        self.stored, self.dense_stored, self.hot = {}, 0, (0, 0)
        self.ledger.clear()
        self.phases = {
            phase: PhaseReport(
                str(method), lookahead=method.lookahead, measured=Measured() if self.measure else None
            )
            for phase, method in self.methods.items()
        }

    @runs_lasting
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        softmax: Softmax,
    ) -> Tensor:
        """Attention of q [B, H, Tq, D] (the last Tq positions) over k, v [B, Hkv, Tk, D] -> [B, Tq, H, D].

        Where k is the handle of the layer's store, the store's keys and values are read, in its format."""
        self._softmax = softmax
        if self._trains(q):
            self._flag_training()
        if self.session.step is not None:
            return self._finished(self.session.step.run(self, q, softmax), q, softmax)
        call = self.session.call or carried(mask)
        if call is not None and mask is None:
            raise FarspanError(
                f"Layer {self.index} was called without the attention mask, which accelerate's own context "
                "parallelism removes: leave cp_size out of the Accelerator's ParallelismConfig, so that only "
                "patch(parallel=...) shards the sequence."
            )
        if call is not None and mask is not None and mask.dim() > 2 and mask.numel() > 1:
            raise FarspanError(
                f"Layer {self.index} was called with a {mask.dim()}-D attention mask that the model makes "
                "itself, which cannot be sharded over ranks: patch without parallel in one process."
            )
        if call is not None:
            part = self._over_ranks(q, k, v, call, softmax)
        elif self.session.mesh is not None:
            raise FarspanError(
                f"Layer {self.index} of a model that is patched over ranks was called outside a call of its "
                "decoder: call the whole model, and set use_reentrant=False for gradient checkpointing."
            )
        else:
            part = self._on_one_device(q, k, v, mask, softmax)
        return self._finished(part, q, softmax)

    @staticmethod
    def _finished(part: Partial, q: Tensor, softmax: Softmax) -> Tensor:
        """The output of the layer [B, Tq, H, D] in the dtype of q, with the model's learned sinks."""
        if softmax.sinks is not None:
            part = add_sinks(part, softmax.sinks)
        return part.out.to(q.dtype).transpose(1, 2).contiguous()

    def prefetch(self, predicted: Callable[[], Tensor], given: tuple[Tensor, ...]) -> None:
        """Begin to bring those rows to the device that the decode method selects for predicted queries
        [B, H, n, D] of the next decode step, where the store is in a memory that the device does not read.
        given: what ``predicted`` reads."""
        store = None if self.session.stores is None else self.session.stores[self.index]
        softmax = self._softmax
        if store is None or softmax is None or self.session.mesh is not None or not predictable(self.decode):
            return

        def rows(kv: KV, starts: list[int] | None, summaries: Summaries) -> Tensor | None:
            return rows_of(self.decode, predicted(), kv, softmax, starts, summaries)

        store.prefetch(rows, given)

    def settle(self) -> None:
        """Bring the steps of a store of fixed size into the report."""
        stored = self.ledger.settle(self.phases[DECODE], self.decode.selective, self.left_dense.get(DECODE))
        if stored is not None:
            self.stored, self.dense_stored = {"device": stored[0]}, stored[1]

    def _on_one_device(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        softmax: Softmax,
    ) -> Partial:
        """Attention on one device, where all keys are in k and v or in the layer's store."""
        total, session = k.shape[2], self.session
        padding = session.padding(mask, q.shape[0], total)
        store = None if session.stores is None else session.stores[self.index]
        if store is not None and not store.holds(k):
            store = None
        kv = None if store is None else store.kv
        kv = KV(k, v) if kv is None else kv
        if softmax.window is not None:
            part = flash(q, kv, softmax, window=softmax.window, start=padding.start)
            if store is not None:
                store.pack(q, softmax, padding.start)
                store.settle()
                self._flag_packing(store)
            return part
        source = LocalKeys(
            q,
            kv,
            softmax,
            padding=padding,
            ends=session.ends_below(total),
            store=store,
            fed=None if session.given is None else session.given.feed(q, kv, store),
        )
        called = self.layer_call(source, self._meter if self.measure else None)
        if store is not None:
            store.settle()
            self._count_stored(store, kv.num_kv_heads * kv.plain_row_nbytes * q.shape[0] * total)
            self._flag_packing(store)
        self._report(called, q, None if store is not None else FOREIGN if session.cached else NO_CACHE)
        return called.part(q, kv.value_dim)

    def _over_ranks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: Call,
        softmax: Softmax,
    ) -> Partial:
        """Attention over ranks: q, k and v belong to this rank's tokens; other ranks hold other keys."""
        mesh = self.session.mesh
        assert mesh is not None
        store = None if self.session.stores is None else self.session.stores[self.index]
        kept = isinstance(store, ShardStore)
        if not isinstance(store, ShardStore):
            store = ShardStore(mesh.ranks, mesh.config.block)
        ends = self.session.ends_below(call.total)
        source = KeysOverRanks(
            q, k, v, store, call, mesh, softmax, ends=ends, kept=kept, given=self.session.given
        )
        if softmax.window is not None:
            return source.attend_window(softmax.window)
        called = self.layer_call(source)
        if kept:
            store.settle()
            kv = KV(k, v)
            self._count_stored(
                store, kv.num_kv_heads * kv.row_nbytes * q.shape[0] * call.total // mesh.ranks.size
            )
            self._flag_packing(store)
        for run, _, _, _, travel in called.done:
            assert travel is not None
            self.phases[run.phase].moved(travel)
        if called.done:  # the bytes that on_prefill_end has sent
            self.phases[called.done[-1].run.phase].sent_bytes += source.newly_sent()
        self._report(called, q, None if kept else NO_CACHE)
        return called.part(q, v.shape[3])

    def _count_stored(self, store: KVStore, dense: int) -> None:
        self.stored, self.dense_stored = store.tiers, dense
        if store.buffers.hot_rows is not None:
            asked, hits = store.buffers.hot_rows.counted()
            self.hot = self.hot[0] + asked, self.hot[1] + hits

    def _flag_packing(self, store: KVStore) -> None:
        """Warn, or with strict refuse, where packing changes attention too much. Over ranks it only warns,
        since not every rank packs in the same call."""
        packing = store.storage.packing
        finding = None if packing is None else store.guard.finding(packing.bits)
        if finding is None:
            return
        sentence = f"In layer {self.index}, {finding}"
        if self.session.strict and self.session.mesh is None:
            raise FarspanError(f"{sentence} (strict=True)")
        self.session.notice(sentence, sentence)

    def _trains(self, q: Tensor) -> bool:
        """Whether a gradient flows through a selection that was made by the last queries of a prompt."""
        return q.requires_grad and is_grad_enabled() and self.prefill.lookahead.is_prompt

    def _flag_training(self) -> None:
        sentence = (
            f"{self.prefill} selects by a prompt's last queries, so a loss over the tokens of the prompt "
            "depends on later tokens: train under another prefill method."
        )
        if self.session.strict:
            raise FarspanError(f"{sentence} (strict=True)")
        warnings.warn(sentence, stacklevel=3)

    def _flag_scoring(self, done: list[Done], q: Tensor) -> None:
        """Give a notice where the caller gets logits that depend on later tokens, including padding."""
        ahead = self.prefill.lookahead.tokens
        if not ahead or self._trains(q):
            return
        if not any(x.run.phase == PREFILL and not x.run.below and x.reads.reason is None for x in done):
            return  # every key was read, or nothing but decode steps ran
        later = "all later tokens" if ahead == math.inf else f"up to {ahead:.0f} later tokens"
        self.session.notice(
            f"logits of more than the last position were returned, as in scoring, and {self.prefill} selects "
            f"by {later}",
            f"Logits of more than the last position were returned, and {self.prefill} selects the keys of a "
            f"position by {later}, so likelihoods depend on later tokens, including padding without a mask. "
            "To score a text, use dense or another method whose lookahead is 0 (`farspan methods --json`), "
            "or one token at a time on the cache.",
        )

    def _meter(self, phase: str) -> Meter | None:
        measured = self.phases[phase].measured
        return None if measured is None else Meter(measured, phase, self.measure, self.observer)

    def _report(self, called: Called, q: Tensor, foreign: str | None) -> None:
        """Add a call to the report, with the reason where every key was read instead of a selection.
        foreign: why the keys are not those of the cache; None where they are."""
        done = called.done
        if self.session.scoring:
            self._flag_scoring(done, q)
        if called.prefill_end_bytes:
            self.phases[DECODE].selection_bytes += called.prefill_end_bytes
        for phase, report in self.phases.items():
            mine = [x for x in done if x.run.phase == phase]
            if not mine:
                continue
            for run, _, reads, *_ in mine:
                if run.below:
                    reads.reason = _below(self.from_keys[phase])
                elif foreign is not None and reads.reason is None and self._lost(run):
                    reads.reason = foreign
            total = total_reads(mine)
            total.reason = total.reason or self.left_dense.get(phase)
            queries = sum(x.run.size for x in mine) * q.shape[2]
            report.add(total, queries, [op for x in mine for op in x.ran])
            if self.session.strict and total.reason in UNEXPECTED:
                raise FarspanError(
                    f"Layer {self.index} cannot run {self.decode} ({total.reason}), and strict=True forbids "
                    "dense attention in its place: pass a cache, or leave strict out."
                )

    def _lost(self, run: Run) -> bool:
        """Whether the decode method would select in ``run`` if the keys were those of the cache."""
        return self.decode.selective and not self.layer_call.method(run).selective
