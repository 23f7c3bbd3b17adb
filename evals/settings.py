"""The settings of an evaluation: those that all sessions in a folder must share, and those that may grow."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import Any

from .shape import Shape, short

GROWING = ("methods", "recipes", "lengths", "tasks", "depths", "samples", "repeats", "dims", "rates", "seeds")
"""Settings that may grow from session to session. They add rows, and do not change what earlier rows mean."""
LABELS = ("model", "rope")
"""Names of what `identity` has by content. They are compared only if a folder has no identity yet."""
APART = (*GROWING, *LABELS, "identity", "sessions", "planned", "stopped")
VERSIONED = ("farspan", "torch", "transformers")

CONFIG: Shape = {
    "format": int,
    "suite": (str, NoneType),
    "model": (str, NoneType),
    "dtype": (str, NoneType),
    "identity": (dict, NoneType),
    "sessions": [dict],
    "methods": [str],
    "recipes": {str: str},
    "lengths": [int],
    "planned": {str: {str: int}},
    "stopped": [str],
}
"""The fields that readers of a folder's config.json need."""
EMPTY: dict[str, Any] = {
    "sessions": [],
    "methods": [],
    "recipes": {},
    "lengths": [],
    "planned": {},
    "stopped": [],
}
"""The fields of `CONFIG` that a config.json may lack, with the values that stand for them."""


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """The settings that differ between a folder and a session, each as `name THERE there, HERE here`."""
    known = found.get("identity"), wanted.get("identity")
    pairs = {
        name: (found.get(name), wanted.get(name))
        for name in sorted({*found, *wanted} - {*APART})
        if found.get(name) != wanted.get(name)
    }
    if known[0] and known[1]:
        both = sorted({*known[0], *known[1]})
        pairs |= {f"the model's {name}": (known[0].get(name), known[1].get(name)) for name in both}
    else:
        pairs |= {name: (_named(found.get(name)), _named(wanted.get(name))) for name in LABELS}
    old, new = found.get("recipes", {}), wanted.get("recipes", {})
    pairs |= {f"recipe of {spec}": (old.get(spec, new[spec]), new[spec]) for spec in new}
    return [f"{name} {short(a, 60)} there, {short(b, 60)} here" for name, (a, b) in pairs.items() if a != b]


def grown(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """`found` with the growing settings of both: lists and objects united, of two numbers the larger."""
    united = dict(found)
    for name in GROWING:
        old, new = found.get(name), wanted.get(name)
        if isinstance(old, list) and isinstance(new, list):
            united[name] = old + [item for item in new if item not in old]
        elif isinstance(old, dict) and isinstance(new, dict):
            united[name] = old | new
        elif isinstance(old, int) and isinstance(new, int):
            united[name] = max(old, new)
        elif new is not None:
            united[name] = new
    return united


def versions() -> dict[str, str]:
    """The versions that decide the numbers. A folder is not resumed under other versions."""
    out = {}
    for name in VERSIONED:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def environment() -> dict[str, Any]:
    """The machine of this session, on which seconds depend, and the command that began it."""
    import torch

    from ..runtime.machine import cpu_name

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "system": platform.platform(),
        **({"command": command} if (command := _command()) else {}),
    }


def _command() -> str | None:
    """The command line of this process, if it is one of farspan's."""
    program = Path(sys.argv[0])
    if program.name != "farspan" and program.parts[-2:] != ("farspan", "__main__.py"):
        return None
    return shlex.join(["farspan", *sys.argv[1:]])


def _named(value: Any) -> Any:
    """A label with its path normalised: `chat/` and `./chat` are `chat`."""
    return os.path.normpath(value) if isinstance(value, str) else value
