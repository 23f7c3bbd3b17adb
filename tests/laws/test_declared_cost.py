"""What a method declares to read (``AttentionMethod.cost``) against what is counted when it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import farspan
from farspan.attention import method as registry
from farspan.attention.cost import Cost, Queries
from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.method import DECODE, PREFILL, AttentionMethod
from farspan.attention.selection import Index, Window
from farspan.attention.softmax import Softmax
from farspan.attention.sparse.quest import Quest

from .tools import HKV, D, Data, H, Stream, every_method, sparse_settings

SIZE = 8  # bytes of a float64
# Methods with a setting whose reading depends on the data: masses, thresholds, where diagonals lie.
BY_DATA = {
    "act",
    "antidiagonal",
    "chunkllm",
    "oracle",
    "pbs",
    "recycled",
    "sale",
    "seer",
    "seer_decode",
    "vertical_slash",
}


def declared(method: AttentionMethod, phase: str, length: int) -> Cost:
    return method.cost(phase, length, head_dim=D, element_size=SIZE)


def assert_counted(cost: Cost, pairs: float, queries: int, selection: float, length: int) -> None:
    """``pairs`` of one head over ``queries``, and bytes of selection on ``length`` keys, are the declared
    ones; at most those where the declaration says that they depend on the data."""
    bytes_of_kv = length * HKV * 2 * D * SIZE
    if cost.exact:
        assert pairs == pytest.approx(cost.keys * queries, rel=1e-12)
        assert selection == pytest.approx(cost.selection * bytes_of_kv, rel=1e-12)
    else:
        assert pairs <= cost.keys * queries * (1 + 1e-12) <= cost.dense * queries * (1 + 1e-9)
        assert selection <= cost.selection * bytes_of_kv * (1 + 1e-12)


@every_method(PREFILL)
@pytest.mark.parametrize("length", [7, 61, 250])
def test_prefill_reads_what_is_declared(bound: AttentionMethod, length: int) -> None:
    """Exact, rounding to blocks and the mean over early queries included."""
    stream = Stream(bound, Data.random(length))
    stream.call(length)
    [reads] = stream.reads
    cost = declared(bound, PREFILL, length)
    assert reads.causal_pairs / H == cost.dense * length
    assert_counted(cost, reads.pairs / H, length, reads.selection_bytes, length)


@every_method(DECODE)
@pytest.mark.parametrize("prompt", [20, 61, 250])
def test_decode_reads_what_is_declared(bound: AttentionMethod, prompt: int) -> None:
    """Over one period: of what recycled reads the last step of a stride is the full one."""
    period = declared(bound, DECODE, prompt + 1).period
    length = prompt + period
    stream = Stream(bound, Data.random(length))
    stream.run([prompt, *range(prompt + 1, length + 1)])
    steps = stream.reads[1:]
    cost = declared(bound, DECODE, length)
    assert steps[-1].causal_pairs / H == cost.dense == length
    pairs, selection = (sum(getattr(r, name) for r in steps) for name in ("pairs", "selection_bytes"))
    assert_counted(replace(cost, selection=cost.selection * period), pairs / H, period, selection, length)


@every_method()
@pytest.mark.parametrize("length", [1, 5, 61, 250])
def test_the_phases_that_a_method_leaves_dense_are_declared_dense(
    method: AttentionMethod, length: int
) -> None:
    for phase, mean in ((PREFILL, (length + 1) / 2), (DECODE, length)):
        cost = declared(method, phase, length)
        assert cost.dense == mean and 0 < cost.density <= 1
        if phase not in method.phases or not method.selective:
            assert cost == Cost(keys=mean, dense=mean, last=length)


def test_a_method_says_where_its_reading_depends_on_the_data() -> None:
    found = {
        cls.name
        for cls in farspan.methods().values()
        for settings in sparse_settings(cls)
        for phase in cls.phases
        if not declared(cls(**settings), phase, 250).exact
    }
    assert found == BY_DATA
    undeclared = [cls.name for cls in farspan.methods().values() if cls.reads is AttentionMethod.reads]
    assert undeclared == ["dense"], "these have no declaration of their own"


@pytest.mark.parametrize(
    "spec",
    ["antidiagonal", "pbs", "oracle", "sale:threshold=0.01", "vertical_slash:mass=0.9", "act:over=(sale)"],
)
def test_budgets_without_a_bound_count_as_dense(spec: str) -> None:
    cost = farspan.parse_method(spec).cost(PREFILL, 1 << 17)
    assert cost.density == 1 and not cost.exact


@pytest.mark.parametrize(
    ("spec", "exact"),
    [
        ("oracle:mass=1,fraction=0.1", True),
        ("oracle:mass=0.9,fraction=0.1", False),
        ("vertical_slash:vertical=1000,slash=50", False),
    ],
)
def test_a_bound_below_dense_is_given_where_there_is_one(spec: str, exact: bool) -> None:
    cost = farspan.parse_method(spec).cost(PREFILL, 1 << 17)
    assert cost.exact is exact and cost.density < 0.2


@pytest.mark.parametrize(
    "spec",
    [
        "window",
        "strided",
        "strided:w=100,stride=7,reach=9000,sinks=5",
        "dilated",
        "a_shape",
        "block_static",
        "block_static:stride=64,w=300,sinks=500",
        "block_topk",
        "block_topk:fraction=0.1",
        "dhsa",
        "routing",
        "oracle:mass=none,k=4096",
    ],
)
def test_long_prompts_are_sampled_to_a_thousandth(spec: str) -> None:
    """100,003 queries: the mean over all of them, by the same declaration with nothing left out."""
    method, length = farspan.parse_method(spec), 100_003
    every = Queries(phase=PREFILL, length=length)
    every.__dict__["seen"] = torch.arange(1, length + 1)  # as for a short prompt
    want, got = method.reads(every), method.cost(PREFILL, length)
    assert got.keys == pytest.approx(want.keys, rel=1e-3)
    assert got.last == want.last and got.selection == want.selection


def _reaching() -> list[AttentionMethod]:
    every = [cls(**s) for cls in farspan.methods().values() for s in sparse_settings(cls)]
    return [m for m in every if PREFILL in m.phases and declared(m, PREFILL, 200).reach is not None]


def test_the_methods_with_a_reach() -> None:
    assert {m.name for m in _reaching()} == {"a_shape", "dilated", "strided", "window"}


@pytest.mark.parametrize("method", _reaching(), ids=str)
def test_nothing_is_read_beyond_the_declared_reach(method: AttentionMethod) -> None:
    """By the mask: all that a query reads lies in a first and a last stretch, together no longer."""
    data, reach = Data.random(200), declared(method, PREFILL, 200).reach
    index = method.select_prefill(data.q, Keys(kv=KV(data.k, data.v), tq=200, softmax=Softmax(data.scale)))
    mask = index.to_mask(200, 200)
    for t, row in enumerate(mask[0, 0].tolist()):
        gap = longest = 0
        for read in row[: t + 1]:
            gap = 0 if read else gap + 1
            longest = max(longest, gap)
        assert t + 1 - longest <= reach


# --- what follows from the class --------------------------------------------------------------------


def test_phases_and_family_follow_from_the_class() -> None:
    known = {name: (cls.family, set(cls.phases), cls.selective) for name, cls in farspan.methods().items()}
    assert known["dense"] == ("baseline", {PREFILL, DECODE}, False)
    assert known["recycled"] == ("recycled", {DECODE}, True)
    assert known["window"] == ("sparse", {PREFILL, DECODE}, True)
    assert known["sale"] == ("sparse", {PREFILL}, True)
    assert [name for name, (_, _, selective) in known.items() if not selective] == ["dense"]


def test_a_method_of_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @dataclass(frozen=True, kw_only=True)
    class Mine(AttentionMethod):
        name: ClassVar[str] = "mine"
        title: ClassVar[str] = "Mine"

        def select_decode(self, q: Tensor, keys: Keys) -> Index:
            return Window(size=8)

    assert (Mine.family, Mine.phases, Mine.selective) == ("custom", {DECODE}, True)
    cost = Mine().cost(DECODE, 1000)
    assert (cost.density, cost.exact) == (1, False), "it declares nothing, and so counts as dense"
    assert Mine().cost(PREFILL, 1000).exact

    class Both(Quest):
        family: ClassVar[str] = "hybrid"

        def select_prefill(self, q: Tensor, keys: Keys) -> Index:
            return None

    assert (Both.family, Both.phases) == ("hybrid", {PREFILL, DECODE})
    with pytest.raises(ValueError, match="leave phases out"):

        class Wrong(Mine):
            phases: ClassVar[frozenset[str]] = frozenset({PREFILL})
