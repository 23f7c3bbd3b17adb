"""Fine-tuned attention projections of a recipe: LoRA adapters or whole weights, put on a model and taken off.

A recipe's ``adapters`` say what they are: {"tune": "lora", "rank", "alpha", "targets"} with tensors
``adapters.<layer>.<projection>.a`` [rank, in] and ``.b`` [out, rank], of W + alpha / rank * b a (2106.09685);
or {"tune": "attention", "targets"} with ``.weight`` [out, in] and ``.bias`` [out], which replace W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..attention.digest import weights_digest
from ..attention.errors import FarspanError, Unsupported
from ..attention.method import AttentionMethod
from . import hf
from .recipe import Recipe

TUNES = ("lora", "attention")
_PREFIX = "adapters."


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """The adapters of a recipe, checked against a model. changes: by projection ``<layer>.<name>``, the
    module and its tensors."""

    scale: float
    changes: Mapping[str, tuple[nn.Linear, Mapping[str, Tensor]]] = field(repr=False)

    @staticmethod
    def of(recipe: Recipe, info: hf.ModelInfo) -> Adapters:
        """Raises FarspanError for a recipe of another model, Unsupported for a model that is quantised or
        sharded."""
        recipe.check_geometry(info.geometry, f"'farspan train {recipe.method} --tune lora'")
        grouped: dict[str, dict[str, Tensor]] = {}
        for name, x in recipe.tensors.items():
            if name.startswith(_PREFIX):
                target, _, part = name.removeprefix(_PREFIX).rpartition(".")
                grouped.setdefault(target, {})[part] = x
        found = projections(info, sorted({int(target.partition(".")[0]) for target in grouped}))
        changes = {}
        for target, parts in grouped.items():
            module = found.get(target)
            if module is None or not _fits(module, parts):
                shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in parts.items())
                has = "no such projection" if module is None else f"weight {list(module.weight.shape)}"
                raise FarspanError(
                    f"This recipe has {target} with {shapes}, and the model has {has}: it was made for "
                    "another model."
                )
            changes[target] = module, parts
        about = recipe.adapters
        scale = about["alpha"] / about["rank"] if about["tune"] == "lora" else 1.0
        return Adapters(scale=scale, changes=changes)

    def put_on(self, merge: bool) -> list[Callable[[], None]]:
        """Change the model. merge: LoRA is added to the weights, else computed beside them. Returns the undo
        steps; the weights are afterwards the tensors that they were."""
        undo = []
        for module, parts in self.changes.values():
            if "a" not in parts:
                undo += [replace_parameter(module, name, x) for name, x in parts.items()]
            elif merge:
                undo.append(replace_parameter(module, "weight", self._merged(module, parts)))
            else:
                beside = _Beside(parts["a"], parts["b"], self.scale)
                undo.append(module.register_forward_hook(hf.Hook(beside)).remove)
        return undo

    def _merged(self, module: nn.Linear, parts: Mapping[str, Tensor]) -> Tensor:
        weight = module.weight.detach()
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (parts[name].to(weight.device, wide) for name in ("a", "b"))
        return weight.to(wide) + self.scale * (b @ a)

    @property
    def digest(self) -> str:
        """A hash of the adapters, which every rank must share."""
        parts = {
            f"{target}.{name}": x for target, (_, own) in self.changes.items() for name, x in own.items()
        }
        return f"{self.scale} {weights_digest(parts)}"


class _Beside:
    """A forward hook of a projection, which adds scale * b a x to its output, in the dtype of a and b."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        self.a, self.b, self.scale = a, b, scale

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = args[0]
        if self.a.device != x.device:  # the model was moved
            self.a, self.b = self.a.to(x.device), self.b.to(x.device)
        added = linear(linear(x.to(self.a.dtype), self.a), self.b)
        return (out + added * self.scale).to(out.dtype)


def adapters_of(
    recipe: Recipe | str | Path | None,
    chosen: Iterable[tuple[AttentionMethod, AttentionMethod]],
    info: hf.ModelInfo,
    merge: bool,
) -> Adapters | None:
    """The adapters of the recipe that ``patch`` is given, or of one that a spec names; None where there are
    none.

    Raises FarspanError for adapters that were trained under a method that no layer runs, for adapters of
    several recipes, and for ``merge`` without adapters.
    """
    methods = {str(method): method for pair in chosen for method in pair}
    named = {method.recipe for method in methods.values()} - {""}
    if isinstance(recipe, str | Path):
        named.add(str(recipe))
    loaded = [recipe] if isinstance(recipe, Recipe) else []
    with_adapters = [x for x in (*loaded, *map(Recipe.load, sorted(named))) if x.adapters]
    if not with_adapters:
        if merge:
            raise FarspanError("merge=True was given, but no recipe has LoRA adapters: leave merge out.")
        return None
    if len(with_adapters) > 1:
        raise FarspanError(
            f"{len(with_adapters)} recipes have adapters of the attention, and a model takes one set: leave "
            "the others out."
        )
    [found] = with_adapters
    if found.method not in {method.name for method in methods.values()}:
        ran = " and ".join(sorted({method.name for method in methods.values()}))
        raise FarspanError(
            f"The adapters of this recipe were trained under {found.method}, and the model is patched with "
            f"{ran}: patch with {found.method}, or train adapters under the other method."
        )
    return Adapters.of(found, info)


def projections(info: hf.ModelInfo, layers: Iterable[int]) -> dict[str, nn.Linear]:
    """The linear projections inside the attention of ``layers``, by ``<layer>.<name>``.

    Raises Unsupported, with the reason, for attention without any, for packed (quantised) weights, for
    sharded weights and for projections that carry adapters already.
    """
    what = f"farspan cannot fine-tune the attention of {type(info.model).__name__}"
    if info.weights_mesh is not None:
        raise Unsupported(what, ["its heads are sharded by tensor parallelism; load the whole model"])
    found: dict[str, nn.Linear] = {}
    for index in layers:
        inside = {} if index not in info.attention else dict(info.attention[index].named_modules())
        for name, module in inside.items():
            if hasattr(module, "base_layer"):
                raise Unsupported(
                    what, [f"{name} of layer {index} has adapters already; merge or remove them first"]
                )
            if not hasattr(module, "in_features"):
                continue
            if not isinstance(module, nn.Linear) or not _plain(module.weight):
                raise Unsupported(
                    what,
                    [
                        f"{name} of layer {index} is quantised ({type(module).__name__}); load the model "
                        "with floating-point weights"
                    ],
                )
            found[f"{index}.{name}"] = module
    if not found:
        raise Unsupported(what, ["it has no linear projections (nn.Linear)"])
    return found


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> Callable[[], None]:
    """Put ``value``, in dtype and on device of the parameter ``name``, in its place. The undo step puts the
    old parameter back; where the model was moved or converted in the meantime, it follows."""
    old: nn.Parameter = getattr(module, name)
    made = nn.Parameter(value.detach().to(old.device, old.dtype, copy=True), requires_grad=old.requires_grad)
    setattr(module, name, made)
    made_on, made_in = made.device, made.dtype

    def restore() -> None:
        now: nn.Parameter = getattr(module, name)
        if (now.device, now.dtype) != (made_on, made_in):
            old.data = old.data.to(now)  # the caller has moved or converted the model in the meantime
        setattr(module, name, old)

    return restore


def _plain(weight: Tensor) -> bool:
    """Whether a weight is stored as floating-point numbers, one each; packed ones are integers or tensors of
    a class of their own."""
    kinds = (Tensor, nn.Parameter)
    return weight.is_floating_point() and weight.element_size() > 1 and type(weight.data) in kinds


def _fits(module: nn.Linear, parts: Mapping[str, Tensor]) -> bool:
    if "a" in parts and "b" in parts:
        a, b = parts["a"], parts["b"]
        return (
            a.shape[1:] == (module.in_features,)
            and b.shape[:1] == (module.out_features,)
            and (b.shape[1:] == a.shape[:1])
        )
    own = {name: p.shape for name, p in module.named_parameters()}
    return {name: x.shape for name, x in parts.items()} == own
