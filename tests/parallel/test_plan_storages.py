"""What fits on one device, by the format and the memory of the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from farspan.attention.attend import DECODE_ROWS
from farspan.attention.errors import FarspanError
from farspan.attention.spec import parse_method
from farspan.cli.app import app
from farspan.parallel.planner.cost import cache as planned_cache
from farspan.parallel.planner.cost import decode_reads, decode_seconds, memory
from farspan.parallel.planner.device import DEVICES, Device
from farspan.parallel.planner.fits import what_fits
from farspan.parallel.planner.job import Job, LayerShape
from farspan.parallel.planner.plan import plan
from farspan.parallel.planner.storages import PLAIN, STORAGES
from farspan.runtime import machine
from farspan.runtime.hf.models import inspect_model
from farspan.runtime.patch import patch
from farspan.runtime.recipe import Recipe
from farspan.runtime.specs import resolve
from farspan.runtime.store.store import KVStore

from .test_plan import LLAMA_8B, job

GIB = 1 << 30
ROW = 2 * 8 * 128 * 2  # bytes of a token in a layer of Llama 3 8B


def one(length: int = 1 << 17, **changes: object) -> Job:
    return job(length=length, gpus=1, **changes)


def test_sizes_are_those_of_the_groups() -> None:
    """Against a tensor for each part: codes, scales and zeros of keys and of values, and the last rows."""
    for name, bits, group, of_value in (("int8", 8, 64, 128), ("int4", 4, 32, 32)):
        for head_dim in (64, 96, 128):
            shared = of_value if head_dim % of_value == 0 else head_dim
            old = 128 * group
            codes = torch.empty(old, head_dim * bits // 8, dtype=torch.uint8)
            steps = torch.empty(old // group, 2 * head_dim, dtype=torch.bfloat16)
            of_values = torch.empty(old, 2 * head_dim // shared, dtype=torch.bfloat16)
            want = 2 * codes.nbytes + steps.nbytes + of_values.nbytes + 128 * 2 * head_dim * 2
            assert STORAGES[name].size(old + 128, head_dim, 2) == want
    assert STORAGES["int8"].size(1 << 15, 128, 2) <= 0.54 * PLAIN.size(1 << 15, 128, 2)
    assert STORAGES["int4"].size(1 << 15, 128, 2) <= 0.32 * PLAIN.size(1 << 15, 128, 2)
    assert STORAGES["int4"].size(100, 128, 2) == PLAIN.size(100, 128, 2), (
        "within the window nothing is rounded"
    )


def test_memory_of_each_storage() -> None:
    """32 layers; a lower tier leaves two layers' rows on the device."""
    length = 1 << 17
    plain = memory(one())[0]
    assert plain["kv_cache"] == 32 * length * ROW and "fetched" not in plain
    for name in ("int8", "int4"):
        found = memory(one(storage=STORAGES[name]))[0]
        assert found["kv_cache"] == 32 * 8 * STORAGES[name].size(length, 128, 2)
        assert {**found, "kv_cache": 0, "room_to_grow": 0} == {**plain, "kv_cache": 0, "room_to_grow": 0}
    for name in ("host", "disk"):
        dense = memory(one(storage=STORAGES[name]))[0]
        assert dense["kv_cache"] == dense["room_to_grow"] == 0 and dense["fetched"] == 2 * length * ROW
        few = memory(one(storage=STORAGES[name], decode=parse_method("double_sparsity:k=1024")))[0]
        assert few["fetched"] == 2 * 4096 * ROW


def test_seconds_of_each_storage() -> None:
    """The bytes of the keys over the speed of the memory that has them; all else is alike."""
    device = replace(DEVICES["H100"], bandwidth=1e12, host_bandwidth=5e10, disk_bandwidth=5e9)
    at = {}
    for name, stored in STORAGES.items():
        ask = one(device=device, storage=stored)
        kv, selection = decode_reads(ask)
        assert selection == 0 and kv == pytest.approx(32 * 8 * stored.size(1 << 17, 128, 2), abs=32)
        at[name] = decode_seconds(ask, kv, selection)
    whole, packed = 32 * (1 << 17) * ROW, 32 * 8 * STORAGES["int4"].size(1 << 17, 128, 2)
    rest = at["device"] - whole / 1e12
    assert at["int4"] == pytest.approx(rest + packed / 1e12)
    assert at["host"] == pytest.approx(rest + whole / 1e12 + whole / 5e10)
    assert at["int4+host"] == pytest.approx(rest + packed / 1e12 + packed / 5e10)
    assert at["disk"] == pytest.approx(rest + whole / 1e12 + whole / 5e9)


def test_methods_that_free_memory() -> None:
    method = parse_method("core_context:g=16,s=1024")
    found = memory(one(prefill=method, decode=method))[0]
    kept = method.keys_needed + DECODE_ROWS
    assert found["kv_cache"] == 32 * kept * ROW and found["summaries"] == 32 * (1 << 17) // 16 * ROW
    decode_alone = memory(one(decode=parse_method("quest:page=16")))[0]
    assert decode_alone["kv_cache"] == 32 * (1 << 17) * ROW, "dense prefill needs every key"
    # a largest and a least key for each page; two layers are dense
    assert decode_alone["summaries"] == 30 * (1 << 17) // 16 * ROW


def test_what_fits() -> None:
    found = {
        (x.storage, x.length): x for x in what_fits(one(memory=32 * GIB, chunk=4096), [1 << 16, 1 << 18])
    }
    assert len(found) == 2 * len(STORAGES)
    for (name, length), fit in found.items():
        ask = one(length, memory=32 * GIB, chunk=4096, storage=STORAGES[name])
        assert fit.needed == sum(memory(ask)[0].values()) and fit.fits is (fit.needed <= 32 * GIB)
        assert (fit.elsewhere > 0) is (ask.storage.tier != "device")
    yes = {key for key, fit in found.items() if fit.fits}
    assert ("device", 1 << 16) in yes and ("device", 1 << 18) not in yes and ("int4", 1 << 18) in yes
    cpu = replace(DEVICES["H100"], host_bandwidth=None)
    assert not any("host" in fit.storage for fit in what_fits(one(device=cpu), [4096]))
    with pytest.raises(FarspanError, match="on one device; this plan has 2"):
        what_fits(job(LLAMA_8B, 4096, 2), [4096])


def test_the_command(tiny_folder: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def invoke(*arguments: str) -> str:
        done = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["plan", "--model", str(tiny_folder), *arguments])
        assert done.exit_code == 0, done.output
        return done.output

    said = invoke("--length", "8K", "--gpu-memory", "200M")
    assert "cache kept as" in said and "fits, " in said and "Mechanism" not in said
    assert "sent by each GPU" not in said and max(map(len, said.split("tiny has")[0].splitlines())) <= 80
    assert "does not fit" in invoke("--length", "256K", "--gpu-memory", "100M")
    monkeypatch.setattr(machine, "_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "_SIDE", 64)
    assert '"storage": "int4"' in invoke("--length", "1K", "--gpu", "here", "--json")
    refused = CliRunner().invoke(app, ["plan", "--length", "1K", "--gpus", "2", "--gpu", "here"])
    assert "measures one device" in str(refused.exception)


def test_the_measured_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_BYTES", 1 << 22)
    monkeypatch.setattr(machine, "_SIDE", 128)
    found = machine.measured()
    assert isinstance(found, Device) and found.memory > GIB
    assert 1e8 < found.bandwidth < 1e14 and 1e8 < found.flops < 1e16


SMALL = replace(LLAMA_8B, layers=(LayerShape(8, 2, 16),) * 4, element_size=4)


def kept_by(store: KVStore) -> int:
    """Bytes of the keys and values in a store, without its spare room."""
    held = store.held()
    parts = [held["buffers"], *([held["apart_held"]["buffers"]] if held["apart"] else [])]
    packed = [part["packed"]["stored"] for part in parts if part["packed"]]
    return sum(x.nbytes for stored in [*(part["stored"] for part in parts), *packed] for x in stored)


def recipe(model: Any, spec: str) -> Recipe | None:
    """Half of the KV heads of each layer stream, where the method is duo's."""
    if "duo" not in spec:
        return None
    tensors = {f"layers.{i}.alpha": torch.tensor([0.9, 0.1 * i]) for i in range(4)}
    return Recipe(method="duo", geometry=inspect_model(model).geometry, settings={}, tensors=tensors)


@pytest.mark.parametrize("storage", ["device", "int8"])
@pytest.mark.parametrize(
    ("spec", "shrinks"),
    [
        ("dense", ""),
        ("quest:page=16,dense_layers=1", ""),
        ("window:w=64,sinks=4", ""),  # reads a window, and keeps everything
        ("h2o:k=101", ""),
        ("dense + duo:streaming=0.5,sinks=4,recent=60", ""),
        ("core_context:g=4,s=64", "prefill"),
        ("combiner:span=8", "prefill"),
        ("combiner:form=logsparse,span=2,largest=16", "prefill"),
        ("duo:streaming=0.5,sinks=4,recent=60", "prefill"),
        ("duo:streaming=1,sinks=0,recent=40", "prefill"),
        ("snapkv:k=100,window=8,evict=true", "decode"),
        ("h2o:k=101,evict=true", "decode"),
    ],
)
def test_the_planned_cache_is_that_of_a_model(tiny_llama: Any, spec: str, shrinks: str, storage: str) -> None:
    """700 tokens, and 701 after a step, whose key a store that drops many at a time has besides. A packed
    store has less than a group of 64 keys more as they are."""
    prefill, decode = resolve(spec)
    model: Any = tiny_llama(num_hidden_layers=4)
    if storage != "device" and decode.evict:
        with pytest.raises(FarspanError, match="give evict=false"):
            patch(model, spec, storage=storage, recipe=recipe(model, spec))
        return
    ids = torch.randint(3, 128, (1, 701), generator=torch.Generator().manual_seed(0))
    with patch(model, spec, storage=storage, recipe=recipe(model, spec)), torch.no_grad():
        cache = model(ids[:, :-1]).past_key_values
        for phase, new in (("prefill", 0), ("decode", 1)):
            if new:
                model(ids[:, -1:], past_key_values=cache)
            ask = job(SMALL, 700 + new, 1, prefill=prefill, decode=decode, storage=STORAGES[storage])
            kv, spare, _ = planned_cache(ask, phase)
            stores = [layer.store for layer in cache.layers]
            more = 4 * 2 * PLAIN.size(new if storage == "device" else new + 63, 16, 4)
            assert kv <= sum(map(kept_by, stores)) <= kv + more, sum(map(kept_by, stores))
            if phase == "decode":
                summaries = memory(ask)[0].get("summaries", 0)
                held = sum(store.nbytes for store in stores)
                assert kv + summaries <= held <= kv + spare + sum(s.summaries.nbytes for s in stores)
                assert sum(s.summaries.nbytes for s in stores) >= summaries
            dense = 4 * 2 * STORAGES[storage].size(700 + new, 16, 4)
            assert (kv < dense) is (shrinks in ("prefill", phase))


def test_what_is_said_of_methods_that_evict() -> None:
    """The prompt needs the whole cache, what comes after it little; and no storage but the plain one."""
    method = parse_method("snapkv:k=1024,evict=true")
    found = plan(one(decode=method))
    assert found.memory["kv_cache"] == 32 * (1 << 17) * ROW and found.kept == 32 * 1025 * ROW
    assert found.to_dict()["kv_cache_after_first_token"] == found.kept
    text = " ".join(found.notes)
    assert f"At its first token {method} drops all but 128 MiB of the cache." in text
    assert "no storage but 'device' can" in text
    assert {fit.storage for fit in what_fits(one(decode=method), [4096])} == {"device"}
    whole = plan(one(decode=parse_method("snapkv:k=1024")))
    assert whole.kept == whole.memory["kv_cache"] and whole.notes == []
    with pytest.raises(FarspanError, match="give one GPU, or evict=false"):
        job(gpus=2, decode=method)
