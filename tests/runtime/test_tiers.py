"""Keys and values in files and in host memory: what is left behind, what is in memory, what a GPU gets."""

from __future__ import annotations

import copy
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import farspan
from farspan.attention import offloaded, summary
from farspan.attention.attend import attend
from farspan.attention.errors import FarspanError, Unsupported
from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.offloaded import Offloaded
from farspan.attention.ops.decode import decode as decode_op
from farspan.attention.ops.flash import flash
from farspan.attention.softmax import Softmax
from farspan.runtime.store.bridges import Fetching
from farspan.runtime.store.disk import Disk
from farspan.runtime.store.hot_rows import HotRows
from farspan.runtime.store.storage import Storage, parse_storage
from farspan.runtime.store.store import KVStore

from ..dispatch import PROMPT, STEPS, WARM, OneLayer, bound, tiny_methods
from ..laws.tools import Data, Stream
from ..simulated import Device
from .small_models import decode, make, padded, prompt, recipe, shared

QUEST = "quest:k=16,page=4,dense_layers=0"


def open_files(folder: Path) -> int:
    """How many files in ``folder`` this process has open or mapped."""
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def resident(folder: Path) -> int:
    """Bytes of the files in ``folder`` that are in the memory of this process, as the system counts them."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line[:1].isupper():
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.parametrize("storage", ["host:cached=30", "disk:folder={}"])
@pytest.mark.parametrize("spec", ["dense", QUEST, "double_sparsity:k=16,dense_layers=0"])
def test_generate(spec: str, storage: str, tmp_path: Path) -> None:
    """Beams, a padded prompt in chunks, assisted decoding: the tokens and the pairs are those of the
    device."""
    model, assistant = shared("llama"), make("llama", seed=1)
    learned = recipe("llama") if spec.startswith("double") else None
    ways = ({"num_beams": 3, "prefill_chunk_size": 16}, {"assistant_model": assistant})
    for inputs, how in zip((padded(), prompt()), ways, strict=True):
        with farspan.patch(model, spec, recipe=learned) as patched:
            want, plain = decode(model, inputs, 16, **how), patched.report()
        with farspan.patch(model, spec, recipe=learned, storage=storage.format(tmp_path)) as patched:
            assert torch.equal(decode(model, inputs, 16, **how), want)
            report = patched.report()
        assert report.summary["decode_density"] == plain.summary["decode_density"]
        lower = report.summary["kv_bytes_stored_by_tier"][storage.partition(":")[0]]
        assert lower >= plain.summary["kv_bytes_stored_dense"]
        assert "on disk" in str(report) or "in host memory" in str(report)
    assert not list(tmp_path.iterdir())


def test_two_sequences_and_a_copy_in_one_folder(tmp_path: Path) -> None:
    """They are fed in turn; none sees another's rows. Files are gone when their cache is."""
    model = shared("llama")
    texts = [prompt(seed=seed) for seed in (1, 2)]
    with torch.no_grad(), farspan.patch(model, QUEST):
        want = []
        for ids in texts:
            cache = DynamicCache(config=model.config)
            model(ids[:, :-1], past_key_values=cache)
            want.append(decode(model, ids, 12, past_key_values=cache))
    with torch.no_grad(), farspan.patch(model, QUEST, storage=f"disk:folder={tmp_path}"):
        caches = [DynamicCache(config=model.config) for _ in texts]
        for ids, cache in zip(texts, caches, strict=True):
            model(ids[:, :-1], past_key_values=cache)
        copied = copy.deepcopy(caches[0])
        count = open_files(tmp_path)
        for cache, ids in ((caches[0], texts[0]), (caches[1], texts[1]), (copied, texts[0])):
            which = 0 if ids is texts[0] else 1
            assert torch.equal(decode(model, ids, 12, past_key_values=cache), want[which])
        assert count == 3 * 2 * len(copied.layers) and not list(tmp_path.iterdir())
        caches[0].layers[0].reset()
    del caches, cache, copied
    assert open_files(tmp_path) == 0


@pytest.mark.parametrize("spec", ["host", "disk:folder={}"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(spec: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every bit comes back, after growth, a crop, another order and a copy; not a number is special."""
    store = KVStore(parse_storage(spec.format(tmp_path)))
    k, v = (torch.randn(3, 2, 900, d).to(dtype) for d in (16, 8))
    k[0, 0, 5, 3], v[1, 1, 7, 2] = torch.nan, torch.inf
    for a, b in ((0, 300), (300, 301), (301, 900)):
        store.append(k[:, :, a:b], v[:, :, a:b])
        store.settle()
    store.crop(100)
    store.reorder(torch.tensor([2, 0, 0]))
    store = copy.deepcopy(store)
    assert store.kv is not None
    for got, x in zip(store.kv.on_device().dense(), (k, v), strict=True):
        assert torch.equal(got.view(torch.uint8), x[[2, 0, 0], :, :800].contiguous().view(torch.uint8))


SCRIPT = """
import sys, time, torch
from pathlib import Path
from farspan.runtime.store.storage import parse_storage
from farspan.runtime.store.store import KVStore
store = KVStore(parse_storage("disk:folder=" + sys.argv[1]))
store.append(torch.ones(1, 2, 4096, 64), torch.ones(1, 2, 4096, 64))
print(sum(sys.argv[1] in line for line in Path("/proc/self/maps").read_text().splitlines()), flush=True)
time.sleep(600)
"""


def test_nothing_is_left_of_a_killed_process(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "2"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    """The system refuses files of more than a megabyte. What was stored stays."""
    store = KVStore(parse_storage(f"disk:folder={tmp_path}"))
    x = torch.randn(1, 2, 300, 64)
    store.append(x, x)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        more = torch.randn(1, 2, 4000, 64)
        with pytest.raises(FarspanError, match=r"A file of 3\.3 MB .* cannot be made in .*MB are free\)"):
            store.append(more, more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.length == 300 and store.kv is not None and torch.equal(store.kv.k, x)
    store.append(more, more)
    assert torch.equal(store.kv.v, torch.cat([x, more], 2))


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = KVStore(Storage(memory=Disk(folder=str(tmp_path / "file")), spec="disk"))
    with pytest.raises(FarspanError, match="cannot be made in"):
        store.append(torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8))


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="the system does not say what is resident")
def test_little_is_resident(tmp_path: Path) -> None:
    """32 MB of keys and values: less than a tenth is in memory after they were written, and after a dense and
    a selective step; the report counts the rest on disk."""
    store, softmax = KVStore(parse_storage(f"disk:folder={tmp_path}")), Softmax(0.1)
    new, size = torch.randn(1, 8, 2048, 64, dtype=torch.bfloat16), 2 * 8 * 16384 * 64 * 2
    for _ in range(8):
        store.append(new, new)
        store.settle()
        assert resident(tmp_path) <= size / 10
    assert store.tiers["disk"] >= size and not store.tiers["device"]
    q = torch.randn(1, 8, 1, 64, dtype=torch.bfloat16)
    for spec in ("dense", "quest:k=128"):
        assert store.kv is not None
        keys = Keys(kv=store.kv, tq=1, softmax=softmax, summaries=store.summaries)
        attend(farspan.parse_method(spec), "decode", q, keys)
        store.settle()
        assert resident(tmp_path) <= size / 10
    assert store.tiers["device"] < size / 10


def test_hot_rows_against_plain_rows() -> None:
    """Any sequence of reads gives the rows themselves; the oldest rows leave first."""
    torch.manual_seed(0)
    parts = [torch.randn(500, 4), torch.randn(500, 2)]
    hot, fetched = HotRows(10), []
    hot.forget(4)

    def fetch(places: torch.Tensor) -> list[torch.Tensor]:
        fetched.append(places)
        return [x[places] for x in parts]

    for _ in range(60):
        places = torch.randint(0, 500, (int(torch.randint(1, 41, ())),))
        if torch.rand(()) < 0.3:
            hot.warm(torch.randint(0, 500, (20,)), 500, fetch)
        for got, x in zip(hot.gather(places, 500, fetch), parts, strict=True):
            assert torch.equal(got, x[places])
    asked, hits = hot.counted()
    assert 0 < hits < asked and hot.counted() == (0, 0)
    old, new = torch.arange(20), torch.arange(100, 120)
    hot.forget(4)
    for places in (old, new, old, torch.arange(200, 220)):  # 40 slots: the last takes those of ``new``
        hot.gather(places, 500, fetch)
    fetched.clear()
    hot.gather(old, 500, fetch)
    assert not fetched
    hot.gather(new, 500, fetch)
    assert torch.equal(torch.cat(fetched).sort().values, new)


def test_a_prefetched_row_is_a_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the true next selection as the prediction, every row of later layers is there when it is read."""
    model = shared("llama")
    warmed: list[torch.Tensor] = []
    original = Fetching.warm

    def warm(self: Fetching, far: KV, rows: torch.Tensor) -> None:
        warmed.append(rows)
        original(self, far, rows)

    monkeypatch.setattr(Fetching, "warm", warm)
    with farspan.patch(model, QUEST) as patched:
        want = decode(model, padded(), 12)
    with farspan.patch(model, QUEST, storage="host:cached=64") as patched:
        assert torch.equal(decode(model, padded(), 12), want)
        report = patched.report()
    assert warmed and all(rows.shape[:2] == (3, 2) for rows in warmed)
    first, later = report.layers[0], report.layers[1]
    assert first.rows_asked == later.rows_asked > 0
    assert later.rows_hit / later.rows_asked > first.rows_hit / first.rows_asked


@pytest.mark.parametrize("name", ["dense", "window", "quest", "double_sparsity", "recycled", "h2o"])
def test_on_a_simulated_gpu(name: str) -> None:
    """The keys of a layer are in host memory, and the GPU gets the rows it reads: results are those of keys
    on the GPU."""
    results, method = [], tiny_methods()[name]
    for storage in ("device", "host:cached=64"):
        device = Device("cuda")
        with torch.no_grad(), device.running():
            layer = OneLayer(method, device, [0, 33], torch.float32, storage=storage)
            layer.call(0, 64)
            layer.call(64, PROMPT)
            layer.steps()
            if storage != "device":
                assert all(x.device.type == "cpu" for x in layer.cache.store.buffers.tensors)
        results.append(layer.results)
    assert len(results[0]) == 2 + WARM + STEPS
    for here, there in zip(*results, strict=True):
        assert (here - there).abs().max() <= 2e-6 * here.abs().max()


def test_what_needs_all_keys_at_once_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device cannot read the memory, and the keys are more than may be copied at a time."""
    monkeypatch.setattr(offloaded, "MOST_COPIED", 64)
    store = KVStore(parse_storage("host"))
    store.append(torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16))
    assert store.kv is not None and store.kv.elsewhere is None  # the present call's are on the device
    store.settle()
    kv, q = store.kv, torch.randn(1, 4, 1, 16)
    assert isinstance(kv, Offloaded) and kv.elsewhere == "host"
    with pytest.raises(Unsupported, match=r"all 100 keys of a layer at once: 100 of them lie in host memory"):
        kv.dense()
    keys = Keys(kv=kv, tq=1, softmax=Softmax(0.25))
    with pytest.raises(Unsupported, match="needs all 100 keys"):
        keys.read_all_keys()
    part, _ = attend(farspan.parse_method("dense"), "decode", q, keys)
    assert part.out.isfinite().all()
    for op in (decode_op, flash):
        with pytest.raises(Unsupported, match="lie in host memory, not on the device"):
            op(q, kv, Softmax(0.25), impl="triton")


@pytest.mark.parametrize("spec", ["quest:k=32,page=8,dense_layers=0", "double_sparsity:k=32,dense_layers=0"])
def test_summaries_of_many_keys(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made a part at a time, where all keys may not be copied at once, and equal those of the
    device: the first step of a method comes after a prompt that needed none."""
    monkeypatch.setattr(offloaded, "MOST_COPIED", 64)
    monkeypatch.setattr(summary, "MOST_COPIED", 64)
    method, data = bound(farspan.parse_method(spec)), Data.random(403, [0, 130])
    out = [Stream(method, data, storage=storage).run([401, 402, 403]).out for storage in ("device", "host")]
    assert torch.equal(*out)


def test_no_gradient_follows_what_is_written(tmp_path: Path) -> None:
    model, ids = shared("llama"), prompt()
    for storage in (f"disk:folder={tmp_path}", "host"):
        with (
            farspan.patch(model, storage=storage),
            pytest.raises(FarspanError, match="no gradient can follow"),
        ):
            model(ids, past_key_values=DynamicCache(config=model.config))
