"""What the training loop asks of the thing that is trained."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from ..recipe import Recipe


class Trained(Protocol):
    """Tensors that are trained on windows of a text, and their loss.

    The model is in evaluation mode and on its device during every call.
    """

    @property
    def device(self) -> Any: ...

    @property
    def settings(self) -> dict[str, Any]:
        """Options of its own that the result depends on, defaults included."""
        ...

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer changes."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Every tensor that training changes, buffers included, by a name that is the same in the next
        process. A checkpoint keeps them and ``copy_`` restores them."""
        ...

    def backward(self, ids: Tensor, accelerator: Any) -> Tensor:
        """Run ids [B, T] and call ``accelerator.backward``. Returns the detached loss, a scalar."""
        ...

    def evaluate(self, ids: Tensor) -> dict[str, float]:
        """Measures of held-out ids [B, T], without gradients; "loss" is among them."""
        ...

    def close(self) -> None:
        """Leave the model as it was."""
        ...


class Objective(Trained, Protocol):
    """The same, for tensors that a recipe carries."""

    def recipe(self, settings: dict[str, Any]) -> Recipe:
        """The present tensors as a recipe for ``patch``. settings: how they were made."""
        ...
