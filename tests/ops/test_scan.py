"""scan and scan_step against the definition, which is a loop over tokens."""

from __future__ import annotations

import itertools
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from farspan.attention.errors import Unsupported
from farspan.attention.ops.dispatch import implementations
from farspan.attention.ops.scan import eager, scan, scan_step

from .scan_inputs import KINDS, Inputs, inputs
from .tools import Run, every_run

Results = dict[str, Tensor]


def results(x: Inputs, *, impl: str, chunk: int = 64, grads: bool = True) -> Results:
    """out, the state and, for gradients that depend on the position, those of every input."""
    x = x.map(lambda y: y.detach().clone().requires_grad_(grads))
    with implementations() as ran:
        out, state = scan(*x.args, **x.options, chunk=chunk, impl=impl)
    assert ran == {("scan", impl)}
    found = {"out": out, "state": state}
    if grads:
        generator = torch.Generator().manual_seed(7)
        seeds = [torch.randn(y.shape, generator=generator).to(y) for y in (out, state)]
        leaves = x.tensors
        ends = [(y, seed) for y, seed in zip((out, state), seeds, strict=True) if y.requires_grad]
        wanted = torch.autograd.grad(
            [y for y, _ in ends], list(leaves.values()), [seed for _, seed in ends], allow_unused=True
        )
        for (name, leaf), grad in zip(leaves.items(), wanted, strict=True):
            found[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return {name: y.detach().cpu() for name, y in found.items()}


def assert_equal(got: Results, want: Results, tolerance: float = 1e-10) -> None:
    assert got.keys() == want.keys()
    for name, y in want.items():
        assert got[name].shape == y.shape and got[name].dtype == y.dtype, name
        error = (got[name] - y).abs().max() if y.numel() else 0.0
        assert error <= tolerance * (1 + (y.abs().max() if y.numel() else 0.0)), f"{name}: {error:.2e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("t", "chunk", "padded", "strong"),
    [(0, 64, False, 1), (1, 64, False, 1), (63, 16, True, 30), (63, 100, False, 0.1), (131, 32, True, 1)],
)
def test_chunks_are_the_recurrence(
    kind: str, t: int, chunk: int, padded: bool, strong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, gradients included, over several spans of several chunks."""
    monkeypatch.setattr(eager, "_SPAN", 2 * 2 * 4 * chunk * chunk)
    x = inputs(kind, t=t, dk=6, dv=10, strong=strong, padded=padded, dtype=torch.float64)
    assert_equal(results(x, impl="eager", chunk=chunk), results(x, impl="reference"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [500, 1021])
def test_split_prefill_is_the_whole(kind: str, t: int) -> None:
    """Parts of any length, each from the state after the one before; gradients through the states."""
    x = inputs(kind, b=1, h=2, hq=1, t=t, dk=4, dv=4, dtype=torch.float64)
    whole = results(x, impl="eager")
    x = x.map(lambda y: y.detach().requires_grad_())
    outs, state = [], x.state
    for a, b in itertools.pairwise((0, 100, 101, 164, t)):
        part = x.cut(a, b)._replace(state=state)
        out, state = scan(*part.args, **part.options)
        outs.append(out)
    assert state is not None
    found = {"out": torch.cat(outs, 2), "state": state}
    generator = torch.Generator().manual_seed(7)
    seeds = [torch.randn(y.shape, generator=generator).to(y) for y in found.values()]
    grads = torch.autograd.grad(list(found.values()), list(x.tensors.values()), seeds)
    assert_equal({**found, **{f"d{n}": g for n, g in zip(x.tensors, grads, strict=True)}}, whole)
    if t == 500:
        assert_equal(whole, results(x, impl="reference"))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_recurrence(kind: str) -> None:
    x = inputs(kind, t=20, dk=6, dv=10, dtype=torch.float64)
    want = results(x, impl="reference", grads=False)
    state, outs = x.state, []
    assert state is not None
    for i in range(20):
        q, k, v, g, beta = (None if y is None else y[:, :, i] for y in (*x.args, x.beta))
        before, given = state, state.clone()
        out, state = scan_step(q, k, v, g, beta=beta, state=state, scale=x.scale)
        assert torch.equal(before, given), "the given state is not written to"
        outs.append(out)
    assert_equal({"out": torch.stack(outs, 2), "state": state}, want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_each_state_by_several_heads(kind: str) -> None:
    x = inputs(kind, t=1, dk=6, dv=10, hq=4, dtype=torch.float64)
    assert x.state is not None
    _, k, v, g, beta = (None if y is None else y[:, :, 0] for y in (*x.args, x.beta))
    queries = torch.randn(2, 12, 6, dtype=torch.float64)
    got, after = scan_step(queries, k, v, g, beta=beta, state=x.state)
    k, v, g, beta, state = (
        None if y is None else y.repeat_interleave(3, 1) for y in (k, v, g, beta, x.state)
    )
    want, end = scan_step(queries, k, v, g, beta=beta, state=state)
    assert_equal({"out": got, "state": after.repeat_interleave(3, 1)}, {"out": want, "state": end})


@pytest.mark.parametrize("kind", ["ssd", "channels", "delta"])
def test_a_row_alone_is_the_row_in_a_padded_batch(kind: str) -> None:
    """With NaN in the padding, on both sides of a row; gradients of the padding are zero."""
    x = inputs(kind, t=40, dk=4, dv=4, dtype=torch.float64)
    alone = results(x.row(0).cut(9, 33), impl="eager", chunk=16)
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[0, 9:33], mask[1] = True, True
    hidden = ~mask[:, None, :, None]
    tokens = {
        name: torch.where(hidden if y.dim() == 4 else hidden[..., 0], torch.nan, y)
        for name, y in x.tensors.items()
        if name != "state"
    }
    batch = results(x._replace(**tokens, mask=mask), impl="eager", chunk=16)
    assert bool((batch["out"][0, :, :9] == 0).all()) and bool((batch["out"][0, :, 33:] == 0).all())
    assert (batch["out"][:1, :, 9:33] - alone["out"]).abs().max() <= 1e-12
    assert (batch["state"][:1] - alone["state"]).abs().max() <= 1e-12
    for name in tokens:
        grad = batch[f"d{name}"]
        assert bool((torch.where(hidden if grad.dim() == 4 else hidden[..., 0], grad, 0) == 0).all()), name


@pytest.mark.parametrize("kind", ["ssd", "channels", "delta"])
def test_sequences_side_by_side(kind: str) -> None:
    """cu_seqlens, with an empty sequence and one of a single token."""
    bounds = torch.tensor([0, 0, 20, 21, 63])
    x = inputs(kind, b=1, t=63, dk=4, dv=4, rows=4, dtype=torch.float64)
    x = x._replace(cu_seqlens=bounds)
    got = results(x, impl="eager", chunk=16)
    assert_equal(got, results(x, impl="reference"))
    assert x.state is not None
    one = x.cut(21, 63)._replace(cu_seqlens=None, state=x.state[3:])
    alone = results(one, impl="eager", chunk=16, grads=False)
    assert (got["out"][:, :, 21:] - alone["out"]).abs().max() <= 1e-12
    assert torch.equal(got["state"][0], x.state[0]), "no token, no change"


@pytest.mark.parametrize("kind", ["ssd", "channels", "delta"])
def test_a_decay_of_nothing(kind: str) -> None:
    """exp(-inf) = 0 forgets the past, and the gradients stay finite."""
    x = inputs(kind, t=40, dk=4, dv=4, dtype=torch.float64)
    assert x.log_decay is not None
    x.log_decay[:, :, 17] = -torch.inf
    assert_equal(results(x, impl="eager", chunk=32), results(x, impl="reference"))


def test_grouped_heads_are_repeated_heads() -> None:
    x = inputs("ssd", t=20, dk=4, dv=4, h=6, hq=2, dtype=torch.float64)
    wide = x._replace(q=x.q.repeat_interleave(3, 1), k=x.k.repeat_interleave(3, 1))
    few, many = (results(y, impl="eager", grads=False) for y in (x, wide))
    assert_equal(few, many)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["padded", "strong", "sequences"])
@every_run()
def test_every_implementation_keeps_its_digits(
    kind: str, case: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 5, gradients included: error <= 2 x the error of the same-dtype reference, both against float64.

    Float32 results of 16-bit inputs (states, gradients of decays) count as rounded to 16 bits, since matrix
    products take that type. The gradient of a decay is a difference of sums of q dq and k dk, and is allowed
    a rounding of those. In 16 bits Triton's delta rule is allowed 4 x: its products take what a token
    writes, which is computed, and the system's solution in that type too (3.2 x was seen).
    """
    if run.impl == "triton":
        from farspan.attention.ops.scan.kernels import segments

        monkeypatch.setattr(segments, "PROGRAMS", 2)  # segments of several chunks
    size = {"t": 40, "dk": 16, "dv": 24, "strong": 1.0}
    if case == "strong":
        size = {"t": 33, "dk": 24, "dv": 16, "strong": 30.0}
    x = inputs(kind, b=1, h=2, hq=1, dtype=run.dtype, padded=case != "sequences", **size)
    if case == "sequences":
        assert x.state is not None
        x = x._replace(cu_seqlens=torch.tensor([0, 0, 7, 40]), state=x.state.expand(3, -1, -1, -1))
    truth = results(x.map(Tensor.double), impl="reference")
    same = results(x, impl="reference")
    got = results(x.map(run.to), impl=run.impl, chunk=16)
    eps, terms = torch.finfo(run.dtype).eps, 0.0
    for name in ("q", "k"):
        terms = max(terms, float((getattr(x, name).double() * truth[f"d{name}"]).abs().max()))
    times = 4 if x.beta is not None and run.impl == "triton" and run.dtype.itemsize == 2 else 2
    for name, want in truth.items():
        rounded = same[name].to(run.dtype).double()
        allowed = times * (rounded - want).abs().max() + 2 * torch.finfo(torch.float32).eps * (
            1 + want.abs().max()
        )
        if name == "dlog_decay":
            allowed += eps * terms
        error = (got[name].double() - want).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def test_triton_says_what_it_cannot_do() -> None:
    pytest.importorskip("triton")
    x = inputs("ssd", t=4, dk=4, dv=4, dtype=torch.float64)
    with pytest.raises(Unsupported, match="float64 is none of"):
        scan(*x.args, impl="triton")
    x = inputs("ssd", t=4, dk=4, dv=4)
    with pytest.raises(Unsupported, match="the inputs differ in type"):
        scan(x.q.half(), x.k, x.v, impl="triton")
    with pytest.raises(Unsupported, match="heads of 300 are wider than 256"):
        scan(x.q, x.k, torch.zeros(2, 4, 4, 300), impl="triton")


def test_flash_linear_attention_says_what_it_cannot_do() -> None:
    x = inputs("ssd", t=4, dk=4, dv=4, padded=True)
    clauses = [
        "the tensors are on cpu, and its kernels run on CUDA",
        "float32 is neither float16 nor bfloat16",
        "it knows no mask; cut the padding away and give cu_seqlens",
    ]
    if find_spec("fla") is None:
        clauses.append('flash-linear-attention is not installed: "pip install flash-linear-attention"')
    with pytest.raises(Unsupported) as raised:
        scan(*x.args, **x.options, impl="fla")
    for clause in clauses:
        assert clause in str(raised.value)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_flash_linear_attention_is_the_recurrence(kind: str) -> None:
    """Another package's rounding: within 1 % of the largest number."""
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    x = inputs(kind, t=200, dk=64, dv=64, strong=0.1, dtype=torch.bfloat16)
    want = results(x.map(Tensor.double), impl="reference", grads=False)
    got = results(x.map(lambda y: y.to("cuda")), impl="fla", grads=False)
    for name, y in want.items():
        assert (got[name].double() - y).abs().max() <= 1e-2 * y.abs().max(), name


def test_bad_input_is_refused_in_a_sentence() -> None:
    q, v = torch.zeros(2, 2, 5, 4), torch.zeros(2, 4, 5, 3)
    g, beta, state = torch.zeros(2, 4, 5), torch.zeros(2, 4, 5), torch.zeros(2, 4, 4, 3)
    for args, options, message in [
        ((q, q[:, :, :4], v), {}, r"scan takes q, k \[B, Hq, T, Dk\] and v \[B, H, T, Dv\]"),
        ((q, q, v[:, :3]), {}, "a whole number of heads of v per head of q and k"),
        ((q, q, v, g[:, :2]), {}, r"log_decay \[B, H, T\] = \[2, 4, 5\] or \[B, H, T, Dk\]; got \[2, 2, 5\]"),
        ((q, q, v, g), {"beta": beta[..., :4]}, r"beta \[B, H, T\] = \[2, 4, 5\]; got \[2, 4, 4\]"),
        ((q, q, v, g[..., None].expand(-1, -1, -1, 4)), {"beta": beta}, "beta with a log_decay per head"),
        ((q, q, v), {"state": state[:1]}, r"a state of \[2, 4, 4, 3\] here; got \[1, 4, 4, 3\]"),
        ((q, q, v), {"mask": beta[:, 0]}, r"a boolean mask \[2, 5\]"),
        ((q, q, v), {"cu_seqlens": torch.tensor([0, 5])}, "for a batch of 1; got .* and a batch of 2"),
        (
            (q[:1], q[:1], v[:1]),
            {"cu_seqlens": torch.tensor([0, 3, 2, 5])},
            r"from 0 to T = 5, ascending; got \[0, 3, 2, 5\]",
        ),
        ((q, q, v), {"chunk": 0}, "chunks of at least 1 token; got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            scan(*args, **options)
