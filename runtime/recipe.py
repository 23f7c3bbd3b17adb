"""Recipes: the tensors that a method has learned for a model, saved as safetensors with a JSON file."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.digest import weights_digest
from ..attention.errors import FarspanError
from ..attention.method import AttentionMethod, LayerInfo

FORMAT = 1
PRINT = "fingerprint"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The tensors that a method needs for a model, by name: ``layers.<index>.<name>``.

    geometry: the architecture, the sizes and the fingerprint of the model that the recipe was made for.
    settings: how the recipe was made (tokens, ranking, versions).
    parameters: the method's fields that the tensors depend on (its ``trained_with``), as they were then.
    adapters: what the tensors ``adapters.<index>.<projection>.<name>`` are, which change the model's own
    attention projections (see lora.py); empty for a recipe without any.
    """

    method: str
    geometry: Mapping[str, Any]
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of_modules(
        method: AttentionMethod,
        modules: Mapping[int, nn.Module],
        geometry: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> Recipe:
        """A recipe of a copy of the parameters and buffers of the modules of ``method``. modules: by
        layer."""
        tensors = {
            f"layers.{index}.{name}": x.detach().cpu().clone()
            for index, module in modules.items()
            for name, x in module.state_dict().items()
        }
        return Recipe(
            method=method.name,
            geometry=dict(geometry),
            settings=dict(settings),
            tensors=tensors,
            parameters={name: getattr(method, name) for name in method.trained_with},
        )

    @property
    def digest(self) -> str:
        """A hash of the tensors."""
        return weights_digest(self.tensors)

    def half(self) -> Recipe:
        """The same with float16 tensors in place of float32 ones, half the size; ``load`` reads them as
        float32."""
        tensors = {k: x.half() if x.dtype == torch.float32 else x for k, x in self.tensors.items()}
        if not all(x.isfinite().all() for x in tensors.values() if x.is_floating_point()):
            raise FarspanError("This recipe has weights that are too large for float16: save it in float32.")
        return replace(self, tensors=tensors)

    def full(self) -> Recipe:
        """The same with float32 tensors in place of float16 ones."""
        tensors = {k: x.float() if x.dtype == torch.float16 else x for k, x in self.tensors.items()}
        return replace(self, tensors=tensors)

    def save(self, path: str | Path) -> Path:
        """Write recipe.json and recipe.safetensors to the folder ``path`` and return the folder. Raises
        FarspanError where the folder cannot be written."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        folder = Path(path)
        about = {
            "format": FORMAT,
            "method": self.method,
            "geometry": dict(self.geometry),
            "settings": dict(self.settings),
            "parameters": dict(self.parameters),
            "adapters": dict(self.adapters),
        }
        tensors = {name: x.contiguous() for name, x in self.tensors.items()}
        news = [folder / f"recipe.{kind}.new" for kind in ("safetensors", "json")]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, news[0])
            news[1].write_text(json.dumps(about, indent=2) + "\n")
            for new in news:
                new.chmod(0o644)
                new.replace(new.with_suffix(""))
        except (OSError, RuntimeError, SafetensorError) as error:
            with suppress(OSError):
                for new in news:
                    new.unlink(missing_ok=True)
            raise FarspanError(
                f"The recipe could not be written to {folder} ({error}): give a folder that can be written."
            ) from error
        return folder

    @staticmethod
    def load(path: str | Path) -> Recipe:
        """Read a folder that ``save`` wrote. Raises FarspanError where it holds no recipe, or a recipe that
        cannot be read."""
        folder = Path(path)
        try:
            stamp = (folder / "recipe.json").stat().st_mtime_ns
        except OSError as error:
            raise FarspanError(
                f"There is no recipe at {folder}: make one with 'farspan calibrate' or 'farspan train' and "
                f"--out {folder}."
            ) from error
        return _load(folder, stamp)

    def misfits(self, geometry: Mapping[str, Any]) -> list[str]:
        """The names of the sizes in which a model differs from the one that this recipe was made for, and
        "fingerprint" where it is another model of these sizes; a recipe without a fingerprint fits any."""
        found = [k for k, v in self.geometry.items() if k != PRINT and geometry.get(k) != v]
        own, model = self.geometry.get(PRINT), geometry.get(PRINT)
        if own and model and not _alike(own, model):
            found.append(PRINT)
        return found

    def for_layer(self, method: AttentionMethod, layer: LayerInfo, geometry: Mapping[str, Any]) -> LayerInfo:
        """``layer`` with the tensors of this recipe. Raises FarspanError where the recipe was made for
        another method, for other parameters of it, or for another model."""
        name = method.name
        if name != self.method:
            raise FarspanError(
                f"This recipe is for {self.method}, not for {name}: give a recipe made for {name}."
            )
        differ = {k: v for k, v in self.parameters.items() if getattr(method, k, None) != v}
        if differ:
            wanted = ",".join(f"{k}={v}" for k, v in differ.items())
            given = ", ".join(f"{k}={getattr(method, k, None)}" for k in differ)
            raise FarspanError(
                f"This recipe was made for '{name}:{wanted}' and the spec has {given}: change the spec, or "
                f"make a recipe for it with {method.recipe_maker}."
            )
        self.check_geometry(geometry, method.recipe_maker)
        prefix = f"layers.{layer.index}."
        weights = {
            name.removeprefix(prefix): x.clone()  # a gate may be trained, and ``load`` keeps recipes
            for name, x in self.tensors.items()
            if name.startswith(prefix)
        }
        return replace(layer, weights=weights, tensors=self.tensors)

    def without_adapters(self) -> Recipe:
        """This recipe with the method's own tensors alone."""
        own = {name: x for name, x in self.tensors.items() if not name.startswith("adapters.")}
        return replace(self, tensors=own, adapters={})

    @property
    def has_adapters_alone(self) -> bool:
        """Whether it has adapters and no tensors of the method itself."""
        return bool(self.adapters) and all(name.startswith("adapters.") for name in self.tensors)

    def check_geometry(self, geometry: Mapping[str, Any], maker: str) -> None:
        """Raise FarspanError unless the recipe was made for a model of this ``geometry``. maker: the command
        that makes another."""
        other = self.misfits(geometry)
        if other:
            wrong = ", ".join(f"{k} {self.geometry[k]} (the model has {geometry.get(k)})" for k in other)
            raise FarspanError(f"This recipe was made for another model: {wrong}. Make one with {maker}.")


def _alike(one: Mapping[str, list[float]], other: Mapping[str, list[float]]) -> bool:
    """Whether two fingerprints (``ModelInfo``) are of one model, up to fine-tuning and rounding."""
    norms = [math.isclose(a, b, rel_tol=0.05) for a, b in zip(one["norms"], other["norms"], strict=False)]
    a, b = (torch.tensor(x["embedding"]) for x in (one, other))
    return all(norms) and a.shape == b.shape and torch.cosine_similarity(a, b, dim=0).item() > 0.9


@functools.lru_cache(maxsize=8)
def _load(folder: Path, stamp: int) -> Recipe:
    from safetensors.torch import load_file

    try:
        about = json.loads((folder / "recipe.json").read_text())
        saved = load_file(folder / "recipe.safetensors")
        if about["format"] != FORMAT:
            raise FarspanError(
                f"The recipe at {folder} has format {about['format']}; this farspan reads format {FORMAT}: "
                "make it again with 'farspan calibrate' or 'farspan train'."
            )
        made = Recipe(
            method=about["method"],
            geometry=about["geometry"],
            settings=about["settings"],
            tensors=saved,
            parameters=about.get("parameters", {}),
            adapters=about.get("adapters", {}),
        )
        return made.full()
    except FarspanError:
        raise
    except Exception as error:
        raise FarspanError(
            f"The recipe at {folder} cannot be read ({error}): make it again with 'farspan calibrate' or "
            "'farspan train'."
        ) from error
