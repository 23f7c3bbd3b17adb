"""The parameters at which the laws run a method: sparse ones, and budgets that cover every length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import farspan
from farspan.attention.method import AttentionMethod


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
    "duo": [
        {"streaming": 0.75, "sinks": 3, "recent": 20, "evict": False},
        {"streaming": 0.75, "sinks": 3, "recent": 20},  # one head of the layer streams
        {"streaming": 1.0, "sinks": 0, "recent": 7},
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
    "core_context": [{"g": 4, "s": 16}, {"g": 8, "s": 24}],
    "combiner": [
        {"span": 8},
        {"span": 5, "count_correction": True},
        {"form": "logsparse", "span": 1, "largest": 32, "count_correction": True},
        {"form": "logsparse", "span": 4, "largest": 16},
    ],
    "descriptors": [{"chunk": 16, "pool": 4}, {"chunk": 9, "pool": 9, "count_correction": True}],
    "quest": [
        {"k": 24, "page": 4, "dense_layers": 0},
        {"k": 27, "page": 8, "gqa_reduce": "sum", "dense_layers": 0},
        {"k": None, "fraction": 0.3, "page": 8, "gqa_reduce": "none", "dense_layers": 0},
        {"k": 12, "page": 1, "dense_layers": 0},
    ],
    "double_sparsity": [
        {"k": 20, "dense_layers": 0, "group_factor": 4},
        {"k": None, "fraction": 0.2, "gqa_reduce": "none", "dense_layers": 0, "group_factor": 2},
        {"k": 20, "dense_layers": 0, "group_factor": 2, "label_bits": 4},
    ],
    "dynamic_mask": [
        {"w": 24, "local": 0, "add_bias": True},
        {"w": 20, "local": 6, "form": "exp", "add_bias": True},
        {"w": 24, "local": 4},
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
        {"k": 24, "block": 8, "gate_dim": 16, "per_head": True},
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
    "recent": 1 << 20,
    "span": 1 << 20,
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
    if cls.name == "core_context":  # recycled has another s
        return [{"s": 1 << 20}]
    if cls.name == "descriptors":  # recycled and snapkv have another pool
        return [{"pool": 1, "chunk": 16}, {"chunk": 1 << 20}]
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


def every_method(
    phase: str | None = None,
    *,
    whole_prompt: bool = True,
    of_summaries: bool = True,
    evicting_in_some_heads: bool = True,
) -> Any:
    """Parametrise ``method`` over all registered methods (of ``phase``), at budgets that leave keys out.

    whole_prompt: also those that judge a call by its own last queries (their ``lookahead`` is "prompt").
    of_summaries: also those that attend to summaries in place of keys, and need only the last keys.
    evicting_in_some_heads: also those whose caches drop keys of some KV heads alone, which is refused over
    ranks.
    """
    cases = _cases(sparse_settings, phase)
    if not of_summaries:
        cases = [case for case in cases if case.values[0].keys_needed is None]
    if not evicting_in_some_heads:
        cases = [case for case in cases if not case.values[0].evicts_in_some_heads]
    if not whole_prompt:
        cases = [case for case in cases if lookahead(case.values[0]) is not None]
    return pytest.mark.parametrize("method", cases)


def every_method_with_static_step() -> Any:
    """Parametrise ``method`` over those that serve a store of fixed size, at budgets that leave keys out."""
    cases = _cases(sparse_settings, "decode")
    return pytest.mark.parametrize("method", [case for case in cases if case.values[0].has_static_step])


def every_method_with_full_budget() -> Any:
    return pytest.mark.parametrize("method", _cases(full_settings, None))


def covering(settings: int, cases: int) -> set[tuple[int, int]]:
    """Pairs (setting, case) by number, as few as let every setting meet a case and every case meet a setting.

    The shift at each round keeps a setting from always meeting the same value of one axis of the cases.
    """
    if cases >= settings:
        return {((case + case // settings) % settings, case) for case in range(cases)}
    return {(setting, (setting + setting // cases) % cases) for setting in range(settings)}


def leaves_out(method: AttentionMethod) -> bool:
    """Whether some keys are not read; ACT by itself gives them other weights."""
    costs = [method.cost(phase, 120) for phase in method.phases]
    return any(cost.density < 1 or not cost.exact for cost in costs)


def lookahead(method: AttentionMethod) -> int | None:
    """How many rows past a row its selection may see; None for the whole prompt. Decode never looks ahead."""
    return None if method.lookahead.is_prompt else int(method.lookahead.tokens)


# --- attention level --------------------------------------------------------------------------------
