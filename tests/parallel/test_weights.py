"""Weights cut or spread otherwise: FSDP serves, ZeRO-3 and device maps over devices are refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import farspan
from farspan.attention.errors import Unsupported

from ..runtime import small_models
from . import launch
from .jobs import Case, model_of, prompts
from .world import World

SPARSE = "block_topk:k=32,block=16"
CASES = [
    Case(lengths=(93, 70), spec=SPARSE),
    Case(lengths=(93, 70), how={"gradient_checkpointing": True}),
]


def sharded(model: Any, group: Any, version: int) -> Any:
    """The model with its weights cut over ``group`` by FSDP."""
    if version == 1:
        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        return FullyShardedDataParallel(model, group, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def stepped(case: Case, wrap: Any = None, **parallel: Any) -> list[torch.Tensor]:
    """The weights after two steps."""
    model = copy.deepcopy(model_of(case)).train()
    if case.how:
        model.gradient_checkpointing_enable()
    model = wrap(model) if wrap else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids, mask = prompts(case)
    with farspan.patch(model, case.spec, **parallel) as patched:
        for _ in range(2):
            optimizer.zero_grad()
            model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
            optimizer.step()
        assert bool(patched.report().summary["sent_bytes"]) == bool(parallel)
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return [p.detach().clone() for p in model.parameters()]
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [p.detach() for p in whole]


def under_fsdp(group: Any, version: int) -> tuple[list[list[torch.Tensor]], torch.Tensor | None]:
    """Of each case the weights after two steps, and what FSDP2's model generates."""
    parallel = farspan.ContextParallel(mesh=group)
    weights = [
        stepped(case, lambda model: sharded(model, group, version), parallel=parallel) for case in CASES
    ]
    if version == 1:
        return weights, None
    model = sharded(copy.deepcopy(model_of(CASES[0])), group, version)
    return weights, tokens(model, parallel=parallel)


def tokens(model: Any, **parallel: Any) -> torch.Tensor:
    ids, mask = prompts(CASES[0])
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "synced_gpus": False}
    with farspan.patch(model, "quest:k=16,page=4,dense_layers=0", **parallel):
        return model.generate(ids, attention_mask=mask, **how)


@pytest.mark.parametrize("version", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_fsdp(version: int, world: World):
    """Steps as on one device; FSDP2 generates, too. (FSDP1 does not, under the patch.)"""
    ranks = world.run(under_fsdp, 2, version)
    want = [stepped(case) for case in CASES]
    for weights, generated in ranks:
        for got, exact, case in zip(weights, want, CASES, strict=True):
            for a, b in zip(got, exact, strict=True):
                assert (a.view_as(b) - b).abs().max() < 1e-10, case
        if version == 2:
            assert torch.equal(generated, tokens(model_of(CASES[0])))


# --- what is refused, before any rank is met ----------------------------------------------------------------


def test_zero_3():
    model = small_models.make("llama")
    next(model.parameters()).ds_id = 0  # what DeepSpeed marks the parameters with that it has sharded
    with pytest.raises(Unsupported, match=r"sharded by DeepSpeed ZeRO-3.*use ZeRO-2 or less"):
        farspan.patch(model, parallel="auto")


@pytest.mark.slow
def test_deepspeed():
    pytest.importorskip("deepspeed")
    ends = launch.ranks(2, "script_weights.py", within=300)  # it may compile something at first
    assert [end.code for end in ends] == [0, 0], ends[0].err
    assert len(re.findall(r"^refused: .*sharded by DeepSpeed ZeRO-3", ends[0].out, re.MULTILINE)) == 2
    apart, moved = map(float, re.findall(r"^apart (\S+) of (\S+)$", ends[0].out, re.MULTILINE)[0])
    assert apart < 1e-5 < 1e-3 < moved


PLACES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
PLACES |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}


def test_device_map_over_devices(tmp_path: Path):
    small_models.make("llama").save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=PLACES, offload_folder=tmp_path / "weights"
    )
    with pytest.raises(Unsupported, match="device_map has put its layers on several devices"):
        farspan.patch(model, parallel="auto")


def test_offloaded_weights():
    from accelerate import cpu_offload

    model = cpu_offload(small_models.make("llama"), execution_device=torch.device("cpu"))
    with pytest.raises(Unsupported, match="its weights are offloaded"):
        farspan.patch(model, parallel="auto")
