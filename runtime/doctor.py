"""Examine the installation: versions, devices, which implementation each operation takes, and whether a small
model computes the same under farspan."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement

from ..attention.errors import Unsupported
from .hf import inspect_model, releases
from .hf.config import empty_llama, empty_model
from .hf.trial import try_out
from .implementations import best_dtype, operations
from .machine import cpu_name
from .models import cache_folder

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "gguf", "triton", "peft", "deepspeed")
_LIBRARIES = ("flash-attn", "flash-attn-4", "flash-linear-attention", "flashinfer-python")  # of kernels


def examine(model: str | None = None, *, dtype: str = "auto", head_dim: int = 128) -> dict[str, Any]:
    """Versions, tested releases, devices, the cache folder, the implementations of each operation, and a
    trial, which runs a small copy of a model patched and unpatched. ``faults`` has one entry for each fault
    found.

    model: an alias, a local folder or a hub id, whose class and config the trial uses; a Llama by default.
    dtype, head_dim: of the heads for which the implementations are listed; "auto": ``best_dtype``.
    Raises FarspanError where the model cannot be found or read, and for an odd head_dim.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = best_dtype() if dtype == "auto" else getattr(torch, dtype)
    needs = _needs()
    packages = [
        {"name": name, "version": version, "needed": str(needs.get(name, ""))}
        for name in (*_PACKAGES, *_LIBRARIES)
        if (version := _version(name)) is not None or name in needs
    ]
    versions = {name: _version(name) for name in needs}
    faults = [
        f"farspan needs {name}{needs[name]}, and {version or 'none'} is installed"
        for name, version in versions.items()
        if version is None or not needs[name].contains(version, prereleases=True)
    ]
    trial = _trial(empty_llama() if model is None else empty_model(model))
    return {
        "farspan": metadata.version("farspan"),
        "python": platform.python_version(),
        "packages": packages,
        "transformers_tested": list(releases.TESTED),
        "transformers_newer_than_tested": releases.newer_than_tested(),
        "devices": _devices(),
        "cache_folder": str(cache_folder()),
        "implementations": {
            "device": device.type,
            "dtype": str(kind).removeprefix("torch."),
            "head_dim": head_dim,
            "operations": operations(kind, head_dim, device),
        },
        "trial": trial,
        "faults": faults + trial["faults"],
    }


def _needs() -> dict[str, Any]:
    """The versions of each package that farspan's metadata requires, without extras."""
    found = map(Requirement, metadata.requires("farspan") or [])
    return {one.name: one.specifier for one in found if one.marker is None}


def _version(package: str) -> str | None:
    if package == "transformers":
        return releases.installed()
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cpu = {"device": "cpu", "name": cpu_name(), "cores": os.cpu_count(), "bytes": memory}
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        cpu,
        *(
            {"device": f"cuda:{i}", "name": gpu.name, "cores": None, "bytes": gpu.total_memory}
            for i, gpu in enumerate(gpus)
        ),
    ]


def _trial(model: Any) -> dict[str, Any]:
    """The class of the trial, its seconds, and every fault."""
    start = time.perf_counter()
    try:
        found = try_out(inspect_model(model))
        reasons = ["no small copy of it runs unpatched"] if found is None else list(found.reasons)
    except Unsupported as error:
        reasons = error.reasons
    kind = type(model).__name__
    faults = [f"the trial could not show that farspan serves {kind}: {'; '.join(reasons)}"] if reasons else []
    return {"model": kind, "seconds": time.perf_counter() - start, "faults": faults}
