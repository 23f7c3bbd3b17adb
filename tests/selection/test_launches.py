"""What a prefill call launches on a GPU: a budget for each method, the same at every length, and each wait.

The GPU is simulated (tests/simulated.py): code takes the ways that it takes on CUDA, on real numbers. A
Triton kernel counts as one launch, and so does every operator of torch that computes something.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import farspan
from farspan.attention.attend import Reads, attend
from farspan.attention.blocks import covered, covering
from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.method import PREFILL
from farspan.attention.ops.dispatch import implementations
from farspan.attention.ops.sums import running_sum
from farspan.attention.partial import Partial
from farspan.attention.selection import blocks
from farspan.attention.softmax import Softmax
from farspan.attention.sparse import slash_blocks
from farspan.runtime.report import PhaseReport

from ..dispatch import bound
from ..laws.tools import HKV, D, H
from ..simulated import Counts, Device, Simulated

SHORT, LONG = 256, 1024
# (spec, launches, waits for the device, small copies to it). Launches may grow with the logarithm of the
# length alone.
BUDGETS = [
    ("dense", 1, 0, 0),
    ("window:w=64,sinks=4", 52, 0, 0),
    # It waits to learn how long its list is: as wide as all blocks, it would be copied to every head.
    ("a_shape:w=64,sinks=16,block=16", 75, 1, 0),
    ("dilated:w=64,dilation=4,sinks=4", 90, 0, 0),
    ("strided:w=32,stride=8", 65, 0, 0),  # each of the 8 residue classes is a call of its own
    ("antidiagonal:block=32,stride=8,mass=0.6", 110, 0, 1),  # copied: how many tiles each query sees
    # copied: where a query block's own segments begin and end
    ("pbs:block=32,segment=64,mass=0.7", 125, 0, 2),
    ("pbs:block=32,segment=64,mass=0.7,select=antidiagonal,stride=8", 130, 0, 3),
    # It waits to learn whether everything is read, and how long the lists are: lists as wide as all blocks
    # are larger than the keys. Copied: the budgets of the heads.
    ("vertical_slash:vertical=40,slash=60,block=16,last=16,sinks=4,local=16", 165, 1, 1),
    ("vertical_slash:mass=0.3,block=16,last=16,sinks=4,local=4", 190, 1, 1),
    # It waits to learn how long the lists are, for the same reason. Copied: the thresholds.
    ("sale:threshold=0.02,block_q=32,block_k=16,local=32,dense_below=64", 125, 1, 1),
    ("dhsa:block_q=32,block_k=16,local=32,fraction=0.3", 100, 0, 0),
    ("dhsa:select=vertical_slash,block_q=32,block_k=16,local=32,fraction=0.3", 165, 0, 0),
    ("oracle:block=32,mass=0.8", 130, 0, 1),
    ("block_topk:k=128,block=32", 95, 0, 0),
]


class Watched(Device):
    """A simulated GPU that notes sums whose order differs between runs on a real one."""

    def __init__(self) -> None:
        super().__init__("cuda")
        self.unsteady: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        on_device = args and isinstance(args[0], Simulated)
        if on_device and "cumsum" in str(func) and args[0].is_floating_point():
            self.unsteady.append(str(func))
        return super().__torch_dispatch__(func, types, args, kwargs)


def prefill(spec: str, tokens: int) -> tuple[Counts, set[tuple[str, str]], tuple[Partial, int]]:
    """(launches, implementations, result and pairs) of a call of ``tokens`` queries on the simulated GPU."""
    q, k, v = inputs(tokens)
    device = Watched()
    with torch.no_grad(), device.running():
        method = bound(farspan.parse_method(spec))
        keys = Keys(kv=KV(device.put(k), device.put(v)), tq=tokens, softmax=Softmax(D**-0.5))
        with device.counted() as counts, implementations() as ran:
            part, reads = attend(method, PREFILL, device.put(q), keys)
        pairs = pairs_of(reads)
    assert not device.unsteady, "a selection that depends on such a sum differs between runs"
    return counts, ran, (Partial(part.out.held, part.lse.held), pairs)


def pairs_of(reads: Reads) -> int:
    """The pairs read, as the report counts them."""
    phase = PhaseReport("")
    phase.add(reads, 1, ())
    return phase.snapshot().pairs


def inputs(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, H, tokens, D), (1, HKV, tokens, D), (1, HKV, tokens, D))
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


@pytest.mark.parametrize(("spec", "launches", "waits", "copies"), BUDGETS, ids=[b[0] for b in BUDGETS])
def test_a_prefill_call_has_a_budget(spec: str, launches: int, waits: int, copies: int) -> None:
    for tokens in (SHORT, LONG):
        counts, ran, _ = prefill(spec, tokens)
        assert counts.launches.total() <= launches, (tokens, counts.launches)
        assert counts.reads.total() <= waits, (tokens, counts.reads)
        assert counts.uploads.total() <= copies, (tokens, counts.uploads)
        assert not {impl for _, impl in ran} & {"eager", "math"}, ran
        if spec.startswith("antidiagonal"):
            assert counts.launches["sort"] == 1  # of a number for each pair of blocks


def test_routing_launches_13_operators_per_segment_of_keys() -> None:
    """Its centroids move from segment to segment, in order. Nothing else of it grows with the length."""
    spec = "routing:k=200,clusters=4,segment=64,block=16,window=32"
    (short, ran, _), (long, _, _) = prefill(spec, SHORT), prefill(spec, LONG)
    assert not {impl for _, impl in ran} & {"eager", "math"}, ran
    assert long.launches.total() - short.launches.total() <= 13 * (LONG - SHORT) // 64
    assert short.launches.total() <= 130 + 13 * SHORT // 64
    assert not long.reads and not long.uploads


@pytest.mark.parametrize(
    "spec", [b[0] for b in BUDGETS] + ["routing:k=200,clusters=4,segment=64,block=16,window=32"]
)
def test_a_gpu_selects_what_the_cpu_selects(spec: str) -> None:
    """Lists as wide as all blocks, sums in another order, heads together: the same keys are read."""
    q, k, v = inputs(SHORT)
    keys = Keys(kv=KV(k, v), tq=SHORT, softmax=Softmax(D**-0.5))
    with torch.no_grad():
        want, reads = attend(bound(farspan.parse_method(spec)), PREFILL, q, keys)
    _, _, (got, pairs) = prefill(spec, SHORT)
    assert pairs == pairs_of(reads)
    assert (got.out.float() - want.out.float()).abs().max() <= 0.02  # bfloat16
    assert torch.allclose(got.lse, want.lse, atol=2e-3)


@pytest.mark.parametrize("spec", [b[0] for b in BUDGETS if b[0].startswith(("vertical", "pbs"))])
def test_heads_may_be_taken_one_by_one(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all of them at once would take too much memory: the same lists and the same count of pairs."""
    q, k, v = inputs(SHORT)
    seen = []
    for at_a_time in (1 << 22, 1):
        monkeypatch.setattr(slash_blocks, "_CPU", at_a_time)
        monkeypatch.setattr(blocks, "_CPU", at_a_time)
        keys = Keys(kv=KV(k, v), tq=SHORT, softmax=Softmax(D**-0.5))
        with torch.no_grad():
            seen.append(attend(bound(farspan.parse_method(spec)), PREFILL, q, keys))
    (one, some), (other, same) = seen
    assert torch.equal(one.out, other.out) and pairs_of(some) == pairs_of(same)


def test_running_sums_on_a_gpu_are_those_of_the_cpu() -> None:
    x = torch.rand(3, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    device = Watched()
    with device.running():
        got = running_sum(device.put(x))
    assert not device.unsteady
    assert torch.allclose(got.held, x.cumsum(-1), rtol=1e-12)


def test_covered_are_the_blocks_that_covering_counts() -> None:
    """Against a loop; shares of few values, so that many are equal."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.randint(0, 4, (2, 3, 5, 9), generator=generator).double()
    forced = torch.rand(5, 9, generator=generator) < 0.2
    got = covered(shares, forced, 0.6)
    assert torch.equal(got.sum(-1), covering(shares, forced, 0.6))
    for index in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 5))).tolist():
        row, read = shares[tuple(index)].tolist(), forced[index[2]].tolist()
        held = sum(x for x, r in zip(row, read, strict=True) if r)
        for i in sorted(range(9), key=lambda i: (-row[i], i)):
            if not read[i] and held < 0.6 * sum(row) and row[i] > 0:
                read[i], held = True, held + row[i]
        assert got[tuple(index)].tolist() == read
