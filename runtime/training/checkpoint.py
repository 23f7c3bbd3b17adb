"""Checkpoints of a training: written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...attention.errors import FarspanError

FILE = "checkpoint.pt"


def save_checkpoint(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` to the folder's checkpoint, which is replaced only when the new one is complete.
    Raises FarspanError where it cannot be written; the checkpoint before stays."""
    path, new = folder / FILE, folder / (FILE + ".new")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with new.open("wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        new.unlink(missing_ok=True)
        kept = "the checkpoint before it is kept" if path.exists() else "there is no earlier one"
        raise FarspanError(
            f"The checkpoint of step {content['step']} could not be written to {folder} ({error}); {kept}. "
            "Free some space and give the same command again to go on."
        ) from error


def load_checkpoint(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The folder's checkpoint; None where it has none. Raises FarspanError for one that was made with other
    settings, and for one that cannot be read."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        made = content["settings"]
    except Exception as error:
        raise FarspanError(
            f"The checkpoint {path} cannot be read ({error}): remove it to start anew, or give another "
            "folder."
        ) from error
    names = dict.fromkeys((*settings, *made))
    differ = [f"{k}={made.get(k)} (now {settings.get(k)})" for k in names if made.get(k) != settings.get(k)]
    if differ:
        raise FarspanError(
            f"{folder} holds a training with other settings: {', '.join(differ)}. Give these settings to go "
            "on with it, or another folder."
        )
    return content
