"""What the laws need of any method: parameter sets, random streams of q, k, v, a record of its selections."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
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
from farspan.runtime.cache import KVStore
from farspan.runtime.layer_call import LayerCall, LocalKeys
from farspan.runtime.padding import Padding
from farspan.runtime.rows import total_reads
from farspan.runtime.state import States

THETA = 100.0  # of the RoPE by which gates rotate in the tests of one layer
H, HKV, D = 8, 2, 16  # heads and size of the tests' layers, those of the fixture tiny_llama


def _given(blocks: int) -> Tensor:
    """A random mask over blocks."""
    return torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.3


_SALE = farspan.parse_method("sale:threshold=2.0,block_q=8,block_k=4,local=12,dense_below=0,q_bits=none")
# Parameters that make a method sparse at test lengths (60 to 250 keys). A method that is not here gets SMALL.
SPARSE: dict[str, list[dict[str, Any]]] = {
    "act": [
        {"first": 0, "threshold": 0.05},  # with a recipe
        {"first": 0, "heads": "all", "threshold": 0.06, "beta": 0.0},
        {"first": 0, "heads": "all", "threshold": 0.06, "over": _SALE},
    ],
    "antidiagonal": [
        {"mass": 0.5, "stride": 4, "block": 16},
        {"mass": 0.4, "stride": 8, "block": 8, "gqa_reduce": "sum"},
        {"mass": 0.3, "stride": 4, "block": 8, "gqa_reduce": "max"},
    ],
    "chunkllm": [
        {"fraction": 0.3, "longest": 6, "gate_dim": 6, "alpha": 0.8, "boundary_layer": 0},
        {"k": 24, "fraction": None, "longest": 9, "sinks": 1, "gate_dim": 8, "boundary_layer": 0},
        {"k": 9, "fraction": None, "longest": 4, "sinks": 0, "alpha": 1.0, "boundary_layer": 0},
    ],
    "dense": [{}],
    "dhsa": [
        {"fraction": 0.3, "block_q": 16, "block_k": 8, "local": 5},
        {"fraction": 0.25, "block_q": 8, "block_k": 4, "local": 12, "gqa_reduce": "sum"},
        {"k": 40, "fraction": None, "block_q": 16, "block_k": 8, "local": 1, "gqa_reduce": "max"},
        {"k": 48, "fraction": None, "block_q": 8, "block_k": 16, "local": 9},
        {
            "boundaries": "learned",
            "fraction": 0.3,
            "block_q": 16,
            "block_k": 8,
            "segment": 32,
            "local": 5,
            "apart": 2,
        },
        {
            "boundaries": "learned",
            "k": 40,
            "fraction": None,
            "block_q": 8,
            "block_k": 4,
            "segment": 24,
            "apart": 0,
            "gqa_reduce": "sum",
        },
        {"select": "vertical_slash", "fraction": 0.3, "block_q": 16, "block_k": 8, "local": 5},
        {
            "select": "vertical_slash",
            "k": 40,
            "fraction": None,
            "block_q": 8,
            "block_k": 4,
            "gqa_reduce": "sum",
        },
    ],
    "window": [{"w": 20, "sinks": 3}, {"w": 7, "sinks": 0}],
    "dilated": [{"w": 9, "dilation": 3, "sinks": 2}, {"w": 30, "dilation": 2, "sinks": 0}],
    "strided": [
        {"w": 8, "stride": 8, "sinks": 0},
        {"w": 11, "stride": 5, "reach": 40, "sinks": 3},
        {"w": 2, "stride": 7},
    ],
    "a_shape": [{"w": 20, "sinks": 4, "block": 8}, {"w": 1, "sinks": 0, "block": 16}],
    "block_static": [
        {"block": 8},
        {"block": 8, "stride": 4, "w": 12, "sinks": 9},
        {"block": 16, "pattern": "given", "mask": _given(20)},
    ],
    "block_topk": [
        {"k": 48, "block": 16},
        {"k": None, "fraction": 0.4, "block": 8, "gqa_reduce": "none"},
        {"k": 24, "block": 8, "gqa_reduce": "max"},
        {"k": 64, "block": 16},
    ],
    "quest": [
        {"k": 24, "page": 4, "dense_layers": 0},
        {"k": 27, "page": 8, "gqa_reduce": "sum", "dense_layers": 0},
        {"k": None, "fraction": 0.3, "page": 8, "gqa_reduce": "none", "dense_layers": 0},
        {"k": 12, "page": 1, "dense_layers": 0},
    ],
    "double_sparsity": [
        {"k": 20, "dense_layers": 0, "group_factor": 4},
        {"k": None, "fraction": 0.2, "gqa_reduce": "none", "dense_layers": 0, "group_factor": 2},
    ],
    "dynamic_mask": [
        {"w": 24, "local": 0},
        {"w": 20, "local": 6, "form": "exp"},
        {"w": 24, "local": 4, "add_bias": False},
    ],
    "h2o": [{"k": 24}, {"k": 7}],
    "pbs": [
        {"mass": 0.5, "block": 8, "segment": 16},
        {"mass": 0.3, "block": 8, "segment": 24, "gqa_reduce": "sum"},
        {"mass": 0.2, "block": 8, "segment": 8, "gqa_reduce": "max"},
        {"mass": 0.5, "block": 8, "segment": 16, "select": "antidiagonal", "stride": 4},
        {"mass": 0.4, "block": 16, "segment": 16, "select": "antidiagonal", "stride": 8, "gqa_reduce": "sum"},
    ],
    "oracle": [
        {"mass": 0.6, "block": 8},
        {"mass": 0.9, "k": 24, "block": 8, "gqa_reduce": "sum"},
        {"mass": 1.0, "fraction": 0.3, "block": 16, "gqa_reduce": "max"},
    ],
    "vertical_slash": [
        {"vertical": 6, "slash": 5, "block": 8, "last": 16, "sinks": 2, "local": 4},
        {"vertical": 20, "slash": 5, "block": 16, "last": 8, "sinks": 4, "local": 3, "gqa_reduce": "sum"},
        {"mass": 0.03, "block": 8, "last": 16, "sinks": 2, "local": 4},
    ],
    "sale": [
        {"block_q": 8, "block_k": 4, "local": 8, "dense_below": 0},  # with a recipe
        {"threshold": 2.0, "block_q": 8, "block_k": 4, "local": 12, "dense_below": 0, "q_bits": None},
        {"threshold": 4.0, "block_q": 16, "block_k": 8, "local": 16, "dense_below": 24, "q_bits": 4},
    ],
    "recycled": [
        {"k": 24, "stride": 4},
        {"k": 6, "stride": 100, "gqa_reduce": "max", "pool": 3},
        {"k": 24, "dynamic": True, "qc": 2, "s": 0.2},
        {"k": 24, "dynamic": True, "qc": 2, "s": 0.2, "scope": "kv_head"},
    ],
    "routing": [
        {"k": 40, "clusters": 4, "segment": 16, "block": 8, "window": 8, "sinks": 2},
        {"k": 24, "clusters": 5, "segment": 12, "block": 4, "window": 1, "sinks": 0, "gqa_reduce": "none"},
        {"k": 34, "clusters": 3, "segment": 10, "block": 16, "window": 12, "gqa_reduce": "max"},
        {"k": 30, "clusters": 4, "block": 8, "window": 8, "sinks": 2, "centroids": "learned"},
    ],
    "seer": [
        {"block": 8, "fraction": 0.3, "gate_dim": 6},
        {"block": 8, "k": 32, "fraction": None, "gqa_reduce": "sum", "gate_dim": 8},
        {"block": 16, "mass": 0.5, "fraction": 0.8, "gqa_reduce": "max"},
        {"block": 8, "threshold": 0.08, "fraction": None, "gate_dim": 16},
    ],
    "seer_decode": [
        {"k": 24, "block": 4, "gate_dim": 8},
        {"k": 27, "block": 8},
        {"k": 60, "threshold": 0.05, "block": 8, "gate_dim": 6},
    ],
    "snapkv": [
        {"k": 24, "window": 8},
        {"k": 9, "window": 4, "kernel": 3, "pool": "max"},
        {"k": 40, "window": 30, "kernel": 1},
    ],
}
# What a method's calibration on a tiny model is told, so that it comes out sparse.
CALIBRATION: dict[str, dict[str, Any]] = {
    "act": {"sure": 0.0, "window": 64},
    "sale": {"start": 8.0, "error": 4.0},
}
SMALL = {"k": 24, "w": 24, "block": 8, "page": 8, "dense_layers": 0}
FULL = {
    "k": 1 << 20,
    "fraction": None,
    "mass": 1.0,
    "threshold": 0.0,
    "w": 1 << 20,
    "dilation": 1,
    "add_bias": False,
    "dense_layers": 0,
    "boundary_layer": 0,
}


def _takes(cls: type[AttentionMethod], wanted: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls) if f.init}
    return {name: value for name, value in wanted.items() if name in names}


def sparse_settings(cls: type[AttentionMethod]) -> list[dict[str, Any]]:
    return SPARSE.get(cls.name) or [_takes(cls, SMALL)]


def full_settings(cls: type[AttentionMethod]) -> list[dict[str, Any]]:
    """Budgets that cover any length; the whole fraction goes through the selection instead of around it."""
    if cls.name == "act":  # its own are beta and threshold
        over = farspan.parse_method("sale:threshold=0,block_q=8,block_k=4,local=12,dense_below=0")
        return [{"heads": "all", "first": 0, "beta": 1.0, "over": x} for x in (None, over)]
    settings = [_takes(cls, FULL)]
    if _takes(cls, {"fraction": 1.0}):
        settings.append(_takes(cls, FULL | {"k": None, "fraction": 1.0}))
        small = _takes(cls, {"page": 8, "block": 8, "block_q": 16, "block_k": 8})
        settings += [settings[-1] | small] if small else []
    return settings


def _cases(settings: Callable[[type[AttentionMethod]], list[dict[str, Any]]], phase: str | None) -> list[Any]:
    return [
        pytest.param(cls(**chosen), id=str(cls(**chosen)))
        for cls in farspan.methods().values()
        if phase is None or phase in cls.phases
        for chosen in settings(cls)
    ]


def every_method(phase: str | None = None, *, whole_prompt: bool = True) -> Any:
    """Parametrise ``method`` over all registered methods (of ``phase``), at budgets that leave keys out.

    whole_prompt: also those that judge a call by its own last queries (their ``lookahead`` is "prompt").
    """
    cases = _cases(sparse_settings, phase)
    if not whole_prompt:
        cases = [case for case in cases if lookahead(case.values[0]) is not None]
    return pytest.mark.parametrize("method", cases)


def every_method_with_full_budget() -> Any:
    return pytest.mark.parametrize("method", _cases(full_settings, None))


def leaves_out(method: AttentionMethod) -> bool:
    """Whether some keys are not read; ACT by itself gives them other weights."""
    costs = [method.cost(phase, 120) for phase in method.phases]
    return any(cost.density < 1 or not cost.exact for cost in costs)


def lookahead(method: AttentionMethod) -> int | None:
    """How many rows past a row its selection may see; None for the whole prompt. Decode never looks ahead."""
    return None if method.lookahead.is_prompt else int(method.lookahead.tokens)


# --- attention level --------------------------------------------------------------------------------


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

    impl: which implementation of operations. fresh: make summaries anew at every call.
    """

    def __init__(
        self, method: AttentionMethod, data: Data, *, impl: str = "auto", fresh: bool = False
    ) -> None:
        dense = farspan.parse_method("dense")
        phases = ((method if phase in method.phases else dense) for phase in (PREFILL, DECODE))
        self.layer_call, self.store = LayerCall(*phases), KVStore()
        self.method, self.data, self.impl, self.fresh = method, data, impl, fresh
        self.reads: list[Reads] = []

    @property
    def length(self) -> int:
        """Positions so far; set, they are the data's, on a new store without summaries and state."""
        return self.store.length

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
        if self.fresh:
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
