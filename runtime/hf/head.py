"""Hidden states and logits apart, so that a loss needs the logits of a few positions at a time only."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from .models import ModelInfo


class Head:
    """A causal LM in two parts: its decoder, and all that its forward computes from the decoder's output.

    The second part is the model's own forward, called with a stand-in for the decoder. Scaling, soft-caps and
    biases of logits are thus the model's own.
    """

    def __init__(self, model: nn.Module, info: ModelInfo) -> None:
        self._model, self._decoder = model, info.decoder
        path = next(name for name, module in model.named_modules() if module is info.decoder)
        parent, _, self._name = path.rpartition(".")
        self._parent = model.get_submodule(parent)

    def hidden(self, ids: Tensor) -> Any:
        """The output of the decoder for ids [B, T]; its ``last_hidden_state`` is [B, T, hidden]."""
        return self._decoder(input_ids=ids, use_cache=False, return_dict=True)

    def logits(self, output: Any, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits [B, n, vocabulary] of ``hidden`` [B, n, hidden], some positions ``ids`` [B, n] of
        ``output``."""
        part = copy.copy(output)
        part["last_hidden_state"] = hidden
        setattr(self._parent, self._name, _Decoded(part))
        try:
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        finally:
            setattr(self._parent, self._name, self._decoder)
        return logits


class _Decoded(nn.Module):
    """Returns an output that was computed before."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._output
