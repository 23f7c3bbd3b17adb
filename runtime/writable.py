"""Check that a folder can be written, before the work whose result is saved there."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..attention.errors import FarspanError

_BYTES = 1 << 16  # bytes that are written to test that the disk has space


def check_writable(folder: Path, advice: str) -> None:
    """Raise FarspanError where no file can be written to the folder, or, if it does not exist, to its nearest
    existing parent. advice: the end of the error's sentence. The test file is removed."""
    folder = folder.absolute()
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            raise FarspanError(f"{folder} cannot be written, because {there} is a file: {advice}.")
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(_BYTES))
            file.flush()
    except OSError as error:
        raise FarspanError(f"{folder} cannot be written ({error.strerror}): {advice}.") from None
