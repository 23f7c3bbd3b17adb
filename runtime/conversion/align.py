"""Stage 1: every mixer learns the output of the attention that it may replace, on the model's own hidden
states."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...attention.errors import FarspanError
from .. import hf
from ..training.checkpoint import FILE
from .student import Student, parameters_of

ABOUT = "about.json"  # in the folder of a stage, once it has ended: its settings and measures


class Aligned:
    """The mixers of all layers, trained together by one pass of the frozen model (``Trained``).

    The loss of a layer is the squared error of its mixer's output, divided by the mean square of the
    attention's: 0 is equality, 1 what an output of zeros has. Layers are learned apart from each other, since
    each mixer gets the hidden states of the unchanged model (2410.10254, 2408.10189).
    """

    settings: ClassVar[dict[str, Any]] = {"stage": "align"}

    def __init__(self, student: Student) -> None:
        self._student = student

    @property
    def device(self) -> torch.device:
        return self._student.device

    def parameters(self) -> list[nn.Parameter]:
        return list(parameters_of(self._student.mixers).values())

    def state(self) -> dict[str, Tensor]:
        mixers = self._student.mixers.items()
        return {f"{i}.{name}": x for i, mixer in mixers for name, x in mixer.state_dict().items()}

    def backward(self, ids: Tensor, accelerator: Any) -> Tensor:
        losses: list[Tensor] = []

        def learn(index: int, loss: Tensor) -> None:
            accelerator.backward(loss)
            losses.append(loss.detach())

        self._run(ids, learn)
        return torch.stack([x.to(losses[0].device) for x in losses]).mean()

    def evaluate(self, ids: Tensor) -> dict[str, float]:
        losses: dict[int, float] = {}
        with self._student.autocast():
            self._run(ids, lambda index, loss: losses.update({index: loss.item()}))
        return {"loss": sum(losses.values()) / len(losses), **{f"layer {i}": x for i, x in losses.items()}}

    def close(self) -> None:
        """Nothing is left in the model."""

    def _run(self, ids: Tensor, on_layer: Callable[[int, Tensor], None]) -> None:
        """Run the model, and call ``on_layer`` with each layer's number and loss."""
        attention = self._student.info.attention
        hooks = [
            attention[index].register_forward_hook(partial(self._observe, on_layer, index), with_kwargs=True)
            for index in self._student.mixers
        ]
        try:
            with torch.no_grad():
                self._student.model(ids.to(self.device), use_cache=False, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()

    def _observe(
        self,
        on_layer: Callable[[int, Tensor], None],
        index: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
    ) -> None:
        mixer = self._student.mixers[index]
        hidden = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).detach()
        wanted = out[0].float()
        with torch.enable_grad():
            got, _ = mixer(hidden.to(hf.dtype_of(mixer)), None, None, kwargs.get("position_embeddings"))
            error = (got.float() - wanted).square().mean() / wanted.square().mean().clamp(min=1e-20)
            on_layer(index, error)


def taken_alignment(work: Path, student: Student, settings: dict[str, Any]) -> dict[str, Any]:
    """Give the mixers of ``student`` the weights that the alignment in the folder ``work`` of another
    conversion has found. Returns what is known ``about`` it, and the ``choice`` that it led to, or None.

    Raises FarspanError where that folder holds no complete alignment of this model, mixer and layers."""
    advice = "give the folder of a conversion that was made with keep=True (--keep)"
    try:
        about = json.loads((work / "align" / ABOUT).read_text())
        tensors = torch.load(work / "align" / FILE, weights_only=True, map_location="cpu")["state"]
    except Exception as error:
        raise FarspanError(f"{work} holds no complete alignment ({error}): {advice}.") from error
    differ = [name for name in ("mixer", "model") if about[name] != json.loads(json.dumps(settings[name]))]
    left = sorted(set(student.mixers) - set(about["layers"]))
    if differ or left:
        what = f"another {' and '.join(differ)}" if differ else f"not the layers {left}"
        raise FarspanError(f"The alignment in {work} is of {what}: {advice} and fits.")
    for index, mixer in student.mixers.items():
        own = mixer.state_dict()
        mixer.load_state_dict({name: tensors[f"{index}.{name}"] for name in own})
    choice = work / "choice.json"
    return {"about": about, "choice": json.loads(choice.read_text()) if choice.exists() else None}
