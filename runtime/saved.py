"""Caches in a folder: a long prompt is read once, and questions about it are answered in later processes.

The folder has one safetensors file for each layer, and cache.json, which names the files with their sizes
and says what the cache belongs to. cache.json is replaced last, at once: a save that was stopped leaves the
folder with the cache that it had before, or without one.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.errors import FarspanError
from . import fingerprint, hf
from .prefixes import Prefix
from .store.tree import split

FORMAT = 2
_INDEX = "cache.json"


def save_cache(
    model: Any,
    cache: Any,
    input_ids: Tensor,
    path: str | Path,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Save the cache of a patched model, with the summaries and states of its methods, to the folder
    ``path`` and return the folder. A cache that was saved there before is replaced.

    input_ids, attention_mask [B, T]: the tokens that the cache holds, or more than these. tokenizer: if it
    is given, ``load_cache`` compares it. settings: plain values to keep with the cache.

    Raises FarspanError for a model that is not patched, for a cache over ranks, and where the folder cannot
    be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    hf.check_saveable(cache)
    caches, folder, length = hf.caches_of(model), Path(path), hf.length_of(cache)
    hf.held(cache)  # refuses caches that cannot be saved
    if not length or length > input_ids.shape[1]:
        raise FarspanError(
            f"This cache holds {length or 'no'} tokens, and {input_ids.shape[1]} were given as input_ids: "
            "give all tokens that it holds."
        )
    caches.summarise(cache)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    about = {
        "format": FORMAT,
        "fingerprint": fingerprint.of_all(model, tokenizer),
        "spec": caches.spec,
        "storage": {str(layer): str(storage) for layer, storage in caches.plan.storages.items()},
        "settings": dict(settings or {}),
    }
    stamp = uuid.uuid4().hex[:8]
    layers: list[Any] = []
    sizes: dict[str, int] = {}

    def write(name: str, tensors: Mapping[str, Tensor]) -> None:
        file = folder / f"{name}-{stamp}.safetensors"
        save_file({k: x.detach().to("cpu", copy=True).contiguous() for k, x in tensors.items()}, file)
        file.chmod(0o644)
        sizes[file.name] = file.stat().st_size

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write("tokens", {"tokens": input_ids[:, :length], "mask": mask[:, :length]})
        for number, one in enumerate(hf.held(cache)):
            plain, tensors = split(one, f"layers.{number}")
            layers.append(plain)
            write(f"layer-{number:03}", tensors)
        index = folder / f"{_INDEX}.{stamp}"
        index.write_text(json.dumps({**about, "files": sizes, "layers": layers}) + "\n", encoding="utf-8")
        index.replace(folder / _INDEX)
    except (OSError, RuntimeError, SafetensorError) as error:
        _remove(folder, lambda name: stamp in name)
        raise FarspanError(
            f"The cache could not be written to {folder} ({error}): give a folder that can be written, on a "
            "disk with enough space."
        ) from error
    except BaseException:
        _remove(folder, lambda name: stamp in name)
        raise
    _remove(folder, lambda name: name not in sizes)
    return folder


def _remove(folder: Path, unwanted: Callable[[str], bool]) -> None:
    """Remove files of caches in a folder that belong to none."""
    for pattern in ("tokens-*.safetensors", "layer-*.safetensors", f"{_INDEX}.*"):
        for file in folder.glob(pattern):
            if unwanted(file.name):
                with suppress(OSError):
                    file.unlink()


@dataclass(frozen=True)
class SavedCache:
    """What cache.json says of a saved cache. spec: the methods of the patch. storage: that of
    each layer, as ``patch`` takes it. settings: as they were saved."""

    folder: Path
    about: Mapping[str, Any]
    storage: Mapping[int, str]

    @property
    def spec(self) -> str:
        return str(self.about["spec"])

    @property
    def settings(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.about["settings"]
        return found


def read_saved(path: str | Path) -> SavedCache:
    """What a folder that ``save_cache`` has written holds, without its tensors. Raises FarspanError where
    there is no cache, or an incomplete one."""
    folder = Path(path)
    try:
        about = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise FarspanError(
                f"The cache in {folder} has format {about['format']}, and this farspan reads format "
                f"{FORMAT}: build it again with 'farspan cache build'."
            )
        sizes = about["files"].items()
        storage = {int(layer): str(spec) for layer, spec in about["storage"].items()}
        lacking = [n for n, size in sizes if not _has_size(folder / n, size)]
    except FileNotFoundError as error:
        raise FarspanError(
            f"There is no saved cache in {folder}: make one with 'farspan cache build --out {folder}'."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, FarspanError):
            raise
        raise _unreadable(folder, f"{type(error).__name__}: {error}") from error
    if lacking:
        raise _unreadable(folder, f"{lacking[0]} is missing or has another size")
    return SavedCache(folder, about, storage)


def load_cache(model: Any, path: str | Path | SavedCache, *, tokenizer: Any = None) -> Prefix:
    """Load a cache that ``save_cache`` or ``farspan cache build`` has written, for a model that is patched as
    it was then. ``Prefix.inputs`` makes the arguments of ``generate``.

    tokenizer: compared with the one that the cache was saved with. The files are mapped into memory and read
    once, into the buffers of the new cache. Of the model's weights a sample is compared.

    Raises FarspanError where there is no cache, or an incomplete one, and for another model, tokenizer,
    method or storage; the sentence says what differs.
    """
    from safetensors import SafetensorError, safe_open

    found = path if isinstance(path, SavedCache) else read_saved(path)
    folder, about = found.folder, found.about
    here = fingerprint.of_all(model, tokenizer)
    fingerprint.check(about["fingerprint"], here)
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(safe_open(folder / x, framework="pt")) for x in about["files"]]
            place = {name: file for file in files for name in list(file.keys())}
            cache = hf.caches_of(model).restored(about["layers"], lambda name: place[name].get_tensor(name))
            tokens, mask = (place[name].get_tensor(name) for name in ("tokens", "mask"))
        except (OSError, SafetensorError, KeyError) as error:
            raise _unreadable(folder, str(error)) from error
    return Prefix(model=model, cache=cache, tokens=tokens, mask=mask, settings=found.settings)


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _unreadable(folder: Path, reason: str) -> FarspanError:
    return FarspanError(
        f"The cache in {folder} cannot be read ({reason}): build it again with 'farspan cache build'."
    )
