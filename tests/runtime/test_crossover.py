"""tune() and patch(crossover=...): short keys are read densely, and the report says so."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import farspan
from farspan.attention.method import AttentionMethod
from farspan.attention.spec import parse_method
from farspan.runtime import crossover, layer_call
from farspan.runtime.crossover import Measured, crossovers, keep
from farspan.runtime.hf import inspect_model

GEOMETRY = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 16}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FARSPAN_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def model(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama()


def measured(method: str, phase: str, dense: list[float], seconds: list[float]) -> Measured:
    lengths = [2**i for i in range(4, 4 + len(dense))]
    return Measured(method=method, phase=phase, layer=GEOMETRY, lengths=lengths, dense=dense, seconds=seconds)


@pytest.mark.parametrize(
    ("dense", "seconds", "expected"),
    [
        ([1, 2, 4, 8], [2, 3, 3, 3], 64),
        ([1, 2, 4, 8], [0.5, 1, 2, 4], 16),
        ([1, 2, 4, 8], [0.5, 3, 2, 4], 64),  # a lucky win at a short length does not count
        ([1, 2, 4, 8], [0.5, 1, 2, 9], None),
        ([1, 2], [1, 2], None),
    ],
)
def test_the_crossover_is_where_the_method_begins_to_win_for_good(
    dense: list[float], seconds: list[float], expected: int | None
) -> None:
    assert measured("quest:k=16,dense_layers=0", "decode", dense, seconds).crossover == expected


def tokens(model: Any, ids: torch.Tensor, new: int = 8) -> list[int]:
    return model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None)[0].tolist()


def test_below_the_crossover_attention_is_dense_and_the_report_says_so(model: Any) -> None:
    ids = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(0))
    plain = tokens(model, ids)
    with farspan.patch(model, "quest:k=16,page=4,dense_layers=0", crossover=1000, strict=True) as patched:
        assert tokens(model, ids) == plain
        summary = patched.report().summary
    assert summary["decode_density"] == 1.0
    assert summary["fallbacks"] == {"below the crossover of 1000 keys": 2 * 7}


def test_the_method_takes_over_at_the_crossover(model: Any) -> None:
    """8 tokens after a prompt of 40: the 7 decode steps see 41 .. 47 keys, of which 44 .. 47 are selected."""
    ids = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(0))
    with farspan.patch(model, "quest:k=16,page=4,dense_layers=0", crossover=44) as patched:
        tokens(model, ids)
        report = patched.report()
    assert report.summary["fallbacks"] == {"below the crossover of 44 keys": 2 * 3}
    dense_pairs, causal_pairs = (41 + 42 + 43) * 8, sum(range(41, 48)) * 8
    for layer in report.layers:
        assert layer.phases["decode"].causal_pairs == causal_pairs
        selected = layer.phases["decode"].pairs - dense_pairs
        assert 0 < selected <= 4 * 16 * 8


@pytest.mark.parametrize(
    "spec",
    [
        "quest:k=16,page=4,dense_layers=0",
        "block_topk:k=24,block=8 + recycled:k=16,stride=3",
        "window:w=12,sinks=2",
        "h2o:k=16",
        "snapkv:k=24,window=8",
    ],
)
def test_rows_of_a_padded_batch_cross_each_for_itself(tiny_llama: Callable[..., Any], spec: str) -> None:
    """By its own length, as alone: three rows of which one is above from the start, one comes to be, one
    stays below."""
    model = tiny_llama(initializer_range=0.15).double()
    lengths, new, at = (60, 41, 30), 8, 44
    ids = torch.randint(3, 128, (3, 60), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(60) >= 60 - torch.tensor(lengths)[:, None]).long()
    how = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    how |= {"output_logits": True, "return_dict_in_generate": True}

    def run(rows: slice, first: int) -> tuple[torch.Tensor, torch.Tensor, list[dict[str, Any]]]:
        with farspan.patch(model, spec, crossover=at) as patched:
            made = model.generate(ids[rows, first:], attention_mask=mask[rows, first:], **how)
            phases = patched.report().layers[1].phases
        read = [{name: getattr(part, name) for name in ("pairs", "kv_bytes")} for part in phases.values()]
        return made.sequences[:, -new:], torch.stack(made.logits, 1), read

    tokens, logits, read = run(slice(0, 3), 0)
    alone = [run(slice(row, row + 1), 60 - n) for row, n in enumerate(lengths)]
    for row, (own_tokens, own_logits, _) in enumerate(alone):
        assert torch.equal(own_tokens[0], tokens[row])
        assert (own_logits[0] - logits[row]).abs().max() < 1e-5
    for phase, together in enumerate(read):
        assert together == {name: sum(x[2][phase][name] for x in alone) for name in together}


def test_auto_takes_what_was_measured(model: Any, cache: Path) -> None:
    quest, block = (str(parse_method(s)) for s in ("quest:k=16,dense_layers=0", "block_topk:k=64"))
    keep(
        [
            measured(quest, "decode", [1, 2, 4], [2, 1, 1]),
            measured(block, "prefill", [1, 2, 4], [2, 3, 5]),
        ],
        model,
    )
    layer = inspect_model(model).layer_info(0)
    methods = {"prefill": parse_method(block), "decode": parse_method(quest)}
    assert crossovers(methods, layer, model, "auto") == {"prefill": math.inf, "decode": 32.0}
    ids = torch.randint(3, 128, (1, 100), generator=torch.Generator().manual_seed(0))
    with farspan.patch(model, prefill=block, decode=quest, crossover="auto") as patched:
        tokens(model, ids)
        fallbacks = patched.report().summary["fallbacks"]
    assert fallbacks["not faster than dense at the longest length measured"] == 2


def test_auto_without_a_measurement_is_refused(model: Any, cache: Path) -> None:
    with pytest.raises(
        farspan.FarspanError, match=r"quest:k=16,dense_layers=0 in decode was never measured .*farspan tune"
    ):
        farspan.patch(model, "quest:k=16,dense_layers=0", crossover="auto")
    key = crossover._key("quest:k=16,dense_layers=0", "decode", GEOMETRY, model)
    whole = asdict(measured("quest", "decode", [1, 2, 4], [2, 1, 1]))
    short = {"gather_decode": {"flashinfer": [0.5]}}  # a time for one of three lengths
    for broken in ({"method": "quest"}, whole | {"rivals": None}, whole | {"rivals": short}):
        (cache / "crossover.json").write_text(json.dumps({key: broken}))
        for how in ({}, {"crossover": "auto"}):
            with pytest.raises(farspan.FarspanError, match=r"crossover.json holds no crossovers: delete it"):
                farspan.patch(model, "quest:k=16,dense_layers=0", **how)
    (cache / "crossover.json").write_text("not json")
    with pytest.raises(farspan.FarspanError, match=r"crossover.json cannot be read .*delete it"):
        farspan.patch(model, "quest:k=16,dense_layers=0", crossover="auto")


@pytest.mark.parametrize("bad", [0, -1, 1.5, "soon", True])
def test_a_crossover_that_is_none_is_refused(model: Any, bad: Any) -> None:
    with pytest.raises(farspan.FarspanError, match='crossover is "auto" or a number of keys'):
        farspan.patch(model, "quest:k=16,dense_layers=0", crossover=bad)
    farspan.patch(model, "dense").remove()  # nothing was left behind


def test_a_cache_folder_that_is_none_holds_no_measurements(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FARSPAN_CACHE", str(tmp_path / "file" / "cache"))
    farspan.patch(model, "dense").remove()


def test_tune_measures_each_phase_and_keeps_it(model: Any, cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = farspan.tune(
        model,
        ["block_topk:k=64 + quest:k=16,dense_layers=0", "recycled:k=16,stride=3"],
        lengths=[64, 256],
        repeats=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [(m.method, m.phase) for m in found] == [
        ("block_topk:k=64", "prefill"),
        ("quest:k=16,dense_layers=0", "decode"),
        ("recycled:k=16,stride=3", "decode"),
    ]
    for m in found:
        assert m.lengths == [64, 256] and len(m.dense) == len(m.seconds) == 2
        assert min(m.dense + m.seconds) > 0
    assert seen[-1] == (6, 6)
    kept = json.loads((cache / "crossover.json").read_text())
    assert len(kept) == 3 and all(Measured(**entry) in found for entry in kept.values())
    farspan.patch(model, "block_topk:k=64 + quest:k=16,dense_layers=0", crossover="auto").remove()
    assert not [p for p in cache.iterdir() if p.name.startswith("tmp")]


@pytest.mark.parametrize(
    ("spec", "steps"),
    [("recycled:k=16,stride=7", 7), ("recycled:k=16,dynamic=true,qc=6", 6), ("strided:w=8,stride=9", 4)],
)
def test_tune_times_whole_periods_of_decode(
    model: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, spec: str, steps: int
) -> None:
    """A full step of recycled is among those timed; every step of a pattern is alike, whatever its stride."""
    method, calls, attend = parse_method(spec), [0], layer_call.attend

    def counted(served: AttentionMethod, phase: str, *rest: Any, **how: Any) -> Any:
        calls[0] += served == method and phase == "decode"
        return attend(served, phase, *rest, **how)

    monkeypatch.setattr(layer_call, "attend", counted)
    farspan.tune(model, f"dense + {spec}", lengths=[64], repeats=2)
    assert calls[0] == (1 + 2) * steps, "a warm-up, and two that are timed"


def test_what_cannot_be_tuned_is_refused(model: Any, cache: Path) -> None:
    with pytest.raises(farspan.FarspanError, match="at least one method other than dense"):
        farspan.tune(model, ["dense"])
    for lengths in ([], [64, 32], [1, 2], [8, 8]):
        with pytest.raises(farspan.FarspanError, match="Lengths are ascending numbers of keys"):
            farspan.tune(model, ["quest:k=16,dense_layers=0"], lengths=lengths)
    with pytest.raises(farspan.FarspanError, match="at least 1; got 0"):
        farspan.tune(model, "quest:k=16,dense_layers=0", lengths=[64], repeats=0)
    with pytest.raises(farspan.FarspanError, match="needs a recipe"):
        farspan.tune(model, ["double_sparsity:k=16"], lengths=[64])
