"""The recipes that farspan ships: weights that `farspan train` or `farspan calibrate` made for small models.

They lie in ``recipes/<method>/<model>/``. README.md there has the command that made each one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..attention.method import AttentionMethod
from .recipe import Recipe

_FOLDER = Path(__file__).parent / "recipes"


@lru_cache(maxsize=1)
def recipe_folders() -> dict[str, dict[str, Path]]:
    """The folders of the recipes by method and by the name of the model."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(_FOLDER.glob("*/*/recipe.json")):
        found.setdefault(path.parent.parent.name, {})[path.parent.name] = path.parent
    return found


def recipes_of(name: str) -> dict[str, str]:
    """How the recipes of a method were made, by the name of their model."""
    return {model: _made(Recipe.load(folder)) for model, folder in recipe_folders().get(name, {}).items()}


def _made(recipe: Recipe) -> str:
    how = recipe.settings
    if "steps" not in how:
        return f"calibrated on {how['tokens']} tokens in windows of {how['window']}"
    steps = f"{how['steps']} steps of {how['batch']} windows of {how['window']} tokens"
    return f"{steps}, {how['minutes']:.0f} minutes, seed {how['seed']}"


def shipped(method: AttentionMethod, geometry: Mapping[str, Any]) -> Recipe | None:
    """The recipe of ``method`` with its parameters for a model of this geometry; None where there is none."""
    for folder in recipe_folders().get(method.name, {}).values():
        recipe = Recipe.load(folder)
        same = all(getattr(method, name, None) == value for name, value in recipe.parameters.items())
        if same and "fingerprint" in geometry and not recipe.misfits(geometry):
            return recipe
    return None
