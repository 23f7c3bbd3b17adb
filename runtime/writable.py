"""Whether a folder can be written, asked before the work whose result goes there."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..attention.errors import FarspanError

_BYTES = 1 << 16  # what is written to see that there is room


def check_writable(folder: Path, advice: str) -> None:
    """Raises FarspanError, which ends in ``advice``, where files cannot be written to the folder, or to the
    one in which it would be made. Nothing is left behind."""
    folder = folder.absolute()
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if not there.is_dir():
            raise FarspanError(f"{folder} cannot be written: {there} is a file; {advice}.")
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(_BYTES))
            file.flush()
    except OSError as error:
        raise FarspanError(f"{folder} cannot be written: {error.strerror}; {advice}.") from None
