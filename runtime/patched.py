"""Patched: a patch of one model, its report and its removal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..attention.attend import DECODE_ROWS
from ..attention.errors import FarspanError
from ..parallel.group.mesh import Mesh
from .chunking import Chunking, Cuts
from .layer import Layer
from .measure import Observer
from .mixers import Mixed
from .recipe import Recipe
from .report import LayerReport, Report


class Patched:
    """A patch of one model. As a context manager it is removed at the end of the ``with`` block."""

    def __init__(
        self,
        model_name: str,
        layers: dict[int, Layer],
        untouched: dict[int, str],
        undo: list[Callable[[], None]],
        mesh: Mesh | None = None,
        notices: Counter[str] | None = None,
        geometry: Mapping[str, Any] | None = None,
        mixed: Mapping[int, Mixed] | None = None,
        chunking: Chunking | None = None,
        room: int | None = None,
        continues: Callable[[], bool] = lambda: True,
    ) -> None:
        self._name = model_name
        self._layers = layers
        self._untouched = untouched
        self._undo: list[Callable[[], None]] | None = undo
        self._mesh = mesh
        self._notices = Counter() if notices is None else notices
        self._geometry = dict(geometry or {})
        self._mixed = dict(mixed or {})
        self._chunking = chunking
        self.room = room  # the positions of caches of a fixed size; None: caches grow
        self._continues = continues  # whether a prompt in several calls is that in one call
        self._sent_before = self._sent()

    def modules(self) -> dict[int, dict[str, nn.Module]]:
        """The modules of methods that own parameters (gates), by layer and by the name of the method."""
        found: dict[int, dict[str, nn.Module]] = {}
        for index, layer in self._layers.items():
            for method in layer.methods.values():
                if method.module is not None:
                    found.setdefault(index, {})[method.name] = method.module
        return found

    def selective_layers(self) -> list[int]:
        """The layers in which the prefill method selects."""
        return [
            index
            for index, layer in self._layers.items()
            if index not in self._untouched and layer.prefill.selective
        ]

    def recipe(self, method: str, **settings: Any) -> Recipe:
        """A recipe of the present weights of the modules of ``method``, for ``patch(recipe=...)``.

        settings: how the weights were made; they are saved with the recipe. Raises FarspanError where no
        layer runs a method of this name that owns a module.
        """
        owners = {
            index: one
            for index, layer in self._layers.items()
            for one in layer.methods.values()
            if one.name == method and one.module is not None
        }
        if not owners:
            raise FarspanError(
                f"No layer of this patch has parameters of {method}: name a method that owns a module and "
                "that some layer runs."
            )
        gates = {index: one.module for index, one in owners.items() if one.module is not None}
        return Recipe.of_modules(next(iter(owners.values())), gates, self._geometry, settings)

    @property
    def mesh(self) -> Mesh | None:
        """The ranks that share a sequence; None on one device."""
        return self._mesh

    @property
    def cuts(self) -> Cuts:
        """Where a prompt may be cut so that the cache of its beginning can be reused for another prompt."""
        pairs = [(x.prefill, x.decode) for i, x in self._layers.items() if i not in self._untouched]
        methods = [method for pair in pairs for method in pair]
        if accumulating := sorted({m.name for m in methods if m.observation_window is None}):
            return Cuts(never=f"{' and '.join(accumulating)} needs every query of the prompt")
        if evicting := sorted({m.name for m in methods if m.evict}):
            return Cuts(never=f"{' and '.join(evicting)} evicts keys at the end of a prompt")
        if not self._continues():
            return Cuts(
                never="layers without attention forget their state between calls in this release of "
                "transformers"
            )
        rest = max([DECODE_ROWS + 1, *(m.observation_window or 1 for m in methods)])
        if looking := sorted({pre.name for pre, _ in pairs if pre.lookahead.is_prompt}):
            if self._chunking is None:
                return Cuts(never=f"{' and '.join(looking)} selects by the end of the prompt")
            return Cuts(step=self._chunking.tokens, rest=rest)
        return Cuts(step=math.lcm(*(m.block_multiple for m in methods)), rest=rest)

    def report(self, *, measure_mass: bool = False) -> Report:
        """What each layer has read since the patch, or since ``reset_report``.

        measure_mass: whether to require the recall of attention mass. It is in the report of every patch that
        was made with measure_mass; for other patches this raises FarspanError.
        """
        if measure_mass and not all(layer.measure for layer in self._layers.values()):
            raise FarspanError(
                "This patch has measured no attention mass: patch the model with measure_mass=True, and call "
                "the model before report(measure_mass=True)."
            )
        for layer in self._layers.values():
            layer.settle()
        layers = [
            LayerReport(
                i,
                {phase: p.snapshot() for phase, p in layer.phases.items()},
                dict(layer.stored),
                layer.dense_stored,
                *layer.hot,
            )
            for i, layer in self._layers.items()
            if i not in self._untouched
        ]
        traffic = dict(self._sent() - self._sent_before)
        mixers = [replace(one.report) for one in self._mixed.values()]
        untouched = {i: why for i, why in self._untouched.items() if i not in self._mixed}
        return Report(self._name, layers, untouched, traffic, dict(self._notices), mixers)

    def watch(self, observers: Mapping[int, Observer]) -> None:
        """Call ``observer(q, keys, selection)`` after every selection of a layer. observers: by layer. The
        patch must have been made with measure_mass."""
        for index, observer in observers.items():
            self._layers[index].observer = observer

    def reset_report(self) -> None:
        """Set all counts of the report to zero."""
        for layer in self._layers.values():
            layer.clear_report()
        for mixer in self._mixed.values():
            mixer.clear_report()
        self._notices.clear()
        self._sent_before = self._sent()

    def _sent(self) -> Counter[str]:
        """All bytes that this rank has sent so far, by collective."""
        groups = [] if self._mesh is None else self._mesh.watch.groups
        return sum((ranks.sent for ranks in groups), Counter())

    def remove(self) -> None:
        """Undo the patch: config, hooks and modules are what they were. Raises FarspanError if it is removed.

        What the caller changed on ``model.config`` after patching stays changed, including an attention
        implementation. If another model shares the config, the changes apply to it from now on.
        """
        if self._undo is None:
            raise FarspanError("This patch is removed already: call remove() once, or use a with block.")
        undo, self._undo = self._undo, None
        for step in reversed(undo):
            step()

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *_: object) -> None:
        if self._undo is not None:
            self.remove()
