"""Another library's kernels: `tune` times them beside farspan's, and "auto" takes those that were faster."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import farspan
from farspan.attention.errors import Unsupported
from farspan.attention.ops.block_sparse import api, eager
from farspan.attention.ops.dispatch import LazyImpl, explanations, run
from farspan.attention.partial import Partial
from farspan.runtime.crossover import Measured, keep
from farspan.runtime.faster import at_length

GEOMETRY = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 16}
SPEC = "block_topk:k=16,block=8"


class Library(LazyImpl):
    """A library's kernel for block_sparse: farspan's eager one, plus ``off``, its lse times ``base``. It
    refuses calls of ``refused`` queries, and of one more when it runs."""

    def __init__(self, off: float = 0.0, refused: int = 0, base: float = 1.0) -> None:
        self.off, self.refused, self.base = off, refused, base

    def unsupported(self, q: Any, *args: Any, **how: Any) -> list[str]:
        return [f"it cannot take {q.shape[2]} queries"] if q.shape[2] == self.refused else []

    def better_eager(self, *args: Any, **how: Any) -> bool:
        return False

    def __call__(self, *args: Any, **how: Any) -> Partial:
        if args[0].shape[2] == self.refused + 1:
            raise Unsupported("It cannot be compiled", ["its compiler failed"])
        if self.off != self.off:
            raise RuntimeError("no kernel image")
        part = eager.block_sparse(*args, **how)
        return Partial(part.out + self.off, part.lse * self.base)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FARSPAN_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def model(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama()


def measured(own: list[float], **impls: list[float | None]) -> Measured:
    lengths, dense = [32, 64, 128][: len(own)], [9.0] * len(own)
    rivals = {"block_sparse": impls}
    return Measured(
        method=SPEC, phase="prefill", layer=GEOMETRY, lengths=lengths, dense=dense, seconds=own, rivals=rivals
    )


def test_the_fastest_by_length() -> None:
    found = measured([1, 1, 1], a=[0.99, 0.5, 0.5], b=[None, 0.7, 0.4]).faster
    assert found == ((32, {}), (64, {"block_sparse": "a"}), (128, {"block_sparse": "b"}))
    assert at_length(found, 31) is None and at_length(found, 63) == {}
    assert at_length(found, 100) == {"block_sparse": "a"} and at_length(found, 999) == {"block_sparse": "b"}
    assert measured([1, 1], a=[2, 0.96]).faster == ()
    slower = measured([10, 10, 10], a=[10, 5, 5])
    assert slower.taken == [10, 5, 5] and slower.crossover == 64, "dense takes 9"


def test_auto_takes_what_was_measured_and_goes_back_where_it_cannot(
    model: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 64 keys on; the report names what ran. Calls of 70 and 71 queries are those that the library
    refuses."""

    def ran(tokens: int) -> tuple[list[str], torch.Tensor]:
        ids = torch.randint(3, 128, (1, tokens), generator=torch.Generator().manual_seed(0))
        with farspan.patch(model, SPEC, strict=True) as patched, torch.no_grad():
            logits = model(ids).logits
            return patched.report().layers[1].phases["prefill"].implementations["block_sparse"], logits

    impls, logits = ran(80)
    assert impls == ["eager"]
    keep([measured([1, 1], library=[2, 0.5])], model)
    assert ran(80)[0] == ["eager"], "no such library here"
    monkeypatch.setitem(api.IMPLS, "library", Library(refused=70))
    impls, same = ran(80)
    assert impls == ["library"] and torch.equal(same, logits)
    assert ran(60)[0] == ran(70)[0] == ran(71)[0] == ["eager"]


def test_tune_times_the_libraries_that_are_right(
    model: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(api.IMPLS, "right", Library(refused=64))
    monkeypatch.setitem(api.IMPLS, "wrong", Library(0.5))
    monkeypatch.setitem(api.IMPLS, "base_2", Library(base=1.44))
    monkeypatch.setitem(api.IMPLS, "broken", Library(float("nan")))
    with pytest.warns(UserWarning) as said:
        [found] = farspan.tune(model, [SPEC], lengths=[64, 96], repeats=1)
    assert set(found.rivals) == {"block_sparse"} and set(found.rivals["block_sparse"]) == {"right"}
    none, seconds = found.rivals["block_sparse"]["right"]
    assert none is None and seconds is not None and seconds > 0
    texts = {str(one.message) for one in said}
    assert "broken was not timed: its block_sparse failed with RuntimeError('no kernel image')." in texts
    for name in ("wrong", "base_2"):
        begin = f"{name} was not timed: its block_sparse differs from farspan's by"
        assert any(text.startswith(begin) for text in texts), name
    [kept] = json.loads((cache / "crossover.json").read_text()).values()
    assert Measured(**kept) == found


def test_tune_without_a_library_says_nothing(model: Any, cache: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [found] = farspan.tune(model, [SPEC], lengths=[64], repeats=1)
    assert found.rivals == {} and found.faster == ()


def test_explanations_say_what_auto_takes() -> None:
    impls = {"eager": lambda x: x, "library": Library(refused=5)}
    with explanations() as explained:
        for queries in (5, 6):
            run("op", impls, "auto", torch.zeros(1, 1, queries, 1))
    assert [(one.op, one.auto) for one in explained] == [("op", "eager")] * 2
    assert explained[0].reasons == {"eager": [], "library": ["it cannot take 5 queries"]}
    assert explained[1].reasons == {"eager": [], "library": []}
