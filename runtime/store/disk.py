"""Keys and values in files, for a context that is larger than memory."""

from __future__ import annotations

import math
import mmap
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ...attention.errors import FarspanError
from ..models.fetch import cache_folder
from .bridges import Fetching, InPlace, StoreBridge
from .hot_rows import HotRows, check_cached
from .memory import Memory

_MAPPED: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by address
_ZEROS = 1 << 20  # bytes that are written at a time, where files cannot be given space otherwise


@dataclass(frozen=True, kw_only=True)
class Disk(Memory):
    """Files that are mapped into memory, one for each buffer.

    A file has no name, so nothing else can open it, and the system removes it when the process has ended,
    however it has ended. It has all its space from the beginning, so that a full disk is met before anything
    is written. Pages are given back after they were written or read; the system writes them to the disk.

    folder: where the files are, which should be on a disk and not in memory; "": a folder in the user's cache
    folder. cached: as in ``Host``, for queries on a GPU.
    """

    tier: ClassVar[str] = "disk"
    prefetches: ClassVar[bool] = True
    block: ClassVar[int] = 4096
    folder: str = ""
    cached: int = 2048

    def __post_init__(self) -> None:
        check_cached(self.tier, self.cached)

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        size = math.prod(shape)
        with torch.inference_mode(False):
            if not size:
                return torch.empty(shape, dtype=like.dtype)
            mapped = self._mapped(size * like.element_size())
            buffer = torch.frombuffer(mapped, dtype=like.dtype, count=size).view(shape)
        _MAPPED[buffer.data_ptr()] = mapped
        return buffer

    def _mapped(self, size: int) -> mmap.mmap:
        """A new file of ``size`` bytes in memory. Raises FarspanError where it cannot be made."""
        folder = Path(self.folder) if self.folder else cache_folder() / "kv"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                _allocate(file.fileno(), size)
                return mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise FarspanError(
                f"A file of {size / 1e6:.1f} MB for keys and values cannot be made in {folder} "
                f"({error.strerror}{_free(folder)}): free some space, name a folder on another disk "
                "(disk:folder=PATH), or give a shorter prompt."
            ) from None

    def room(self, need: int, spare: int) -> int:
        return need + max(256, need // 2)  # growing copies all rows

    def release(self, buffer: Tensor) -> None:
        mapped = _MAPPED.get(buffer.untyped_storage().data_ptr())
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)

    def bridge(self, device: torch.device) -> StoreBridge:
        if device.type == "cpu":
            return InPlace(self.tier, device, self.release)
        return Fetching(self.tier, device, HotRows(self.cached), self.release)


def _allocate(file: int, size: int) -> None:
    """Give a file ``size`` bytes on the disk; without them, writing to its mapping would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    for begin in range(0, size, _ZEROS):
        os.write(file, bytes(min(_ZEROS, size - begin)))


def _free(folder: Path) -> str:
    try:
        return f"; {shutil.disk_usage(folder).free / 1e6:.1f} MB are free"
    except OSError:
        return ""
