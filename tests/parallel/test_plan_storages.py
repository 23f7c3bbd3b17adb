"""What fits on one device, by the format and the memory of the cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from farspan.attention.attend import DECODE_ROWS
from farspan.attention.errors import FarspanError
from farspan.attention.spec import parse_method
from farspan.cli.app import app
from farspan.parallel.planner.cost import decode_reads, decode_seconds, memory
from farspan.parallel.planner.device import DEVICES, Device
from farspan.parallel.planner.fits import what_fits
from farspan.parallel.planner.job import Job
from farspan.parallel.planner.storages import PLAIN, STORAGES
from farspan.runtime import machine

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
    assert decode_alone["summaries"] == 32 * (1 << 17) // 16 * ROW, "a largest and a least key for each page"


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
