"""What a saved cache belongs to: a model, its tokenizer, and a patch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..attention.errors import FarspanError
from . import hf
from .bind import weighed
from .identity import hash_of, plain_config, sampled_digest, tokenizer_facts
from .specs import spelt

Fingerprint = Mapping[str, str | None]


def of_patch(model: Any) -> dict[str, str]:
    """The methods of a patched model by layer, a hash of their weights, and how the cache keeps keys and
    values. Raises FarspanError for a model that is not patched."""
    caches = hf.caches_of(model)
    specs = {i: spelt(layer.prefill, layer.decode) for i, layer in caches.layers.items()}
    methods = [(layer.prefill, layer.decode) for layer in caches.layers.values()]
    files = sorted({path for pair in methods for method in pair for path in method.files})
    weights = [[weighed(a), weighed(b)] for a, b in methods]
    return {
        "method": _by_layer(specs),
        "hash of the method's weights": hash_of(
            [weights, [Path(path).read_text() for path in files], caches.adapters]
        ),
        "storage": _by_layer({i: caches.plan.storage(i).numbers for i in caches.layers}),
    }


def of_all(model: Any, tokenizer: Any = None) -> dict[str, str | None]:
    """``of_patch``, and what identifies the model and the tokenizer. The hash of the model's weights is made
    of a sample of them. Raises FarspanError for a model that is not patched, or is sharded by tensor
    parallelism."""
    info = hf.caches_of(model).info
    if info.weights_mesh is not None:
        raise FarspanError(
            "The heads of this model are sharded by tensor parallelism, and a saved cache is that of one "
            "process: load the whole model."
        )
    sizes = {name: x for name, x in info.geometry.items() if name != "fingerprint"}
    return {
        "model": ", ".join(f"{name} {x}" for name, x in sizes.items()),
        "hash of the model's configuration": hash_of(plain_config(info.config.to_dict())),
        "hash of the model's weights": sampled_digest(model),
        "hash of the tokenizer": None if tokenizer is None else hash_of(tokenizer_facts(tokenizer)),
        **of_patch(model),
    }


def check(saved: Fingerprint, here: Fingerprint) -> None:
    """Raise FarspanError for the first thing in which two fingerprints differ. What only one of them knows
    is not compared."""
    for name, value in saved.items():
        given = here.get(name)
        if None not in (value, given) and value != given:
            raise FarspanError(
                f"This cache was saved for another {_KINDS.get(name, name)}: its {name} is {value}, and here "
                f"it is {given}. Use what it was saved with, or build the cache again."
            )


_KINDS = {
    "hash of the model's configuration": "model",
    "hash of the model's weights": "model",
    "hash of the tokenizer": "tokenizer",
    "hash of the method's weights": "calibration or training of the method",
}


def _by_layer(values: Mapping[int, str]) -> str:
    """Values by layer as text, such as "dense in layers 0-1; quest in layers 2-29"."""
    runs: dict[str, list[list[int]]] = {}
    for index, value in values.items():
        parts = runs.setdefault(value, [])
        if parts and parts[-1][1] == index - 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    if len(runs) == 1:
        return next(iter(runs))
    layers = {
        value: ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) for value, parts in runs.items()
    }
    return "; ".join(f"{value} in layers {text}" for value, text in layers.items())
