"""farspan: a pretrained causal LM reads a long context cheaply, and the cost in quality is measured.

    import farspan

    model, tokenizer = farspan.load("smollm2-135m")
    with farspan.patch(model, "recycled:k=512,stride=10") as patched:
        model.generate(...)
        print(patched.report())

Everything is loaded when first used: `import farspan` imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention.errors import FarspanError, SpecError, Unsupported
    from .attention.spec import methods, parse_method
    from .evals.api import evaluate
    from .parallel.group.config import ContextParallel
    from .runtime.calibrate import calibrate
    from .runtime.compress.prompt import compress
    from .runtime.convert import convert
    from .runtime.models import load
    from .runtime.patch import patch
    from .runtime.patched import Patched
    from .runtime.recipe import Recipe
    from .runtime.report import Report
    from .runtime.saved import load_cache, save_cache
    from .runtime.train import train
    from .runtime.tune import tune

    __version__: str

# name -> the module it lives in
_HOMES = {
    "FarspanError": ".attention.errors",
    "SpecError": ".attention.errors",
    "Unsupported": ".attention.errors",
    "methods": ".attention.spec",
    "parse_method": ".attention.spec",
    "evaluate": ".evals.api",
    "ContextParallel": ".parallel.group.config",
    "Patched": ".runtime.patched",
    "Report": ".runtime.report",
    "patch": ".runtime.patch",
    "Recipe": ".runtime.recipe",
    "calibrate": ".runtime.calibrate",
    "compress": ".runtime.compress.prompt",
    "convert": ".runtime.convert",
    "load": ".runtime.models",
    "load_cache": ".runtime.saved",
    "save_cache": ".runtime.saved",
    "train": ".runtime.train",
    "tune": ".runtime.tune",
}

__all__ = [
    "ContextParallel",
    "FarspanError",
    "Patched",
    "Recipe",
    "Report",
    "SpecError",
    "Unsupported",
    "__version__",
    "calibrate",
    "compress",
    "convert",
    "evaluate",
    "load",
    "load_cache",
    "methods",
    "parse_method",
    "patch",
    "save_cache",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("farspan")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name], __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
