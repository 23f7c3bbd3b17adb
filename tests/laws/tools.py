"""What the laws need of any method: parameter sets, random streams of q, k, v, a record of its selections."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import farspan
from farspan.attention.attend import Reads
from farspan.attention.keys import Keys
from farspan.attention.method import DECODE, PREFILL, AttentionMethod, LayerInfo
from farspan.attention.needs import Inputs
from farspan.attention.partial import Partial
from farspan.attention.selection import as_selection
from farspan.attention.softmax import Softmax
from farspan.attention.sources import Supply
from farspan.runtime.layer_call import LayerCall, LocalKeys
from farspan.runtime.padding import Padding
from farspan.runtime.rows import total_reads
from farspan.runtime.store.states import States
from farspan.runtime.store.storage import parse_storage
from farspan.runtime.store.store import KVStore

THETA = 100.0  # of the RoPE by which gates rotate in the tests of one layer
H, HKV, D = 8, 2, 16  # heads and size of the tests' layers, those of the fixture tiny_llama


@dataclasses.dataclass
class Data:
    """q [B, H, N, D], k, v [B, Hkv, N, D] and where each row begins; padding holds numbers like the rest.
    hidden: [B, N, hidden], the hidden states; None: the queries side by side."""

    q: Tensor
    k: Tensor
    v: Tensor
    starts: list[int] | None = None
    hidden: Tensor | None = None

    @staticmethod
    def random(
        n: int, starts: list[int] | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> Data:
        generator = torch.Generator().manual_seed(seed)
        b = len(starts) if starts else 1
        # Neighbouring queries resemble each other, as in a model: half of each is a slow walk.
        walk = torch.randn(b, H, n, D, generator=generator).cumsum(2) / torch.arange(1, n + 1).sqrt()[:, None]
        q = 1.5 * (walk + torch.randn(b, H, n, D, generator=generator))
        k, v = (torch.randn(b, HKV, n, D, generator=generator) for _ in range(2))
        return Data(q.to(dtype), k.to(dtype), v.to(dtype), starts if starts and any(starts) else None)

    def fed(self, method: AttentionMethod, past: int, length: int) -> Inputs | None:
        """What a call of the queries past .. length - 1 feeds ``method``, as in a layer without RoPE."""
        if not method.needs.inputs:
            return None
        q, k = (x[:, :, past:length] for x in (self.q, self.k))
        hidden = q.transpose(1, 2).flatten(2) if self.hidden is None else self.hidden[:, past:length]
        early = None if method.needs.early_hidden_states is None else hidden
        frequencies = THETA ** (-torch.arange(D // 2).double() / (D // 2))
        starts = torch.tensor(self.starts or [0] * len(q))
        places = (torch.arange(length) - starts[:, None]).clamp(min=0)
        parts = {"hidden": hidden, "early": early, "places": places, "frequencies": frequencies}
        return Inputs(needs=method.needs, q=q, k=k, length=length, **parts)

    @property
    def scale(self) -> float:
        return self.q.shape[3] ** -0.5

    def first(self, n: int) -> Data:
        """The first n positions."""
        return Data(self.q[:, :, :n], self.k[:, :, :n], self.v[:, :, :n], self.starts)

    def row(self, b: int) -> Data:
        """Row b alone, without its padding."""
        first = self.starts[b] if self.starts else 0
        return Data(*(x[b : b + 1, :, first:].contiguous() for x in (self.q, self.k, self.v)))

    def to(self, dtype: torch.dtype) -> Data:
        return Data(self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), self.starts)


class Stream:
    """One layer called again and again on a growing store, by the object that a patched layer calls.

    impl: which implementation of operations. fresh: make summaries anew at every call. storage: of the store.
    """

    def __init__(
        self,
        method: AttentionMethod,
        data: Data,
        *,
        impl: str = "auto",
        fresh: bool = False,
        storage: str = "device",
    ) -> None:
        dense = farspan.parse_method("dense")
        phases = ((method if phase in method.phases else dense) for phase in (PREFILL, DECODE))
        self.layer_call, self.store = LayerCall(*phases), KVStore(parse_storage(storage))
        self.method, self.data, self.impl, self.fresh = method, data, impl, fresh
        self.reads: list[Reads] = []

    @property
    def length(self) -> int:
        """Positions so far; set, they are the data's, on a new store without summaries and state."""
        return self.store.total

    @length.setter
    def length(self, length: int) -> None:
        self.store.reset()
        if length:
            self.store.append(self.data.k[:, :, :length], self.data.v[:, :, :length])
            self._take(length)

    @property
    def state(self) -> States:
        """What the method keeps over time."""
        return self.store.states

    def call(self, upto: int) -> Partial:
        """Attention of the queries at self.length .. upto - 1."""
        new, fed = slice(self.length, upto), self.data.fed(self.method, self.length, upto)
        q, k, v = (x[:, :, new] for x in (self.data.q, self.data.k, self.data.v))
        self.store.append(k, v)
        assert self.store.kv is not None
        if self.fresh and not self.store.dropped:
            self.store.summaries.clear()
            if new.start:
                self._take(new.start)
        padding = None
        if self.data.starts is not None:
            starts = self._starts(upto)
            padding = Padding(torch.tensor(starts), starts)
        softmax, how = Softmax(self.data.scale), {"padding": padding, "impl": self.impl, "fed": fed}
        called = self.layer_call(LocalKeys(q, self.store.kv, softmax, store=self.store, **how))
        self.reads.append(total_reads(called.done))
        return called.part(q, v.shape[3])

    def _take(self, length: int) -> None:
        """Make the summaries of the first ``length`` positions that are computed from what no cache keeps."""
        assert self.store.kv is not None
        fed = self.data.fed(self.method, 0, length)
        supply = Supply(self.store.kv[:, :, :length], self.data.q[:, :, :length], fed)
        self.store.summaries.take(self.method.summaries, supply, self._starts(length))

    def _starts(self, length: int) -> list[int] | None:
        """As a mask of the first ``length`` positions says."""
        return None if self.data.starts is None else [min(first, length) for first in self.data.starts]

    def run(self, cuts: list[int]) -> Partial:
        """All calls ending at ``cuts``, side by side."""
        parts = [self.call(cut) for cut in cuts]
        return Partial(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2))


def decode_cuts(prompt: int, steps: int) -> list[int]:
    return [prompt, *range(prompt + 1, prompt + steps + 1)]


@dataclasses.dataclass
class Selection:
    """One answer of a method, and what it was asked."""

    phase: str
    index: Any
    tq: int
    tk: int
    start: Tensor | None
    batch: int

    def mask(self) -> Tensor:
        """[B, 1 | Hkv | H, Tq, Tk] bool: the pairs read, counted from the index alone."""
        selection = as_selection(self.index, self.phase)
        return selection.to_mask(self.tq, self.tk, self.start, self.batch)

    def entries(self) -> int:
        """(query, entry) pairs of one head: the entries that are read besides keys."""
        selection = as_selection(self.index, self.phase)
        read = selection.entries_read(self.tq, self.tk, self.start, self.batch)
        valid = self.mask().any(-1)[:, 0]  # queries in the padding read nothing
        return int(read.expand(len(valid), -1)[valid].sum())


@contextmanager
def recorded(method: AttentionMethod, *others: AttentionMethod) -> Iterator[list[Selection]]:
    """Every answer of the methods' select_prefill and select_decode, in order."""
    seen: list[Selection] = []
    with pytest.MonkeyPatch.context() as patching:
        for cls in {type(m) for m in (method, *others)}:
            for phase in (PREFILL, DECODE):
                original = getattr(cls, f"select_{phase}")

                def select(
                    self: AttentionMethod, q: Tensor, keys: Keys, original: Any = original, phase: str = phase
                ) -> Any:
                    index = original(self, q, keys)
                    parts = vars(index or object).values()  # torch copies no tensor that has a history
                    fixed = {
                        id(x): x.detach().clone()
                        for x in parts
                        if isinstance(x, Tensor) and x.grad_fn is not None
                    }
                    kept = copy.deepcopy(index, fixed)  # later steps update a method's state in place
                    start = None if keys.start is None else keys.start.clone()
                    seen.append(Selection(phase, kept, q.shape[2], keys.length, start, q.shape[0]))
                    return index

                patching.setattr(cls, f"select_{phase}", select)
        yield seen


@contextmanager
def replayed(method: AttentionMethod, selections: list[Selection]) -> Iterator[None]:
    """Answer with these selections, in order, whatever the keys are; rows are read in place."""
    left = iter(selections)

    def select(self: AttentionMethod, q: Tensor, keys: Keys) -> Any:
        selection = next(left)
        assert (selection.tq, selection.tk) == (q.shape[2], keys.length)
        index = selection.index
        if getattr(index, "gathered", None) is not None:
            index = dataclasses.replace(index, gathered=None)
        return index

    with pytest.MonkeyPatch.context() as patching:
        for phase in (PREFILL, DECODE):
            patching.setattr(type(method), f"select_{phase}", select)
        patching.setattr(type(method), "on_prefill_end", lambda self, q, keys: None)
        yield
    assert next(left, None) is None, "fewer selections were asked for than were recorded"


def assert_same(got: Partial, want: Partial, tolerance: float = 1e-10) -> None:
    """Equal up to rounding, empty rows included."""
    empty = want.lse == -torch.inf
    assert torch.equal(got.lse == -torch.inf, empty), "other rows are empty"
    for name in ("out", "lse"):
        a, b = (getattr(p, name)[~empty] for p in (got, want))
        assert bool(a.isfinite().all()), f"{name} is not finite"
        error = (a - b).abs().max() if b.numel() else 0.0
        assert error <= tolerance, f"{name} differs by {error:.2e}"


def layer_info(weights: dict[str, Tensor] | None = None) -> LayerInfo:
    return LayerInfo(index=0, num_heads=H, num_kv_heads=HKV, head_dim=D, weights=weights, hidden_size=H * D)
