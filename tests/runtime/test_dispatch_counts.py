"""What a layer dispatches, by method and phase, on a simulated GPU: launches within a budget, no wait in a
decode step."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import farspan
from farspan.attention.method import DECODE, AttentionMethod

from ..dispatch import PADDED, STEPS, OneLayer, bindable, count, tiny_methods
from ..laws.parameters import sparse_settings
from ..simulated import Counts, Device

# The most kernels that a call launches, views not counted and a Triton kernel counted as one: (the call of a
# prompt, a decode step, a decode step of a padded batch), at the laws' tiny parameters; methods that do not
# select at decode have the first. `python -m benchmarks.dispatch` prints the counts. A method that is new
# stands here with what it needs; one that needs more than here has become slower on every GPU.
BUDGET: dict[str, tuple[int, ...]] = {
    "a_shape": (69,),
    "act": (573,),
    "antidiagonal": (96,),
    "block_static": (78,),
    "block_topk": (89,),
    "chunkllm": (90, 114, 121),
    "combiner": (220, 103, 214),
    "core_context": (239, 123, 237),
    "dense": (4, 4, 4),
    "descriptors": (282, 122, 255),
    "dhsa": (92,),
    "dilated": (61, 40, 39),
    "double_sparsity": (4, 11, 20),
    "duo": (44, 8, 8),
    "dynamic_mask": (326, 65, 72),
    "h2o": (24, 38, 38),
    "oracle": (117,),
    "pbs": (108,),
    "quest": (4, 20, 56),
    "recycled": (15, 15, 20),
    "routing": (205,),
    "sale": (166,),
    "seer": (162,),
    "seer_decode": (5, 141, 153),
    "snapkv": (20, 6, 19),
    "strided": (57, 46, 45),
    "vertical_slash": (156,),
    "window": (41, 5, 5),
}
# These read the device in a decode step, because what they do next depends on its numbers.
READS = {
    "chunkllm": "a token that ends a chunk makes the host choose anew, and chunks differ in length",
    "recycled:dynamic": "its schedule compares queries, and the host decides whether the step is full",
}


def reads_by_definition(method: AttentionMethod) -> bool:
    kind = f"{method.name}:dynamic" if getattr(method, "dynamic", False) else method.name
    return kind in READS


@pytest.mark.parametrize("name", sorted(farspan.methods()))
def test_launches_stay_within_their_budget(name: str) -> None:
    method = tiny_methods()[name]
    decodes = DECODE in method.phases
    prefill, steps, _ = count(method, "cuda", steps=STEPS if decodes else 0)
    got = [prefill.launches.total()]
    if decodes:
        _, padded, _ = count(method, "cuda", PADDED)
        got += [max(step.launches.total() for step in many) for many in (steps, padded)]
        if not reads_by_definition(method):
            assert waits(*steps, *padded) == Counter()
    assert all(a <= b for a, b in zip(got, BUDGET[name], strict=True)), f"{name} launches {got}"


OTHERS = [
    method
    for cls in farspan.methods().values()
    for method in [cls(**setting) for setting in sparse_settings(cls)][1:]
    if DECODE in cls.phases and bindable(method) and not reads_by_definition(method)
]


@pytest.mark.parametrize("method", OTHERS, ids=str)
def test_no_decode_step_waits_for_the_device(method: AttentionMethod) -> None:
    """By the other parameters of the laws, in a padded batch with a row that is shorter than the budgets."""
    _, steps, _ = count(method, "cuda", [0, 110], steps=3)
    assert waits(*steps) == Counter()


def waits(*steps: Counts) -> Counter[str]:
    """Reads of the device and copies to it."""
    return sum((step.reads + step.uploads for step in steps), Counter())


def test_a_simulated_device_sees_reads_and_computes() -> None:
    """The device of these tests: what waits is seen, views are free, and numbers are those of the CPU."""
    device = Device("cuda")
    with torch.no_grad(), device.running(), device.counted() as counts:
        x = device.put(torch.arange(6.0))
        y = (x.view(2, 3)[1:] * 2).sum()
        assert x.device.type == "cuda" and y.device.type == "cuda"
        assert counts.launches == {"mul": 1, "sum": 1} and set(counts.free) == {"view", "slice"}
        assert not counts.reads and not counts.uploads
        assert float(y) == 24.0 and x.tolist() == [0, 1, 2, 3, 4, 5] and bool((x > 4).any())
        assert counts.reads == {"_local_scalar_dense": 2, "_to_copy": 1}
        torch.tensor([1, 2], device=x.device)
        assert counts.uploads.total() == 1
        x[x > 2], x.nonzero()
        assert counts.reads["index"] == 1 and counts.reads["nonzero"] == 1


def test_both_devices_give_the_same_numbers() -> None:
    """The ways that are taken on a GPU alone, computed for real."""
    for name in ("quest", "window"):
        results = []
        for kind in ("cpu", "cuda"):
            device = Device(kind)
            with torch.no_grad(), device.running():
                layer = OneLayer(tiny_methods()[name], device, PADDED)
                layer.prefill(), layer.steps(2)
            results.append(layer.results)
        for ours, theirs in zip(*results, strict=True):
            valid = torch.isfinite(ours)
            assert (ours[valid].float() - theirs[valid].float()).abs().max() <= 0.02  # bfloat16
