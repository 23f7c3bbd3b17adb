"""Tensor parallelism beside context parallelism: a (cp, tp) mesh of 2 x 2, weights laid out by transformers
or torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import farspan
from farspan.runtime import hf

from ..runtime import small_models
from .jobs import BLOCK
from .world import World

# What transformers calls the other dimension of its mesh: FSDP's, or (since 5.23) replicas of the weights.
REPLICAS = "dp_replicate_size" in {field.name for field in fields(DistributedConfig)}
ROUTES = ["fsdp_size", *(["dp_replicate_size"] if REPLICAS else [])]
ROUTE = ROUTES[-1]
SPARSE = "block_topk:k=32,block=16"
LABELS = "double_sparsity:k=16,dense_layers=0"
SPECS = [
    "dense",
    "quest:k=16,page=4,dense_layers=0",
    "recycled:k=24,stride=3",
    "recycled:k=24,dynamic=true,qc=2,s=0.99,scope=kv_head",
    LABELS,
    SPARSE,
    f"{SPARSE} + {LABELS}",
]
HEADS, KV_HEADS, LAYERS = 8, 4, 3
LENGTH, SHORT, NEW = 90, 61, 10


def meshed() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))


def batch() -> dict[str, torch.Tensor]:
    """Two rows, one of them padded."""
    ids = torch.randint(3, small_models.VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, : LENGTH - SHORT] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generated(model: Any, spec: str, recipe: Path, **parallel: Any) -> dict[str, Any]:
    """What ``generate`` gives, the shape of each layer's stored keys, and the pairs that its decode has
    read."""
    how = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "return_dict_in_generate": True}
    needed = recipe if LABELS in spec else None
    with farspan.patch(model, spec, recipe=needed, **parallel) as patched:
        out = model.generate(**batch(), **how)
        shapes = [tuple(layer.keys.shape) for layer in out.past_key_values.layers]
        pairs = [layer.phases["decode"].pairs for layer in patched.report().layers]
    return {"tokens": out.sequences, "keys": shapes, "pairs": pairs}


def load(folder: Path, route: str, dtype: torch.dtype) -> Any:
    """The model with its weights over two tensor-parallel ranks, and those twice."""
    config = DistributedConfig(tp_size=2, **{route: 2})
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=dtype).eval()


def shared_out(model: Any, mesh: DeviceMesh) -> Any:
    """A whole model's weights laid out over ``mesh`` by torch."""
    plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.gate_proj": ColwiseParallel()}
    plan |= {"mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan, src_data_rank=None)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and beside it a recipe that ranks each KV head's channels differently."""
    place = tmp_path_factory.mktemp("tensor_parallel")
    model = small_models.make("llama", num_attention_heads=HEADS, num_key_value_heads=KV_HEADS)
    model.save_pretrained(place / "model")
    draw = torch.Generator().manual_seed(3)
    ranking = {
        f"layers.{i}.channels": torch.rand(KV_HEADS, 16, generator=draw).argsort(-1).int()
        for i in range(LAYERS)
    }
    geometry = hf.inspect_model(model).geometry
    farspan.Recipe(method="double_sparsity", geometry=geometry, settings={}, tensors=ranking).save(
        place / "recipe"
    )
    return place


def by_transformers(_: Any, folder: Path, route: str, specs: list[str]) -> list[dict[str, Any]]:
    model = load(folder / "model", route, torch.float64)
    found_in_the_weights = farspan.ContextParallel(block=BLOCK)
    return [
        generated(model, spec, folder / "recipe", parallel=parallel)
        for parallel in (farspan.ContextParallel(block=BLOCK, mesh=meshed()), found_in_the_weights)
        for spec in specs
    ]


def by_torch(_: Any, folder: Path, specs: list[str]) -> list[dict[str, Any]]:
    mesh = meshed()
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).eval()
    shared_out(model, mesh["tp"])
    parallel = farspan.ContextParallel(mesh=mesh, block=BLOCK)
    return [generated(model, spec, folder / "recipe", parallel=parallel) for spec in specs]


def assert_as_on_one_device(ranks: list[Any], folder: Path, specs: list[str]) -> None:
    """The same tokens; a quarter of the cache on each rank; all together they read what one device reads."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).eval()
    total = LENGTH + NEW - 1
    for i, spec in enumerate(specs):
        want = generated(model, spec, folder / "recipe")
        assert want["keys"] == [(2, KV_HEADS, total, 16)] * LAYERS
        every = [done[i] for done in ranks]
        for rank, got in enumerate(every):
            assert torch.equal(got["tokens"], want["tokens"]), f"rank {rank}: {spec}"
            for _, heads, rows, _ in got["keys"]:
                assert heads == KV_HEADS // 2, f"rank {rank}: {spec}"
                assert rows <= total / 2 + BLOCK, f"rank {rank}: {spec}"
        read = zip(*(got["pairs"] for got in every), strict=True)  # by layer
        assert [sum(pairs) for pairs in read] == want["pairs"], spec


@pytest.mark.parametrize(
    "route", [ROUTE, *(pytest.param(route, marks=pytest.mark.slow) for route in ROUTES if route != ROUTE)]
)
def test_generate_as_on_one_device(route: str, folder: Path, world: World):
    specs = SPECS if route == ROUTE else [LABELS]
    ranks = world.run(by_transformers, 4, folder, route, specs)
    assert_as_on_one_device(ranks, folder, specs * 2)


def test_weights_laid_out_by_torch(folder: Path, world: World):
    specs = ["dense", LABELS]
    assert_as_on_one_device(world.run(by_torch, 4, folder, specs), folder, specs)


# --- heads, by architecture -------------------------------------------------------------------------------

# The plans of these gather the projections' outputs or leave attention out: every rank computes all heads.
WHOLE_HEADS = ("olmo2", "phi3", "gpt_oss")


def of_architecture(_: Any, folder: Path, specs: list[str]) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    model = load(folder, ROUTE, torch.float32)
    done = [generated(model, spec, folder, parallel="auto") for spec in specs]
    layer = hf.inspect_model(model).layer_info(1)
    return done, (layer.num_heads, layer.num_kv_heads)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "olmo2", "phi3", "gpt_oss", "gemma3", "qwen3_moe"])
def test_architectures(name: str, tmp_path: Path, world: World):
    specs = ["dense", "quest:k=16,page=4,dense_layers=0"]
    model = small_models.make(name)
    model.save_pretrained(tmp_path)
    want = [generated(model, spec, tmp_path) for spec in specs]
    for done, heads in world.run(of_architecture, 4, tmp_path, specs):
        assert heads == ((4, 2) if name in WHOLE_HEADS else (2, 1))
        for a, b in zip(done, want, strict=True):
            assert torch.equal(a["tokens"], b["tokens"])


# --- training -----------------------------------------------------------------------------------------------


def gradients(
    model: Any, spec: str, checkpointing: bool, **parallel: Any
) -> tuple[dict[str, torch.Tensor], int]:
    """Of one step; and the bytes that the first layer has sent."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with farspan.patch(model, spec, **parallel) as patched:
        model(**inputs, labels=labels).loss.backward()
        sent = patched.report().layers[0].phases["prefill"].sent_bytes
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}, sent


def trained(_: Any, folder: Path, route: str, cases: list[tuple[str, bool]]) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of full_tensor, about its speed
        return [
            gradients(load(folder / "model", route, torch.float64), *case, parallel="auto") for case in cases
        ]


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_gradients_as_on_one_device(route: str, folder: Path, world: World):
    cases = [("dense", False), ("dense", True), (SPARSE, False)]
    ranks = world.run(trained, 4, folder, route, cases)
    for i, case in enumerate(cases):
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
        want, _ = gradients(model, *case)
        for got, sent in (done[i] for done in ranks):
            assert sent > 0
            for name, grad in want.items():
                assert (got[name] - grad).abs().max() <= 1e-9 * grad.abs().max(), f"{name}: {case}"


# --- what is refused ----------------------------------------------------------------------------------------


def said(call: Callable[[], Any]) -> str:
    try:
        call()
    except farspan.FarspanError as error:
        return str(error)
    return "nothing"


def refused(_: Any, folder: Path) -> dict[str, str]:
    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / "model", num_key_value_heads=KV_HEADS)

    mesh = meshed()
    model = shared_out(fresh(), mesh["tp"])
    crossed = init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "cp"))
    everyone, mixed = (init_device_mesh("cpu", (4,), mesh_dim_names=(name,)) for name in ("tp", "cp"))
    unnamed = shared_out(fresh(), init_device_mesh("cpu", (4,)))
    uneven = shared_out(small_models.make("llama"), everyone)
    alone = shared_out(fresh(), everyone)
    found = {
        "not told": said(lambda: farspan.patch(model, parallel="auto")),
        "not told the size": said(lambda: farspan.patch(model, parallel=farspan.ContextParallel(size=2))),
        "crossed": said(lambda: farspan.patch(model, parallel=crossed)),
        "mixed": said(lambda: farspan.patch(model, parallel=mixed)),
        "coupled heads": said(lambda: farspan.patch(model, "recycled:k=24,dynamic=true", parallel=mesh)),
        "coupled heads, no mesh": said(lambda: farspan.patch(model, "recycled:k=24,dynamic=true")),
        "unnamed": said(lambda: farspan.patch(unnamed)),
        "uneven": said(lambda: farspan.patch(uneven)),
        "all ranks": said(lambda: farspan.patch(alone, parallel=farspan.ContextParallel(size=2))),
        "calibration": said(lambda: farspan.calibrate(model, None, "")),
    }
    with farspan.patch(alone, parallel="auto"):  # no ranks are left to share the sequence
        found["alone"] = f"{len(alone(torch.arange(3, 40)[None]).logits[0])} logits"
    return found


def test_what_is_refused(folder: Path, world: World):
    expected = {
        "not told": 'a torch DeviceMesh with the dimensions "cp" and "tp"',
        "not told the size": 'a torch DeviceMesh with the dimensions "cp" and "tp"',
        "crossed": "different heads of the model",
        "mixed": "different heads of the model",
        "coupled heads": "it makes one decision for all heads of a layer",
        "coupled heads, no mesh": "it makes one decision for all heads of a layer",
        "unnamed": "has no dimension called",
        "uneven": "its 4 query heads and 2 KV heads do not divide by the 4 ranks",
        "all ranks": "tensor parallelism uses all 4 ranks of the job: start 2 times as many",
        "calibration": "The heads of this model are sharded by tensor parallelism",
        "alone": "37 logits",
    }
    for rank, found in enumerate(world.run(refused, 4, folder)):
        for name, text in expected.items():
            assert text in found[name], f"rank {rank}, {name}: {found[name]}"
